"""ImageNet's prompts against the package that they are read from."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from evaclip_model.tokenizer.bundled_assets import package_file
from evaclip_model.zeroshot import imagenet_prompts
from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames, imagenet_templates


@pytest.fixture(scope="module")
def theirs():
    """The module itself, run on its own: the whole package would import torchvision."""
    spec = importlib.util.spec_from_file_location("metadata", package_file(imagenet_prompts._FILE))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_class_names_are_those_of_the_package(theirs):
    assert imagenet_classnames() == tuple(theirs.IMAGENET_CLASSNAMES)
    assert len(imagenet_classnames()) == 1000


def test_templates_make_the_same_prompts(theirs):
    names = ("tench", "yellow lady's slipper", "{brace}")
    assert len(imagenet_templates()) == 80
    for ours, function in zip(imagenet_templates(), theirs.OPENAI_IMAGENET_TEMPLATES, strict=True):
        assert [ours.replace(imagenet_prompts.PLACEHOLDER, name) for name in names] == [
            function(name) for name in names
        ]


def test_the_package_is_not_imported():
    code = (
        "import sys; from evaclip_model.zeroshot.imagenet_prompts import imagenet_templates; "
        "imagenet_templates();"
        "assert 'open_clip' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "content",
    ["", "OPENAI_IMAGENET_TEMPLATES = ('a {}',) * 80", f"OPENAI_IMAGENET_TEMPLATES = {[1] * 80}"],
)
def test_a_file_of_another_form_is_one_sentence(tmp_path: Path, monkeypatch, content: str):
    (tmp_path / "other.py").write_text(content)
    monkeypatch.setattr(imagenet_prompts, "package_file", lambda name: tmp_path / "other.py")
    with pytest.raises(InputError, match=r"other.py holds .* in a form that is not known here"):
        imagenet_templates.__wrapped__()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(imagenet_prompts, "package_file", lambda name: None)
    with pytest.raises(InputError, match="install open_clip_torch"):
        imagenet_classnames.__wrapped__()
