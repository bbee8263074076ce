"""Cost of a recipe: rows, bytes, machines, days, GPU memory, price, each with its origin. Not here:
FLOPs and memory themselves (evaclip_model/training/cost.py), how much sources give
(flows/config/recipe.py), one run's plan and disk check (run_plan.py)."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import TypeAdapter
from rich.table import Table

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.reading.order import Mixture, count_parts, share_of_batch
from evaclip_model.training import cost
from evaclip_model.training.config import TrainConfig, feature_bytes, find_architecture
from evaclip_model.training.engine.deepspeed_config import deepspeed_config
from flows.config.recipe import (
    SHARE_SELECTED,
    Machines,
    Recipe,
    expected_samples,
    planned_stages,
    source_yields,
)
from tasks.download.shards import expected_bytes
from tasks.progress import format_bytes

LARGE_ROWS = 1_000_000  # from here on an estimate is worth its lines
METADATA_BYTES_PER_ROW = 222  # Re-LAION-2B: 467 GB of parquet for 2.1 billion rows
BALANCED_ROWS_PER_CPU_S = 85_000  # of those that pass; `make bench-balance`
WAITING_BYTES = 245
"""Temporary disk of a row read, until its partition is written; `make bench-merge`."""
READ_PER_PROCESS_S = 2_000
"""Images of 256 px that a process reads, decodes and crops to 224 px; `make bench-loader`."""
GIB = 2**30
USABLE_SHARE = 0.92  # of a GPU's memory, so that what the allocator cannot use in pieces has room
TABLE_6_SHARE = {"whole images": 0.28879, "half of the patches masked": 0.22586}
"""Of an A100's peak, what is computed again included: EVA01-CLIP-B/16 took 76 and 55 minutes for 40
million samples on 16 of them, with flash attention and gradient checkpointing (paper, Table 6)."""
RECOMPUTED = {"none": 0.0, "selective": 0.6, "full": 1.0}
"""Forward passes' worth of time spent again by gradient checkpointing; "selective" as measured in
bf16, where it costs a fifth of a step (make bench-model)."""
ADOPTED_PX = 512  # side of adopted images that a plan counts with: nobody has looked at them yet
READ_AHEAD_STEPS = 2  # steps whose pixels a rank holds: the one that is trained on, and the next
NEAR_BYTES = 90  # of memory a sample that near duplicates take, whatever memory_limit says
NEW_SHARE = 0.02
"""Of all data, what a week adds to it: a fiftieth."""


class StageLaw(Config):
    """The cost of a data stage, as `make bench-scale` and the other benchmarks find it: in
    proportion to the data, up to sizes beyond a recipe's."""

    stage: str
    per: Literal["row read", "row tried", "sample", "shard"]
    cpu_s: float
    """Of one core, for each of them."""
    shared_by: Literal["one core", "one machine", "machines"]
    weekly: Literal["new", "all", "only"]
    """What a retraining does it for; "only": for all, and nobody else does."""
    limit: str
    origin: str


LAWS = TypeAdapter(tuple[StageLaw, ...]).validate_json(
    Path(__file__).with_name("stage_laws.json").read_bytes()
)


