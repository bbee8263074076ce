"""What a run would do and cost, and whether this machine can do it."""
