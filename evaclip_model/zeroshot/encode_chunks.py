"""Features of images and texts, encoded in chunks of one size; and of image files.

The model always sees chunks of one size, the last padded, on one thread of a CPU: a feature is a
function of its image or text alone, bit for bit. Libraries choose another order of summation for
another size, and share rows out to threads. Texts are grouped by their exact number of tokens and
cut behind the last; a tower that is not causal gets its whole context.

Features of image files are for a person who wants them soon: in batches of any size, on all cores.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.files import refuse_special
from evaclip_model.model.clip import EvaClip
from evaclip_model.reading.image_decoder import MAX_BYTES, UnreadableImageError, decode_image
from evaclip_model.reading.samples import IMAGE_EXTENSIONS
from evaclip_model.reading.transform import image_transform
from evaclip_model.tokenizer.tokenizer import PAD_TOKEN, tokenize
from evaclip_model.zeroshot.exact_ranks import normalise_features

T = TypeVar("T")
Loaded = TypeVar("Loaded")
IMAGE_CHUNK = 64
"""Images that a model sees at once."""
TEXT_CHUNK = 32
"""Texts that a model sees at once: at ten tokens a text enough rows to be fast, and few enough to
waste little where only some texts have a length."""
TEXT_BLOCK = 16 * TEXT_CHUNK


class Subject(Protocol):
    """An open model; its features are not normalised."""

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """An image of any size and mode to [3, S, S] float32."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, S, S] to features [B, D]."""

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts to ids [N, L], L the whole context."""

    def find_cut(self, texts: Sequence[str]) -> Tensor:
        """True where a text [N] is longer than the context, so that its end is lost."""

    def count_ids(self, tokens: Tensor) -> Tensor:
        """Number of ids of each text [N, L] that decide its feature [N]: up to the end token in a
        causal tower, all of them in any other."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Ids [B, L'], cut to any length of at least `count_ids`, to features [B, D]."""


class EvaSubject:
    """A model of ours in evaluation mode; a `Subject`."""

    def __init__(self, model: EvaClip) -> None:
        scale = model.logit_scale
        self._model, self._dtype, self._device = model, scale.dtype, scale.device
        self.config, self._context = model.config, model.config.text.context_length
        self.transform = image_transform(model)
        self.tokenize = partial(tokenize, context_length=self._context)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self._model.encode_image(pixels.to(self._device, self._dtype))

    def find_cut(self, texts: Sequence[str]) -> Tensor:
        return tokenize(texts, self._context + 1)[:, -1] != PAD_TOKEN

    def count_ids(self, tokens: Tensor) -> Tensor:
        return tokens.argmax(dim=1) + 1  # the end token has the largest id

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self._model.encode_text(tokens)


@contextmanager
def exact_arithmetic(device: str) -> Iterator[None]:
    """One thread on a CPU, and no TF32: features must not depend on where they are computed.
    Pillow's warnings about odd palettes are silenced, because nobody can act on them."""
    threads, convolutions = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(matmul)


def embed_images(subject: Subject, decoded: Iterator[Tensor]) -> Tensor:
    """Unit features [N, D] of a model's inputs [3, S, S], in order, encoded a chunk at a time.
    Raises InputError: features are not finite."""
    parts = []
    while pixels := list(islice(decoded, IMAGE_CHUNK)):
        count = len(pixels)
        padded = torch.zeros(IMAGE_CHUNK, *pixels[0].shape)
        padded[:count] = torch.stack(pixels)
        with torch.inference_mode():
            encoded = subject.encode_image(padded)[:count]
            parts.append(normalise_features(encoded.cpu(), "image"))
    return torch.cat(parts) if parts else torch.empty(0, 0)


def embed_texts(subject: Subject, texts: Sequence[str]) -> Tensor:
    """Unit features of `texts` [N, D], in order. Raises InputError: features are not finite."""
    rows: list[int] = []
    parts = []
    for chunks in iterate_text_blocks(subject, texts):
        rows += [row for chunk_rows, _ in chunks for row in chunk_rows]
        parts += [encode_text_chunk(subject, tokens) for _, tokens in chunks]
    return torch.cat(parts)[torch.argsort(torch.tensor(rows))]