@dataclass(frozen=True)
class Workers:
    """Equal machines for the data stages."""

    count: int
    cores: int
    price: float | None = None
    """Of one for an hour."""

    @classmethod
    def parse_spec(cls, text: str) -> Self:
        """Read COUNTxCORES[@PRICE], like `50x64@2.7`."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:@(\d+(?:\.\d+)?))?", text.strip())
        if found is None:
            raise InputError(
                f"'{text}' names no machines: write COUNTxCORES, and @PRICE of one machine's hour "
                "where it matters, like 50x64@2.7"
            )
        return cls(int(found[1]), int(found[2]), None if found[3] is None else float(found[3]))


class Line(NamedTuple):
    """One figure of an estimate; without a figure, the heading of those that follow."""

    what: str
    figure: str
    origin: str


def is_large(recipe: Recipe) -> bool:
    return sum(reach.wanted for reach in source_yields(recipe)) >= LARGE_ROWS


def estimate_data(recipe: Recipe) -> Iterator[Line]:
    """The figures of a recipe whose sources all have a `target_count`."""
    reaches = source_yields(recipe)
    wanted = sum(reach.selected for reach in reaches)
    published, per_shard = recipe.published.metadata_rows, recipe.download.samples_per_shard
    read = _count_rows_read(recipe)
    caps = {one.name: one.target_count or 0 for one in recipe.merge.sources}
    success = {one.name: f"{one.expected_success:.0%}" for one in recipe.merge.sources}
    origin = " + ".join(f"{caps[name]:,} {name} at {success[name]} success" for name in caps)
    yield Line("samples, at most", f"{sum(caps.values()):,}", origin)
    for reach in (one for one in reaches if one.selected < one.wanted):
        name = reach.source.name
        figure = f"about {reach.samples:,} samples, not {caps[name]:,}"
        origin = f"{reach.selected:,} of its rows pass ({SHARE_SELECTED:.0%}), "
        yield Line(f"{name} can give", figure, f"{origin}{success[name]} are downloaded")
    origin = "target_count / expected_success, or all there are"
    yield Line("rows selected", f"{wanted:,}", origin)
    origin = "as published" if published else f"{SHARE_SELECTED:.0%} of rows are selected"
    yield Line("metadata rows read", f"{read:,.0f}", origin)
    size = f"{read * METADATA_BYTES_PER_ROW / 1e9:,.0f} GB, read once"
    yield Line("metadata", size, f"{METADATA_BYTES_PER_ROW} bytes a row, as Re-LAION-2B")
    if recipe.merge.balance:
        origin = f"{BALANCED_ROWS_PER_CPU_S:,} rows per CPU-second, make bench-balance"
        yield Line("balancing", f"{read / BALANCED_ROWS_PER_CPU_S / 3600:,.1f} CPU-hours", origin)
    origin = f"{WAITING_BYTES} bytes a row until it is written, make bench-merge"
    yield Line("merge, temporary disk", f"{read * WAITING_BYTES / 1e9:,.0f} GB", origin)
    yield Line("shards", f"{-(-wanted // per_shard):,}", f"{per_shard:,} rows each")
    image_px = recipe.download.image_px
    size = f"{expected_bytes(expected_samples(recipe), image_px) / 1e12:,.1f} TB"
    yield Line("images", size, f"{expected_bytes(1, image_px):,} bytes a sample at {image_px} px")
    if recipe.dataset.near_duplicates == "drop":
        memory = f"{expected_samples(recipe) * NEAR_BYTES / 1e9:,.1f} GB, on one core"
        origin = f"{NEAR_BYTES} bytes a sample, whatever memory_limit says; make bench-scale"
        yield Line("near duplicates, memory", memory, origin)


def data_table(recipe: Recipe, workers: Workers) -> Table:
    """Machines, hours and price of every data stage, the first time and every week of a retraining,
    and what limits it, of a recipe whose sources all have a `target_count`."""
    rows = sum(reach.selected for reach in source_yields(recipe))
    amounts = {
        "row read": _count_rows_read(recipe),
        "row tried": rows,
        "sample": expected_samples(recipe),
        "shard": -(-rows // recipe.download.samples_per_shard),
    }
    title = f"data stages on {workers.count} machines of {workers.cores} cores, and each week of a"
    title += f" retraining with {NEW_SHARE:.0%} more data"
    columns = ("stage", "machines", "hours", "price", "hours a week", "limit", "from")
    table, totals = Table(*columns, title=title, box=None, pad_edge=False), [0.0, 0.0, 0.0]
    for law in LAWS:
        count = workers.count if law.shared_by == "machines" else 1
        cores = 1 if law.shared_by == "one core" else count * workers.cores
        hours = amounts[law.per] * law.cpu_s / cores / 3600
        weekly = hours * (NEW_SHARE if law.weekly == "new" else 1)
        hours = 0.0 if law.weekly == "only" else hours
        price = hours * count * (workers.price or 0)
        totals = [a + b for a, b in zip(totals, (hours, price, weekly), strict=True)]
        cells = (f"{hours:,.3f}", f"{price:,.0f}" if workers.price else "", f"{weekly:,.3f}")
        table.add_row(law.stage, f"{count}", *cells, law.limit, law.origin)
    price_said = f"{totals[1]:,.0f}" if workers.price else ""
    table.add_row("all", "", f"{totals[0]:,.1f}", price_said, f"{totals[2]:,.1f}", style="bold")
    return table


def _count_rows_read(recipe: Recipe) -> float:
    published = recipe.published.metadata_rows
    reaches = source_yields(recipe)
    return sum(published.get(one.source.name, one.wanted / SHARE_SELECTED) for one in reaches)


@dataclass(frozen=True)
class Cut:
    """The way in which a rank's share of the global batch goes through its GPU."""

    share: int
    """Pairs of a rank in every step, the larger number where they differ by one."""
    micro_batch: int
    """Pairs at once; one even where not one fits."""
    memory: dict[str, float]
    """Bytes, by what they are."""
    limit: float

    @property
    def parts(self) -> int:
        return -(-self.share // self.micro_batch)

    @property
    def needed(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.limit


def cut_share(model: ModelConfig, train: TrainConfig, machines: Machines) -> Cut:
    """The largest parts of a rank's share that its memory holds."""
    share = -(-train.global_batch // machines.count)
    limit = machines.memory_gb * GIB * USABLE_SHARE
    for parts in range(1, share + 1):
        size = -(-share // parts)
        if count_parts(train.global_batch, machines.count, size) != parts:
            continue
        memory = cost.gpu_memory(
            model,
            train,
            ranks=machines.count,
            micro_batch=size,
            text_tokens=cost.shown_tokens(train),
        )
        cut = Cut(share, size, memory, limit)
        if cut.fits:
            break
    return cut


def estimate_stage(
    recipe: Recipe, train: TrainConfig, machines: Machines, utilisation: float | None = None
) -> Iterator[Line]:
    """The figures of one training stage on `machines`; `utilisation` is the share of the GPUs' peak
    that is reached, by default the paper's."""
    if machines.count > train.global_batch:
        yield Line("ranks", f"{machines.count} cannot share the batch", "use fewer GPUs")
        return
    model = recipe.initialise.load_architecture().at_image_px(train.image_px)
    cut = cut_share(model, train, machines)
    terms = sorted(cut.memory.items(), key=lambda term: -term[1])
    shown = ", ".join(f"{what} {size / GIB:,.1f}" for what, size in terms if size >= 5e7)
    yield _batch_line(cut, train.global_batch, machines.count)
    steps = f"{train.steps:,} for {train.samples_seen:,} samples"
    steps = steps if train.steps else "counted when training begins"
    yield Line("steps", steps, "the recipe's, on any GPUs")
    memory = f"{cut.needed / GIB:,.1f} of {cut.limit / GIB:,.1f} GiB"
    yield Line("memory of a GPU", memory, shown)
    if not cut.fits:
        yield _remedy_line(model, train, machines, cut)
    yield Line(
        "memory of a rank's reader",
        f"{reader_bytes(recipe, train, machines.count) / GIB:,.1f} GiB",
        f"{_count_lanes(train, machines.count)} lanes x {train.shuffle_buffer:,} stored samples x "
        f"{_count_sources(recipe, train)} sources, pixels of {READ_AHEAD_STEPS} steps",
    )
    if cut.fits:
        yield from _time_lines(recipe, model, train, machines, cut, utilisation)
    for spec in train.teacher.models if train.teacher else ():
        yield _encode_line(f"teacher {spec}", spec, train.samples_seen, machines, utilisation)


def _encode_line(
    what: str, spec: str, samples: int, machines: Machines, utilisation: float | None
) -> Line:
    """The features of samples by one model: bytes, and a forward pass at the rate of training."""
    size = f"{format_bytes(samples * feature_bytes(spec))} of features"
    architecture, peak = find_architecture(spec), cost.peak_flops(machines.gpu)
    if architecture is None or peak is None:
        return Line(what, f"{size}, time not estimated", "the model's or the GPU's is not known")
    flops, share = cost.pair_flops(architecture), utilisation or TABLE_6_SHARE["whole images"]
    hours = samples * flops / (peak * share) / 3600
    price = f", price {hours * machines.price:,.0f}" if machines.price is not None else ""
    origin = f"{samples:,} samples once, {flops / 1e9:,.0f} GFLOP each, {share:.0%} of the peak"
    return Line(what, f"{size}, {hours:,.0f} GPU-hours{price}", origin)


def _batch_line(cut: Cut, batch: int, ranks: int) -> Line:
    if not cut.fits:
        cuts, origin = "", "the recipe's; not even one pair at once fits"
    elif cut.parts == 1:
        cuts, origin = ", whole", "a rank's share fits at once"
    else:
        cuts = f", in {cut.parts:,} parts of {cut.micro_batch:,}"
        origin = "the largest equal parts that fit; the gradient is the same for any: set "
        origin += f"EVACLIP_MICRO_BATCH={cut.micro_batch}"
    more = batch % ranks  # of them have one pair more
    of_all = f"{ranks - more} x {cut.share - 1:,} + {more}" if more else f"{ranks}"
    return Line("batch", f"{batch:,} = {of_all} x {cut.share:,}{cuts}", origin)


def _remedy_line(model: ModelConfig, train: TrainConfig, machines: Machines, cut: Cut) -> Line:
    """Return which memory is too much though the parts are as small as can be, and what is less."""
    largest, size = max(cut.memory.items(), key=lambda term: term[1])
    changes: dict[str, Any] = {"grad_checkpointing": "full", "zero_stage": 2}
    if train.precision == "fp32":
        changes["precision"] = "bf16"
    helpful = []
    for name, value in changes.items():
        other = cut_share(model, train.model_copy(update={name: value}), machines)
        if other.needed < 0.99 * cut.needed:
            fits = ", which fits" if other.fits else ""
            helpful.append(f"{name}={value} ({other.needed / GIB:,.1f} GiB{fits})")
    helpful.append("more GPUs, which share the optimizer, or larger ones")
    less = f"less with {', '.join(helpful)}"
    return Line("does not fit", f"{largest} take {size / GIB:,.1f} GiB", less)


def reader_bytes(recipe: Recipe, train: TrainConfig, ranks: int) -> int:
    """Memory of the host that each of `ranks` ranks reads ahead into."""
    lanes = _count_lanes(train, ranks)
    samples = lanes * train.shuffle_buffer * _count_sources(recipe, train)
    pixels = READ_AHEAD_STEPS * -(-train.global_batch // ranks) * 3 * train.image_px**2
    stored_px = recipe.download.image_px if recipe.download_table else ADOPTED_PX
    return expected_bytes(samples, stored_px) + pixels


def _count_lanes(train: TrainConfig, ranks: int) -> int:
    """Most lanes that a rank reads of; one that two share is read by both."""
    mixture = Mixture({"": 1.0}, train.global_batch, train.lanes)
    shares = (share_of_batch(train.global_batch, rank, ranks) for rank in range(ranks))
    return max(sum(1 for _ in mixture.cut_lanes(share)) for share in shares)


def _count_sources(recipe: Recipe, train: TrainConfig) -> int:
    return len(train.source_weights) or len(recipe.sources)


def _spend_flops(model: ModelConfig, train: TrainConfig, cut: Cut) -> tuple[float, float, float]:
    """FLOPs of a sample, forward passes again of it, and FLOPs with these."""
    flops = cost.stage_flops_per_sample(model, train, text_tokens=cost.shown_tokens(train))
    again = RECOMPUTED[train.grad_checkpointing] + (cut.parts - 1) / cut.parts
    return flops, again, flops * (1 + again / 3)


def _retraining_lines(
    recipe: Recipe, machines: Machines, utilisation: float | None
) -> Iterator[Line]:
    """GPU-hours of each training stage of a retraining, where they can be known."""
    for train in recipe.retraining_stages():
        model = recipe.initialise.load_architecture().at_image_px(train.image_px)
        cut, peak = cut_share(model, train, machines), cost.peak_flops(machines.gpu)
        if not cut.fits or peak is None or train.precision == "fp32" or not train.samples_seen:
            continue
        which = "half of the patches masked" if train.patch_dropout > 0 else "whole images"
        rate = peak * (utilisation or TABLE_6_SHARE[which]) / _spend_flops(model, train, cut)[2]
        hours = train.samples_seen / rate / 3600
        price = f", price {hours * machines.price:,.0f}" if machines.price is not None else ""
        figure = f"{hours / machines.count:,.1f} h, {hours:,.0f} GPU-hours{price}"
        yield Line(f"a retraining's {train.name}", figure, f"{train.samples_seen:,} samples")


def _time_lines(
    recipe: Recipe,
    model: ModelConfig,
    train: TrainConfig,
    machines: Machines,
    cut: Cut,
    utilisation: float | None,
) -> Iterator[Line]:
    flops, again, spent = _spend_flops(model, train, cut)
    yield Line(
        "FLOPs of a sample",
        f"{flops / 1e9:,.0f} G, {spent / 1e9:,.0f} G with what is computed again",
        f"matrix products, {cost.shown_tokens(train):.0f} tokens a caption, "
        f"{again:.2f} forward passes again for checkpointing and parts",
    )
    peak = cost.peak_flops(machines.gpu)
    if peak is None or train.precision == "fp32":
        yield Line("time", "not estimated", "rates are of fp16 and bf16, not of fp32")
        return
    share, origin = utilisation, "given"
    if share is None:
        which = "half of the patches masked" if train.patch_dropout > 0 else "whole images"
        share = TABLE_6_SHARE[which]
        origin = (
            f"what the paper's Table 6 reached on 16 A100s ({which}, flash attention), taken for "
            "any model and GPU"
        )
    rate = peak * share / spent
    hours = train.samples_seen / rate / 3600
    origin = f"{share:.0%} of {peak / 1e12:,.0f} TFLOP/s: {origin}"
    yield Line("rate", f"{rate:,.0f} samples/s a GPU", origin)
    readers = f"{math.ceil(rate / READ_PER_PROCESS_S)} or more a GPU"
    origin = f"{READ_PER_PROCESS_S:,} stored images/s each (make bench-loader); they share lanes"
    yield Line("reading processes", readers, f"{origin}, and are as many as it has cores, less one")
    time = f"{hours / machines.count / 24:,.1f} days, {hours:,.0f} GPU-hours"
    yield Line("time", time, f"{train.samples_seen:,} samples at that rate, without stops")
    if machines.price is not None:
        yield Line("price", f"{hours * machines.price:,.0f}", f"{machines.price:g} a GPU-hour")
    published = recipe.published
    if published.gpus is None:
        return
    paper, minutes = Machines.parse_spec(published.gpus), published.minutes_per_40m_samples
    if minutes is None:
        yield Line("the paper's", f"on {paper}", "its time is not published")
        return
    hours = train.samples_seen / 40e6 * minutes / 60
    time = f"{hours / 24:,.1f} days, {hours * paper.count:,.0f} GPU-hours on {paper}"
    yield Line("the paper's", time, f"by its {minutes:g} minutes for 40 million samples (Table 6)")


def engine_settings(recipe: Recipe, train: TrainConfig, machines: Machines) -> str | None:
    """DeepSpeed's JSON for the stage on `machines`, in one line; none where they cannot train."""
    if machines.count > train.global_batch:
        return None
    model = recipe.initialise.load_architecture().at_image_px(train.image_px)
    accumulates = cut_share(model, train, machines).parts > 1
    parameters = sum(cost.parameter_counts(model).values())
    return json.dumps(deepspeed_config(train, machines.count, parameters, accumulates=accumulates))


def training_table(recipe: Recipe, machines: Machines, utilisation: float | None) -> Table:
    lines = [
        _encode_line(f"embed {spec}", spec, expected_samples(recipe), machines, utilisation)
        for spec in (recipe.embed.models if recipe.embed else ())
    ]
    for train in planned_stages(recipe):
        lines.append(Line(train.name, "", ""))
        lines += estimate_stage(recipe, train, machines, utilisation)
    lines += _retraining_lines(recipe, machines, utilisation)
    lines += [Line(*one, "published, not run here") for one in recipe.published.others.items()]
    return estimate_table(f"training on {machines}", lines)


def estimate_table(title: str, lines: Iterable[Line]) -> Table:
    table = Table(title, "figure", "from", box=None, pad_edge=False)
    for line in lines:
        table.add_row(*line, style="" if line.figure else "bold")
    return table
