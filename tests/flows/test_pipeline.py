"""What one `python -m flows run pipeline demo` leaves, and what the next commands make of it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from evaclip_model.model.model_config import ModelConfig
from evaclip_model.reading.samples import SHARDS, ShardManifest
from flows.config.recipe import Recipe
from tasks.artifacts.artifact import MANIFEST, Artifact, read_artifact, read_bulk, sha256_of
from tasks.demo.demo import read_drawings
from tests.flows.command import Demo, Ended, environment, run

STAGES = (
    *("demo", "merge", "download", "verify", "dataset"),
    *("initialise", "train", "evaluate", "register"),
)
TITLES = (*STAGES[:6], "train stage1", "train stage2", *STAGES[7:])
STEPS = {"stage1": 10, "stage2": 5}
GLOBAL_BATCH = 64
RED_APPLE = "1f34e"


@pytest.fixture(scope="module")
def artifacts(finished: Demo) -> dict[str, Artifact]:
    """Title -> finished artifact."""
    found = [read_artifact(file.parent) for file in finished.root.glob(f"*/*/{MANIFEST}")]
    return {
        f"train {artifact.config['name']}" if artifact.kind == "train" else artifact.kind: artifact
        for artifact in found
    }


@pytest.fixture(scope="module")
def store(finished: Demo) -> MlflowClient:
    return MlflowClient(f"sqlite:///{finished.root}/mlflow.db")


@pytest.fixture(scope="module")
def pipeline_run(store: MlflowClient) -> Run:
    """The one run without a parent."""
    (top,) = [one for one in all_runs(store) if "mlflow.parentRunId" not in one.data.tags]
    return top


@pytest.fixture(scope="module")
def stage_runs(store: MlflowClient, pipeline_run: Run) -> dict[str, Run]:
    """Title -> run under the pipeline's."""
    runs = all_runs(store)
    return {
        one.info.run_name: one
        for one in runs
        if one.data.tags.get("mlflow.parentRunId") == pipeline_run.info.run_id
    }


def all_runs(store: MlflowClient) -> list[Run]:
    experiment = store.get_experiment_by_name("demo")
    return list(store.search_runs([experiment.experiment_id]))


def test_every_stage_leaves_one_finished_artifact(
    first_run: Ended, finished: Demo, artifacts: dict[str, Artifact]
) -> None:
    assert sorted(artifacts) == sorted(TITLES)
    assert len(list(finished.root.glob(f"*/*/{MANIFEST}"))) == len(TITLES)
    for title, artifact in artifacts.items():
        assert re.search(rf"✓ {title} .* {artifact.digest[:8]} ", first_run.output)
    assert first_run.errors == ""


def test_every_parent_is_a_finished_artifact_and_the_chain_is_the_pipelines(
    artifacts: dict[str, Artifact],
) -> None:
    titles = {artifact.digest: title for title, artifact in artifacts.items()}
    parents = {
        title: {role: titles.get(digest) for role, digest in artifact.parents.items()}
        for title, artifact in artifacts.items()
    }
    tracking = parents["register"].pop("tracking")
    assert tracking is None, "the address of the registry, which is no artifact"
    assert parents == {
        "demo": {},
        "merge": {"laion2b": "demo", "coyo700m": "demo"},
        "download": {"merge": "merge"},
        "verify": {"download": "download"},
        "dataset": {"verify": "verify"},
        "initialise": {},
        "train stage1": {"start_from": "initialise", "dataset": "dataset"},
        "train stage2": {"start_from": "train stage1", "dataset": "dataset"},
        "evaluate": {
            "train": "train stage2",
            "initialise": "initialise",
            "emoji-twemoji": "demo",
            "emoji-twemoji-retrieval": "demo",
        },
        "register": {"train": "train stage2", "evaluate": "evaluate"},
    }


