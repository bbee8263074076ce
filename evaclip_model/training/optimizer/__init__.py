"""LAMB, parameter groups, learning rates."""
