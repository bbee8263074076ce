"""The search page of `make up`."""
