"""Saving and restoring checkpoints from all ranks, and the models that a stage ends with.

Saving: copies in host memory, a thread that writes them beside the training, the barriers before a
checkpoint gets its name, retention. Restoring: every shard is summed once by one rank, and all
decide alike before any tensor is touched. The files' format is weights/checkpoint_format.py's.

An object store has no rename of folders, so neither a folder nor a URL is asked for one: a
checkpoint's files have their names at once, and the manifest, put last, makes it whole.

Models: whole fp32 weights, or their running mean, from the fragments that all ranks hold.
"""

import json
import logging
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from evaclip_model.create import create_model
from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.reading.urls import is_url, open_filesystem
from evaclip_model.training.checkpoint.consensus import Peers
from evaclip_model.training.config import EMA_FOLDER, MODEL_FOLDER, TrainConfig
from evaclip_model.training.engine.engine import StateFragment
from evaclip_model.weights import checkpoint_format as form
from evaclip_model.weights.load import save_model
from evaclip_model.weights.tensor_files import SLAB_BYTES

_log = logging.getLogger(__name__)
Fragments = Sequence[StateFragment]


class CheckpointPlace:
    """Checkpoints of one run, in a folder of a file system that all ranks share or at a URL;
    nothing needs to be there yet. All methods may raise OSError."""

    def __init__(self, location: Path | str) -> None:
        """Raises: InputError: nothing installed knows this kind of URL."""
        self._is_here = not is_url(location)
        self._root = str(Path(location).absolute() if self._is_here else location).rstrip("/")
        self._files = open_filesystem(f"file://{self._root}" if self._is_here else self._root)

    def list_steps(self) -> list[int]:
        """Steps of the checkpoints that have a manifest, newest first."""
        found = self._list_files().items()
        return sorted((step for step, files in found if form.MANIFEST in files), reverse=True)

    @contextmanager
    def create_file(self, step: int, name: str) -> Iterator[BinaryIO]:
        """Yield a new file of a checkpoint in the making; it will outlast a crash of the
        machine."""
        where = self.full_name(step, name)
        self._files.makedirs(where.rpartition("/")[0], exist_ok=True)
        if not self._is_here:
            with self._files.open(where, "wb", block_size=SLAB_BYTES) as stored:
                yield stored
            return
        with Path(where).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def publish_checkpoint(self, step: int, manifest: str) -> None:
        """Make a checkpoint whole, all files of which were written."""
        if self._is_here:
            write_atomically(Path(self.full_name(step, form.MANIFEST)), manifest)
            return
        with self.create_file(step, form.MANIFEST) as file:
            file.write(manifest.encode())

    def remove_checkpoint(self, step: int) -> None:
        """Remove a checkpoint, or what was begun of it, the manifest first."""
        files = self._list_files().get(step, set())
        for name in sorted(files, key=lambda name: name != form.MANIFEST):
            self._files.rm_file(self.full_name(step, name))
        with suppress(OSError):  # object stores have no folders, and none to remove
            self._files.rmdir(f"{self._root}/{form.step_name(step)}")

    def remove_leftovers(self) -> None:
        """Remove what killed runs began and did not finish."""
        for step, files in self._list_files().items():
            if form.MANIFEST not in files:
                self.remove_checkpoint(step)

    def open_file(self, step: int, name: str) -> BinaryIO:
        where = self.full_name(step, name)
        if self._is_here:
            return Path(where).open("rb")
        opened: BinaryIO = self._files.open(where, "rb", block_size=SLAB_BYTES)
        return opened

    def full_name(self, step: int, name: str) -> str:
        return f"{self._root}/{form.step_name(step)}/{name}"

    def _list_files(self) -> dict[int, set[str]]:
        self._files.invalidate_cache()
        found: dict[int, set[str]] = {}
        with suppress(FileNotFoundError):
            for path in self._files.find(self._root):
                *_, folder, name = ["", *str(path).split("/")]
                step = form.step_of(folder)
                if step is not None and folder == form.step_name(step):
                    found.setdefault(step, set()).add(name)
        return found


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Saves in a thread: training waits only while a GPU's state is copied to host memory. State
    that lies there is copied beside the next step's gradient; `wait_for_copy` waits for that.

    Every rank makes one at the same point and calls the same methods in the same order. The threads
    agree over a process group of their own.
    """

    def __init__(
        self, location: Path | str, keep: int, keep_every_steps: int | None = None
    ) -> None:
        """Clear away what killed runs left unfinished at `location`, a folder that all ranks share
        or a URL that fsspec knows; only one run may use it. The newest `keep` checkpoints stay, and
        multiples of `keep_every_steps` for good. Raises InputError or OSError: it cannot be used.
        """
        self._place, self._peers = CheckpointPlace(location), Peers.own_group()
        self._kept = keep, keep_every_steps
        self._peers.run_on_first(self._place.remove_leftovers)
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._settled = threading.Event()
        self._settled.set()

    def allocate_copies(self, fragments: Fragments) -> None:
        """Set aside the memory for copies of `fragments`, so that the first save does not."""
        for key, tensor in _tensors_by_key(fragments).items():
            self._copy_tensor(key, tensor)  # memory is there when it was written to

    def begin_save(self, fragments: Fragments, progress: form.TrainingProgress) -> None:
        """Begin to copy the state and to write it, after the save before, whose error it raises.
        Call `wait_for_copy` before the state is changed."""
        self.wait_for_save()
        state = _tensors_by_key(fragments)
        here = {key: tensor for key, tensor in state.items() if not tensor.is_cuda}
        held = {key: self._copy_tensor(key, state[key]) for key in state.keys() - here.keys()}
        if held:
            torch.cuda.synchronize()  # copies to pinned memory go on after their call
        self._settled.clear()
        write = partial(self._write_in_background, here, held, progress)
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Return when the state of the last save is copied, and may be changed."""
        self._settled.wait()

    def has_failed(self) -> bool:
        """True when the last save has failed, as far as this rank knows; never waits. Ranks learn
        it at different times: where it is true on some rank, let all of them `wait_for_save`."""
        return self._error is not None

    def wait_for_save(self) -> None:
        """Return when the last save is whole, or was so before. Raises InputError or OSError, the
        same on every rank, when it failed; earlier checkpoints are there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """`wait_for_save`, and let go of the copies."""
        self.wait_for_copy()
        self._copies.clear()
        self.wait_for_save()

    def __exit__(self, kind: object, *_: object) -> None:
        # An error that is under way tells more.
        with nullcontext() if kind is None else suppress(Exception):
            self.close()

    def _write_in_background(
        self, own: Mapping[str, Tensor], held: Mapping[str, Tensor], progress: form.TrainingProgress
    ) -> None:
        try:
            try:
                copies = {key: self._copy_tensor(key, tensor) for key, tensor in own.items()}
            finally:
                self._settled.set()
            _write_checkpoint(self._place, self._peers, {**held, **copies}, progress, *self._kept)
        except Exception as error:  # it is raised where the training waits
            self._error = error

    def _copy_tensor(self, key: str, tensor: Tensor) -> Tensor:
        if key not in self._copies or self._copies[key].shape != tensor.shape:
            self._copies[key] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )
        return self._copies[key].copy_(tensor.detach(), non_blocking=True)


def save_checkpoint(
    location: Path | str, fragments: Fragments, progress: form.TrainingProgress, keep: int
) -> None:
    """Write a checkpoint together with all other ranks, and wait until it is whole; without memory
    of its own for fragments that lie in host memory. Raises InputError or OSError, the same on
    every rank, when it cannot be written."""
    held = {key: tensor.detach().cpu() for key, tensor in _tensors_by_key(fragments).items()}
    _write_checkpoint(CheckpointPlace(location), Peers.every_rank(), held, progress, keep)


def _write_checkpoint(
    place: CheckpointPlace,
    peers: Peers,
    tensors: Mapping[str, Tensor],
    progress: form.TrainingProgress,
    keep: int,
    keep_every_steps: int | None = None,
) -> None:
    """Write this rank's shard; when all are on disk, rank 0 makes them a checkpoint."""
    step = progress.step

    def write_own_shard() -> form.ShardFile:
        name = f"shard-{peers.rank}.safetensors"
        with place.create_file(step, name) as file:
            return form.ShardFile(name, *form.write_shard(file, tensors))

    def remove_old() -> None:
        for old in form.list_retired(place.list_steps(), step, keep, keep_every_steps):
            place.remove_checkpoint(old)

    peers.run_on_first(lambda: place.remove_checkpoint(step))
    try:
        shards = peers.run_everywhere(write_own_shard)
        manifest = form.CheckpointManifest(tuple(shards), progress).to_text()
        peers.run_on_first(lambda: place.publish_checkpoint(step, manifest))
    except Exception:
        if peers.rank == 0:
            with suppress(OSError):  # a full disk gets its room back
                place.remove_checkpoint(step)
        raise
    peers.run_on_first(remove_old)


