"""Weights into a DeiT and out of it, under the name that users import; see `deit.weights`."""

from deit.weights.checkpoint import load, load_into, resize_positions, save

__all__ = ["load", "load_into", "resize_positions", "save"]
