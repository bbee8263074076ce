"""CLIP's byte-pair tokenizer.

Covers: captions to ids, exactly as the released models were trained.
Not here: the vocabulary itself, a data file of the installed `open_clip_torch` distribution, which
is read without importing that package.
"""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

from evaclip_model.errors import InputError

START_TOKEN = 49_406
END_TOKEN = 49_407
PAD_TOKEN = 0
CONTEXT_LENGTH = 77

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


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> Tensor:
    """Ids of captions: start token, pieces, end token, zeros.

    Text is repaired (ftfy), HTML entities are resolved, white space is collapsed, letters are
    lower-cased. A caption that is too long loses its end and keeps the end token.

    Args:
        texts: one caption or several.
        context_length: L, tokens a row.

    Returns:
        [B, L] int64.

    Raises:
        InputError: the vocabulary file is missing.
    """
    texts = [texts] if isinstance(texts, str) else texts
    rows = torch.full((len(texts), context_length), PAD_TOKEN, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        ids = [START_TOKEN, *encode(text)[: context_length - 2], END_TOKEN]
        row[: len(ids)] = torch.tensor(ids)
    return rows


def cut_padding(tokens: Tensor) -> Tensor:
    """Leave out the columns behind the last end token of the batch: [B, L] -> [B, L' <= L].

    Exact for features and gradients, because the text tower is causal and pools at the first end
    token; a long way cheaper for short captions.
    """
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]


def encode(text: str) -> list[int]:
    """Ids of one caption, without start token, end token and padding."""
    ids: list[int] = []
    for piece in _PIECES.findall(_clean(text)):
        ids.extend(_piece_ids(piece))
    return ids


def _clean(text: str) -> str:
    # Twice, because captions taken from web pages are often escaped twice.
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@functools.lru_cache(maxsize=65_536)
def _piece_ids(piece: str) -> tuple[int, ...]:
    if piece in _SPECIAL:
        return (_SPECIAL[piece],)
    characters, ranks, ids = _tables()
    symbols = [characters[byte] for byte in piece.encode()]
    symbols[-1] += _END_OF_WORD
    while len(symbols) > 1:
        best = min(itertools.pairwise(symbols), key=lambda pair: ranks.get(pair, _MERGES))
        if best not in ranks:
            break
        symbols = _merge(symbols, best)
    return tuple(ids[symbol] for symbol in symbols)


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of `pair`, from the left."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            # A joined symbol is longer than either half, so it cannot be taken for one again.
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


@functools.cache
def _tables() -> tuple[dict[int, str], dict[tuple[str, str], int], dict[str, int]]:
    """Byte -> character; pair -> rank of its merge; symbol -> id."""
    lines = gzip.decompress(_vocabulary_path().read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : _MERGES + 1]]
    characters = _byte_characters()
    alphabet = list(characters.values())
    symbols = [
        *alphabet,
        *(character + _END_OF_WORD for character in alphabet),
        *("".join(merge) for merge in merges),
    ]
    ranks = {(first, second): rank for rank, (first, second) in enumerate(merges)}
    return characters, ranks, {symbol: index for index, symbol in enumerate(symbols)}


def _byte_characters() -> dict[int, str]:
    """A visible character for every byte: itself where it is visible Latin-1, else from U+0100 on.

    The order (visible bytes first) is the order of the first ids.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(0x100 + index) for index, byte in enumerate(hidden)
    }


def _vocabulary_path() -> Path:
    spec = importlib.util.find_spec("open_clip")  # finds a top-level package without running it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / _VOCABULARY
        if path.is_file():
            return path
    raise InputError(
        f"the tokenizer's vocabulary {_VOCABULARY} was not found: install open_clip_torch, "
        "which ships it"
    )
