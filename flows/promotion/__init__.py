"""Comparing a candidate with the champion, and acting on the gate's decision."""
