"""Samples by what they show: text, picture or another sample, through the features of a stage
`embed`. Not here: the search itself (tasks/embed/search.py), where a sample came from
(sample_trace.py), the page (flows/search/search_page.py)."""

import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from evaclip_model.errors import InputError
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.reading.samples import BrokenShard, Sample, SampleReader
from evaclip_model.reading.urls import is_url
from flows.audit.sample_trace import find_versions, locate_shard
from flows.config.profile import Profile
from flows.graph.outside_data import fetch_model, fingerprint_model
from tasks.artifacts.artifact import Artifact, Role, read_artifact, read_artifacts
from tasks.artifacts.root_store import fetch_artifact
from tasks.embed.config import STAGE
from tasks.embed.embed import REPORT
from tasks.embed.search import Hit, Searched, Vector, Wanted, read_feature, search_features
from tasks.index.sample_index import Kind, SampleIndex, ShardVerdict, read_verdicts
from tasks.initialise.config import REGISTRY
from tasks.progress import Report, report_nothing
from tasks.verify.config import STAGE as VERIFY

EXACT_SAMPLES = 200_000
"""Of one artifact, up to which all are looked at: some seconds of a core."""


class FoundSample(NamedTuple):
    """A sample that was found, with its row in the index (uid, source, url, key)."""

    hit: Hit
    row: dict[str, Any]
    shard: str
    """Path or URL of the tar."""
    pair: Sample | None
    """None where the shard lies at a URL, which is not fetched for it, or cannot be read now."""
    versions: dict[str, str | None]
    """Digest of every dataset version made of its shard -> why it leaves the sample out."""


class SampleSearch:
    """The samples that `model`, or what embedded last, embedded, open for searching. Of more than
    `EXACT_SAMPLES` of an artifact an index is used, where faiss is installed: one that is there
    or, where a `report` follows it, a new one."""

    def __init__(self, profile: Profile, model: str = "", report: Report | None = None) -> None:
        self._profile, self._root = profile, profile.root.resolve()
        embedded, self.model = _choose_artifacts(self._root, model)
        self._mark = embedded[0].parents[Role.SUBJECT]
        self._data: dict[Path, tuple[Artifact, list[ShardVerdict]]] = {}
        self._searched = []
        for one in embedded:
            verified = read_artifact(self._root / VERIFY.name / one.parents[Role.DATA])
            verdicts = read_verdicts(fetch_artifact(verified.folder))
            fetch_artifact(one.folder)
            sources = {n: of.shard.source for n, of in enumerate(verdicts) if of.shard}
            self._data[one.folder] = verified, verdicts
            search_index = None
            if one.counts["samples"] > EXACT_SAMPLES and find_spec("faiss"):
                from tasks.embed.feature_index import FeatureIndex, address_index

                if report or address_index(self._root, one).is_finished:
                    index = FeatureIndex(self._root, one, report or report_nothing)
                    search_index = index.find_nearest
            self._searched.append(Searched(one.folder, sources, search_index))
        self.samples = sum(int(one.counts["samples"]) for one in embedded)
        self.sources = sorted({name for one in self._searched for name in one.sources.values()})

    def feature_of(self, text: str, uid: str, picture: bytes) -> Vector:
        """The feature [D] of a text, of a sample's image or of an image file, whichever is given
        first. InputError: none of the sample is stored, or the file cannot be decoded."""
        from evaclip_model.zeroshot.encode_chunks import embed_images, embed_texts

        if uid and not text:
            for folder, (verified, _) in self._data.items():
                for row in SampleIndex(verified.folder).find_samples(Kind.UID, [uid]):
                    if (found := read_feature(folder, row["shard"], row["place"])) is not None:
                        return found
            raise InputError(f"no sample with uid '{uid}' was embedded by {self.model}")
        if text:
            features = embed_texts(self._subject, [text])
        else:
            try:
                pixels = self._subject.transform(decode_image(picture))
            except UnreadableImageError as error:
                raise InputError(f"the picture cannot be read: {error}") from None
            features = embed_images(self._subject, iter([pixels]))
        return features[0].float().numpy()

    def find_samples(self, query: Vector, wanted: Wanted) -> list[FoundSample]:
        """The samples nearest to a feature, the nearest first."""
        hits = search_features(self._searched, query, wanted)
        by_shard: defaultdict[tuple[Path, int], list[Hit]] = defaultdict(list)
        for hit in hits:
            by_shard[hit.folder, hit.shard].append(hit)
        artifacts, found = read_artifacts(self._root), dict[Hit, FoundSample]()
        for (folder, number), of_shard in by_shard.items():
            (verified, verdicts), places = self._data[folder], [hit.place for hit in of_shard]
            shard = locate_shard(verified, verdicts[number].path)
            columns = ("row", "place", "uid", "source", "url", "key")
            table = SampleIndex(verified.folder).rows_of_shard(number, *columns)
            table = table.filter(pc.is_in(table["place"], pc.cast(places, "int32")))
            rows = {row["place"]: row for row in table.to_pylist()}
            numbers = [row["row"] for row in rows.values()]
            versions = [*find_versions(verified, numbers, artifacts)]
            pairs = _read_pairs(shard, sorted(places))
            for hit in of_shard:
                row = rows[hit.place]
                held = {one.digest: why.get(first + row["row"]) for one, first, why in versions}
                found[hit] = FoundSample(hit, row, shard, pairs.get(hit.place), held)
        return [found[hit] for hit in hits]

    @cached_property
    def _subject(self) -> Any:
        from tasks.encoders.open_models import open_subject

        if not self.model.startswith(REGISTRY) and fingerprint_model(self.model) != self._mark:
            raise InputError(
                f"{self.model} is not the model any more that embedded: run `prepare` again"
            )
        return open_subject(fetch_model(self.model, self._profile))


def _choose_artifacts(root: Path, model: str) -> tuple[list[Artifact], str]:
    """The artifacts of one model, and what opens it."""
    found = [one for one in read_artifacts(root) if one.kind == STAGE.name]
    named = {one.digest: json.loads((one.folder / REPORT).read_text())["model"] for one in found}
    asked = [one for one in found if model in ("", named[one.digest])]
    if not asked and named:
        known = ", ".join(sorted(set(named.values())))
        raise InputError(f"{model} embedded nothing under {root}: {known} did")
    if not asked:
        raise InputError(
            f"nothing under {root} is embedded: add [embed] to the recipe and run `prepare`"
        )
    last = max(asked, key=lambda one: one.created)
    mark = last.parents[Role.SUBJECT]
    return [one for one in asked if one.parents[Role.SUBJECT] == mark], named[last.digest]


def _read_pairs(shard: str, places: Sequence[int]) -> dict[int, Sample]:
    """The pairs at some rising places of a shard on this machine; none if it cannot be read."""
    if is_url(shard):
        return {}
    try:
        with closing(SampleReader(Path(shard))) as reader:
            return {place: reader.read(place, place + 1)[0] for place in places}
    except (OSError, BrokenShard, IndexError):
        return {}
