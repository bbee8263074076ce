"""A lineage document (tasks/artifacts/provenance.py) as one SVG that needs no other file.

From left to right: an artifact stands right of all it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tasks.artifacts.provenance import Lineage

BOX_WIDTH, BOX_HEIGHT = 168, 66
GAP_X, GAP_Y = 44, 22
MARGIN = 16
_CHARS = 24
"""Of the small print, or of a title, that fit into a box."""
_STYLE = """
.lineage text{font:12px system-ui,sans-serif;fill:#1d2733}
.lineage .small{font:10px ui-monospace,monospace;fill:#5a6876}
.lineage rect{fill:#f4f7fa;stroke:#8fa3b5}
.lineage .outside rect{fill:#fff;stroke-dasharray:4 3}
.lineage .model rect{fill:#e6f3ea;stroke:#5d9b74}
.lineage .head rect{stroke-width:2.5}
.lineage path{fill:none;stroke:#8fa3b5;stroke-width:1.2}
.lineage marker path{fill:#8fa3b5;stroke:none}
@media (prefers-color-scheme:dark){
.lineage text{fill:#e3e9ef}.lineage .small{fill:#9fb0c0}
.lineage rect{fill:#1f2933}.lineage .outside rect{fill:#12181e}.lineage .model rect{fill:#1d3427}}
"""
_MODELS = ("initialise", "train")


@dataclass(frozen=True)
class _LineageBox:
    key: str
    kind: str
    title: str
    lines: tuple[str, ...]
    column: int
    made_from: tuple[str, ...]
    """Keys of other boxes."""


def lineage_svg(lineage: Lineage, name: str = "") -> str:
    """The picture, as the text of an `<svg>` element that can stand in a page or alone in a file.

    Data from outside is drawn with dashed borders. `name` is of what was registered from it and,
    behind a space, what goes below it, such as `evaclip/3 @champion`; a last box, if given.
    """
    boxes = _make_boxes(lineage, name)
    places = _place_boxes(boxes)
    width = max((x for x, _ in places.values()), default=0) + BOX_WIDTH + MARGIN
    height = max((y for _, y in places.values()), default=0) + BOX_HEIGHT + MARGIN
    title = f"Lineage of {name}" if name else "Lineage"
    parts = [
        f'<svg class="lineage" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        '<defs><marker id="lineage-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>',
        *(
            _draw_arrow(places[parent], places[box.key])
            for box in boxes
            for parent in box.made_from
            if parent in places
        ),
        *(_draw_box(box, *places[box.key]) for box in boxes),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


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
                about = (f"{node.label}'s data", digest)
                boxes.append(_LineageBox(key, "outside", role, about, 0, ()))
            if key not in parents:
                parents.append(key)
        column = 1 + max((columns.get(parent, 0) for parent in parents), default=-1)
        columns[node.digest] = column
        kind = "model" if node.kind in _MODELS else "stage"
        kind = f"{kind} head" if node.digest in lineage.heads else kind
        lines = [node.digest, node.created[:16].replace("T", " ")]
        for what, count in list(node.counts.items())[:1]:
            shown = f"{count:,.4g}" if isinstance(count, float) else f"{count:,}"
            lines.insert(1, f"{shown} {what}")
        boxes.append(
            _LineageBox(node.digest, kind, node.title, tuple(lines), column, tuple(parents))
        )
    if name:
        column = 1 + max(columns.values(), default=-1)
        title, _, below = name.partition(" ")
        small = ("registered", *([below] if below else []))
        boxes.append(_LineageBox(name, "model head", title, small, column, lineage.heads))
    return boxes


def _place_boxes(boxes: Sequence[_LineageBox]) -> Mapping[str, tuple[int, int]]:
    """Left upper corner of every box: a column for each step, in a column by what it is made from.

    A box goes beside the middle of its parents, or below the one above it.
    """
    rows: dict[str, float] = {}
    for column in range(1 + max((box.column for box in boxes), default=0)):
        wanted = []
        for place, box in enumerate(boxes):
            if box.column == column:
                above = [rows[parent] for parent in box.made_from if parent in rows]
                wanted.append((sum(above) / len(above) if above else 0.0, place, box))
        lowest = -1.0
        for middle, _, box in sorted(wanted, key=lambda one: one[:2]):
            lowest = max(middle, lowest + 1)
            rows[box.key] = lowest
    step = BOX_HEIGHT + GAP_Y
    return {
        box.key: (
            MARGIN + box.column * (BOX_WIDTH + GAP_X),
            MARGIN + round(rows[box.key] * step),
        )
        for box in boxes
    }


def _draw_arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    x1, y1 = start[0] + BOX_WIDTH, start[1] + BOX_HEIGHT // 2
    x2, y2 = end[0], end[1] + BOX_HEIGHT // 2
    bend = max(GAP_X, (x2 - x1) // 2)
    curve = f"M{x1} {y1}C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"
    return f'<path d="{curve}" marker-end="url(#lineage-tip)"/>'


def _draw_box(box: _LineageBox, x: int, y: int) -> str:
    def texts() -> Iterator[str]:
        yield f'<text x="{x + 10}" y="{y + 18}">{escape(_shorten_text(box.title))}</text>'
        for number, line in enumerate(box.lines):
            at = f'x="{x + 10}" y="{y + 33 + 13 * number}"'
            yield f'<text class="small" {at}>{escape(_shorten_text(line))}</text>'

    frame = f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
    whole = escape(" · ".join((box.title, *box.lines)))
    return f'<g class="{box.kind}"><title>{whole}</title>{frame}{"".join(texts())}</g>'


def _shorten_text(text: str) -> str:
    return text if len(text) <= _CHARS else f"{text[: _CHARS - 1]}…"
