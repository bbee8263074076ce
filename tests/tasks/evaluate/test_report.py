"""The small parts of the report: numbers as words, axes, curves, pictures."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
import torch
from markupsafe import Markup
from PIL import Image
from rich.console import Console

from evaclip_model.errors import InputError
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.training.cost import image_flops
from evaclip_model.zeroshot.exact_ranks import rank_targets
from tasks.evaluate.paper.published import paper, rows_of
from tasks.evaluate.report.charts import (
    Bubble,
    ChartLine,
    bubble_chart,
    choose_ticks,
    line_chart,
    loss_chart,
    read_curve,
)
from tasks.evaluate.report.examples import Amount, _draw_queries, make_thumbnail
from tasks.evaluate.report.numbers import (
    format_interval,
    format_percent,
    format_plural,
    format_points,
    format_short,
    format_signed,
    format_size,
    p_value,
)
from tasks.evaluate.report.templates import MACROS
from tasks.table import (
    Cell,
    Table,
    TableColumn,
    escape_markdown,
    markdown_table,
    terminal_table,
    words,
)
from tests.tasks.evaluate.answers import caption_set


def test_shares_are_shown_with_the_digits_they_deserve():
    assert [format_percent(v) for v in (0.0, 0.00063, 0.0621, 0.5, 1.0)] == [
        "0.00 %",
        "0.06 %",
        "6.21 %",
        "50.0 %",
        "100 %",
    ]
    assert format_interval((0.0512, 0.1234)) == "5.12 – 12.3 %"


def test_differences_sizes_and_counts_are_words_too():
    assert [format_signed(v) for v in (0.31, -1.24, -0.04, None)] == ["+0.3", "−1.2", "0.0", "–"]
    assert [format_points(v) for v in (2.3, -1.0, None)] == ["2.3", "−1.0", "–"]
    assert [format_size(v) for v in (149e6, 13e9, 790)] == ["149M", "13B", "790"]
    assert [format_size(v, digits=1) for v in (5.04e9, 427.8e6)] == ["5.0B", "428M"]
    assert [p_value(v) for v in (0.314, 0.0123, 0.0001)] == ["0.31", "0.012", "< 0.001"]
    assert (format_plural(1, "set"), format_plural(2_000, "class", "classes")) == (
        "1 set",
        "2,000 classes",
    )


@pytest.mark.parametrize("bounds", [(0, 5.54), (0, 100), (0.0123, 0.0177), (-3, 3), (7, 7), (0, 0)])
def test_ticks_enclose_the_data_with_few_round_steps(bounds: tuple[float, float]):
    found = choose_ticks(*bounds)
    assert found[0] <= bounds[0] and found[-1] >= bounds[1]
    assert 2 <= len(found) <= 8
    assert [format_short(v) for v in (0.25, 40, 12_000, 2_000_000)] == ["0.25", "40", "12k", "2M"]


def test_a_chart_leaves_out_points_that_are_not_finite_and_escapes_its_words():
    lines = [ChartLine([(1, 1), (2, float("nan")), (3, 2)], "<loss>", "subject")]
    svg = str(line_chart(lines, x="a < b", y="loss"))
    assert "nan" not in svg and "&lt;loss&gt;" in svg and "a &lt; b" in svg
    assert svg.count(",") == 2


def test_a_chart_of_one_point_or_of_none_is_still_a_page():
    assert "<svg" in line_chart([ChartLine([(5, 5)], "one", "raw")], x="x", y="y")
    assert "no points" in line_chart([ChartLine([(1, float("inf"))], "none", "raw")], x="x", y="y")


def test_a_curve_without_a_complete_step_is_refused(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(InputError, match="is missing"):
        read_curve(path)
    path.write_text('{"step": 1, "sam')
    with pytest.raises(InputError, match="holds no training step"):
        read_curve(path)


def test_a_long_curve_is_thinned_for_drawing_and_keeps_its_totals(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    steps = ({"step": n, "samples": 64 * n, "loss": 4.0, "step_s": 0.1} for n in range(1, 20_001))
    path.write_text("\n".join(map(json.dumps, steps)))
    curve = read_curve(path)
    assert (curve.batch, curve.samples[-1]) == (64, 1_280_000)
    assert curve.seconds == pytest.approx(2_000)
    assert len(loss_chart(curve)) < 30_000


def test_a_thumbnail_is_small_and_puts_transparency_on_white():
    content = io.BytesIO()
    Image.new("RGBA", (600, 300), (255, 0, 0, 0)).save(content, "PNG")
    uri = make_thumbnail(content.getvalue())
    decoded = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert decoded.size == (72, 36) and decoded.mode == "RGB"
    assert min(decoded.getpixel((10, 10))) > 250


def test_circles_keep_their_names_apart_and_the_unknown_ones_are_dashed():
    crowd = [Bubble(100 + i, 70 + i / 10, 1e12, f"model {i} <b>", "eva") for i in range(6)]
    svg = str(bubble_chart([*crowd, Bubble(35, 71, None, "ours", "subject")], x="x", y="y"))
    places = set(re.findall(r'<text class="name [a-z]+" x="([^"]+)" y="([^"]+)"', svg))
    assert len(places) == 7
    assert svg.count("<circle") == 7 and svg.count('class="subject unknown"') == 1
    assert "<b>" not in svg and "nan" not in svg


def test_a_bar_shows_what_there_is():
    everything = MACROS.interval_bar(0.5, (0.4, 0.6), published=0.7, chance=0.1)
    assert all(f'class="{one}"' in everything for one in ("range", "published", "chance"))
    alone = MACROS.interval_bar(0.5, None)
    assert "range" not in alone and "published" not in alone


OURS = {
    "EVA-01-CLIP-B/16": "EVA01-CLIP-B-16",
    "EVA-01-CLIP-g/14": "EVA01-CLIP-g-14",
    "EVA-01-CLIP-g/14+": "EVA01-CLIP-g-14-plus",
    "EVA-02-CLIP-B/16": "EVA02-CLIP-B-16",
    "EVA-02-CLIP-L/14": "EVA02-CLIP-L-14",
    "EVA-02-CLIP-L/14+": "EVA02-CLIP-L-14-336",
    "EVA-02-CLIP-E/14": "EVA02-CLIP-E-14",
    "EVA-02-CLIP-E/14+": "EVA02-CLIP-E-14-plus",
}
PLAIN_VITS = {
    # image size, patch, width, layers, width of the MLP, dimensions of the features
    "OpenAI CLIP-B/16": (224, 16, 768, 12, 3072, 512),
    "OpenAI CLIP-L/14": (224, 14, 1024, 24, 4096, 768),
    "OpenAI CLIP-L/14+": (336, 14, 1024, 24, 4096, 768),
    "Open CLIP-B/16": (224, 16, 768, 12, 3072, 512),
    "Open CLIP-L/14": (224, 14, 1024, 24, 4096, 768),
    "Open CLIP-H/14": (224, 14, 1280, 32, 5120, 1024),
    "Open CLIP-g/14": (224, 14, 1408, 40, 6144, 1024),
    "Open CLIP-G/14": (224, 14, 1664, 48, 8192, 1280),
}


def plain_vit(px: int, patch: int, width: int, layers: int, mlp: int, embed: int) -> ModelConfig:
    """A plain ViT in the terms of our configs: only what its products depend on is set."""
    plain = ModelConfig.load("EVA01-CLIP-B-16")
    changes = {"image_px": px, "patch_px": patch, "width": width, "layers": layers}
    vision = plain.vision.model_copy(update={**changes, "mlp_width": mlp})
    return plain.model_copy(update={"vision": vision, "embed_dim": embed})


def test_compute_of_published_models_is_that_of_their_architectures():
    configs = {name: ModelConfig.load(shipped) for name, shipped in OURS.items()}
    configs |= {name: plain_vit(*tower) for name, tower in PLAIN_VITS.items()}
    given = {one.row: one.gflops for one in paper().models}
    assert given.keys() == {row.model for row in rows_of("1a")}
    counted = {name: image_flops(config) / 1e9 for name, config in configs.items()}
    assert pytest.approx(counted, rel=1e-5) == given


def example() -> Table:
    """Every kind of row and cell."""
    table = Table.of("a", "b", words("c"), TableColumn("d", is_drawn=True))
    first = Cell("1.0", "good", notes=table.cite(["first", "second"]))
    drawn = Cell("", drawing=Markup("<svg></svg>"))
    table.add("a group", style="group")
    table.add(Cell("x | y", link="there"), first, Cell("<b>", url="https://here/?a&b"), drawn)
    again = Cell("2.0", share=0.25, notes=table.cite(["second"]))
    table.add("z", again, None, drawn, style="ours")
    return table


def test_a_table_in_markdown_has_its_footnotes_once_and_escapes_its_cells():
    assert markdown_table(example()).splitlines() == [
        "| a | b | c |",
        "| :-- | --: | :-- |",
        "| **a group** |  |  |",
        r"| x \| y | 1.0<sup>1</sup><sup>2</sup> | [&lt;b>](https://here/?a&b) |",
        "| **z** | **2.0**<sup>2</sup> |  |",
        "",
        "1. first",
        "2. second",
    ]
    assert escape_markdown("a\n<b> [c] *d* \\") == r"a &lt;b> \[c\] \*d\* \\"


def test_a_table_in_html_names_its_rows_and_escapes_its_cells():
    rows = [row for row in MACROS.html_table(example(), is_wide=True).split("<tr")]
    assert 'class="card scroll wide"' in rows[0]
    assert '<th colspan="4" scope="rowgroup">a group</th>' in rows[2]
    assert '<th scope="row"><a href="#there">x | y</a></th>' in rows[3]
    assert '<td class="good">1.0<sup>1, 2</sup></td>' in rows[3]
    assert '<td class="text"><a href="https://here/?a&amp;b">&lt;b&gt;</a></td>' in rows[3]
    assert rows[3].rstrip().endswith("<td><svg></svg></td></tr>")
    assert '<td class="share" style="--v:0.250"><span>2.0</span><sup>2</sup></td>' in rows[4]
    assert '<ol class="notes"><li>first</li><li>second</li></ol>' in rows[4]


def test_a_table_for_a_terminal_sets_numbers_right_and_leaves_drawings_out():
    out = io.StringIO()
    Console(file=out, width=60).print(terminal_table(example()))
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "a          b  c",
        "a group",
        "x | y    1.0  <b>",
        "z        2.0",
    ]


def test_examples_of_retrieval_are_parted_into_right_and_wrong_answers() -> None:
    evalset = caption_set([1] * 10)
    logits = torch.eye(10)
    logits[6:] = torch.eye(10)[[7, 8, 9, 6]]
    ranking = rank_targets(logits, torch.arange(10))
    drawn = _draw_queries(evalset, ranking, Amount.for_sets(1))
    right = {query for group, query in drawn if "of 10 answered right" in group}
    wrong = {query for group, query in drawn if group == "drawn from the other 4"}
    assert right <= set(range(6)) and wrong <= set(range(6, 10))
    assert right and wrong and len(right | wrong) == len(drawn)
