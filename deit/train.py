"""Training, under the name that users import: `torchrun ... -m deit.train`; see `deit.training`."""

import sys

from deit.training.trainer import NotFinite, TooManyUnreadable, Trainer, train

__all__ = ["NotFinite", "TooManyUnreadable", "Trainer", "train"]

if __name__ == "__main__":
    from deit.commands.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
