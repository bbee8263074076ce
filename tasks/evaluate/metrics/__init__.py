"""Metrics of an evaluation, their significance, and doubts about them."""
