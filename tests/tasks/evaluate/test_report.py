"""The small parts of the report: numbers as words, axes, curves, pictures."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from evaclip_model.errors import InputError
from tasks.evaluate.report.charts import Line, line_chart, short, ticks
from tasks.evaluate.report.curves import loss_chart, read_curve
from tasks.evaluate.report.numbers import interval, ordinal, percent, times
from tasks.evaluate.report.pictures import thumbnail


def test_shares_are_shown_with_the_digits_they_deserve():
    assert [percent(v) for v in (0.0, 0.00063, 0.0621, 0.5, 1.0)] == [
        "0.00 %",
        "0.06 %",
        "6.21 %",
        "50.0 %",
        "100 %",
    ]
    assert interval((0.0512, 0.1234)) == "5.12 – 12.3 %"
    assert times(0.06, 0.001) == "60 ×" and times(0.0015, 0.001) == "1.5 ×"


def test_ranks_are_shown_as_ordinals():
    shown = " ".join(ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111, 1_023))
    assert shown == "1st 2nd 3rd 4th 11th 12th 13th 21st 102nd 111th 1,023rd"


@pytest.mark.parametrize("bounds", [(0, 5.54), (0, 100), (0.0123, 0.0177), (-3, 3), (7, 7), (0, 0)])
def test_ticks_enclose_the_data_with_few_round_steps(bounds: tuple[float, float]):
    found = ticks(*bounds)
    assert found[0] <= bounds[0] and found[-1] >= bounds[1]
    assert 2 <= len(found) <= 8
    assert [short(v) for v in (0.25, 40, 12_000, 2_000_000)] == ["0.25", "40", "12k", "2M"]


def test_a_chart_leaves_out_points_that_are_not_finite_and_escapes_its_words():
    lines = [Line([(1, 1), (2, float("nan")), (3, 2)], "<loss>", "subject")]
    svg = str(line_chart(lines, x="a < b", y="loss"))
    assert "nan" not in svg and "&lt;loss&gt;" in svg and "a &lt; b" in svg
    assert svg.count(",") == 2


def test_a_chart_of_one_point_or_of_none_is_still_a_page():
    assert "<svg" in line_chart([Line([(5, 5)], "one", "raw")], x="x", y="y", log_x=True)
    assert "no points" in line_chart([Line([(1, float("inf"))], "none", "raw")], x="x", y="y")


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
    uri = thumbnail(content.getvalue())
    decoded = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert decoded.size == (72, 36) and decoded.mode == "RGB"
    assert min(decoded.getpixel((10, 10))) > 250
