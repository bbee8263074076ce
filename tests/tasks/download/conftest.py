"""A web on loopback for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tasks.download.web import Web, serving


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with serving() as server:
        yield server
