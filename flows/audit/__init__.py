"""Where a sample or a model comes from, and taking samples out."""
