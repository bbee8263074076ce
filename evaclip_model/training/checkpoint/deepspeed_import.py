"""DeepSpeed's training checkpoints as ones of ours: ZeRO stage 1 and 2 of any number of ranks, and
universal ones (`zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt`); ZeRO-3 and model-parallel ones are
refused. Weights alone are read by weights/load.py.

The files are pickles. They are opened with torch's restricted reader and stand-ins for the few
classes that DeepSpeed puts in, so that no code of theirs is run; and mapped into memory rather than
read, so that what is written piece by piece never lies in memory whole.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.training.checkpoint.save_and_load import save_checkpoint, settings_of
from evaclip_model.training.checkpoint.storage import CheckpointPlace
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine.engine import SCALER_FIELDS, StateFragment
from evaclip_model.weights.checkpoint_files import DEEPSPEED_STATES, find_newest_deepspeed
from evaclip_model.weights.checkpoint_format import TrainingProgress
from evaclip_model.weights.name_maps import Entry, native_names

_OPTIMIZER_STATES = (
    "zero_pp_rank_{}_mp_rank_00_optim_states.pt",
    "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt",
)
"""Of rank {}; DeepSpeed names those of a bf16 run in a way of its own."""
_KINDS = {"fp32": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""A universal checkpoint's files -> our names."""
Pieces = Sequence[Mapping[str, Tensor]]
"""Of one parameter, in order: our kind -> [n] fp32."""


def import_checkpoint(
    source: Path, location: Path | str, config: TrainConfig, architecture: ModelConfig
) -> TrainingProgress:
    """Make a checkpoint of ours out of DeepSpeed's in the folder `source` (or the one with the file
    `latest`), from which any number of ranks goes on with `config`; `location` must hold none yet.

    The step is DeepSpeed's count of optimizer steps: the learning rate and the data go on behind
    it. With `ema_decay` the running mean starts at the weights.

    Raises:
        InputError: no such checkpoint, cut off or with objects that are not let in; other
            parameters or shapes than the architecture's; the location holds checkpoints.
        OSError: it cannot be written.
    """
    if CheckpointPlace(location).list_steps():
        raise InputError(f"{location} holds checkpoints already: give a location without any")
    if (source / "zero").is_dir():
        found = _read_universal(source)
    else:
        found = _read_zero(find_newest_deepspeed(source) or source)
    progress = TrainingProgress(
        step=found.step,
        counters={"updates": found.updates, "scaler": dict(found.scaler)},
        bad_samples={},
        seconds=0.0,
        settings=settings_of(config, architecture.at_image_px(config.image_px)),
        samples=found.step * config.global_batch,
    )
    fragments = []
    for name, pieces in _of_model(found, source, config, architecture).items():
        offset = 0
        for tensors in pieces:
            mean = {} if config.ema_decay is None else {"ema": tensors["param"]}
            fragments.append(StateFragment(name, offset, {**tensors, **mean}))
            offset += tensors["param"].numel()
    save_checkpoint(location, fragments, progress, keep=sys.maxsize)
    return progress


@dataclass(frozen=True)
class _Found:
    """A checkpoint of DeepSpeed's; tensors are mapped from its files."""

    shapes: Mapping[str, torch.Size]
    pieces: Mapping[str, Pieces]
    step: int
    updates: int
    scaler: Mapping[str, Any]
    """The fp16 loss scaler's fields; empty in other precisions."""


def _read_zero(folder: Path) -> _Found:
    """ZeRO-1 and ZeRO-2: every rank's file holds its cut of each group's flat tensors."""
    model = _open_file(folder / DEEPSPEED_STATES)
    others = sorted(folder.glob("*mp_rank_01*"))
    if others:
        raise InputError(f"{others[0]} is of a model-parallel run: join it with DeepSpeed's tools")
    with _well_formed(folder):
        ranks = int(model["dp_world_size"])
        shapes = dict(chain.from_iterable(group.items() for group in model["param_shapes"]))
        states = [
            _open_file(_of_rank(folder, rank))["optimizer_state_dict"] for rank in range(ranks)
        ]
        pieces: dict[str, list[Mapping[str, Tensor]]] = {name: [] for name in shapes}
        for state in states:
            if int(state.get("zero_stage", 1)) > 2:
                raise InputError(f"{folder} is of ZeRO stage 3: convert it to a universal one")
            for group, mapping in enumerate(state["param_slice_mappings"]):
                moments = state["base_optimizer_state"]["state"][group]
                flat = {
                    "param": state["single_partition_of_fp32_groups"][group],
                    "exp_avg": moments["exp_avg"],
                    "exp_avg_sq": moments["exp_avg_sq"],
                }
                for name, cut in mapping.items():
                    pieces[name].append(
                        {
                            kind: tensor.detach().narrow(0, int(cut.start), int(cut.numel)).float()
                            for kind, tensor in flat.items()
                        }
                    )
        first = states[0]
        optimizer = first["base_optimizer_state"]
        return _Found(
            shapes,
            pieces,
            int(model["global_steps"]),
            _count_updates(optimizer["state"][0], optimizer["param_groups"][0]),
            _read_scaler(first),
        )


