"""Whole evaluations of tiny sets with the real model: figures, files, kills, bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaclip_model.create import open_model
from evaclip_model.errors import InputError
from evaclip_model.reading.image_decoder import decode_image
from evaclip_model.reading.transform import image_transform
from evaclip_model.tokenizer.tokenizer import tokenize
from tasks.artifacts.artifact import Address, Made, produce_artifact
from tasks.evaluate.config import STAGE, EvalSetConfig, EvaluateConfig, EvaluationMachine
from tasks.evaluate.evaluate import evaluate_models
from tasks.progress import report_nothing

CONFIG = EvaluateConfig(
    sets=(
        EvalSetConfig(name="colours", folder="unused", kind="classification"),
        EvalSetConfig(name="discs", folder="unused", kind="retrieval"),
    ),
    title="Discs & colours",
)
SavedModel = Callable[[int], Path]


@pytest.fixture
def curve(tmp_path: Path) -> Path:
    """Metrics of a stage called 'first light', its last line cut off by a kill."""
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps({"train": {"name": "first light"}}))
    lines = [
        json.dumps({"step": n, "samples": 8 * n, "loss": 3 / n, "step_s": 0.5, "logit_scale": 14})
        for n in range(1, 30)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "sam')
    return folder / "metrics.jsonl"


@pytest.fixture
def made(
    tmp_path: Path, saved_model: SavedModel, sets: Mapping[str, Path], curve: Path
) -> tuple[Made, Path]:
    out = tmp_path / "out"
    out.mkdir()
    models = {"trained": saved_model(1), "untrained": saved_model(2)}
    return evaluate_models(CONFIG, models, sets, [curve], out, report_nothing), out


def results_in(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_figures_equal_a_direct_computation_with_the_whole_batch_at_once(
    made: tuple[Made, Path], saved_model: SavedModel, disc: Callable[[str, int], bytes]
):
    colours = ("red", "green", "blue", "yellow")
    model = open_model(saved_model(1)).eval()
    transform = image_transform(model)
    images = torch.stack([transform(decode_image(disc(colours[n % 4], n))) for n in range(12)])
    with torch.inference_mode():
        seen = model.encode_image(images, normalize=True)
        names = [f"{colour} disc" for colour in colours]
        prompts = [model.encode_text(tokenize([f"a photo of a {n}.", n]), True) for n in names]
    classifier = torch.stack([prompt.mean(dim=0) for prompt in prompts])
    classifier = classifier / classifier.norm(dim=1, keepdim=True)
    right = (seen @ classifier.T).argmax(dim=1) == torch.arange(12) % 4
    figures = results_in(made[1])["results"]["colours"]["trained"]
    assert figures["top1"] == pytest.approx(float(right.float().mean()))
    assert (figures["n"], figures["classes"], figures["top5"]) == (12, 4, 1.0)


def test_counts_name_the_trained_models_figures_by_set_and_metric(made: tuple[Made, Path]):
    counts, results = made[0].counts, results_in(made[1])
    assert counts["colours.top1"] == results["results"]["colours"]["trained"]["top1"]
    assert counts["colours.untrained.top1"] == results["results"]["colours"]["untrained"]["top1"]
    assert counts["colours.chance.top1"] == 0.25
    assert counts["discs.chance.text_to_image_r1"] == pytest.approx(1 / 6)
    assert (counts["colours.n"], counts["discs.n"]) == (12, 6)
    assert {f"discs.image_to_text_r{k}" for k in (1, 5, 10)} <= counts.keys()


def test_what_decides_a_figure_is_written_beside_it(made: tuple[Made, Path]):
    results = results_in(made[1])
    assert results["sets"]["colours"]["templates"] == ["a photo of a {c}.", "{c}"]
    assert results["models"]["trained"]["architecture"] == "EVA02-CLIP-demo at 16 px"
    assert results["models"]["trained"]["digest"] != results["models"]["untrained"]["digest"]
    assert all(len(one["fingerprint"]) == 16 for one in results["sets"].values())
    assert "torch" in results["versions"]


def test_the_report_is_one_page_that_asks_for_nothing(made: tuple[Made, Path]):
    text = (made[1] / "report.html").read_text()
    links = re.findall(r"(?:src|href|url|action|data)\s*[=(]\s*[\"']?([^\"')\s>]+)", text)
    outside = [link for link in links if not link.startswith(("#", "data:image/webp;base64,"))]
    assert links and not outside
    assert "<script" not in text and "@import" not in text
    assert "Discs &amp; colours" in text and "first light" in text
    assert text.count("<svg") >= 3
    assert len(text) < 1_000_000


def test_nothing_but_results_and_report_is_left(made: tuple[Made, Path]):
    assert {path.name for path in made[1].iterdir()} == {path.name for path in made[0].files}
    assert {made[1] / "results.json", made[1] / "report.html"} <= set(made[0].files)


def test_killed_after_any_number_of_blocks_and_continued_gives_the_same_bytes(
    tmp_path: Path,
    made: tuple[Made, Path],
    saved_model: SavedModel,
    sets: Mapping[str, Path],
    curve,
):
    out = tmp_path / "killed"
    out.mkdir()
    models = {"trained": saved_model(1), "untrained": saved_model(2)}
    arguments = json.dumps(
        {"models": models, "sets": sets, "curve": curve, "out": out}, default=str
    )
    program = f"""
import json, os, signal, sys
from pathlib import Path
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.evaluate import evaluate_models
given = json.loads(sys.argv[1])
config = EvaluateConfig.model_validate_json({CONFIG.model_dump_json()!r})
paths = lambda named: {{name: Path(path) for name, path in named.items()}}
last = int(sys.argv[2])
def report(done, total, detail=""):
    if done >= last:
        os.kill(os.getpid(), signal.SIGKILL)
