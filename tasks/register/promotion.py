"""The version of a registered model that is in use: promoting, rolling back, and who did it when,
as tags of the versions. Not here: deciding (gate.py), registering (model_registry.py), asking a
person.

All that asks the registry raises InputError where it does not answer, or has no such version. The
alias moves first and is recorded then; the next process that finds it moved but not recorded
records it, so that a process killed in between loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from tasks.register.config import DECISION, DECISION_PAGE, REGISTERED, RegisterConfig
from tasks.register.gate import Decision, GateOutcome
from tasks.tracking import TrackingStore, find_answer, read_all_pages

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DIGEST_TAG = "evaclip.digest"
WEIGHTS_TAG = "evaclip.weights_sha256"
GATE_TAG = "evaclip.gate"
"""The gate's outcome for a version; its reasons are in `evaclip.gate.reasons`."""
HISTORY_TAG = "evaclip.alias"
"""`evaclip.alias.ALIAS.TIME`: at that time this version got the alias, and how."""
NAME_TAG = "evaclip.name"
"""Of a model: its name when a version last got an alias here."""
DECLINED_TAG = "evaclip.declined"
"""Who refused a version that the gate would promote, and why."""
MAX_TAG_CHARS = 4000

How = Literal["gate", "approval", "command", "force", "rollback", "outside"]


@dataclass(frozen=True)
class Move:
    at: str
    """UTC, ISO 8601."""
    version: int
    how: How
    by: str
    why: str


@dataclass(frozen=True)
class Standing:
    """A version of a registered model, as the registry describes it."""

    version: int
    digest: str
    """Of the training that made it; empty if it was registered by others."""
    weights: str
    """SHA-256 of its weights; empty if it was registered by others."""
    gate: str
    """The gate's outcome; empty: it was not asked."""
    declined: str
    """`DECLINED_TAG`; empty: nobody did."""


def champion_of(store: TrackingStore, name: str, alias: str) -> Standing | None:
    """The version that has the alias; None if there is none."""
    with store.connect() as client:
        number = _find_holder(client, name, alias)
        return None if number is None else _read_standing(_get_version(client, name, number))


def require_champion(store: TrackingStore, name: str, alias: str) -> Standing | None:
    """The version that has the alias; None where no version ever had it. InputError where versions
    had it and none has it now, so that a candidate would be compared with nothing."""
    if found := champion_of(store, name, alias):
        return found
    with store.connect() as client:
        last = _find_last_holder(client, name, alias)
        if last is None:
            mark = f"tags.`{NAME_TAG}` = '{name}'"
            for model in read_all_pages(client.search_registered_models, mark):
                if model.name != name:
                    raise InputError(
                        f"somebody renamed '{name}' to '{model.name}' in the registry: rename it "
                        "back, so that a candidate is compared with its champion, or begin anew "
                        "under another register.model_name"
                    )
            if not (logged := _find_logged_models(client, f"{HISTORY_TAG}.{alias}", name)):
                return None
            raise InputError(
                f"no version of '{name}' is {alias}, but the logged model {logged[0]} was, until "
                f"somebody deleted '{name}' in the registry: register it again with `mlflow."
                f"register_model('models:/{logged[0]}', '{name}')` and give it the alias with "
                f"`python -m flows promote {name}/VERSION`, or begin anew under another "
                "register.model_name"
            )
        is_there = find_answer(client.get_model_version, name, str(last)) is not None
    gone, back = "the alias", f"give it back with `python -m flows promote {name}/{last}`"
    if not is_there:
        gone, back = "the version", f"choose one with `python -m flows promote {name}/VERSION`"
    raise InputError(
        f"no version of '{name}' is {alias}, but version {last} was, until somebody deleted "
        f"{gone}: {back}, or begin anew under another register.model_name"
    )


def history(store: TrackingStore, name: str, alias: str) -> list[Move]:
    """Every time a version got the alias, in order."""
    with store.connect() as client:
        return _read_moves(client, name, alias)


def champion_history(moves: Sequence[Move]) -> list[int]:
    """The versions in use one after another, the present one last, without those rolled back."""
    line: list[int] = []
    for move in moves:
        if move.how == "rollback" and move.version in line:
            del line[len(line) - line[::-1].index(move.version) :]
        elif not line or line[-1] != move.version:
            line.append(move.version)
    return line