def _tensors_by_key(fragments: Fragments) -> dict[str, Tensor]:
    return {
        form.key_of(fragment.name, fragment.offset, kind): tensor
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    }


def settings_of(config: TrainConfig, architecture: ModelConfig) -> dict[str, Any]:
    """The settings that a run's checkpoints belong to, `TrainingProgress.settings`; `architecture`
    at the size of its images."""
    return {**config.deciding, "model": architecture.model_dump(mode="json")}


def load_newest(
    location: Path | str, fragments: Fragments, settings: Mapping[str, Any]
) -> form.TrainingProgress | None:
    """Fill `fragments` from the newest checkpoint that is whole; None: there is none. Every rank
    calls it. One that is not whole is passed over, and the log says why; those of other settings or
    of a later version of this package raise InputError, unreadable places OSError."""
    place, peers = CheckpointPlace(location), Peers.every_rank()
    for step in peers.run_on_first(place.list_steps):
        where = place.full_name(step, form.MANIFEST)
        try:
            text = peers.run_on_first(partial(_read_text, place, step))
            manifest = form.CheckpointManifest.from_text(text, where)
            _require_same(manifest.progress.settings, settings, where)
            pieces = _check_shards(place, peers, step, manifest, fragments)
        except form.UnusableCheckpoint as fault:
            if peers.rank == 0:
                _log.warning("checkpoint of step %d is passed over: %s", step, fault)
            continue
        peers.run_everywhere(partial(_fill_fragments, fragments, place, step, manifest, pieces))
        return manifest.progress
    return None


