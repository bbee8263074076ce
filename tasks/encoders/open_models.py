"""Any model behind one interface: ours, a released file, one of open_clip's or of transformers'.

FOLDER                     a saved model
PATH:ARCHITECTURE          weights of any layout that `load_weights` reads, as an architecture
open_clip:NAME/WEIGHTS     a model of open_clip's, with a file or one of its pretrained tags
open_clip:local-dir:FOLDER the same, as open_clip_config.json in the folder describes it
transformers:FOLDER        a CLIP or SigLIP as its library saves them, or ORG/NAME at its hub
"""

import hashlib
import importlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evaclip_model.choices import Precision
from evaclip_model.config import Config
from evaclip_model.create import create_model, open_model
from evaclip_model.errors import InputError, shorten_error
from evaclip_model.model.model_config import CONFIG_FILE, ModelConfig, list_models
from evaclip_model.reading.transform import describe_preprocessing
from evaclip_model.training.cost import image_flops
from evaclip_model.weights.checkpoint_files import WEIGHTS_FILE, open_tensors
from evaclip_model.weights.load import PREPROCESSING_FILE
from evaclip_model.weights.name_maps import native_names
from evaclip_model.zeroshot.encode_chunks import EvaSubject, Subject
from tasks.artifacts.artifact import DIGEST_CHARS, sha256_of

OPEN_CLIP = "open_clip:"
TRANSFORMERS = "transformers:"
_OPERATORS = ("nms", "qnms")
_kept: list[Any] = []  # described operators go when what described them does


class Identity(Config):
    """A model by its content, whatever folder holds it."""

    digest: str
    """Of architecture and weights."""
    text_digest: str
    """Of the text tower's architecture, weights and tokenizer: models that share it share text
    features."""
    transform_digest: str
    """Of `describe_preprocessing`."""
    architecture: str
    params: int
    """Of both towers."""
    gflops: float | None
    """Of one image, in billions; a FLOP is half a multiply-add of a matrix product."""
    source: str
    sha256: str = ""
    """Of its file of weights, where it has one of its own."""
    preprocessing: dict[str, Any]
    warnings: tuple[str, ...] = ()
    """Sentences that a reader of its figures should know."""


def digest_of(value: Any) -> str:
    """16 hex digits over anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]


@dataclass(frozen=True)
class Library:
    """A library whose models are evaluated, as they are named behind its prefix."""

    open_subject: Callable[[str, str, Precision], Subject]
    """Of a name, a device and a precision."""
    identify: Callable[[str], Identity]
    list_files: Callable[[str], list[Path]]
    """The files on this machine that decide what a name means."""


def open_subject(spec: str, *, device: str = "cpu", precision: Precision = "fp32") -> Subject:
    """Open a model to encode on `device`. Raises InputError: no such model, or other weights."""
    if library := _find_library(spec):
        return library.open_subject(spec.partition(":")[2], device, precision)
    path, architecture = _split_spec(spec)
    model = (
        create_model(architecture, weights=path, precision=precision)
        if architecture
        else open_model(path, precision=precision)
    )
    return EvaSubject(model.eval().to(device))


def device_of(device: str, rank: int) -> str:
    """The device of a rank, of those of its machine. InputError: it has none of that kind."""
    if device != "cuda":
        return device
    if not torch.cuda.is_available():
        raise InputError(
            f"{socket.gethostname()} has no GPU that torch can use: set EVACLIP_EVALUATE_GPUS=0 "
            "to encode on CPUs"
        )
    return f"cuda:{rank % torch.cuda.device_count()}"


def count_workers(workers: int | None, device: str) -> int:
    """Threads of a rank that decode: as many as are set, or the cores that its machine's GPUs
    leave; a rank on a CPU, which has one core, decodes by itself."""
    if workers is not None or device == "cpu":
        return workers or 0
    return max(1, len(os.sched_getaffinity(0)) // torch.cuda.device_count() - 1)


def files_of(spec: str) -> list[Path]:
    if library := _find_library(spec):
        return library.list_files(spec.partition(":")[2])
    path = _split_spec(spec)[0]
    return sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]


def _find_library(spec: str) -> Library | None:
    """The library that a specification's prefix names, imported only then."""
    if spec.startswith(OPEN_CLIP):
        from tasks.encoders import open_clip_model

        return open_clip_model.LIBRARY
    if spec.startswith(TRANSFORMERS):
        from tasks.encoders import transformers_model

        return transformers_model.LIBRARY
    return None


def identify_module(
    subject: Subject,
    model: torch.nn.Module,
    *,
    name: str,
    source: str,
    tokenizer: str,
    image_prefixes: tuple[str, ...],
    preprocessing: dict[str, Any],
    weights: Path | None,
    warnings: tuple[str, ...] = (),
) -> Identity:
    """The identity of another library's model, which is loaded: an architecture called `name`, of
    whose weights no text passes those that begin with `image_prefixes`."""
    state = model.state_dict()
    texts = {key: value for key, value in state.items() if not key.startswith(image_prefixes)}
    return Identity(
        digest=_digest_state(name, state),
        text_digest=_digest_state(f"{name} {tokenizer}", texts),
        transform_digest=digest_of(preprocessing),
        architecture=f"{source.partition(':')[0]} {name}",
        params=sum(value.numel() for value in model.parameters()),
        gflops=_count_gflops(subject),
        source=source,
        sha256=sha256_of(weights) if weights else "",
        preprocessing=preprocessing,
        warnings=warnings,
    )


