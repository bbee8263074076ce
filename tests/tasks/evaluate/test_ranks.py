"""The same features and figures from any ranks, workers, shards, after any kill, from any cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
import torch

from evaclip_model.create import open_model
from evaclip_model.errors import InputError
from evaclip_model.tokenizer.tokenizer import tokenize
from evaclip_model.training.monitoring.validation import open_probe, run_probe
from evaclip_model.zeroshot.exact_ranks import build_classifier, normalise_features
from tasks.encoders.open_models import identify_model, open_subject
from tasks.evaluate.config import EvalSetConfig, EvaluateConfig, EvaluationMachine
from tasks.evaluate.encode.distributed import EncodeJob, Features, do_share
from tasks.evaluate.encode.encode_features import (
    Cache,
    TextFeatures,
    answer_features,
    encode_texts,
    read_block,
    write_block,
)
from tasks.evaluate.evaluate import evaluate_models
from tasks.evaluate.sets.published_layout import open_set
from tasks.process.launch import RankLaunch
from tasks.progress import report_nothing
from tests.tasks.process.fake_slurm import FakeSlurm

SavedModel = Callable[[int], Path]
WriteSet = Callable[..., Path]
Disc = Callable[[str, int], bytes]
COLOURS = ("red", "green", "blue", "yellow", "black", "gray", "brown")
IMAGES = 600
CHECKOUT = Path(__file__).parents[3]
CONFIG = EvaluateConfig(
    sets=(
        EvalSetConfig(name="discs", folder="-", kind="classification"),
        EvalSetConfig(name="captions", folder="-", kind="retrieval"),
    )
)
PROGRAM = f"""
import json, sys
from pathlib import Path
from tasks.evaluate.config import EvaluateConfig, EvaluationMachine
from tasks.evaluate.evaluate import evaluate_models
from tasks.progress import report_nothing
given = json.loads(sys.argv[1])
sets = {{name: Path(path) for name, path in given["sets"].items()}}
evaluate_models(EvaluateConfig.model_validate_json({CONFIG.model_dump_json()!r}), given["models"],
                sets, [], Path(given["out"]), report_nothing,
                machine=EvaluationMachine(**given["machine"]))
