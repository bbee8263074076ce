"""From lines of metrics to points, a request at a time."""

import json

import pytest

from tasks.lineage.shipper import MetricsSeries
from tasks.lineage.stage_record import MAX_METRICS_PER_CALL, series_metrics


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


def read(series, shipped=-1):
    """Points as (name, step) by request, and the last step."""
    found = []
    for points, reached in series.iterate_batches(shipped):
        assert len(points) <= MAX_METRICS_PER_CALL
        found.append([(point.key, point.step) for point in points])
        shipped = reached
    return found, shipped


@pytest.mark.parametrize("figures", [1, 30, 400])
def test_a_request_holds_whole_lines_and_no_more_than_it_may(tmp_path, figures):
    file = tmp_path / "metrics.jsonl"
    write(file, range(100), figures)
    series = MetricsSeries(file)
    batches, last = read(series)
    points = [point for batch in batches for point in batch]
    assert points == [(f"f{n}", step) for step in range(100) for n in range(figures)]
    assert len(batches) == -(-100 // (MAX_METRICS_PER_CALL // figures))
    assert last == 99
    assert read(series) == ([], -1), "what was read is not read again"


def test_another_process_sends_what_was_not_sent(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, range(100), 1)
    assert read(MetricsSeries(file), 97)[0] == [[("f0", 98), ("f0", 99)]]


def test_what_was_not_taken_is_sent_again(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, range(4), 600)
    series = MetricsSeries(file)
    first, step = next(iter(series.iterate_batches(-1)))
    batches, last = read(series, -1)
    assert batches[0][0] == (first[0].key, step) and len(batches) == 4 and last == 3


def test_a_file_that_was_cut_back_and_grew_again_is_read_from_its_start(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, range(10, 20), 1)
    series = MetricsSeries(file)
    _, last = read(series)
    write(file, range(10, 30), 1)  # lines of the same length: the old offset is the end of one
    batches, _ = read(series, last)
    assert [step for batch in batches for _, step in batch] == list(range(20, 30))


def test_a_line_that_is_not_whole_waits_and_one_that_is_none_is_passed_over(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "time": 1, "f": 1}\nnonsense\n{"step": 2, "time": 2, "f"')
    series = MetricsSeries(file)
    assert read(series) == ([[("f", 1)]], 1)
    with file.open("a") as more:
        more.write(": 2}\n")
    assert read(series, 1)[0] == [[("f", 2)]]
