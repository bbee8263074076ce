"""Leftovers: what nothing needs any more under the root of all artifacts, and removing it.

Kept are the data of every dataset version, what a retraining may still take up, and every training
that made a champion of now or earlier, the newest version, or one whose weights the registry only
refers to. Of other registered trainings the manifest stays: lineage and retraining read there what
they were made from. A training that was never registered is its owner's, and stays.
"""

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from evaclip_model.errors import InputError
from evaclip_model.files import lock_file
from evaclip_model.training.config import MODEL_FOLDER
from evaclip_model.weights.checkpoint_files import WEIGHTS_FILE
from flows.config.profile import Profile
from flows.graph.outside_data import hash_marks
from tasks.adopt.config import STAGE as ADOPT
from tasks.artifacts import artifact as stored
from tasks.dataset.config import STAGE as DATASET
from tasks.download.config import STAGE as DOWNLOAD
from tasks.embed.config import STAGE as EMBED, TEACH
from tasks.evaluate.config import STAGE as EVALUATE
from tasks.initialise.config import STAGE as INITIALISE
from tasks.interpolate.config import STAGE as INTERPOLATE
from tasks.join.config import STAGE as JOIN
from tasks.merge.config import STAGE as MERGE
from tasks.progress import Report
from tasks.register.config import STAGE as REGISTER
from tasks.register.gate import GateOutcome
from tasks.register.promotion import champion_of, history, read_standings
from tasks.tracking import TrackingStore
from tasks.train.config import STAGE as TRAIN
from tasks.verify.config import STAGE as VERIFY

REMOVED = ".removed"
"""Folder under the root for what is being removed: whole in its place until it is gone from it."""
MADE_AGAIN = (
    *("cache/evaluate/*", "cache/models/*", "pulled/*", "search/*"),
    *(".dry-run-*", ".doctor-*"),
)
DATA = (DOWNLOAD.name, ADOPT.name, VERIFY.name, JOIN.name, EMBED.name)
MODELS = (TRAIN.name, INTERPOLATE.name, TEACH.name)
STAGES = (*DATA, MERGE.name, DATASET.name, INITIALISE.name, *MODELS, EVALUATE.name)
_DIGEST = re.compile(r"[0-9a-f]{16}")


class Leftover(NamedTuple):
    path: Path
    why: str
    is_manifest_kept: bool = False
    """Of a training: what it was made from is still asked."""
    bytes: int = 0


@dataclass(frozen=True)
class _Root:
    profile: Profile
    artifacts: Sequence[stored.Artifact]

    @cached_property
    def by_digest(self) -> dict[str, stored.Artifact]:
        return {one.digest: one for one in self.artifacts}

    def of_kind(self, kind: str) -> list[stored.Artifact]:
        return [one for one in self.artifacts if one.kind == kind]

    def ancestors(self, heads: Sequence[stored.Artifact]) -> Mapping[str, stored.Artifact]:
        return stored.walk_up(heads, self.by_digest.get)

    @cached_property
    def named(self) -> Mapping[str, stored.Artifact]:
        """The artifacts that dataset versions are made of."""
        return self.ancestors(self.of_kind(DATASET.name))

    @cached_property
    def waiting(self) -> set[str]:
        """Digests of merges and adoptions that the next retraining takes up."""
        begun = (one for one in self.artifacts if stored.Role.GIVEN in one.parents)
        return {one.digest for one in begun if one.digest not in self.named}


def find_leftovers(profile: Profile, days: float) -> list[Leftover]:
    """Return what may go, ahead of what it is made of; what changed in the last `days` stays."""
    if profile.root_url:
        raise InputError(
            f"prune works on a root that is a folder: at {profile.root_url} it could not tell what "
            "flows of other machines use; delete there what lineage shows to be of no use"
        )
    folder = profile.root.resolve()
    root = _Root(profile, stored.read_artifacts(folder))
    again = [Leftover(path, "can be made again") for one in MADE_AGAIN for path in folder.glob(one)]
    found = [*_old_trainings(root), *_unnamed_data(root), *_half_made(folder, root), *again]
    leftovers = [
        Leftover(path, "left by a `prune` that was killed", bytes=_measure_tree(path)[0])
        for path in folder.glob(f"{REMOVED}/*")
    ]
    for one in {one.path: one for one in found}.values():
        size, changed = _measure_tree(one.path)
        if changed <= time.time() - days * 86_400:
            leftovers.append(one._replace(bytes=size))
    return leftovers


