"""The graph of a recipe: every step that it would make, with its address, before anything runs.

One entry a stage: what its artifact is made from, and the work that makes it, which is imported
when it runs, never by a plan. A new stage is handed on in `data_steps` or `model_steps`. Not here:
running (runner.py), what retraining and `score` put in (incremental.py, score_request.py).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from os import sched_getaffinity
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.reading.samples import SHARDS
from evaclip_model.training.config import (
    METRICS_FILE,
    MODEL_FOLDER,
    RESULT_FILE,
    TrainConfig,
    feature_bytes,
)
from evaclip_model.training.cost import parameter_counts
from flows.config.profile import Profile, load_profile
from flows.config.recipe import Recipe, expected_samples, load_recipe, require_samples
from flows.graph.outside_data import (
    NotHere,
    OutsideMarks,
    describe_sets,
    describe_sources,
    fetch_model,
    find_all,
    find_files,
    fingerprint_model,
    hash_marks,
    sort_takedowns,
)
from flows.graph.step import ABSENT, Inputs, Record, Step, digest_of, finished_artifact, walk_steps
from tasks.adopt.config import STAGE as ADOPT, AdoptConfig
from tasks.artifacts.artifact import (
    CARD,
    Artifact,
    Made,
    Role,
    Stage,
    fingerprint_files,
    lineage_of,
    read_artifacts,
)
from tasks.artifacts.root_store import fetch_artifact
from tasks.dataset.config import (
    LEFT_OUT,
    RULES_IN_FILES,
    STAGE as DATASET,
    CaptionSource,
    DatasetConfig,
    Seen,
)
from tasks.dataset.lists import read_takedowns, takedowns_digest
from tasks.demo.config import STAGE as DEMO, DemoConfig
from tasks.download.config import STAGE as DOWNLOAD, Crew
from tasks.download.download import PROGRESS, download_images
from tasks.download.shards import expected_bytes
from tasks.embed.config import FEATURES, STAGE as EMBED, TEACH, EmbedConfig
from tasks.evaluate.config import ATTACHED, RESULTS, STAGE as EVALUATE, EvaluateConfig
from tasks.initialise.config import REGISTRY, STAGE as INITIALISE, InitialiseConfig
from tasks.interpolate.config import CHOICE, STAGE as INTERPOLATE, InterpolateConfig
from tasks.join.config import STAGE as JOIN
from tasks.lineage.lineage_svg import lineage_svg
from tasks.merge.config import STAGE as MERGE, MergeConfig
from tasks.merge.metadata_files import outside_files
from tasks.progress import Report, format_bytes
from tasks.register.config import DECISION, DECISION_PAGE, STAGE as REGISTER, RegisterConfig
from tasks.train.config import STAGE as TRAIN
from tasks.verify.config import STAGE as VERIFY, VerifyConfig

BYTES_PER_PARAMETER_SAVED = 4 + 8  # a checkpoint: fp32 weights and two moments
TRAINED, UNTRAINED, CHAMPION = "trained", "untrained", "champion"
"""What models are called in an evaluation."""
Parent = Step | Artifact
Judged = Sequence[Parent | None]
"""Features of each part of the data by which champions judge it; None where there was none yet."""


@dataclass(frozen=True)
class Site:
    """The settings that all steps of a graph share."""

    root: Path
    tracking_uri: str
    demo: Step | None
    """The demo's world, whose files a recipe with a [demo] table may name."""


@dataclass(frozen=True)
class Beside:
    """The model that stands beside the trained one in an evaluation."""

    name: str
    role: str
    mark: Parent | str
    folder: Path


