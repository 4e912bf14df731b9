"""The stages of `bench/qualify.py`."""
