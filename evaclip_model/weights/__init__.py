"""Weights on disk: every layout that is read, and what is written."""
