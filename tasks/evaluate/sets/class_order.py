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
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from evaclip_model.errors import InputError
from evaclip_model.reading.urls import read_text
from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames
from evaclip_model.zeroshot.set_layout import read_lines
from tasks.evaluate.sets import prompts
from tasks.evaluate.sets.set_registry import KnownSet, NameSource, PromptSource

NO_TEMPLATES = "none"
"""Leaves the file of templates out: the recipe must name some then."""
Order = Literal["", "text", "number"]
"""Count of numbered classes: by the rule; in the order of text; as numbers or not at all."""

_NUMBER = re.compile(r"\d{1,100}")
"""Python reads no number of more than a few thousand digits."""
_NUMBERED_WORD = re.compile(r"(\d{1,100})\s*[._\- ]\s*(?P<name>\D.*)")
_SYNSET_WORD = re.compile(r"n\d{8}[._\- ]+(?P<name>.+)")
_SYNSET_LINE = re.compile(r"(n\d{8})\s+(.+)")
_NUMBER_LINE = re.compile(r"(\d{1,100})(?:[:.]?\s+|\s*[,;]\s*)\"?(.+?)\"?")
_NEGATIVE = re.compile(r"-\d+")
_SYNSET = re.compile(r"n\d{8}")
_WORDS = re.compile(r"[A-Z]?[a-z]{2,}|[A-Z]{3,}")
_TWO_COLUMNS = "a file of lines WORD<tab>NAME says it outright"


@dataclass(frozen=True)
class ClassNameList:
    """Class names in the order of labels, from a file or a named source."""

    names: tuple[str, ...]
    source: str
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


@dataclass(frozen=True)
class Words:
    """A person's choices of a new set's names and prompts."""

    known: KnownSet | None = None
    classnames: str = ""
    """A source's name or a file (`read_class_names`); the rule of this module where empty."""
    templates: str = ""
    """A source's name, a file, or "none"; the known set's first other source where empty."""
    order: Order = ""
    first: int | None = None
    """Number of the first class, 0 or 1, where classes are numbers; told from them where unset."""

    def set_templates(self) -> tuple[str, ...]:
        chosen = self.templates
        if not chosen and self.known is not None:
            # A set to be written has no templates of its own yet.
            chosen = next((one for one in self.known.prompts if one != "dataset"), "")
        if chosen == NO_TEMPLATES:
            return ()
        if not chosen:
            raise InputError(
                "which prompt templates has this set? give --templates FILE, with {c} for the "
                "class name in each line, or --templates none"
            )
        for source in get_args(PromptSource):
            if chosen == source != "dataset":
                key = self.known.key if self.known else "new"
                return prompts.find_templates(key, source, self.known, Path())
        lines = read_lines(Path(chosen), "one prompt template with {c} a line")
        return prompts.require_placeholder(lines, chosen)


@dataclass(frozen=True)
class _SourceClasses:
    words: Sequence[str]
    own: Mapping[str, str]
    """Word -> the name that it gives itself."""
    where: str
    known: KnownSet | None
    first: int | None
    numbered: bool
    """True: the words are numbers, and count as such."""


def read_class_names(chosen: str, known: KnownSet | None) -> ClassNameList:
    """The list that `--classnames` names: a source, or a file.

    A file has one name a line; or a word of the source, a tab and its name; or an id (a number, a
    WordNet id), a space and its name. A `.json` file holds a list, {"number": "name"} or {"name":
    number}. Raises InputError: no such file or source, or a file of another form.
    """
    for source in get_args(NameSource):
        if chosen == source != "dataset":
            names = prompts.find_classnames(known.key if known else "new", source, known, Path())
            return ClassNameList(names, source)
    path = Path(chosen)
    if path.suffix == ".json":
        return ClassNameList(_read_json_names(path), chosen)
    lines = read_lines(path, "one class name a line")
    tabs = [line.split("\t") for line in lines]
    if all(len(cells) == 2 for cells in tabs):
        return _with_words(tabs, chosen)
    for pattern in (_SYNSET_LINE, _NUMBER_LINE):
        pairs = [match.groups() for match in map(pattern.fullmatch, lines) if match]
        if len(pairs) == len(lines) and (
            pattern is _SYNSET_LINE or [int(one) for one, _ in pairs] in _numberings(len(pairs))
        ):
            return _with_words(pairs, chosen)
    if any("\t" in line for line in lines):
        odd = next(number for number, cells in enumerate(tabs, 1) if len(cells) != 2)
        raise InputError(f"{chosen} line {odd} is not WORD<tab>NAME: all lines must be, or none")
    return ClassNameList(lines, chosen)


