from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaclip_model.errors import InputError
from tasks.artifacts.artifact import Address, produce_artifact
from tasks.merge.config import STAGE, MergeConfig
from tasks.merge.merge import merge_sources
from tests.tasks.merge.metadata import COYO_700M, coyo, find_files, write


def error_of(tmp_path: Path, files: str, **source: object) -> str:
    """The sentence a user reads; checks that nothing looks finished afterwards."""
    config = MergeConfig.from_mapping(
        {"sources": [{"name": "mine", "files": files, **source}]}, where="recipe.toml"
    )
    at = Address.of(tmp_path / "runs", STAGE, config)
    with pytest.raises(InputError) as caught:
        produce_artifact(at, lambda out: merge_sources(config, find_files(config), out, threads=1))
    assert not list(tmp_path.glob("runs/**/manifest.json"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_file_matches(tmp_path: Path) -> None:
    assert "source 'mine': no file matches" in error_of(tmp_path, str(tmp_path / "*.parquet"))


def test_a_missing_column_is_named_with_the_nearest_existing_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", COYO_700M, [coyo(1)])
    message = error_of(tmp_path, str(path), columns={"url": "url", "caption": "texts"})
    assert message == (
        f"{path}: source 'mine' has no column 'texts' for its caption; did you mean 'text'?"
    )


def test_a_layout_without_its_caption_column_says_so(tmp_path: Path) -> None:
    pq.write_table(pa.table({"URL": ["http://a"], "TEXTS": ["x"]}), tmp_path / "a.parquet")
    message = error_of(tmp_path, str(tmp_path / "a.parquet"))
    assert "no column 'TEXT' for its caption; did you mean 'TEXTS'?" in message


def test_a_column_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", COYO_700M, [coyo(1)])
    assert "column 'id' is BIGINT, but its url must be text" in error_of(
        tmp_path, str(path), columns={"url": "id", "caption": "text"}
    )
    assert "column 'text' is VARCHAR, but its similarity must be a number" in error_of(
        tmp_path, str(path), columns={"url": "url", "caption": "text", "similarity": "text"}
    )


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>not found</html>" * 100])
def test_what_is_no_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "a.parquet", COYO_700M, [coyo(1)])
    (tmp_path / "b.parquet").write_bytes(content)
    message = error_of(tmp_path, str(tmp_path / "*.parquet"))
    assert f"{tmp_path / 'b.parquet'} cannot be read as parquet" in message


def test_a_truncated_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", COYO_700M, [coyo(number) for number in range(3_000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path} cannot be read as parquet" in error_of(tmp_path, str(path))
    path.write_bytes(whole[:4] + b"\xff" * 40_000 + whole[40_004:])
    assert f"{path} cannot be read as parquet" in error_of(tmp_path, str(path))


def test_a_source_without_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", COYO_700M, [])
    assert "source 'mine' is empty" in error_of(tmp_path, str(path))


def test_a_source_of_which_nothing_is_left_names_the_main_reason(tmp_path: Path) -> None:
    rows = [coyo(1, text="no"), coyo(2, nsfw_score_gantman=1.0), coyo(3, nsfw_score_gantman=1.0)]
    path = write(tmp_path / "a.parquet", COYO_700M, rows)
    message = error_of(tmp_path, str(path))
    assert "source 'mine' has no row left of 3: most (2) were dropped as unsafe" in message


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"sources": []}, "'sources'"),
        ({"sources": [{"name": "a", "files": "x"}] * 2}, "two sources are named 'a'"),
        ({"sources": [{"name": "A/b", "files": "x"}]}, "sources.0.name"),
        ({"sources": [{"name": "a", "files": "x", "file": "y"}]}, "did you mean 'files'?"),
        ({"sources": [{"name": "a", "files": "x", "columns": "layon"}]}, "'layon'"),
        (
            {
                "sources": [{"name": "a", "files": "x"}],
                "filters": {"min_caption_chars": 9, "max_caption_chars": 8},
            },
            "max_caption_chars is smaller than min_caption_chars",
        ),
        ({"sources": [{"name": "a", "files": "x"}], "memory_limit": "lots"}, "memory_limit"),
    ],
)
def test_a_wrong_recipe_is_explained(table: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        MergeConfig.from_mapping(table, where="recipe.toml")
    assert expected in str(caught.value)
    assert str(caught.value).startswith("recipe.toml: ")
