"""Names that the registry would refuse are refused when the recipe is read."""

import pytest

from evaclip_model import InputError
from tasks.register.config import RegisterConfig


@pytest.mark.parametrize("alias", ["latest", "v3", "a b", "a@b"])
def test_an_alias_that_mlflow_reserves_or_refuses_is_refused_early(alias: str) -> None:
    with pytest.raises(InputError, match="'alias'"):
        RegisterConfig.from_mapping({"model_name": "evaclip", "alias": alias}, "recipe.toml")


@pytest.mark.parametrize("name", ["a/b", "a@b", "models:a", ""])
def test_a_model_name_that_would_break_its_address_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="'model_name'"):
        RegisterConfig.from_mapping({"model_name": name}, "recipe.toml")
