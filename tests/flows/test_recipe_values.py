"""The recipes against the paper's tables, and what no table says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from evaclip_model.training.config import LambConfig
from flows.config.recipe import Recipe, load_recipe
from flows.config.recipe_loader import find_recipe, read_recipe, recipe_names
from tasks.evaluate.paper.published import rows_of

TABLE_1 = {row.model: row.cells for row in rows_of("1a")}
SETTINGS = {row.model: row.cells for table in ("8", "9", "10") for row in rows_of(table)}
RECIPES = {
    "EVA-01-CLIP-B/16": "eva01-clip-b-16",
    "EVA-01-CLIP-g/14": "eva01-clip-g-14",
    "EVA-01-CLIP-g/14+": "eva01-clip-g-14-plus",
    "EVA-02-CLIP-B/16": "eva02-clip-b-16",
    "EVA-02-CLIP-L/14": "eva02-clip-l-14",
    "EVA-02-CLIP-L/14+": "eva02-clip-l-14-plus",
    "EVA-02-CLIP-E/14": "eva02-clip-e-14",
    "EVA-02-CLIP-E/14+": "eva02-clip-e-14-plus",
}
NOT_THE_PAPERS = {"demo", "finetune", "clipa-b-16", "clipa-l-14", "beyond-b-16", "beyond-l-14"}
ABLATION = [
    "ablation-1-from-scratch",
    "ablation-2-eva-init",
    "ablation-3-lamb",
    "ablation-4-masked",
    "ablation-5-laion2b",
    "ablation-6-merged2b",
]
IN_TABLES = {
    "image_peak_lr": "lr_vision",
    "image_layer_decay": "layer_decay_vision",
    "text_peak_lr": "lr_text",
    "text_layer_decay": "layer_decay_text",
    "eps": "eps",
    "weight_decay": "weight_decay",
    "input_resolution": "image_px",
    "samples_seen": "samples_seen",
    "drop_path": "drop_path",
    "zero_stage": "zero_stage",
}
"""Cells that are numbers, and the setting that each is."""
WEIGHTS = {
    "EVA-01-g": "weights/EVA01_g_psz14.pt",
    "EVA-02-B": "weights/EVA02_B_psz14to16.pt",
    "EVA-02-L": "weights/EVA02_L_psz14.pt",
    "EVA-02-E": "weights/EVA02_E_psz14.pt",
    "OpenAI CLIP-B": "weights/clip-vit-base-patch16",
    "OpenAI CLIP-L": "weights/clip-vit-large-patch14",
    "Open CLIP-H": "weights/open_clip-vit-h-14",
    "Open CLIP-G": "weights/open_clip-vit-bigg-14",
}
SOURCES = {
    "LAION-400M": {"laion400m"},
    "LAION-2B": {"laion2b"},
    "Merged-2B": {"laion2b", "coyo700m"},
    "merged-2B": {"laion2b", "coyo700m"},
}
DEVIATIONS = {
    # (recipe, training stage, setting): ours. The weights of L/14+ are those of the stage before.
    ("eva02-clip-l-14-plus", "l-14-336", "vision"): "weights/EVA02_L_psz14.pt",
    ("eva02-clip-l-14-plus", "l-14-336", "text"): "weights/clip-vit-large-patch14",
}
"""Where a recipe says something else than its table."""
NOT_IN_TABLES = {
    # From the authors' commands: text and tables are silent or differ.
    "lr_other": {5e-4},
    "grad_clip_norm": {5.0},
    "warmup_steps": {2000},
    "grad_checkpointing": {"full"},
    "seed": {4096, 4097},
    "patch_dropout": {0.0, 0.5},
    # This project's own.
    "lamb": {LambConfig(trust_scope="parameter", trust_clip=(0.01, 10.0), adapt_no_decay=True)},
    "sampling": {"exact"},
    "lanes": {256, 384, 896, 1152},
    "checkpoint_every_steps": {500},
}
"""Settings that recipes of the paper's models make and no table has, with every value they have."""
MASKED = {"eva01-clip-g-14-plus", "eva02-clip-e-14", "eva02-clip-e-14-plus", "eva01-clip-b-16"}


def stages_of(model: str) -> tuple[Recipe, Any]:
    """The recipe and the training stage that a row or column of a table is about: the last."""
    recipe = load_recipe(RECIPES[model])
    return recipe, recipe.train[-1]


