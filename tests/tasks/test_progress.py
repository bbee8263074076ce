"""Sizes as text."""

import pytest

from tasks.progress import format_bytes


@pytest.mark.parametrize(
    ("number", "text"),
    [(2_500, "2 kB"), (25e6, "25 MB"), (50e9, "50.0 GB"), (1_234e12, "1,234.0 TB")],
)
def test_a_size_has_the_largest_unit_that_it_reaches(number, text):
    assert format_bytes(number) == text
