"""What tables of strangers have in common, by every program that reads them."""

from __future__ import annotations

import pytest

from evaclip_model.reading.table_columns import match_column, tell_delimiter


@pytest.mark.parametrize(
    ("columns", "part", "found"),
    [
        (["", "Image", " Caption"], "images", "Image"),
        (["", "Image", " Caption"], "captions", " Caption"),
        (["filepath", "title"], "captions", "title"),
        (["text", "caption"], "captions", "caption"),
        (["image", "IMAGE"], "images", "image"),
        (["a", "b"], "images", ""),
    ],
)
def test_a_column_is_known_by_its_name_case_and_spaces_aside(columns, part, found):
    assert match_column(columns, part) == found


@pytest.mark.parametrize(
    ("line", "delimiter"),
    [
        ("filepath\ttitle", "\t"),
        ("image_name| comment_number| comment", "|"),
        ("url;caption", ";"),
        ("a/1.jpg,cat|dog|bird", ","),
        ("caption", ","),
    ],
)
def test_values_stand_between_commas_or_where_there_is_none_another_sign(line, delimiter):
    assert tell_delimiter(line) == delimiter