def promote_version(
    store: TrackingStore, name: str, alias: str, version: int, how: How, by: str, why: str
) -> bool:
    """Give a version the alias; False when it already had it."""
    with store.connect() as client:
        _get_version(client, name, version)
        holder = _find_holder(client, name, alias)
        moves = _read_moves(client, name, alias)
        is_recorded = holder is None or bool(moves and moves[-1].version == holder)
        if holder == version and is_recorded:
            return False
        if holder != version:  # else a process that was killed moved it, maybe this very one
            if holder is not None and not is_recorded:
                outside = "the alias was moved without a record"
                _write_down(client, name, alias, holder, "outside", "unknown", outside)
            client.set_registered_model_alias(name, alias, str(version))
        _write_down(client, name, alias, version, how, by, why)
        return True


def roll_back(
    store: TrackingStore, name: str, alias: str, to: int | None, by: str, why: str
) -> tuple[int, int]:
    """Give the alias back to the version that had it before, or to `to`; returns the versions that
    had it until now, and that has it now. InputError where there is nothing to go back to."""
    with store.connect() as client:
        holder = _find_holder(client, name, alias)
        line = champion_history(_read_moves(client, name, alias))
    if holder is None:
        raise InputError(f"no version of '{name}' is {alias}: there is nothing to roll back")
    before = line[:-1] if line[-1:] == [holder] else line
    if to is None and not before:
        raise InputError(
            f"version {holder} of '{name}' is the first that was {alias}: name the one to go back "
            "to with --to VERSION"
        )
    to = before[-1] if to is None else to
    promote_version(store, name, alias, to, "rollback", by, why)
    return holder, to


def carry_out(
    store: TrackingStore, config: RegisterConfig, version: int, decision: Decision
) -> bool:
    """Make the version champion if the gate's decision to do so is due; True when it became
    champion now."""
    return waits_for(store, config, version, decision) is Waiting.DUE and promote_version(
        *(store, config.model_name, config.alias, version, "gate", "gate", decision.summary)
    )


class Waiting(StrEnum):
    """A registration that still waits, and what for."""

    NOTHING = "nothing"
    """It is not to be promoted, a person refused it, or it was champion (and rolled back since)."""
    DUE = "due"
    """The gate's decision to promote it is to be carried out."""
    STALE = "stale"
    """A new decision: the champion is not the one that the gate compared it with."""


def waits_for(
    store: TrackingStore, config: RegisterConfig, version: int, decision: Decision
) -> Waiting:
    """Tell what the gate's decision on a version waits for."""
    if decision.outcome is not GateOutcome.PROMOTE:
        return Waiting.NOTHING
    name, alias = config.model_name, config.alias
    with store.connect() as client:
        moves = _read_moves(client, name, alias)
        declined = _read_standing(_get_version(client, name, version)).declined
        if declined or any(move.version == version for move in moves):
            return Waiting.NOTHING
        holder = _find_holder(client, name, alias)
        if holder is None and (
            _find_last_holder(client, name, alias)
            or _find_logged_models(client, f"{HISTORY_TAG}.{alias}", name)
        ):
            return Waiting.STALE  # somebody took the alias away: nothing was compared with its last
    return Waiting.DUE if holder in (decision.champion, version) else Waiting.STALE


def is_unsettled(store: TrackingStore, config: RegisterConfig, folder: Path) -> bool:
    version = int(json.loads((folder / REGISTERED).read_text())["version"])
    return waits_for(store, config, version, read_decision(folder)) is not Waiting.NOTHING


def write_decision(
    store: TrackingStore, name: str, version: int, decision: Decision, out: Path
) -> tuple[Path, Path]:
    """Write the decision as tags of the version and as files in `out`; return the files."""
    tags = {GATE_TAG: str(decision.outcome), f"{GATE_TAG}.reasons": decision.summary}
    if decision.champion != version:  # registered once more it keeps why it became champion
        _write_tags(store, name, version, tags)
    write_atomically(out / DECISION, decision.model_dump_json(indent=1) + "\n")
    write_atomically(out / DECISION_PAGE, decision.to_markdown(f"{name}/{version}"))
    return out / DECISION, out / DECISION_PAGE


