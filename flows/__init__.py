"""The stages that run, and their order."""
