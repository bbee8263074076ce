"""New data since a model was last trained, and the retraining that it makes possible.

The data of a registered model is a row of parts, each a merge with its download, or an adoption,
and its verification. Every attempt adds parts with what is new, and none is made twice: a new merge
leaves out whatever an earlier one has selected, and a new adoption the files that an earlier one
took, whether that was trained on or not. The next dataset takes the champion's parts, those of
attempts that were held, and the new ones; the parts that a rejected or rolled back model added are
set aside. A finished merge or adoption that no attempt has used yet waits: for its download, if a
run was killed, or for more rows.

Not here: making anything (flows/pipeline.py), deciding (tasks/register/gate.py).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaclip_model.errors import InputError
from flows.config.recipe import Recipe
from flows.graph import graph as steps
from flows.graph.ancestry import ancestors_of, data_of, parent_of, parts_of
from flows.graph.outside_data import find_files, hash_marks
from flows.graph.step import Input, Step
from tasks.adopt.config import STAGE as ADOPT
from tasks.adopt.find_source import find_source, without_known
from tasks.artifacts.artifact import Artifact, Role, Stage, read_artifacts, read_inputs
from tasks.embed.config import EmbedConfig
from tasks.initialise.config import REGISTRY
from tasks.merge.config import STAGE as MERGE, MergeConfig
from tasks.merge.metadata_files import mark_of
from tasks.register import promotion
from tasks.register.config import DECISION, STAGE as REGISTER
from tasks.register.gate import Decision, GateOutcome
from tasks.register.promotion import Standing
from tasks.tracking import TrackingStore

Found = Sequence[Path | str]


@dataclass(frozen=True)
class Attempt:
    """A model that was trained, registered and judged."""

    registered: Artifact
    trained: Artifact
    parts: tuple[Artifact, ...]
    """Verifications that its dataset was made of."""
    begun: tuple[Artifact, ...]
    """Merges and adoptions that they come from."""
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
    used: tuple[Artifact, ...]
    """Verifications that the next dataset begins with."""
    set_aside: tuple[str, ...]
    """Sentences on the parts that it leaves out."""
    known: tuple[Artifact, ...]
    """Merges and adoptions whose rows and files are not taken again, oldest first."""
    waiting: tuple[Artifact, ...]
    """Of them, those that no attempt has used yet."""
    files: Mapping[str, Found]
    """Source -> its new files, of metadata or to adopt."""
    judged: Mapping[str, Artifact]
    """Digest of a verification -> the features of it by which the first attempt chose."""

    @property
    def is_nothing(self) -> bool:
        return self.last is not None and not self.files and not rows_of(self.waiting)


def of_kind(stage: Stage, artifacts: Iterable[Artifact]) -> tuple[Artifact, ...]:
    return tuple(artifact for artifact in artifacts if artifact.kind == stage.name)


def rows_of(begun: Iterable[Artifact]) -> int:
    """Rows that merges have selected together; of an adoption, its shards."""
    return sum(int(one.counts["selected" if one.kind == MERGE.name else "shards"]) for one in begun)


def find_new_data(
    recipe: Recipe, graph: steps.Graph, store: TrackingStore, keep_rejected: bool
) -> News:
    """Compare the metadata there is with that of every attempt so far."""
    root, name = graph.site.root, recipe.registry.model_name
    artifacts = read_artifacts(root)
    attempts = _find_attempts(graph, name, artifacts, promotion.read_standings(store, name))
    champion = promotion.require_champion(store, name, recipe.registry.alias)
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
            f"that it was registered from there (its tag {promotion.DIGEST_TAG} is "
            f"'{champion.digest}'): retrain where it was made, or set EVACLIP_ROOT"
        )
    begun = {one.digest: one for attempt in attempts for one in attempt.begun}
    used_up = sorted(begun.values(), key=lambda one: (one.created, one.digest))
    waiting = tuple(
        one
        for stage in (MERGE, ADOPT)
        for one in _find_waiting(name, stage, of_kind(stage, used_up), artifacts)
    )
    known = (*used_up, *waiting)
    used, set_aside = _sort_out_parts(store, recipe, attempts, base, keep_rejected)
    start, last = base.trained if base else None, attempts[-1] if attempts else None
    files = _new_files(recipe, graph, known)
    judged = {
        features.parents[Role.DATA]: features
        for attempt in (reversed(attempts) if recipe.retrain.asks_scores else ())
        for dataset in [parent_of(attempt.trained, Role.DATASET, artifacts)]
        for role in (role for role in dataset.parents if role.startswith(Role.JUDGED))
        for features in [parent_of(dataset, role, artifacts)]
    }
    return News(champion, start, last, used, set_aside, known, waiting, files, judged)


def new_adopt_step(recipe: Recipe, graph: steps.Graph, news: News) -> Step | None:
    """The adoption of what is new; None if there is no new file."""
    config, name = recipe.adopt, recipe.registry.model_name
    sources = [one for one in config.sources if one.name in news.files] if config else []
    if config is None or not sources:
        return None
    given = of_kind(ADOPT, news.known)
    changed = config.model_copy(update={"sources": tuple(sources)})
    return steps.adopt_step(graph.site, changed, given, {Role.GIVEN: _mark_given(name, given)})


def new_merge_step(recipe: Recipe, graph: steps.Graph, news: News) -> Step | None:
    """The merge of what is new; None if no source takes any more rows."""
    sources, given = [], of_kind(MERGE, news.known)
    for source in recipe.merge.sources if recipe.merge_table else ():
        if source.name not in news.files:
            continue
        wanted = source.wanted_rows
        if wanted is not None:
            wanted -= sum(int(m.counts.get(f"{source.name}.selected", 0)) for m in given)
            if wanted <= 0:
                continue
        changes = {"target_count": wanted, "expected_success": 1.0, "skip_count": 0}
        sources.append({**source.model_dump(), **changes})
    if not sources:
        return None
    merge = {**recipe.merge.model_dump(), "sources": sources}
    config = MergeConfig.from_mapping(merge, where=MERGE.name)
    files = {source.name: news.files[source.name] for source in config.sources}
    inputs: dict[str, Input] = {
        name: hash_marks(map(mark_of, files[name]), between="\0") for name in sorted(files)
    }
    for role, mark in graph.find_step(MERGE).inputs.items():  # sidecars and lists, as they are
        name, dot, _ = role.partition(".")
        if dot and name in {*files, "blocklists", "balance"}:
            inputs[role] = mark
    inputs[Role.GIVEN] = _mark_given(recipe.registry.model_name, given)
    return steps.merge_step(graph.site, config, inputs, files, given)


def draw_retraining(
    recipe: Recipe,
    graph: steps.Graph,
    news: News,
    verified: Sequence[Step | Artifact],
    champion: steps.Beside | None,
) -> steps.Graph:
    """The recipe's graph with the `verified` data and another beginning; without a champion the
    model is evaluated beside what it starts from."""
    data = steps.join_step(graph.site, verified) if len(verified) > 1 else verified[0]
    judged = _judge_parts(recipe, graph, news, verified) if recipe.retrain.asks_scores else ()
    first = steps.initialise_step(graph.site, recipe.initialise)
    stages = recipe.retraining_stages() if news.start else recipe.train
    beside = champion or steps.untrained_model(first)
    return steps.model_steps(graph.site, recipe, data, news.start or first, stages, beside, judged)


def _judge_parts(
    recipe: Recipe, graph: steps.Graph, news: News, verified: Sequence[Step | Artifact]
) -> list[Step | Artifact | None]:
    """A champion's features of every part, the present one's of what is new; None of what was
    trained on without a judgement. Empty where nobody judges anything."""
    used, found = {part.digest for part in news.used}, list[Step | Artifact | None]()
    for part in verified:
        judge: Step | Artifact | None = news.judged.get(part.digest)
        if judge is None and news.champion and part.digest not in used:
            spec = f"{REGISTRY}{recipe.registry.model_name}/{news.champion.version}"
            judge = steps.embed_step(graph.site, EmbedConfig(models=(spec,)), spec, part)
        found.append(judge)
    return found if any(found) else []


def describe_new_data(news: News, recipe: Recipe) -> Iterator[str]:
    name = recipe.registry.model_name
    if news.last is None:
        yield f"nothing was trained as {name} yet: all data is new"
        if recipe.retrain.asks_scores:
            yield "judged by   nobody: there is no champion yet, so no sample is scored"
        return
    champion = f"{name}/{news.champion.version}" if news.champion else "no version"
    yield f"champion    {champion}"
    for source, files in news.files.items():
        yield f"new         {len(files):,} file{'s' * (len(files) != 1)} of {source}"
    if rows_of(news.waiting):
        rows = rows_of(of_kind(MERGE, news.waiting))
        shards = rows_of(of_kind(ADOPT, news.waiting))
        what = f"{rows:,} rows that were merged" if rows else f"{shards:,} shards that were adopted"
        yield f"waiting     {what} and not trained on yet"
    if recipe.retrain.asks_scores and news.champion:
        yield f"judged by   {champion}: what is new"
    yield from (f"set aside   {sentence}" for sentence in news.set_aside)
    if news.is_nothing:
        taken = sum(len(marks) for one in news.known for marks in read_inputs(one.folder).values())
        last = f"{name}/{news.last.version} ({news.last.decision.summary})"
        yield f"nothing new: all {taken:,} files were merged or adopted before; last model {last}"


def _find_attempts(
    graph: steps.Graph, name: str, artifacts: Sequence[Artifact], standings: Mapping[int, Standing]
) -> list[Attempt]:
    """Every registration under the model's name in this registry, by version. The digests on the
    versions tell: one database has many addresses (moved, behind a server, by another host name).
    """
    registered = [
        (artifact, standings.get(int(artifact.counts["version"])))
        for artifact in artifacts
        if artifact.kind == REGISTER.name
        and artifact.config["model_name"] == name
        and DECISION in artifact.files  # or it is of before there was a gate
    ]
    addresses = {graph.register.inputs[Role.TRACKING]} | {
        one.parents[Role.TRACKING]
        for one, there in registered
        if there and there.digest == one.parents[Role.TRAINED]
    }
    found: dict[int, Attempt] = {}
    for artifact, standing in registered:
        if artifact.parents[Role.TRACKING] not in addresses:
            continue  # in another registry
        if standing and standing.digest not in ("", artifact.parents[Role.TRAINED]):
            continue  # in one that is gone, whose numbers were given again
        trained = parent_of(artifact, Role.TRAINED, artifacts)
        data = data_of(parent_of(trained, Role.DATASET, artifacts), artifacts)
        above = ancestors_of(data, artifacts)
        begun = tuple(one for one in above if one.kind in (MERGE.name, ADOPT.name))
        parts, decision = tuple(parts_of(data, artifacts)), promotion.read_decision(artifact.folder)
        attempt = Attempt(artifact, trained, parts, begun, decision, standing)
        if attempt.version in found and decision.champion == attempt.version:
            continue  # the champion under another address of the registry, compared with itself
        found[attempt.version] = attempt
    return [found[version] for version in sorted(found)]


def _find_waiting(
    name: str, stage: Stage, begun: Sequence[Artifact], artifacts: Sequence[Artifact]
) -> Iterator[Artifact]:
    """Finished merges, or adoptions, in a row from `begun`, that no attempt has used yet."""
    before = [*begun]
    while before:
        given = _mark_given(name, before)
        following = [one for one in artifacts if one.parents.get(Role.GIVEN) == given]
        found = of_kind(stage, following)[:1]
        if not found:
            return
        yield from found
        before += found


def _sort_out_parts(
    store: TrackingStore, recipe: Recipe, tried: Sequence[Attempt], base: Attempt | None, keep: bool
) -> tuple[tuple[Artifact, ...], tuple[str, ...]]:
    """(verifications that stay, sentences on those that do not)."""
    name = recipe.registry.model_name
    were_champion = {move.version for move in promotion.history(store, name, recipe.registry.alias)}
    stay = {part.digest: part for part in base.parts} if base else {}
    aside: dict[str, str] = {}
    for attempt in tried:
        why = ""
        if attempt.decision.outcome is GateOutcome.REJECT:
            why = "was rejected"
        elif attempt.standing is None:
            why = "was deleted in the registry"
        elif attempt.standing.declined:
            why = f"was declined by {attempt.standing.declined}"
        elif attempt.version in were_champion and attempt is not base:
            why = "was rolled back"
        for part in attempt.parts:
            if part.digest in stay or part.digest in aside:
                continue
            if why and not keep:
                aside[part.digest] = f"data of {name}/{attempt.version}, which {why}"
            else:
                stay[part.digest] = part
    ordered = sorted(stay.values(), key=lambda part: (part.created, part.digest))
    return tuple(ordered), tuple(dict.fromkeys(aside.values()))


def _new_files(recipe: Recipe, graph: steps.Graph, known: Sequence[Artifact]) -> dict[str, Found]:
    """Source -> files whose content no merge has read and no adoption has taken."""
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for name, marks in (one for begun in known for one in read_inputs(begun.folder).items()):
        seen[name] |= marks
    found: dict[str, Found] = {}
    for source in recipe.merge.sources if recipe.merge_table else ():
        files = find_files(source.files, graph.site.demo, f"merge.sources '{source.name}'")
        found[source.name] = [one for one in files if mark_of(one) not in seen[source.name]]
    for adopted in recipe.adopt.sources if recipe.adopt else ():
        found[adopted.name] = without_known(find_source(adopted), seen[adopted.name]).files
    return {name: files for name, files in found.items() if files}


def _mark_given(name: str, merges: Sequence[Artifact]) -> str:
    return hash_marks([name, *sorted(merge.digest for merge in merges)], between="\0")
