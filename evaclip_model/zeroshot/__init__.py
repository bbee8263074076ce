"""Zero-shot classification and retrieval: prompts, ranks, statistics."""