def read_decision(folder: Path) -> Decision:
    path = folder / DECISION
    return Decision.from_mapping(json.loads(path.read_text()), where=str(path))


def decline_version(store: TrackingStore, name: str, version: int, by: str, why: str) -> None:
    _write_tags(store, name, version, {DECLINED_TAG: f"{by}: {why}"})


def _write_tags(store: TrackingStore, name: str, version: int, tags: Mapping[str, str]) -> None:
    with store.connect() as client:
        for key, value in tags.items():
            client.set_model_version_tag(name, str(version), key, value[:MAX_TAG_CHARS])


def standing_of(store: TrackingStore, name: str, version: int) -> Standing:
    with store.connect() as client:
        return _read_standing(_get_version(client, name, version))


def read_standings(store: TrackingStore, name: str) -> dict[int, Standing]:
    """Every version of the model that the registry has, by its number."""
    with store.connect() as client:
        return {int(one.version): _read_standing(one) for one in _search_versions(client, name)}


def _find_holder(client: MlflowClient, name: str, alias: str) -> int | None:
    model = find_answer(client.get_registered_model, name)
    found = model and model.aliases.get(alias)
    return None if found is None else int(found)


def _find_last_holder(client: MlflowClient, name: str, alias: str) -> int | None:
    """The version that had the alias last, deleted ones among them; None where none ever had it."""
    if moves := _read_moves(client, name, alias):
        return moves[-1].version
    model = find_answer(client.get_registered_model, name)
    last = model and model.tags.get(f"{HISTORY_TAG}.{alias}")
    return int(last) if last and last.isdecimal() else None


def _find_logged_models(client: MlflowClient, tag: str, value: str) -> list[str]:
    """Ids of those with a tag, of every experiment, the newest first: they outlive a registered
    model that is deleted whole."""
    experiments = [one.experiment_id for one in read_all_pages(client.search_experiments)]
    found = client.search_logged_models(experiments, f"tags.`{tag}` = '{value}'")
    return [one.model_id for one in found]


def _search_versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    return read_all_pages(client.search_model_versions, f"name = '{name}'")


def _get_version(client: MlflowClient, name: str, version: int) -> ModelVersion:
    # a larger number is an error of SQLite's, not an answer
    found = find_answer(client.get_model_version, name, str(min(version, 2**63 - 1)))
    if found is None:
        known = sorted(int(v.version) for v in _search_versions(client, name))
        versions = ", ".join(map(str, known)) or "none"
        raise InputError(f"model '{name}' has no version {version}; there are: {versions}")
    return found


def _read_standing(version: ModelVersion) -> Standing:
    tags = version.tags
    return Standing(
        int(version.version),
        *(tags.get(tag, "") for tag in (DIGEST_TAG, WEIGHTS_TAG, GATE_TAG, DECLINED_TAG)),
    )


def _read_moves(client: MlflowClient, name: str, alias: str) -> list[Move]:
    prefix, moves = f"{HISTORY_TAG}.{alias}.", []
    for version in _search_versions(client, name):
        for key, text in version.tags.items():
            if key.startswith(prefix):
                about = key.removeprefix(prefix), int(version.version)
                try:
                    moves.append(Move(*about, **json.loads(text)))
                except (ValueError, TypeError):  # that it was there counts: somebody edited the tag
                    moves.append(Move(*about, "outside", "unknown", text))
    return sorted(moves, key=lambda move: move.at)


def _write_down(
    client: MlflowClient, name: str, alias: str, version: int, how: How, by: str, why: str
) -> None:
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    text = json.dumps({"how": how, "by": by, "why": why[: MAX_TAG_CHARS // 2]})
    client.set_model_version_tag(name, str(version), f"{HISTORY_TAG}.{alias}.{at}", text)
    # A version that is deleted takes its tags along; the model keeps which one was in use.
    client.set_registered_model_tag(name, f"{HISTORY_TAG}.{alias}", str(version))
    client.set_registered_model_tag(name, NAME_TAG, name)
    if weights := client.get_model_version(name, str(version)).tags.get(WEIGHTS_TAG):
        for logged in _find_logged_models(client, WEIGHTS_TAG, weights):
            client.set_logged_model_tags(logged, {f"{HISTORY_TAG}.{alias}": name})