@pytest.mark.parametrize("model", SETTINGS)
def test_a_recipe_says_what_tables_8_to_10_say(model: str) -> None:
    recipe, train = stages_of(model)
    cells = SETTINGS[model]
    expected: dict[str, Any] = {ours: cells[theirs] for theirs, ours in IN_TABLES.items()}
    expected |= {
        "optimizer": cells["optimizer"].lower(),
        "schedule": cells["lr_schedule"].removesuffix(" decay"),
        "beta1": cells["betas"][0],
        "beta2": cells["betas"][1],
        "crop_scale": tuple(cells["random_resized_crop_scale"]),
        "precision": cells["precision"].removeprefix("DeepSpeed "),
        "vision": WEIGHTS.get(cells["image_init"]),
        "text": WEIGHTS.get(cells["text_init"]),
    }
    ours = {
        **train.model_dump(),
        "vision": str(recipe.initialise.vision),
        "text": str(recipe.initialise.text),
    }
    for setting, value in expected.items():
        key = (recipe.name, train.name, setting)
        assert ours[setting] == DEVIATIONS.get(key, value), setting
        assert (key in DEVIATIONS) == (ours[setting] != value)
    thousands = float(cells["batch_size"].removesuffix("k"))
    assert abs(train.global_batch / 1000 - thousands) < 1  # tables round down, or to the nearest
    assert {source.name for source in recipe.merge.sources} == SOURCES[cells["data"]]
    assert recipe.initialise.load_architecture().vision.patch_px == cells["patch_size"]


@pytest.mark.parametrize("model", RECIPES)
def test_a_recipe_has_table_1s_samples_beside_its_gpus_and_accuracy(model: str) -> None:
    recipe, _ = stages_of(model)
    row = TABLE_1[model]
    gpus = "{count}x{type}-{memory_gb}GB".format(**row["gpus"])
    assert sum(stage.samples_seen for stage in recipe.train) == row["samples_seen"]
    assert recipe.published.gpus == gpus
    assert recipe.published.imagenet_top1 == row["in1k_zs_top1"]


@pytest.mark.parametrize(
    ("name", "row"), [(name, row.cells) for name, row in zip(ABLATION, rows_of("5"), strict=True)]
)
def test_the_ablation_is_that_of_table_5(name: str, row: Mapping[str, Any]) -> None:
    recipe = load_recipe(name)
    [train] = recipe.train
    assert {source.name for source in recipe.merge.sources} == SOURCES[row["dataset"]]
    assert (recipe.initialise.vision is not None) == row["eva_init"]
    assert train.optimizer == row["optimizer"].lower()
    assert train.patch_dropout == (0.5 if row["mask_50"] else 0.0)
    assert train.samples_seen == row["samples_seen"]
    assert train.global_batch == 32 * 1024
    assert recipe.published.imagenet_top1 == row["in1k_zs_top1"]
    minutes = {
        row.cells["mask_50"]: row.cells for row in rows_of("6") if row.cells["flash_attention"]
    }
    published = minutes[row["mask_50"]]["minutes_per_40m_samples"]
    assert recipe.published.minutes_per_40m_samples == published


def test_two_rows_of_the_ablation_differ_in_what_table_5_varies_alone() -> None:
    varied = {"optimizer", "patch_dropout", "samples_seen", "source_weights"}
    base, *others = (load_recipe(name).train[0].model_dump() for name in ABLATION[1:])
    for other in others:
        assert {key for key in base if base[key] != other[key]} <= varied


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - NOT_THE_PAPERS))
def test_no_recipe_of_the_paper_sets_what_neither_a_table_nor_this_list_has(name: str) -> None:
    stages = read_recipe(find_recipe(name))["train"]
    resolved = load_recipe(name).train
    known = {"name", "optimizer", "schedule", "beta1", "beta2", "crop_scale", "precision"}
    known |= {"global_batch", "source_weights", *IN_TABLES.values()}
    for stage, train in zip(stages, resolved, strict=True):
        assert set(stage) - known == NOT_IN_TABLES.keys(), "list what the recipe sets"
        for setting, values in NOT_IN_TABLES.items():
            assert getattr(train, setting) in values, setting


def test_masking_is_the_commands_where_the_paper_contradicts_itself() -> None:
    masked = {name for name in RECIPES.values() if load_recipe(name).train[-1].patch_dropout == 0.5}
    assert masked == MASKED


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {"demo", "finetune"}))
def test_every_real_source_names_its_edition_and_licence(name: str) -> None:
    for source in load_recipe(name).merge.sources:
        assert source.revision and source.licence
        assert source.name in load_recipe(name).published.metadata_rows
