"""LAMB, parameter groups, the running mean of weights."""
