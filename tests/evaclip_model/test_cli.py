"""The command line: classify, embed, convert, models; and its mistakes, one sentence each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from evaclip_model.cli import _Progress, main
from evaclip_model.create import create_model, open_model
from evaclip_model.reading.transform import image_transform
from evaclip_model.tokenizer.tokenizer import tokenize
from evaclip_model.weights.load import save_model

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, an image, and a folder of three images, a broken one and a note."""
    folder = tmp_path_factory.mktemp("saved")
    save_model(create_model("EVA02-CLIP-demo", seed=0), folder / "model")
    Image.new("RGBA", (90, 50), "red").save(folder / "red.png")
    pictures = folder / "pictures"
    (pictures / "more").mkdir(parents=True)
    for number, colour in enumerate(COLOURS):
        place = pictures / "more" if colour == "green" else pictures
        Image.new("RGB", (60 + number, 50), colour).save(place / f"{colour}.JPG")
    (pictures / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    (pictures / "note.txt").write_text("no image")
    return folder


def readable(saved: Path) -> list[Path]:
    pictures = saved / "pictures"
    return [pictures / "blue.JPG", pictures / "more" / "green.JPG", pictures / "red.JPG"]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_labels_are_printed_by_probability(saved: Path, capsys: pytest.CaptureFixture[str]):
    labels = ["a red apple", "a dog", "a boat"]
    options = ["--template", "a picture of {}", "--model", saved / "model"]
    assert run("classify", saved / "red.png", *labels, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split("  ")[-1] for line in lines) == sorted(labels)
    shares = [float(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_labels_of_a_sigmoid_model_are_judged_each_by_itself(saved, tmp_path, capsys):
    model = create_model("EVA02-CLIP-demo", seed=0).eval()
    model.logit_bias = torch.nn.Parameter(torch.tensor([-2.0]))
    save_model(model, tmp_path / "model")
    pixels = image_transform(model)(Image.open(saved / "red.png"))
    with torch.inference_mode():
        image = model.encode_image(pixels[None], normalize=True)
        texts = model.encode_text(tokenize(["a dog", "a cat"]), normalize=True)
        expected = (model.logit_scale.exp() * image @ texts.T - 2).sigmoid()[0].tolist()
    options = ["--template", "{}", "--model", tmp_path / "model"]
    assert run("classify", saved / "red.png", "a dog", "a cat", *options) == 0
    lines = dict(line.split("%  ")[::-1] for line in capsys.readouterr().out.splitlines())
    shown = [float(lines[label]) / 100 for label in ("a dog", "a cat")]
    assert shown == pytest.approx(expected, abs=1e-3) and sum(shown) != pytest.approx(1, abs=0.01)


def test_the_architectures_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    assert "EVA02-CLIP-E-14-plus" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("image", "labels", "model", "message"),
    [
        ("none.png", ["a", "b"], "model", "none.png does not exist"),
        ("red.png", ["a", "a"], "model", "at least two different labels"),
        ("red.png", ["a", "b"], "nowhere", "nowhere is not a saved model"),
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


def test_a_folder_gets_a_line_an_image_and_the_unreadable_are_named(saved, capsys):
    assert run("classify", saved / "pictures", "a dog", "a cat", "--model", saved / "model") == 0
    captured = capsys.readouterr()
    assert [line.split("  ")[-1] for line in captured.out.splitlines()] == [
        str(path) for path in readable(saved)
    ]
    assert "1 of 4 cannot be read:" in captured.err
    assert "broken.png" in captured.err


def test_features_of_a_folder_equal_the_models(saved, tmp_path, capsys):
    options = ["--model", saved / "model", "--out", tmp_path / "out"]
    assert run("embed", saved / "pictures", saved / "red.png", *options) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("4 rows: ")
    assert "1 of 5 cannot be read:" in captured.err and "broken.png" in captured.err
    parts = [tmp_path / "out" / f"{name}-000000.parquet" for name in ("pictures", "red")]
    assert sorted((tmp_path / "out").glob("*.parquet")) == parts
    (broken,) = json.loads(parts[0].with_suffix(".unreadable.json").read_text())
    assert broken[0] == "broken.png"
    model = open_model(saved / "model")
    for part, files in zip(parts, (readable(saved), [saved / "red.png"]), strict=True):
        table = pq.read_table(part)
        assert table.column_names == ["id", "caption", "image", "text", "similarity"]
        names = [str(path.relative_to(saved)).removeprefix("pictures/") for path in files]
        assert table["id"].to_pylist() == names
        pixels = torch.stack([image_transform(model)(Image.open(path)) for path in files])
        with torch.inference_mode():
            expected = model.encode_image(pixels, normalize=True)
        found = torch.tensor(table["image"].to_pylist())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_features_of_captions_keep_the_order_of_the_lines(saved, tmp_path):
    texts = ["a red apple on\u2028a table", "Straße", "", "a red apple on a table", "x"]
    (tmp_path / "captions.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    options = ["--model", saved / "model", "--out", tmp_path / "out"]
    assert run("embed", tmp_path / "captions.txt", *options) == 0
    del texts[2]  # an empty line is no text: counted, and no other's number changes
    model = open_model(saved / "model")
    with torch.inference_mode():
        expected = model.encode_text(tokenize(texts), normalize=True)
    table = pq.read_table(tmp_path / "out" / "captions-000000.parquet")
    assert table["id"].to_pylist() == ["0", "1", "3", "4"]
    assert table["caption"].to_pylist() == texts
    found = torch.tensor(table["text"].to_pylist())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_picture_of_a_form_that_is_not_opened_is_named_and_not_passed_over(
    saved, tmp_path, capsys
):
    for name in ("a.avif", "b.jfif"):
        Image.new("RGB", (9, 9)).save(tmp_path / name, "AVIF" if name == "a.avif" else "JPEG")
    assert run("embed", tmp_path, "--model", saved / "model", "--out", tmp_path / "x") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("1 rows: ") and "a.avif (these bytes" in captured.err


def test_an_architecture_and_a_file_of_weights_are_a_model_too(saved, tmp_path):
    weights = ["--weights", saved / "model" / "model.safetensors", "--precision", "bf16"]
    options = ["--model", "EVA02-CLIP-demo", *weights, "--out", tmp_path]
    assert run("embed", saved / "red.png", *options) == 0
    (vector,) = pq.read_table(tmp_path / "red-000000.parquet")["image"].to_pylist()
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("form", ["native", "transformers"])
def test_a_checkpoint_is_written_in_another_form_and_read_back(saved, tmp_path, capsys, form):
    part = ["--part", "text"] if form == "transformers" else []
    weights = tmp_path / "x.safetensors"
    assert run("convert", saved / "model", weights, "--as", form, *part) == 0
    assert "native layout" in capsys.readouterr().out
    back = ["--model", "EVA02-CLIP-demo", *part, "--as", form]
    assert run("convert", weights, tmp_path / "back.safetensors", *back) == 0
    captured = capsys.readouterr()
    assert f"{form} layout" in captured.out
    assert ("initial values: text.text_projection" in captured.err) == (form == "transformers")
    ours, theirs = load_file(weights), load_file(tmp_path / "back.safetensors")
    decided = ours.keys() - {"text_projection.weight"}  # it belongs to both towers
    assert len(decided) > 30
    assert all(torch.equal(ours[key], theirs[key]) for key in decided)


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_the_place_of_a_folder_is_one_sentence(saved, tmp_path, capsys, below):
    (tmp_path / "taken").touch()
    place = tmp_path / f"taken{below}"
    assert run("convert", saved / "model", place, "--as", "native") == 2
    said = capsys.readouterr().err
    assert str(place) in said and said.count("\n") == 1


def test_weights_alone_do_not_say_their_architecture(saved, tmp_path, capsys):
    weights = saved / "model" / "model.safetensors"
    assert run("convert", weights, tmp_path / "x", "--as", "native") == 2
    assert "name it with --model" in capsys.readouterr().err


def test_a_tower_alone_is_no_whole_model(saved, tmp_path, capsys):
    options = ["--as", "native", "--part", "vision"]
    assert run("convert", saved / "model", tmp_path / "x", *options) == 2
    assert "can be written as timm" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["red.png", "--out", "empty", "--model", "model"], "empty cannot be written ("),
        (["none.png", "--out", "x", "--model", "model"], "does not exist"),
        (["model", "--out", "x", "--model", "model"], "has no images"),
        (["model/config.json", "--out", "x", "--model", "model", "--share", "3/2"], "expected K/N"),
        (["red.txt", "--out", "x", "--model", "model"], "cannot be read as a table"),
        (["odd.csv", "--out", "x", "--model", "model"], "has columns a, b: expected one of image"),
        (["red.png", "--out", "x", "--model", "EVA02-CLIP-B-16"], "add --weights FILE"),
        (["red.png", "--out", "x", "--model", "model", "--device", "gpu9"], "cannot be used"),
    ],
)
def test_what_cannot_be_embedded_is_said_in_one_sentence(
    saved, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(saved)
    (saved / "empty").touch()
    shutil.copy("red.png", "red.txt")
    (saved / "odd.csv").write_text("a,b\n1,2\n")
    assert run("embed", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(saved.glob("x/*"))


def test_weights_that_have_diverged_are_named(saved, tmp_path, capsys):
    spoilt = load_file(saved / "model" / "model.safetensors")
    spoilt["visual.norm.weight"] = torch.full_like(spoilt["visual.norm.weight"], 3e38)
    save_file(spoilt, tmp_path / "spoilt.safetensors")
    options = ["--weights", tmp_path / "spoilt.safetensors", "--out", tmp_path / "x"]
    assert run("embed", saved / "red.png", "--model", "EVA02-CLIP-demo", *options) == 2
    assert "features that are not finite" in capsys.readouterr().err


def test_long_commands_say_how_far_they_are(capsys, monkeypatch):
    now = iter([0.0, 1.0, 11.0, 12.0, 22.5])
    monkeypatch.setattr("evaclip_model.cli.time.monotonic", lambda: next(now))
    progress = _Progress("images", 400)
    for done in (100, 200, 300, 400):
        progress(done)
    assert capsys.readouterr().err.splitlines() == [
        "200 images, 18.2 a second, 50%, 0:00:11 left",
        "400 images, 17.8 a second, 100%, 0:00:00 left",
    ]


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from evaclip_model.cli import main\n"
        "try: main(['embed', '--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