def _read_universal(folder: Path) -> _Found:
    model = _open_file(folder / DEEPSPEED_STATES)
    state = _open_file(folder / "zero" / "optimizer_state.pt")
    with _well_formed(folder):
        shapes, pieces = {}, {}
        for name, shape in chain.from_iterable(group.items() for group in model["param_shapes"]):
            files = {kind: folder / "zero" / name / f"{file}.pt" for file, kind in _KINDS.items()}
            content = {kind: _open_file(file) for kind, file in files.items()}
            shapes[name] = shape
            pieces[name] = [
                {
                    kind: (held["param"] if isinstance(held, Mapping) else held)
                    .detach()
                    .float()
                    .reshape(-1)
                    for kind, held in content.items()
                }
            ]
        steps = folder / "zero" / next(iter(shapes)) / "step.pt"
        held = {"step": _open_file(steps)} if steps.is_file() else {}
        return _Found(
            shapes,
            pieces,
            int(model["global_steps"]),
            _count_updates(held, state["param_groups"][0]),
            _read_scaler(state),
        )


def _of_rank(folder: Path, rank: int) -> Path:
    paths = [folder / name.format(rank) for name in _OPTIMIZER_STATES]
    return next((path for path in paths if path.is_file()), paths[0])


def _count_updates(*held: Mapping[str, Any]) -> int:
    """Updates done, where the optimizer counts them: beside its moments, or in its group."""
    found = [int(values["step"]) for values in held if "step" in values]
    return found[0]


def _read_scaler(state: Mapping[str, Any]) -> dict[str, Any]:
    if not state.get("dynamic_loss_scale"):
        return {}
    fields = vars(state["loss_scaler"])
    return {name: fields[name] for name in SCALER_FIELDS if name in fields}


def _of_model(
    found: _Found, source: Path, config: TrainConfig, architecture: ModelConfig
) -> dict[str, Pieces]:
    """The pieces under the names of what is trained, each parameter's elements in our order."""
    with torch.device("meta"):
        model = EvaClip(architecture.at_image_px(config.image_px))
    wanted = {
        name: value.shape for name, value in model.named_parameters() if not config.is_frozen(name)
    }
    names = native_names(found.pieces, where=str(source))
    entries = {entry.native: entry for entry in names.entries}
    known = {name for name, _ in model.named_parameters()}
    for name in [*sorted(wanted.keys() - entries.keys()), *sorted(entries.keys() - known)]:
        verb = "lacks" if name in wanted else "holds"
        raise InputError(
            f"{source} {verb} the state of '{name}', unlike the architecture: choose the one it "
            "was trained with"
        )
    pieces = {}
    for name, shape in wanted.items():
        held = entries[name].native_shape(found.shapes)
        if torch.Size(held).numel() != shape.numel():
            raise InputError(
                f"{source} holds '{name}' in shape {list(held)}, and the architecture has "
                f"{list(shape)}: choose the one it was trained with"
            )
        pieces[name] = _join_pieces(entries[name], found)
    return pieces


def _join_pieces(entry: Entry, found: _Found) -> Pieces:
    if entry.join == "same":
        return found.pieces[entry.sources[0]]
    kinds = found.pieces[entry.sources[0]][0]
    return [
        {
            kind: entry.join_sources(
                {
                    key: torch.cat([piece[kind] for piece in found.pieces[key]]).view(
                        found.shapes[key]
                    )
                    for key in entry.sources
                }
            ).reshape(-1)
            for kind in kinds
        }
    ]


class _Cut:
    """Stands in for DeepSpeed's place of a parameter in a flat tensor."""

    start: int
    numel: int


class _Fields:
    """Stands in for DeepSpeed's loss scalers: their fields, without what they do."""


_LET_IN: list[Any] = [
    (_Cut, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Fields, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Fields, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def _open_file(path: Path) -> Any:
    """Content of a file of DeepSpeed's, its tensors mapped from the disk."""
    if not path.is_file():
        raise InputError(
            f"{path} is missing: give the folder of a DeepSpeed checkpoint with its optimizer state"
        )
    try:
        with torch.serialization.safe_globals(_LET_IN):
            strangers = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if strangers:
                raise InputError(
                    f"{path} holds objects of {strangers[0]}, and opening it would run pickled "
                    "code: save the checkpoint again without them"
                )
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except InputError:
        raise
    except Exception as error:  # malformed content can make torch's reader stumble in any way
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}): it is cut off or no torch file; copy "
            "it again"
        ) from error


@contextmanager
def _well_formed(folder: Path) -> Iterator[None]:
    """Turn whatever DeepSpeed's files lack into one sentence."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{folder} is not a ZeRO-1, ZeRO-2 or universal checkpoint with Adam's or LAMB's "
            f"moments ({error!r}): give one of those"
        ) from error
