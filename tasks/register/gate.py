"""The decision whether a new model replaces the one in use, by figures and a policy alone.

Every rule gives a reason of its own; the decision is the worst of them:

    REJECT  something is wrong: a certain loss, contamination, too large, too slow
    HOLD    nothing is wrong, and nothing shows that it is better
    PROMOTE better for certain, and nothing is wrong; or there is no model in use yet
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

from pydantic import Field

from evaclip_model.config import Config
from tasks.register.config import GatePolicy
from tasks.table import Table, markdown_table, words

CERTAIN_P = 0.05
"""Of a two-sided test; what the 95 % intervals stand for."""


class GateOutcome(StrEnum):
    """The verdict on a candidate, from good to bad."""

    PROMOTE = "promote"
    HOLD = "hold"
    REJECT = "reject"


_Reason = tuple[str, GateOutcome, str]
"""A rule, what it makes of the candidate, and why; as GateReason."""


class Gain(Config):
    """The candidate's figure less the champion's on the same samples, as shares of 1."""

    difference: float
    interval: tuple[float, float]
    """95 %, paired."""
    p: float
    """Two-sided, of no difference."""

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.difference:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f})"


class _Judged(Config):
    """A model, as the gate knows both."""

    weights: str
    """SHA-256 of its weights."""
    bytes: int
    """Size of its weights."""
    latency_ms: float | None = None
    """Time of one image, of both on the same machine; none: not measured."""


class Champion(_Judged):
    version: int
    """In the registry."""


class Candidate(_Judged):
    headlines: tuple[str, ...]
    """Metrics that are judged in every set that has them, beside those that the policy names."""
    gains: dict[str, Gain] = Field(default_factory=dict)
    """SET.METRIC -> gain over the champion."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Set -> why it has no figures."""
    contaminated: dict[str, float] = Field(default_factory=dict)
    """Set -> share of its images that the candidate was trained on."""


class GateReason(Config):
    rule: str
    outcome: GateOutcome
    says: str


class Decision(Config):
    """The gate's decision on a candidate, with its reasons."""

    outcome: GateOutcome
    reasons: tuple[GateReason, ...]
    champion: int | None
    """Version that it was compared with."""
    policy: GatePolicy

    @property
    def summary(self) -> str:
        """The reasons that decided, as one line."""
        deciding = [one.says for one in self.reasons if one.outcome is self.outcome]
        if self.outcome is GateOutcome.PROMOTE:  # every rule let it pass; the last one wanted it
            deciding = deciding[-1:]
        return f"{self.outcome.upper()}: {'; '.join(deciding)}"

    def to_markdown(self, name: str) -> str:
        against = f"version {self.champion}" if self.champion is not None else "no champion"
        table = Table.of("rule", words("says"), words("why"))
        for one in self.reasons:
            table.add(one.rule, one.outcome, one.says)
        head = f"# {name}: {self.outcome.upper()}\n\nCompared with {against}.\n\n"
        return f"{head}{markdown_table(table)}\n"


def decide_promotion(
    candidate: Candidate, champion: Champion | None, policy: GatePolicy
) -> Decision:
    """Decide whether `candidate` replaces `champion` (None: there is none yet)."""
    listed = _list_reasons(candidate, champion, policy)
    reasons = tuple(GateReason(rule=rule, outcome=out, says=says) for rule, out, says in listed)
    outcome = max((one.outcome for one in reasons), key=list(GateOutcome).index)
    number = champion.version if champion else None
    return Decision(outcome=outcome, reasons=reasons, champion=number, policy=policy)


def gains_in(results: Mapping[str, Any], champion: str) -> dict[str, Gain]:
    """SET.METRIC -> the subject's gain over the model called `champion`, from `results.json`."""
    found = {}
    for evalset, by_other in results.get("paired", {}).items():
        for metric, one in by_other.get(champion, {}).items():
            kept = {name: one[name] for name in Gain.model_fields}
            found[f"{evalset}.{metric}"] = Gain.from_mapping(kept, where=f"{evalset}.{metric}")
    return found


def contaminated_in(results: Mapping[str, Any]) -> dict[str, float]:
    """Set -> share of its samples found among the training data, from `results.json`."""
    return {
        evalset: one["flagged"] / max(1, results["sets"][evalset]["n"])
        for evalset, one in results.get("contamination", {}).items()
    }


