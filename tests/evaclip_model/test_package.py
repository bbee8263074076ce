"""What importing the package promises, and its command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import evaclip_model
from evaclip_model.cli import classify, main
from evaclip_model.create import create_model
from evaclip_model.weights import save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_model(create_model("EVA02-CLIP-demo", seed=0), folder / "model")
    Image.new("RGBA", (90, 50), "red").save(folder / "red.png")
    return folder


def test_reading_errors_configs_and_names_does_not_wait_for_torch():
    code = (
        "import sys, evaclip_model, evaclip_model.errors, evaclip_model.samples, evaclip_model.cli;"
        "evaclip_model.ModelConfig.load('EVA02-CLIP-demo'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", evaclip_model.__all__)
def test_every_exported_name_exists(name: str):
    assert getattr(evaclip_model, name) is not None


def test_a_name_that_is_not_exported_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        evaclip_model.creat_model  # noqa: B018


def test_classify_orders_labels_by_probability(saved: Path):
    labels = ["a red apple", "a dog", "a boat"]
    ranked = classify(saved / "red.png", labels, saved / "model", "a picture of {}")
    assert sorted(label for label, _ in ranked) == sorted(labels)
    shares = [share for _, share in ranked]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_the_command_prints_a_line_a_label(saved: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["classify", str(saved / "red.png"), "a dog", "a cat"]
    assert main([*arguments, "--model", str(saved / "model")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split("  ")[-1] for line in lines) == ["a cat", "a dog"]


def test_the_architectures_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    assert "EVA02-CLIP-E-14-plus" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("image", "labels", "model", "message"),
    [
        ("none.png", ["a", "b"], "model", "none.png does not exist"),
        ("red.png", ["a", "a"], "model", "at least two different labels"),
        ("red.png", ["a", "b"], "nowhere", "nowhere is no saved model"),
        ("model/config.json", ["a", "b"], "model", "cannot be decoded"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(saved, capsys, image, labels, model, message):
    status = main(["classify", str(saved / image), *labels, "--model", str(saved / model)])
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
