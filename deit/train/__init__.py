"""Training, under the name that users import: `torchrun ... -m deit.train`; see `deit.training`."""

from deit.training.trainer import NotFinite, TooManyUnreadable, Trainer, train

__all__ = ["NotFinite", "TooManyUnreadable", "Trainer", "train"]
