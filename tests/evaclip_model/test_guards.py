"""Steps that must not be taken are told from those that may, on every rank alike."""

import json
import math
import random
from dataclasses import asdict

import pytest

from evaclip_model.training.config import TrainConfig
from evaclip_model.training.monitoring.guards import (
    Diverged,
    GuardState,
    Observed,
    Running,
    StepVerdict,
    judge_step,
)
from evaclip_model.training.trainer import LoopState
from evaclip_model.weights.checkpoint_format import TrainingProgress


def config(precision="fp32", **guards):
    settings = {"name": "x", "image_px": 16, "samples_seen": 480, "global_batch": 48}
    guards = {"spike_window_steps": 10, **guards}
    return TrainConfig(**settings, precision=precision, guards=guards)


def observed(step=1, loss=2.0, grad_norm=1.0, finite=True):
    return Observed(step, loss, grad_norm, finite)


def after(losses, settings, state=None):
    """Verdicts on steps of these losses, and the state they leave."""
    state, found = state or GuardState(), []
    for step, loss in enumerate(losses, 1):
        judged, state = judge_step(state, observed(step, loss), settings)
        found.append(judged.verdict)
    return found, state


def test_a_running_mean_is_the_plain_one_until_its_window_is_full():
    values = [random.Random(0).gauss(3, 2) for _ in range(40)]
    running = Running()
    for value in values:
        running = running.with_value(value, 100)
    mean = sum(values) / 40
    assert running.mean == pytest.approx(mean)
    assert running.variance == pytest.approx(sum((v - mean) ** 2 for v in values) / 40)


@pytest.mark.parametrize(
    "bad",
    [{"finite": False}, {"loss": math.nan}, {"grad_norm": math.inf}],
    ids=["features", "loss", "gradient"],
)
def test_steps_without_numbers_are_left_out_and_too_many_in_a_row_end_the_run(bad):
    state = GuardState()
    for _ in range(3):
        judged, state = judge_step(state, observed(**bad), config())
        assert (judged.verdict, judged.kind) == (StepVerdict.DISCARD, "nonfinite")
    judged, good = judge_step(state, observed(), config())
    assert judged.verdict is StepVerdict.TAKE
    assert good.nonfinite == 0
    with pytest.raises(Diverged, match="at step 7, 4 times in a row"):
        judge_step(state, observed(7, **bad), config())


def test_an_fp16_gradient_that_overflows_is_left_to_the_loss_scale():
    settings, state = config(precision="fp16"), GuardState(nonfinite=2)
    judged, state = judge_step(state, observed(grad_norm=math.inf), settings)
    assert (judged.verdict, judged.kind) == (StepVerdict.TAKE, "overflow")
    assert state.nonfinite == 2
    judged, state = judge_step(state, observed(loss=math.nan), settings)
    assert judged.verdict is StepVerdict.DISCARD


@pytest.mark.parametrize(
    ("action", "verdict"),
    [("log", StepVerdict.TAKE), ("skip", StepVerdict.DISCARD), ("rollback", StepVerdict.ROLL_BACK)],
)
def test_a_spike_is_far_above_the_recent_range_and_only_after_a_warm_up(action, verdict):
    settings = config(spike_action=action)
    calm = [3 + 0.1 * math.sin(step) for step in range(30)]
    assert after([9.0, *calm[:5], 9.0], settings)[0] == [StepVerdict.TAKE] * 7
    verdicts, state = after(calm, settings)
    assert set(verdicts) == {StepVerdict.TAKE}
    judged, _ = judge_step(state, observed(31, 3.2), settings)
    assert judged.kind == ""
    judged, _ = judge_step(state, observed(31, 5.0), settings)
    assert (judged.verdict, judged.kind) == (verdict, "spike")
    assert "loss 5, lately 3" in judged.reason
    judged, _ = judge_step(state, observed(31, 3.0, grad_norm=40.0), settings)
    assert "grad norm 40" in judged.reason
    judged, _ = judge_step(state, observed(31, 0.1), settings)
    assert judged.verdict is StepVerdict.TAKE


def test_a_level_that_has_changed_for_good_stops_being_a_spike():
    settings = config(spike_action="skip")
    _, state = after([3 + 0.1 * math.sin(step) for step in range(30)], settings)
    verdicts, _ = after([5.0] * 30, settings, state)
    assert verdicts[0] is StepVerdict.DISCARD
    assert verdicts[-1] is StepVerdict.TAKE


def test_training_goes_back_no_more_often_than_allowed():
    settings = config(spike_action="rollback", max_rollbacks=1)
    _, calm = after([3 + 0.1 * math.sin(step) for step in range(30)], settings)
    judged, state = judge_step(calm, observed(31, 50.0), settings)
    assert judged.verdict is StepVerdict.ROLL_BACK
    assert state.rollbacks == 1
    with pytest.raises(Diverged, match="went back once before"):
        judge_step(state, observed(32, 500.0), settings)


def test_a_saved_state_goes_on_as_the_one_in_memory():
    settings = config()
    _, state = after([3.0, 2.9, 3.1, 2.8], settings)
    loop = LoopState(7, 9, 1, state)
    stored = TrainingProgress(7, {}, {}, 0.0, {}, loop=json.loads(json.dumps(asdict(loop))))
    assert LoopState.from_progress(stored) == loop
    assert LoopState.from_progress(TrainingProgress(3, {}, {}, 0.0, {})) == LoopState(3, 3)
