"""Features by one model, of every usable sample of a verification or of all that a training stage
shows: what is missing, running the ranks, the report.

Not here: encoding a shard (embed_shard.py); what scores decide (tasks/dataset).
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from evaclip_model.files import write_atomically
from evaclip_model.reading.samples import SHARDS
from evaclip_model.reading.teacher_features import file_sizes, stream_file
from evaclip_model.training.config import TrainConfig
from tasks.artifacts.artifact import Made
from tasks.artifacts.root_store import fetch_artifact
from tasks.embed.config import FEATURES, EmbedConfig
from tasks.embed.embed_shard import EmbedJob, usable_rows
from tasks.index.sample_index import CHECKED, SampleIndex, ShardVerdict, link_or_copy, read_verdicts
from tasks.process.launch import RankLaunch, RankState, iterate_starts, run_ranks
from tasks.progress import Report, format_duration

REPORT = "report.json"
BINS = 40
"""Of the histogram of similarities, from -1 to 1."""


def embed_samples(
    config: EmbedConfig,
    name: str,
    model: str,
    data: Path,
    out: Path,
    report: Report,
    *,
    stream: TrainConfig | None = None,
    known: Sequence[tuple[Path, Path]] = (),
    ranks: int = 1,
    device: str = "cpu",
    workers: int | None = None,
    launch: RankLaunch | None = None,
) -> Made:
    """Encode image and caption of every sample that a verification found usable; or every crop and
    caption that a training stage, `stream`, will show of a dataset version.

    The report calls the model `name`, also one that lies elsewhere. `ranks` processes, each with so
    many `workers` that decode, or those of a `launch` over machines take missing files in turn and
    change no byte of the result: who writes a shard judges it, here they are counted. Features that
    equal shards have of this model in a `known` (artifact, verification) are taken over.
    InputError: the model does not open, features are not finite, a shard changed, the ranks die."""
    stream = stream.fit_to_shards(data / SHARDS) if stream else None
    verdicts = [] if stream else read_verdicts(data)
    used = {number: verdict for number, verdict in enumerate(verdicts) if verdict.shard}
    sizes = {number: verdict.stored for number, verdict in used.items()}
    sizes = file_sizes(stream, stream.steps) if stream else sizes
    folder, total = out / FEATURES, sum(sizes.values())
    folder.mkdir(parents=True, exist_ok=True)
    _take_over(known, used, SampleIndex(data), folder)
    for missing in iterate_starts(lambda: sorted(set(sizes) - _list_finished(folder)), len, out):
        job = EmbedJob(
            model=model,
            precision=config.precision,
            device=device,
            data=data.resolve(),
            stream=stream,
            folder=folder.resolve(),
            files=tuple(missing),
            workers=workers,
        )
        left = sum(sizes[number] for number in missing)
        progress = _RankProgress(total - left, total, report)
        reads = (data.resolve(), Path(model).resolve())
        run_ranks(
            *("tasks.embed.embed_shard", job, out / "job.json", min(ranks, len(missing))),
            *(progress.look, launch, reads, device != "cpu"),
        )
    if stream:
        return Made({"samples": total}, (), tuple(stream_file(folder, number) for number in sizes))
    files = [folder / f"{number:06d}.parquet" for number in used]
    counts = _write_report(name, files, list(used.values()), out / REPORT)
    return Made(counts, (out / REPORT, *files))


def _take_over(
    known: Sequence[tuple[Path, Path]], used: dict[int, ShardVerdict], index: SampleIndex, to: Path
) -> None:
    """Link features that others have of the same samples, in the same places of equal shards."""
    missing = set(used) - _list_finished(to)
    numbers = {one.shard.sha256: n for n, one in used.items() if one.shard and n in missing}
    for artifact, verified in known:
        has_verdicts = numbers and (fetch_artifact(verified, CHECKED) / CHECKED).exists()
        verdicts = read_verdicts(verified) if has_verdicts else []
        if any(one.shard and one.shard.sha256 in numbers for one in verdicts):
            fetch_artifact(artifact, FEATURES)
        for other, verdict in enumerate(verdicts):
            file = artifact / FEATURES / f"{other:06d}.parquet"
            sha256 = verdict.shard.sha256 if verdict.shard else ""
            if sha256 in numbers and file.exists():
                samples = usable_rows(index, numbers[sha256])
                if pq.read_table(file, columns=samples.column_names).equals(samples):
                    link_or_copy(file, to / f"{numbers.pop(sha256):06d}.parquet")


def _list_finished(folder: Path) -> set[int]:
    names = (name.partition(".") for name in os.listdir(folder))
    return {int(number) for number, _, end in names if end in ("parquet", "npy") and number}


def find_features(parts: Sequence[tuple[Path, Path]]) -> list[tuple[Path, int]]:
    """(file, the row of an index of its shard's first sample) of all features; `parts` are folders
    of features and of their verification, in the index's order."""
    found, first = [], 0
    for folder, verified in parts:
        starts = first + np.cumsum([0, *(verdict.stored for verdict in read_verdicts(verified))])
        files = sorted((folder / FEATURES).glob("*.parquet"))
        found += [(file, int(starts[int(file.stem)])) for file in files]
        first = int(starts[-1])
    return found


def read_scores(
    parts: Sequence[tuple[Path | None, Path]],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """(similarity of image and caption, number of the part) of every row of an index, the former
    NaN where a sample is flawed; of `parts` as `find_features` takes them, also without features.
    """
    found = []
    for folder, verified in parts:
        starts = np.cumsum([0, *(verdict.stored for verdict in read_verdicts(verified))])
        scores = np.full(starts[-1], np.nan, dtype=np.float32)
        for file in sorted((folder / FEATURES).glob("*.parquet")) if folder else ():
            with pq.ParquetFile(file) as features:  # half of what `read_table` takes
                table = features.read(["place", "similarity"])
            places = starts[int(file.stem)] + table["place"].to_numpy()
            scores[places] = table["similarity"].to_numpy()
        found.append(scores)
    numbers = np.repeat(np.arange(len(found)), [len(scores) for scores in found])
    return np.concatenate(found), numbers


@dataclass
class _RankProgress:
    """The samples that the ranks of one start have done, for a person; `before` were already."""

    before: int
    total: int
    report: Report
    begin_s: float | None = None

    def look(self, states: Sequence[RankState]) -> None:
        now, done = time.monotonic(), sum(one.done for one in states)
        if self.begin_s is None:  # their models are opened first
            self.begin_s = now if states else None
        elif done:
            speed = done / max(now - self.begin_s, 1e-9)
            shares = [one.share_of_peak for one in states if one.share_of_peak is not None]
            peak = f"  MFU {sum(shares) / len(shares):.0%}" if shares else ""
            left_s = max(0, self.total - self.before - done) / speed
            said = f"{speed:,.0f} images/s{peak}  {format_duration(left_s)} left"
            self.report(min(self.before + done, self.total), self.total, said)


def _write_report(
    name: str, files: Sequence[Path], verdicts: Sequence[ShardVerdict], target: Path
) -> dict[str, int | float]:
    """Counts, mean similarity and its histogram, by source."""
    edges = np.linspace(-1, 1, BINS + 1)
    totals: defaultdict[str, npt.NDArray[np.float64]] = defaultdict(lambda: np.zeros(2 + BINS))
    for file, verdict in zip(files, verdicts, strict=True):
        found = pq.read_table(file, columns=["similarity"])["similarity"].to_numpy()
        parts = [len(found), found.sum(dtype=np.float64), *np.histogram(found, edges)[0]]
        totals[verdict.shard.source if verdict.shard else ""] += parts

    def describe(total: npt.NDArray[np.float64]) -> dict[str, int | float]:
        samples = int(total[0])
        return {"samples": samples, "mean_similarity": round(total[1] / max(samples, 1), 6)}

    by_source = {
        source: {**describe(total), "histogram": total[2:].astype(int).tolist()}
        for source, total in sorted(totals.items())
    }
    said = {"model": name, "bins": BINS, "sources": by_source}
    write_atomically(target, json.dumps(said, indent=1) + "\n")
    return {"shards": len(files), **describe(sum(totals.values(), np.zeros(2 + BINS)))}
