"""Weights of a network: layouts of many libraries read, our own written; networks by name."""