@dataclass(frozen=True)
class Graph:
    """Every step of a recipe."""

    site: Site
    embed: tuple[Step, ...]
    dataset: Step
    train: tuple[Step, ...]
    final: Step
    """What makes the model that is evaluated and registered: the last of them, or what follows."""
    results: tuple[Step, ...]

    @cached_property
    def data_steps(self) -> tuple[Step, ...]:
        return walk_steps(self.site.demo, *self.embed, self.dataset)

    @cached_property
    def model_steps(self) -> tuple[Step, ...]:
        return tuple(step for step in walk_steps(self.final) if step not in self.data_steps)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        return (*self.data_steps, *self.model_steps, *self.results)

    def find_step(self, stage: Stage) -> Step:
        """The first step of a stage; raises InputError where the recipe has none."""
        for step in self.steps:
            if step.stage.name == stage.name:
                return step
        raise InputError(f"the recipe has no [{stage.name}] table: add one")

    @property
    def evaluate(self) -> Step:
        return self.find_step(EVALUATE)

    @property
    def register(self) -> Step:
        return self.find_step(REGISTER)

    @property
    def is_finished(self) -> bool:
        return all(step.is_finished for step in self.steps)

    def require_runnable(self, flow: str) -> None:
        """Refuse a flow that reads what is not here, makes what the recipe does not name, or makes
        less data than training takes at once."""
        if flow not in ("prepare", "train"):
            for stage in (EVALUATE, REGISTER):
                self.find_step(stage)
        data, model = self.data_steps, (*self.data_steps, *self.model_steps)
        read = {"prepare": data, "train": model}.get(flow, self.steps)
        absent = [sentence for step in read for sentence in step.absent]
        if absent:
            more = f" ({len(absent) - 1} more: see the plan)" if len(absent) > 1 else ""
            raise InputError(f"{absent[0]}{more}")
        if flow in ("prepare", "pipeline"):
            self.require_samples()

    def require_samples(self) -> None:
        """Refuse, before its turn, a training stage that takes more at once than the dataset has,
        or, as long as there is none, than can be counted: rows that are merged at most, rows of
        tables, pictures of folders, samples of shards on this machine."""
        stages = [TrainConfig.model_validate(step.config) for step in self.train]
        if self.dataset.is_finished:
            counts, end = finished_artifact(self.dataset).counts, ".samples"
            held = {one.removesuffix(end): int(counts[one]) for one in counts if one.endswith(end)}
            nothing = {name: 0 for stage in stages for name in stage.source_weights}
            require_samples(stages, list(held), nothing | held)
            return
        if any(step.absent for step in self.data_steps):
            return  # which the plan says, and `require_runnable`
        most: dict[str, int | None] = {}
        enough = max(max(stage.global_batch, stage.lanes) for stage in stages)
        for step in self.data_steps:
            if isinstance(step.config, MergeConfig):
                most |= {one.name: one.target_count for one in step.config.sources}
            elif isinstance(step.config, AdoptConfig):
                from tasks.adopt.read_pairs import count_pairs

                packed = finished_artifact(step).counts if step.is_finished else {}
                for one in step.config.sources:
                    counted = int(packed.get(f"{one.name}.samples", 0))
                    most[one.name] = counted or count_pairs(one, enough)
        has = {name: number for name, number in most.items() if number is not None}
        require_samples(stages, list(most), has, "at most ")


def load_graph(recipe: str, overrides: Sequence[str]) -> tuple[Recipe, Profile, Graph]:
    """Load a recipe and the profile, and draw their graph."""
    resolved, profile = load_recipe(recipe, overrides), load_profile()
    return resolved, profile, draw_graph(resolved, profile.root.resolve(), profile.mlflow_uri)


def draw_graph(recipe: Recipe, root: Path, tracking_uri: str) -> Graph:
    """The graph of `recipe` under `root`; what is not here is noted at the steps that read it."""
    site = Site(root, tracking_uri, demo_step(root, recipe.demo) if recipe.demo else None)
    parts = []  # of the data: what is downloaded, what is adopted
    if recipe.merge_table is not None:
        parts.append(data_steps(site, recipe, merge_step(site, recipe.merge)))
    if recipe.adopt is not None:
        parts.append(verify_step(site, recipe.verify, adopt_step(site, recipe.adopt), Role.ADOPT))
    data = parts[0] if len(parts) == 1 else join_step(site, parts)
    start = initialise_step(site, recipe.initialise)
    return model_steps(site, recipe, data, start, recipe.train, untrained_model(start))


def data_steps(site: Site, recipe: Recipe, merged: Parent) -> Step:
    """From a merge to what a dataset version chooses from; the last of the steps."""
    return verify_step(site, recipe.verify, download_step(site, recipe, merged))