"""


def write_both(folder: Path, write: WriteSet, disc: Disc, tars: int) -> dict[str, Path]:
    """Two sets of the same discs, in some tars, whose order is not that of the keys."""
    drawn = {(c, n): disc(COLOURS[c], n) for c in range(7) for n in range(10)}
    classes: list[list[tuple[str, bytes]]] = [[] for _ in range(tars)]
    captions: list[list[tuple[str, bytes]]] = [[] for _ in range(tars)]
    for number in range(IMAGES):
        key, image = f"s{number * 7919 % IMAGES:07d}", drawn[number % 7, number % 10]
        label, text = str(number % 7).encode(), f"a {COLOURS[number % 7]} disc, {number} times"
        classes[number % tars] += [(f"{key}.webp", image), (f"{key}.cls", label)]
        captions[number % tars] += [(f"{key}.webp", image), (f"{key}.txt", text.encode())]
    names = "".join(f"{colour}\n" for colour in COLOURS)
    templates = "a {c} disc.\n{c}\na photo of something {c}\n"
    return {
        "discs": write(
            folder / "discs", classes, classnames=names, zeroshot_classification_templates=templates
        ),
        "captions": write(folder / "captions", captions, dataset_type="retrieval\n"),
    }


@pytest.fixture
def both(tmp_path: Path, write: WriteSet, disc: Disc) -> dict[str, Path]:
    return write_both(tmp_path / "one", write, disc, 1)


def results_of(
    models: Mapping[str, object], sets: Mapping[str, Path], out: Path, **machine: object
) -> bytes:
    out.mkdir()
    evaluate_models(
        CONFIG, models, sets, [], out, report_nothing, machine=EvaluationMachine(**machine)
    )
    return (out / "results.json").read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_rank_whose_machine_has_no_gpu_says_so():
    job = EncodeJob(models=(), workers=None, device="cuda", precision="fp32")
    with pytest.raises(InputError, match=r"has no GPU .* set EVACLIP_EVALUATE_GPUS=0"):
        do_share(job, 0, 1, lambda said: None)


def test_ranks_workers_and_shards_change_no_digit(
    tmp_path: Path, both: dict[str, Path], write: WriteSet, disc: Disc, saved_model: SavedModel
):
    models = {"a": saved_model(1), "b": saved_model(2)}
    expected = results_of(models, both, tmp_path / "plain")
    seven = write_both(tmp_path / "seven", write, disc, 7)
    assert results_of(models, seven, tmp_path / "ranks", ranks=2, workers=1) == expected
    assert results_of(models, seven, tmp_path / "workers", workers=4) == expected


@pytest.mark.slow
def test_four_ranks_that_slurm_starts_on_two_machines_give_the_digits_of_one(
    tmp_path: Path, both: dict[str, Path], saved_model: SavedModel, monkeypatch: pytest.MonkeyPatch
):
    models = {"a": saved_model(1), "b": saved_model(2)}
    expected = results_of(models, both, tmp_path / "plain")
    slurm = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{slurm.bin}:{os.environ['PATH']}")
    monkeypatch.setattr("tasks.process.launch.CLUSTER_LOOK_S", 0.2)
    launch = RankLaunch(launcher="slurm", ranks=2, nodes=2)
    try:
        assert results_of(models, both, tmp_path / "launched", launch=launch) == expected
        assert slurm.states == ["COMPLETED"]
    finally:
        slurm.close()


@pytest.mark.parametrize("victim", ["all", pytest.param("rank", marks=pytest.mark.slow)])
def test_whoever_is_killed_the_same_command_goes_on_and_gives_the_same_digits(
    victim: str, tmp_path: Path, both: dict[str, Path], saved_model: SavedModel
):
    models = {"a": str(saved_model(1)), "b": str(saved_model(2))}
    expected = results_of(models, both, tmp_path / "plain")
    out, cache = tmp_path / "out", tmp_path / "cache"
    out.mkdir()
    machine = {"ranks": 2, "cache": str(cache)}
    given = {"models": models, "sets": both, "out": out, "machine": machine}
    command = [sys.executable, "-c", PROGRAM, json.dumps(given, default=str)]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env) as process:
        ranks = first_block(cache, process)
        (process if victim == "all" else ranks[0]).send_signal(signal.SIGKILL)
        status = process.wait(120)
    assert status == (0 if victim == "rank" else -signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert kept
    wait_until_gone(ranks)
    evaluate_models(
        CONFIG, models, both, [], out, report_nothing, machine=EvaluationMachine(**machine)
    )
    assert (out / "results.json").read_bytes() == expected
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def first_block(cache: Path, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks, as soon as one of them has finished a block."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        ranks = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "tasks.evaluate.encode.distributed" in child.cmdline()
            and "--" not in child.cmdline()
        ]
        if ranks and any(cache.rglob("*.safetensors")):
            return ranks
        time.sleep(0.01)
    raise AssertionError("no rank finished a block")


def wait_until_gone(ranks: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(ranks, timeout=20)
    assert not left


def test_a_second_evaluation_encodes_nothing(
    tmp_path: Path, both: dict[str, Path], saved_model: SavedModel
):
    cache = tmp_path / "cache"
    first = results_of({"a": saved_model(1)}, both, tmp_path / "first", cache=cache)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    moved = saved_model(1).rename(saved_model(1).with_name("moved"))
    try:
        second = results_of({"a": moved}, both, tmp_path / "second", cache=cache)
    finally:
        moved.rename(saved_model(1))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == before
    assert json.loads(second)["results"] == json.loads(first)["results"]


def test_a_damaged_block_is_made_again(
    tmp_path: Path, both: dict[str, Path], saved_model: SavedModel
):
    cache = tmp_path / "cache"
    models = {"a": saved_model(1)}
    first = results_of(models, both, tmp_path / "first", cache=cache)
    blocks = sorted(cache.rglob("*.safetensors"))
    for number, path in enumerate(blocks):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content if number % 2 else content[: len(content) // 2])
        assert read_block(path) is None
    assert results_of(models, both, tmp_path / "second", cache=cache) == first


def test_a_full_cache_loses_what_was_used_longest_ago(tmp_path: Path):
    cache = Cache(tmp_path, most_bytes=9_000)
    for number, name in enumerate(("old", "older", "new")):
        write_block(cache.open_folder(name) / "0.safetensors", {"x": torch.zeros(1000)})
        moment = 1_000_000 - 10 * number if name != "new" else 2_000_000
        os.utime(tmp_path / name / ".used", (moment, moment))
    cache.remove_oldest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_a_set_that_fails_beside_a_killed_rank_leaves_the_others_their_own_images(
    tmp_path: Path,
    classification: Path,
    retrieval: Path,
    saved_model: SavedModel,
    monkeypatch: pytest.MonkeyPatch,
):
    discs = {"discs": open_set("discs", retrieval, "retrieval")}
    both = {"colours": open_set("colours", classification, "classification"), **discs}
    spec, run_ranks = str(saved_model(1)), Features._run_ranks
    found = []
    for name, sets in (("alone", discs), ("both", both)):
        cache, identities = Cache(tmp_path / name, 1 << 30), {"a": identify_model(spec)}
        features = Features(cache, EvaluationMachine(), "fp32", {"a": spec}, identities, sets)
        features.compute_missing(tmp_path / "job", report_nothing)
        found.append(features.image_features("a", "discs"))

        def fail_once(self: Features, *given: object) -> None:
            monkeypatch.setattr(Features, "_run_ranks", run_ranks)
            self.failed["colours"] = "an image cannot be decoded"

        monkeypatch.setattr(Features, "_run_ranks", fail_once)
    assert torch.equal(*found)


def test_a_text_has_the_same_bits_whatever_else_is_encoded(tmp_path: Path, saved_model: SavedModel):
    subject = open_subject(str(saved_model(1)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    texts = [f"a {'very ' * (number % 9)}small thing, number {number}" for number in range(300)]
    encode_texts(subject, texts, tmp_path / "all")
    for part in (texts[250:], texts[100:101], texts[::7]):
        encode_texts(subject, [one for one in part], tmp_path / str(len(part)))
        alone = TextFeatures(tmp_path / str(len(part))).features_of(part)
        assert torch.equal(alone, TextFeatures(tmp_path / "all").features_of(part))
    torch.set_num_threads(threads)


def test_texts_are_found_again_and_only_the_others_are_encoded(
    tmp_path: Path, saved_model: SavedModel
):
    subject = open_subject(str(saved_model(1)))
    encode_texts(subject, ["one", "two"], tmp_path)
    features = TextFeatures(tmp_path)
    assert features.missing_texts(["two", "three", "one"]) == ["three"]
    encode_texts(subject, ["three"], tmp_path)
    assert TextFeatures(tmp_path).missing_texts(["two", "three", "one"]) == []
    expected = open_model(saved_model(1)).encode_text(tokenize(["three", "one"]))
    found = TextFeatures(tmp_path).features_of(["three", "one"])
    torch.testing.assert_close(
        found, normalise_features(expected.detach(), "text"), rtol=0, atol=1e-6
    )


def test_a_classifier_is_the_mean_of_its_prompts(
    tmp_path: Path, both: dict[str, Path], saved_model: SavedModel
):
    evalset = open_set("discs", both["discs"], "classification")
    prompts = [t.replace("{c}", c) for c in evalset.classnames for t in evalset.templates]
    encode_texts(open_subject(str(saved_model(1))), prompts, tmp_path / "texts")
    found = answer_features(evalset, TextFeatures(tmp_path / "texts"))
    with torch.inference_mode():
        features = open_model(saved_model(1)).encode_text(tokenize(prompts), normalize=True)
    expected = build_classifier(features, evalset.classnames)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_tower_that_is_not_causal_gets_its_whole_context(tmp_path: Path):
    seen: list[tuple[int, ...]] = []

    class Bidirectional:
        transform = None

        def tokenize(self, texts: list[str]) -> torch.Tensor:
            return tokenize(texts)

        def find_cut(self, texts: list[str]) -> torch.Tensor:
            return torch.zeros(len(texts), dtype=torch.bool)

        def count_ids(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.full((len(tokens),), tokens.shape[1])

        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(tokens.shape))
            return torch.randn(len(tokens), 8)

    encode_texts(Bidirectional(), ["a", "a long text of many words"], tmp_path)
    assert seen == [(32, 77)]


def test_the_probe_of_a_training_gives_the_evaluators_figures(
    tmp_path: Path, both: dict[str, Path], saved_model: SavedModel
):
    found = json.loads(results_of({"a": saved_model(1)}, both, tmp_path / "out"))
    figures = found["results"]["discs"]["a"]
    shares = run_probe(open_model(saved_model(1)), open_probe(both["discs"]))
    assert round(shares["probe_top1"] * IMAGES) == round(figures["top1"] * IMAGES)
    assert round(shares["probe_top5"] * IMAGES) == round(figures["top5"] * IMAGES)