def list_of_known(known: KnownSet | None, required: bool = False) -> ClassNameList | None:
    """A known set's own list, where installed. Raises InputError: it is required and is not."""
    for source in known.names if known else ():
        if source != "dataset":
            with suppress(*([] if required else [InputError])):
                return read_class_names(source, known)
    return None


def order_classes(
    words: Sequence[str],
    wanted: Words,
    *,
    where: str,
    display_names: Mapping[str, str] | None = None,
) -> ClassOrder:
    """Give every word of a source its label and its name. Raises InputError: another number of
    classes than the list or the known set has, numbers without a list, a list in another order that
    cannot be matched word by word.

    Args:
        words: the source's classes, in its own order (for folders, that of text).
        wanted: its list names the classes; without one a known set's own, where there is one and it
            can be compared, else the words themselves.
        display_names: names of words, where they are not the words without underscores.
    """
    known = wanted.known
    chosen = read_class_names(wanted.classnames, known) if wanted.classnames else None
    odd = next((word for word in words if not is_number(word)), None)
    if wanted.order == "number" and odd is not None:
        raise InputError(f"{where}: '{odd}' is not a number, so it gives no label by number")
    negative = next((word for word in words if _NEGATIVE.fullmatch(word)), None)
    if negative and all(word.removeprefix("-").isdecimal() for word in words):
        raise InputError(
            f"{where}: '{negative}' is not the number of a class: leave out what has no label"
        )
    numbered = odd is None and wanted.order != "text"
    own = {word: (display_names or {}).get(word) or _display_name(word, words) for word in words}
    source = _SourceClasses(words, own, where, known, wanted.first, numbered)
    if chosen is not None:
        return _by_list(source, chosen)
    listed = list_of_known(known, required=numbered)
    if numbered and listed is None:
        raise InputError(
            f"{where}: its classes are numbers, which are not names: give --classnames FILE "
            "with one class name a line, or --as NAME where it is a known set"
        )
    if numbered and listed:
        return _by_number(source, listed)
    if known is not None and known.classes != len(words):
        raise InputError(
            f"{where} has {len(words)} classes, but {known.title} has {known.classes}: give its "
            "own folder, or leave the name of the known set out"
        )
    if synsets := _by_synset(source, None):
        return synsets
    why = ""
    if known and listed is not None:
        try:
            return _by_list(source, listed)
        except InputError:
            why = f"they could not be matched with the list of '{known.key}' ({listed.source})"
    elif known and (others := [one for one in known.names if one != "dataset"]):
        why = (
            f"the list of '{known.key}' ({', '.join(others)}) is not installed, so they were not "
            "compared with it"
        )
    matches = [(match, word) for word in words if (match := _NUMBERED_WORD.fullmatch(word))]
    ordered = words
    if len(matches) == len(words):
        ordered = [word for _, word in sorted(matches, key=lambda pair: int(pair[0][1]))]
    return ClassOrder(
        tuple(own[word] for word in ordered),
        {word: label for label, word in enumerate(ordered)},
        (f"the names are the source's own: {why}",) if why else (),
    )


def is_number(word: str) -> bool:
    """Tell whether a source's word for a class is a number."""
    return _NUMBER.fullmatch(word) is not None


