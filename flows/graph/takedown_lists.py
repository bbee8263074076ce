"""Entries of takedown lists, in the words of the merge and of the sample index."""

from __future__ import annotations

from collections.abc import Iterable

from flows.graph.step import Step
from tasks.dataset.choose import Asked, find_asked, sort_by_kind
from tasks.dataset.dataset import Takedowns
from tasks.index.sample_index import Kind
from tasks.merge.normal_urls import normal_urls


def asked_for(entries: Iterable[str]) -> Asked:
    """Entries of takedown lists by kind, URLs as the merge writes them."""
    by_kind = dict(sort_by_kind(entries))
    if by_kind[Kind.URL]:
        normal = zip(by_kind[Kind.URL], normal_urls(by_kind[Kind.URL]), strict=True)
        by_kind[Kind.URL] = tuple(ours or theirs for theirs, ours in normal)
    return by_kind


def takedowns_of(entries: tuple[str, ...], plain: Step) -> Takedowns:
    """What `entries` take out of a dataset version; `plain` is the version without any takedowns,
    whose choice is taken over where it is finished."""
    if not entries:
        return Takedowns()
    asked = asked_for(entries)
    before = plain.folder if plain.is_finished else None
    return Takedowns(entries, lambda index: find_asked(index, asked), before)
