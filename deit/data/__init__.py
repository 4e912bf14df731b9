"""Labelled images for training: where they are, in which order, how augmented, how mixed."""

from deit.data.loader import Batch, Loader
from deit.data.sources import Source, open_source

__all__ = ["Batch", "Loader", "Source", "open_source"]
