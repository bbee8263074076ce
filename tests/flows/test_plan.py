"""Plans of every recipe, where nothing that they read is on the machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.training.cost import peak_flops, train_flops_per_sample
from flows.__main__ import main
from flows.config.recipe import Machines, Recipe, load_recipe
from flows.config.recipe_loader import recipe_names
from flows.graph.graph import draw_graph
from flows.planning.recipe_cost import (
    READ_PER_PROCESS_S,
    RECOMPUTED,
    TABLE_6_SHARE,
    Workers,
    cut_share,
    data_table,
    engine_settings,
    estimate_data,
    estimate_stage,
    is_large,
    training_table,
)
from flows.planning.run_plan import make_plan
from tests.flows.test_recipe_values import NOT_THE_PAPERS


def figures(recipe: Recipe, machines: str, stage: int = 0, **given: float) -> dict[str, str]:
    lines = [*estimate_stage(recipe, recipe.train[stage], Machines.parse_spec(machines), **given)]
    assert all(line.origin for line in lines)
    return {line.what: f"{line.figure} ({line.origin})" for line in lines}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_drawn_and_planned(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    graph = draw_graph(recipe, tmp_path, "sqlite:///there.db")
    rows = make_plan(graph)
    assert {row.state for row in rows} == {"to make"}
    assert ("not known" in {row.digest for row in rows}) == any(step.absent for step in graph.steps)
    if name not in ("demo", "finetune"):
        assert is_large(recipe) and all(line.origin for line in estimate_data(recipe))


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - NOT_THE_PAPERS))
def test_every_paper_recipe_fits_whole_on_the_papers_gpus(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.published.gpus is not None
    machines = Machines.parse_spec(recipe.published.gpus)
    for number, train in enumerate(recipe.train):
        shown = figures(recipe, recipe.published.gpus, number)
        assert ", whole" in shown["batch"]
        assert "GPU-hours" in shown["time"]
        settings = json.loads(engine_settings(recipe, train, machines) or "")
        assert settings["train_batch_size"] == train.global_batch
        assert settings["train_micro_batch_size_per_gpu"] * machines.count == train.global_batch


@pytest.mark.parametrize("name", ["eva02-clip-b-16", "eva02-clip-l-14-plus"])
def test_fewer_gpus_take_smaller_parts_for_longer_and_never_another_batch(name: str) -> None:
    recipe = load_recipe(name)
    few, many = (figures(recipe, f"{count}xH100-80GB") for count in (8, 64))
    assert few["steps"] == many["steps"]
    for count in (1, 8, 64):
        machines = Machines(count, "H100", 80)
        model = recipe.initialise.load_architecture().at_image_px(recipe.train[0].image_px)
        cut = cut_share(model, recipe.train[0], machines)
        assert cut.fits
        assert cut.parts * cut.micro_batch * count == recipe.train[0].global_batch
        assert cut.parts > 1 or count == 64


def test_one_gpu_can_train_a_batch_of_131072() -> None:
    shown = figures(load_recipe("eva02-clip-b-16"), "1xH100-80GB@2")
    assert "EVACLIP_MICRO_BATCH=" in shown["batch"]
    assert "2 a GPU-hour" in shown["price"]


def test_what_does_not_fit_is_said_with_what_is_too_much_and_what_is_less() -> None:
    shown = figures(load_recipe("eva02-clip-e-14-plus"), "8xA100-40GB")
    assert "GiB" in shown["does not fit"]
    assert "zero_stage=2 (" in shown["does not fit"] and "which fits" in shown["does not fit"]
    assert "MICRO_BATCH" not in shown["batch"]
    assert "time" not in shown


@pytest.mark.parametrize(
    ("name", "machines", "batch"),
    [
        ("eva02-clip-e-14-plus", "256xA100-80GB", "144,000 = 128 x 562 + 128 x 563"),
        ("eva02-clip-e-14-plus", "144xA100-80GB", "144,000 = 144 x 1,000"),
        ("eva02-clip-b-16", "48xA100-40GB", "131,072 = 16 x 2,730 + 32 x 2,731"),
        ("eva02-clip-b-16", "512xH200-139GB", "131,072 = 512 x 256"),
    ],
)
def test_any_number_of_gpus_shares_a_batch_and_is_fed(name: str, machines: str, batch: str) -> None:
    recipe = load_recipe(name)
    shown = figures(recipe, machines)
    assert shown["batch"].startswith(batch)
    rate = float(re.sub(r"[^\d]", "", shown["rate"].split(" ")[0]))
    processes = int(shown["reading processes"].split(" ")[0])
    assert processes * READ_PER_PROCESS_S >= rate
    settings = json.loads(engine_settings(recipe, recipe.train[0], Machines.parse_spec(machines)))
    count = Machines.parse_spec(machines).count
    assert settings["train_batch_size"] == settings["train_micro_batch_size_per_gpu"] * count


def test_data_stages_are_planned_by_their_laws_on_any_machines() -> None:
    recipe = load_recipe("eva02-clip-e-14-plus")
    one, many = (
        {row[0]: row[1:] for row in zip(*(column.cells for column in table.columns), strict=True)}
        for table in (data_table(recipe, Workers.parse_spec(spec)) for spec in ("1x64", "50x64@2"))
    )
    hours = {
        stage: (float(one[stage][1]), float(many[stage][1])) for stage in one if stage != "all"
    }
    for stage in ("download", "verify"):
        assert hours[stage][0] == pytest.approx(50 * hours[stage][1], rel=0.01)
    assert hours["index"][0] == hours["index"][1], "one machine writes it"
    assert one["download"][2] == "" and float(many["download"][2]) > 0
    assert hours["join"] == (0, 0) and float(one["join"][3]) > 0, "only a retraining joins"
    assert float(one["all"][3]) < float(one["all"][1].replace(",", "")) / 4
    for wrong in ("64", "0x64", "2x", "2x64@"):
        with pytest.raises(InputError, match=f"'{wrong}' names no machines"):
            Workers.parse_spec(wrong)


def test_memory_of_near_duplicates_is_said_where_they_are_looked_for() -> None:
    what = "near duplicates, memory"
    for rule, said in ("keep", None), ("drop", "99.9 GB, on one core"):
        recipe = load_recipe("eva02-clip-b-16", [f"dataset.near_duplicates={rule}"])
        assert {line.what: line.figure for line in estimate_data(recipe)}.get(what) == said


def test_a_retrainings_hours_are_those_of_its_own_samples() -> None:
    recipe = load_recipe("eva02-clip-b-16", ["retrain.samples_seen=1310720000"])
    lines = training_table(recipe, Machines.parse_spec("64xA100-40GB@2"), None)
    rows = dict(zip(lines.columns[0].cells, lines.columns[1].cells, strict=True))
    (figure,) = (rows[name] for name in rows if str(name).startswith("a retraining's"))
    assert re.search(r"[\d.]+ h, [\d,]+ GPU-hours, price [\d,]+", str(figure))


def test_more_gpus_than_pairs_are_refused() -> None:
    recipe = load_recipe("eva02-clip-b-16")
    assert list(figures(recipe, "131073xA100-40GB")) == ["ranks"]
    spec = Machines.parse_spec("131073xA100-40GB")
    assert engine_settings(recipe, recipe.train[0], spec) is None


def test_time_follows_from_flops_and_the_share_of_the_peak() -> None:
    """The paper's minutes, but 20 tokens of a caption instead of 77."""
    recipe = load_recipe("eva01-clip-b-16")
    shown = figures(recipe, "16xA100-40GB")
    assert shown["the paper's"].startswith("2.9 days, 1,100 GPU-hours")
    assert shown["time"].startswith("2.3 days")
    twice = 2 * TABLE_6_SHARE["half of the patches masked"]
    assert figures(recipe, "16xA100-40GB", utilisation=twice)["time"].startswith("1.2 days")


