"""The lineage picture: every artifact a box, no box on another, nothing from elsewhere."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import combinations

from tasks.artifacts.artifact import Lineage, Node
from tasks.lineage.lineage_svg import BOX_HEIGHT, BOX_WIDTH, lineage_svg

NAME = "evaclip/3"
SVG = "{http://www.w3.org/2000/svg}"


def node(digest: str, kind: str, name: str = "", **parents: str) -> Node:
    created = "2026-01-02T03:04:05+00:00"
    counts = {"samples": 1_234_567}
    return Node(
        **{"kind": kind, "name": name, "digest": digest, "created": created},
        **{"parents": parents, "counts": counts, "config": {}},
    )


LINEAGE = Lineage(
    heads=("e",),
    nodes=(
        node("m", "merge", laion2b="f" * 16, coyo="0" * 16),
        node("d", "dataset", merge="m"),
        node("i", "initialise"),
        node("1", "train", "<stage & one>", start_from="i", dataset="d"),
        node("2", "train", "a very long name of a stage indeed", start_from="1", dataset="d"),
        node("e", "evaluate", train="2", initialise="i"),
    ),
)


def boxes(picture: str) -> dict[str, tuple[float, float]]:
    """Title of every box -> its corner."""
    groups = ET.fromstring(picture).iter(f"{SVG}g")
    return {
        group.findtext(f"{SVG}title", ""): (
            float(group.find(f"{SVG}rect").get("x")),  # type: ignore[union-attr, arg-type]
            float(group.find(f"{SVG}rect").get("y")),  # type: ignore[union-attr, arg-type]
        )
        for group in groups
    }


def test_every_artifact_and_every_source_is_a_box_and_none_covers_another() -> None:
    picture = lineage_svg(LINEAGE, NAME)
    found = boxes(picture)
    assert len(found) == 9
    for (x, y), (other_x, other_y) in combinations(found.values(), 2):
        assert abs(x - other_x) >= BOX_WIDTH or abs(y - other_y) >= BOX_HEIGHT
    left = {title.split(" · ")[0]: x for title, (x, _) in found.items()}
    order = ("laion2b", "merge", "dataset", "train <stage & one>", "evaluate", "evaclip/3")
    assert [left[title] for title in order] == sorted(left[title] for title in order)
    assert ET.fromstring(picture).get("viewBox")


def test_there_is_an_arrow_for_every_step() -> None:
    picture = lineage_svg(LINEAGE)
    steps = sum(len(one.parents) for one in LINEAGE.nodes)
    assert len(re.findall('marker-end="', picture)) == steps
    assert "1,234,567 samples" in picture


def test_the_picture_needs_no_other_file_and_runs_nothing() -> None:
    picture = lineage_svg(LINEAGE, "a & <b>")
    assert not re.search(r"<script|href=|url\((?!#)|@import", picture)
    assert "a &amp; &lt;b&gt;" in picture


def test_an_empty_lineage_is_a_picture_too() -> None:
    ET.fromstring(lineage_svg(Lineage(heads=(), nodes=())))
