"""The embedded database a merge runs in: its functions, its reading of URLs, its statements as
files, its errors as sentences.

Not here: what the statements mean; see sql/ and units.py.
"""

import errno
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import mmh3
import pyarrow as pa

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.reading.urls import is_url, open_filesystem
from tasks.index.sample_index import open_database as open_spilling_database
from tasks.web_addresses import normalise_host, remove_dot_segments

SQL = Path(__file__).parent / "sql"
NOT_ABOUT_CONTENT = (
    *(duckdb.OutOfMemoryException, duckdb.InterruptException, duckdb.InternalException),
    *(duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException),
)
"""What a damaged file does not cause; damage itself may surface as any other error."""
PARAMETER = re.compile(r"\$([a-z][a-z0-9_]*)")


@contextmanager
def open_database(
    spill: Path, memory_limit: str, threads: int | None, paths: Iterable[str] = ()
) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-memory database that spills below the folder `spill`; closed whatever happens.

    `paths` are what will be read: where they are URLs, fsspec opens them.

    Raises:
        InputError: the memory limit is too small for the work.
        OSError: with ENOSPC, when the disk is full.
        KeyboardInterrupt: a signal stopped a statement.
    """
    spill.mkdir(parents=True, exist_ok=True)
    try:
        with open_spilling_database(memory_limit, spill) as connection:
            if threads is not None:
                connection.execute(f"SET threads = {threads}")
            # Parquet statistics leave NaN out, so rewriting by them lets NaN through every range
            # rule; on the way out they decide which columns are called required, file by file.
            connection.execute("SET disabled_optimizers = 'statistics_propagation'")
            connection.execute("SET enable_progress_bar = false")
            # Texts of a batch may be longer than 2 GB.
            connection.execute("SET arrow_large_buffer_size = true")
            # Keys arrive as UUIDs of 16 bytes, not as text.
            connection.execute("SET arrow_lossless_conversion = true")
            text = ["VARCHAR"]
            connection.create_function(
                "normalise_host", _host_or_none, text, "VARCHAR", null_handling="special"
            )
            connection.create_function("remove_dot_segments", remove_dot_segments, text, "VARCHAR")
            connection.create_function("laion_hash", laion_hashes, text, "BIGINT", type="arrow")
            for url in {path.partition("://")[0]: path for path in paths if is_url(path)}.values():
                connection.register_filesystem(open_filesystem(url))
            yield connection
    except duckdb.OutOfMemoryException as error:
        raise InputError(
            f"the merge needs more than memory_limit = {memory_limit}: raise it, or 'partitions' "
            f"({shorten_error(error)})"
        ) from error
    except duckdb.Error as error:
        if _is_disk_full(error):
            raise OSError(errno.ENOSPC, shorten_error(error)) from error
        raise
    except RuntimeError as error:
        # DuckDB swallows what a signal handler raised and says only this.
        if str(error) == "Query interrupted":
            raise KeyboardInterrupt from error
        raise


def _host_or_none(host: str | None) -> str | None:
    return None if host is None else normalise_host(host)


@contextmanager
def explain_read_errors(path: str) -> Iterator[None]:
    """Turn the database's complaints about the content of a metadata file into a sentence."""
    try:
        yield
    except NOT_ABOUT_CONTENT:
        raise
    except duckdb.Error as error:
        if _is_disk_full(error):
            raise
        raise InputError(
            f"{path} cannot be read as parquet: fetch it again or take it out of 'files' "
            f"({shorten_error(error)})"
        ) from error


def load_statement(name: str, **parts: str) -> str:
    """The statement sql/NAME.sql, with `{part}` replaced by trusted SQL text."""
    text = (SQL / f"{name}.sql").read_text()
    for part, replacement in parts.items():
        text = text.replace("{" + part + "}", replacement)
    return text


def share_of_memory(limit: str, shares: int) -> str:
    number, unit = re.fullmatch(r"([0-9.]+) ?([KMGT]?)i?B", limit).groups()  # type: ignore[union-attr]
    kilobytes = float(number) * 1024 ** ("KMGT".index(unit) if unit else -1)
    return f"{max(1, int(kilobytes / shares))}KB"


def execute_query(
    connection: duckdb.DuckDBPyConnection, query: str, parameters: Mapping[str, Any]
) -> duckdb.DuckDBPyConnection:
    """A statement's result, to be fetched; it takes those of the `parameters` that it names."""
    named = set(PARAMETER.findall(query))
    return connection.execute(
        query, {name: value for name, value in parameters.items() if name in named}
    )


def copy_statement(query: str, options: str) -> str:
    return f"COPY ({query}) TO $target (FORMAT parquet, {options})"


def laion_hashes(texts: pa.ChunkedArray) -> pa.Array:
    """LAION's row keys: the first 64 bits of MurmurHash3 (x64, 128 bits, seed 0), signed.

    LAION published its safety and watermark scores beside the metadata under this hash of
    `url + caption`, with '' for what is missing.
    """
    return pa.array([mmh3.hash64(text)[0] for text in texts.to_pylist()], pa.int64())


def _is_disk_full(error: duckdb.Error) -> bool:
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


def listed_urls(select: str) -> str:
    """A query on `normalised` URLs, whose parameter is a list of `$urls`."""
    return load_statement("listed_urls", normalise=load_statement("normalise"), select=select)


def normal_urls(urls: Sequence[str]) -> list[str | None]:
    """Each URL ready to fetch, as a selected row has it; None when no web server can be asked."""
    query = listed_urls("SELECT url FROM normalised ORDER BY place")
    with TemporaryDirectory() as spill, open_database(Path(spill), "1GB", 1) as connection:
        rows = connection.execute(query, {"urls": list(urls)}).fetchall()
    return [url for (url,) in rows]
