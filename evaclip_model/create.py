"""A model by name, and a saved model from its folder: architecture, initial values or weights,
precision and attention kernel put together."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from evaclip_model.choices import Precision
from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip, initialise_weights
from evaclip_model.model.layers import DTYPES, AttentionChoice, require_dtype
from evaclip_model.model.model_config import CONFIG_FILE, ModelConfig
from evaclip_model.weights.checkpoint_files import WEIGHTS_FILE, open_tensors
from evaclip_model.weights.load import LoadReport, load_weights

_LARGEST_ENLARGEMENT = 4
"""Of all values of the weights: the most that a position table may be resized to."""


def create_model(
    name: str | Path | Mapping[str, Any] | ModelConfig,
    *,
    weights: str | Path | None = None,
    precision: Precision = "fp32",
    seed: int | None = None,
    attention: AttentionChoice = "auto",
) -> EvaClip:
    """A model with EVA-CLIP's initial values, or with given weights.

    Args:
        name: a shipped architecture (`evaclip models`), a JSON file, a mapping or a `ModelConfig`.
        weights: a file or folder that `load_weights` reads and that holds the whole model.
        precision: dtype of the weights; RoPE tables, normalisation of features and the inverse
            temperature stay in float32.
        seed: makes the initial values repeatable without touching torch's global generator.
        attention: kernel; "auto" takes the faster one for the device and dtype.

    Raises InputError: unknown name, kernel or precision; wrong config; weights that do not fit.
    """
    if precision not in DTYPES:
        raise InputError(f"precision '{precision}' is unknown: choose one of {', '.join(DTYPES)}")
    if weights is not None:
        return load_model(name, weights, precision=precision, attention=attention)[0]
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        model = EvaClip(ModelConfig.load(name), attention)
        initialise_weights(model)
    require_dtype(attention, DTYPES[precision])
    return model.to(DTYPES[precision])


def load_model(
    name: str | Path | Mapping[str, Any] | ModelConfig,
    weights: str | Path,
    *,
    precision: Precision = "fp32",
    attention: AttentionChoice = "auto",
) -> tuple[EvaClip, LoadReport]:
    """`create_model` with weights, and what was found in them."""
    config = ModelConfig.load(name)
    _require_plausible_size(config, weights)
    with torch.device("meta"), _WithoutValues():
        model = EvaClip(config, attention)
    require_dtype(attention, DTYPES[precision])
    # Memory is taken once, in the final dtype, and filled from the file alone.
    model = model.to(DTYPES[precision]).to_empty(device=torch.get_default_device())
    return model, load_weights(model, weights)


def _require_plausible_size(config: ModelConfig, weights: str | Path) -> None:
    """Refuse an architecture that is out of proportion to its weights, before memory is taken.
    Position tables may be resized; every block has tensors of its own."""
    shapes = [tensor.shape for tensor in open_tensors(weights, shapes={}).values()]
    values = sum(shape.numel() for shape in shapes)
    vision, text, joint = config.vision, config.text, config.embed_dim
    patch = 3 * vision.patch_px**2
    # of tables and matrices that a model of this config has for certain
    claimed = max(
        vision.width * max(vision.width, vision.mlp_width, joint, patch),
        vision.width * vision.num_patches // _LARGEST_ENLARGEMENT,
        text.width * max(text.width, text.vocab_size, text.context_length, joint),
    )
    if claimed > values or vision.layers + text.layers > len(shapes):
        raise InputError(
            f"the model config claims more than {weights} holds ({values:,} values in "
            f"{len(shapes):,} tensors): give the config that belongs to these weights"
        )


class _WithoutValues(TorchFunctionMode):
    """Layers made under it draw no initial values: on the meta device that only costs time, a
    second and 36 MB for torch's decompositions."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == nn.init.__name__:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


@torch.no_grad()
def interpolate_weights(start: str | Path, end: str | Path, weight: float) -> EvaClip:
    """The model between two: every weight is (1 - `weight`) of `start`'s and `weight` of `end`'s
    (WiSE-FT, arXiv 2109.01903), in fp32 and evaluation mode.

    Args:
        start: any checkpoint that `load_weights` reads; resized to the architecture of `end`.
        end: a saved model's folder.
        weight: from 0, the start, to 1, the end.

    Raises InputError: another weight, or models that do not fit each other.
    """
    if not 0 <= weight <= 1:
        raise InputError(f"weight is {weight:g}: give a number from 0, the start, to 1, the end")
    model = open_model(end)
    beginning = dict(load_model(model.config, start)[0].named_parameters())
    for name, ours in model.named_parameters():
        if name in beginning:  # a bias that the sigmoid loss brought stays the end's
            ours.copy_(beginning[name].lerp(ours, weight))
    return model


def open_model(
    folder: str | Path, precision: Precision = "fp32", attention: AttentionChoice = "auto"
) -> EvaClip:
    """Open what `save_model` wrote, in evaluation mode; raises InputError: missing or ill-matched
    files."""
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} is not a saved model: it has no {name}; give a folder that holds "
                f"{CONFIG_FILE} and {WEIGHTS_FILE}"
            )
    weights = folder / WEIGHTS_FILE
    return create_model(folder, weights=weights, precision=precision, attention=attention).eval()
