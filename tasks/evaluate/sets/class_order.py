"""The label and the name of each class: one rule for every kind of source.

The rule: a list and the source's words are joined by what they say, never by position, wherever
they can be compared. Numbers are places in the list, counted from 0 or from 1. WordNet ids are
places among ImageNet's thousand. Words that cannot be compared are joined by position, and the
person is told.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames
from evaclip_model.zeroshot.set_layout import read_lines
from tasks.evaluate.sets.prompts import find_classnames, imagenet_synsets, subset_classes
from tasks.evaluate.sets.set_registry import KnownSet, NameSource

Order = Literal["", "text", "number"]
"""Count of numbered classes: by the rule; in the order of text; as numbers or not at all."""

_NUMBERED_WORD = re.compile(r"(\d+)\s*[._\- ]\s*(\D.*)")
_SYNSET_WORD = re.compile(r"n\d{8}[._\- ]+(.+)")
_SYNSET_LINE = re.compile(r"(n\d{8})\s+(.+)")
_NUMBER_LINE = re.compile(r"(\d+)[:.]?\s+(.+)")
_NEGATIVE = re.compile(r"-\d+")
_SYNSET = re.compile(r"n\d{8}")
_WORDS = re.compile(r"[A-Z]?[a-z]{2,}|[A-Z]{3,}")
_TWO_COLUMNS = "a file of lines WORD<tab>NAME says it outright"


@dataclass(frozen=True)
class ClassNameList:
    """Class names in the order of labels, from a file or a named source."""

    names: tuple[str, ...]
    source: str
    """Its name in messages."""
    words: tuple[str, ...] = ()
    """The word of the source that each name is for, where the list says it."""


@dataclass(frozen=True)
class ClassOrder:
    """Names in the order of labels, and the label of each word of the source."""

    names: tuple[str, ...]
    labels: Mapping[str, int]
    joined: tuple[str, ...] = ()
    """Sentences on how they were joined, where that is not plain."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """The sentences of `joined`, and the number of classes that no word of the source has."""
        empty = len(self.names) - len(set(self.labels.values()))
        remark = f"{empty} of {len(self.names)} classes have no image here"
        return (*self.joined, remark) if empty else self.joined


def read_class_names(chosen: str, known: KnownSet | None) -> ClassNameList:
    """The list that `--classnames` names: a source, or a file.

    A file has one name a line; or a word of the source, a tab and its name; or an id (a number, a
    WordNet id), a space and its name. A `.json` file holds a list, {"number": "name"} or {"name":
    number}. Raises InputError: no such file or source, or a file of another form.
    """
    for source in get_args(NameSource):
        if chosen == source != "dataset":
            names = find_classnames(known.key if known else "new", source, known, Path())
            return ClassNameList(names, source)
    path = Path(chosen)
    if path.suffix == ".json":
        return _read_json_names(path)
    lines = read_lines(path, "one class name a line")
    if all(line.count("\t") == 1 for line in lines):
        words, names = zip(*(line.split("\t") for line in lines), strict=True)
        return _with_words(words, names, chosen)
    for pattern in (_SYNSET_LINE, _NUMBER_LINE):
        matches = [pattern.fullmatch(line) for line in lines]
        if all(matches):
            ids = tuple(match[1] for match in matches if match)
            numbers = [int(one) for one in ids] if pattern is _NUMBER_LINE else []
            if pattern is _SYNSET_LINE or numbers in _numberings(len(ids)):
                return _with_words(ids, tuple(m[2] for m in matches if m), chosen)
    if any("\t" in line for line in lines):
        odd = next(number for number, line in enumerate(lines, 1) if line.count("\t") != 1)
        raise InputError(f"{chosen} line {odd} is not WORD<tab>NAME: all lines must be, or none")
    return ClassNameList(lines, chosen)


def order_classes(
    words: Sequence[str],
    chosen: ClassNameList | None = None,
    known: KnownSet | None = None,
    *,
    where: str,
    display_names: Mapping[str, str] | None = None,
    order: Order = "",
    first: int | None = None,
) -> ClassOrder:
    """Give every word of a source its label and its name.

    Args:
        words: the source's classes, in its own order (for folders, that of text).
        chosen: the list that names the classes; without one a known set's own, where there is one
            and it can be compared, else the words themselves.
        display_names: names of words, where they are not the words without underscores.
        first: number of the first class of a list, 0 or 1, where the words are numbers.

    Raises InputError: another number of classes than the list or the known set has, numbers without
    a list, a list in another order that cannot be matched word by word.
    """
    if order == "number":
        for word in words:
            if not word.isdecimal():
                raise InputError(
                    f"{where}: '{word}' is not a number, so it gives no label by number"
                )
    negative = next((word for word in words if _NEGATIVE.fullmatch(word)), None)
    if negative and all(word.removeprefix("-").isdecimal() for word in words):
        raise InputError(
            f"{where}: '{negative}' is not the number of a class: leave out what has no label"
        )
    numbered = all(word.isdecimal() for word in words) and order != "text"
    own = {word: (display_names or {}).get(word) or _display_name(word, words) for word in words}
    if chosen is not None:
        return _by_list(words, own, chosen, known, where, numbered, first)
    listed = _list_of_known(known, required=numbered)
    others = [source for source in known.names if source != "dataset"] if known else []
    if numbered:
        if listed is None:
            raise InputError(
                f"{where}: its classes are numbers, which are not names: give --classnames FILE "
                "with one class name a line, or --as NAME where it is a known set"
            )
        return _by_number(words, listed, known, where, first)
    if known is not None and known.classes != len(words):
        raise InputError(
            f"{where} has {len(words)} classes, but {known.title} has {known.classes}: give its "
            "own folder, or leave the name of the known set out"
        )
    synsets = _by_synset(words, None, known, where)
    if synsets is not None:
        return synsets
    remarks: tuple[str, ...] = ()
    if listed is None and others and known:
        remarks = (
            f"the names are the source's own: the list of '{known.key}' ({', '.join(others)}) is "
            "not installed, so they were not compared with it",
        )
    if listed is not None:
        try:
            return _by_list(words, own, listed, known, where, numbered, first)
        except InputError:
            remarks = (
                f"the names are the source's own: they could not be matched with the list of "
                f"'{known.key if known else ''}' ({listed.source})",
            )
    matches = {word: _NUMBERED_WORD.fullmatch(word) for word in words}
    numbers = {word: int(match[1]) for word, match in matches.items() if match}
    ordered = sorted(words, key=numbers.__getitem__) if len(numbers) == len(matches) else words
    labels = {word: label for label, word in enumerate(ordered)}
    return ClassOrder(tuple(own[word] for word in ordered), labels, remarks)


def normalise_name(name: str) -> str:
    """A name without case, spaces and punctuation: what makes two spellings the same word."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(character for character in plain if character.isalnum()) or plain


