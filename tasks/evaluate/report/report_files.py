"""Names of the files that the reports consist of; the page's and the figures' are in config.py.

Covers: names only. Imports nothing heavy, because flows name the files too.
"""

from __future__ import annotations

from tasks.evaluate.config import REPORT, RESULTS

MARKDOWN = "report.md"
"""The report as text."""
SUMMARY = "summary.md"
"""Its first screen, for the page of a flow run."""
FIGURES = "figures.csv"
"""Every figure as a flat table."""
ATTACHED = (REPORT, MARKDOWN, RESULTS, FIGURES)
"""What is kept with the tracking run."""
