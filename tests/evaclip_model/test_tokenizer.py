"""The tokenizer against ids made by the authors' own code (data/README.md)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from evaclip_model.tokenizer import CONTEXT_LENGTH, END_TOKEN, START_TOKEN, cut_padding, tokenize

EXPECTED = json.loads((Path(__file__).parent / "data" / "tokenizer" / "tokens.json").read_text())


def test_every_caption_gets_the_original_ids():
    assert len(EXPECTED) == 100
    for text, ids in EXPECTED.items():
        row = tokenize(text)[0].tolist()
        assert row == ids + [0] * (CONTEXT_LENGTH - len(ids)), text


def test_a_batch_equals_its_captions_one_by_one():
    texts = list(EXPECTED)
    assert torch.equal(tokenize(texts), torch.cat([tokenize(text) for text in texts]))


def test_a_shorter_context_cuts_the_end_and_keeps_the_end_token():
    assert tokenize("a photo of a cat", 4).tolist() == [[START_TOKEN, 320, 1125, END_TOKEN]]


def test_cutting_padding_keeps_every_end_token():
    tokens = tokenize(["a cat", "a photo of a cat"])
    assert torch.equal(cut_padding(tokens), tokens[:, :7])


def test_the_package_that_ships_the_vocabulary_is_not_imported():
    code = (
        "import sys; from evaclip_model.tokenizer import tokenize; tokenize('a cat');"
        "assert 'open_clip' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
