"""Data sets of torchvision, and objects of the same form, as evaluation sets."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from evaclip_model.errors import InputError
from tasks.encoders.torchvision_import import explain_import, import_torchvision
from tasks.evaluate.sets.convert.shard_writer import (
    Found,
    Source,
    UnusableSourceError,
    encode_png,
    image_file,
)
from tasks.evaluate.sets.prompts import find_classnames
from tasks.evaluate.sets.set_registry import KnownSet, TorchvisionSet, all_sets

MapDataset = Sequence[tuple[Any, Any]]
"""A torchvision data set: `dataset[i]` is (image, label), the image of Pillow or a file."""


def torchvision_set(known: KnownSet) -> TorchvisionSet:
    """The registry's entry of torchvision's set. Raises InputError: torchvision has none."""
    if known.torchvision is None:
        there = ", ".join(key for key, one in all_sets().items() if one.torchvision)
        raise InputError(f"torchvision has no set '{known.key}'; it has {there}")
    return known.torchvision


def open_torchvision(
    known: KnownSet, root: Path, download: bool = False, split: str = ""
) -> MapDataset:
    """torchvision's data set of a known set, in `root`; of a `split` that is not the one evaluated,
    by torchvision's name. Raises InputError: torchvision has none, cannot be imported, has no such
    split, or does not find its files."""
    entry = torchvision_set(known)
    with explain_import("torchvision", "the version that belongs to your torch"):
        module = import_torchvision("datasets")
    arguments: dict[str, Any] = dict(entry.arguments)
    if split and "split" in arguments:
        arguments["split"] = split
    elif split in ("train", "test") and "train" in arguments:
        arguments["train"] = split == "train"
    elif split:
        raise InputError(f"torchvision's {entry.dataset} has no split '{split}'")
    if entry.reads_files:
        arguments["loader"] = lambda path: Path(path).read_bytes()
    if download:
        if not entry.downloads:
            raise InputError(
                f"torchvision does not download '{known.key}': {known.obtain}; put it into {root}"
            )
        arguments["download"] = True
    try:
        dataset: MapDataset = getattr(module, entry.dataset)(root=str(root), **arguments)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise InputError(f"torchvision's {entry.dataset} in {root}: {error}") from None
    return dataset


def torchvision_names(known: KnownSet, dataset: MapDataset) -> tuple[str, ...]:
    """Class names of a known set, in the order of the labels that `dataset_sources` writes. Raises
    InputError: their source is not installed, or the object has none."""
    entry = torchvision_set(known)
    if entry.names == "digits":
        return tuple(map(str, range(10)))
    if entry.names in ("openai", "clip_benchmark"):
        return find_classnames(known.key, entry.names, known, Path())
    return class_names(dataset, entry.names, entry.spaces)


def class_names(
    dataset: MapDataset, attribute: str = "classes", spaces: str = ""
) -> tuple[str, ...]:
    """Class names by this attribute of a data set object. Raises InputError: it has none."""
    names: Sequence[Any] = getattr(dataset, attribute, ())
    if not names:
        kind = type(dataset).__name__
        raise InputError(f"{kind} has no {attribute}: give a file with one class name a line")
    table = str.maketrans(dict.fromkeys(spaces, " "))
    return tuple(str(name).translate(table).strip() for name in names)


def dataset_sources(
    dataset: MapDataset, relabel: Sequence[int] = (), stamp: str = ""
) -> list[Source]:
    """Every sample of a data set object, whose label is `relabel[own label]` where that is given;
    `stamp` changes with the object's files."""
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
    return replace(image_file(image), answer=number)