def _read_text(place: CheckpointPlace, step: int) -> str:
    with place.open_file(step, form.MANIFEST) as file:
        return file.read().decode(errors="replace")


def _require_same(stored: Mapping[str, Any], present: Mapping[str, Any], where: str) -> None:
    present = json.loads(json.dumps(present))
    for name in sorted({*stored, *present}):
        if stored.get(name) != present.get(name):
            raise InputError(
                f"{where} was saved with {name} = {json.dumps(stored.get(name))}, which is "
                f"{json.dumps(present.get(name))} now: set it back, or train in another place"
            )


def _check_shards(
    place: CheckpointPlace,
    peers: Peers,
    step: int,
    manifest: form.CheckpointManifest,
    fragments: Fragments,
) -> list[form.StoredPiece]:
    """Pieces of all shards, when they are as they were written and what all ranks need; raises
    UnusableCheckpoint on every rank when they are not."""

    def check_share() -> list[form.StoredPiece] | str:
        """Pieces of the shards that fall to this rank, or what is wrong with one of them."""
        own: list[form.StoredPiece] = []
        for number in range(peers.rank, len(manifest.shards), peers.count):
            shard = manifest.shards[number]
            where = place.full_name(step, shard.name)
            try:
                with place.open_file(step, shard.name) as file:
                    own += form.checked_pieces(file, shard, number, where)
            except FileNotFoundError:
                return f"{where} is missing"
            except form.UnusableCheckpoint as fault:
                return str(fault)
        return own

    pieces: list[form.StoredPiece] = []
    for share in peers.run_everywhere(check_share):
        if isinstance(share, str):
            raise form.UnusableCheckpoint(share)
        pieces += share
    ends = [
        ((fragment.name, kind), fragment.offset + tensor.numel())
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    ]
    wanted: dict[tuple[str, str], int] = {}
    for held, end in chain.from_iterable(peers.gather_values(ends)):
        wanted[held] = max(wanted.get(held, 0), end)
    where = place.full_name(step, form.MANIFEST).removesuffix(f"/{form.MANIFEST}")
    reason = form.describe_difference(form.sizes_of(pieces, where), wanted)
    if reason is not None:
        raise form.UnusableCheckpoint(f"{where} {reason}")
    return pieces


