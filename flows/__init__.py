"""Which stages run, and in which order."""
