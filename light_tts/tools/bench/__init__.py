"""The load generator behind `test/benchmark.py` and `light-tts bench`."""
