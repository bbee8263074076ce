"""Captions as the text tower gets them.

Covers: which template and which parts of its caption a sample shows; ids, kept while they repeat.
Not here: the tokenizer; the text tower's packing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from evaclip_model.tokenizer.tokenizer import tokenize
from evaclip_model.training.config import TrainConfig

KEPT_CAPTIONS = 100_000
"""Tokenised captions kept in memory."""


class CaptionTokens:
    """Ids of captions in their templates."""

    def __init__(self, config: TrainConfig, context_length: int) -> None:
        self._config = config
        self._length = context_length
        self._kept: dict[str, Tensor] = {}

    def of(self, captions: Sequence[str], positions: Sequence[int]) -> Tensor:
        """[b, L] ids on the CPU, where the text tower plans; `positions` of the samples [b]."""
        rows = []
        for caption, position in zip(captions, positions, strict=True):
            text = vary_caption(caption, self._config, position)
            if text not in self._kept:
                if len(self._kept) >= KEPT_CAPTIONS:
                    self._kept.clear()
                self._kept[text] = tokenize([text], self._length)[0]
            rows.append(self._kept[text])
        return torch.stack(rows)


def caption_lengths(tokens: Tensor) -> Tensor:
    """[b] tokens of each row of ids [b, L], its start and end among them."""
    return tokens.argmax(1) + 1  # the end token has the largest id


def vary_caption(caption: str, config: TrainConfig, position: int) -> str:
    """The caption as the sample at `position` of the training stream shows it."""
    if config.caption_separator is not None:
        parts = caption.split(config.caption_separator)
        kept = 1 + _draw("parts", config.seed, position, len(parts))
        caption = config.caption_separator.join(parts[:kept])
    templates = config.caption_templates
    return templates[_draw("template", config.seed, position, len(templates))].replace(
        "{}", caption
    )


def _draw(purpose: str, seed: int, position: int, choices: int) -> int:
    """A number below `choices` that depends on purpose, seed and position alone."""
    if choices == 1:
        return 0
    digest = hashlib.blake2b(f"{purpose}:{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % choices
