"""Weights of a network: read from any file, kept in our own, exported for other programs."""
