"""From lines of metrics to points, a request at a time."""

import json

import pytest

from tasks.lineage.journal import SeriesCursor
from tasks.lineage.shipper import MAX_METRICS_PER_CALL, iterate_batches
from tasks.lineage.stage_record import series_metrics


def test_every_number_of_a_line_is_a_metric_and_nested_ones_have_their_path():
    line = {"step": 3, "time": 1.0, "loss": 2, "taken": True, "note": "spike"}
    line |= {"trust": {"vision": {"min": 0.1, "max": 10}, "text": [0.2, 0.5]}, "mfu": None}
    assert series_metrics(line) == {
        "loss": 2.0,
        "trust_vision_min": 0.1,
        "trust_vision_max": 10.0,
        "trust_text_0": 0.2,
        "trust_text_1": 0.5,
    }


def write(file, steps, figures):
    rows = [
        {"step": step, "time": 1.0, **{f"f{n}": step for n in range(figures)}} for step in steps
    ]
    beside = file.with_suffix(".new")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.replace(file)


def read(file, at):
    """Points as (name, step) by request, and the cursor behind them."""
    found = []
    behind = at
    for points, reached in iterate_batches(file, at):
        assert len(points) <= MAX_METRICS_PER_CALL
        found.append([(point.key, point.step) for point in points])
        behind = reached
    return [batch for batch in found if batch], behind


@pytest.mark.parametrize("figures", [1, 30, 400])
def test_a_request_holds_whole_lines_and_no_more_than_it_may(tmp_path, figures):
    file = tmp_path / "metrics.jsonl"
    write(file, range(100), figures)
    batches, at = read(file, SeriesCursor())
    points = [point for batch in batches for point in batch]
    assert points == [(f"f{n}", step) for step in range(100) for n in range(figures)]
    assert len(batches) == -(-100 // (MAX_METRICS_PER_CALL // figures))
    assert at.offset == file.stat().st_size and at.step == 99
    assert read(file, at) == ([], at)


def test_a_file_that_was_cut_back_and_grew_again_is_read_from_its_start(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, range(10, 20), 1)
    _, at = read(file, SeriesCursor())
    write(file, range(10, 30), 1)  # lines of the same length: the old offset is the end of one
    batches, _ = read(file, at)
    assert [step for batch in batches for _, step in batch] == list(range(20, 30))


def test_a_line_that_is_not_whole_waits(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "f": 1}\n{"step": 2, "f"')
    batches, at = read(file, SeriesCursor())
    assert batches == [[("f", 1)]]
    with file.open("a") as more:
        more.write(": 2}\n")
    assert read(file, at)[0] == [[("f", 2)]]
