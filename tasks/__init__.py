"""How each stage does its work: one folder a stage, pure modules under one thin task.py."""
