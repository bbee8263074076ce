"""Registering, loading elsewhere and pulling back, with a real model and a real registry."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from evaclip_model import InputError, create_model, open_model, save_model
from evaclip_model.config import Config
from tasks.artifacts.artifact import Address, Artifact, Made, Stage, produce_artifact
from tasks.register.config import REGISTERED, STAGE, RegisterConfig
from tasks.register.model_registry import forget_if_gone, pull_model, register_model
from tasks.register.promotion import promote_version
from tasks.tracking import TrackingStore

CONFIG = RegisterConfig(model_name="evaclip-test")
KNOWN = "evaclip-test@challenger, evaclip-test@champion; evaclip-test/1"


class Named(Config):
    name: str = "stage-1"
    seed: int = 0


def chain(root: Path, seed: int = 0) -> tuple[Artifact, Artifact]:
    """A trained model and its evaluation, both made from one verified artifact."""
    verified = produce_artifact(
        Address(root, Stage("verify", 1), {}, {"download": "d" * 16}), lambda out: Made({}, ())
    )

    def train(out: Path) -> Made:
        save_model(create_model("EVA02-CLIP-demo", seed=seed), out / "model")
        files = (out / "model" / "config.json", out / "model" / "model.safetensors")
        return Made({"steps": 1}, files)

    trained = produce_artifact(
        Address.of(root, Stage("train", 1), Named(seed=seed), {"verify": verified.digest}), train
    )
    evaluated = produce_artifact(
        Address(root, Stage("evaluate", 1), {}, {"train": trained.digest}),
        lambda out: Made({"emoji.top1": 0.0625}, ()),
    )
    return trained, evaluated


def registered(root: Path, store: TrackingStore, seed: int = 0) -> Artifact:
    trained, evaluated = chain(root, seed)
    address = Address.of(
        root, STAGE, CONFIG, {"train": trained.digest, "evaluate": evaluated.digest}
    )
    forget_if_gone(address, store)

    def make(out: Path) -> Made:
        made = register_model(CONFIG, trained, evaluated, store, root, out)
        promote_version(
            store, "evaclip-test", "champion", int(made.counts["version"]), "gate", "me", ""
        )
        return made

    return produce_artifact(address, make)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def store(root: Path) -> TrackingStore:
    """A registry that holds one version, which is the champion."""
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "evaclip")
    registered(root, store)
    return store


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "apple.png"
    Image.radial_gradient("L").convert("RGB").resize((40, 60)).save(path)
    return path


ELSEWHERE = """
    import importlib.util, json, sys
    assert importlib.util.find_spec("tasks") is None, "the project must not be importable"
    assert importlib.util.find_spec("evaclip_model") is None
    import mlflow, pandas
    from pathlib import Path
    uri, model, picture = sys.argv[1:]
    mlflow.set_tracking_uri(uri)
    loaded = mlflow.pyfunc.load_model(model)
    frame = pandas.DataFrame({"image": [Path(picture).read_bytes()]})
    answer = loaded.predict(frame, params={"candidate_labels": ["a red apple", "a dog"]})
    print(json.dumps(answer.to_dict("records")))