def test_every_file_is_as_its_manifest_says(artifacts: dict[str, Artifact]) -> None:
    for artifact in artifacts.values():
        assert artifact.files
        for name, expected in artifact.files.items():
            path = artifact.folder / name
            assert {"size": path.stat().st_size, "sha256": sha256_of(path)} == expected, path
    bulk = read_bulk(artifacts["download"].folder)
    assert bulk == {path: path.stat().st_size for path in bulk}
    tars = {path for path in bulk if path.suffix == ".tar"}
    assert tars == set(artifacts["download"].folder.glob("**/shards/*.tar"))


def test_the_merge_accounts_for_every_row(artifacts: dict[str, Artifact]) -> None:
    merge, demo = artifacts["merge"], artifacts["demo"]
    report = json.loads((merge.folder / "report.json").read_text())
    for part in (report["total"], *report["sources"]):
        assert part["rows_read"] == part["selected"] + sum(part["dropped"].values())
    for source in report["sources"]:
        name = source["name"]
        assert source["rows_read"] == demo.counts[f"{name}.rows"]
        files = sorted((merge.folder / name).glob("*.parquet"))
        assert sum(pq.read_metadata(file).num_rows for file in files) == source["selected"]
    assert {s["name"]: s["selected"] for s in report["sources"]} == {
        "laion2b": 400,
        "coyo700m": 200,
    }
    dropped = report["total"]["dropped"]
    assert min(dropped["duplicate_in_source"], dropped["duplicate_across_sources"]) > 0


def test_the_download_accounts_for_every_row_and_met_the_webs_faults(
    artifacts: dict[str, Artifact],
) -> None:
    counts = artifacts["download"].counts
    failed = {name: n for name, n in counts.items() if name.startswith("failed.")}
    assert counts["rows"] == artifacts["merge"].counts["selected"]
    assert counts["samples"] + sum(failed.values()) == counts["rows"]
    assert "failed.not_found" in failed
    assert len(failed) >= 3, "which rows are drawn depends on the port, so which faults does too"


def test_the_shard_manifest_lists_every_shard_as_it_is(artifacts: dict[str, Artifact]) -> None:
    manifest = ShardManifest.read(artifacts["dataset"].folder / SHARDS)
    assert sum(s.samples for s in manifest.shards) == artifacts["download"].counts["samples"]
    assert set(manifest.by_source()) == {"laion2b", "coyo700m"}
    for shard in manifest.shards:
        path = artifacts["dataset"].folder / shard.path
        assert (path.stat().st_size, sha256_of(path)) == (shard.bytes, shard.sha256)
        with tarfile.open(path) as tar:
            about = [
                json.load(tar.extractfile(member))  # type: ignore[arg-type]
                for member in tar
                if member.name.endswith(".json")
            ]
        assert [one["source"] for one in about] == [shard.source] * shard.samples


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_training_writes_a_line_for_every_step(artifacts: dict[str, Artifact], stage: str) -> None:
    trained = artifacts[f"train {stage}"]
    lines = [json.loads(s) for s in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS[stage] + 1))
    assert [line["samples"] for line in lines] == [GLOBAL_BATCH * line["step"] for line in lines]
    assert lines[0]["loss"] == pytest.approx(math.log(GLOBAL_BATCH), abs=1.0)
    result = json.loads((trained.folder / "result.json").read_text())
    mean = sum(line["loss"] for line in lines) / len(lines)
    assert result["final_loss"] == pytest.approx(mean)
    assert trained.counts["final_loss"] == result["final_loss"]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_training_draws_the_sources_four_to_one(artifacts: dict[str, Artifact], stage: str) -> None:
    counts = artifacts[f"train {stage}"].counts
    assert counts["laion2b.samples"] == 4 * counts["coyo700m.samples"]
    assert counts["laion2b.samples"] + counts["coyo700m.samples"] == counts["samples_seen"]


def test_training_changes_the_weights_and_stage_2_the_resolution(
    artifacts: dict[str, Artifact],
) -> None:
    folders = [
        artifacts[t].folder / "model" for t in ("initialise", "train stage1", "train stage2")
    ]
    weights = {sha256_of(folder / "model.safetensors") for folder in folders}
    assert len(weights) == 3
    sides = [ModelConfig.load(folder / "config.json").vision.image_px for folder in folders]
    asked = [artifacts[title].config["image_px"] for title in TITLES if "train" in title]
    assert sides[1:] == asked
    assert sides[0] == sides[1] < sides[2]