def model_steps(
    site: Site,
    recipe: Recipe,
    data: Parent,
    start: Parent,
    stages: Sequence[TrainConfig],
    beside: Beside,
    judged: Judged = (),
) -> Graph:
    """From data (a verification or a join) and a model to start from to a registered model; of what
    champions have `judged`, part by part, the rules of `[retrain]` choose."""
    embed = embed_steps(site, recipe.embed, data) if recipe.embed else ()
    rules = recipe.judging_rules if judged else recipe.dataset
    dataset = dataset_step(site, rules, data, embed, recipe.captions, judged)
    train: list[Step] = []
    for stage in stages:
        train.append(train_step(site, stage, train[-1] if train else start, dataset))
    # A plan counts one checkpoint of the model, however many stages there are.
    parameters = sum(parameter_counts(recipe.initialise.load_architecture()).values())
    train[-1] = replace(train[-1], expected_bytes=parameters * BYTES_PER_PARAMETER_SAVED)
    final, results = train[-1], list[Step]()
    if recipe.interpolate is not None:
        final = interpolate_step(site, recipe.interpolate, recipe.evaluate, start, final, dataset)
    if recipe.evaluate_table is not None:
        results.append(comparison_step(site, recipe.evaluate, train, final, dataset, beside))
    if recipe.register_table is not None:
        results.append(register_step(site, recipe.registry, final, results[0]))
    return Graph(site, embed, dataset, tuple(train), final, tuple(results))


def demo_step(root: Path, config: DemoConfig) -> Step:
    def make(_: Profile, out: Path, report: Report) -> Made:
        from tasks.demo.demo import make_demo

        return make_demo(config, out, report)

    return Step(root, DEMO, config, {}, make, "metadata and evaluation sets of the demo web")


def merge_step(
    site: Site,
    config: MergeConfig,
    inputs: Inputs | None = None,
    files: Mapping[str, Sequence[Path | str]] | None = None,
    given: Sequence[Artifact] = (),
) -> Step:
    """The rows to download of all sources, without those of the merges `given`. By default what is
    outside is marked now (`inputs`: role -> mark), and `files` (of each source) found when it runs.
    """
    marks = OutsideMarks(site.demo)
    if inputs is None:
        editions = {source.name: source.revision for source in config.sources}
        inputs = {
            one.role: marks.mark_files(one.files, f"merge.{one.where}", editions.get(one.role, ""))
            for one in outside_files(config)
        }

    def make(profile: Profile, out: Path, report: Report) -> Made:
        from flows.graph.runner import merge_in_chunks

        found = files or {
            source.name: find_files(source.files, site.demo, f"merge.sources '{source.name}'")
            for source in config.sources
        }
        before = [fetch_artifact(artifact.folder) for artifact in given]
        return merge_in_chunks(config, found, out, report, profile.merge_workers, before)

    targets = [source.target_count for source in config.sources]
    rows = f"{sum(t for t in targets if t):,} rows" if all(targets) else "every row that passes"
    what = f"at most {rows} from {len(targets)} sources" + ", balanced" * bool(config.balance)
    record = Record(outside=partial(describe_sources, config=config))
    return Step(site.root, MERGE, config, inputs, make, what, marks.absent, record)


def download_step(site: Site, recipe: Recipe, merged: Parent) -> Step:
    config = recipe.download

    def make(profile: Profile, out: Path, report: Report) -> Made:
        processes, threads = profile.download_processes, profile.download_threads
        crew = Crew(processes, threads, profile.download_distributor)
        return download_images(config, merged.folder, out, crew, report)

    def serve_demo() -> AbstractContextManager[None]:
        from tasks.demo.demo import serve_pictures

        return serve_pictures(recipe.demo) if recipe.demo else nullcontext()

    needed = expected_bytes(expected_samples(recipe), config.image_px)
    what = f"about {format_bytes(needed)}, {config.image_px} px"
    record = Record({"merged": merged}, metrics=PROGRESS)
    return Step(
        *(site.root, DOWNLOAD, config, {Role.MERGE: merged}, make, what),
        record=record,
        expected_bytes=needed,
        service=serve_demo,
    )


def adopt_step(
    site: Site, config: AdoptConfig, given: Sequence[Artifact] = (), mark: Inputs | None = None
) -> Step:
    """Shards where they lie, and folders and tables as shards; files of the adoptions `given`,
    which `mark` stands for, are not taken again."""
    marks = OutsideMarks(site.demo)
    sources = {one.name: marks.mark_source(one) for one in config.sources}
    inputs: Inputs = {**sources, **(mark or {})}

    def make(_: Profile, out: Path, report: Report) -> Made:
        from tasks.adopt.adopt import adopt_sources

        return adopt_sources(config, out, report, [fetch_artifact(one.folder) for one in given])

    what = f"{len(config.sources)} sources, shards stay where they lie"
    record = Record(outside=partial(describe_sources, config=config))
    return Step(site.root, ADOPT, config, inputs, make, what, marks.absent, record)


