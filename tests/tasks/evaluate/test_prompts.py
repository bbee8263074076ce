"""Class names and templates: every source says what it has, and nothing takes another's place."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames, imagenet_templates
from tasks.evaluate.sets import prompts
from tasks.evaluate.sets.prompts import (
    find_classnames,
    find_templates,
    grammar_templates,
    imagenet_synsets,
    subset_classes,
)
from tasks.evaluate.sets.set_registry import all_sets, find_set

NOWHERE = Path("nowhere")


@pytest.mark.parametrize(
    ("key", "count", "some"),
    [
        ("ucf101", 48, ["a photo of a person {c}.", "a video of the person practicing {c}."]),
        ("kinetics400", 28, ["a photo of {c}.", "a demonstration of a person during {c}."]),
        ("kinetics700", 28, ["a example of a person {c}.", "a video of a person using {c}."]),
        ("resisc45", 18, ["satellite imagery of {c}.", "aerial view of the {c}."]),
        ("birdsnap", 1, ["a photo of a {c}, a type of bird."]),
    ],
)
def test_a_grammar_builds_openais_templates(key: str, count: int, some: list[str]) -> None:
    built = grammar_templates(key)
    assert len(built) == len(set(built)) == count
    assert set(some) <= set(built)
    assert find_templates(key, "grammar", find_set(key), NOWHERE) == built


def test_no_grammar_is_made_up_for_other_sets() -> None:
    with pytest.raises(InputError, match="'dtd' has no templates built by a grammar"):
        grammar_templates("dtd")


@pytest.mark.parametrize("key", all_sets())
def test_every_source_that_the_registry_names_has_the_set(key: str) -> None:
    known = find_set(key)
    for source in known.prompts:
        if source == "clip_benchmark":
            pytest.importorskip("clip_benchmark")
        if source != "dataset":
            found = find_templates(key, source, known, NOWHERE)
            # RESISC45's published templates are others than OpenAI's.
            assert len(found) == known.templates or (key, source) == ("resisc45", "grammar")
    for source in known.names:
        if source != "dataset":
            assert len(find_classnames(key, source, known, NOWHERE)) == known.classes


def test_the_thousand_names_and_80_templates_are_the_wheels_too() -> None:
    pytest.importorskip("clip_benchmark")
    known = find_set("imagenet1k")
    assert find_classnames("x", "clip_benchmark", known, NOWHERE) == imagenet_classnames()
    assert find_templates("x", "clip_benchmark", known, NOWHERE) == imagenet_templates()


def test_a_wheel_that_is_not_installed_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "WHEEL", "a_package_that_is_not_installed")
    with pytest.raises(InputError, match="clip-benchmark, which is not installed"):
        find_templates("dtd", "clip_benchmark", find_set("dtd"), NOWHERE)


def test_a_set_without_a_list_in_the_wheel_is_refused() -> None:
    pytest.importorskip("clip_benchmark")
    with pytest.raises(InputError, match=r"set 'mine' has no list in .*\.json"):
        find_templates("mine", "clip_benchmark", None, NOWHERE)


def test_a_set_without_templates_gets_none_from_anywhere_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"templates\.txt is missing"):
        find_templates("dtd", "dataset", find_set("dtd"), tmp_path)


def test_a_template_without_a_place_for_the_class_is_named(tmp_path: Path) -> None:
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\na photo\n")
    with pytest.raises(InputError, match=r"templates\.txt: template 'a photo' has no \{c\}"):
        find_templates("mine", "dataset", None, tmp_path)


@pytest.mark.parametrize("key", ["imagenet-a", "imagenet-r"])
def test_imagenets_subsets_have_200_of_its_classes_in_its_order(key: str) -> None:
    classes = subset_classes(find_set(key))
    assert len(classes) == 200
    assert list(classes) == sorted(set(classes))
    names = find_classnames(key, "openai", find_set(key), NOWHERE)
    assert names == tuple(imagenet_classnames()[index] for index in classes)


def test_the_two_subsets_have_different_classes() -> None:
    first, second = (set(subset_classes(find_set(f"imagenet-{one}"))) for one in "ar")
    assert 0 < len(first & second) < 200
    assert subset_classes(find_set("imagenet1k")) == () == subset_classes(None)


def test_wordnet_ids_are_in_the_order_of_labels() -> None:
    synsets = imagenet_synsets()
    assert len(synsets) == 1000
    assert list(synsets) == sorted(synsets)
    assert imagenet_classnames()[synsets.index("n02123045")] == "tabby cat"