def test_figures_stand_beside_chance_and_the_untrained_model_and_are_printed(
    first_run: Ended, artifacts: dict[str, Artifact]
) -> None:
    results = json.loads((artifacts["evaluate"].folder / "results.json").read_text())
    assert set(results["results"]) == {"emoji-twemoji", "emoji-twemoji-retrieval"}
    assert {"top1", "top5"} <= set(results["chance"]["emoji-twemoji"])
    for name, chances in results["chance"].items():
        models = results["results"][name]
        for metric, chance in chances.items():
            shares = [models["trained"][metric], models["untrained"][metric], chance]
            assert all(0 <= share <= 1 for share in shares)
            row = r"\s+".join([name, metric, *(f"{100 * share:.2f} %" for share in shares)])
            assert re.search(row, first_run.output)


def test_the_registered_model_scores_the_same_outside_its_recipe(
    finished: Demo, artifacts: dict[str, Artifact]
) -> None:
    sets = [part for override in finished.overrides for part in ("--set", override)]
    uri = "models:/evaclip-demo@champion"
    ended = run(["score", f"mine={uri}", "--recipe", "demo", *sets], finished.root)
    assert ended.status == 0, ended.errors
    found = [json.loads(path.read_text()) for path in finished.root.glob("evaluate/*/results.json")]
    (scored,) = [one for one in found if "mine" in one["models"]]
    results = json.loads((artifacts["evaluate"].folder / "results.json").read_text())
    for name, by_model in results["results"].items():
        assert scored["results"][name]["mine"] == by_model["trained"]


def test_the_report_shows_pictures_curves_and_figures_and_needs_no_other_file(
    artifacts: dict[str, Artifact],
) -> None:
    page = (artifacts["evaluate"].folder / "report.html").read_text()
    for word in ("emoji-twemoji", "emoji-twemoji-retrieval", "chance", "untrained", *STEPS):
        assert word in page
    assert page.count("<svg") >= 2
    assert page.count("data:image/") >= 20
    assert not re.search(r'(src|href)="(https?:|/|file:)', page)


def test_the_registration_says_where_the_model_is(
    finished: Demo, artifacts: dict[str, Artifact]
) -> None:
    registered = json.loads((artifacts["register"].folder / "registered.json").read_text())
    assert registered == {
        "name": "evaclip-demo",
        "version": 1,
        "alias": "challenger",
        "uri": "models:/evaclip-demo/1",
        "tracking_uri": f"sqlite:///{finished.root}/mlflow.db",
    }


def test_tracking_has_one_finished_run_a_stage_under_the_pipelines(
    pipeline_run: Run, stage_runs: dict[str, Run], artifacts: dict[str, Artifact]
) -> None:
    assert sorted(stage_runs) == sorted(TITLES)
    for title, one in stage_runs.items():
        assert one.info.status == "FINISHED"
        assert one.data.tags["evaclip.digest"] == artifacts[title].digest
        assert one.data.tags["evaclip.reused"] == "false"
    assert pipeline_run.info.status == "FINISHED"
    assert pipeline_run.data.params["recipe"] == "demo"


