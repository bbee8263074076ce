"""DeepSpeed's training checkpoints as ones of ours: ZeRO stage 1 and 2 of any number of ranks, and
universal ones (`zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt`); ZeRO-3 and model-parallel ones are
refused. Weights alone are read by weights/load.py.

The files are pickles. They are opened with torch's restricted reader and stand-ins for the few
classes that DeepSpeed puts in, so that no code of theirs is run; and mapped into memory rather than
read, so that what is written piece by piece never lies in memory whole.
"""

import sys
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.training.checkpoint import save_and_load
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine.engine import SCALER_FIELDS, StateFragment
from evaclip_model.training.optimizer.optimizer import MOMENTS
from evaclip_model.weights.checkpoint_files import DEEPSPEED_STATES, find_newest_deepspeed
from evaclip_model.weights.checkpoint_format import TrainingProgress
from evaclip_model.weights.name_maps import native_names

Pieces = Sequence[Mapping[str, Tensor]]
"""Of one parameter, in order: our kind -> [n] fp32."""
_State = Mapping[str, Any]


def import_checkpoint(
    source: Path, location: Path | str, config: TrainConfig, architecture: ModelConfig
) -> TrainingProgress:
    """Make a checkpoint of ours out of DeepSpeed's in the folder `source` (or the one with the file
    `latest`), from which any number of ranks goes on with `config`; `location` must hold none yet.

    The step is DeepSpeed's count of optimizer steps: the learning rate and the data go on behind
    it. With `ema_decay` the running mean starts at the weights. Raises InputError where the
    checkpoint or the location cannot be used.
    """
    if save_and_load.CheckpointPlace(location).list_steps():
        raise InputError(f"{location} holds checkpoints already: give a location without any")
    is_universal = (source / "zero").is_dir()
    folder = source if is_universal else find_newest_deepspeed(source) or source
    model = _open_file(folder / DEEPSPEED_STATES)
    with _well_formed(folder):
        step = int(model["global_steps"])
        shapes = dict(chain.from_iterable(group.items() for group in model["param_shapes"]))
        read = _read_universal if is_universal else _read_zero
        found, state, counted = read(folder, model, shapes)
        updates = int(counted["step"])
    scaler = vars(state["loss_scaler"]) if state.get("dynamic_loss_scale") else {}  # fp16 has one
    scaler = {name: scaler[name] for name in SCALER_FIELDS if name in scaler}
    progress = TrainingProgress(
        step=step,
        counters={"updates": updates, "scaler": scaler},
        bad_samples={},
        seconds=0.0,
        settings=save_and_load.settings_of(config, architecture.at_image_px(config.image_px)),
        samples=step * config.global_batch,
    )
    fragments = []
    for name, pieces in _name_pieces(found, shapes, source, config, architecture).items():
        offset = 0
        for tensors in pieces:
            mean = {} if config.ema_decay is None else {"ema": tensors["param"]}
            fragments.append(StateFragment(name, offset, {**tensors, **mean}))
            offset += tensors["param"].numel()
    save_and_load.save_checkpoint(location, fragments, progress, keep=sys.maxsize)
    return progress


def _read_zero(
    folder: Path, model: _State, shapes: Iterable[str]
) -> tuple[dict[str, Pieces], _State, _State]:
    """ZeRO-1 and ZeRO-2: every rank's file holds its cut of each group's flat tensors. Returns the
    pieces, a rank's other state, and `step`, the updates done, which the optimizer counts beside
    its moments or in its group."""
    others = sorted(folder.glob("*mp_rank_01*"))
    if others:
        raise InputError(f"{others[0]} is of a model-parallel run: join it with DeepSpeed's tools")
    pieces: dict[str, list[Mapping[str, Tensor]]] = {name: [] for name in shapes}
    states = []
    for rank in range(int(model["dp_world_size"])):
        file = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"  # after "bf16_" where it is that
        path = next(folder.glob(f"*{file}"), folder / file)
        states.append(state := _open_file(path)["optimizer_state_dict"])
        if int(state.get("zero_stage", 1)) > 2:
            raise InputError(f"{folder} is of ZeRO stage 3: convert it to a universal one")
        for group, mapping in enumerate(state["param_slice_mappings"]):
            moments = state["base_optimizer_state"]["state"][group]
            flat = {"param": state["single_partition_of_fp32_groups"][group]}
            flat |= {kind: moments[kind] for kind in MOMENTS}
            for name, cut in mapping.items():
                pieces[name].append(
                    {
                        kind: tensor.detach().narrow(0, int(cut.start), int(cut.numel)).float()
                        for kind, tensor in flat.items()
                    }
                )
    base = states[0]["base_optimizer_state"]
    return {**pieces}, states[0], ChainMap(base["state"][0], base["param_groups"][0])


