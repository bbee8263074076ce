"""Samples by what they show: text, picture or another sample, through the features of a stage
`embed`. Not here: the search itself (tasks/embed/search.py), where a sample came from
(sample_trace.py)."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import SampleReader
from evaclip_model.reading.urls import is_url
from flows.config.profile import Profile
from flows.graph.outside_data import fetch_models, fingerprint_model
from tasks.artifacts.artifact import Artifact, Role, read_artifact, read_artifacts
from tasks.embed.config import STAGE
from tasks.embed.embed import REPORT
from tasks.embed.search import Hit, Vector, find_feature, search_features
from tasks.index.sample_index import SampleIndex, read_verdicts, shard_location
from tasks.initialise.config import REGISTRY
from tasks.verify.config import STAGE as VERIFY


class FoundSample(NamedTuple):
    """A sample that was found, with its row in the index (uid, source, url, key)."""

    hit: Hit
    row: dict[str, Any]
    shard: str
    """Path or URL of the tar."""
    caption: str | None
    """None where the shard lies at a URL, which is not fetched for it."""


def find_samples(
    profile: Profile,
    *,
    text: str = "",
    image: Path | None = None,
    like: str = "",
    count: int = 10,
    model: str = "",
) -> list[FoundSample]:
    """The samples nearest to a text, a picture or a sample, by `model` or what embedded last."""
    root = profile.root.resolve()
    embedded, spec = _choose_artifacts(root, model)
    mark = embedded[0].parents[Role.SUBJECT]
    folders = [artifact.folder for artifact in embedded]
    if like:
        query = find_feature(folders, like)
    else:
        if not spec.startswith(REGISTRY) and fingerprint_model(spec) != mark:
            raise InputError(f"{spec} is not the model any more that embedded: run `prepare` again")
        query = _encode_query(fetch_models({spec: spec}, profile)[spec], text, image)
    if query is None:
        raise InputError(f"no sample with uid '{like}' was embedded by {spec}")
    hits = search_features(folders, query, count)
    data = {one.folder: root / VERIFY.name / one.parents[Role.DATA] for one in embedded}
    verified = {of: read_artifact(data[of]).folder for of in {hit.folder for hit in hits}}
    verdicts = {folder: read_verdicts(of) for folder, of in verified.items()}
    return [
        _describe_hit(hit, verified[hit.folder], verdicts[hit.folder][hit.shard].path)
        for hit in hits
    ]


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


def _encode_query(spec: str, text: str, image: Path | None) -> Vector:
    from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
    from evaclip_model.zeroshot.encode_chunks import embed_images, embed_texts
    from tasks.encoders.open_models import open_subject

    subject = open_subject(spec)
    if image is None:
        features = embed_texts(subject, [text])
    else:
        try:
            picture = decode_image(image.read_bytes())
        except (OSError, UnreadableImageError) as error:
            raise InputError(f"{image} cannot be read as a picture: {error}") from None
        features = embed_images(subject, iter([subject.transform(picture)]))
    vector: Vector = features[0].float().numpy()
    return vector


def _describe_hit(hit: Hit, verified: Path, path: str) -> FoundSample:
    rows = SampleIndex(verified).rows_of_shard(hit.shard, "place", "uid", "source", "url", "key")
    row = rows.filter(pc.equal(rows["place"], hit.place)).to_pylist()[0]
    shard = shard_location(verified, path)
    caption = None
    if not is_url(shard):
        shard = str(Path(shard).resolve())
        with closing(SampleReader(Path(shard))) as reader:
            caption = reader.read(hit.place, hit.place + 1)[0].caption
    return FoundSample(hit, row, shard, caption)
