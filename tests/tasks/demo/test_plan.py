"""Rows of the demo's sources: what is sound, what is not, and that it is always the same."""

from collections import Counter
from urllib.parse import unquote, urlsplit

import pytest

from tasks.demo.demo import read_concepts, split_path
from tests.tasks.demo.plan_metadata import (
    ADDED,
    DAMAGED,
    FILTERED,
    NOT_HTTP,
    REPEATED,
    SPELLINGS,
    SPELLINGS_EACH,
    plan_rows,
)

CONCEPTS = read_concepts()
SOURCES = ("laion2b", "coyo700m")
OBTAINABLE = {"sound", "moved", "unencoded", "entities"}


def obtainable(source):
    return {row.concept.key for row in plan_rows(source, CONCEPTS, 8923) if row.kind in OBTAINABLE}


@pytest.mark.parametrize("source", SOURCES)
def test_a_few_percent_of_the_concepts_are_lost_in_a_source(source):
    lost = len(CONCEPTS) - len(obtainable(source))
    assert lost == sum(DAMAGED.values()) - DAMAGED["moved"]
    assert 0 < lost < 0.03 * len(CONCEPTS)


def test_nearly_every_concept_can_be_had_from_one_of_the_sources():
    assert len(obtainable("laion2b") | obtainable("coyo700m")) >= len(CONCEPTS) - 2


@pytest.mark.parametrize("source", SOURCES)
def test_every_oddity_occurs_as_often_as_planned(source):
    kinds = Counter(row.kind for row in plan_rows(source, CONCEPTS, 8923))
    for route in {*DAMAGED, *ADDED}:
        assert kinds[route] == DAMAGED.get(route, 0) + ADDED.get(route, 0)
    for kind, (count, _) in FILTERED.items():
        assert kinds[kind] == (0 if (kind, source) == ("watermarked", "laion2b") else count)
    assert all(kinds[spelling] == SPELLINGS_EACH for spelling in SPELLINGS)
    assert kinds["repeated"] == REPEATED
    assert kinds["not-http"] == len(NOT_HTTP)
    assert (kinds["shared"] > 0) == (source == "coyo700m")


@pytest.mark.parametrize("source", SOURCES)
def test_slow_hosts_are_few_enough_for_a_demo(source):
    kinds = Counter(row.kind for row in plan_rows(source, CONCEPTS, 8923))
    assert 1 <= kinds["slow"] <= 4


@pytest.mark.parametrize("source", SOURCES)
def test_the_plan_depends_on_nothing_but_data_and_port(source):
    rows = plan_rows(source, CONCEPTS, 8923)
    assert rows == plan_rows(source, CONCEPTS, 8923)
    moved = plan_rows(source, CONCEPTS, 9001)
    assert [(row.url or "").replace("9001", "8923") for row in moved] == [
        row.url or "" for row in rows
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_other_spellings_name_the_picture_of_a_sound_row(source):
    rows = plan_rows(source, CONCEPTS, 8923)
    sound = {row.url: row.concept.key for row in rows if row.kind == "sound"}
    for row in rows:
        if row.kind not in SPELLINGS:
            continue
        route, name = split_path(row.url.strip())
        assert row.url not in sound
        assert sound[f"http://127.0.0.1:8923/{route}/{name}"] == row.concept.key


@pytest.mark.parametrize("source", SOURCES)
def test_lower_case_escapes_name_the_unencoded_url_of_the_same_source(source):
    rows = plan_rows(source, CONCEPTS, 8923)
    unencoded = {row.url for row in rows if row.kind == "unencoded"}
    respelt = {unquote(row.url) for row in rows if row.kind == "escape-case"}
    assert respelt == unencoded
    assert all(" " in url and not url.isascii() for url in unencoded)


def test_coyo_lists_urls_of_laion_rows():
    laion = {row.url for row in plan_rows("laion2b", CONCEPTS, 8923) if row.kind == "sound"}
    coyo = [row for row in plan_rows("coyo700m", CONCEPTS, 8923) if "shared" in row.kind]
    assert all(urlsplit(row.url)._replace(fragment="").geturl() in laion for row in coyo)


@pytest.mark.parametrize("source", SOURCES)
def test_a_repeat_is_less_similar_than_the_row_it_repeats(source):
    rows = plan_rows(source, CONCEPTS, 8923)
    sound = {row.url: row for row in rows if row.kind == "sound"}
    repeats = [row for row in rows if row.kind in ("repeated", "recaptioned")]
    assert repeats
    assert all(row.similarity < sound[row.url].similarity for row in repeats)


@pytest.mark.parametrize("source", SOURCES)
def test_only_loopback_addresses_are_listed(source):
    for row in plan_rows(source, CONCEPTS, 8923):
        host = urlsplit((row.url or "").strip()).hostname
        assert host in (None, "127.0.0.1")
