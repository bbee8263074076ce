"""The examples that the report shows, with their pictures.

Examples are drawn at random with a seed made of the set's fingerprint, never picked by looks;
where only right answers, only others or only the commonest confusions are, the page says so.
"""

import base64
import io
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from PIL import Image, WebPImagePlugin

from evaclip_model.reading.image_decoder import decode_image
from evaclip_model.zeroshot.exact_ranks import Ranking, top_k
from tasks.evaluate.metrics.scored import SHOWN, Scored, image_of_caption
from tasks.evaluate.sets.published_layout import EvalSet

CAPTIONS_SHOWN = 4
FEW_SETS = 6
"""Up to so many sets, each shows more examples."""
THUMBNAIL_PX = 72
QUALITY = 72
"""Of thumbnails, as WebP counts it."""
_FORM = WebPImagePlugin.WebPImageFile.format
"""By a mere name Pillow finds a form after importing all of its plugins."""


class Amount(NamedTuple):
    """Number of examples of one set: a page over many sets shows fewer of each."""

    right: int
    """Queries drawn from those answered right, each direction."""
    others: int
    """Queries drawn from the others."""
    confusions: int

    @classmethod
    def for_sets(cls, count: int) -> Self:
        """The amount that keeps the page of `count` sets below a few megabytes."""
        return cls(3, 5, 10) if count <= FEW_SETS else cls(2, 3, 5)


def pick_searches(scored: Scored, amount: Amount) -> list[dict[str, Any]]:
    """Text to image: a caption and the first images, its own marked."""
    assert scored.images is not None
    captions, owner = scored.evalset.captions, image_of_caption(scored.evalset)
    return [
        {
            "group": group,
            "query": captions[query],
            "rank": int(scored.images.ranks[query]) + 1,
            "images": [
                {
                    "uri": _image_thumbnail(scored.evalset, image),
                    "right": image == int(owner[query]),
                    "title": scored.evalset.samples[image].captions[0],
                }
                for image in scored.images.top[query].tolist()
            ],
            "own": _image_thumbnail(scored.evalset, int(owner[query])),
        }
        for group, query in _draw_queries(scored.evalset, scored.images, amount)
    ]


def pick_readings(scored: Scored, amount: Amount) -> list[dict[str, Any]]:
    """Image to text: an image and the first captions, its own marked."""
    assert scored.texts is not None
    captions, owner = scored.evalset.captions, image_of_caption(scored.evalset)
    return [
        {
            "group": group,
            "picture": _image_thumbnail(scored.evalset, query),
            "rank": int(scored.texts.ranks[query]) + 1,
            "own": scored.evalset.samples[query].captions[0],
            "captions": [
                {"text": captions[text], "right": int(owner[text]) == query}
                for text in scored.texts.top[query, :CAPTIONS_SHOWN].tolist()
            ],
        }
        for group, query in _draw_queries(scored.evalset, scored.texts, amount)
    ]


def find_confusions(scored: Scored) -> dict[tuple[int, int], list[int]]:
    """(Class, another that was given) -> its images that were; the commonest first."""
    assert scored.classes is not None
    labels = [sample.label for sample in scored.evalset.samples]
    made: dict[tuple[int, int], list[int]] = {}
    for index, pair in enumerate(zip(labels, scored.classes.top[:, 0].tolist(), strict=True)):
        if pair[0] != pair[1]:
            made.setdefault(pair, []).append(index)
    return dict(sorted(made.items(), key=lambda item: -len(item[1])))


def pick_confusions(scored: Scored, amount: Amount) -> list[dict[str, Any]]:
    """The commonest confusions, each with one of its images and one of the other class."""
    evalset = scored.evalset
    sizes = Counter(sample.label for sample in evalset.samples)
    of_class = {one.label: index for index, one in reversed([*enumerate(evalset.samples)])}
    return [
        {
            "actual": evalset.classnames[actual],
            "said": evalset.classnames[said],
            "picture": _image_thumbnail(evalset, _draw_sample(evalset, images, 1)[0]),
            "example": _image_thumbnail(evalset, of_class[said]) if said in of_class else None,
            "times": len(images),
            "of": sizes[actual],
        }
        for (actual, said), images in [*find_confusions(scored).items()][: amount.confusions]
    ]


def class_searches(scored: Scored, amount: Amount) -> list[dict[str, Any]]:
    """Classes of a multi-label set and their first images, those that show the class marked."""
    assert scored.scores is not None
    evalset = scored.evalset
    shown = [set(sample.labels) for sample in evalset.samples]
    occurring = sorted(set().union(*shown))
    chosen = sorted(_draw_sample(evalset, occurring, amount.right + amount.others))
    first = top_k(scored.scores.T[chosen], SHOWN).tolist()
    return [
        {
            "query": evalset.classnames[label],
            "images": [
                {"uri": _image_thumbnail(evalset, image), "right": label in shown[image]}
                for image in images
            ],
        }
        for label, images in zip(chosen, first, strict=True)
    ]


def taken_for(scored: Scored) -> Mapping[int, tuple[int, int]]:
    """Class -> the other class its images were most often given, and how often."""
    rarest_first = reversed(find_confusions(scored).items())
    return {actual: (said, len(images)) for (actual, said), images in rarest_first}


def make_thumbnail(content: bytes, px: int = THUMBNAIL_PX) -> str:
    """An encoded image as a small WebP data URI, transparent parts on white."""
    rgba = decode_image(content).convert("RGBA")
    rgba.thumbnail((px, px), Image.Resampling.BICUBIC)
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    out = io.BytesIO()
    flat.save(out, _FORM, quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def _draw_queries(evalset: EvalSet, ranking: Ranking, amount: Amount) -> list[tuple[str, int]]:
    among = torch.nonzero(ranking.ranks == 0).flatten().tolist()
    good = _draw_sample(evalset, among, amount.right)
    rest = torch.nonzero(ranking.ranks > 0).flatten().tolist()
    among_right = f"drawn from the {len(among):,} of {len(ranking):,} answered right"
    return [(among_right, query) for query in good] + [
        (f"drawn from the other {len(rest):,}", query)
        for query in _draw_sample(evalset, rest, amount.others)
    ]


def _draw_sample(evalset: EvalSet, population: Sequence[int], count: int) -> list[int]:
    draw = random.Random(f"{evalset.fingerprint}:{len(population)}")
    return draw.sample(population, min(count, len(population)))


def _image_thumbnail(evalset: EvalSet, index: int) -> str:
    return make_thumbnail(evalset.samples[index].image.read())