def _by_list(
    words: Sequence[str],
    own: Mapping[str, str],
    chosen: ClassNameList,
    known: KnownSet | None,
    where: str,
    numbered: bool,
    first: int | None,
) -> ClassOrder:
    if chosen.words:
        return _by_words_of_list(words, chosen, where, numbered)
    if numbered and len(_match_names(words, own, chosen.names)) < len(words):
        return _by_number(words, chosen, known, where, first)
    joined = None if numbered else _by_synset(words, chosen, known, where)
    return joined or _by_text(words, own, chosen, where)


def _by_text(
    words: Sequence[str], own: Mapping[str, str], chosen: ClassNameList, where: str
) -> ClassOrder:
    """Labels by what words and names say; by position where nothing can be compared."""
    matched = _match_names(words, own, chosen.names)
    if len(matched) == len(words):
        return ClassOrder(chosen.names, matched)
    if len(words) != len(chosen.names):
        missing = next(word for word in words if word not in matched)
        raise InputError(
            f"{chosen.source} has {len(chosen.names)} class names for the {len(words)} classes of "
            f"{where}, and none of them is '{missing}': {_TWO_COLUMNS}"
        )
    left = [word for word in words if word not in matched]
    free = [label for label in range(len(words)) if label not in matched.values()]
    if len(left) == 1:
        remark = f"'{left[0]}' was given the one name that is left, '{chosen.names[free[0]]}'"
        return ClassOrder(chosen.names, {**matched, left[0]: free[0]}, (remark,))
    elsewhere = [
        (word, matched[word])
        for place, word in enumerate(words)
        if matched.get(word, place) != place
    ]
    if not matched:
        alike = _similar_names(words, own, chosen.names)
        moved = [(word, label) for place, word, label in alike if place != label]
        elsewhere = moved if 2 * len(moved) > len(alike) else []
    if elsewhere:
        word, label = elsewhere[0]
        raise InputError(
            f"{chosen.source} is in another order than the classes of {where}: '{word}' is class "
            f"{words.index(word)} there and '{chosen.names[label]}' is name {label}; "
            f"{len(words) - len(matched)} of {len(words)} names are spelled otherwise: spell them "
            f"as the source does, then their order does not matter; or {_TWO_COLUMNS}"
        )
    same = f"{len(matched)} of {len(words)}" if matched else "none"
    remark = (
        f"names were joined to the classes of {where} by position ({same} could be compared): "
        f"'{words[0]}' is '{chosen.names[0]}', '{words[-1]}' is '{chosen.names[-1]}'"
    )
    return ClassOrder(chosen.names, {word: label for label, word in enumerate(words)}, (remark,))


