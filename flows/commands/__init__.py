"""Commands of `python -m flows`."""
