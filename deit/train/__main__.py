"""`deit train` for the processes that torchrun starts."""

import sys

from deit.commands.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