def _by_words_of_list(
    words: Sequence[str], chosen: ClassNameList, where: str, numbered: bool
) -> ClassOrder:
    both = numbered and all(word.isdecimal() for word in chosen.words)
    key = (lambda word: str(int(word))) if both else normalise_name
    place = {key(word): label for label, word in enumerate(chosen.words)}
    labels = {}
    for word in words:
        if key(word) not in place:
            raise InputError(f"{chosen.source} has no name for the class '{word}' of {where}")
        labels[word] = place[key(word)]
    return ClassOrder(chosen.names, labels)


def _by_number(
    words: Sequence[str],
    listed: ClassNameList,
    known: KnownSet | None,
    where: str,
    first: int | None,
) -> ClassOrder:
    numbers = {word: int(word) for word in words}
    low, high, count = min(numbers.values()), max(numbers.values()), len(listed.names)
    subset = subset_classes(known)
    if subset and high >= count and set(numbers.values()) <= set(subset):
        return ClassOrder(listed.names, {word: subset.index(n) for word, n in numbers.items()})
    if first is None:
        fits = [start for start in (0, 1) if low >= start and high < count + start]
        if low == 0 or high == count:  # else numbers of either way of counting would look like this
            fits = [0] if low == 0 else [1]
        if len(fits) > 1 or not fits:
            raise InputError(
                f"{where}: its classes are numbers from {low} to {high}, for {count} names of "
                f"{listed.source}: "
                + ("say with --first 0 or --first 1 how they count" if fits else "they do not fit")
            )
        first = fits[0]
        if first == 1 and listed.names == imagenet_classnames():
            raise InputError(
                f"{where}: its classes are numbers from 1; ImageNet's own numbers from 1 (ILSVRC's "
                "ids) are in another order than its names: give a file of lines NUMBER<tab>NAME, "
                "or --first 1 where they are in the order of WordNet ids"
            )
    if low < first or high >= count + first:
        raise InputError(
            f"{where}: its classes are numbers from {low} to {high}, but {listed.source} has "
            f"{count} names, counted from {first}"
        )
    return ClassOrder(
        listed.names,
        {word: number - first for word, number in numbers.items()},
        (f"classes are numbers, counted from {first}",),
    )


def _by_synset(
    words: Sequence[str], chosen: ClassNameList | None, known: KnownSet | None, where: str
) -> ClassOrder | None:
    """Labels of WordNet ids; None where the words are others."""
    if not all(map(_SYNSET.fullmatch, words)):
        return None
    places = {synset: index for index, synset in enumerate(imagenet_synsets())}
    unknown = [word for word in words if word not in places]
    if unknown:
        if chosen is None:
            raise InputError(
                f"{where}: '{unknown[0]}' is not one of ImageNet's {len(places)} WordNet ids: give "
                "--classnames FILE with lines WORDNET-ID NAME"
            )
        return None
    imagenet = dict(zip(imagenet_synsets(), imagenet_classnames(), strict=True))
    ranked = sorted(words, key=places.__getitem__)
    if chosen is None:
        names = tuple(imagenet[word] for word in ranked)
        return ClassOrder(names, {word: label for label, word in enumerate(ranked)})
    if chosen.names == tuple(imagenet.values()):
        return ClassOrder(chosen.names, {word: places[word] for word in words})
    subset = [imagenet_synsets()[index] for index in subset_classes(known)]
    ranked = next(
        (
            all_ids
            for all_ids in (ranked, subset, list(imagenet))
            if len(all_ids) == len(chosen.names)
        ),
        [],
    )
    if not set(words) <= set(ranked):
        return None
    joined = _by_text(ranked, imagenet, ClassNameList(chosen.names, chosen.source), where)
    labels = {word: joined.labels[word] for word in words}
    return ClassOrder(joined.names, labels, joined.joined)


