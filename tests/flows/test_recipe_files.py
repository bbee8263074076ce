from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from flows.config.recipe import load_recipe
from flows.config.recipe_loader import merge_tables, read_recipe


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / "recipe.toml"


def test_tables_are_merged_key_by_key_and_anything_else_is_replaced() -> None:
    below = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merge_tables(below, {"a": {"y": [3]}, "c": 2}) == {
        "a": {"x": 1, "y": [3]},
        "b": 1,
        "c": 2,
    }
    assert below == {"a": {"x": 1, "y": [1, 2]}, "b": 1}


def test_items_of_a_list_are_merged_by_their_names_and_an_empty_list_takes_them_out() -> None:
    below = {"sets": [{"name": "one", "x": 1}, {"name": "two", "x": 2}]}
    changed = merge_tables(below, {"sets": [{"name": "two", "y": 3}, {"name": "three"}]})
    assert changed["sets"] == [
        {"name": "one", "x": 1},
        {"name": "two", "x": 2, "y": 3},
        {"name": "three"},
    ]
    assert merge_tables(below, {"sets": []}) == {"sets": []}


def test_what_is_included_comes_first_from_beside_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts", deep="x = 1\ny = 1\nz = 1", data='include = ["deep.toml"]\ny = 2')
    path = write(tmp_path, recipe='include = ["parts/data.toml"]\nz = 3')
    assert read_recipe(path) == {"x": 1, "y": 2, "z": 3}


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ('include = ["nowhere.toml"]', "recipe.toml includes 'nowhere.toml', but there is no"),
        (
            'include = ["other.toml"]',
            "other.toml includes 'recipe.toml', which includes it in turn",
        ),
        ('include = "other.toml"', "include is a list of paths"),
        ("train_defaults = 1\n[[train]]", r"\[train_defaults\] is a table beside"),
        ("train_defaults.seed = 1", r"\[train_defaults\] is a table beside"),
    ],
)
def test_files_that_cannot_be_put_together_are_one_sentence(
    recipe: str, sentence: str, tmp_path: Path
) -> None:
    path = write(tmp_path, recipe=recipe, other='include = ["recipe.toml"]')
    with pytest.raises(InputError, match=sentence):
        read_recipe(path)


def test_train_defaults_lie_under_every_training_stage(tmp_path: Path) -> None:
    text = """
    [train_defaults]
    seed = 1
    source_weights = { a = 1 }
    [[train]]
    name = "one"
    [[train]]
    name = "two"
    seed = 2
    source_weights = { b = 2 }
    """
    assert read_recipe(write(tmp_path, recipe=text))["train"] == [
        {"seed": 1, "source_weights": {"a": 1}, "name": "one"},
        {"seed": 2, "source_weights": {"a": 1, "b": 2}, "name": "two"},
    ]


def test_overrides_reach_what_was_included_and_what_stages_share() -> None:
    changed = load_recipe(
        "eva02-clip-l-14-plus",
        [
            "merge.sources.coyo700m.target_count=7000000",
            "train_defaults.grad_checkpointing=none",
            "train.l-14.source_weights.coyo700m=0.5",
            "evaluate.sets.imagenet1k.folder=elsewhere",
        ],
    )
    assert changed.merge.sources[1].target_count == 7_000_000
    assert [stage.grad_checkpointing for stage in changed.train] == ["none", "none"]
    assert [stage.source_weights["coyo700m"] for stage in changed.train] == [0.5, 0.2]
    assert changed.evaluate.sets[0].folder == "elsewhere"


def test_a_setting_that_moved_is_refused_by_its_new_name() -> None:
    with pytest.raises(InputError, match=r"'train\.0\.guards\.max_rollbacks' now"):
        load_recipe("demo", ["train.stage1.max_rollbacks=3"])
    with pytest.raises(InputError, match=r"'download\.politeness\.contact' now"):
        load_recipe("demo", ["download.contact=me@example.org"])
    changed = load_recipe("demo", ["train.stage1.guards.max_rollbacks=3"])
    assert [stage.guards.max_rollbacks for stage in changed.train] == [3, 10]


def test_an_override_without_a_value_takes_a_setting_out() -> None:
    changed = load_recipe("eva02-clip-b-16", ["initialise.vision=", "train_defaults.seed="])
    assert changed.initialise.vision is None
    assert changed.initialise.text is not None


def test_what_others_published_decides_nothing() -> None:
    recipe = load_recipe("eva02-clip-b-16")
    other = load_recipe("eva02-clip-b-16", ["published.imagenet_top1=1.0"])
    assert other.published != recipe.published
    assert other.digest == recipe.digest


def test_published_gpus_are_gpus() -> None:
    with pytest.raises(InputError, match=r"'published\.gpus'.*names no GPUs"):
        load_recipe("demo", ["published.gpus=many"])
