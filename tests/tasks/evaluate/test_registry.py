"""The registry: every set of the paper's tables is there, and its name says everything."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import tasks.evaluate.paper.published
from evaclip_model.errors import InputError
from flows.config.recipe import load_recipe
from flows.config.recipe_loader import recipe_names
from tasks.evaluate.config import EvalSetConfig, EvaluateConfig
from tasks.evaluate.sets.set_registry import all_sets, find_set, known_sets


def config_of(**values: object) -> EvalSetConfig:
    return EvaluateConfig.from_mapping({"sets": [values]}, "recipe.toml").sets[0]


def test_there_are_27_image_4_video_and_2_retrieval_sets() -> None:
    assert len(known_sets()) == 33
    tables = Counter(table for known in known_sets().values() for table in known.tables)
    assert tables == {"1b": 6, "2": 27, "3": 4, "4": 2}


def test_every_column_of_the_papers_tables_is_one_set() -> None:
    file = Path(tasks.evaluate.paper.published.__file__).with_name("paper_tables.json")
    tables = json.loads(file.read_text())["tables"]
    for table in ("1b", "2", "3"):
        columns = [column["key"] for column in tables[table]["columns"]]
        sets = [known.column for known in known_sets().values() if table in known.tables]
        assert Counter(sets) == Counter(columns) - Counter(["model", "delta", "avg"])


def test_a_variant_is_known_and_in_no_table() -> None:
    assert len(known_sets()) == 33
    assert {"voc2007-multilabel", "imagenet-real", "svhn"} <= set(all_sets()) - set(known_sets())
    assert find_set("voc2007").kind == "classification"
    assert find_set("voc2007-multilabel").kind == "multilabel"


@pytest.mark.parametrize("key", known_sets())
def test_a_name_is_all_that_a_recipe_needs(key: str) -> None:
    known = find_set(key)
    config = config_of(name=key)
    assert config.folder == f"evaluation/{known.wds}"
    assert config.kind == known.kind
    assert config.templates == (known.prompts[0] if known.prompts else "dataset")
    assert config.crop_px == 0


def test_what_a_recipe_says_goes_before_the_registry() -> None:
    config = config_of(name="ucf101", folder="/data/ucf", templates=["{c}"], classnames=["a"])
    assert (config.folder, config.templates, config.classnames) == ("/data/ucf", ("{c}",), ("a",))
    assert config_of(name="objectnet", crop_px=2).crop_px == 2


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"name": "imagnet1k"}, r"not in the registry \(did you mean 'imagenet1k'\?\)"),
        ({"name": "mine", "kind": "classification"}, "'sets.0.folder' is missing"),
        ({"name": "coco", "kind": "classification"}, "set 'coco' is a retrieval set"),
        ({"name": "coco", "templates": ["{c}"]}, "retrieval compares captions as they are"),
        ({"name": "coco", "classnames": ["cat"]}, "retrieval compares captions as they are"),
        ({"name": "cifar10", "templates": "grammar"}, "no templates in 'grammar': give one of"),
        ({"name": "cifar10", "classnames": "openai"}, "no classnames in 'openai': give one of"),
        ({"name": "dtd", "templates": "imagenet"}, "needs a list, or one of dataset, openai"),
        ({"name": "dtd", "templates": []}, "needs at least one template"),
        ({"name": "dtd", "templates": ["a photo"]}, r"needs \{c\} for the class name in 'a photo'"),
        ({"name": "dtd", "crop_px": -1}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        config_of(**values)


def test_a_set_of_ones_own_may_have_imagenets_prompts_only_by_saying_so() -> None:
    own = {"name": "mine", "folder": "f", "kind": "classification"}
    assert config_of(**own).templates == "dataset"
    assert config_of(**own, templates="openai").templates == "openai"
    with pytest.raises(InputError, match="no templates in 'clip_benchmark'"):
        config_of(**own, templates="clip_benchmark")


@pytest.mark.parametrize("name", sorted({*recipe_names()} - {"demo", "finetune"}))
def test_the_papers_recipes_are_evaluated_on_all_its_sets(name: str) -> None:
    assert {one.name for one in load_recipe(name).evaluate.sets} == set(known_sets())
