"""Configurations whose keys were renamed or added after artifacts had been made."""

from typing import ClassVar

import pytest
from pydantic import Field

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.training.config import TrainConfig


class Guards(Config):
    ADDED: ClassVar = ("patience",)
    limit: float = 8.0
    patience: int = 0


class Stage(Config):
    RENAMED: ClassVar = {"spike_limit": "guards.limit", "pixels": "image_px"}
    ADDED: ClassVar = ("objective",)
    name: str
    image_px: int = 224
    guards: Guards = Guards()
    objective: str = "softmax"


class Whole(Config):
    stages: tuple[Stage, ...]
    by_name: dict[str, Stage] = Field(default_factory=dict)


def test_a_setting_that_moved_keeps_its_first_name_where_digests_are_taken():
    stage = Stage(name="a", image_px=32, guards=Guards(limit=3.0))
    assert stage.compute_identity() == {"name": "a", "pixels": 32, "spike_limit": 3.0}
    assert stage.model_dump()["guards"] == {"limit": 3.0, "patience": 0}


def test_an_added_setting_counts_from_the_first_value_that_is_not_its_default():
    plain = Stage(name="a")
    assert Stage(name="a", objective="softmax").compute_identity() == plain.compute_identity()
    other = Stage(name="a", objective="sigmoid", guards=Guards(patience=2))
    added = {"objective": "sigmoid", "guards": {"patience": 2}}
    assert other.compute_identity() == plain.compute_identity() | added


def test_tables_within_lists_and_tables_count_alike():
    stage = Stage(name="a")
    whole = Whole(stages=(stage,), by_name={"first": stage}).compute_identity()
    assert whole == {
        "stages": [stage.compute_identity()],
        "by_name": {"first": stage.compute_identity()},
    }


def test_the_first_key_of_a_setting_is_refused_with_the_present_one():
    with pytest.raises(InputError) as refused:
        Whole.from_mapping({"stages": [{"name": "a", "spike_limit": 3}]}, where="mine.toml")
    assert str(refused.value) == (
        "mine.toml: 'stages.0.spike_limit' is called 'stages.0.guards.limit' now: write it under "
        "that name"
    )


def test_no_checkpoint_or_artifact_of_a_training_stage_is_lost_to_tables():
    stage = TrainConfig(name="x", image_px=32, samples_seen=64, global_batch=16)
    assert all(not isinstance(value, dict) for value in stage.compute_identity().values() if value)
    assert set(TrainConfig.RENAMED) < set(stage.compute_identity())


@pytest.mark.parametrize("values", [[1, 2], [["name", "a"]], "name", 3, None])
def test_a_file_without_keys_is_refused_in_one_sentence(values: object):
    with pytest.raises(InputError, match=r"x.json should hold a JSON object, .*, not ."):
        Stage.from_mapping(values, where="x.json")
