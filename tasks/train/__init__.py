"""Train one stage: a starting model and verified shards to a trained model."""
