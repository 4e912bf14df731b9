"""`python -m deit`, the same as the command `deit`."""

import sys

from deit.commands.cli import main

sys.exit(main())
