"""Verify: downloaded shards in, a manifest of those that can be trained on out."""