def verify_step(
    site: Site, config: VerifyConfig, downloaded: Parent, role: str = Role.DOWNLOAD
) -> Step:
    def make(profile: Profile, out: Path, report: Report) -> Made:
        from tasks.verify.verify import verify_shards

        launch = profile.verify_launch
        processes = launch.ranks or len(sched_getaffinity(0))
        return verify_shards(config, downloaded.folder, out, processes, report, launch)

    what, inputs = "every shard opened, every image decoded", {role: downloaded}
    record = Record({"downloaded": downloaded})
    return Step(site.root, VERIFY, config, inputs, make, what, record=record)


def join_step(site: Site, verified: Sequence[Parent]) -> Step:
    def make(_: Profile, out: Path, report: Report) -> Made:
        from tasks.join.join import join_verifications

        return join_verifications([finished_artifact(one) for one in verified], out, report)

    inputs = {f"{Role.PART}{number:04d}": one for number, one in enumerate(verified)}
    return Step(site.root, JOIN, Config(), inputs, make, f"{len(verified)} verifications as one")


def embed_steps(site: Site, config: EmbedConfig, data: Parent) -> tuple[Step, ...]:
    return tuple(
        embed_step(site, config, spec, part)
        for spec in config.models
        for part in verifications_in(data)
    )


def verifications_in(data: Parent) -> list[Parent]:
    """Return what was joined, in order; a verification is its own one part."""
    if isinstance(data, Step) and data.stage.name == JOIN.name:
        return [part for part in data.inputs.values() if not isinstance(part, str)]
    return [data]


def embed_step(
    site: Site, config: EmbedConfig, spec: str, data: Parent, stream: TrainConfig | None = None
) -> Step:
    """The features by one model of a verification's samples (those of the verifications that a
    retraining joins are there already), or of what a stage, `stream`, shows of a dataset version.
    """
    marks = OutsideMarks(site.demo)
    model, mark = find_model(site, marks, spec)

    def make(profile: Profile, out: Path, report: Report) -> Made:
        from tasks.embed.embed import embed_samples

        machine = profile.machine
        known = [
            (one.folder, site.root / VERIFY.name / one.parents[Role.DATA])
            for one in read_artifacts(site.root)
            if one.kind == EMBED.name and one.parents[Role.SUBJECT] == mark
            if one.config["precision"] == config.precision
        ]
        return embed_samples(
            *(config, model, fetch_model(model, profile)),
            *(data.folder, out, report),
            stream=stream,
            known=known,
            ranks=machine.rank_count,
            device=machine.device,
            workers=machine.workers,
            launch=machine.launch,
        )

    inputs: Inputs = {Role.DATA: data, Role.SUBJECT: mark}
    what, title = f"features of every sample by {spec}", f"{EMBED.name} {spec}"
    step = Step(site.root, EMBED, config, inputs, make, what, marks.absent, title=title)
    if stream is None:
        return step
    each, precision = feature_bytes(spec), hash_marks([config.precision])
    size = stream.steps * stream.global_batch * each
    amount = format_bytes(size) if size else f"{each:,} bytes a sample"
    return replace(
        step,
        stage=TEACH,
        config=stream,
        inputs={Role.DATASET: data, Role.SUBJECT: mark, "precision": precision},
        what=f"features of all crops and captions shown, {amount}",
        title=f"{TEACH.name} {stream.name} {spec}",
        expected_bytes=size,
    )


def find_model(site: Site, marks: OutsideMarks, spec: str) -> tuple[str, str]:
    """(what opens it at any time, its mark); an alias may move: what is kept is its version."""
    if spec.startswith(REGISTRY):
        version, mark = marks.find_version(site.tracking_uri, spec)
        return f"{REGISTRY}{version}", mark
    return spec, marks.mark_found(partial(fingerprint_model, spec))


