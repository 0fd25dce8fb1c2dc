"""The implementation of `scripts/evaluate.py`."""
