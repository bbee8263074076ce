"""Evaluate: zero-shot figures of a model on sets it never saw, and a report to look at."""
