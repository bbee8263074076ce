"""Features by one model, of every usable sample of a verification or of all that a training stage
shows: what is missing, running the ranks, the report.

Not here: encoding (embed_shard.py); what scores decide (tasks/dataset).
"""

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.reading.samples import SHARDS
from evaclip_model.reading.teacher_features import steps_in_file, stream_file
from evaclip_model.training.config import TrainConfig
from tasks.artifacts.artifact import Made
from tasks.embed.config import FEATURES, EmbedConfig
from tasks.embed.embed_shard import EmbedJob
from tasks.index.sample_index import ShardVerdict, read_verdicts
from tasks.process.ranks import run_ranks
from tasks.progress import Report

REPORT = "report.json"
BINS = 40
"""Of the histogram of similarities, from -1 to 1."""
MAX_IDLE_STARTS = 2
"""Times in a row that ranks may end without another shard before the stage fails."""


def embed_samples(
    config: EmbedConfig,
    name: str,
    model: str,
    verified: Path,
    out: Path,
    report: Report,
    *,
    ranks: int = 1,
    device: str = "cpu",
) -> Made:
    """Encode image and caption of every sample that a verification found usable.

    The report calls the model `name`, also one that lies elsewhere; `ranks` processes take missing
    shards in turn and change no byte of the result. InputError: the model cannot be opened, its
    features are not finite, a shard changed, or the ranks die again and again."""
    verdicts = read_verdicts(verified)
    used = [number for number, verdict in enumerate(verdicts) if verdict.shard is not None]
    job = EmbedJob(
        model=model,
        precision=config.precision,
        device=device,
        data=verified.resolve(),
        folder=(out / FEATURES).resolve(),
    )
    files = [shard_file(out / FEATURES, number) for number in used]
    sizes = [verdicts[number].stored for number in used]
    _make_files(job, dict(zip(files, sizes, strict=True)), ranks, report)
    counts = _write_report(name, files, [verdicts[number] for number in used], out / REPORT)
    return Made(counts, (out / REPORT, *files))


def embed_stream(
    train: TrainConfig,
    model: str,
    dataset: Path,
    out: Path,
    report: Report,
    ranks: int,
    device: str,
) -> Made:
    """Encode every crop and caption that a training stage will show of a dataset version, for one
    of its teachers. InputError as `embed_samples`."""
    train = train.fit_to_shards(dataset / SHARDS)
    assert train.teacher is not None
    job = EmbedJob(
        model=model,
        precision=train.teacher.precision,
        device=device,
        data=dataset.resolve(),
        stream=train,
        folder=(out / FEATURES).resolve(),
    )
    files = range(-(-train.steps // (at_once := steps_in_file(train.global_batch))))
    sizes = {
        stream_file(out / FEATURES, one): min(at_once, train.steps - one * at_once) for one in files
    }
    sizes = {file: steps * train.global_batch for file, steps in sizes.items()}
    _make_files(job, sizes, ranks, report)
    return Made({"samples": train.steps * train.global_batch}, (), tuple(sizes))


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.parquet"


def read_scores(parts: Sequence[tuple[Path, Path]]) -> npt.NDArray[np.float32]:
    """Similarity of image and caption of every row of an index, NaN where a sample is flawed;
    `parts` are folders of features and of their verification, in the index's order."""
    found = []
    for folder, verified in parts:
        starts = np.cumsum([0, *(verdict.stored for verdict in read_verdicts(verified))])
        scores = np.full(starts[-1], np.nan, dtype=np.float32)
        for file in sorted((folder / FEATURES).glob("*.parquet")):
            table = pq.read_table(file, columns=["place", "similarity"])
            places = starts[int(file.stem)] + table["place"].to_numpy()
            scores[places] = table["similarity"].to_numpy()
        found.append(scores)
    return np.concatenate(found)


def _make_files(job: EmbedJob, sizes: Mapping[Path, int], ranks: int, report: Report) -> None:
    """Run ranks on files, of so many samples each, until none is missing."""
    job.folder.mkdir(parents=True, exist_ok=True)
    idle, before = 0, -1
    while missing := [file for file in sizes if not file.exists()]:
        idle = idle + 1 if len(missing) == before else 0
        if idle > MAX_IDLE_STARTS:
            logs = f"{job.folder.parent}/*.log"
            raise InputError(f"the ranks ended {idle} times without another file; see {logs}")
        before = len(missing)
        numbers = tuple(int(file.stem) for file in missing)
        share = job.model_copy(update={"files": numbers, "ranks": min(ranks, len(missing))})
        _run_ranks(share, sizes, missing, report)


def _run_ranks(
    job: EmbedJob, sizes: Mapping[Path, int], missing: Sequence[Path], report: Report
) -> None:
    """Run all ranks once, whether they succeed or fail."""
    path = job.folder.parent / "job.json"
    write_atomically(path, job.model_dump_json())
    left, total = set(missing), sum(sizes.values())
    done = before = total - sum(sizes[file] for file in left)
    begin_s = time.monotonic()

    def watch() -> None:
        nonlocal done
        for file in [one for one in left if one.exists()]:
            left.remove(file)
            done += sizes[file]
        speed = (done - before) / max(time.monotonic() - begin_s, 1e-9)
        report(done, total, f"{speed:,.0f} samples a second")

    run_ranks("tasks.embed.embed_shard", path, job.ranks, watch)


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