evaluate_models(config, paths(given["models"]), paths(given["sets"]), [Path(given["curve"])],
                Path(given["out"]), report)
"""
    for moment in (10, 20, 40):
        command = [sys.executable, "-c", program, arguments, str(moment)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        killed = subprocess.run(command, env=environment, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert not (out / "results.json").exists()
    assert list(out.glob("features/**/*.safetensors"))
    evaluate_models(CONFIG, models, sets, [curve], out, report_nothing)
    for name in ("results.json", "report.html"):
        assert (out / name).read_bytes() == (made[1] / name).read_bytes()


def test_workers_do_not_change_a_figure(
    tmp_path: Path,
    made: tuple[Made, Path],
    saved_model: SavedModel,
    sets: Mapping[str, Path],
    curve,
):
    out = tmp_path / "workers"
    out.mkdir()
    models = {"trained": saved_model(1), "untrained": saved_model(2)}
    evaluate_models(
        CONFIG, models, sets, [curve], out, report_nothing, machine=EvaluationMachine(workers=2)
    )
    assert (out / "results.json").read_bytes() == (made[1] / "results.json").read_bytes()


def test_progress_ends_at_its_total(
    tmp_path: Path, saved_model: SavedModel, sets: Mapping[str, Path]
):
    seen: list[tuple[float, float]] = []
    out = tmp_path / "counted"
    out.mkdir()
    evaluate_models(
        CONFIG,
        {"trained": saved_model(1)},
        sets,
        [],
        out,
        lambda done, total, detail="": seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("workers", [0, 1])
def test_one_unreadable_image_fails_the_set_in_one_sentence(
    workers: int, tmp_path: Path, write: Callable[..., Path], saved_model: SavedModel, disc
):
    good, cut = disc("red", 1), disc("red", 2)[:40]
    members = [("a.webp", good), ("a.cls", b"0"), ("b.webp", cut), ("b.cls", b"0")]
    folder = write(tmp_path / "cut", [members], classnames="x\n")
    config = EvaluateConfig(
        sets=(EvalSetConfig(name="cut", folder="-", kind="classification", templates=("a {c}",)),)
    )
    with pytest.raises(
        InputError,
        match=r"^1 evaluation set .*\S+0\.tar: image b: [^\n]+again\); there are no others$",
    ):
        evaluate_models(
            config,
            {"m": saved_model(1)},
            {"cut": folder},
            [],
            tmp_path,
            report_nothing,
            machine=EvaluationMachine(workers=workers),
        )
    assert not (tmp_path / "results.json").exists()


def test_a_crop_that_leaves_nothing_of_an_image_fails_the_set(
    classification: Path, tmp_path: Path, saved_model: SavedModel
):
    given = {"folder": "-", "kind": "classification", "templates": ("a {c}",), "crop_px": 64}
    config = EvaluateConfig(sets=(EvalSetConfig(name="small", **given),))
    complaint = r"image \S+ has \d+ x \d+ pixels, of which crop_px = 64 leaves none: give less\)"
    with pytest.raises(InputError, match=complaint):
        evaluate_models(
            *(config, {"m": saved_model(1)}, {"small": classification}, []),
            *(tmp_path / "out", report_nothing),
        )


def test_a_diverged_model_is_refused(
    tmp_path: Path, saved_model: SavedModel, sets: Mapping[str, Path]
):
    broken = shutil.copytree(saved_model(1), tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({k: v * float("nan") for k, v in weights.items()}, broken / "model.safetensors")
    with pytest.raises(InputError, match="not finite"):
        evaluate_models(CONFIG, {"m": broken}, sets, [], tmp_path, report_nothing)


def test_a_finished_evaluation_is_not_done_again(
    tmp_path: Path, saved_model: SavedModel, sets: Mapping[str, Path]
):
    address = Address.of(tmp_path / "runs", STAGE, CONFIG, {"train": "0" * 16})

    def make(out: Path) -> Made:
        models = {"trained": saved_model(1)}
        return evaluate_models(CONFIG, models, sets, [], out, report_nothing, lineage="<svg/>")

    def refuse(out: Path) -> Made:
        raise AssertionError("evaluated a second time")

    first = produce_artifact(address, make)
    assert produce_artifact(address, refuse) == first
    assert {"results.json", "report.html"} <= set(first.files)
    assert first.kind == "evaluate"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kind": "retrieval", "templates": ["{c}"]}, "leave out templates"),
        ({"kind": "classification", "templates": ["a photo"]}, r"needs \{c\} for the class name"),
        ({"kind": "classification", "templates": []}, "needs at least one template"),
        ({"kind": "both"}, "kind"),
        ({"kind": "retrieval", "name": "a/b"}, "name"),
    ],
)
def test_a_wrong_set_in_a_recipe_is_explained(changes: dict, complaint: str):
    values = {"sets": [{"name": "a", "folder": "f", **changes}]}
    with pytest.raises(InputError, match=complaint):
        EvaluateConfig.from_mapping(values, where="recipe")


def test_a_batch_size_is_refused_with_the_reason():
    values = {"sets": [{"name": "cifar10"}], "batch_size": 64}
    with pytest.raises(InputError, match=r"'batch_size' is no longer a setting: .+; leave it out"):
        EvaluateConfig.from_mapping(values, where="recipe")


def test_two_sets_of_one_name_are_refused():
    one = {"name": "a", "folder": "f", "kind": "retrieval"}
    with pytest.raises(InputError, match="two sets are called 'a'"):
        EvaluateConfig.from_mapping({"sets": [one, one]}, where="recipe")


def test_a_recipe_is_validated_without_torch():
    program = "import sys, tasks.evaluate.config; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    assert (
        subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode
        == 0
    )
