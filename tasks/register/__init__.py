"""Registering a trained model where others can load it, and pulling it back."""
