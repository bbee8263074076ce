"""CLIP's byte-pair tokenizer: captions to ids, exactly as the released models were trained. Words
are split by `regex` or the standard library's `re`, pieces merged by `tokenizers` or in Python:
where a library is missing its stand-in is taken, and the result is the same.

No token spans white space, so a caption's ids are those of its words, and captions are made of the
same words again and again. Each distinct word is split and merged once, by the Rust library
`tokenizers` where there is one; a batch is then a look-up in a table.
"""

import functools
import gzip
import html
import importlib
import importlib.util
import itertools
import json
import re
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.tokenizer import bundled_assets as assets

Split = Callable[[str], list[str]]
Merge = Callable[[str], list[int]]
END_OF_WORD = "</w>"

# The original's pattern ignores case everywhere. Beside its words that matters for one character:
# the mark U+0345, whose case folds to a letter's, is in none of its classes.
_PATTERN = (
    r"(?i:<start_of_text>|<end_of_text>|'(?:s|t|re|ve|m|ll|d))|[{L}]+|[{N}]|[^\s\u0345{L}{N}]+"
)

START_TOKEN = 49_406
END_TOKEN = 49_407
PAD_TOKEN = 0
CONTEXT_LENGTH = 77

MOST_WORDS = 500_000
"""Distinct words remembered; beyond it the table starts anew. About 100 MB."""

_MERGES = 49_152 - 256 - 2
_SPECIAL = {"<start_of_text>": START_TOKEN, "<end_of_text>": END_TOKEN}
# Text that cleaning cannot change, but for its curly quotes; ftfy takes longer than all the rest.
# Visible ASCII, with an ampersand only where no entity can begin; scripts without a part in
# ftfy's signs of a wrong encoding; and characters with one, as far as a sign needs another such
# character beside them. All are composed (NFC) and none combines with a neighbour.
_NEUTRAL = (
    "\u05d0-\u05ea\u0621-\u063a\u0641-\u064a"  # Hebrew and Arabic letters
    "\u3001\u3002\u300c-\u300f\u3041-\u3094\u30a1-\u30fa\u30fc\u4e00-\u9fa5\uac00-\ud7a3"
    "\u200d\u2600-\u26ff\u2701-\u27bf\ufe0f"  # emoji
    "\U0001f300-\U0001f64f\U0001f680-\U0001f6c5\U0001f900-\U0001f9ff"
)
_LOWER = "ß-öø-ÿāăąćĉċčďđēĕėęěĝğġģĥħĩīĭįıĵķĺļľłńņňōŏőŕŗřśŝşšţťŧũūŭůűųŵŷźżž"
_GREEK_CYRILLIC = "ΆΈ-ΊΌΎ-ΡΣ-ώЁА-яё"
_ALONE = (
    "À-ÁÄ-ÖØ-ÞĀĂĄĆĈĊČĎĐĒĔĖĘĚĜĞĠĢĤĦĨĪĬĮİĴĶĹĻĽŁŃŅŇŌŎŐŔŖŘŚŜŞŠŢŤŦŨŪŬŮŰŲŴŶŸŹŻŽ¡¢£¥§©«®°±²³´µ»¼½¾¿×÷•€™"
)
_PUNCTUATION = "\xa0·–—…’"
_UNCHANGED = re.compile(
    rf"(?>[\n\r\t -%'-~]++|&(?=[\n\t ]|\Z)|[{_NEUTRAL}]++"
    rf"|(?>[{_ALONE}]|[{_PUNCTUATION}‘“”]++|(?>[{_LOWER}]++|[{_GREEK_CYRILLIC}]++)"
    rf"[{_PUNCTUATION}]*+)(?![^\x00-\x7f]))*+\Z"
)
_BREAK = "\x00"
"""A word between captions: cleaning leaves no such character in them."""
_STRAIGHT = str.maketrans("‘’“”", "''\"\"")


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> Tensor:
    """Ids of captions [B, L] int64: start token, pieces, end token, zeros; L is `context_length`.
    Raises InputError: the vocabulary file is missing; a context without room for start and end.

    Text is repaired (ftfy), HTML entities are resolved, white space is collapsed, letters are
    lower-cased. A caption that is too long loses its end and keeps the end token. A literal
    `<start_of_text>` or `<end_of_text>` becomes that token, as in the original.
    """
    if context_length < 2:
        raise InputError(
            f"context_length is {context_length}, but the start and the end token need 2: "
            f"give 2 or more (the released models have {CONTEXT_LENGTH})"
        )
    texts = [texts] if isinstance(texts, str) else texts
    # One split for all captions takes half the time of one split each.
    words = "".join([f"{_clean_text(text)} {_BREAK} " for text in texts]).split()
    ids, lengths = _load_words().look_up(words)
    return torch.from_numpy(_pad_rows(ids, lengths, context_length))


def _pad_rows(
    ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], context_length: int
) -> npt.NDArray[np.int64]:
    rows = np.full((len(lengths), context_length), PAD_TOKEN)
    room = context_length - 2
    if len(lengths) and lengths.max() > room:
        column = np.arange(len(ids)) - np.repeat(lengths.cumsum() - lengths, lengths)
        ids, lengths = ids[column < room], np.minimum(lengths, room)
    starts = np.arange(len(lengths)) * context_length + 1
    place = np.arange(len(ids)) + np.repeat(starts - (lengths.cumsum() - lengths), lengths)
    flat = rows.reshape(-1)
    flat[starts - 1], flat[place], flat[starts + lengths] = START_TOKEN, ids, END_TOKEN
    return rows


