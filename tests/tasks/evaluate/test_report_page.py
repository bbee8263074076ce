"""The whole report, as a page and as Markdown, from made-up results with every part."""

from __future__ import annotations

import base64
import csv
import re
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from evaclip_model.reading.image_decoder import decode_image
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.report.examples import THUMBNAIL_PX
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.numbers import format_interval
from tasks.evaluate.report.tables import (
    average_interval,
    average_table,
    count_verdicts,
    glance_table,
)
from tasks.evaluate.report.write_reports import summary_sentences, write_reports
from tasks.evaluate.sets.set_registry import known_sets
from tests.tasks.evaluate.made_up import made_up

IMAGENETS = (
    *("imagenet1k", "imagenetv2", "imagenet-a", "imagenet-r", "imagenet-sketch", "objectnet"),
)
FEW = (*IMAGENETS, "cifar10", "ucf101", "kinetics400", "flickr30k", "voc2007-multilabel")
FAILED = {"birdsnap": "0.tar: image s0000007: cannot be decoded"}
HOSTILE = '<script>alert("x")</script> | **bold** & [a](javascript:b) {{ 7 * 7 }} \x1b[31m\u202e'
Results = dict[str, Any]
Rankings = dict[str, dict[str, Scored]]


class Page(HTMLParser):
    """What a browser would see: ids, links, references, tags that are not closed."""

    VOID = frozenset({"meta", "img", "br", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
                self.references.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Rankings]:
    return made_up(tmp_path_factory.mktemp("made_up"), FEW, images_per_class=1, failed=FAILED)


@pytest.fixture(scope="module")
def reports(
    made: tuple[Results, Rankings], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reports")
    return {path.name: path.read_text() for path in write_reports(folder, *made)}


def test_the_page_asks_for_nothing_and_its_links_lead_somewhere(reports: dict[str, str]):
    page = Page(reports["report.html"])
    assert page.open == []
    outside = [one for one in page.references if not one.startswith(("#", "data:image/webp"))]
    assert outside == []
    assert {one[1:] for one in page.references if one.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "iframe", "form"} & set(page.tags)
    assert not re.search(r"url\(|@import", reports["report.html"])
    assert "default-src 'none'" in reports["report.html"]


def test_the_page_has_every_part_and_leads_to_it(reports: dict[str, str]):
    page = Page(reports["report.html"])
    parts = (
        *("failed", "figures", "verdicts", "paper", "averages", "compute"),
        *("models", "contamination", "sets", "provenance"),
        *(f"table-{one}" for one in ("1a", "1b", "2", "3", "4")),
        *(f"set-{one}" for one in FEW),
    )
    assert set(parts) <= set(page.ids)
    in_navigation = {"failed", "figures", "verdicts", "paper", "models", "sets", "provenance"}
    assert {f"#{one}" for one in in_navigation} <= set(page.references)


def test_the_papers_rows_stand_beside_ours_with_errata_below(reports: dict[str, str]):
    for text in (reports["report.html"], reports["report.md"]):
        assert text.count("EVA-02-CLIP-E/14+") >= 5
        assert "E25, measurement" in text and "E1, arithmetic" in text
        assert "minus EVA-02-CLIP-B/16" in text
        assert "20 of its 27 sets not evaluated" in text


def test_figures_of_a_set_have_intervals_ties_chance_and_the_other_model(reports: dict[str, str]):
    article = reports["report.html"].partition('id="set-objectnet"')[2].partition("</article>")[0]
    for word in ("95 % interval", "champion", "chance", "mean per class"):
        assert word in article
    assert "All 113 classes, the weakest first" in article
    assert "content" in article and "What these figures rest on" in article
    assert article.count("<img") >= 4


def test_retrieval_and_labels_have_their_own_examples(reports: dict[str, str]):
    page = reports["report.html"]
    retrieval = page.partition('id="set-flickr30k"')[2].partition("</article>")[0]
    assert "A caption and its first images" in retrieval
    assert "An image and its first captions" in retrieval
    labels = page.partition('id="set-voc2007-multilabel"')[2].partition("</article>")[0]
    assert "Classes and their first images" in labels and "average precision" in labels
    assert "McNemar" in page


def test_names_and_captions_cannot_change_the_page_or_the_table(
    made: tuple[Results, Rankings], tmp_path: Path
):
    results, scored = deepcopy(made[0]), dict(made[1])
    results["title"] = HOSTILE
    results["failed"] = {"birdsnap": HOSTILE}
    results["results"]["cifar10"]["candidate"]["per_class"][0]["name"] = HOSTILE
    for key, field in (("cifar10", "classnames"), ("flickr30k", "samples")):
        evalset = scored[key]["candidate"].evalset
        hostile: Any = (HOSTILE,) * len(evalset.classnames)
        if field == "samples":
            hostile = tuple(replace(one, captions=(HOSTILE,) * 5) for one in evalset.samples)
        changed = replace(evalset, **{field: hostile})
        scored[key] = {name: replace(one, evalset=changed) for name, one in scored[key].items()}
    page, markdown, *_ = (path.read_text() for path in write_reports(tmp_path, results, scored))
    assert "script" not in Page(page).tags
    for text in (page, markdown):
        assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
        assert "{{ 7" in text
    assert "&lt;script&gt;" in page
    rows = [line for line in markdown.splitlines() if "alert" in line and line.startswith("|")]
    assert rows and all(r"\|" in line and r"\*\*bold" in line for line in rows)


def test_every_table_in_markdown_has_as_many_cells_in_every_row(reports: dict[str, str]):
    width = None
    for line in reports["report.md"].splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert width is None or cells is None or cells == width, line
        width = cells


@pytest.mark.parametrize("key", ["cifar10", "flickr30k", "kinetics400", "voc2007-multilabel"])
def test_one_set_alone_is_a_report(key: str, tmp_path: Path):
    results, scored = made_up(tmp_path, [key], images_per_class=1)
    for part in ("paper", "paired", "averages", "contamination", "failed"):
        del results[part]
    html, markdown, summary, _ = write_reports(tmp_path, results, scored)
    page = Page(html.read_text())
    assert f"set-{key}" in page.ids and "verdicts" not in page.ids and "models" not in page.ids
    assert markdown.read_text().startswith("# Made-up evaluation\n")
    assert len(summary.read_text()) < 3_000
    assert len(glance_table(Findings(results)).rows) == (2 if key == "flickr30k" else 1)


@pytest.mark.parametrize("key", ["cifar10", "flickr30k"])
def test_a_wrong_answer_leads_to_the_training_samples_nearest_to_its_picture(
    key: str, tmp_path: Path
) -> None:
    results, scored = made_up(tmp_path, [key])
    page = "http://127.0.0.1:4300/"
    html = write_reports(tmp_path, results, scored, search=page)[0].read_text()
    links = re.findall(r'href="(http://127\.0\.0\.1:4300/[^"]*)" target="_blank" rel="nor', html)
    assert html.count("nearest training samples") == len(links) > 0
    asked = parse_qs(urlsplit(links[0]).query, strict_parsing=True)
    picture = decode_image(base64.b64decode(asked.pop("picture")[0], validate=True))
    assert max(picture.size) <= THUMBNAIL_PX and asked == {}
    assert f"data:image/webp;base64,{parse_qs(urlsplit(links[0]).query)['picture'][0]}" in html
    alone = write_reports(tmp_path, results, scored)[0].read_text()
    assert "nearest training samples" not in alone


def test_a_set_of_the_users_own_needs_no_entry_in_the_registry(
    made: tuple[Results, Rankings], tmp_path: Path
):
    results, scored = deepcopy(made[0]), made[1]
    for part in ("sets", "results", "chance"):
        results[part] = {"my-own": results[part]["cifar10"]}
    for part in ("paper", "paired", "averages", "contamination"):
        del results[part]
    results["sets"]["my-own"] |= {"metric": None, "expected_n": None, "split": None}
    page = write_reports(tmp_path, results, {"my-own": scored["cifar10"]})[0].read_text()
    assert 'id="set-my-own"' in page and "paper" not in Page(page).ids


def test_the_same_results_give_the_same_bytes(
    made: tuple[Results, Rankings], reports: dict[str, str], tmp_path: Path
):
    again = {path.name: path.read_text() for path in write_reports(tmp_path, *made)}
    assert again == reports


def test_every_figure_is_in_the_flat_table(made: tuple[Results, Rankings], reports: dict[str, str]):
    rows = list(csv.DictReader(reports["figures.csv"].splitlines()))
    assert {row["set"] for row in rows} == set(FEW)
    (top1,) = (
        row
        for row in rows
        if (row["set"], row["model"], row["metric"]) == ("cifar10", "candidate", "top1")
    )
    assert float(top1["value"]) == made[0]["results"]["cifar10"]["candidate"]["top1"]
    assert float(top1["published"]) == pytest.approx(0.984)
    assert top1["verdict"] in ("reproduced", "differs")


def test_the_summary_says_how_many_figures_are_reproduced(made: tuple[Results, Rankings]):
    found = Findings(made[0])
    counts = count_verdicts(found, "candidate")
    said = next(one for one in summary_sentences(found) if "the paper prints" in one)
    assert f"Of {sum(counts.values())} figures" in said
    assert f"{counts['reproduced']} " in said
    assert summary_sentences(found)[1] == "1 set could not be evaluated: Birdsnap."


def test_an_average_has_an_interval_only_where_all_its_sets_have(made: tuple[Results, Rankings]):
    found = Findings(made[0])
    low, high = average_interval(found, "1b", "candidate") or (0, 0)
    mean = made[0]["averages"]["1b"]["candidate"]["value"] / 100
    assert low < mean < high and high - low < 0.1
    assert average_interval(found, "2", "candidate") is None
    table = average_table(found)
    assert table is not None
    assert table.rows[0].cells[3].text == format_interval((low, high))
    assert [one.cells[2].text == "refused" for one in table.rows] == [
        *(False, False, True, True, True, True)
    ]


@pytest.mark.slow
def test_a_page_of_all_sets_stays_small(tmp_path: Path):
    results, scored = made_up(tmp_path, list(known_sets()), images_per_class=1)
    html, markdown, *_ = write_reports(tmp_path, results, scored)
    assert html.stat().st_size < 6_000_000
    assert markdown.stat().st_size < 500_000
