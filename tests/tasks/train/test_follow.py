"""What a person is told of a training run, from the lines that it writes."""

import json

import pytest

from evaclip_model.training.config import METRICS_FILE
from tasks.process.cluster import job_name
from tasks.progress import format_duration
from tasks.train.train import LOG_FILE, Follower, describe_step, last_rows
from tests.tasks.train.stage import config

ROW = {"step": 7, "loss": 2.5, "images_per_second": 1500.0, "logit_scale": 14.3, "step_s": 2.0}
ROW |= {"grad_norm": 744.7, "data_wait_s": 0.5, "mfu": 0.414, "taken": 1, "spike": 0}


def test_the_newest_rows_are_one_line():
    assert describe_step([{**ROW, "step": 6, "step_s": 4.0}, ROW], 1007) == (
        "loss 2.500  1,500 images/s  MFU 41%  logit scale 14.3  grad norm 745  data wait 17%  "
        "00:50:00 left"
    )


def test_figures_that_a_step_has_not_are_left_out():
    bare = {name: ROW[name] for name in ("step", "images_per_second", "step_s")}
    assert describe_step([{**bare, "taken": 0}], 8) == (
        "1,500 images/s  00:00:02 left  1 of 1 steps not taken"
    )


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        ([{"spike": 1}, {}, {}], "spike at step 7"),
        ([{"taken": 0}, {}, {"taken": 0}], "2 of 3 steps not taken"),
        ([{}, {}, {"rollbacks": 2}], "went back 2 times"),
        ([{"slow_rank": 3}, {}, {"slow_rank": 3}], "rank 3 keeps the others waiting"),
    ],
)
def test_what_is_out_of_order_is_said(rows, note):
    assert describe_step([{**ROW, **row} for row in rows], 8).endswith(f"  {note}")


def test_one_slow_step_is_no_slow_rank():
    assert describe_step([{**ROW, "slow_rank": 3}, ROW, ROW], 8).endswith("left")


def test_days_are_said():
    assert format_duration(3 * 86_400 + 3_723) == "3d 01:02:03"
    assert format_duration(3_723) == "01:02:03"


def test_only_whole_lines_count_and_long_files_are_read_from_their_end(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert last_rows(file, 3) == []
    lines = [json.dumps({"step": step, "padding": "x" * 500}) for step in range(1000)]
    file.write_text("\n".join(lines) + '\n{"step": 10')
    assert [row["step"] for row in last_rows(file, 3)] == [997, 998, 999]


def test_why_a_clusters_job_waits_is_reported_each_time_that_it_changes(tmp_path):
    told, job = [], f"job {job_name(tmp_path)}: "
    follower = Follower(config(), tmp_path / METRICS_FILE, lambda *said: told.append(said[2]))
    for line in ("ready", f"{job}Resources", f"{job}Resources", f"{job}waits no more", "step 1"):
        with (tmp_path / LOG_FILE).open("a") as log:
            log.write(f"{line}\n")
        follower.report_newest()
    assert told == [f"{job}Resources", f"{job}waits no more"]


def test_a_step_is_reported_once(tmp_path):
    told = []
    file = tmp_path / "metrics.jsonl"
    follower = Follower(config(), file, lambda done, total, detail="": told.append(done))
    follower.report_newest()
    file.write_text(json.dumps(ROW) + "\n")
    follower.report_newest()
    follower.report_newest()
    assert (told, follower.step) == ([7], 7)