def _clean_text(text: str) -> str:
    # Resolving entities is ftfy's first repair. It leaves them alone beside a "<".
    repaired = (
        assets.text_repair().fixes.unescape_html(text) if "&" in text and "<" not in text else text
    )
    if not _UNCHANGED.match(repaired):
        # Twice, because captions taken from web pages are often escaped twice.
        return html.unescape(html.unescape(assets.text_repair().fix_text(text))).lower()
    return (repaired if repaired.isascii() else repaired.translate(_STRAIGHT)).lower()


class _Words(dict[str, int]):
    """Word -> its number, also of a new one; the ids of all words lie one word behind the other in
    one array. Safe to use from several threads."""

    def __init__(self) -> None:
        self._characters, self._split, self._merge = _byte_characters(), splitter(), _load_merges()
        self._lock = threading.Lock()
        self._start_anew()

    def look_up(self, words: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ids of all words in their order [N], and how many each caption has [B]; each ends with
        `_BREAK`, a word without ids."""
        with self._lock:
            if len(self) > MOST_WORDS:
                self._start_anew()
            numbers = np.fromiter(map(self.__getitem__, words), np.int64, len(words))
            ends = np.asarray(self._ends)
            starts = ends[numbers]
            widths = ends[numbers + 1] - starts
            del ends  # while it is looked at, the array cannot grow: another thread would fail
            behind = widths.cumsum()
            shift = starts - (behind - widths)
            ids = np.asarray(self._ids)[np.arange(widths.sum()) + np.repeat(shift, widths)]
        return ids, np.diff(behind[numbers == 0], prepend=0)

    def _start_anew(self) -> None:
        self.clear()
        self[_BREAK] = 0
        self._ids = array("q")
        self._ends = array("q", [0, 0])

    def __missing__(self, word: str) -> int:
        if word.isascii() and word.isalpha():  # most words, and the pattern takes its time
            self._ids.extend(self._merge(word))
        elif (pieces := self._split(word)) == [word]:
            self._ids.extend(self._merge_piece(word))
        else:  # the same digits, marks and endings come again and again: pieces are words, too
            for number in [self[piece] for piece in pieces]:
                self._ids.extend(self._ids[self._ends[number] : self._ends[number + 1]])
        self._ends.append(len(self._ids))
        self[word] = number = len(self)
        return number

    def _merge_piece(self, piece: str) -> list[int]:
        if piece in _SPECIAL:
            return [_SPECIAL[piece]]
        if not (piece.isascii() and piece.isprintable()):  # visible ASCII stands for itself
            piece = "".join(self._characters[byte] for byte in piece.encode())
        return self._merge(piece)


@functools.cache
def _load_words() -> _Words:
    return _Words()


def _load_merges() -> Merge:
    """CLIP's merges; a symbol's id is its place: bytes, bytes that end a word, then the merges."""
    path = assets.package_file(assets.VOCABULARY)
    if path is None:
        raise InputError(
            f"the tokenizer's vocabulary {assets.VOCABULARY} was not found: install "
            "open_clip_torch, which ships it"
        )
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : _MERGES + 1]
    merges = [(first, second) for first, second in map(str.split, lines)]
    alphabet = list(_byte_characters().values())
    ends = (character + END_OF_WORD for character in alphabet)
    symbols = [*alphabet, *ends, *map("".join, merges)]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    if importlib.util.find_spec("tokenizers") is None:
        return plain_merger(vocabulary, merges)
    models: Any = importlib.import_module("tokenizers.models")
    # No cache: a word is merged once.
    model = models.BPE(vocabulary, merges, end_of_word_suffix=END_OF_WORD, cache_capacity=0)
    return lambda piece: [token.id for token in model.tokenize(piece)]


def _byte_characters() -> dict[int, str]:
    """A visible character for every byte, in the order of the first ids: visible Latin-1 stands for
    itself, then the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    shown = {byte: chr(0x100 + index) for index, byte in enumerate(hidden)}
    return {byte: chr(byte) for byte in visible} | shown


def splitter() -> Split:
    """Return what splits a word without white space into its pieces, from left to right. Raises
    ModuleNotFoundError: `regex` is neither installed nor are the classes carried that stand in."""
    classes = assets.carried_file(assets.CLASSES)
    if classes is None or importlib.util.find_spec("regex") is not None:
        regex: Any = importlib.import_module("regex")
        return regex.compile(_PATTERN.format(L=r"\p{L}", N=r"\p{N}")).findall  # type: ignore[no-any-return]
    return plain_splitter(json.loads(classes.read_text()))


def plain_splitter(classes: Mapping[str, Sequence[tuple[int, int]]]) -> Split:
    """Return the same by the standard library, which has no classes of Unicode by name: `classes`
    are "L" and "N" -> first and last code point of each run of letters, of numbers."""
    letters, numbers = (
        "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in classes[name]) for name in "LN"
    )
    return re.compile(_PATTERN.format(L=letters, N=numbers)).findall


def plain_merger(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Merge:
    """Return what turns a piece into ids as `tokenizers` does: of its symbols, the last of which
    ends in `END_OF_WORD`, always the pair that comes first among `merges` becomes one."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    never = len(ranks)

    def merge(piece: str) -> list[int]:
        symbols = [*piece[:-1], piece[-1] + END_OF_WORD]
        while len(symbols) > 1:
            best = min(itertools.pairwise(symbols), key=lambda pair: ranks.get(pair, never))
            if best not in ranks:
                break
            joined: list[str] = []
            for symbol in symbols:
                # The symbol before is not a pair's result: that would have another name.
                if joined and (joined[-1], symbol) == best:
                    joined[-1] += symbol
                else:
                    joined.append(symbol)
            symbols = joined
        return [vocabulary[symbol] for symbol in symbols]

    return merge
