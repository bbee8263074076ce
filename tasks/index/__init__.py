"""The index of stored samples, verdicts on shards, image hashes."""