def normalise_name(name: str) -> str:
    """A name without case, spaces and punctuation: what makes two spellings the same word."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(character for character in plain if character.isalnum()) or plain


def _by_list(source: _SourceClasses, chosen: ClassNameList) -> ClassOrder:
    if chosen.words:
        return _by_words_of_list(source, chosen)
    if source.numbered and len(_match_names(source, chosen.names)) < len(source.words):
        return _by_number(source, chosen)
    joined = None if source.numbered else _by_synset(source, chosen)
    return joined or _by_text(source, chosen)


def _by_text(source: _SourceClasses, chosen: ClassNameList) -> ClassOrder:
    """Labels by what words and names say; by position where nothing can be compared."""
    words, where, names = source.words, source.where, chosen.names
    matched = _match_names(source, names)
    left = [word for word in words if word not in matched]
    if not left:
        return ClassOrder(names, matched)
    if len(words) != len(names):
        raise InputError(
            f"{chosen.source} has {len(names)} class names for the {len(words)} classes of "
            f"{where}, and none of them is '{left[0]}': {_TWO_COLUMNS}"
        )
    if len(left) == 1:
        (free,) = {*range(len(words))}.difference(matched.values())
        remark = f"'{left[0]}' was given the one name that is left, '{names[free]}'"
        return ClassOrder(names, {**matched, left[0]: free}, (remark,))
    found = matched or _similar_names(source, names)
    elsewhere = [(one, found[one]) for n, one in enumerate(words) if found.get(one, n) != n]
    if elsewhere and (matched or 2 * len(elsewhere) > len(found)):
        word, label = elsewhere[0]
        raise InputError(
            f"{chosen.source} is in another order than the classes of {where}: '{word}' is class "
            f"{words.index(word)} there and '{names[label]}' is name {label}; "
            f"{len(left)} of {len(words)} names are spelled otherwise: spell them "
            f"as the source does, then their order does not matter; or {_TWO_COLUMNS}"
        )
    same = f"{len(matched)} of {len(words)}" if matched else "none"
    remark = (
        f"names were joined to the classes of {where} by position ({same} could be compared): "
        f"'{words[0]}' is '{names[0]}', '{words[-1]}' is '{names[-1]}'"
    )
    return ClassOrder(names, {word: label for label, word in enumerate(words)}, (remark,))


def _by_words_of_list(source: _SourceClasses, chosen: ClassNameList) -> ClassOrder:
    both = source.numbered and all(map(is_number, chosen.words))
    key = (lambda word: str(int(word))) if both else normalise_name
    place = {key(word): label for label, word in enumerate(chosen.words)}
    for word in source.words:
        if key(word) not in place:
            where = source.where
            raise InputError(f"{chosen.source} has no name for the class '{word}' of {where}")
    return ClassOrder(chosen.names, {word: place[key(word)] for word in source.words})


def _by_number(source: _SourceClasses, listed: ClassNameList) -> ClassOrder:
    numbers = {word: int(word) for word in source.words}
    low, high, count = min(numbers.values()), max(numbers.values()), len(listed.names)
    subset, first = prompts.subset_classes(source.known), source.first
    if subset and high >= count and {*numbers.values()} <= {*subset}:
        return ClassOrder(listed.names, {word: subset.index(n) for word, n in numbers.items()})
    said = f"{source.where}: its classes are numbers from"
    if first is None:
        fits = [start for start in (0, 1) if low >= start and high < count + start]
        if low == 0 or high == count:  # else numbers of either way of counting would look like this
            fits = [int(low != 0)]
        if len(fits) != 1:
            raise InputError(
                f"{said} {low} to {high}, for {count} names of {listed.source}: "
                + ("say with --first 0 or --first 1 how they count" if fits else "they do not fit")
            )
        first = fits[0]
        if first == 1 and listed.names == imagenet_classnames():
            raise InputError(
                f"{said} 1; ImageNet's own numbers from 1 (ILSVRC's ids) are in another order than "
                "its names: give a file of lines NUMBER<tab>NAME, or --first 1 where they are in "
                "the order of WordNet ids"
            )
    if low < first or high >= count + first:
        raise InputError(
            f"{said} {low} to {high}, but {listed.source} has {count} names, counted from {first}"
        )
    labels = {word: number - first for word, number in numbers.items()}
    return ClassOrder(listed.names, labels, (f"classes are numbers, counted from {first}",))


def _by_synset(source: _SourceClasses, chosen: ClassNameList | None) -> ClassOrder | None:
    """Labels of WordNet ids; None where the words are others."""
    if not all(map(_SYNSET.fullmatch, source.words)):
        return None
    imagenet = dict(zip(prompts.imagenet_synsets(), imagenet_classnames(), strict=True))
    places = {synset: label for label, synset in enumerate(imagenet)}
    unknown = next((word for word in source.words if word not in places), None)
    if unknown and chosen is None:
        raise InputError(
            f"{source.where}: '{unknown}' is not one of ImageNet's {len(places)} WordNet ids: give "
            "--classnames FILE with lines WORDNET-ID NAME"
        )
    if unknown:
        return None
    ranked = sorted(source.words, key=places.__getitem__)
    if chosen is None:
        names = tuple(imagenet[word] for word in ranked)
        return ClassOrder(names, {word: label for label, word in enumerate(ranked)})
    if chosen.names == tuple(imagenet.values()):
        return ClassOrder(chosen.names, {word: places[word] for word in source.words})
    subset = [prompts.imagenet_synsets()[index] for index in prompts.subset_classes(source.known)]
    of_its_size = (ids for ids in (ranked, subset, [*imagenet]) if len(ids) == len(chosen.names))
    ids = next(of_its_size, [])
    if not {*source.words} <= {*ids}:
        return None
    joined = _by_text(replace(source, words=ids, own=imagenet), chosen)
    return replace(joined, labels={word: joined.labels[word] for word in source.words})


def _match_names(source: _SourceClasses, names: Sequence[str]) -> dict[str, int]:
    """Words that are one of the names, whatever their case and punctuation, with its label."""
    keys = [normalise_name(name) for name in names]
    often = Counter(keys)
    place = {key: label for label, key in enumerate(keys) if often[key] == 1}
    found = {}
    for word in source.words:
        for key in (normalise_name(word), normalise_name(source.own[word])):
            if key in place:
                found[word] = place[key]
                break
    often_used = Counter(found.values())
    return {word: label for word, label in found.items() if often_used[label] == 1}


def _similar_names(source: _SourceClasses, names: Sequence[str]) -> dict[str, int]:
    """Words that share words with one name more than with any other, with its label."""
    parts = [_name_parts(name) for name in names]
    found = {}
    for word in source.words:
        shared = [len(_name_parts(source.own[word]) & part) for part in parts]
        best = max(shared)
        if best and shared.count(best) == 1:
            found[word] = shared.index(best)
    return found


def _name_parts(name: str) -> set[str]:
    return {part.casefold() for part in _WORDS.findall(name)}


def _display_name(word: str, words: Sequence[str]) -> str:
    """The word as a name: without underscores, nor an id in front that every word has."""
    for pattern in (_NUMBERED_WORD, _SYNSET_WORD):
        if all(map(pattern.fullmatch, words)):
            word = pattern.sub(r"\g<name>", word)
            break
    return " ".join(word.replace("_", " ").split())


def _numberings(count: int) -> tuple[list[int], list[int]]:
    return list(range(count)), list(range(1, count + 1))


def _with_words(pairs: Sequence[Sequence[str]], source: str) -> ClassNameList:
    words, names = ([one.strip() for one in column] for column in zip(*pairs, strict=True))
    for word, count in Counter(words).items():
        if count > 1:
            raise InputError(f"{source} names '{word}' twice")
    return ClassNameList(tuple(names), source, tuple(words))


def _read_json_names(path: Path) -> tuple[str, ...]:
    expected = 'expected ["name", ...], {"0": "name", ...} or {"name": 0, ...}'
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {expected}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON: {expected}") from None
    if isinstance(content, dict):
        pairs = [*content.items()]
        if all(isinstance(value, int) for _, value in pairs):
            pairs = [(str(number), name) for name, number in pairs]
        named = {int(key): name for key, name in pairs if is_number(key)}
        fits = sorted(named) in _numberings(len(pairs))
        content = [named[number] for number in sorted(named)] if fits else []
    if content and isinstance(content, list) and all(isinstance(one, str) for one in content):
        return tuple(content)
    raise InputError(f"{path} has another form: {expected}")
