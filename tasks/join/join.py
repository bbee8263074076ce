"""Several verifications as one: their verdicts one after another, and one index over all samples,
which tasks/dataset reads as it reads that of a verification.

The rows of the first verification keep their numbers, and so do those of every join that this one
goes on from: what is at the front is linked, not written again. Only the look-up tables are made
anew. Where samples resemble each other the dataset keeps the one that comes first, so that a later
download never takes a sample out of an earlier version.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from evaclip_model.files import write_atomically
from tasks.artifacts.artifact import Artifact, Made
from tasks.index import sample_index
from tasks.join.config import PARTS
from tasks.progress import Report


@dataclass(frozen=True)
class JoinedPart:
    """The place of a verification's samples in a join's index."""

    digest: str
    first_row: int
    first_shard: int


def join_verifications(verified: Sequence[Artifact], out: Path, report: Report) -> Made:
    """Write verdicts and index of all of `verified`, in that order, into `out`."""
    verdicts: list[sample_index.ShardVerdict] = []
    parts: list[JoinedPart] = []
    rows = 0
    for part in verified:
        own = sample_index.read_verdicts(part.folder)
        parts.append(JoinedPart(part.digest, rows, len(verdicts)))
        rows += sum(verdict.stored for verdict in own)
        for verdict in own:  # with the shard's path as it is from `out`
            location = sample_index.shard_location(part.folder, verdict.path)
            path = sample_index.relative_path(location, out)
            shard = verdict.shard and replace(verdict.shard, path=path)
            verdicts.append(verdict.model_copy(update={"path": path, "shard": shard}))
    report(0, rows, "joining the indexes")
    pairs = zip(verified, parts, strict=True)
    firsts = [(part.folder, one.first_row, one.first_shard) for part, one in pairs]
    sample_index.join_indexes(firsts, out / sample_index.INDEX)
    sample_index.write_verdicts(verdicts, out)
    write_atomically(out / PARTS, json.dumps([asdict(part) for part in parts], indent=1) + "\n")
    report(rows, rows, f"{rows:,} samples of {len(parts)} downloads")
    counts = {
        "parts": len(parts),
        "shards": sum(verdict.shard is not None for verdict in verdicts),
        "samples": rows,
    }
    index = sorted((out / sample_index.INDEX).rglob("*.parquet"))
    return Made(counts, (out / sample_index.CHECKED, out / PARTS, *index))


def read_parts(folder: Path) -> list[JoinedPart]:
    return [JoinedPart(**part) for part in json.loads((folder / PARTS).read_text())]
