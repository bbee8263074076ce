"""Artifacts and summaries in Prefect, and tables of results."""