def dataset_step(
    site: Site,
    config: DatasetConfig,
    data: Parent,
    embed: Sequence[Step] = (),
    captions: Sequence[CaptionSource] = (),
    judged: Judged = (),
) -> Step:
    """A dataset version; of `embed` the first model's features decide, if a rule asks them, or of
    each part of the data those by which it was `judged`. One by scores is made from that by all
    other rules, which other thresholds share; a parent of it where those ask features."""
    marks = OutsideMarks(site.demo)
    inputs: Inputs = {Role.DATA: data}
    rules: dict[str, tuple[str, ...]] = {name: getattr(config, name) for name in RULES_IN_FILES}
    read = {name: [(file, f"dataset.{name}") for file in files] for name, files in rules.items()}
    read["captions"] = [(one.files, f"captions '{one.name}'") for one in captions]
    said = [json.dumps(one.model_dump(exclude={"files"})) for one in captions]
    for name, files in read.items():
        found = [digest_of(marks.mark_files(pattern, where)) for pattern, where in files]
        if found:
            found += said if name == "captions" else ()
            inputs[name] = ABSENT if ABSENT in found else hash_marks(found)
    asks_seen = config.asks_scores or config.asks_features
    seen = embed[: len(verifications_in(data))] if asks_seen and not judged else ()
    base, by_rules = None, config.without_scores()
    if (seen or config.asks_features) and (captions or config != by_rules):
        base = dataset_step(site, by_rules, data, embed)
        if config.asks_features:
            base = inputs[Role.BASE] = replace(base, title=f"{DATASET.name} by features")
    role, found_by = (Role.JUDGED, judged) if judged else (Role.SCORES, seen)
    inputs |= {f"{role}{number:04d}": one for number, one in enumerate(found_by) if one}
    plain = Step(site.root, DATASET, config, dict(inputs), work=_not_run)
    entries: tuple[str, ...] = ()
    try:
        entries = read_takedowns(find_all(config.takedowns, site.demo, "dataset.takedowns"))
    except NotHere as error:
        inputs[Role.TAKEDOWNS] = marks.note_absent(str(error))
    if entries:
        inputs[Role.TAKEDOWNS] = takedowns_digest(entries)

    def make(profile: Profile, out: Path, report: Report) -> Made:
        from flows.graph.ancestry import ancestors_of
        from tasks.dataset.choose import find_asked
        from tasks.dataset.config import OutsideFiles
        from tasks.dataset.dataset import Takedowns, make_dataset

        files = {
            name: tuple(find_all(patterns, site.demo, f"dataset.{name}"))
            for name, patterns in rules.items()
        }
        listed = [find_files(file, site.demo, where) for file, where in read["captions"]]
        sidecars = [(one, tuple(map(str, of))) for one, of in zip(captions, listed, strict=True)]
        outside = OutsideFiles(**files, captions=tuple(sidecars))
        ancestors = ancestors_of(finished_artifact(data), read_artifacts(site.root))
        takedowns, before = Takedowns(), None
        if entries:  # the choice of the version without any takedowns is taken over, if there
            asked = sort_takedowns(entries)
            before = fetch_artifact(plain.folder) if plain.is_finished else None
            takedowns = Takedowns(entries, lambda index: find_asked(index, asked), before)
        known = describe_judged(judged, data) if judged else None
        known = describe_seen(site, seen, data, profile) if seen else known
        chosen = base.make_artifact(profile, report).folder if base and not before else None
        return make_dataset(config, ancestors, outside, takedowns, out, report, known, chosen)

    what = "what is left out, as tombstones; a card"
    record = Record({"verified": data}, files=(CARD,))
    return Step(site.root, DATASET, config, inputs, make, what, marks.absent, record)


def describe_seen(site: Site, embed: Sequence[Step], data: Parent, profile: Profile) -> Seen:
    """Return what a model saw of all data; it is opened only where it is shown more."""
    from tasks.embed.embed import find_features, read_scores
    from tasks.index.sample_index import CHECKED

    parts = verifications_in(data)
    pairs = zip(embed, parts, strict=True)
    folders = [(one.folder, fetch_artifact(of.folder, CHECKED)) for one, of in pairs]
    config = EmbedConfig.model_validate(embed[0].config)
    model, _ = find_model(site, OutsideMarks(site.demo), config.models[0])
    return Seen(
        read_scores(folders)[0],
        find_features(folders),
        lambda: fetch_model(model, profile),
        config.precision,
        profile.machine.device,
    )


def describe_judged(judged: Judged, data: Parent) -> Seen:
    """Return the scores that champions gave, each to a part of the data."""
    from tasks.embed.embed import read_scores
    from tasks.index.sample_index import CHECKED

    pairs = zip(judged, verifications_in(data), strict=True)
    scores, parts = read_scores(
        [(one.folder if one else None, fetch_artifact(of.folder, CHECKED)) for one, of in pairs]
    )
    return Seen(scores, (), parts=parts)