def _list_reasons(
    candidate: Candidate, champion: Champion | None, policy: GatePolicy
) -> Iterator[_Reason]:
    limit = policy.max_contaminated
    for evalset, share in candidate.contaminated.items():
        allowed = "any share is" if limit is None else f"{limit:.2%} are"
        says = f"{evalset}: {share:.2%} of the images look like training data, {allowed} allowed"
        yield "contamination", _allow(limit is None or share <= limit), says
    if champion is None:
        yield "champion", GateOutcome.PROMOTE, "no champion yet"
        return
    if candidate.weights == champion.weights:
        says = f"these are the weights of the champion, version {champion.version}"
        yield "champion", GateOutcome.HOLD, says
        return
    for evalset, reason in candidate.failed.items():
        yield "evaluation", GateOutcome.HOLD, f"{evalset} has no figures: {reason}"
    yield from _cost_reasons(candidate, champion, policy)
    yield from _loss_reasons(candidate, policy)
    yield _gain_reason(candidate, policy)


def _allow(within: bool) -> GateOutcome:
    return GateOutcome.PROMOTE if within else GateOutcome.REJECT


def _cost_reasons(
    candidate: Candidate, champion: Champion, policy: GatePolicy
) -> Iterator[_Reason]:
    size = candidate.bytes / champion.bytes
    measured = [("size", "the weights take", size, policy.max_size_ratio)]
    if policy.max_latency_ratio is not None:
        if candidate.latency_ms is None or champion.latency_ms is None:
            says = "the time of an image was not measured, and max_latency_ratio asks for it"
            yield "latency", GateOutcome.HOLD, says
        else:
            slower = candidate.latency_ms / champion.latency_ms
            measured.append(("latency", "an image takes", slower, policy.max_latency_ratio))
    for rule, what, ratio, limit in measured:
        if limit is not None:
            says = f"{what} {ratio:.2f} times the champion's, {limit:g} are allowed"
            yield rule, _allow(ratio <= limit), says


def _loss_reasons(candidate: Candidate, policy: GatePolicy) -> Iterator[_Reason]:
    judged = dict.fromkeys([*_headline_gains(candidate), *policy.metrics])
    gains = {name: candidate.gains[name] for name in judged if name in candidate.gains}
    allowed = f"{policy.max_loss_points:g} points may be lost"
    if policy.refuse_certain_loss:
        allowed += " by chance, none for certain"
    for name, gain in gains.items():
        certain = gain.interval[1] < 0
        is_large = -100 * gain.difference > policy.max_loss_points
        if policy.refuse_certain_loss and certain:
            is_large = is_large or gain.p * len(gains) <= CERTAIN_P
        if is_large:
            says = f"{name} {gain}, {allowed}{'' if certain else '; the loss may be chance'}"
            yield "loss", GateOutcome.REJECT if certain else GateOutcome.HOLD, says


def _gain_reason(candidate: Candidate, policy: GatePolicy) -> _Reason:
    wanted = list(policy.metrics) or _headline_gains(candidate)
    missing = [name for name in wanted if name not in candidate.gains]
    if missing or not wanted:
        which = f"{', '.join(missing)} was not" if missing else "no metric was"
        return "gain", GateOutcome.HOLD, f"{which} compared with the champion"
    tests = len(wanted) if policy.need == "any" else 1
    better = [
        name
        for name in wanted
        if 100 * candidate.gains[name].interval[0] > policy.min_gain_points
        and candidate.gains[name].p * tests <= CERTAIN_P
    ]
    enough = len(better) == len(wanted) if policy.need == "all" else bool(better)
    named = better if enough else [name for name in wanted if name not in better]
    figures = "; ".join(f"{name} {candidate.gains[name]}" for name in named)
    if enough:
        return "gain", GateOutcome.PROMOTE, f"better: {figures}"
    above = f" by more than {policy.min_gain_points:g} points" if policy.min_gain_points else ""
    return "gain", GateOutcome.HOLD, f"not better for certain{above}: {figures}"


def _headline_gains(candidate: Candidate) -> list[str]:
    return [name for name in candidate.gains if name.rpartition(".")[2] in candidate.headlines]
