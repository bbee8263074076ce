"""Lineage: every run, stage, dataset and figure as a run tree in MLflow."""
