"""The tokenizer without compiled libraries: the same pieces and ids as with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import evaclip_model
from evaclip_model.tokenizer.bundled_assets import CLASSES, SOURCES, bundle_assets
from evaclip_model.tokenizer.tokenizer import plain_splitter, splitter, tokenize

CAPTIONS = [
    *json.loads((Path(__file__).parent / "data" / "tokenizer" / "tokens.json").read_text()),
    *("it'ſ IT'S we'LL", "<ſtart_of_text> <END_OF_TEXT>", "12½ Ⅷ ٣३ x²", "Ã©t schön Ǆ ﬁ ΣΑΣ"),
    *("東京タワー 한국 שלום مرحبا", "👍🏽 \u0345a \u0301", "&amp;amp;eacute; <b>", "a" * 90),
]
HIDDEN = ("regex", "tokenizers", "ftfy", "open_clip", "evaclip")
TOKENIZE = """
import json, sys
from evaclip_model.tokenizer.tokenizer import tokenize
print(json.dumps(tokenize(json.load(sys.stdin)).tolist()))
assert "carried" in sys.modules["ftfy"].__file__
assert not {"regex", "tokenizers"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with what a registered model carries."""
    package = tmp_path_factory.mktemp("code") / "evaclip_model"
    shutil.copytree(
        Path(evaclip_model.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    bundle_assets(package)
    return package


def test_every_character_is_split_alike_less_ideographs_between_the_ends_of_their_blocks(
    copy: Path,
) -> None:
    split = splitter()
    plain = plain_splitter(json.loads((copy / "carried" / CLASSES).read_text()))
    every = [
        chr(point) for point in (*range(0x4E01), *range(0xD7A2, 0x20001), *range(0xE0000, 0xE0200))
    ]
    words = "".join(f"a{one}1{one}'s{one}{one}" for one in every).split()
    assert [plain(word) for word in words] == [split(word) for word in words]


def test_ids_are_the_same_without_any_compiled_library(copy: Path, tmp_path: Path) -> None:
    """In a process that sees all installed packages but these."""
    for entry in Path(next(path for path in sys.path if path.endswith("site-packages"))).iterdir():
        if not entry.name.startswith(HIDDEN):
            (tmp_path / entry.name).symlink_to(entry)
    done = subprocess.run(
        [sys.executable, "-S", "-c", TOKENIZE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{copy.parent}:{tmp_path}"},
        input=json.dumps(CAPTIONS),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.tensor(json.loads(done.stdout)), tokenize(CAPTIONS))


def test_equal_sources_make_equal_archives_with_their_licence(copy: Path, tmp_path: Path) -> None:
    bundle_assets(tmp_path)
    first, second = (folder / "carried" / SOURCES for folder in (copy, tmp_path))
    assert first.read_bytes() == second.read_bytes()
    names = zipfile.ZipFile(first).namelist()
    assert "ftfy/__init__.py" in names
    assert any("LICENSE" in name for name in names)
    assert not [name for name in names if name.endswith((".so", ".pyc", ".pkl"))]


def test_an_installed_package_carries_nothing() -> None:
    assert not (Path(evaclip_model.__file__).parent / "carried").exists()
