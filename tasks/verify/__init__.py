"""Verify: downloaded shards in, a verdict on each and an index of their samples out."""
