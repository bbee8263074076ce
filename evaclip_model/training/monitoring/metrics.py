"""The figures of a training step: exchanged by all ranks, and written to `metrics.jsonl` by rank 0.

Every name in a line of `metrics.jsonl` is written here once, with its meaning and unit
(`RankMetrics`, `StepSeconds`, `step_metrics`; the objective names its own). MLflow and the terminal
read the lines.

One sum over a table in which every rank fills its own row costs as much as one over a single
number, and also says which rank was slow. The whole step takes every rank equally long, because
ranks wait for each other; the forward pass waits for nobody: a rank that is slow here is the slow
one.
"""

import json
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import profile

from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.reading.urls import open_filesystem
from evaclip_model.training.config import METRICS_FILE, TrainConfig, TrainJob
from evaclip_model.training.cost import peak_flops, train_flops_per_sample
from evaclip_model.training.engine.engine import Stepped
from evaclip_model.training.optimizer.optimizer import TOWERS
from evaclip_model.training.training_step import StepTerms, patch_dropout_at

PROFILE_FOLDER = "profile"
STRAGGLER_RATIO = 1.5
"""Times the median rank's seconds from which on a rank keeps the others waiting."""
StepMetrics = dict[str, float | None]
"""A line of `metrics.jsonl`: losses in nats, times in seconds, shares and accuracies of 1. A figure
that a step does not have (trust ratios of AdamW, MFU of an unknown device) is None, and left out of
the line. Names stay: charts and comparisons depend on them."""


@dataclass(frozen=True)
class RankMetrics:
    """Figures of one rank's samples; their means over ranks are written under the same names."""

    loss: Tensor | float
    """Mean of both directions, nats."""
    image_to_text_accuracy: Tensor | float
    """Share of images whose own caption, of the global batch's, has the highest score."""
    text_to_image_accuracy: Tensor | float
    text_tokens: Tensor | float
    """Mean length of the captions, in tokens, start and end among them."""


@dataclass(frozen=True)
class RankRow(RankMetrics):
    """All that one rank tells the others of a step; tensors [] as they come from its device."""

    finite: Tensor | float
    """1 when its own features are numbers, else 0."""
    stop: Tensor | float
    """1 when it was asked to stop, else 0."""
    save_failed: Tensor | float
    """1 when its part of the last checkpoint could not be written, else 0."""
    data_wait_s: Tensor | float
    forward_s: Tensor | float
    """Seconds of its forward passes: its work before it has to wait for other ranks."""


@dataclass(frozen=True)
class RankStats:
    """All ranks' rows, as numbers and in the order of ranks; the same on every rank."""

    rows: tuple[RankRow, ...]

    @property
    def means(self) -> dict[str, float]:
        """Mean over ranks of each of `RankMetrics`."""
        names = [field.name for field in fields(RankMetrics)]
        return {name: fmean(getattr(row, name) for row in self.rows) for name in names}

    @property
    def bad_ranks(self) -> tuple[int, ...]:
        """Ranks with features that are not numbers."""
        return tuple(rank for rank, row in enumerate(self.rows) if not row.finite)

    @property
    def stop(self) -> bool:
        return any(row.stop for row in self.rows)

    @property
    def save_failed(self) -> bool:
        return any(row.save_failed for row in self.rows)

    @property
    def slowest(self) -> tuple[int, float, float]:
        """The rank that needed longest before it met the others, its seconds, and the median."""
        own = [float(row.data_wait_s) + float(row.forward_s) for row in self.rows]
        rank = max(range(len(own)), key=own.__getitem__)
        return rank, own[rank], median(own)


def gather_stats(row: RankRow, device: torch.device) -> RankStats:
    """Tell all ranks this rank's row, and hear theirs; waits for the device, once."""
    joined = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    cells = [
        torch.as_tensor(getattr(row, field.name), dtype=torch.float64, device=device)
        for field in fields(RankRow)
    ]
    table = torch.zeros(ranks, len(cells), dtype=torch.float64, device=device)
    table[rank] = torch.stack(cells)
    if joined:
        dist.all_reduce(table)
    return RankStats(tuple(RankRow(*cells) for cells in table.tolist()))


