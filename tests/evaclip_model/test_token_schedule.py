"""Captions shown in part: their first tokens, or some drawn by seed and position alone."""

from __future__ import annotations

import pytest
import torch

from evaclip_model.errors import InputError
from evaclip_model.tokenizer.tokenizer import END_TOKEN, START_TOKEN, tokenize
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.cost import shown_tokens
from evaclip_model.training.training_step import kept_tokens, tokenize_captions

PINNED = [[0, 2, 9, 10, 99], [0, 3, 4, 7, 99], [0, 1, 9, 10, 99]]
LONG = "one two three four five six seven eight nine ten"
PLAIN = {"name": "x", "image_px": 16, "samples_seen": 32, "global_batch": 16, "seed": 3}


def shown(*captions: str, first: int = 0, length: int = 77, **settings: object) -> torch.Tensor:
    places = range(first, first + len(captions))
    return tokenize_captions(captions, list(places), TrainConfig(**PLAIN, **settings), length)


def test_a_stage_may_show_the_first_tokens_and_costs_no_more_than_these():
    assert torch.equal(shown(LONG, "a dog", text_tokens=6), tokenize([LONG, "a dog"], 6))
    assert shown(LONG, text_tokens=90).shape == shown(LONG).shape == (1, 77)
    assert shown(LONG, length=20, text_tokens=90).shape == (1, 20)
    assert shown_tokens(TrainConfig(**PLAIN, text_tokens=8)) == 8
    assert shown_tokens(TrainConfig(**PLAIN)) == shown_tokens(TrainConfig(**PLAIN, text_tokens=70))


def test_random_ones_keep_start_end_and_order_and_depend_on_seed_and_position_alone():
    whole = tokenize([LONG])[0, :12].tolist()
    together = shown(*[LONG] * 50, text_tokens=6, text_tokens_kept="random")
    for place, row in enumerate(together.tolist()):
        assert row[0] == START_TOKEN and row[-1] == END_TOKEN
        assert row[1:-1] == sorted(row[1:-1], key=whole.index) and len(set(row)) == 6
        alone = shown(LONG, first=place, text_tokens=6, text_tokens_kept="random")
        assert alone[0].tolist() == row
    assert len({tuple(row) for row in together.tolist()}) > 30


def test_a_caption_that_fits_is_shown_whole():
    for caption in ("a dog", "", "one two three four"):
        kept = shown(caption, text_tokens=6, text_tokens_kept="random")
        assert torch.equal(kept, tokenize([caption], 6))


def test_every_word_is_kept_equally_often():
    tokens = tokenize([LONG]).expand(8000, -1)
    kept = kept_tokens(tokens, 0, range(8000), 6)
    counts = torch.bincount(kept.flatten())[tokens[0, 1:11]] / 8000
    torch.testing.assert_close(counts, torch.full((10,), 0.4), rtol=0, atol=0.02)


def test_draws_never_change_between_versions_because_runs_are_resumed():
    numbers = torch.arange(12)[None].clone()
    numbers[0, -1] = 99
    drawn = kept_tokens(numbers.expand(3, -1), 42, [0, 1, 10**12], 5)
    assert drawn.tolist() == PINNED


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"text_tokens": 2}, "'text_tokens' should be greater than 2"),
        ({"text_tokens_kept": "random"}, "'random' needs text_tokens"),
    ],
)
def test_what_shows_nothing_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        TrainConfig.from_mapping(PLAIN | settings, where="mine.toml")
