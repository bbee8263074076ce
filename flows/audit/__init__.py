"""Origins of samples and models, and taking samples out."""
