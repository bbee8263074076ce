"""Recipes and profiles: loading, overrides, validation."""
