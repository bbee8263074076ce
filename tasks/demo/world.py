"""The demo stage: metadata that points at the loopback server, and held-out evaluation sets (a
classification set over all concepts and a retrieval set, both of Twemoji drawings, in the
webdataset form in which such sets are published), from the concepts in the committed `data/`: their
names, captions and drawings. Not here: building that data (`tests/tasks/demo/build_images.py`).
"""

import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq

from evaclip_model.config import Config
from tasks.artifacts.artifact import Made
from tasks.demo.config import DemoConfig
from tasks.progress import Report, report_nothing

Artist = Literal["noto", "fluent", "twemoji"]
ARTISTS: tuple[Artist, ...] = ("noto", "fluent", "twemoji")
DATA = Path(__file__).parent / "data"
CONCEPTS_FILE = DATA / "concepts.json"


class Concept(Config):
    """One thing that all three artists drew."""

    key: str
    """Unicode code points in lower-case hex, joined by '-'; also the drawing's file name."""
    name: str
    """CLDR's English short name; unique, so it is the class name in evaluation."""
    noto: str
    """Caption of the Noto drawing: Unicode name, CLDR name where it differs, keywords."""
    fluent: str
    """Caption of the Fluent drawing: Fluent's own name of it, and keywords."""
    twemoji: tuple[str, ...]
    """Captions of the held-out Twemoji drawing, for retrieval."""
    fluent_phash: str
    """64-bit perceptual hash of the Fluent drawing, 16 hex digits."""


def read_concepts() -> tuple[Concept, ...]:
    """All concepts in Unicode's order."""
    entries = json.loads(CONCEPTS_FILE.read_text(encoding="utf-8"))
    return tuple(Concept.model_validate(entry) for entry in entries)


def artist_zip(artist: Artist) -> Path:
    return DATA / f"{artist}.zip"


def read_drawings(artist: Artist) -> dict[str, bytes]:
    """Concept key -> WebP bytes, 64 x 64 RGB on white."""
    with zipfile.ZipFile(artist_zip(artist)) as archive:
        return {
            name.removesuffix(".webp"): archive.read(name) for name in sorted(archive.namelist())
        }


TEMPLATES = ("{c}", "an emoji of {c}.", "an icon of {c}.", "a drawing of {c}.", "the {c} emoji.")
URL_COLUMNS = {"laion2b": "URL", "coyo700m": "url"}
"""Source -> the column of its addresses, in which the committed files have the default port."""


def write_metadata(source: str, port: int, folder: Path) -> tuple[list[Path], int]:
    """Write the source's files with the server's port in their addresses; (files, rows)."""
    folder.mkdir(parents=True, exist_ok=True)
    files, rows, name = [], 0, URL_COLUMNS[source]
    for committed in sorted((DATA / "metadata" / source).glob("*.parquet")):
        table = pq.read_table(committed)
        urls = pc.replace_substring(table[name], f":{DemoConfig().port}/", f":{port}/")
        table = table.set_column(table.column_names.index(name), table.field(name), urls)
        files.append(folder / committed.name.replace("zstd", "snappy"))
        pq.write_table(table, files[-1], compression="snappy")
        rows += len(table)
    return files, rows


def write_eval_sets(concepts: Sequence[Concept], folder: Path) -> list[Path]:
    """Write both sets below `folder`; the order of concepts gives labels and file numbers."""
    drawings = read_drawings("twemoji")
    images = [drawings[concept.key] for concept in concepts]
    names = [concept.name for concept in concepts]
    labels = [("cls", str(label)) for label in range(len(concepts))]
    captions = [("txt", "\n".join(concept.twemoji)) for concept in concepts]
    first, second = folder / "emoji-twemoji", folder / "emoji-twemoji-retrieval"
    return [
        _write_lines(first / "classnames.txt", *names),
        _write_lines(first / "zeroshot_classification_templates.txt", *TEMPLATES),
        *_write_shard(first, images, labels),
        _write_lines(second / "dataset_type.txt", "retrieval"),
        *_write_shard(second, images, captions),
    ]


def _write_shard(
    folder: Path, images: Sequence[bytes], answers: Sequence[tuple[str, str]]
) -> list[Path]:
    path = folder / "test" / "0.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (image, (extension, answer)) in enumerate(zip(images, answers, strict=True)):
            for kind, data in (("webp", image), (extension, answer.encode())):
                # its time and owner are zero: the same bytes every time
                member = tarfile.TarInfo(f"s{number:07d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return [path, _write_lines(folder / "test" / "nshards.txt", "1")]


def _write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def make_demo(config: DemoConfig, out: Path, report: Report = report_nothing) -> Made:
    """Write `metadata/SOURCE/*.parquet` and `eval/SET/...` into `out`."""
    concepts = read_concepts()
    files: list[Path] = []
    counts = {"concepts": len(concepts)}
    for source in URL_COLUMNS:
        place = out / "metadata" / source
        written, counts[f"{source}.rows"] = write_metadata(source, config.port, place)
        files += written
    files += write_eval_sets(concepts, out / "eval")
    report(1, 1)
    return Made(counts=counts, files=tuple(files))
