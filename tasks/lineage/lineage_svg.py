"""A lineage document (tasks/artifacts/artifact.py) as one SVG that needs no other file.

From left to right: an artifact stands right of all it was made from. Not here: its drawing and its
colours (lineage.svg.j2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaclip_model.errors import escape_control
from tasks.artifacts.artifact import Lineage

BOX_WIDTH, BOX_HEIGHT = 168, 66
GAP_X, GAP_Y = 44, 22
MARGIN = 16


@dataclass(frozen=True)
class _LineageBox:
    key: str
    kind: str
    """Classes of the drawing; data from outside has dashed borders."""
    title: str
    lines: list[str]
    column: int
    made_from: tuple[str, ...]
    """Keys of other boxes."""


def lineage_svg(lineage: Lineage, name: str = "") -> str:
    """The picture, as the text of an `<svg>` element that can stand in a page or alone in a file.
    `name`, if given, is of what was registered from it, such as `evaclip/3`: a last box."""
    from jinja2 import Environment, StrictUndefined  # only where a picture is drawn

    boxes = _make_boxes(lineage, name)
    places = _place_boxes(boxes)
    strict = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawn = strict.from_string(Path(__file__).with_name("lineage.svg.j2").read_text()).render(
        title=f"Lineage of {name}" if name else "Lineage",
        width=max((x for x, _ in places.values()), default=0) + BOX_WIDTH + MARGIN,
        height=max((y for _, y in places.values()), default=0) + BOX_HEIGHT + MARGIN,
        boxes=boxes,
        places=places,
        box_width=BOX_WIDTH,
        box_height=BOX_HEIGHT,
        gap_x=GAP_X,
    )
    return f"{escape_control(drawn)}\n"


def _make_boxes(lineage: Lineage, name: str) -> list[_LineageBox]:
    columns: dict[str, int] = {}
    boxes: list[_LineageBox] = []
    for node in lineage.nodes:
        parents: list[str] = []
        for role, digest in node.parents.items():
            key = digest
            if lineage.find_node(digest) is None:
                key = f"{node.label}.{role}"
                columns[key] = 0
                about = [f"{node.label}'s data", digest]
                boxes.append(_LineageBox(key, "outside", role, about, 0, ()))
            if key not in parents:
                parents.append(key)
        column = 1 + max((columns.get(parent, 0) for parent in parents), default=-1)
        columns[node.digest] = column
        kind = "model" if node.kind in ("initialise", "train") else "stage"
        kind += " head" if node.digest in lineage.heads else ""
        lines = [node.digest, node.created[:16].replace("T", " ")]
        for what, count in list(node.counts.items())[:1]:
            shown = f"{count:,.4g}" if isinstance(count, float) else f"{count:,}"
            lines.insert(1, f"{shown} {what}")
        boxes.append(_LineageBox(node.digest, kind, node.title, lines, column, tuple(parents)))
    if name:
        column = 1 + max(columns.values(), default=-1)
        boxes.append(_LineageBox(name, "model head", name, ["registered"], column, lineage.heads))
    return boxes


def _place_boxes(boxes: Sequence[_LineageBox]) -> Mapping[str, tuple[int, int]]:
    """Left upper corner of every box: a column for each step; in it a box goes beside the middle of
    its parents, or below the one above it."""
    rows: dict[str, float] = {}
    for column in range(1 + max((box.column for box in boxes), default=0)):
        wanted = []
        for place, box in enumerate(boxes):
            if box.column == column:
                above = [rows[parent] for parent in box.made_from if parent in rows]
                wanted.append((sum(above) / len(above) if above else 0.0, place, box.key))
        lowest = -1.0
        for middle, _, key in sorted(wanted):
            lowest = rows[key] = max(middle, lowest + 1)
    x_step, y_step = BOX_WIDTH + GAP_X, BOX_HEIGHT + GAP_Y
    return {
        box.key: (MARGIN + box.column * x_step, MARGIN + round(rows[box.key] * y_step))
        for box in boxes
    }