def initialise_step(site: Site, config: InitialiseConfig) -> Step:
    marks, absent = OutsideMarks(site.demo), config.absent_files()
    inputs: Inputs = {
        role: marks.note_absent(absent[role]) if role in absent else fingerprint_files(path)
        for role, path in config.outside_files().items()
    }
    versions = {
        role: marks.find_version(site.tracking_uri, uri)
        for role, uri in config.registered_models().items()
    }
    inputs |= {role: mark for role, (_, mark) in versions.items()}

    def make(profile: Profile, out: Path, report: Report) -> Made:
        from tasks.initialise.initialise import initialise_model

        if not versions:
            return initialise_model(config, out, report)
        from tasks.register.model_registry import pull_model  # imports mlflow

        uri, places = site.tracking_uri, profile.weight_places
        with TemporaryDirectory(dir=out) as folder:
            pulled = {
                role: pull_model(uri, version, Path(folder) / role, places=places)
                for role, (version, _) in versions.items()
            }
            return initialise_model(config, out, report, pulled)

    what = f"model {config.model}"
    return Step(site.root, INITIALISE, config, inputs, make, what, marks.absent)


def train_step(site: Site, config: TrainConfig, start: Parent, dataset: Step) -> Step:
    teach: list[Step] = []
    if config.teacher:
        by = EmbedConfig(models=config.teacher.models, precision=config.teacher.precision)
        teach = [embed_step(site, by, spec, dataset, config) for spec in by.models]

    def make(profile: Profile, out: Path, report: Report) -> Made:
        from tasks.train.train import Inputs, train_model

        teachers = tuple(one.folder / FEATURES for one in teach)
        inputs = Inputs(start.folder / MODEL_FOLDER, dataset.folder / SHARDS, teachers)
        return train_model(config, inputs, out, profile.launch, report)

    inputs: Inputs = {Role.START: start, Role.DATASET: dataset}
    inputs |= {f"{Role.TEACHER}{number:04d}": one for number, one in enumerate(teach)}
    what = f"{config.steps:,} steps of {config.global_batch:,} = {config.samples_seen:,} samples"
    if config.epochs is not None:
        what = f"{config.epochs:g} epochs of the dataset's samples, {config.global_batch:,} a step"
    record = Record({"training": dataset}, files=(METRICS_FILE, RESULT_FILE), metrics=METRICS_FILE)
    title = f"{TRAIN.name} {config.name}"
    return Step(site.root, TRAIN, config, inputs, make, what, record=record, title=title)


def interpolate_step(
    site: Site,
    config: InterpolateConfig,
    evaluate: EvaluateConfig,
    start: Parent,
    end: Step,
    dataset: Step,
) -> Step:
    """The model between start and end of training that the recipe's sets choose."""
    named = (*config.choose_on, *config.keep_on)
    sets = tuple(one for one in evaluate.sets if one.name in named)
    part = evaluate.model_copy(update={"sets": sets, "title": "", "metrics": ()})
    marks = OutsideMarks(site.demo)
    settings = hash_marks([json.dumps(part.compute_identity(), sort_keys=True)])
    inputs: Inputs = {
        **{Role.START: start, Role.END: end, Role.DATASET: dataset, "evaluation": settings},
        **mark_sets(marks, part),
    }

    def make(profile: Profile, out: Path, report: Report) -> Made:
        from tasks.evaluate.evaluate import evaluate_models
        from tasks.evaluate.metrics.metric import judged_metrics
        from tasks.interpolate.interpolate import interpolate_models

        def evaluate_all(models: Mapping[str, Path], folder: Path) -> Mapping[str, Any]:
            folder.mkdir(exist_ok=True)
            found = find_sets(part, site.demo)
            evaluate_models(part, models, found, (), folder, report, machine=profile.machine)
            results: Mapping[str, Any] = json.loads((folder / RESULTS).read_text())
            return results

        models = start.folder / MODEL_FOLDER, end.folder / MODEL_FOLDER
        return interpolate_models(config, *models, evaluate_all, judged_metrics(), out, report)

    what = f"{len(config.weights)} weights between start and end, chosen on {', '.join(named)}"
    record = Record(files=(CHOICE,))
    return Step(site.root, INTERPOLATE, config, inputs, make, what, marks.absent, record)