@dataclass(frozen=True)
class StepSeconds:
    """The time of a step on this rank, from the end of the step before; the fields are metrics."""

    data_wait_s: float
    prepare_s: float
    """Captions to ids, and masks."""
    gradient_s: float
    """Forward and backward passes, the loss and the gradient norms, with waiting for other
    ranks."""
    update_s: float = 0.0
    """Verdict, clipping, optimizer."""
    save_s: float = 0.0
    """Copying the state for the checkpoint of the step before; 0 where there was none."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values(), 0.0)


@dataclass(frozen=True)
class Gradient:
    """A step's gradient, which lies with the engine and waits for a verdict."""

    terms: StepTerms
    """This rank's."""
    stats: RankStats
    """All ranks', the same on every rank."""
    norms: Mapping[str, float]
    """As `Engine.grad_norms`."""
    seconds: StepSeconds
    """Up to here."""


def step_metrics(
    *,
    step: int,
    config: TrainConfig,
    model: ModelConfig,
    lr_factor: float,
    gradient: Gradient,
    spiked: bool,
    stepped: Stepped | None,
    skipped_steps: int,
    rollbacks: int,
    device: torch.device,
) -> StepMetrics:
    """The metrics of step `step`, counted from 1; `stepped` is none when it was discarded,
    `skipped_steps` and `rollbacks` include it."""
    masked = patch_dropout_at(config, step - 1)
    stats, norms, seconds = gradient.stats, gradient.norms, gradient.seconds
    means = stats.means
    rate = config.global_batch / seconds.total
    rank_rate = rate / len(stats.rows)
    on_gpu = device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(device)) if on_gpu else None
    mfu = None
    if peak:
        tokens = means["text_tokens"]
        flops = train_flops_per_sample(model, patch_dropout=masked, text_tokens=tokens)
        mfu = rank_rate * flops / peak
    slow_rank, slowest_s, median_s = stats.slowest
    peak_lr = {"vision": config.lr_vision, "text": config.lr_text, "other": config.lr_other}
    none = (None, None, None)
    trust = {tower: stepped.trust.get(tower, none) if stepped else none for tower in TOWERS[:2]}
    return {
        # Steps attempted so far, this one included; pairs shown in them, those of steps that were
        # not taken included.
        "step": step,
        "samples": step * config.global_batch,
        **means,
        # The objective's, in the forward pass; the inverse temperature is at most 100.
        **{name: float(value) for name, value in gradient.terms.scalars.items()},
        # Of each tower's last layer; "other" is what belongs to no tower.
        **{f"lr_{tower}": peak_lr[tower] * lr_factor for tower in TOWERS},
        # 1 when the weights were updated, else 0.
        "taken": int(stepped is not None and not stepped.skipped),
        # Steps so far that did not update the weights.
        "skipped_steps": skipped_steps,
        # Norms before clipping: of the whole gradient, and of each tower's.
        "grad_norm": norms["total"],
        **{f"grad_norm_{tower}": norms[tower] for tower in TOWERS},
        # 1 when the gradient was longer than `grad_clip_norm`, else 0.
        "clipped": int(stepped is not None and stepped.clipped),
        # 1 when loss or gradient norm left their recent range, else 0.
        "spike": int(spiked),
        # Times so far that training went back to a checkpoint.
        "rollbacks": rollbacks,
        # fp16's factor on the loss in this step.
        "loss_scale": stepped.loss_scale if stepped else None,
        # LAMB's trust ratios in the tower: smallest, median, largest.
        **{
            f"trust_{which}_{tower}": ratio
            for tower, ratios in trust.items()
            for which, ratio in zip(("min", "median", "max"), ratios, strict=True)
        },
        # Share of patches masked out.
        "patch_dropout": masked,
        # Pairs a second, of all ranks and of one, which is one GPU.
        "images_per_second": rate,
        "samples_per_second_per_rank": rank_rate,
        # Model FLOP/s as a share of the devices' peak; nothing that is computed twice counts twice.
        "mfu": mfu,
        # Rank 0's.
        **asdict(seconds),
        "step_s": seconds.total,
        "forward_s": float(stats.rows[0].forward_s),
        # Data wait and forward passes of the rank that needed longest for them, and of the median
        # rank: the rest of a step is equally long for all, because they wait for each other.
        "slowest_rank_s": slowest_s,
        "median_rank_s": median_s,
        # Number of the slowest rank, when it keeps the others waiting.
        "slow_rank": slow_rank if is_straggler(slowest_s, median_s) else None,
        # Most memory that tensors took on rank 0's GPU since training began, bytes.
        "memory_peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
    }