def iterate_text_blocks(
    subject: Subject, texts: Sequence[str]
) -> Iterator[list[tuple[Sequence[int], Tensor]]]:
    """Chunks (rows of `texts`, their ids cut to one length), a block at a time."""
    tokens = subject.tokenize(texts)
    lengths = subject.count_ids(tokens)
    block: list[tuple[Sequence[int], Tensor]] = []
    held = 0
    for length in sorted(set(lengths.tolist())):
        rows = torch.nonzero(lengths == length).flatten()
        for part in torch.split(rows, TEXT_CHUNK):
            block.append((part.tolist(), tokens[part, :length]))
            held += len(part)
            if held + TEXT_CHUNK > TEXT_BLOCK:
                yield block
                block, held = [], 0
    if block:
        yield block


def encode_text_chunk(subject: Subject, tokens: Tensor) -> Tensor:
    """Unit features [B, D] of ids [B, L], encoded as a whole chunk."""
    padding = tokens[-1:].expand(TEXT_CHUNK - len(tokens), -1)
    with torch.inference_mode():
        encoded = subject.encode_text(torch.cat([tokens, padding]))[: len(tokens)]
        return normalise_features(encoded.cpu(), "text")


IMAGE_SUFFIXES = tuple(f".{kind}" for kind in (*IMAGE_EXTENSIONS, "heic", "ico", "jp2", "jxl"))
"""Endings, in any case, of images in a folder, also of forms that are named but not opened."""


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
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Path], Tensor, dict[Path, str]]:
    """Encode image files, on the device and in the precision of a model in evaluation mode;
    `batch_size` at once, twice as many are held decoded. Returns those that could be read, in their
    order, fp32 unit vectors [N, E], and why the others could not. `progress` gets the number of
    files done. Raises InputError: none can be read, or features are not finite."""
    parameter, values = next(model.parameters()), list[Tensor]()
    load = partial(load_image, transform=image_transform(model))
    read: list[Path] = []
    unreadable: dict[Path, str] = {}

    def decode(pool: Executor) -> Iterator[Tensor]:
        loaded = load_ahead(pool, load, iter(files), batch_size)
        for done, (file, image) in enumerate(loaded, 1):
            if isinstance(image, Tensor):
                read.append(file)
                yield image
            else:
                unreadable[file] = str(image)
            progress(done)

    with ThreadPoolExecutor() as pool, torch.inference_mode():
        decoded = decode(pool)
        while batch := list(islice(decoded, batch_size)):
            pixels = torch.stack(batch).to(parameter.device, parameter.dtype)
            values.append(normalise_features(model.encode_image(pixels).cpu(), "image"))
    if not read:
        raise InputError(f"image {files[0]} cannot be decoded ({unreadable[files[0]]})")
    return read, torch.cat(values), unreadable


def load_ahead(
    pool: Executor, load: Callable[[T], Loaded], items: Iterator[T], at_once: int
) -> Iterator[tuple[T, Loaded]]:
    """Items with what `load` makes of each; the next `at_once` are read while some are used."""
    chunks = iter(lambda: [*islice(items, at_once)], [])
    loading = (zip(chunk, pool.map(load, chunk), strict=True) for chunk in chunks)
    for loaded, _ in pairwise(chain(loading, [None])):
        yield from loaded or ()


def load_image(image: Any, transform: Callable[[Image.Image], Tensor]) -> Tensor | str | None:
    """The pixels of a file or its content as a model takes them, or in words why there are none;
    such words, and None, as they are."""
    if image is None or isinstance(image, str):
        return image
    try:
        if isinstance(image, Path):
            if not image.is_file() or image.stat().st_size > MAX_BYTES:
                return "too_large" if image.is_file() else "missing_file"
            image = image.read_bytes()
        return transform(decode_image(image))
    except (UnreadableImageError, OSError) as error:
        return str(error)
