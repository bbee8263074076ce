"""Tables as people write them: which rows are read, which lines cost themselves."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from tasks.tables.text_tables import TextRow, column_names, read_text_table, text_format


def rows(path: Path, **how: object) -> list[TextRow]:
    kind = text_format(str(path))
    assert kind is not None
    return list(read_text_table(str(path), kind, **how))  # type: ignore[arg-type]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_every_value_of_a_csv_is_text(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "image,caption\n1.jpg,1984\n2.jpg,2021-03-01\n3.jpg,true\n")
    assert [row.values["caption"] for row in rows(path)] == ["1984", "2021-03-01", "true"]


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ('1.jpg,"a cat, a dog"', "a cat, a dog"),
        ('1.jpg,"a ""fluffy"" cat"', 'a "fluffy" cat'),
        ('1.jpg,a 5" screen', 'a 5" screen'),
        ('1.jpg,"a cat\non a mat"', "a cat\non a mat"),
        ('1.jpg,"a cat\n\non a mat"', "a cat\n\non a mat"),
        ("1.jpg,a cat\r", "a cat"),
    ],
)
def test_quotes_of_a_csv_follow_rfc_4180(tmp_path: Path, line: str, caption: str) -> None:
    path = written(tmp_path / "a.csv", f"image,caption\n{line}\n2.jpg,next\n")
    first, second = rows(path)
    assert (first.flaw, first.values["caption"], first.line) == (None, caption, 2)
    assert second.line == 3 + line.count("\n")


@pytest.mark.parametrize(
    ("line", "flaw"),
    [
        (b"1.jpg,caf\xe9", "not_utf8"),
        (b'1.jpg,"never closed', "unclosed_quote"),
        (b"1.jpg", "wrong_number_of_columns"),
        (b"1.jpg,a,b", "wrong_number_of_columns"),
    ],
)
def test_a_bad_line_of_a_csv_costs_itself(tmp_path: Path, line: bytes, flaw: str) -> None:
    body = b"0.jpg,zero\n" + line + b"\n" + b"".join(b"%d.jpg,later\n" % n for n in range(200))
    found = rows(written(tmp_path / "a.csv", b"image,caption\n" + body))
    assert [(row.line, row.flaw) for row in found if row.flaw] == [(3, flaw)]
    assert sum(row.flaw is None for row in found) == 201


@pytest.mark.parametrize(
    ("line", "captions"),
    [
        ('1.jpg\t"so called" cat', ['"so called" cat']),
        ('1.jpg\t"never closed', ['"never closed']),
        ('1.jpg\ta 5" screen', ['a 5" screen']),
        ('1.jpg\t"a\tcat"', ["a\tcat"]),
        ('1.jpg\t"a ""cat""\non a mat"', ['a "cat"\non a mat']),
    ],
)
def test_a_quote_of_a_tsv_encloses_where_it_follows_the_rule_and_is_a_character_elsewhere(
    tmp_path: Path, line: str, captions: list[str]
) -> None:
    path = written(tmp_path / "a.tsv", f"image\tcaption\n{line}\n9.jpg\tnext\n")
    assert [row.values["caption"] for row in rows(path)] == [*captions, "next"]


def test_settings_say_whether_quotes_enclose(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'image,caption\n1.jpg,"a cat"\n')
    assert rows(path, quoting="none")[0].values["caption"] == '"a cat"'
    path = written(tmp_path / "a.tsv", 'image\tcaption\n1.jpg\t"open\n')
    assert rows(path, quoting="quotes")[0].flaw == "unclosed_quote"


def test_a_list_without_names_has_numbered_columns(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", "a cat\thttp://a.example/1.jpg\n")
    assert rows(path, header=False)[0].values == {
        "column0": "a cat",
        "column1": "http://a.example/1.jpg",
    }
    assert column_names(str(path), "csv", "auto", False) == ["column0", "column1"]


def test_rows_of_json_lines_are_texts_and_a_bad_one_costs_itself(tmp_path: Path) -> None:
    lines = ['{"a": 1984, "b": null}', "{", "[1]", "[" * 100_000, '{"a": "x\\ud83d"}']
    lines += [json.dumps({"a": {"b": 1}})]
    found = rows(written(tmp_path / "a.jsonl", "\n".join(lines)))
    assert [row.values.get("a") for row in found if not row.flaw] == ["1984", "x?", None]
    assert [(row.line, row.flaw) for row in found if row.flaw] == [
        (2, "not_json"),
        (3, "not_json"),
        (4, "not_json"),
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_is_a_table_whatever_its_name(
    tmp_path: Path, name: str, indent: int | None
) -> None:
    text = json.dumps([{"image": "1.jpg", "n": 1.50}, "none", {"image": ["a"]}], indent=indent)
    content = text.replace("1.5", "1.50").encode()
    found = rows(written(tmp_path / name, gzip.compress(content) if ".gz" in name else content))
    assert found[0].values == {"image": "1.jpg", "n": "1.50"}
    assert [(row.line, row.flaw) for row in found] == [(1, None), (2, "not_json"), (3, None)]


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    for lines in ('{"a": "1"}', '{"a": "1"}\n{"a": "2"}\n'):
        assert rows(written(tmp_path / "a.json", lines))[0].values == {"a": "1"}


def test_cocos_captions_are_rows_with_their_images(tmp_path: Path) -> None:
    coco = {
        "images": [{"id": 7, "file_name": "7.jpg", "coco_url": "http://h/7.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "a cat"},
            {"id": 2, "image_id": 8, "caption": "lost"},
        ],
    }
    for indent in (None, 1):
        first, lost = rows(written(tmp_path / "coco.json", json.dumps(coco, indent=indent)))
        assert (first.values["file_name"], first.values["caption"]) == ("7.jpg", "a cat")
        assert first.values["coco_url"] == "http://h/7.jpg"
        assert "file_name" not in lost.values


@pytest.mark.parametrize(
    "text", ['{"a.jpg":\n "a cat"}', "[1,", '{"images": [],\n "annotations": 1}']
)
def test_json_of_another_form_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        InputError, match=r"a\.json does not hold a table: expected a list of objects"
    ):
        rows(written(tmp_path / "a.json", text))


def test_a_packed_table_is_read_and_a_damaged_one_is_one_sentence(tmp_path: Path) -> None:
    packed = gzip.compress(b"image,caption\n" + b"1.jpg,a cat\n" * 1000)
    assert len(rows(written(tmp_path / "a.csv.gz", packed))) == 1000
    with pytest.raises(InputError, match=r"b\.csv\.gz cannot be read to its end"):
        rows(written(tmp_path / "b.csv.gz", packed[:-20]))


def test_a_byte_order_mark_is_no_part_of_a_name_and_utf16_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", b"\xef\xbb\xbfimage,caption\n1.jpg,a cat\n")
    assert rows(path)[0].values["image"] == "1.jpg"
    with pytest.raises(InputError, match="UTF-16: save it as UTF-8"):
        rows(written(tmp_path / "b.csv", "image,caption\n".encode("utf-16")))
