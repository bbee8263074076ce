"""What a training reports of itself, and what stops it."""