def test_tracking_has_every_stages_settings_and_counts(
    stage_runs: dict[str, Run], artifacts: dict[str, Artifact]
) -> None:
    for title, one in stage_runs.items():
        assert one.data.params, title
        assert one.data.metrics.items() >= artifacts[title].counts.items()
    assert stage_runs["train stage1"].data.params["patch_dropout"] == "0.5"
    assert stage_runs["train stage2"].data.params["patch_dropout"] == "0.0"
    assert stage_runs["merge"].data.params["sources.laion2b.target_count"] == "400"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_tracking_has_the_loss_of_every_step_and_the_machines_use(
    store: MlflowClient, stage_runs: dict[str, Run], artifacts: dict[str, Artifact], stage: str
) -> None:
    one, trained = stage_runs[f"train {stage}"], artifacts[f"train {stage}"]
    tracked = {p.step: p.value for p in store.get_metric_history(one.info.run_id, "loss")}
    lines = [json.loads(s) for s in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert tracked == {line["step"]: line["loss"] for line in lines}
    assert "system/cpu_utilization_percentage" in one.data.metrics


def test_tracking_names_the_data_by_their_digests(
    stage_runs: dict[str, Run], artifacts: dict[str, Artifact]
) -> None:
    for stage in ("train stage1", "train stage2"):
        (data,) = stage_runs[stage].inputs.dataset_inputs
        assert data.dataset.digest == artifacts["dataset"].digest
        card = json.loads(data.dataset.source)["card"]
        assert Path(card.removeprefix("file://")).read_text().startswith("# Dataset ")
        assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training")]


def test_every_evaluation_set_is_a_dataset_of_the_evaluations_run(
    stage_runs: dict[str, Run], artifacts: dict[str, Artifact]
) -> None:
    results = json.loads((artifacts["evaluate"].folder / "results.json").read_text())
    read = {one.dataset.name: one.dataset for one in stage_runs["evaluate"].inputs.dataset_inputs}
    for name, about in results["sets"].items():
        assert read[name].digest == about["fingerprint"]
        assert json.loads(read[name].profile)["n"] == about["n"]


def test_tracking_keeps_the_recipe_the_report_and_the_curves(
    store: MlflowClient, pipeline_run: Run, stage_runs: dict[str, Run]
) -> None:
    def kept(one: Run) -> set[str]:
        return {file.path for file in store.list_artifacts(one.info.run_id)}

    assert kept(pipeline_run) == {"recipe.json", "lineage.svg"}
    reports = {"report.html", "report.md", "results.json", "figures.csv"}
    assert kept(stage_runs["evaluate"]) == reports
    assert kept(stage_runs["train stage2"]) >= {"metrics.jsonl", "result.json"}
    assert kept(stage_runs["register"]) == {"decision.json", "decision.md"}


def test_the_champion_is_the_trained_model_and_names_what_it_was_made_from(
    store: MlflowClient, pipeline_run: Run, artifacts: dict[str, Artifact]
) -> None:
    champion = store.get_model_version_by_alias("evaclip-demo", "champion")
    weights = artifacts["train stage2"].folder / "model" / "model.safetensors"
    assert champion.version in (1, "1")
    assert champion.run_id == pipeline_run.info.run_id
    assert champion.tags["evaclip.weights_sha256"] == sha256_of(weights)
    named = set(champion.tags.values())
    assert {one.digest for title, one in artifacts.items() if title != "register"} <= named


def test_the_gate_promoted_the_first_model_and_said_why(
    first_run: Ended, finished: Demo, artifacts: dict[str, Artifact], store: MlflowClient
) -> None:
    decision = json.loads((artifacts["register"].folder / "decision.json").read_text())
    assert (decision["outcome"], decision["champion"]) == ("promote", None)
    assert "gate      PROMOTE: no champion yet" in first_run.output
    aliases = store.get_registered_model("evaclip-demo").aliases
    assert {alias: int(version) for alias, version in aliases.items()} == {
        "champion": 1,
        "challenger": 1,
    }


def test_the_same_command_again_prints_the_figures_without_starting_anything(
    finished: Demo, first_run: Ended, store: MlflowClient
) -> None:
    before = {file: file.read_bytes() for file in finished.root.glob(f"*/*/{MANIFEST}")}
    runs = len(all_runs(store))
    servers_home = finished.root / "prefect"
    servers_home.rename(finished.root / "prefect-of-the-first-run")
    again = run(finished.arguments("run", "pipeline"), finished.root)
    assert (again.status, again.errors) == (0, "")
    assert again.output.startswith("demo: everything is there, nothing to do")
    assert again.output.split("\n\n")[1:] == first_run.output.rsplit("\n\n", 2)[1:]
    assert not servers_home.exists()
    assert again.seconds < 30
    assert {file: file.read_bytes() for file in finished.root.glob(f"*/*/{MANIFEST}")} == before
    assert len(all_runs(store)) == runs


def planned(demo: Demo, *overrides: str) -> dict[str, str]:
    """Title -> state, as `plan` prints them."""
    ended = run(demo.arguments("plan", also=overrides), demo.root)
    assert (ended.status, ended.errors) == (0, "")
    states = "there|unfinished|to make"
    return {
        title: match[1]
        for title in TITLES
        if (match := re.search(rf"^{title} +({states}) ", ended.output, re.MULTILINE))
    }


def test_a_plan_says_that_all_is_there(finished: Demo) -> None:
    assert planned(finished) == dict.fromkeys(TITLES, "there")


def test_a_changed_second_training_stage_plans_that_and_what_follows(finished: Demo) -> None:
    made = dict.fromkeys(TITLES[:-3], "there")
    to_make = dict.fromkeys(TITLES[-3:], "to make")
    assert planned(finished, "train.stage2.lr_vision=1e-4") == made | to_make


LOADED_ELSEWHERE = """
    import importlib.util, json, sys
    from pathlib import Path
    for name in ("flows", "tasks", "evaclip_model"):
        assert importlib.util.find_spec(name) is None, f"{name} must not be importable"
    import mlflow, pandas
    uri, picture, *labels = sys.argv[1:]
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/evaclip-demo@champion")
    frame = pandas.DataFrame({"image": [Path(picture).read_bytes()]})
    (answer,) = model.predict(frame, params={"candidate_labels": labels}).to_dict("records")
    print(json.dumps(answer | {"package": sys.modules["evaclip_model"].__file__}))
"""
LABELS = ("a red apple", "a dog", "a sailing boat")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twemoji's red apple, a drawing the model never saw."""
    path = tmp_path_factory.mktemp("pictures") / "apple.webp"
    path.write_bytes(read_drawings("twemoji")[RED_APPLE])
    return path


def test_the_champion_gives_one_answer_where_this_project_is_not_and_from_a_pulled_folder(
    finished: Demo, picture: Path, tmp_path: Path
) -> None:
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    uri = f"sqlite:///{finished.root}/mlflow.db"
    # -S: without the .pth file of an editable install, only PYTHONPATH leads to packages
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(LOADED_ELSEWHERE), uri, picture, *LABELS],
        cwd=elsewhere,
        env=environment(finished.root, PYTHONPATH=packages, MLFLOW_DISABLE_TELEMETRY="true"),
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr
    answer = json.loads(loaded.stdout.splitlines()[-1])
    shares = dict(zip(LABELS, answer["probabilities"], strict=True))
    assert answer["package"].startswith(str(finished.root / "mlflow-artifacts"))
    assert answer["label"] == max(shares, key=shares.__getitem__)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)

    pulled = run(["pull", "evaclip-demo@champion", str(elsewhere / "model")], finished.root)
    assert pulled.status == 0, pulled.errors
    classified = subprocess.run(
        [
            Path(sys.executable).with_name("evaclip"),
            "classify",
            picture,
            *LABELS,
            "--model",
            "model",
        ],
        cwd=elsewhere,
        env=environment(tmp_path / "none"),
        capture_output=True,
        text=True,
    )
    assert classified.returncode == 0, classified.stderr
    printed = dict(re.findall(r"^ *([\d.]+)%  (.+)$", classified.stdout, re.MULTILINE))
    assert {label: float(share) for share, label in printed.items()} == {
        label: pytest.approx(100 * share, abs=0.06) for label, share in shares.items()
    }


def test_the_recipes_digest_is_the_runs(finished: Demo, pipeline_run: Run) -> None:
    shown = run(finished.arguments("show"), finished.root)
    assert shown.status == 0, shown.errors
    recipe = Recipe.from_mapping(json.loads(shown.output), where="what is shown")
    assert pipeline_run.data.tags["evaclip.recipe_digest"] == recipe.digest