def test_the_share_of_the_peak_is_that_of_the_papers_minutes() -> None:
    model, peak = ModelConfig.load("EVA01-CLIP-B-16"), peak_flops("A100")
    assert peak is not None
    tokens = model.text.context_length
    for masked, minutes, share in zip((0.0, 0.5), (76, 55), TABLE_6_SHARE.values(), strict=True):
        flops = train_flops_per_sample(model, patch_dropout=masked, text_tokens=tokens)
        spent = flops * (1 + RECOMPUTED["full"] / 3)
        assert share == pytest.approx(40e6 / (minutes * 60) / 16 * spent / peak, abs=5e-5)


def test_no_time_is_made_up_for_fp32_of_which_no_rate_is_known() -> None:
    shown = figures(load_recipe("demo"), "1xH100-80GB")
    assert shown["time"].startswith("not estimated")


def test_gpus_are_read_as_a_person_writes_them() -> None:
    assert Machines.parse_spec("16xA100-40GB@2.5") == Machines(16, "A100", 40, 2.5)
    assert Machines.parse_spec("8xH100 PCIe-80GB") == Machines(8, "H100 PCIe", 80)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("A100", "names no GPUs: write COUNTxGPU-MEMORYGB"),
        ("0xA100-40GB", "names no GPUs"),
        ("4xA100-40GB@", "names no GPUs"),
        ("4xV100-32GB", "'V100' has no known peak rate; there are: A100"),
    ],
)
def test_other_words_for_gpus_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Machines.parse_spec(text)


def test_a_plan_is_printed_where_nothing_is_there_and_a_run_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVACLIP_ROOT", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "eva02-clip-b-16", "--gpus", "8xH100-80GB@2.5"]) == 0
    shown = capsys.readouterr().out
    assert "not here: initialise.vision: weights/EVA02_B_psz14to16.pt does not exist" in shown
    assert "819,000,000 samples" in shown
    assert "training on 8 x H100 80 GB" in shown
    assert "published: 74.7 % top-1 on ImageNet-1K, zero-shot" in shown
    assert '"train_batch_size": 131072' in shown
    assert main(["run", "pipeline", "eva02-clip-b-16"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: merge.sources 'laion2b': no file matches")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_share_of_the_peak_is_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "eva02-clip-b-16", "--utilisation", "40"]) == 2
    assert "expected a share above 0, at most 1" in capsys.readouterr().err
