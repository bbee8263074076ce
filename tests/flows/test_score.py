"""`score`: what its arguments mean, and a whole run of it as a person starts it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from evaclip_model.create import create_model
from evaclip_model.errors import InputError
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.weights.load import save_model
from flows.graph.score_request import read_asked
from tests.flows.command import run

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two saved models, as training stages leave them."""
    folder = tmp_path_factory.mktemp("models")
    config = ModelConfig.load("EVA02-CLIP-demo").at_image_px(16)
    for seed, name in enumerate(("first", "second")):
        save_model(create_model(config, seed=seed), folder / name / "model")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that holds the set `squares`."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "squares" / "test").mkdir(parents=True)
    (folder / "squares" / "test" / "nshards.txt").write_text("1\n")
    (folder / "squares" / "classnames.txt").write_text("\n".join(COLOURS))
    (folder / "squares" / "zeroshot_classification_templates.txt").write_text("a {c} square\n")
    with tarfile.open(folder / "squares" / "test" / "0.tar", "w") as tar:
        for number in range(12):
            picture = io.BytesIO()
            Image.new("RGB", (20, 20), COLOURS[number % 3]).save(picture, "PNG")
            for name, content in (
                (f"s{number:07d}.png", picture.getvalue()),
                (f"s{number:07d}.cls", str(number % 3).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def asked(
    models: list[str],
    data: Path,
    recipe: str = "",
    sets: tuple[str, ...] = ("squares",),
    overrides: tuple[str, ...] = (),
):
    return read_asked(models, recipe, sets, str(data), overrides, data / "root")


def test_models_are_named_by_the_telling_part_of_what_opens_them(models: Path, data: Path):
    first = str(models / "first" / "model")
    weights = f"{models / 'second' / 'model' / 'model.safetensors'}:EVA02-CLIP-demo"
    specs = [first, f"mine={first}", weights, "models:/evaclip@champion", "open_clip:ViT-B-32/tag"]
    named = asked(specs, data).models
    assert list(named) == [
        *("first", "mine", "EVA02-CLIP-demo", "evaclip@champion", "ViT-B-32/tag")
    ]
    assert named["first"] == named["mine"] == first


@pytest.mark.parametrize(
    ("models_given", "recipe", "sets", "complaint"),
    [
        (["{first}"], "", (), "give a recipe, or the names of sets"),
        (["{first}"], "demo", ("squares",), "give a recipe, or the names of sets"),
        (["{first}"], "", ("circles",), "expected the folder"),
        (["{first}"], "", ("imagenet1k",), "wds_imagenet1k"),
        (["{first}", "{first}"], "", ("squares",), "two models are called 'first'"),
        (["{first}x"], "", ("squares",), "is not there"),
        (["{first}/model.safetensors"], "", ("squares",), "say its architecture too"),
    ],
)
def test_what_cannot_be_evaluated_is_explained(
    models_given, recipe, sets, complaint, models: Path, data: Path
):
    given = [one.replace("{first}", str(models / "first" / "model")) for one in models_given]
    with pytest.raises(InputError, match=complaint):
        asked(given, data, recipe, sets)


def test_settings_given_beside_sets_are_used_or_refused(models: Path, data: Path):
    first = [str(models / "first" / "model")]
    changes = (
        "evaluate.precision=bf16",
        "evaluate.title=Mine",
        "evaluate.sets.squares.crop_px=2",
        'evaluate.sets.squares.templates=["a {c}"]',
    )
    config = asked(first, data, overrides=changes).config
    assert (config.precision, config.title) == ("bf16", "Mine")
    assert (config.sets[0].crop_px, config.sets[0].templates) == (2, ("a {c}",))
    for change, complaint in (
        ("no.such=1", "there is only evaluate"),
        ("train.0.name=x", "there is only evaluate"),
        ("evaluate.precison=bf16", "did you mean 'precision'"),
        ("evaluate.sets.circles.crop_px=2", "no item 'circles' in this list, there are: squares"),
        ("evaluate.sets.squares.prompts=x", "unknown key"),
    ):
        with pytest.raises(InputError, match=complaint):
            asked(first, data, overrides=(change,))


def test_a_file_with_evaluate_alone_is_a_recipe(models: Path, data: Path, tmp_path: Path):
    first = [str(models / "first" / "model")]
    recipe = tmp_path / "my.toml"
    recipe.write_text(
        '[evaluate]\nprecision = "fp16"\n[[evaluate.sets]]\nname = "squares"\n'
        f'kind = "classification"\nfolder = "{data / "squares"}"\n'
    )
    found = asked(first, data, str(recipe), (), ("evaluate.sets.squares.crop_px=1",))
    assert (found.config.precision, found.config.sets[0].crop_px) == ("fp16", 1)
    assert found.sets == {"squares": data / "squares"}
    with pytest.raises(InputError, match="there is only evaluate"):
        asked(first, data, str(recipe), (), ("no.such=1",))


def test_a_set_is_a_path_or_has_a_folder_of_any_name(models: Path, data: Path):
    first = [str(models / "first" / "model")]
    path = str(data / "squares")
    assert asked(first, Path("nowhere"), sets=(path,)).sets == {"squares": data / "squares"}
    found = asked(first, data, sets=(f"mine={path}", f"cifar10={path}"))
    assert list(found.sets) == ["mine", "cifar10"]
    assert found.config.sets[1].templates == "dataset"
    with pytest.raises(InputError, match="a path, or NAME=FOLDER"):
        asked(first, data, sets=(str(data / "circles"),))


def test_a_set_in_a_folder_with_spaces_has_a_name_without(models: Path, data: Path, tmp_path: Path):
    shutil.copytree(data / "squares", tmp_path / "my set")
    found = asked([str(models / "first" / "model")], data, sets=(str(tmp_path / "my set"),))
    assert found.sets == {"my-set": tmp_path / "my set"}


def test_known_sets_are_found_under_every_published_name(models: Path, data: Path, tmp_path: Path):
    first = [str(models / "first" / "model")]
    places = {
        "cifar10": "wds_cifar10_test",
        "cifar100": "wds_vtab-cifar100_test",
        "pets": "wds_vtab-pets",
        "dtd": "dtd",
    }
    for name in places.values():
        shutil.copytree(data / "squares", tmp_path / name)
    found = asked(first, tmp_path, sets=tuple(places))
    assert found.sets == {key: tmp_path / name for key, name in places.items()}
    (tmp_path / "wds_kinetics400").symlink_to(tmp_path / "dtd")
    named = asked(first, tmp_path, sets=("wds_kinetics400", "wds_cifar10_test"))
    assert [one.name for one in named.config.sets] == ["kinetics400", "cifar10"]
    shutil.copytree(data / "squares", tmp_path / "cifar10")
    with pytest.raises(InputError, match=r"'cifar10' could be .*: name one, as cifar10="):
        asked(first, tmp_path, sets=("cifar10",))


def test_the_address_knows_weights_sets_and_which_model_is_the_subject(models: Path, data: Path):
    specs = [str(models / name / "model") for name in ("first", "second")]
    digests = set()
    for given in (specs, specs[::-1], specs[:1]):
        one = asked(given, data)
        digests.add(one.make_step(data / "root", one.models).digest)
        assert one.make_step(data / "root", one.models).digest in digests
    assert len(digests) == 3


def test_two_models_are_scored_by_a_command(models: Path, data: Path, tmp_path: Path):
    specs = [str(models / "first" / "model"), f"other={models / 'second' / 'model'}"]
    ended = run(["score", *specs, "--sets", "squares", "--data", str(data)], tmp_path)
    assert ended.status == 0, ended.errors
    assert "squares" in ended.output and "mean_per_class" in ended.output
    (results,) = tmp_path.glob("evaluate/*/results.json")
    found = json.loads(results.read_text())
    assert list(found["models"]) == ["first", "other"] and found["subject"] == "first"
    assert found["results"]["squares"]["other"]["n"] == 12
    assert "top1" in found["paired"]["squares"]["other"]
    assert (results.parent / "report.html").is_file()