"""


def load_elsewhere(uri: str, model: str, picture: Path, folder: Path) -> dict[str, object]:
    """What a fresh process in `folder` answers, which cannot import this project."""
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "PYTHONPATH": packages,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": "1",
    }
    # -S: without it, site would follow the .pth file of an editable install to this project.
    command = [sys.executable, "-S", "-c", textwrap.dedent(ELSEWHERE), uri, model, str(picture)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout.splitlines()[-1])
    return dict(answer)


def test_the_champion_classifies_in_a_process_that_cannot_import_this_project(
    store: TrackingStore, picture: Path, tmp_path: Path
) -> None:
    answer = load_elsewhere(store.uri, "models:/evaclip-test@champion", picture, tmp_path)
    assert answer["label"] in ("a red apple", "a dog")
    assert sum(answer["probabilities"]) == pytest.approx(1)


def test_the_version_names_every_ancestor_and_its_figures(store: TrackingStore, root: Path) -> None:
    trained, evaluated = chain(root)
    tags = store.client().get_model_version_by_alias("evaclip-test", "champion").tags
    assert tags["evaclip.digest"] == tags["evaclip.digest.train.stage-1"] == trained.digest
    assert tags["evaclip.digest.verify"] == trained.parents["verify"]
    assert tags["evaclip.digest.verify.download"] == "d" * 16
    assert tags["evaclip.digest.evaluate"] == evaluated.digest
    assert tags["evaluation.emoji.top1"] == "0.0625"


def test_the_same_model_is_registered_once(store: TrackingStore, root: Path) -> None:
    first = registered(root, store)
    (first.folder / "manifest.json").unlink()
    again = registered(root, store)
    assert again.counts == first.counts
    assert len(store.client().search_model_versions("name = 'evaclip-test'")) == 1


def test_a_registration_killed_after_the_upload_uses_the_upload(tmp_path: Path) -> None:
    store = TrackingStore.at(f"sqlite:///{tmp_path}/mlflow.db", "evaclip")
    first = registered(tmp_path, store)
    (first.folder / "manifest.json").unlink()
    client = store.client()
    client.delete_model_version("evaclip-test", "1")
    registered(tmp_path, store)
    assert len(client.search_logged_models([store.experiment_id(client)])) == 1
    assert client.get_model_version_by_alias("evaclip-test", "champion").version == 2


def test_another_model_is_another_version_and_takes_the_alias(tmp_path: Path) -> None:
    store = TrackingStore.at(f"sqlite:///{tmp_path}/mlflow.db", "evaclip")
    registered(tmp_path, store, seed=0)
    artifact = registered(tmp_path, store, seed=1)
    assert json.loads((artifact.folder / REGISTERED).read_text())["version"] == 2
    assert store.client().get_model_version_by_alias("evaclip-test", "champion").version == 2
    registered(tmp_path, store, seed=0)
    assert store.client().get_model_version_by_alias("evaclip-test", "champion").version == 2


def test_a_registry_that_lost_the_version_gets_it_again(tmp_path: Path) -> None:
    first = TrackingStore.at(f"sqlite:///{tmp_path}/mlflow.db", "evaclip")
    registered(tmp_path, first)
    (tmp_path / "mlflow.db").rename(tmp_path / "lost.db")
    fresh = TrackingStore.at(f"sqlite:///{tmp_path}/fresh.db", "evaclip")
    registered(tmp_path, fresh)
    assert fresh.client().get_model_version_by_alias("evaclip-test", "champion").version == 1


def test_a_pulled_folder_opens_without_mlflow_and_a_second_pull_replaces_it(
    store: TrackingStore, root: Path, tmp_path: Path
) -> None:
    trained, _ = chain(root)
    folder = tmp_path / "new" / "model"
    for model in ("evaclip-test@champion", "models:/evaclip-test/1"):
        assert pull_model(store.uri, model, folder) == folder
    open_model(folder)
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (trained.folder / "model" / weights).read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("nothing@champion", "no model 'nothing' is registered; there are: evaclip-test"),
        ("evaclip-test@best", f"is not a version; there are: {KNOWN}"),
        ("evaclip-test/7", f"is not a version; there are: {KNOWN}"),
        ("evaclip-test", f"lacks an alias or a version; there are: {KNOWN}"),
    ],
)
def test_a_pull_of_what_is_not_there_says_what_is(
    store: TrackingStore, tmp_path: Path, model: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        pull_model(store.uri, model, tmp_path / "model")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_pull_leaves_a_folder_of_other_things_alone(store: TrackingStore, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds other things"):
        pull_model(store.uri, "evaclip-test@champion", tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_pull_from_no_registry_makes_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no registry at"):
        pull_model(f"sqlite:///{tmp_path}/mlflow.db", "evaclip-test@champion", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
