"""One comparison: contenders built, checked, planned, timed in interleaved rounds, shown."""
