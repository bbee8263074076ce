"""Files that a registered model's copy of this package carries beside torch and Pillow: the
tokenizer's vocabulary, the classes of characters and ftfy's source. In a checkout and in an
installed package the folder does not exist."""

import importlib
import importlib.util
import json
import shutil
import sys
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

PACKAGE = "open_clip"
"""Importable name of the package whose data files are read: vocabulary and prompts."""
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
CLASSES = "letters_and_numbers.json"
"""Unicode's letters and numbers as [first, last] pairs of code points."""
SOURCES = "ftfy.zip"

_FOLDER = "carried"
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""One time for every file, so that equal sources make equal archives."""


def carried_file(name: str) -> Path | None:
    """A file of the folder in this package, if it is there."""
    path = Path(__file__).parents[1] / _FOLDER / name
    return path if path.is_file() else None


def package_file(name: str, package: str = PACKAGE) -> Path | None:
    """A data file of an installed package, found without running it; or the carried one."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    found = (path for folder in folders if (path := Path(folder) / name).is_file())
    return next(found, None) or carried_file(name)


@cache
def text_repair() -> ModuleType:
    """The library ftfy, installed or carried, imported for the first text that may need it. Raises
    ModuleNotFoundError: neither is there."""
    sources = carried_file(SOURCES)
    if sources is not None and importlib.util.find_spec("ftfy") is None:
        sys.path.append(str(sources))
    return importlib.import_module("ftfy")


def bundle_assets(package: Path) -> None:
    """Write the folder into `package`, a copy of this package, from what is installed here. Raises
    FileNotFoundError: open_clip_torch, which ships the vocabulary, is not."""
    folder = package / _FOLDER
    folder.mkdir()
    vocabulary = package_file(VOCABULARY)
    if vocabulary is None:
        raise FileNotFoundError(VOCABULARY)
    shutil.copyfile(vocabulary, folder / VOCABULARY)
    import regex  # a loader of the carried copy does without it

    every = "".join(map(chr, range(sys.maxunicode + 1)))
    classes = {
        name: [(run.start(), run.end() - 1) for run in regex.finditer(rf"\p{{{name}}}+", every)]
        for name in ("L", "N")
    }
    (folder / CLASSES).write_text(json.dumps(classes, separators=(",", ":")))
    with zipfile.ZipFile(folder / SOURCES, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(metadata.files("ftfy") or [], key=str):
            is_needed = file.suffix == ".py" or "licenses" in file.parts
            if is_needed and ".." not in file.parts:
                info = zipfile.ZipInfo(str(file), _EPOCH)
                archive.writestr(info, Path(file.locate()).read_bytes(), zipfile.ZIP_DEFLATED)
