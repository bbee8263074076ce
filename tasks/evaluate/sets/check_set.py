"""A look at a set's content, and at what is odd about it, before an evaluation."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from tasks.evaluate.sets.class_order import list_of_known, normalise_name
from tasks.evaluate.sets.published_layout import EvalSample, EvalSet
from tasks.evaluate.sets.set_registry import KnownSet
from tasks.progress import Report, report_nothing

SHOWN = 3
"""Examples of each oddity."""
_ODD_NAMES = (
    ("are numbers", re.compile(r"^\d+$")),
    ("are WordNet ids", re.compile(r"^n\d{8}")),
    ("begin with a number", re.compile(r"^\d+[._-]")),
    ("have an underscore", re.compile("_")),
    ("look like files", re.compile(r"\.(jpe?g|png|webp|txt)$", re.I)),
    ("have spaces or quotes at an end", re.compile(r"""^[\s"']|[\s"']$""")),
)


def check_set(evalset: EvalSet, report: Report = report_nothing) -> dict[str, str]:
    """Decode every image of a set: the keys of those that cannot be, with the reason."""
    unreadable = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "check") as pool:
        results = pool.map(_decode_reason, evalset.samples)
        for done, (sample, reason) in enumerate(zip(evalset.samples, results, strict=True), 1):
            if reason:
                unreadable[sample.key] = reason
            report(done, len(evalset), sample.key)
    return unreadable


def _decode_reason(sample: EvalSample) -> str:
    try:
        decode_image(sample.image.read())
    except UnreadableImageError as error:
        return str(error)
    return ""


def list_facts(evalset: EvalSet) -> Iterator[tuple[str, str]]:
    """(what, value) of kind, size, names, prompts and fingerprint."""
    one = evalset
    yield "kind", one.kind
    yield "images", f"{len(one):,} in {len({sample.image.tar for sample in one.samples})} tars"
    if one.questions:
        yield "questions", f"{len(one.questions):,}: {one.questions[0].form}"
    if not one.classnames:
        yield "captions", f"{len(one.captions):,}"
    else:
        yield "classes", f"{len(one.classnames):,}: {some_names(one.classnames)}"
        yield "templates", f"{len(one.templates)} ({one.prompts_source}): {one.templates[0]}"
    yield "fingerprint", one.fingerprint


def list_oddities(evalset: EvalSet, unreadable: Mapping[str, str]) -> Iterator[str]:
    """Sentences on what is odd, `unreadable` images among it."""
    yield from evalset.warnings
    known, names = evalset.known, evalset.classnames
    if known is not None and not known.split_stated:
        yield f"the paper does not say which images these are: {known.split}"
    if names:
        yield from odd_names(names, known)
        seen = {label for one in evalset.samples for label in (one.label, *one.labels)}
        empty = [name for label, name in enumerate(names) if label not in seen]
        yield from _count_odd(empty, "classes have no image")
    if again := len(evalset) - len({sample.sha256 for sample in evalset.samples}):
        yield f"{again:,} images are copies of others, byte by byte"
    texts = Counter(text for sample in evalset.samples for text in set(sample.captions))
    if shared := sum(count > 1 for count in texts.values()):
        yield f"{shared:,} captions belong to several images word for word: exact ties"
    reasons = [f"{key} ({reason})" for key, reason in unreadable.items()]
    yield from _count_odd(reasons, "images cannot be decoded")


def odd_names(classnames: Sequence[str], known: KnownSet | None) -> Iterator[str]:
    names = Counter(classnames)
    shared = [name for name, count in names.items() if count > 1]
    yield from _count_odd(shared, "names stand for several classes, which tie exactly")
    spellings: dict[str, list[str]] = {}
    for name in names:
        spellings.setdefault(normalise_name(name), []).append(name)
    alike = [" and ".join(each) for each in spellings.values() if len(each) > 1]
    yield from _count_odd(alike, "names differ from another in case or punctuation alone")
    for what, pattern in () if known and known.key == "mnist" else _ODD_NAMES:
        odd = [name for name in names if pattern.search(name)]
        yield from _count_odd(odd, f"names {what}, which a text tower reads as they stand")
    yield from _compare_with_known(classnames, known)


def some_names(names: Sequence[str]) -> str:
    """The first and the last names of a list; all where they are few."""
    if len(names) <= 2 * SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:SHOWN])} ... {', '.join(names[-SHOWN:])}"


def _compare_with_known(classnames: Sequence[str], known: KnownSet | None) -> Iterator[str]:
    """Names against the known set's own list, where that is installed and of the same words."""
    listed = list_of_known(known)
    if listed is None or known is None:
        return
    own, others = ([normalise_name(name) for name in one] for one in (classnames, listed.names))
    if own == others:
        return
    if sorted(own) == sorted(others):
        pairs = zip(classnames, own, others, strict=True)
        moved = [name for name, key, other in pairs if key != other]
        (elsewhere,) = _count_odd(moved, "stand elsewhere")
        yield (
            f"the names are those of {listed.source}'s list in another order ({elsewhere}): right "
            "where the labels follow this order"
        )
    else:
        extra = [name for name, key in zip(classnames, own, strict=True) if key not in others]
        yield from _count_odd(extra, f"names are not in {listed.source}'s list of '{known.key}'")


def _count_odd(items: Sequence[str], what: str) -> Iterator[str]:
    """A sentence on how many there are, with examples; none where there are none."""
    if items:
        more = f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
        yield f"{len(items):,} {what}: {', '.join(items[:SHOWN])}{more}"
