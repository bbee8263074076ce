"""Which of a sample's captions is shown: a function of seed and position, by shares."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from evaclip_model.reading.config import SamplingConfig
from evaclip_model.reading.samples import choose_caption, read_captions, write_captions

FURTHER = {"recap": ["long one", "long two"], "de": ["ein Apfel"]}


def draw(position: int, seed: int = 1, **weights: float) -> str:
    return choose_caption("an apple", FURTHER, weights, seed=seed, position=position)


def test_every_name_is_drawn_by_its_share_and_each_of_its_captions_alike() -> None:
    drawn = Counter(draw(position, stored=1, recap=2, de=1) for position in range(4000))
    shares = {"an apple": 0.25, "long one": 0.25, "long two": 0.25, "ein Apfel": 0.25}
    assert drawn.keys() == shares.keys()
    for text, share in shares.items():
        assert drawn[text] / 4000 == pytest.approx(share, abs=0.03)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    weights = {"stored": 1.0, "recap": 1.0}
    first = [draw(position, **weights) for position in range(50)]
    assert [draw(position, **weights) for position in reversed(range(50))][::-1] == first
    assert [draw(position, seed=2, **weights) for position in range(50)] != first


def test_what_a_sample_lacks_is_passed_over() -> None:
    assert draw(3, fr=5, de=1) == "ein Apfel"
    assert draw(3, fr=5) == "an apple"
    assert draw(3) == "an apple"


def test_weights_must_be_above_0() -> None:
    with pytest.raises(InputError, match="caption_weights must be above 0"):
        SamplingConfig.from_mapping(
            {"image_px": 16, "global_batch": 32, "caption_weights": {"recap": 0}}, where="test"
        )


def test_a_file_of_captions_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl.gz"
    write_captions(path, [("00", FURTHER), ("ключ\n", {"x": ["\u2028 \x00"]})])
    written = path.read_bytes()
    assert read_captions(str(path)) == {"00": FURTHER, "ключ\n": {"x": ["\u2028 \x00"]}}
    write_captions(path, [("00", FURTHER), ("ключ\n", {"x": ["\u2028 \x00"]})])
    assert path.read_bytes() == written
    path.write_bytes(written[:-9])
    with pytest.raises(InputError, match=r"0\.jsonl\.gz cannot be read as captions"):
        read_captions(str(path))
