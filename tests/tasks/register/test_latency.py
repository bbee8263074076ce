"""Times of one image, taken in turns."""

from __future__ import annotations

from pathlib import Path

from evaclip_model import create_model, save_model
from tasks.register.latency import latencies_ms
from tests.evaclip_model.small_models import small_config


def test_a_deeper_model_takes_longer_beside_a_shallow_one(tmp_path: Path) -> None:
    for name, layers in (("shallow", 1), ("deep", 12)):
        save_model(create_model(small_config(layers=layers), seed=0), tmp_path / name)
    times = latencies_ms({name: tmp_path / name for name in ("shallow", "deep")})
    assert list(times) == ["shallow", "deep"]
    assert 0 < times["shallow"] < times["deep"]
