"""Each operator by itself: its calls, what runs them, and their benchmarks for pytest."""