def _fill_fragments(
    fragments: Fragments,
    place: CheckpointPlace,
    step: int,
    manifest: form.CheckpointManifest,
    pieces: Iterable[form.StoredPiece],
) -> None:
    """Read this rank's fragments, shard by shard and from front to back, a slab at a time."""
    index: dict[tuple[str, str], list[form.StoredPiece]] = defaultdict(list)
    for piece in pieces:
        index[piece.name, piece.kind].append(piece)
    reads: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for fragment in fragments:
        for kind, tensor in fragment.tensors.items():
            for piece in index[fragment.name, kind]:
                low = max(piece.offset, fragment.offset)
                high = min(piece.end, fragment.offset + tensor.numel())
                if low < high:
                    part = tensor.detach()[low - fragment.offset : high - fragment.offset]
                    begin = piece.place + (low - piece.offset) * tensor.element_size()
                    reads[piece.shard].append((begin, part))
    buffer = torch.empty(SLAB_BYTES // 4)
    for shard, parts in sorted(reads.items()):
        with place.open_file(step, manifest.shards[shard].name) as file:
            for begin, part in sorted(parts, key=lambda read: read[0]):
                file.seek(begin)
                _read_into(part, file, buffer)


def _read_into(tensor: Tensor, file: BinaryIO, buffer: Tensor) -> None:
    for done in range(0, tensor.numel(), buffer.numel()):
        part = tensor[done : done + buffer.numel()]
        slab = buffer[: part.numel()]
        into, read = form.bytes_of(slab), 0
        while read < len(into):
            count = file.readinto(into[read:])  # type: ignore[attr-defined]
            if not count:
                raise OSError(f"{file} ended early, although it was whole a moment ago")
            read += count
        part.copy_(slab)


def save_models(
    run_dir: Path, start: Path, model: EvaClip, fragments: Fragments, rank: int
) -> None:
    """Write `model/`, and `model-ema/` when the fragments have a running mean; all ranks call it.

    The files hold the fp32 masters, not their rounding; and what was frozen as `start`, the model
    that was begun with, has it. On rank 0 the model is used up: it ends in fp32 on the CPU.
    """
    folders = {"param": MODEL_FOLDER}
    if any("ema" in fragment.tensors for fragment in fragments):
        folders["ema"] = EMA_FOLDER
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in folders}
    for kind, values in found.items():
        for name, value in gather_weights(model, fragments, kind):
            if rank == 0:
                values[name] = value.cpu()
    if rank != 0:
        return
    if model.logit_scale.dtype != torch.float32:
        given = dict(create_model(model.config, weights=start).named_parameters())
        for name, parameter in model.named_parameters():
            plain = re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)
            if not parameter.requires_grad and plain in given:
                for values in found.values():
                    values[name] = given[plain]
    model.to("cpu", torch.float32)
    for kind, folder in folders.items():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(found[kind][name])
        save_model(model, run_dir / folder)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")


@torch.no_grad()
def gather_weights(
    model: nn.Module, fragments: Fragments, kind: str
) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 value, of the parameter's shape, of every parameter of the trained `model`, one
    after the other; `kind` of the fragments' tensors is "param" (the master) or "ema". Every rank
    runs through all of it, and gets the same. Frozen ones come as the model holds them."""
    held: dict[str, list[StateFragment]] = {}
    for fragment in fragments:
        held.setdefault(fragment.name, []).append(fragment)
    peers = Peers.every_rank()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter.float()
            continue
        value = torch.zeros(parameter.numel(), device=parameter.device)
        for fragment in held.get(name, []):
            piece = fragment.tensors[kind]
            value.narrow(0, fragment.offset, piece.numel()).copy_(piece)
        yield name, peers.add_up(value).view(parameter.shape)
