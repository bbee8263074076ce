"""What a job may ask of a training run besides the plain one."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from evaclip_model.create import create_model, open_model
from evaclip_model.errors import InputError
from evaclip_model.training.config import TrainJob
from evaclip_model.training.monitoring.validation import open_probe, run_probe
from evaclip_model.training.trainer import read_workers_of
from evaclip_model.training.worker import DATA_ERROR
from evaclip_model.zeroshot.set_layout import Span
from tests.evaclip_model.trainer_runs import TINY, finish, job_of, start

SHORT = {"samples_seen": 6 * 24}


@pytest.fixture(scope="module")
def plain(tiny_data, ranks, tmp_path_factory):
    """Six steps of two ranks, each with its whole share at once: its folder and its metrics."""
    job = job_of(tiny_data, tmp_path_factory.mktemp("plain"), **SHORT)
    return job.parent, finish(ranks, start(ranks, 2, job), job)


@pytest.mark.parametrize(("count", "size"), [(2, 4), (5, 3)])
def test_a_share_in_parts_gives_the_steps_of_the_whole_share(
    tiny_data, ranks, plain, tmp_path, count, size
):
    job = job_of(tiny_data, tmp_path / "run", **SHORT, job={"micro_batch": size})
    rows = finish(ranks, start(ranks, count, job), job)
    for ours, theirs in zip(rows, plain[1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_parts_that_do_not_divide_the_share_are_refused(tiny_data, ranks, tmp_path):
    job = job_of(tiny_data, tmp_path / "run", **SHORT, job={"micro_batch": 5})
    assert ranks.wait(start(ranks, 2, job)) == [DATA_ERROR] * 2
    error = (job.parent / "error.txt").read_text()
    assert "micro_batch = 5 must divide" in error
    assert "12 pairs" in error


@pytest.mark.parametrize(
    ("asked", "device", "ranks_here", "expected"),
    [(None, "cuda", "8", 7), (None, "cuda", "64", 0), (None, "cpu", "2", 0), (3, "cuda", "8", 3)],
)
def test_reading_processes_get_the_cores_that_gpus_leave(
    tmp_path, monkeypatch, asked, device, ranks_here, expected
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    settings = json.loads(job_of(tmp_path, tmp_path / "run").read_text())
    job = TrainJob(**settings, read_workers=asked)
    assert read_workers_of(job, torch.device(device)) == expected


def test_a_dry_run_reports_a_step_and_leaves_nothing_else(tiny_data, ranks, plain, tmp_path):
    job = job_of(tiny_data, tmp_path / "run", **SHORT, job={"dry_run": True, "micro_batch": 6})
    assert ranks.wait(start(ranks, 2, job)) == [0, 0]
    found = json.loads((job.parent / "dry_run.json").read_text())
    assert found["loss"] == pytest.approx(plain[1][0]["loss"], rel=2e-5)
    assert found["micro_batch"] == 6
    assert found["gradient_s"] > 0
    assert found["memory_peak_bytes"] > 2**20
    assert found["self_test"]["loss"] < 1e-6
    left = {path.name for path in job.parent.iterdir()} - {"rank-0.log", "rank-1.log"}
    assert left == {"train.json", "dry_run.json"}


def test_a_line_of_metrics_says_where_the_step_stands_and_where_its_time_went(plain):
    for row in plain[1]:
        parts = ("data_wait_s", "prepare_s", "gradient_s", "update_s", "save_s")
        assert row["step_s"] == pytest.approx(sum(row[name] for name in parts))
        assert row["samples_per_second_per_rank"] == pytest.approx(row["images_per_second"] / 2)
        squares = sum(row[f"grad_norm_{tower}"] ** 2 for tower in ("vision", "text", "other"))
        assert squares**0.5 == pytest.approx(row["grad_norm"], rel=1e-5)
        assert row["trust_min_vision"] <= row["trust_median_vision"] <= row["trust_max_vision"]
        assert 0 < row["median_rank_s"] <= row["slowest_rank_s"] <= row["step_s"]
        assert (row["taken"], row["skipped_steps"], row["rollbacks"]) == (1, 0, 0)
        assert row["patch_dropout"] == 0.5
        assert 7 < row["text_tokens"] < 15  # "a red thing number 00001"
    assert [row["save_s"] > 0 for row in plain[1]] == [False] * 4 + [True, False]


def test_masks_end_before_training_does_and_a_mean_of_weights_is_kept(tiny_data, ranks, tmp_path):
    job = job_of(
        tiny_data,
        tmp_path / "run",
        **SHORT,
        patch_dropout_end=0.25,
        unmasked_final_share=0.34,
        drop_path=0.2,
        ema_decay=0.5,
        deterministic=True,
        job={"profile_steps": [2, 3]},
    )
    rows = finish(ranks, start(ranks, 2, job), job)
    assert [row["patch_dropout"] for row in rows][0::3] == [0.5, 0.25]
    assert [row["patch_dropout"] for row in rows][4:] == [0.0, 0.0]
    weights, mean = (
        load_file(job.parent / folder / "model.safetensors") for folder in ("model", "model-ema")
    )
    assert weights.keys() == mean.keys()
    assert not torch.equal(weights["logit_scale"], mean["logit_scale"])
    trace = json.loads((job.parent / "profile/steps-2-3.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """An evaluation set of ten images in two classes."""
    folder = tmp_path_factory.mktemp("discs")
    (folder / "test").mkdir()
    (folder / "classnames.txt").write_text("red\nblue\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} thing\n{c}\n")
    (folder / "test/nshards.txt").write_text("1")
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for number in range(10):
            image = io.BytesIO()
            Image.new("RGB", (20, 20), ("red", "blue")[number % 2]).save(image, "png")
            for name, data in (("png", image.getvalue()), ("cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(f"{number:03d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def test_a_probe_reports_the_present_weights_and_changes_no_step(
    tiny_data, ranks, plain, discs, tmp_path
):
    job = job_of(
        tiny_data, tmp_path / "run", **SHORT, probe_every_steps=3, job={"probe": str(discs)}
    )
    rows = finish(ranks, start(ranks, 2, job), job)
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain[1]]
    assert [row["step"] for row in rows if "probe_top1" in row] == [3, 6]
    final = open_model(job.parent / "model")
    expected = run_probe(final, open_probe(discs))
    assert expected == {name: rows[-1][name] for name in ("probe_top1", "probe_top5")}
    assert expected["probe_top5"] == 1.0
    assert expected["probe_top1"] in {count / 10 for count in range(11)}


def test_an_image_of_a_probe_that_cannot_be_used_counts_as_wrong(discs, caplog, tmp_path):
    model, probe = create_model(TINY, seed=0), open_probe(discs)
    assert run_probe(model, probe)["probe_top5"] == 1.0
    assert not caplog.text
    broken, missing = tmp_path / "broken.tar", tmp_path / "missing.tar"
    broken.write_bytes(b"no image")
    unusable = (Span(broken, 0, 8), Span(broken, 0, 80), Span(missing, 0, 8))
    found = run_probe(model, probe._replace(images=(*unusable, *probe.images[3:])))
    assert found["probe_top5"] == 0.7
    assert "3 of 10 images" in caplog.text


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_a_probe_of_weights_that_have_diverged_warns_and_ends_nothing(discs, caplog, tower):
    model = create_model(TINY, seed=0).train()
    next(getattr(model, tower).parameters()).data.fill_(torch.nan)
    assert run_probe(model, open_probe(discs)) == {}
    assert "no figures" in caplog.text
    assert model.training


def test_a_probe_that_is_no_evaluation_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read as an evaluation set"):
        open_probe(tmp_path)


def test_events_without_their_package_are_refused_with_what_to_install(tiny_data, ranks, tmp_path):
    job = job_of(tiny_data, tmp_path / "run", **SHORT, job={"tensorboard": True})
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert ranks.wait(start(ranks, 2, job)) == [DATA_ERROR] * 2
        assert "evaclip[tensorboard]" in (job.parent / "error.txt").read_text()
    else:
        finish(ranks, start(ranks, 2, job), job)
        assert list((job.parent / "tensorboard").glob("events.out.tfevents.*"))
