"""Which files a merge reads, and the address of what it makes.

Covers: globs, the demo artifact's prefix, fingerprints of outside files, the artifact's address.
Not here: what is inside the files; see schema.py.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaclip_model.errors import InputError
from tasks.artifact import Address, Stage
from tasks.merge.config import MergeConfig, SourceConfig

STAGE = Stage("merge", 1, tools=("duckdb",))
DEMO = "demo:"
NOT_DECIDING = {"partitions", "memory_limit"}
FINGERPRINT_BYTES = 1 << 20

Files = Mapping[str, Sequence[Path]]
"""Source name -> its parquet files, in order."""


def find_files(config: MergeConfig, demo: Path | None = None) -> dict[str, list[Path]]:
    """Files of every source, sorted by path; `demo` is the demo artifact's folder.

    Raises:
        InputError: a source matches no file, or names the demo and there is none.
    """
    return {source.name: _files_of(source, demo) for source in config.sources}


def address(root: Path, config: MergeConfig, demo: str | None = None) -> Address:
    """Address of the merge; `demo` is the demo artifact's digest.

    Outside files count by name, size and their last megabyte, which holds the parquet footer:
    row counts, offsets and extremes of every column.
    """
    parents: dict[str, str] = {}
    for source in config.sources:
        if not source.files.startswith(DEMO):
            parents[f"files:{source.name}"] = _fingerprint(_files_of(source, None))
        elif demo is not None:
            parents["demo"] = demo
    decides = config.model_dump(mode="json", exclude=NOT_DECIDING)
    return Address(root, STAGE, decides, parents)


def _files_of(source: SourceConfig, demo: Path | None) -> list[Path]:
    pattern = source.files
    if pattern.startswith(DEMO):
        if demo is None:
            raise InputError(
                f"source '{source.name}' reads '{pattern}', but this recipe makes no demo data"
            )
        pattern = str(Path(glob.escape(str(demo))) / pattern.removeprefix(DEMO))
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    files = [path for path in files if path.is_file()]
    if not files:
        raise InputError(
            f"source '{source.name}': no file matches '{pattern}': "
            "correct 'files' or put the metadata there"
        )
    return files


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]
