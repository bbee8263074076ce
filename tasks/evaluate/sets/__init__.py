"""Evaluation sets: what they are, reading, checking and converting them."""