def remove_leftovers(root: Path, found: Sequence[Leftover], report: Report) -> None:
    """Remove what was found; a kill at any moment leaves every artifact whole or gone."""
    lock = lock_file(root / stored.ROOT_LOCK)
    if lock is None:
        raise InputError(f"a flow is running under {root}: prune when it is over")
    with lock:
        done, total = 0, sum(one.bytes for one in found)
        for one in found:
            report(done, total, str(one.path.relative_to(root)))
            done += one.bytes
            if one.is_manifest_kept:
                (one.path / stored.MANIFEST).rename(one.path / stored.PRUNED)
            for path in [*one.path.iterdir()] if one.is_manifest_kept else [one.path]:
                if path.name != stored.PRUNED:
                    _remove_tree(path, root / REMOVED)


def _remove_tree(path: Path, removed: Path) -> None:
    if path.parent != removed:
        aside = removed / str(time.time_ns())  # a level deeper than an artifact is looked for
        aside.mkdir(parents=True)
        path.rename(aside / path.name)
        path = aside
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _measure_tree(path: Path) -> tuple[int, float]:
    """(bytes of all files, time of the newest change) below a path."""
    states = [one.lstat() for one in (path, *path.rglob("*"))]
    return sum(one.st_size for one in states), max(one.st_mtime for one in states)


def _old_trainings(root: _Root) -> Iterator[Leftover]:
    registered = root.of_kind(REGISTER.name)
    unneeded = {one.digest: _why_unneeded(one, root) for one in registered}
    needed = root.ancestors([one for one in registered if not unneeded[one.digest]])
    for one in registered:
        for above in root.ancestors([one]).values():
            is_there = (above.folder / stored.MANIFEST).exists()
            if above.kind in MODELS and above.digest not in needed and is_there:
                yield Leftover(above.folder, unneeded[one.digest], is_manifest_kept=True)


def _why_unneeded(registered: stored.Artifact, root: _Root) -> str:
    """Return why nobody needs the training of a registration; empty where somebody may."""
    name, version = registered.config["model_name"], int(registered.counts["version"])
    alias, digest = registered.config["alias"], registered.parents[stored.Role.TRAINED]
    store = TrackingStore.at(root.profile.mlflow_uri, "")
    standings, champion = read_standings(store, name), champion_of(store, name, alias)
    if champion is None:
        return ""  # somebody renamed it, or deleted what a run would register again
    standing = standings.get(version)
    if standing is None and registered.parents[stored.Role.TRACKING] == hash_marks([store.uri]):
        return f"{name}/{version} was deleted in the registry"
    if standing is None or standing.digest != digest:
        return ""  # in another registry
    champions = {move.version for move in history(store, name, alias)}
    if version in champions | {max(standings), champion.version}:
        return ""
    trained = root.by_digest.get(digest)
    weights = trained.folder / MODEL_FOLDER / WEIGHTS_FILE if trained else None
    size = weights.stat().st_size if weights and weights.exists() else 0
    if standing.gate != GateOutcome.REJECT and size > root.profile.registry_copy_gb * 1e9:
        return ""
    return f"{name}/{version} was never {alias} and is not the newest"


def _unnamed_data(root: _Root) -> Iterator[Leftover]:
    for one in reversed(root.artifacts):
        # Features are of use while their samples are: `find` and the next version read them.
        of = one.parents[stored.Role.DATA] if one.kind == EMBED.name else one.digest
        if one.kind not in DATA or of in root.named:
            continue
        if root.waiting.isdisjoint(root.ancestors([one])):
            yield Leftover(one.folder, "no dataset version is made of it")


def _half_made(folder: Path, root: _Root) -> Iterator[Leftover]:
    for path in (path for stage in STAGES for path in folder.glob(f"{stage}/*")):
        is_made = (path / stored.MANIFEST).exists() or (path / stored.PRUNED).exists()
        is_taken_up = path.parent.name == DOWNLOAD.name and root.waiting
        if _DIGEST.fullmatch(path.name) and not is_made and not is_taken_up:
            yield Leftover(path, "half-made")