def _digest_state(about: str, state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:DIGEST_CHARS]


def _count_gflops(subject: Subject) -> float:
    pixels = subject.transform(Image.new("RGB", (8, 8)))[None]
    # What is fused is not counted; the plain formula's products are.
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.inference_mode(), plain, FlopCounterMode(display=False) as counter:
        subject.encode_image(torch.zeros_like(pixels))
    torch.backends.mha.set_fastpath_enabled(fused)
    return round(int(counter.get_total_flops()) / 1e9, 6)


def architecture_name(config: ModelConfig) -> str:
    """Name of the shipped architecture a config is, whatever its image size, and that size."""
    px = config.vision.image_px
    for name in list_models():
        shipped = ModelConfig.load(name)
        if shipped.vision.patch_px == config.vision.patch_px and shipped.at_image_px(px) == config:
            return f"{name} at {px} px"
    return f"own architecture at {px} px"


def identify_model(spec: str) -> Identity:
    """The identity of a model, read anew. Raises InputError: no such model, or its preprocessing is
    not the one it was trained with."""
    if library := _find_library(spec):
        return library.identify(spec.partition(":")[2])
    path, architecture = _split_spec(spec)
    for name in () if architecture else (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise InputError(f"{path} is not a saved model: {path / name} is missing")
    config = ModelConfig.load(architecture or path)
    weights = path if architecture else path / WEIGHTS_FILE
    stored = open_tensors(weights, shapes={})
    entries = sorted(native_names(stored, where=str(path)).entries, key=lambda one: one.native)
    text = hashlib.sha256(config.text.model_dump_json().encode())
    whole = hashlib.sha256(config.model_dump_json().encode())
    parameters = 0
    for entry in entries:
        for source in entry.sources:
            tensor = stored[source]
            parameters += tensor.shape.numel()
            about: Any = f"{entry.native} {entry.join} {tensor.dtype}\n".encode()
            pieces = (one.contiguous().view(torch.uint8).numpy().data for one in tensor.pieces())
            for part in chain([about], pieces):
                whole.update(part)
                if entry.native.startswith("text."):
                    text.update(part)
    used = describe_preprocessing(config.vision.image_px)
    return Identity(
        digest=whole.hexdigest()[:DIGEST_CHARS],
        text_digest=text.hexdigest()[:DIGEST_CHARS],
        transform_digest=digest_of(used),
        architecture=architecture_name(config),
        params=parameters,
        gflops=round(image_flops(config) / 1e9, 6),
        source=spec,
        sha256=sha256_of(weights),
        preprocessing=used,
        warnings=_list_differences(path, used),
    )


def _list_differences(path: Path, used: Mapping[str, Any]) -> tuple[str, ...]:
    """Differences between the recorded preprocessing of training and the one done here. Raises
    InputError: pixels would have other values than in training."""
    recorded = (path if path.is_dir() else path.parent) / PREPROCESSING_FILE
    if not recorded.is_file():
        return ()
    said = json.loads(recorded.read_text())
    other = sorted(name for name in used if said.get(name, used[name]) != used[name])
    if set(other) & {"mean", "std"}:
        raise InputError(
            f"{recorded} says that the model was trained on images normalised by mean "
            f"{said.get('mean')} and std {said.get('std')}, which is not done here: correct that "
            "file if it is wrong, or evaluate the model with what trained it"
        )
    return tuple(
        f"preprocessing differs from the model's own: {name} is {used[name]}, was {said[name]}"
        for name in other
    )


def _split_spec(spec: str) -> tuple[Path, str]:
    """Path and architecture of a model of ours; "" for a saved folder, which records it."""
    if Path(spec).is_file():
        raise InputError(
            f"{spec} is a file of weights: say its architecture too, as {spec}:EVA02-CLIP-B-16 "
            f"(one of {', '.join(list_models())}, or a .json file)"
        )
    path, colon, architecture = spec.rpartition(":")
    return (Path(path), architecture) if colon and not Path(spec).exists() else (Path(spec), "")


def import_torchvision(module: str = "") -> ModuleType:
    """`torchvision`, or the module of this name in it. Raises ImportError: it is not installed;
    RuntimeError: it does not fit torch for another reason."""
    name = f"torchvision.{module}" if module else "torchvision"
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _kept:
            raise
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for one in _OPERATORS:
            library.define(f"{one}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        return importlib.import_module(name)


@contextmanager
def explain_import(library: str, needed: str) -> Iterator[None]:
    """The import of a library that looks for torchvision; an InputError says what is `needed`."""
    try:
        with suppress(ImportError):
            import_torchvision()
        yield
    except (ImportError, RuntimeError) as error:
        why = shorten_error(error)
        raise InputError(f"{library} cannot be imported ({why}): install {needed}") from error
