"""Stage: features of every verified sample by models that exist, made once."""
