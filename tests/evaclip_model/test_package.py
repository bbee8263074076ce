"""What importing the package promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

import evaclip_model


def test_reading_errors_configs_and_names_does_not_wait_for_torch():
    code = (
        "import sys, evaclip_model.errors, evaclip_model.reading.samples, evaclip_model.cli;"
        "evaclip_model.ModelConfig.load('EVA02-CLIP-demo'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", evaclip_model.__all__)
def test_every_exported_name_exists(name: str):
    assert getattr(evaclip_model, name) is not None


def test_a_name_that_is_not_exported_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        evaclip_model.creat_model  # noqa: B018
