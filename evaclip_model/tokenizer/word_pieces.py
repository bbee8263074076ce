"""Words into pieces, pieces into byte-pair symbols: by compiled libraries, or in plain Python.

Covers: CLIP's pattern under `regex` or the standard library's `re`; its merges under `tokenizers`
or in Python. Where a library is missing its stand-in is taken; the result is the same.
Not here: cleaning, ids of captions (tokenizer.py); where the data files lie (bundled_assets.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaclip_model.tokenizer.bundled_assets import CLASSES, carried_file

Split = Callable[[str], list[str]]
Merge = Callable[[str], list[int]]
END_OF_WORD = "</w>"

_PATTERN = r"(?i:<start_of_text>|<end_of_text>|'(?:s|t|re|ve|m|ll|d))|[{L}]+|[{N}]|[^\s{L}{N}]+"


def splitter() -> Split:
    """Return what splits a word without white space into its pieces, from left to right.

    Raises:
        ModuleNotFoundError: `regex` is neither installed nor are the classes carried that stand in.
    """
    classes = carried_file(CLASSES)
    if classes is None or importlib.util.find_spec("regex") is not None:
        regex: Any = importlib.import_module("regex")
        return regex.compile(_filled(r"\p{L}", r"\p{N}")).findall  # type: ignore[no-any-return]
    return plain_splitter(json.loads(classes.read_text()))


def plain_splitter(classes: Mapping[str, Sequence[tuple[int, int]]]) -> Split:
    """Return the same by the standard library, which has no classes of Unicode by name.

    Args:
        classes: "L" and "N" -> first and last code point of each run of letters, of numbers.
    """
    letters, numbers = (
        "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in classes[name]) for name in "LN"
    )
    return re.compile(_filled(letters, numbers)).findall


def merger(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Merge:
    """Return what turns a piece into ids.

    Args:
        vocabulary: symbol -> id; a symbol at the end of a piece ends in `END_OF_WORD`.
        merges: pairs of symbols that become one, the first ones first.
    """
    if importlib.util.find_spec("tokenizers") is None:
        return plain_merger(vocabulary, merges)
    models: Any = importlib.import_module("tokenizers.models")
    # No cache: a word is merged once.
    model = models.BPE(
        dict(vocabulary), list(merges), end_of_word_suffix=END_OF_WORD, cache_capacity=0
    )
    return lambda piece: [token.id for token in model.tokenize(piece)]


def plain_merger(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Merge:
    """Return the same in Python: always the pair that comes first among the merges."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    never = len(ranks)

    def merge(piece: str) -> list[int]:
        symbols = [*piece[:-1], piece[-1] + END_OF_WORD]
        while len(symbols) > 1:
            best = min(itertools.pairwise(symbols), key=lambda pair: ranks.get(pair, never))
            if best not in ranks:
                break
            symbols = _joined(symbols, best)
        return [vocabulary[symbol] for symbol in symbols]

    return merge


def _joined(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in symbols:
        # The symbol before is not a pair's result: that would have another name.
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def _filled(letters: str, numbers: str) -> str:
    return _PATTERN.replace("{L}", letters).replace("{N}", numbers)
