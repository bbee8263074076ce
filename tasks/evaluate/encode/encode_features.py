"""Features of images and texts, in blocks on disk that any process can make and none makes twice.

A block is written beside its place, synced and renamed, and holds a hash of its content: a block
that a crash tore or that was damaged later reads as absent, and is computed again.

A text tower's features are kept in files to which later evaluations add, so sets and models that
share texts share the work. Not here: encoding itself (evaclip_model/zeroshot/encode_chunks.py).
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evaclip_model.files import replace_file
from evaclip_model.weights.tensor_files import write_tensors
from evaclip_model.zeroshot import encode_chunks as making
from evaclip_model.zeroshot.exact_ranks import build_classifier, fill_templates
from tasks.evaluate.sets.published_layout import EvalSet

IMAGE_BLOCK = 4 * making.IMAGE_CHUNK
"""Images of one file; a kill costs at most one block."""
FEATURES = "features"
_KEYS, _CUT = "keys", "cut"
_KEY_BYTES = 16
SUFFIX = ".safetensors"
_HASH = "sha256"
_USED = ".used"
"""File of a folder; its time is that of the last use of the folder."""


def write_block(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put a block in its place, whole; OSError if the disk is full."""
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path, sync=False) as beside:  # write_tensors syncs
        write_tensors(plain, beside, metadata={_HASH: _hash_tensors(plain)})


def read_block(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a block; None if the block is absent or damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = (file.metadata() or {}).get(_HASH)
    except (OSError, SafetensorError):
        return None
    return tensors if said == _hash_tensors(tensors) else None


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """Folders of blocks under one root, with a limit on their bytes together."""

    root: Path
    most_bytes: int
    """Most bytes that `remove_oldest` keeps."""

    def open_folder(self, *names: str) -> Path:
        """The folder with these names, created where missing and marked as used now."""
        folder = self.root.joinpath(*names)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _USED).touch()
        return folder

    def remove_oldest(self) -> None:
        """Remove the least recently used folders until the rest fits."""
        by_age = sorted(self.root.rglob(_USED), key=lambda mark: _stat(mark)[0], reverse=True)
        total = 0
        for mark in by_age:
            total += sum(_stat(file)[1] for file in mark.parent.iterdir())
            if total > self.most_bytes:
                shutil.rmtree(mark.parent, ignore_errors=True)


def _stat(path: Path) -> tuple[float, int]:
    """Time and bytes of a file; none where another process has removed it."""
    with suppress(OSError):
        found = path.stat()
        return found.st_mtime, found.st_size
    return 0.0, 0


class ImageBlock(NamedTuple):
    file: Path
    """Its name has the range of the images."""
    rows: range
    """Numbers of the images, in the order of the set."""

    def read(self) -> Tensor | None:
        """Unit features [rows, D]; None if the block is absent or damaged."""
        features = (read_block(self.file) or {}).get(FEATURES)
        return features if features is not None and len(features) == len(self.rows) else None


def image_blocks(folder: Path, images: int) -> list[ImageBlock]:
    rows = [range(images)[at : at + IMAGE_BLOCK] for at in range(0, images, IMAGE_BLOCK)]
    return [ImageBlock(folder / f"{one.start:09d}-{len(one)}{SUFFIX}", one) for one in rows]


def read_features(folder: Path, images: int) -> Tensor | None:
    """Unit features of all images [N, D] in the order of the set; None if a block is missing."""
    parts = [block.read() for block in image_blocks(folder, images)]
    whole = [part for part in parts if part is not None]
    return torch.cat(whole) if len(whole) == len(parts) else None


def texts_of(evalset: EvalSet) -> list[str]:
    """Every text that a set asks of a model, each once, in order."""
    if not evalset.classnames:
        return list(dict.fromkeys(evalset.captions))
    return list(dict.fromkeys(fill_templates(evalset.classnames, evalset.templates)))


class TextFeatures:
    """The features of one text tower that are on disk."""

    def __init__(self, folder: Path) -> None:
        self._row: dict[bytes, int] = {}
        self._cut: list[bool] = []
        blocks = []
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            block = read_block(path)
            if block is None or not {_KEYS, FEATURES, _CUT} <= block.keys():
                continue
            content = block[_KEYS].numpy().tobytes()
            fresh: list[int] = []
            for row in range(len(block[FEATURES])):
                key = content[row * _KEY_BYTES : (row + 1) * _KEY_BYTES]
                if key not in self._row:
                    self._row[key] = len(self._row)
                    fresh.append(row)
            blocks.append(block[FEATURES][fresh])
            self._cut += block[_CUT][fresh].tolist()
        self._features = torch.cat(blocks) if blocks else torch.empty(0)

    def missing_texts(self, texts: Sequence[str]) -> list[str]:
        return [text for text in texts if _text_key(text) not in self._row]

    def count_cut(self, texts: Sequence[str]) -> int:
        """Number of `texts` whose end the tower does not see, because its context is shorter."""
        return sum(self._cut[self._row[_text_key(text)]] for text in texts)

    def features_of(self, texts: Sequence[str]) -> Tensor:
        """Unit features [N, D], equal ones of equal texts; KeyError if one is missing."""
        return self._features[torch.tensor([self._row[_text_key(text)] for text in texts])]


def answer_features(evalset: EvalSet, features: TextFeatures) -> Tensor:
    """The features that a set's images are compared with: a classifier [C, D], or its captions
    [T, D]."""
    if not evalset.classnames:
        return features.features_of(evalset.captions)
    each = features.features_of(fill_templates(evalset.classnames, evalset.templates))
    return build_classifier(each, evalset.classnames)


def encode_texts(
    subject: making.Subject,
    texts: Sequence[str],
    folder: Path,
    rank: int = 0,
    ranks: int = 1,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Encode this rank's share of distinct `texts` into files of `folder`.

    Every rank is given the same texts and takes each `ranks`-th block, from its own number on.
    `progress` is called with the number of texts of each block. InputError if features are not
    finite.
    """
    for chunks in list(making.iterate_text_blocks(subject, texts))[rank::ranks]:
        features = torch.cat([making.encode_text_chunk(subject, chunk) for _, chunk in chunks])
        named = [texts[row] for rows, _ in chunks for row in rows]
        keys = b"".join(map(_text_key, named))
        name = hashlib.sha256(keys).hexdigest()[:32]
        stored = {
            _KEYS: torch.frombuffer(bytearray(keys), dtype=torch.uint8).reshape(-1, _KEY_BYTES),
            FEATURES: features,
            _CUT: subject.find_cut(named),
        }
        write_block(folder / f"{name}{SUFFIX}", stored)
        progress(len(named))


def _text_key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:_KEY_BYTES]