def is_straggler(slowest_s: float, median_s: float) -> bool:
    return math.isfinite(slowest_s) and slowest_s > STRAGGLER_RATIO * median_s


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """`metrics.jsonl`, and TensorBoard's events of the same names where the job asks for them; a
    context, in which a resumed run goes on. Every rank has one, and only rank 0's writes."""

    def __init__(self, job: TrainJob, *, writes: bool) -> None:
        """Raises: InputError: events are asked for, and the package for them is not installed."""
        self._path = job.run_dir / METRICS_FILE
        self._writes = writes
        self._stored = f"{job.checkpoints}/{METRICS_FILE}" if job.checkpoints else ""
        self._file: TextIO | None = None
        self._open_board: Any = None
        self._board: Any = None
        if job.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError(
                    "tensorboard = true needs the package tensorboard: pip install "
                    "'evaclip[tensorboard]', or set it to false"
                ) from None
            self._open_board = SummaryWriter

    def __exit__(self, *_: object) -> None:
        for held in (self._file, self._board):
            if held is not None:
                held.close()
        self._file = self._board = None

    def write_line(self, metrics: StepMetrics) -> None:
        """Add a line with the time of writing, `time`, in seconds since 1970."""
        if not self._writes:
            return
        # JSON knows no other numbers.
        line = {name: v for name, v in metrics.items() if v is not None and math.isfinite(v)}
        now = time.time()
        if self._file is None:
            self._file = self._path.open("a")
        self._file.write(json.dumps({**line, "time": now}) + "\n")
        self._file.flush()
        if self._open_board is not None:
            step, folder = int(line.pop("step")), self._path.with_name("tensorboard")
            self._board = self._board or self._open_board(str(folder), purge_step=step)
            for name, value in line.items():
                self._board.add_scalar(name, value, step, walltime=now)

    def store_lines(self) -> None:
        """Put all lines beside checkpoints at a URL, from where another machine may go on."""
        if self._writes and self._stored and self._path.exists():
            files = open_filesystem(self._stored)
            files.makedirs(self._stored.rpartition("/")[0], exist_ok=True)
            files.pipe_file(self._stored, self._path.read_bytes())

    def cut_back(self, step: int) -> None:
        """Keep only the whole lines up to `step`, here or stored by another machine: what came
        after it is done again. The next event voids those of its step and later ones."""
        if not self._writes:
            return
        self.__exit__()
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        if self._stored and len(lines) < step:
            with suppress(FileNotFoundError):
                stored = open_filesystem(self._stored).cat_file(self._stored)
                lines = max(lines, stored.splitlines(keepends=True), key=len)
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
        write_atomically(self._path, b"".join(kept))

    def newest_values(self, name: str, count: int) -> list[float]:
        """The newest values of a metric, oldest first, at most `count` of them."""
        rows = [json.loads(line) for line in self._path.read_text().splitlines()]
        return [row[name] for row in rows if name in row][-count:]


class Stopwatch:
    """Seconds from one question to the next."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def take_lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


class ForwardClock:
    """Counts the seconds of a module's forward passes, on its device."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stamps: list[Any] = []
        module.register_forward_pre_hook(self._add_stamp)
        module.register_forward_hook(self._add_stamp)

    def take_seconds(self) -> float:
        """Seconds since it was read last; on a GPU it waits for the passes to end."""
        stamps, self._stamps = self._stamps, []
        pairs = zip(stamps[::2], stamps[1::2], strict=True)
        if not self._on_gpu:
            return sum((end - start for start, end in pairs), 0.0)
        stamps[-1].synchronize()
        return sum((start.elapsed_time(end) / 1000 for start, end in pairs), 0.0)

    def _add_stamp(self, *_: Any) -> None:
        if self._on_gpu:
            event: Any = torch.cuda.Event
            self._stamps.append(event(enable_timing=True))
            self._stamps[-1].record()
        else:
            self._stamps.append(time.perf_counter())


class ProfileWindow:
    """Records the first to the last of `steps`, counted from 1, of the process it is in, and writes
    `steps-FIRST-LAST.json`; none: nothing."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self._first, self._last = steps or (0, 0)
        self._folder = folder
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        if step == self._first:
            self._profile = profile(profile_memory=True)
            self._profile.start()

    def after_step(self, step: int) -> None:
        if self._profile is not None and step >= self._last:
            self._profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            trace = self._folder / f"steps-{self._first}-{step}.json"
            self._profile.export_chrome_trace(str(trace))
            self._profile = None
