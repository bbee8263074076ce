"""What a set holds, and what is odd about it, before anything is evaluated on it.

Covers: counts, classes without images, equal images, images that cannot be decoded.
Not here: the layout's own checks (sets.py); figures.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from evaclip_model.reading.transform import UnreadableImageError, decode_image
from tasks.evaluate.sets.published_layout import EvalSample, EvalSet
from tasks.progress import Report, silent

SHOWN = 3
"""Examples of each oddity."""


@dataclass(frozen=True)
class Checked:
    """What was found in a set."""

    evalset: EvalSet
    unreadable: tuple[tuple[str, str], ...]
    """(key, reason)"""

    def facts(self) -> Iterator[tuple[str, str]]:
        """What it is, as (what, value)."""
        one = self.evalset
        yield "kind", one.kind
        yield "images", f"{len(one):,} in {len({sample.image.tar for sample in one.samples})} tars"
        if one.kind == "retrieval":
            yield "captions", f"{sum(len(sample.captions) for sample in one.samples):,}"
        else:
            yield "classes", f"{len(one.classnames):,}: {_some(one.classnames)}"
            yield "templates", f"{len(one.templates)} ({one.prompts_source}): {one.templates[0]}"
        yield "fingerprint", one.fingerprint

    def oddities(self) -> Iterator[str]:
        """What a person should look at, a sentence each."""
        one = self.evalset
        yield from one.warnings
        if one.known is not None and not one.known.split_stated:
            yield f"the paper does not say which images these are: {one.known.split}"
        yield from _of_classes(one)
        images = Counter(sample.sha256 for sample in one.samples)
        again = sum(count - 1 for count in images.values())
        if again:
            yield f"{again:,} images are copies of others, byte by byte"
        if one.kind == "retrieval":
            texts = Counter(text for sample in one.samples for text in set(sample.captions))
            shared = sum(count > 1 for count in texts.values())
            if shared:
                yield f"{shared:,} captions belong to several images word for word: exact ties"
        if self.unreadable:
            names = _some([f"{key} ({reason})" for key, reason in self.unreadable])
            yield f"{len(self.unreadable):,} images cannot be decoded: {names}"


def check_set(evalset: EvalSet, report: Report = silent) -> Checked:
    """Decode every image of a set."""
    unreadable = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "check") as pool:
        results = pool.map(_reason, evalset.samples)
        for done, (sample, reason) in enumerate(zip(evalset.samples, results, strict=True), 1):
            if reason:
                unreadable.append((sample.key, reason))
            report(done, len(evalset), sample.key)
    return Checked(evalset, tuple(unreadable))


def _reason(sample: EvalSample) -> str:
    """Why its image cannot be decoded; empty if it can."""
    try:
        decode_image(sample.image.read())
    except UnreadableImageError as error:
        return str(error)
    return ""


def _of_classes(evalset: EvalSet) -> Iterator[str]:
    if evalset.kind == "retrieval":
        return
    names = Counter(evalset.classnames)
    shared = [name for name, count in names.items() if count > 1]
    if shared:
        yield f"{len(shared)} names stand for several classes, which tie exactly: {_some(shared)}"
    seen = {label for one in evalset.samples for label in (one.label, *one.labels)}
    empty = [name for label, name in enumerate(evalset.classnames) if label not in seen]
    if empty:
        yield f"{len(empty)} classes have no image: {_some(empty)}"


def _some(items: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
