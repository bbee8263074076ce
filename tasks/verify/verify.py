"""Verify every shard of a download and write the manifest that training reads.

Covers: going through all shards, continuing where a killed run stopped, manifest and report.
Not here: what is looked at in a shard (shard.py); how shards are made.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.samples import SHARDS, ShardManifest
from tasks.artifact import Made, write_atomically
from tasks.progress import Report
from tasks.verify.config import VerifyConfig
from tasks.verify.shard import Flaw, Verdict, verify_shard

REPORT = "report.json"
CHECKED = "checked"


def verify_shards(
    config: VerifyConfig, downloaded: Path, out: Path, threads: int, report: Report
) -> Made:
    """Write `out/shards.json` from `downloaded/**/shards/*.tar`, all passes of the download.

    Args:
        threads: shards looked at at once; decoding and hashing run in parallel.

    Raises:
        InputError: there is no shard that can be trained on.
    """
    tars = sorted(downloaded.glob("**/shards/*.tar"))
    if not tars:
        raise InputError(f"{downloaded} holds no shards: download again")
    checked = out / CHECKED
    checked.mkdir(parents=True, exist_ok=True)
    verdicts = _look_at_all(config, tars, out, checked, threads, report)
    shards = tuple(verdict.shard for verdict in verdicts if verdict.shard is not None)
    if not shards:
        raise InputError(
            f"none of the {len(tars)} shards of {downloaded} can be trained on; "
            f"{verdicts[0].path}: {verdicts[0].left_out}"
        )
    manifest = ShardManifest(shards=shards)
    manifest.write(out / SHARDS)
    return _describe(out, manifest, verdicts)


def _look_at_all(
    config: VerifyConfig,
    tars: Sequence[Path],
    out: Path,
    checked: Path,
    threads: int,
    report: Report,
) -> list[Verdict]:
    """One verdict a tar, in the order of `tars`; those of a killed run are read back."""
    verdicts: dict[Path, Verdict] = {}

    def note(tar: Path, verdict: Verdict) -> None:
        verdicts[tar] = verdict
        found = sum(known.shard.samples for known in verdicts.values() if known.shard)
        report(len(verdicts), len(tars), f"{found:,} samples")

    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        # Pillow warns of large images and odd metadata; our own rules decide
        warnings.simplefilter("ignore")
        waiting = {}
        for tar in tars:
            known = checked / f"{tar.stem}.json"
            if known.exists():
                note(tar, Verdict.from_mapping(json.loads(known.read_text()), where=str(known)))
            else:
                path = os.path.relpath(tar, out)
                waiting[pool.submit(verify_shard, tar, path, config)] = tar
        try:
            for future in as_completed(waiting):
                tar, verdict = waiting[future], future.result()
                write_atomically(checked / f"{tar.stem}.json", verdict.model_dump_json())
                note(tar, verdict)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [verdicts[tar] for tar in tars]


def _describe(out: Path, manifest: ShardManifest, verdicts: Sequence[Verdict]) -> Made:
    """Write the report and name the artifact's files."""
    flaws: Counter[Flaw] = Counter()
    for verdict in verdicts:
        if verdict.shard is not None:
            flaws.update(verdict.flaws)
    left_out = {verdict.path: verdict.left_out for verdict in verdicts if verdict.left_out}
    counts: dict[str, int | float] = {
        "shards": len(manifest.shards),
        "shards_left_out": len(left_out),
        "samples": manifest.samples,
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }
    for flaw in sorted(flaws):
        counts[f"bad.{flaw.value}"] = flaws[flaw]
    for source, shards in manifest.by_source().items():
        counts[f"{source}.shards"] = len(shards)
        counts[f"{source}.samples"] = sum(shard.samples for shard in shards)
    write_atomically(out / REPORT, json.dumps({**counts, "left_out": left_out}, indent=1) + "\n")
    return Made(counts, (out / SHARDS, out / REPORT))
