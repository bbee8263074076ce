"""CLIP's byte-pair tokenizer.

Covers: captions to ids, exactly as the released models were trained; thousands at once.
Not here: the vocabulary itself, a data file of the installed `open_clip_torch` distribution, which
is read without importing that package; prompts (prompts.py).

No token spans white space, so a caption's ids are those of its words, and captions are made of
the same words again and again. Each distinct word is split and merged once, by the Rust library
`tokenizers`; a batch is then a look-up in a table.
"""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
import re
import threading
from array import array
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import ftfy
import numpy as np
import numpy.typing as npt
import regex
import torch
from ftfy.fixes import unescape_html
from tokenizers.models import BPE
from torch import Tensor

from evaclip_model.errors import InputError

START_TOKEN = 49_406
END_TOKEN = 49_407
PAD_TOKEN = 0
CONTEXT_LENGTH = 77

PACKAGE = "open_clip"
"""Importable name of the package whose data files are read: vocabulary and prompts."""

MOST_WORDS = 500_000
"""Distinct words remembered; beyond it the table starts anew. About 100 MB."""

_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49_152 - 256 - 2
_SPECIAL = {"<start_of_text>": START_TOKEN, "<end_of_text>": END_TOKEN}
_END_OF_WORD = "</w>"
_PIECES = regex.compile(
    "|".join(
        (
            *map(regex.escape, _SPECIAL),
            r"'(?:s|t|re|ve|m|ll|d)",
            r"\p{L}+",
            r"\p{N}",
            r"[^\s\p{L}\p{N}]+",
        )
    ),
    regex.IGNORECASE,
)

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
_STRAIGHT = str.maketrans("‘’“”", "''\"\"")


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> Tensor:
    """Ids of captions: start token, pieces, end token, zeros.

    Text is repaired (ftfy), HTML entities are resolved, white space is collapsed, letters are
    lower-cased. A caption that is too long loses its end and keeps the end token. A literal
    `<start_of_text>` or `<end_of_text>` becomes that token, as in the original.

    Args:
        texts: one caption or several.
        context_length: L, tokens a row, at least 2.

    Returns:
        [B, L] int64.

    Raises:
        InputError: the vocabulary file is missing; a context without room for start and end.
    """
    if context_length < 2:
        raise InputError(
            f"context_length is {context_length}, but the start and the end token need 2: "
            f"give 2 or more (the released models have {CONTEXT_LENGTH})"
        )
    words = [_clean(text).split() for text in ([texts] if isinstance(texts, str) else texts)]
    ids, widths = _words().look_up(list(chain.from_iterable(words)))
    ends = np.fromiter(map(len, words), np.int64, len(words)).cumsum()
    row_ends = np.concatenate(([0], widths.cumsum()))[ends]  # words -> ids
    lengths = np.diff(row_ends, prepend=0)
    return torch.from_numpy(_padded(ids, lengths, context_length))


def cut_padding(tokens: Tensor) -> Tensor:
    """Leave out the columns behind the last end token of the batch: [B, L] -> [B, L' <= L].

    Exact for features and gradients, because the text tower is causal and pools at the first end
    token; a long way cheaper for short captions.
    """
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]


def package_file(name: str) -> Path | None:
    """A data file of the installed `open_clip_torch`, found without running that package."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / name
        if path.is_file():
            return path
    return None


def _padded(
    ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], context_length: int
) -> npt.NDArray[np.int64]:
    """Consecutive rows of `lengths` [B] ids as [B, L], between start and end token."""
    rows = np.full((len(lengths), context_length), PAD_TOKEN)
    column = np.arange(len(ids)) - np.repeat(lengths.cumsum() - lengths, lengths)
    fits = column < context_length - 2
    rows[:, 0] = START_TOKEN
    rows[np.repeat(np.arange(len(lengths)), lengths)[fits], column[fits] + 1] = ids[fits]
    rows[np.arange(len(lengths)), np.minimum(lengths, context_length - 2) + 1] = END_TOKEN
    return rows


def _clean(text: str) -> str:
    # Resolving entities is ftfy's first repair. It leaves them alone beside a "<".
    repaired = unescape_html(text) if "&" in text and "<" not in text else text
    if not _UNCHANGED.match(repaired):
        # Twice, because captions taken from web pages are often escaped twice.
        return html.unescape(html.unescape(ftfy.fix_text(text))).lower()
    return (repaired if repaired.isascii() else repaired.translate(_STRAIGHT)).lower()


class _Words:
    """Ids of the words met so far, one word behind the other in one array.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._characters, self._merges = _byte_characters(), _merges()
        self._lock = threading.Lock()
        self._start_anew()

    def look_up(self, words: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ids of all words in their order [N], and how many each of them has [W]."""
        with self._lock:
            new = [word for word in dict.fromkeys(words) if word not in self._places]
            if len(self._places) + len(new) > MOST_WORDS:
                self._start_anew()
                new = list(dict.fromkeys(words))
            for word in new:
                self._add(word)
            places = np.fromiter(map(self._places.__getitem__, words), np.int64, len(words))
            ends = np.asarray(self._ends)
            starts = ends[places]
            widths = ends[places + 1] - starts
            shift = starts - (widths.cumsum() - widths)
            ids = np.asarray(self._ids)[np.arange(widths.sum()) + np.repeat(shift, widths)]
        return ids, widths

    def _start_anew(self) -> None:
        self._places: dict[str, int] = {}
        self._ids = array("q")
        self._ends = array("q", [0])

    def _add(self, word: str) -> None:
        is_one = word.isascii() and word.isalpha()  # most are, and the pattern takes its time
        for piece in (word,) if is_one else _PIECES.findall(word):
            self._ids.extend(self._merged(piece))
        self._ends.append(len(self._ids))
        self._places[word] = len(self._places)

    def _merged(self, piece: str) -> list[int]:
        if piece in _SPECIAL:
            return [_SPECIAL[piece]]
        # Visible ASCII, nearly every piece, stands for itself.
        letters = (
            piece
            if piece.isascii() and piece.isprintable()
            else "".join(self._characters[b] for b in piece.encode())
        )
        return [token.id for token in self._merges.tokenize(letters)]


@functools.cache
def _words() -> _Words:
    return _Words()


def _merges() -> BPE:
    """CLIP's merges; a symbol's id is its place: bytes, bytes that end a word, then the merges."""
    path = package_file(_VOCABULARY)
    if path is None:
        raise InputError(
            f"the tokenizer's vocabulary {_VOCABULARY} was not found: install open_clip_torch, "
            "which ships it"
        )
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : _MERGES + 1]
    merges = [(first, second) for first, second in map(str.split, lines)]
    alphabet = list(_byte_characters().values())
    symbols = [
        *alphabet,
        *(character + _END_OF_WORD for character in alphabet),
        *map("".join, merges),
    ]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    # No cache: a word is merged once.
    return BPE(vocabulary, merges, end_of_word_suffix=_END_OF_WORD, cache_capacity=0)


def _byte_characters() -> dict[int, str]:
    """A visible character for every byte: itself where it is visible Latin-1, else from U+0100 on.

    The order (visible bytes first) is the order of the first ids.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(0x100 + index) for index, byte in enumerate(hidden)
    }
