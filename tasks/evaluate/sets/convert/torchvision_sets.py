"""Data sets of torchvision, and objects of the same form, as evaluation sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from evaclip_model.errors import InputError, shorten_error
from tasks.evaluate.sets.convert.shard_writer import (
    Found,
    Source,
    UnusableSourceError,
    encode_png,
    image_file,
)
from tasks.evaluate.sets.prompts import find_classnames
from tasks.evaluate.sets.set_registry import KnownSet
from tasks.evaluate.torchvision_import import import_torchvision

Names = Literal["classes", "categories", "openai", "clip_benchmark", "digits"]


class MapDataset(Protocol):
    """A torchvision data set: `dataset[i]` is (image, label), the image of Pillow or a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class TorchvisionSet:
    """The way from torchvision's set to one of the paper's."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of its class, besides `root`."""
    names: Names = "classes"
    """Its attribute with the class names, or the source that has them."""
    spaces: str = ""
    """Characters in its names that stand for a space."""
    reads_files: bool = False
    """True: it takes a `loader`, so that image files are copied, not decoded and written again."""
    relabel: tuple[int, ...] = ()
    """Label here of each of its labels; none where they are the same."""
    downloads: bool = True
    """True: its class still takes `download`."""


TORCHVISION: Mapping[str, TorchvisionSet] = {
    "imagenet1k": TorchvisionSet(
        {"split": "val"}, names="openai", reads_files=True, downloads=False
    ),
    "cifar10": TorchvisionSet({"train": False}),
    "cifar100": TorchvisionSet({"train": False}),
    "mnist": TorchvisionSet({"train": False}, names="digits"),
    "caltech101": TorchvisionSet({"target_type": "category"}, names="categories"),
    "sun397": TorchvisionSet(spaces="_/", reads_files=True),
    "fgvc-aircraft": TorchvisionSet(
        {"split": "test", "annotation_level": "variant"}, reads_files=True
    ),
    "country211": TorchvisionSet({"split": "test"}, names="clip_benchmark", reads_files=True),
    "stanford-cars": TorchvisionSet({"split": "test"}, reads_files=True, downloads=False),
    "dtd": TorchvisionSet({"split": "test", "partition": 1}, reads_files=True),
    "eurosat": TorchvisionSet(names="clip_benchmark", reads_files=True),
    # Its labels are in the order of the competition's file; the names are in that of the alphabet.
    "fer2013": TorchvisionSet(
        {"split": "test"},
        names="clip_benchmark",
        relabel=(0, 1, 2, 3, 5, 6, 4),
        downloads=False,
    ),
    "flowers102": TorchvisionSet({"split": "test"}, names="clip_benchmark", reads_files=True),
    "food101": TorchvisionSet({"split": "test"}, spaces="_", reads_files=True),
    "gtsrb": TorchvisionSet({"split": "test"}, names="clip_benchmark"),
    "pcam": TorchvisionSet({"split": "test"}, names="clip_benchmark"),
    "pets": TorchvisionSet({"split": "test"}, names="clip_benchmark"),
    "rendered-sst2": TorchvisionSet({"split": "test"}, reads_files=True),
    "stl10": TorchvisionSet({"split": "test"}),
}
"""Key of a set -> how torchvision's class is called and read."""


def open_torchvision(known: KnownSet, root: Path, download: bool = False) -> MapDataset:
    """torchvision's data set of a known set, in `root`.

    Raises:
        InputError: torchvision has none, cannot be imported, or does not find its files.
    """
    entry = TORCHVISION.get(known.key)
    if entry is None or known.torchvision is None:
        raise InputError(f"torchvision has no set '{known.key}'; it has {', '.join(TORCHVISION)}")
    try:
        module = import_torchvision("datasets")
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"torchvision cannot be imported ({shorten_error(error)}): install the version that "
            "belongs to your torch"
        ) from None
    arguments = dict(entry.arguments)
    if entry.reads_files:
        arguments["loader"] = _read_content
    if download:
        if not entry.downloads:
            raise InputError(
                f"torchvision does not download '{known.key}': {known.obtain}; put it into {root}"
            )
        arguments["download"] = True
    try:
        dataset: MapDataset = getattr(module, known.torchvision)(root=str(root), **arguments)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise InputError(f"torchvision's {known.torchvision} in {root}: {error}") from None
    return dataset


def torchvision_names(known: KnownSet, dataset: MapDataset) -> tuple[str, ...]:
    """Class names of a known set, in the order of the labels that `dataset_sources` writes.

    Raises:
        InputError: their source is not installed, or the object has none.
    """
    entry = TORCHVISION[known.key]
    if entry.names == "digits":
        return tuple(map(str, range(10)))
    if entry.names in ("openai", "clip_benchmark"):
        return find_classnames(known.key, entry.names, known, Path())
    return class_names(dataset, entry.names, entry.spaces)


def class_names(
    dataset: MapDataset, attribute: str = "classes", spaces: str = ""
) -> tuple[str, ...]:
    """Class names of a data set object, from its attribute of this name.

    Raises:
        InputError: it has none.
    """
    names: Sequence[Any] = getattr(dataset, attribute, ())
    if not names:
        raise InputError(
            f"{type(dataset).__name__} has no {attribute}: give a file with one class name a line"
        )
    table = str.maketrans(dict.fromkeys(spaces, " "))
    return tuple(str(name).translate(table).strip() for name in names)


def torchvision_words(dataset: MapDataset, names: Sequence[str]) -> list[str]:
    """The data set object's own words for its classes, in its order; else the usual names."""
    own = [str(one) for one in getattr(dataset, "classes", ())]
    return own if len(own) == len(names) == len(set(own)) else list(names)


def dataset_sources(
    dataset: MapDataset, relabel: Sequence[int] = (), stamp: str = ""
) -> list[Source]:
    """Every sample of a data set object.

    Args:
        relabel: label in the set of each of the object's labels; none where they are the same.
        stamp: what changes with the object's files.
    """
    name = type(dataset).__name__
    return [
        Source(f"{name}[{index}]", partial(_read_sample, dataset, index, tuple(relabel)), stamp)
        for index in range(len(dataset))
    ]


def _read_sample(dataset: MapDataset, index: int, relabel: tuple[int, ...]) -> Found:
    image, label = dataset[index]
    if label is None:
        raise UnusableSourceError("has no label")
    number = relabel[int(label)] if relabel else int(label)
    if isinstance(image, Image.Image):
        return Found(encode_png(image), "png", number)
    extension, content = image_file(image)
    return Found(content, extension, number)


def _read_content(path: str | Path) -> bytes:
    """A torchvision loader that leaves the file as it is."""
    return Path(path).read_bytes()