def untrained_model(start: Step) -> Beside:
    return Beside(UNTRAINED, Role.UNTRAINED, start, start.folder / MODEL_FOLDER)


def comparison_step(
    site: Site,
    config: EvaluateConfig,
    train: Sequence[Step],
    final: Step,
    dataset: Step,
    beside: Beside,
    title: str = "",
) -> Step:
    marks = OutsideMarks(site.demo)
    sets = mark_sets(marks, config)
    inputs = {Role.TRAINED: final, beside.role: beside.mark, **sets}
    models = {TRAINED: final.folder / MODEL_FOLDER, beside.name: beside.folder}
    found = partial(find_sets, config, site.demo)
    step = evaluate_step(
        *(site.root, config, inputs, models, found, train, dataset, title), final=final
    )
    what = f"{len(sets)} sets, {TRAINED} and {beside.name} model"
    record = replace(step.record, datasets={"evaluation": site.demo} if site.demo else {})
    return replace(step, what=what, absent=marks.absent, record=record)


def mark_sets(marks: OutsideMarks, config: EvaluateConfig) -> Inputs:
    named = {one.name: (one.folder, f"evaluate.sets '{one.name}'") for one in config.sets}
    return {name: marks.mark_files(*place) for name, place in named.items()}


def find_sets(config: EvaluateConfig, demo: Step | None) -> dict[str, Path]:
    """Name -> folder of every set."""
    return {
        one.name: find_all([one.folder], demo, f"evaluate.sets '{one.name}'")[0]
        for one in config.sets
    }


def evaluate_step(
    root: Path,
    config: EvaluateConfig,
    inputs: Inputs,
    models: Mapping[str, str | Path],
    find_sets: Callable[[], Mapping[str, Path]],
    train: Sequence[Step] = (),
    dataset: Step | None = None,
    title: str = "",
    final: Step | None = None,
) -> Step:
    """Models on evaluation sets; the first of `models` (name -> what opens it) is the subject, that
    `final` made by `train` from `dataset`: for curves, lineage, and test images that it saw."""

    def make(profile: Profile, out: Path, report: Report) -> Made:
        from flows.graph.ancestry import find_data
        from tasks.evaluate.evaluate import evaluate_models
        from tasks.evaluate.metrics.compute import TrainingData

        trained_on = []
        # Without it, the dataset was cleared away.
        if dataset and (fetch_artifact(dataset.folder, LEFT_OUT) / LEFT_OUT).is_file():
            data = find_data(finished_artifact(dataset), read_artifacts(root))
            left_out = dataset.folder / LEFT_OUT
            trained_on = [TrainingData(fetch_artifact(data.folder), left_out)] if data else []
        curves = [fetch_artifact(one.folder, METRICS_FILE) / METRICS_FILE for one in train]
        has_features = any((root / EMBED.name).glob("*/manifest.json"))
        return evaluate_models(
            *(config, models, find_sets(), curves, out, report),
            machine=profile.machine,
            search=f"http://127.0.0.1:{profile.search_port}/" if has_features else "",
            trained_on=trained_on,
            lineage=lineage_svg(lineage_of([finished_artifact(final)], root)) if final else "",
        )

    for given in config.metrics:
        if not Path(given).is_file():
            raise InputError(f"evaluate.metrics: {given} is not a file")
    own = {f"metric.{Path(one).name}": fingerprint_files(Path(one)) for one in config.metrics}
    record = Record(outside=lambda made: describe_sets(made, find_sets()), files=ATTACHED)
    return Step(root, EVALUATE, config, {**inputs, **own}, make, record=record, title=title)


def register_step(site: Site, config: RegisterConfig, trained: Step, evaluated: Step) -> Step:
    """A version in the registry; its work needs the gate's decision, which is made when it runs."""
    inputs: Inputs = {
        Role.TRAINED: trained,
        Role.EVALUATION: evaluated,
        Role.TRACKING: hash_marks([site.tracking_uri]),
    }
    what, record = f"{config.model_name}@{config.alias}", Record(files=(DECISION, DECISION_PAGE))
    return Step(site.root, REGISTER, config, inputs, _not_run, what, record=record)


def _not_run(profile: Profile, out: Path, report: Report) -> Made:
    raise RuntimeError(f"{out} is not made by its step: whoever runs it gives it its work")
