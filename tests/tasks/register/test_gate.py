"""The gate: every rule by itself, what overrules what, and what holds for all figures."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, strategies as some

from evaclip_model import InputError
from tasks.evaluate.metrics.metric import judged_metrics
from tasks.register.config import GatePolicy, RegisterConfig
from tasks.register.gate import (
    Candidate,
    Champion,
    Decision,
    Gain,
    GateOutcome,
    contaminated_in,
    decide_promotion,
    gains_in,
)

CHAMPION = Champion(version=3, weights="a" * 64, bytes=1000, latency_ms=10.0)
ORDER = list(GateOutcome)


def gain(points: float, spread: float = 0.5, p: float | None = None) -> Gain:
    """A difference in points with an interval of that half width, and the p that fits it."""
    low, high = (points - spread) / 100, (points + spread) / 100
    certain = low > 0 or high < 0
    fitting = 0.001 if certain else 0.5
    return Gain(difference=points / 100, interval=(low, high), p=fitting if p is None else p)


def candidate(**changes: object) -> Candidate:
    given = {"weights": "b" * 64, "bytes": 1000, "latency_ms": 10.0, "headlines": judged_metrics()}
    return Candidate(**{**given, **changes})


def judged(policy: GatePolicy | None = None, **changes: object) -> Decision:
    return decide_promotion(candidate(**changes), CHAMPION, policy or GatePolicy())


def rules(decision: Decision, outcome: GateOutcome) -> list[str]:
    return [reason.rule for reason in decision.reasons if reason.outcome is outcome]


def test_the_first_model_is_promoted_because_there_is_none_yet() -> None:
    decision = decide_promotion(candidate(), None, GatePolicy())
    assert decision.outcome is GateOutcome.PROMOTE
    assert decision.summary == "PROMOTE: no champion yet"
    assert decision.champion is None


def test_a_first_model_that_was_trained_on_the_test_is_rejected() -> None:
    seen = candidate(contaminated={"imagenet": 0.5})
    decision = decide_promotion(seen, None, GatePolicy(max_contaminated=0.1))
    assert decision.outcome is GateOutcome.REJECT
    assert decide_promotion(seen, None, GatePolicy()).outcome is GateOutcome.PROMOTE
    assert rules(decision, GateOutcome.REJECT) == ["contamination"]


def test_the_champion_itself_is_held() -> None:
    decision = judged(weights=CHAMPION.weights, gains={"a.top1": gain(5)})
    assert decision.summary == "HOLD: these are the weights of the champion, version 3"


def test_a_certain_gain_promotes_and_says_by_how_much() -> None:
    decision = judged(gains={"a.top1": gain(2)})
    assert decision.summary == "PROMOTE: better: a.top1 +2.00 points (+1.50 to +2.50)"
    assert decision.champion == 3


@pytest.mark.parametrize("points", [0.0, 0.4, -0.4])
def test_a_tie_is_held(points: float) -> None:
    decision = judged(gains={"a.top1": gain(points)})
    assert decision.outcome is GateOutcome.HOLD
    assert rules(decision, GateOutcome.HOLD) == ["gain"]


def test_a_gain_within_the_asked_margin_is_held() -> None:
    policy = GatePolicy(min_gain_points=2)
    assert judged(policy, gains={"a.top1": gain(2.4)}).outcome is GateOutcome.HOLD
    assert judged(policy, gains={"a.top1": gain(2.6)}).outcome is GateOutcome.PROMOTE


def test_one_gain_of_several_is_enough_unless_all_are_needed() -> None:
    gains = {"a.top1": gain(2), "b.top1": gain(0.1)}
    assert judged(gains=gains).outcome is GateOutcome.PROMOTE
    decision = judged(GatePolicy(need="all"), gains=gains)
    assert decision.outcome is GateOutcome.HOLD
    assert "b.top1" in decision.summary and "a.top1" not in decision.summary


def test_the_best_of_many_must_be_better_than_the_best_of_many_equal_models() -> None:
    borderline = gain(0.6, p=0.02)
    assert judged(gains={"a.top1": borderline}).outcome is GateOutcome.PROMOTE
    twins = {f"{name}.top1": gain(0) for name in "bcd"}
    assert judged(gains={"a.top1": borderline, **twins}).outcome is GateOutcome.HOLD


def test_a_certain_loss_beyond_the_rail_rejects_whatever_was_gained() -> None:
    decision = judged(gains={"a.top1": gain(9), "b.text_to_image_r1": gain(-3)})
    assert decision.outcome is GateOutcome.REJECT
    assert decision.summary.startswith("REJECT: b.text_to_image_r1 -3.00 points (-3.50 to -2.50)")


def test_a_loss_that_may_be_chance_holds() -> None:
    decision = judged(gains={"a.top1": gain(9), "small.top1": gain(-3, spread=5)})
    assert decision.outcome is GateOutcome.HOLD
    assert "the loss may be chance" in decision.summary


def test_a_loss_within_the_rail_is_allowed() -> None:
    assert judged(gains={"a.top1": gain(9), "b.top1": gain(-0.9)}).outcome is GateOutcome.PROMOTE


def test_fine_tuning_wants_no_loss_that_is_certain_and_lets_chance_pass() -> None:
    policy = GatePolicy(metrics=("mine.top1",), refuse_certain_loss=True)
    gains = {"mine.top1": gain(9), "b.top1": gain(-0.3, 0.1), "c.top1": gain(0)}
    decision = judged(policy, gains=gains)
    assert rules(decision, GateOutcome.REJECT) == ["loss"]
    assert "b.top1 -0.30 points (-0.40 to -0.20), 1 points may be lost by chance, none for" in (
        decision.summary
    )
    assert judged(GatePolicy(metrics=("mine.top1",)), gains=gains).outcome is GateOutcome.PROMOTE
    for loss, outcome in (
        (gain(-0.3), GateOutcome.PROMOTE),
        (gain(-0.3, 0.1, p=0.03), GateOutcome.PROMOTE),  # one of three that are looked at
        (gain(-2, 5), GateOutcome.HOLD),
    ):
        assert judged(policy, gains={**gains, "b.top1": loss}).outcome is outcome


def test_the_rail_guards_first_metrics_and_those_that_were_chosen() -> None:
    gains = {"a.top1": gain(9), "a.top5": gain(-5), "a.mean_per_class": gain(-5)}
    assert judged(gains=gains).outcome is GateOutcome.PROMOTE
    policy = GatePolicy(metrics=("a.top1", "a.top5"))
    assert judged(policy, gains=gains).outcome is GateOutcome.REJECT


def test_a_metric_that_nobody_compared_holds_and_is_named() -> None:
    decision = judged(GatePolicy(metrics=("b.top1",)), gains={"a.top1": gain(9)})
    assert decision.summary == "HOLD: b.top1 was not compared with the champion"
    assert judged(gains={}).summary == "HOLD: no metric was compared with the champion"


def test_a_set_without_figures_holds() -> None:
    decision = judged(gains={"a.top1": gain(9)}, failed={"b": "an image cannot be read"})
    assert decision.summary == "HOLD: b has no figures: an image cannot be read"


@pytest.mark.parametrize(
    ("size", "outcome"), [(1500, GateOutcome.PROMOTE), (1501, GateOutcome.REJECT)]
)
def test_weights_beyond_the_allowed_size_are_rejected(size: int, outcome: GateOutcome) -> None:
    assert judged(gains={"a.top1": gain(9)}, bytes=size).outcome is outcome
    unlimited = GatePolicy(max_size_ratio=None)
    assert judged(unlimited, gains={"a.top1": gain(9)}, bytes=size).outcome is GateOutcome.PROMOTE


@pytest.mark.parametrize(
    ("latency", "outcome"),
    [(12.0, GateOutcome.PROMOTE), (12.1, GateOutcome.REJECT), (None, GateOutcome.HOLD)],
)
def test_latency_is_judged_where_the_policy_asks(
    latency: float | None, outcome: GateOutcome
) -> None:
    policy = GatePolicy(max_latency_ratio=1.2)
    decision = judged(policy, gains={"a.top1": gain(9)}, latency_ms=latency)
    assert decision.outcome is outcome
    assert judged(gains={"a.top1": gain(9)}, latency_ms=latency).outcome is GateOutcome.PROMOTE


@pytest.mark.parametrize(
    ("share", "outcome"), [(0.02, GateOutcome.PROMOTE), (0.021, GateOutcome.REJECT)]
)
def test_contamination_is_judged_by_its_share(share: float, outcome: GateOutcome) -> None:
    policy = GatePolicy(max_contaminated=0.02)
    assert judged(policy, gains={"a.top1": gain(9)}, contaminated={"a": share}).outcome is outcome


def test_a_decision_survives_its_file_and_has_a_page() -> None:
    decision = judged(gains={"a.top1": gain(2), "b.top1": gain(-9)})
    again = Decision.model_validate_json(decision.model_dump_json())
    assert again == decision
    page = decision.to_markdown("evaclip/4")
    assert page.startswith("# evaclip/4: REJECT\n\nCompared with version 3.")
    for reason in decision.reasons:
        assert f"| {reason.rule} | {reason.outcome} | {reason.says} |" in page


def test_a_sets_name_cannot_break_the_page_of_a_decision() -> None:
    page = judged(gains={"a|b.top1": gain(-9), "<i>`c\x1b[2J.top1": gain(-9)}).to_markdown(
        "evaclip/4"
    )
    assert "a\\|b.top1" in page and "&lt;i>\\`c\\\\x1b" in page
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (0, 4) for line in page.splitlines())


def test_what_the_evaluation_writes_is_read() -> None:
    pair = {"difference": 0.02, "interval": [0.01, 0.03], "p": 0.01, "only_a": 7, "only_b": 3}
    results = {
        "sets": {"a": {"n": 200}},
        "paired": {"a": {"champion": {"top1": pair}, "untrained": {"top1": pair}}},
        "contamination": {"a": {"flagged": 3}},
    }
    gains = gains_in(results, "champion")
    assert gains == {"a.top1": Gain(difference=0.02, interval=(0.01, 0.03), p=0.01)}
    assert contaminated_in(results) == {"a": 0.015}
    assert gains_in({}, "champion") == {} and contaminated_in({}) == {}


@pytest.mark.parametrize("metric", ["top1", ".top1", "imagenet.", ""])
def test_a_policys_metric_needs_a_set(metric: str) -> None:
    with pytest.raises(InputError, match=r"gate\.metrics.*SET\.METRIC"):
        RegisterConfig.from_mapping(
            {"model_name": "m", "gate": {"metrics": [metric]}}, "recipe.toml"
        )


def test_both_aliases_may_not_be_one() -> None:
    with pytest.raises(InputError, match="alias and candidate_alias are both 'best'"):
        RegisterConfig.from_mapping(
            {"model_name": "m", "alias": "best", "candidate_alias": "best"}, "recipe.toml"
        )


points = some.floats(-20, 20)
spreads = some.floats(0.01, 10)
gains_of_sets = some.dictionaries(
    some.sampled_from(["a.top1", "b.top1", "c.image_to_text_r1", "c.top5"]),
    some.builds(gain, points, spreads),
    min_size=1,
)
policies = some.builds(
    GatePolicy,
    need=some.sampled_from(["any", "all"]),
    min_gain_points=some.floats(0, 3),
    max_loss_points=some.floats(0, 3),
    max_contaminated=some.just(0.1),
)


def mirrored(gains: dict[str, Gain]) -> dict[str, Gain]:
    """What the champion gains over the candidate."""
    return {
        name: Gain(
            difference=-one.difference, interval=(-one.interval[1], -one.interval[0]), p=one.p
        )
        for name, one in gains.items()
    }


@given(gains_of_sets, some.floats(0, 3))
def test_no_pair_of_models_replaces_each_other_where_all_metrics_count(
    gains: dict[str, Gain], loss: float
) -> None:
    policy = GatePolicy(need="all", max_loss_points=loss)
    outcomes = {judged(policy, gains=one).outcome for one in (gains, mirrored(gains))}
    assert outcomes != {GateOutcome.PROMOTE}


@given(gains_of_sets, policies)
def test_the_decision_is_the_worst_of_its_reasons(
    gains: dict[str, Gain], policy: GatePolicy
) -> None:
    decision = judged(policy, gains=gains)
    assert decision.outcome == max((r.outcome for r in decision.reasons), key=ORDER.index)
    assert decision.summary.startswith(decision.outcome.upper())


@given(
    gains_of_sets,
    policies,
    some.sampled_from(
        [
            {"contaminated": {"a": 0.5}},
            {"failed": {"z": "gone"}},
            {"bytes": 9999},
            {"gains": {"z.top1": gain(-19, 0.1)}},
        ]
    ),
)
def test_nothing_bad_ever_makes_a_decision_better(
    gains: dict[str, Gain], policy: GatePolicy, bad: dict[str, object]
) -> None:
    worse = {"gains": gains, **bad}
    if "gains" in bad:
        worse["gains"] = {**gains, **bad["gains"]}  # type: ignore[dict-item]
    before, after = judged(policy, gains=gains), judged(policy, **worse)
    assert ORDER.index(after.outcome) >= ORDER.index(before.outcome)
    assert after.outcome is not GateOutcome.PROMOTE


@given(gains_of_sets, policies, some.sampled_from(["a.top1", "b.top1"]), some.floats(0, 5))
def test_a_higher_figure_never_makes_a_decision_worse(
    gains: dict[str, Gain], policy: GatePolicy, name: str, more: float
) -> None:
    assume(name in gains)
    spread = 50 * (gains[name].interval[1] - gains[name].interval[0])
    better = gain(100 * gains[name].difference + more, spread)
    before, after = judged(policy, gains=gains), judged(policy, gains={**gains, name: better})
    assert ORDER.index(after.outcome) <= ORDER.index(before.outcome)
