"""New data since a model was last trained, and the retraining that it makes possible.

Covers: earlier attempts and what became of them, new metadata files, the graph of a retraining.
Not here: making anything (flows/retrain.py), deciding (tasks/register/gate.py).

The data of a registered model is a row of parts, each a merge with its download and verification.
Every attempt adds parts with what is new, and none is made twice: a new merge leaves out whatever
an earlier one has selected, whether that was trained on or not. The next dataset takes the
champion's parts, those of attempts that were held, and the new ones; the parts that a rejected or
rolled back model added are set aside.

A merge that is finished and that no attempt has used yet waits: for its download, if a run was
killed, or for more rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaclip_model.errors import InputError
from flows.config.recipe import Recipe
from flows.graph.ancestry import ancestors_of, data_of, parent_of, parts_of
from flows.graph.graph import (
    Beside,
    Graph,
    initialise_step,
    join_step,
    merge_step,
    model_steps,
    untrained_model,
)
from flows.graph.outside_data import find_files, hash_marks
from flows.graph.step import Input, Step
from tasks.artifacts.artifact import Artifact, Role, read_artifacts
from tasks.merge.config import STAGE as MERGE
from tasks.merge.config import MergeConfig
from tasks.merge.merge import read_inputs
from tasks.merge.metadata_files import mark_of
from tasks.register.config import DECISION
from tasks.register.config import STAGE as REGISTER
from tasks.register.gate import Decision, GateOutcome
from tasks.register.promotion import (
    Standing,
    history,
    read_decision,
    read_standings,
    require_champion,
)
from tasks.tracking import TrackingStore

Found = Sequence[Path | str]


@dataclass(frozen=True)
class Attempt:
    """A model that was trained, registered and judged."""

    registered: Artifact
    trained: Artifact
    data: Artifact
    """Verification or join that its dataset was made of."""
    parts: tuple[Artifact, ...]
    """Verifications in it."""
    merges: tuple[Artifact, ...]
    decision: Decision
    standing: Standing | None
    """In the registry; None if somebody deleted its version there."""

    @property
    def version(self) -> int:
        return int(self.registered.counts["version"])


@dataclass(frozen=True)
class News:
    """The data and the model that a retraining starts from."""

    champion: Standing | None
    start: Artifact | None
    """Training that made the champion."""
    last: Attempt | None
    """The newest attempt."""
    used: tuple[Artifact, ...]
    """Verifications that the next dataset begins with."""
    set_aside: tuple[str, ...]
    """Sentences on the parts that it leaves out."""
    known: tuple[Artifact, ...]
    """Merges whose rows are not selected again, oldest first."""
    waiting: tuple[Artifact, ...]
    """Of them, those that no attempt has used yet."""
    files: Mapping[str, Found]
    """Source -> its new metadata files."""

    @property
    def is_first(self) -> bool:
        """True when nothing was ever trained under this name."""
        return self.last is None

    @property
    def is_nothing(self) -> bool:
        """True when there is nothing to merge, to download, or to train on."""
        return not self.is_first and not self.files and not rows_of(self.waiting)


def rows_of(merges: Sequence[Artifact]) -> int:
    """Rows that the merges have selected together."""
    return sum(int(merge.counts["selected"]) for merge in merges)


def find_new_data(recipe: Recipe, graph: Graph, store: TrackingStore, keep_rejected: bool) -> News:
    """Compare the metadata there is with that of every attempt so far.

    Raises:
        InputError: the champion was made elsewhere, so that its data is not known here; something
            of it is gone; versions were champion and none is now; or the registry does not answer.
    """
    root, name = graph.site.root, recipe.registry.model_name
    artifacts = read_artifacts(root)
    attempts = _find_attempts(graph, name, artifacts, read_standings(store, name))
    champion = require_champion(store, name, recipe.registry.alias)
    gone = [one for one in attempts if one.standing is None and champion is None]
    if any(one.decision.outcome is GateOutcome.PROMOTE for one in gone):
        raise InputError(
            f"no version of '{name}' is {recipe.registry.alias}, and {name}/{gone[-1].version} was "
            "deleted: run the pipeline once more to register it again, or promote another version"
        )
    base = next((one for one in attempts if champion and one.version == champion.version), None)
    if champion is not None and base is None:
        raise InputError(
            f"{name}/{champion.version} is {recipe.registry.alias}, but nothing in {root} says "
            "that it was registered from there (by name, version and digest): its data is not "
            "known here; retrain where it was made, or set EVACLIP_ROOT"
        )
    merges = _merges_of(attempts)
    waiting = _find_waiting(name, merges, artifacts)
    known = (*merges, *waiting)
    used, set_aside = _sorted_out(store, recipe, attempts, base, keep_rejected)
    return News(
        champion=champion,
        start=base.trained if base else None,
        last=attempts[-1] if attempts else None,
        used=used,
        set_aside=set_aside,
        known=known,
        waiting=waiting,
        files=_new_files(recipe, graph, known),
    )


def new_merge_step(recipe: Recipe, graph: Graph, news: News) -> Step | None:
    """The merge of what is new; None if no source takes any more rows."""
    sources = []
    for source in recipe.merge.sources:
        if source.name not in news.files:
            continue
        wanted = source.wanted_rows
        if wanted is not None:
            wanted -= sum(int(m.counts.get(f"{source.name}.selected", 0)) for m in news.known)
            if wanted <= 0:
                continue
        changes = {"target_count": wanted, "expected_success": 1.0, "skip_count": 0}
        sources.append({**source.model_dump(), **changes})
    if not sources:
        return None
    config = MergeConfig.from_mapping(
        {**recipe.merge.model_dump(), "sources": sources}, where=MERGE.name
    )
    files = {source.name: news.files[source.name] for source in config.sources}
    others = {
        role: mark
        for role, mark in graph.find_step(MERGE).inputs.items()
        if role not in {one.name for one in recipe.merge.sources}
        and (role.partition(".")[0] in {*files, "blocklists"})
    }
    new = {name: hash_marks(map(mark_of, files[name]), between="\0") for name in sorted(files)}
    given = _mark_given(recipe.registry.model_name, news.known)
    inputs: dict[str, Input] = {**new, **others, Role.GIVEN: given}
    return merge_step(graph.site, config, inputs, files, news.known)


def draw_retraining(
    recipe: Recipe,
    graph: Graph,
    news: News,
    verified: Sequence[Step | Artifact],
    champion: Beside | None,
) -> Graph:
    """The recipe's graph with other data and another beginning.

    Args:
        recipe: whose rules, stages and evaluation are taken.
        graph: the recipe's own.
        news: what the retraining starts from.
        verified: verifications that the data consists of.
        champion: what the trained model is evaluated beside; without one, what it starts from.
    """
    data = join_step(graph.site, verified) if len(verified) > 1 else verified[0]
    first = initialise_step(graph.site, recipe.initialise)
    stages = recipe.retraining_stages() if news.start else recipe.train
    beside = champion or untrained_model(first)
    return model_steps(graph.site, recipe, data, news.start or first, stages, beside)


def describe_new_data(news: News, recipe: Recipe) -> Iterator[str]:
    """The new data as lines for a person."""
    name = recipe.registry.model_name
    if news.is_first:
        yield f"nothing was trained as {name} yet: all metadata is new"
        return
    champion = f"{name}/{news.champion.version}" if news.champion else "no version"
    yield f"champion    {champion}"
    for source, files in news.files.items():
        yield f"new         {len(files):,} metadata file{'s' * (len(files) != 1)} of {source}"
    if rows_of(news.waiting):
        yield f"waiting     {rows_of(news.waiting):,} rows that were merged and not trained on yet"
    yield from (f"set aside   {sentence}" for sentence in news.set_aside)
    if news.is_nothing:
        marks = [mark for merge in news.known for mark in read_inputs(merge.folder).values()]
        last = news.last
        assert last is not None, "or everything would be new"
        yield (
            f"nothing new: all {sum(map(len, marks)):,} metadata files were merged before; the "
            "last model was "
            f"{name}/{last.version} ({last.decision.summary})"
        )


def _find_attempts(
    graph: Graph,
    name: str,
    artifacts: Sequence[Artifact],
    standings: Mapping[int, Standing],
) -> list[Attempt]:
    """Every registration under the model's name in this registry, by version.

    They are known by the digests on the versions: one database has many addresses, as a file that
    was moved, behind a server, under another name of its host.
    """

    def standing_of(artifact: Artifact) -> Standing | None:
        return standings.get(int(artifact.counts["version"]))

    registered = [
        artifact
        for artifact in artifacts
        if artifact.kind == REGISTER.name
        and artifact.config["model_name"] == name
        and DECISION in artifact.files  # or it is of before there was a gate
    ]
    addresses = {graph.register.inputs[Role.TRACKING]} | {
        one.parents[Role.TRACKING]
        for one in registered
        if (there := standing_of(one)) and there.digest == one.parents[Role.TRAINED]
    }
    found: dict[int, Attempt] = {}
    for artifact in registered:
        standing = standing_of(artifact)
        if artifact.parents[Role.TRACKING] not in addresses:
            continue  # in another registry
        if standing and standing.digest not in ("", artifact.parents[Role.TRAINED]):
            continue  # in one that is gone, whose numbers were given again
        trained = parent_of(artifact, Role.TRAINED, artifacts)
        dataset = parent_of(trained, Role.DATASET, artifacts)
        data = data_of(dataset, artifacts)
        parts = tuple(parts_of(data, artifacts))
        merges = tuple(one for one in ancestors_of(data, artifacts) if one.kind == MERGE.name)
        decision = read_decision(artifact.folder)
        attempt = Attempt(artifact, trained, data, parts, merges, decision, standing)
        if attempt.version in found and decision.champion == attempt.version:
            continue  # the champion under another address of the registry, compared with itself
        found[attempt.version] = attempt
    return [found[version] for version in sorted(found)]


def _merges_of(attempts: Sequence[Attempt]) -> tuple[Artifact, ...]:
    """The merges of all attempts, each once, oldest first."""
    by_digest = {merge.digest: merge for attempt in attempts for merge in attempt.merges}
    return tuple(sorted(by_digest.values(), key=lambda merge: (merge.created, merge.digest)))


def _find_waiting(
    name: str, merges: Sequence[Artifact], artifacts: Sequence[Artifact]
) -> tuple[Artifact, ...]:
    """Finished merges that go on from `merges` and that no attempt has used yet, in a row."""
    waiting: list[Artifact] = []
    while merges:
        given = _mark_given(name, (*merges, *waiting))
        following = [
            artifact
            for artifact in artifacts
            if artifact.kind == MERGE.name and artifact.parents.get(Role.GIVEN) == given
        ]
        if not following:
            break
        waiting.append(following[0])
    return tuple(waiting)


def _sorted_out(
    store: TrackingStore,
    recipe: Recipe,
    attempts: Sequence[Attempt],
    base: Attempt | None,
    keep_rejected: bool,
) -> tuple[tuple[Artifact, ...], tuple[str, ...]]:
    """(verifications that stay, sentences on those that do not)."""
    name = recipe.registry.model_name
    were_champion = {move.version for move in history(store, name, recipe.registry.alias)}
    stay = {part.digest: part for part in base.parts} if base else {}
    aside: dict[str, str] = {}
    for attempt in attempts:
        new = [part for part in attempt.parts if part.digest not in {*stay, *aside}]
        why = ""
        if attempt.decision.outcome is GateOutcome.REJECT:
            why = "was rejected"
        elif attempt.standing is None:
            why = "was deleted in the registry"
        elif attempt.standing.declined:
            why = f"was declined by {attempt.standing.declined}"
        elif attempt.version in were_champion and attempt is not base:
            why = "was rolled back"
        for part in new:
            if why and not keep_rejected:
                aside[part.digest] = f"data of {name}/{attempt.version}, which {why}"
            else:
                stay[part.digest] = part
    ordered = sorted(stay.values(), key=lambda part: (part.created, part.digest))
    return tuple(ordered), tuple(dict.fromkeys(aside.values()))


def _new_files(recipe: Recipe, graph: Graph, known: Sequence[Artifact]) -> dict[str, Found]:
    """Source -> files whose content no merge has read."""
    seen: dict[str, set[str]] = {}
    for merge in known:
        for name, marks in read_inputs(merge.folder).items():
            seen.setdefault(name, set()).update(marks)
    found: dict[str, Found] = {}
    for source in recipe.merge.sources:
        files = find_files(source.files, graph.site.demo, f"merge.sources '{source.name}'")
        read = seen.get(source.name, set())
        new = [file for file in files if mark_of(file) not in read]
        if new:
            found[source.name] = new
    return found


def _mark_given(name: str, merges: Sequence[Artifact]) -> str:
    return hash_marks([name, *sorted(merge.digest for merge in merges)], between="\0")
