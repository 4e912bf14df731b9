"""`python -m deit`, the same as the command `deit`."""

import sys

from deit.cli import main

sys.exit(main())
