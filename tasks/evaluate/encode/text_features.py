"""Text features, each text of all sets encoded once; and classifiers made of them.

Texts are grouped by their exact number of tokens and cut behind the last, so nothing is spent on
padding; a tower that is not causal gets its whole context. The model sees chunks of one size: a
feature is a function of its text alone, whatever else is encoded. A text tower's features are
kept in files to which later evaluations add, so sets and models that share texts share the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from evaclip_model.zeroshot.exact_ranks import build_classifier, fill_templates, normalise_features
from tasks.evaluate.encode.feature_cache import SUFFIX, read_block, write_block
from tasks.evaluate.encode.open_models import Subject
from tasks.evaluate.sets.published_layout import EvalSet

CHUNK = 32
"""Texts that a model sees at once: at ten tokens a text enough rows to be fast, and few enough to
waste little where only some texts have a length."""
BLOCK = 16 * CHUNK
"""Texts of one file; a kill costs at most one block."""
_KEYS, _FEATURES = "keys", "features"
_KEY_BYTES = 16


def texts_of(evalset: EvalSet) -> list[str]:
    """Every text that a set asks of a model, each once, in order."""
    if evalset.kind == "retrieval":
        return list(dict.fromkeys(c for one in evalset.samples for c in one.captions))
    return list(dict.fromkeys(fill_templates(evalset.classnames, evalset.templates)))


class TextFeatures:
    """The features of one text tower that are on disk."""

    def __init__(self, folder: Path) -> None:
        """Read the features in `folder`; `read_new_files` reads those that others add later."""
        self._folder = folder
        self._read: set[str] = set()
        self._row: dict[bytes, int] = {}
        self._features = torch.empty(0)
        self.read_new_files()

    def read_new_files(self) -> None:
        blocks = [self._features] if self._row else []
        rows = len(self._row)
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            if path.name in self._read:
                continue
            block = read_block(path)
            if block is None or not {_KEYS, _FEATURES} <= block.keys():
                continue
            self._read.add(path.name)
            content = block[_KEYS].numpy().tobytes()
            fresh: list[int] = []
            for row in range(len(block[_FEATURES])):
                key = content[row * _KEY_BYTES : (row + 1) * _KEY_BYTES]
                if key not in self._row:
                    self._row[key] = rows + len(fresh)
                    fresh.append(row)
            blocks.append(block[_FEATURES][fresh])
            rows += len(fresh)
        if blocks:
            self._features = torch.cat(blocks)

    def missing_texts(self, texts: Sequence[str]) -> list[str]:
        return [text for text in texts if _text_key(text) not in self._row]

    def features_of(self, texts: Sequence[str]) -> Tensor:
        """Unit features of `texts` [N, D]; equal texts get equal ones.

        Raises:
            KeyError: a text is missing.
        """
        return self._features[torch.tensor([self._row[_text_key(text)] for text in texts])]


def answer_features(evalset: EvalSet, features: TextFeatures) -> Tensor:
    """The features that a set's images are compared with: a classifier [C, D], or its captions
    [T, D]."""
    if evalset.kind == "retrieval":
        return features.features_of([c for one in evalset.samples for c in one.captions])
    each = features.features_of(fill_templates(evalset.classnames, evalset.templates))
    return build_classifier(each, evalset.classnames)


def encode_texts(
    subject: Subject,
    texts: Sequence[str],
    folder: Path,
    *,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Encode this rank's share of distinct `texts` into files of `folder`.

    Every rank is given the same texts and takes each `ranks`-th block, from its own number on.
    `progress` is called with the number of texts of each block.

    Raises:
        InputError: features are not finite.
    """
    for chunks in list(_iterate_blocks(subject, texts))[rank::ranks]:
        features = torch.cat([_encode_chunk(subject, chunk) for _, chunk in chunks])
        named = [texts[row] for rows, _ in chunks for row in rows]
        keys = b"".join(map(_text_key, named))
        name = hashlib.sha256(keys).hexdigest()[:32]
        stored = {
            _KEYS: torch.frombuffer(bytearray(keys), dtype=torch.uint8).reshape(-1, _KEY_BYTES),
            _FEATURES: features,
        }
        write_block(folder / f"{name}{SUFFIX}", stored)
        progress(len(named))


def _iterate_blocks(
    subject: Subject, texts: Sequence[str]
) -> Iterator[list[tuple[Sequence[int], Tensor]]]:
    """Chunks (rows of `texts`, their ids cut to one length), a block at a time."""
    tokens = subject.tokenize(texts)
    lengths = subject.count_ids(tokens)
    block: list[tuple[Sequence[int], Tensor]] = []
    held = 0
    for length in sorted(set(lengths.tolist())):
        rows = torch.nonzero(lengths == length).flatten()
        for part in torch.split(rows, CHUNK):
            block.append((part.tolist(), tokens[part, :length]))
            held += len(part)
            if held + CHUNK > BLOCK:
                yield block
                block, held = [], 0
    if block:
        yield block


def _encode_chunk(subject: Subject, tokens: Tensor) -> Tensor:
    """Unit features [B, D] of ids [B, L], encoded as a whole chunk."""
    padding = tokens[-1:].expand(CHUNK - len(tokens), -1)
    with torch.inference_mode():
        encoded = subject.encode_text(torch.cat([tokens, padding]))[: len(tokens)]
        return normalise_features(encoded.cpu(), "text")


def _text_key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:_KEY_BYTES]
