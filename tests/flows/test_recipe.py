import re

import pytest

from evaclip_model.errors import InputError
from flows.config.recipe import load_recipe
from flows.config.recipe_loader import recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_comes_with_the_project_loads(name: str) -> None:
    assert load_recipe(name).name == name


def test_an_unknown_recipe_names_the_nearest_one() -> None:
    with pytest.raises(InputError, match="unknown recipe 'dmeo'; did you mean 'demo'"):
        load_recipe("dmeo")


def test_a_missing_recipe_file_is_named() -> None:
    with pytest.raises(InputError, match=r"there is no recipe file nowhere.toml"):
        load_recipe("nowhere.toml")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("merge.partitons=4", "unknown key 'merge.partitons'; did you mean 'partitions'"),
        ("train.stage1.lr_visoin=1", "did you mean 'lr_vision'"),
        ("merge.filters.min_caption_char=1", "did you mean 'min_caption_chars'"),
        ("train.stage1.global_batch=many", "'train.0.global_batch'.*got 'many'"),
        ("train.stage9.seed=1", "no item 'stage9' in this list, there are: stage1, stage2"),
        ("demo.port.x=1", "'port' is a value, not a table"),
        ("port", "expected table.key=value"),
        ("train.stage2.image_px=50", "stage 'stage2': .*50 is not a multiple of patch_px 8"),
        ('train.stage1.freeze=["vision.blocks.90-99"]', "freeze names 'vision.blocks.90-99'"),
        ('train.stage1.freeze=["vision.neck"]', "freeze names 'vision.neck', which this model"),
        ("train.stage1.warmup_steps=2000", "700 steps .*fewer than warmup_steps = 2,000"),
        ("merge.rows_per_file=300", "must be a multiple of download.samples_per_shard"),
    ],
)
def test_a_wrong_override_is_one_sentence_that_names_the_key(override: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("demo", [override])
    assert re.search(sentence, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_overrides_change_one_setting_and_the_digest() -> None:
    recipe, changed = load_recipe("demo"), load_recipe("demo", ["train.stage2.lr_vision=1e-4"])
    assert changed.train[1].lr_vision == 1e-4
    assert changed.train[0] == recipe.train[0]
    assert changed.digest != recipe.digest


def test_lists_and_words_can_be_overridden() -> None:
    changed = load_recipe(
        "demo", ['train.0.caption_templates=["{}", "a {}"]', "train.0.optimizer=adamw"]
    )
    assert changed.train[0].caption_templates == ("{}", "a {}")
    assert changed.train[0].optimizer == "adamw"


def test_training_weights_may_only_name_sources_of_the_merge() -> None:
    with pytest.raises(InputError, match="source_weights names 'datacomp', which is none of"):
        load_recipe("demo", ["train.stage1.source_weights.datacomp=1.0"])


def test_a_recipe_can_switch_clipping_off():
    recipe = load_recipe("demo", ["train.stage1.grad_clip_norm=none"])
    assert recipe.train[0].grad_clip_norm is None