def _match_names(
    words: Sequence[str], own: Mapping[str, str], names: Sequence[str]
) -> dict[str, int]:
    """Words that are one of the names, whatever their case and punctuation, with its label."""
    keys = [normalise_name(name) for name in names]
    often = Counter(keys)
    place = {key: label for label, key in enumerate(keys) if often[key] == 1}
    found = {}
    for word in words:
        for key in (normalise_name(word), normalise_name(own[word])):
            if key in place:
                found[word] = place[key]
                break
    often_used = Counter(found.values())
    return {word: label for word, label in found.items() if often_used[label] == 1}


def _similar_names(
    words: Sequence[str], own: Mapping[str, str], names: Sequence[str]
) -> list[tuple[int, str, int]]:
    """(place, word, label) of the words that share words with one name more than with any other."""
    parts = [_name_parts(name) for name in names]
    found = []
    for place, word in enumerate(words):
        shared = [len(_name_parts(own[word]) & part) for part in parts]
        best = max(shared)
        if best and shared.count(best) == 1:
            found.append((place, word, shared.index(best)))
    return found


def _name_parts(name: str) -> set[str]:
    return {part.casefold() for part in _WORDS.findall(name)}


def _list_of_known(known: KnownSet | None, required: bool) -> ClassNameList | None:
    """A known set's own list of names, where it has one that is installed. Raises InputError: it is
    required and not installed."""
    for source in known.names if known else ():
        if source == "dataset":
            continue
        try:
            return read_class_names(source, known)
        except InputError:
            if required:
                raise
    return None


def _display_name(word: str, words: Sequence[str]) -> str:
    """The word as a name: without underscores, nor an id in front that every word has."""
    for pattern, group in ((_NUMBERED_WORD, 2), (_SYNSET_WORD, 1)):
        if all(map(pattern.fullmatch, words)):
            match = pattern.fullmatch(word)
            assert match is not None
            word = match[group]
            break
    return " ".join(word.replace("_", " ").split())


def _numberings(count: int) -> tuple[list[int], list[int]]:
    return list(range(count)), list(range(1, count + 1))


def _with_words(words: Sequence[str], names: Sequence[str], source: str) -> ClassNameList:
    words, names = ([one.strip() for one in column] for column in (words, names))
    twice = [word for word, count in Counter(words).items() if count > 1]
    if twice:
        raise InputError(f"{source} names '{twice[0]}' twice")
    return ClassNameList(tuple(names), source, tuple(words))


def _read_json_names(path: Path) -> ClassNameList:
    expected = 'expected ["name", ...], {"0": "name", ...} or {"name": 0, ...}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {expected}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON: {expected}") from None
    if isinstance(content, list) and content and all(isinstance(one, str) for one in content):
        return ClassNameList(tuple(content), str(path))
    if isinstance(content, dict) and content:
        pairs = list(content.items())
        if all(isinstance(value, int) for _, value in pairs):
            pairs = [(str(number), name) for name, number in pairs]
        if all(key.isdecimal() and isinstance(value, str) for key, value in pairs):
            pairs.sort(key=lambda pair: int(pair[0]))
            if [int(key) for key, _ in pairs] in _numberings(len(pairs)):
                names = tuple(name for _, name in pairs)
                # {"cat": 0}: the names are the words; {"0": "cat"}: the numbers may be.
                return ClassNameList(names, str(path))
    raise InputError(f"{path} has another form: {expected}")