def _read_universal(
    folder: Path, model: _State, shapes: Iterable[str]
) -> tuple[dict[str, Pieces], _State, _State]:
    state = _open_file(folder / "zero" / "optimizer_state.pt")

    def read_piece(name: str, file: str) -> Tensor:
        held = _open_file(folder / "zero" / name / f"{file}.pt")
        values: Tensor = held["param"] if isinstance(held, Mapping) else held
        return values.detach().float().reshape(-1)

    files = {"param": "fp32", **dict(zip(MOMENTS, MOMENTS, strict=True))}
    pieces: dict[str, Pieces] = {
        name: [{kind: read_piece(name, file) for kind, file in files.items()}] for name in shapes
    }
    steps = folder / "zero" / next(iter(shapes)) / "step.pt"
    counted = {"step": _open_file(steps)} if steps.is_file() else {}
    return pieces, state, ChainMap(counted, state["param_groups"][0])


def _name_pieces(
    found: Mapping[str, Pieces],
    shapes: Mapping[str, torch.Size],
    source: Path,
    config: TrainConfig,
    architecture: ModelConfig,
) -> dict[str, Pieces]:
    """The pieces under the names of what is trained, each parameter's elements in our order."""
    with torch.device("meta"):
        model = EvaClip(architecture.at_image_px(config.image_px))
    known = {name: value.shape for name, value in model.named_parameters()}
    wanted = {name: shape for name, shape in known.items() if not config.is_frozen(name)}
    entries = {entry.native: entry for entry in native_names(found, where=str(source)).entries}
    for name in [*sorted(wanted.keys() - entries.keys()), *sorted(entries.keys() - known.keys())]:
        verb = "lacks" if name in wanted else "holds"
        raise InputError(
            f"{source} {verb} the state of '{name}', unlike the architecture: choose the one it "
            "was trained with"
        )
    named: dict[str, Pieces] = {}
    for name, shape in wanted.items():
        entry = entries[name]
        held = entry.native_shape(shapes)
        if torch.Size(held).numel() != shape.numel():
            raise InputError(
                f"{source} holds '{name}' in shape {list(held)}, and the architecture has "
                f"{list(shape)}: choose the one it was trained with"
            )
        if entry.join == "same":
            named[name] = found[entry.sources[0]]
            continue
        joined = {}
        for kind in found[entry.sources[0]][0]:
            sources = {
                key: torch.cat([piece[kind] for piece in found[key]]).view(shapes[key])
                for key in entry.sources
            }
            joined[kind] = entry.join_sources(sources).reshape(-1)
        named[name] = [joined]
    return named


class _Fields:
    """Stands in for DeepSpeed's loss scalers and places in flat tensors: fields, without code."""


_LET_IN: list[Any] = [
    (_Fields, "deepspeed.utils.tensor_fragment.fragment_address"),
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
            if not strangers:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # malformed content can make torch's reader stumble in any way
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}): it is cut off or no torch file; copy "
            "it again"
        ) from error
    raise InputError(
        f"{path} holds objects of {strangers[0]}, and opening it would run pickled code: save the "
        "checkpoint again without them"
    )


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
