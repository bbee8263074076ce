"""From lines of metrics to points, a request at a time."""

import json

import pytest

from evaclip_model.training.config import JOB_FILE
from tasks.lineage.shipper import MetricsSeries
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


def write_job(folder, steps):
    """What a training of so many steps was asked to do."""
    settings = {"samples_seen": 8 * steps - 1, "global_batch": 8}
    (folder / JOB_FILE).write_text(json.dumps({"train": settings}))


def write(file, steps, figures, more=lambda step: {}):
    if not (file.parent / JOB_FILE).exists():
        write_job(file.parent, 100)
    rows = [
        {"step": step, "time": 1.0, **{f"f{n}": step for n in range(figures)}, **more(step)}
        for step in steps
    ]
    beside = file.with_suffix(".new")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.replace(file)


def read(series, shipped=-1):
    """Points as (name, step) by line, and the last step."""
    found = []
    for points, reached in series.iterate_points(shipped):
        found.append([(point.key, point.step) for point in points])
        shipped = reached
    return found, shipped


@pytest.mark.parametrize("figures", [1, 400])
def test_a_line_is_sent_whole_and_once(tmp_path, figures):
    file = tmp_path / "metrics.jsonl"
    write(file, range(100), figures)
    series = MetricsSeries(file)
    lines, last = read(series)
    assert lines == [[(f"f{n}", step) for n in range(figures)] for step in range(100)]
    assert last == 99
    assert read(series) == ([], -1), "what was read is not read again"


def test_another_process_sends_what_was_not_sent(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, range(100), 1)
    assert read(MetricsSeries(file), 97)[0] == [[("f0", 98)], [("f0", 99)]]


def test_what_was_not_taken_is_sent_again(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, range(4), 600)
    series = MetricsSeries(file)
    first, step = next(iter(series.iterate_points(-1)))
    lines, last = read(series, -1)
    assert lines[0][0] == (first[0].key, step) and len(lines) == 4 and last == 3


def test_a_file_that_was_cut_back_and_grew_again_is_read_from_its_start(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, range(10, 20), 1)
    series = MetricsSeries(file)
    _, last = read(series)
    write(file, range(10, 30), 1)  # lines of the same length: the old offset is the end of one
    lines, _ = read(series, last)
    assert [step for line in lines for _, step in line] == list(range(20, 30))


def test_a_line_that_is_not_whole_waits_and_one_that_is_none_is_passed_over(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "time": 1, "f": 1}\nnonsense\n{"step": 2, "time": 2, "f"')
    series = MetricsSeries(file)
    assert read(series) == ([[("f", 1)]], 1)
    with file.open("a") as more:
        more.write(": 2}\n")
    assert read(series, 1)[0] == [[("f", 2)]]


STEPS = 1234


def marks(step):
    """A validation every 20 steps, three spikes of which two are in one part, a rollback."""
    seen = {"validation": float(step)} if step % 20 == 0 else {}
    return {"spike": int(step in (300, 1003, 1005)), "rollbacks": int(step > 700), **seen}


def points_by_metric(lines):
    found = {}
    for line in lines:
        for name, step in line:
            found.setdefault(name, []).append(step)
    return found


def test_of_each_hundredth_of_a_training_there_is_a_point_and_each_mark_and_the_last_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_job(tmp_path, STEPS)
    write(file, range(1, STEPS + 1), 2, marks)
    found = points_by_metric(read(MetricsSeries(file))[0])
    assert found["f0"] == found["f1"] == [1, *range(13, STEPS, 13), STEPS]
    assert found["spike"] == sorted({*found["f0"], 300, 1003})
    assert found["rollbacks"] == sorted({*found["f0"], 701})
    assert found["validation"] == [step for step in range(20, STEPS, 20)]


@pytest.mark.parametrize("every", [33, 250])
def test_an_interrupted_shipment_sends_the_points_of_an_undisturbed_one(tmp_path, every):
    file = tmp_path / "metrics.jsonl"
    write_job(tmp_path, STEPS)
    write(file, range(1, STEPS + 1), 30, marks)
    whole, _ = read(MetricsSeries(file))
    lines, sent, shipped = file.read_text().splitlines(keepends=True), [], -1
    file.write_text("")
    with file.open("a") as growing:
        for start in range(0, STEPS, every):
            growing.writelines(lines[start : start + every])
            growing.flush()
            # another process each time, and one that is killed behind its first line
            for points, reached in MetricsSeries(file).iterate_points(shipped):
                sent.append([(point.key, point.step) for point in points])
                shipped = reached
                if start % 2:
                    break
    sent += read(MetricsSeries(file), shipped)[0]
    assert points_by_metric(sent) == points_by_metric(whole)


def test_a_request_that_failed_is_made_again_with_all_its_points(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_job(tmp_path, STEPS)
    write(file, range(1, STEPS + 1), 30, marks)
    series = MetricsSeries(file)
    for _ in series.iterate_points(-1):
        break  # the store did not take it
    assert read(series) == read(MetricsSeries(file))


def test_a_file_whose_end_nobody_knows_gets_eight_points_more_each_time_it_doubles(tmp_path):
    file = tmp_path / "system.jsonl"
    lines = (json.dumps({"step": step, "time": 1.0, "f0": 1.0}) + "\n" for step in range(120_960))
    file.write_text("".join(lines))  # a week, every 5 s
    steps = points_by_metric(read(MetricsSeries(file))[0])["f0"]
    assert steps[:24] == [*range(16), *range(16, 32, 2)]
    assert len(steps) == 119 and steps[-1] > 0.9 * 120_960
