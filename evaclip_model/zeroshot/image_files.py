"""Features of image files, and files of features."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.files import refuse_special, replace_file, write_atomically
from evaclip_model.model.clip import EvaClip
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.reading.transform import image_transform
from evaclip_model.zeroshot.exact_ranks import normalise_features

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Endings, in any case, of the files of a folder that are taken for images."""


@dataclass(frozen=True)
class ImageFeatures:
    files: tuple[Path, ...]
    """Those that could be read, in the order given."""
    values: Tensor
    """Their features as fp32 unit vectors [N, E]."""
    unreadable: Mapping[Path, str]
    """The other files, with the reason."""


def image_files(source: Path) -> list[Path]:
    """A file itself, or the images below a folder, by path. Raises InputError: there are none."""
    refuse_special(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputError(f"image {source} does not exist: give an image or a folder of images")
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise InputError(f"{source} has no images: expected {', '.join(IMAGE_SUFFIXES)} files")
    for path in found:
        refuse_special(path)
    return found


def image_features(
    model: EvaClip,
    files: Sequence[Path],
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> ImageFeatures:
    """Encode image files, on the device and in the precision of a model in evaluation mode;
    `batch_size` at once, twice as many are held decoded. `progress` gets the number of files done.
    Raises InputError: none of the files can be read, or features are not finite."""
    transform = image_transform(model)
    parameter = next(model.parameters())
    read: list[Path] = []
    values: list[Tensor] = []
    unreadable: dict[Path, str] = {}
    done = 0
    with ThreadPoolExecutor() as pool, torch.inference_mode():
        read_one = partial(_read_image, transform=transform)
        starts = range(0, len(files), batch_size)
        reading = (pool.map(read_one, files[at : at + batch_size]) for at in starts)
        for results, _ in pairwise(chain(reading, [None])):  # the next is read while one is used
            batch = list(results or ())
            images = {path: image for path, image in batch if isinstance(image, Tensor)}
            unreadable |= {path: str(image) for path, image in batch if path not in images}
            if images:
                pixels = torch.stack(list(images.values())).to(parameter.device, parameter.dtype)
                values.append(normalise_features(model.encode_image(pixels).cpu(), "image"))
                read += images
            done += len(batch)
            progress(done)
    if not read:
        raise InputError(f"image {files[0]} cannot be decoded ({unreadable[files[0]]})")
    return ImageFeatures(tuple(read), torch.cat(values), unreadable)


def write_features(
    path: Path, values: Tensor, names: Sequence[str], about: Mapping[str, object]
) -> None:
    """Write features [N, E] as `path` (.npy), and before them JSON beside it, with the keys of
    `about` and the `names` of rows; neither is ever seen half-written."""
    described = json.dumps({**about, "names": list(names)}, ensure_ascii=False, indent=0)
    write_atomically(names_file(path), described + "\n")
    with replace_file(path) as beside, beside.open("wb") as file:
        np.save(file, values.numpy())


def names_file(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_image(
    path: Path, transform: Callable[[Image.Image], Tensor]
) -> tuple[Path, Tensor | str]:
    try:
        return path, transform(decode_image(path.read_bytes()))
    except (UnreadableImageError, OSError) as error:
        return path, str(error)
