"""Parquet files in the published columns."""

import pyarrow.parquet as pq
import pytest

from tasks.demo import demo
from tasks.demo.demo import read_concepts
from tests.tasks.demo.plan_metadata import plan_rows, write_metadata

PUBLISHED = {
    "laion2b": """SAMPLE_ID int64, URL string, TEXT string, HEIGHT int32, WIDTH int32,
        LICENSE string, NSFW string, similarity double""",
    "coyo700m": """id int64, url string, text string, width int64, height int64,
        image_phash string, text_length int64, word_count int64, num_tokens_bert int64,
        num_tokens_gpt int64, num_faces int64, clip_similarity_vitb32 double,
        clip_similarity_vitl14 double, nsfw_score_opennsfw2 double, nsfw_score_gantman double,
        watermark_score double, aesthetic_score_laion_v2 double""",
}


@pytest.fixture(scope="module", params=PUBLISHED)
def written(request, tmp_path_factory):
    rows = plan_rows(request.param, read_concepts(), 8923)
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, rows, write_metadata(request.param, rows, folder)


def read_rows(paths):
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_columns_and_types_are_the_published_ones(written):
    source, _, paths = written
    expected = [tuple(column.split()) for column in PUBLISHED[source].split(",")]
    for path in paths:
        schema = pq.read_schema(path)
        assert [(field.name, str(field.type)) for field in schema] == expected
        assert all(field.nullable for field in schema)


def test_files_are_named_and_compressed_as_published(written):
    source, _, paths = written
    names = [path.name for path in paths]
    assert names == [f"part-{part:05d}.snappy.parquet" for part in range(len(paths))]
    assert len(paths) == (2 if source == "laion2b" else 1)
    column = pq.ParquetFile(paths[0]).metadata.row_group(0).column(0)
    assert column.compression == "SNAPPY"


def test_every_planned_row_is_written_once_in_order(written):
    source, rows, paths = written
    url, text = ("URL", "TEXT") if source == "laion2b" else ("url", "text")
    found = read_rows(paths)
    assert [(row[url], row[text]) for row in found] == [(row.url, row.caption) for row in rows]
    assert len({row["SAMPLE_ID" if source == "laion2b" else "id"] for row in found}) == len(rows)


def test_values_include_what_the_published_files_include(written):
    source, _, paths = written
    rows = read_rows(paths)
    if source == "laion2b":
        assert {row["NSFW"] for row in rows} == {"UNLIKELY", "UNSURE", "NSFW", None}
        assert {type(row["similarity"]) for row in rows} == {float, type(None)}
        assert max(row["similarity"] or 0 for row in rows) > 1
        assert min(row["WIDTH"] for row in rows) == 0
    else:
        assert all(len(row["image_phash"]) == 16 for row in rows)
        assert all(row["text_length"] == len(row["text"] or "") for row in rows)
        assert any((row["nsfw_score_opennsfw2"] or 0) > 0.5 for row in rows)
        assert any(row["watermark_score"] > 0.8 for row in rows)


def test_the_committed_metadata_is_the_plan_and_follows_the_port(written, tmp_path):
    source, _, paths = written
    files, rows = demo.write_metadata(source, 8923, tmp_path / "same")
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in paths]
    other, _ = demo.write_metadata(source, 9001, tmp_path / "other")
    planned = plan_rows(source, read_concepts(), 9001)
    assert rows == len(planned)
    column = demo.URL_COLUMNS[source]
    assert [row[column] for row in read_rows(other)] == [row.url for row in planned]
