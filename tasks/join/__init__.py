"""Several verifications as one, so that a dataset version may be made of many downloads."""
