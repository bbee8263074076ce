"""Mistakes a user can make: one sentence that says what to do, status 2, and nothing half-made."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.__main__ import main
from flows.commands.run import temporary_server
from tests.flows.command import CHECKOUT, Demo, environment, run, small_demo

ROWS = {"URL": ["http://127.0.0.1/a.png"], "TEXT": ["a red apple"]}
Command = Callable[..., str]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process's `main` would put artifacts."""
    for name in [name for name in os.environ if name.startswith(("EVACLIP_", "MLFLOW_TRACK"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EVACLIP_ROOT", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def refused(root: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command that must be refused; returns its one sentence."""

    def command(*arguments: str) -> str:
        status = main(arguments)
        return the_sentence(status, capsys.readouterr().err)

    return command


def the_sentence(status: int, errors: str) -> str:
    """What follows `error: ` on the only line of `errors`."""
    assert status == 2, errors
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def artifacts(root: Path) -> list[Path]:
    """Everything under `root` that a later run might take for work done."""
    manifests = list(root.glob("*/*/manifest.json"))
    return manifests or [path for path in root.glob("merge/*/*") if path.name != ".lock"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run pipelin demo", "unknown flow 'pipelin'; there are: pipeline, prepare, train, evalu"),
        ("run pipeline dmeo", "unknown recipe 'dmeo'; did you mean 'demo'?"),
        ("show nothing-like-it", "unknown recipe 'nothing-like-it'; there are: .*demo"),
        ("plan nowhere.toml", "there is no recipe file nowhere.toml"),
        ("run train demo -s train.stage1.lr_visoin=1", "'train.0.lr_visoin'; did you mean 'lr_vi"),
        ("run pipeline demo -s mrege.seed=1", "unknown key 'mrege'; did you mean 'merge'?"),
        ("run pipeline demo -s train.stage1.global_batch=big", "global_batch.* integer.*got 'big'"),
        ("run pipeline demo -s demo.port=80", "'demo.port' should be .* 1024, got 80"),
        ("run pipeline demo -s train.stage3.seed=1", "'stage3' .*there are: stage1, stage2"),
        ("run pipeline demo -s seed", "--set seed: expected table.key=value"),
        ("run pipeline demo -s merge.sources.laion2b.files=/no/*.parquet", "no file matches '/no/"),
        (
            "run pipeline demo -s evaluate.sets.emoji-twemoji.folder=/no/set",
            "no file matches '/no/set'",
        ),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_made(
    refused: Command, root: Path, arguments: str, sentence: str
) -> None:
    assert re.search(sentence, refused(*arguments.split()))
    assert not root.exists()


def test_a_recipe_that_is_no_toml_is_named_with_the_place(refused: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text("name = 'own'\n[merge\n")
    assert re.search(r"own.toml is not valid TOML: .*line 2", refused("plan", str(recipe)))
    recipe.write_text("a = " + "[" * 5_000)
    assert re.search(r"own.toml is not valid TOML: .*recursion", refused("plan", str(recipe)))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("EVACLIP_RANKS", "many", "setting EVACLIP_RANKS should be .* integer.*got 'many'"),
        (
            "EVACLIP_DOWNLOAD_THREADS",
            "0",
            "setting EVACLIP_DOWNLOAD_THREADS should be greater than 0",
        ),
        ("EVACLIP_ROOT", __file__, "cannot be made .*: set EVACLIP_ROOT to another one"),
        ("EVACLIP_ROOT", f"{__file__}/runs", "cannot be made .*: set EVACLIP_ROOT to another one"),
        ("EVACLIP_TRACKING_URI", "ftp://mlflow", "'ftp://mlflow' is not a tracking address: give"),
    ],
)
def test_a_wrong_setting_of_the_machine_is_named(
    refused: Command,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    sentence: str,
) -> None:
    monkeypatch.setenv(name, value)
    assert re.search(sentence, refused("run", "pipeline", "demo"))
    assert not artifacts(root)


def test_a_disk_that_cannot_hold_the_run_is_refused_with_both_figures(
    refused: Command, root: Path
) -> None:
    sentence = refused(
        "run", "pipeline", "demo", "-s", "merge.sources.laion2b.target_count=1" + "0" * 15
    )
    assert re.search(
        r"GB free and this run needs about [\d.]+ GB: free some, or set EVACLIP_ROOT", sentence
    )
    assert not artifacts(root)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("evaclip-dmeo@champion", "no model 'evaclip-dmeo' is registered; there are: evaclip-demo"),
        (
            "evaclip-demo@best",
            "'evaclip-demo@best' is not a version; there are: .*evaclip-demo@champ",
        ),
        ("evaclip-demo/9", "'evaclip-demo/9' is not a version; .*evaclip-demo/1"),
        (
            "evaclip-demo",
            "'evaclip-demo' lacks an alias or a version; there are: .*evaclip-demo@champ",
        ),
    ],
)
def test_a_pull_of_what_is_not_registered_says_what_is(
    finished: Demo,
    refused: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
    sentence: str,
) -> None:
    monkeypatch.setenv("EVACLIP_ROOT", str(finished.root))
    folder = tmp_path / "deep" / "model"
    assert re.search(sentence, refused("pull", model, str(folder)))
    assert not folder.exists()


def test_a_pull_leaves_a_folder_of_other_things_as_it_is(
    finished: Demo, refused: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EVACLIP_ROOT", str(finished.root))
    (tmp_path / "mine.txt").write_text("keep")
    sentence = refused("pull", "evaclip-demo@champion", str(tmp_path))
    assert sentence == f"{tmp_path} holds other things: give a new or an empty folder"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_pull_where_nothing_was_ever_registered_makes_no_registry(
    refused: Command, root: Path, tmp_path: Path
) -> None:
    sentence = refused("pull", "evaclip-demo@champion", str(tmp_path / "model"))
    assert "there is no registry at" in sentence
    assert not root.exists()


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Settings that lead to one Prefect server; starting one for each command takes longer."""
    home = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as settings:
        for name in os.environ:
            if name.startswith("PREFECT_"):
                settings.delenv(name)
        with temporary_server(home):
            names = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")
            yield {name: os.environ[name] for name in names}


@pytest.fixture(scope="module")
def started_root(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A root in which the failing flows share the tracking database."""
    return small_demo(tmp_path_factory.mktemp("started") / "runs")


def column_missing(path: Path) -> str:
    pq.write_table(pa.table({"URL": ROWS["URL"], "TXT": ROWS["TEXT"]}), path)
    return "no column 'TEXT' for its caption; did you mean 'TXT'"


def without_rows(path: Path) -> str:
    pq.write_table(pa.table(ROWS).slice(0, 0), path)
    return "source 'laion2b' is empty"


def unreadable(path: Path) -> str:
    path.write_bytes(b"<html>not found</html>" * 100)
    return "cannot be read as parquet"


@pytest.mark.parametrize("write", [column_missing, without_rows, unreadable])
def test_metadata_that_cannot_be_merged_end_the_flow_with_their_sentence(
    prefect_api: dict[str, str], started_root: Demo, tmp_path: Path, write: Callable[[Path], str]
) -> None:
    own = tmp_path / "own.parquet"
    expected = write(own)
    arguments = started_root.arguments(
        "run", "prepare", also=[f"merge.sources.laion2b.files={own}"]
    )
    ended = run(arguments, started_root.root, **prefect_api)
    sentence = the_sentence(ended.status, ended.errors)
    assert str(own) in sentence
    assert expected in sentence
    assert not list(started_root.root.glob("merge/*/manifest.json"))
    assert not list(started_root.root.glob("merge/*/*.parquet"))
    assert not list(started_root.root.glob("merge/*/*/*.parquet"))


def test_a_demo_port_in_use_is_named_and_nothing_is_downloaded(
    prefect_api: dict[str, str], started_root: Demo
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        arguments = started_root.arguments("run", "prepare", also=[f"demo.port={port}"])
        ended = run(arguments, started_root.root, **prefect_api)
    sentence = the_sentence(ended.status, ended.errors)
    assert re.search(rf"port {port} is in use: .*--set demo.port=NUMBER", sentence)
    assert not (started_root.root / "download").exists()


ON_A_SMALL_DISK = """
    mount -t tmpfs -o size=$1m tmpfs "$2" && cp -r "$3" "$2"/runs || exit 99
    shift 3
    "$@"
    status=$?
    find "$EVACLIP_ROOT" -name '*.safetensors*' -o -name manifest.json -path '*/train/*'
    exit $status
"""
"""Arguments: size in MiB, where to mount, what to copy into `runs`, the command."""


def test_a_disk_that_fills_up_during_training_is_one_sentence_and_leaves_no_half_file(
    prefect_api: dict[str, str], finished: Demo, tmp_path: Path
) -> None:
    disk, there = tmp_path / "disk", tmp_path / "there"
    disk.mkdir()
    for stage in ("demo", "merge", "download", "verify", "dataset", "initialise"):
        shutil.copytree(finished.root / stage, there / stage)
    used = sum(file.stat().st_size for file in there.rglob("*") if file.is_file())
    # 180 MiB are enough by the plan's estimate, and too few for two checkpoints
    arguments = finished.arguments(
        "run", "pipeline", also=["train.stage1.checkpoint_every_steps=1"]
    )
    command = [sys.executable, "-m", "flows", *arguments]
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh"]
    try:
        ended = subprocess.run(
            [*shell, str(used // 2**20 + 180), disk, there, *command],
            cwd=CHECKOUT,
            env=environment(disk / "runs", **prefect_api),
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if ended.returncode == 99 or "unshare" in ended.stderr:
        pytest.skip("this system lets no ordinary user mount a small disk")
    sentence = the_sentence(ended.returncode, ended.stderr)
    assert re.fullmatch(
        r"training stage 'stage1': the disk is full at .*: free some space and run the same "
        r"command again; .* is kept",
        sentence,
    )
    assert "/initialise/" in ended.stdout
    written = [line for line in ended.stdout.splitlines() if "/train/" in line]
    assert written and all("/checkpoints/step-00000001/" in line for line in written)
