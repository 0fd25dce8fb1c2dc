"""Parts of the load generator `test/benchmark.py`."""
