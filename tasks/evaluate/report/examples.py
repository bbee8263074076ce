"""Which examples the report shows, with their pictures.

Covers: searches in both directions, mistakes, confusions; the rule by which they are drawn.
Not here: figures, the page.

Examples are drawn at random with a seed made of the set's fingerprint, never picked by looks;
where only right answers or only mistakes are drawn from, the page says so.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from evaclip_model.zeroshot import Ranking
from tasks.evaluate.figures import Scored, captions_of, image_of_caption
from tasks.evaluate.report.pictures import thumbnail
from tasks.evaluate.sets import EvalSet

QUERIES_RIGHT, QUERIES_ANY = 3, 5
MISTAKES = 15
CAPTIONS_SHOWN = 4


def searches(scored: Scored) -> list[dict[str, Any]]:
    """Text to image: a caption and the first images, its own marked."""
    assert scored.images is not None
    captions, owner = captions_of(scored.evalset), image_of_caption(scored.evalset)
    return [
        {
            "group": group,
            "query": captions[query],
            "rank": int(scored.images.ranks[query]) + 1,
            "images": [
                {"uri": _picture(scored.evalset, image), "right": image == int(owner[query])}
                | {"title": scored.evalset.samples[image].captions[0]}
                for image in scored.images.top[query].tolist()
            ],
            "own": _picture(scored.evalset, int(owner[query])),
        }
        for group, query in _drawn(scored.evalset, scored.images, QUERIES_RIGHT, QUERIES_ANY)
    ]


def readings(scored: Scored) -> list[dict[str, Any]]:
    """Image to text: an image and the first captions, its own marked."""
    assert scored.texts is not None
    captions, owner = captions_of(scored.evalset), image_of_caption(scored.evalset)
    return [
        {
            "group": group,
            "picture": _picture(scored.evalset, query),
            "rank": int(scored.texts.ranks[query]) + 1,
            "own": scored.evalset.samples[query].captions[0],
            "captions": [
                {"text": captions[text], "right": int(owner[text]) == query}
                for text in scored.texts.top[query, :CAPTIONS_SHOWN].tolist()
            ],
        }
        for group, query in _drawn(scored.evalset, scored.texts, QUERIES_RIGHT, QUERIES_ANY)
    ]


def mistakes(scored: Scored) -> list[dict[str, Any]]:
    """Wrongly classified images beside an image of the class they were taken for."""
    assert scored.classes is not None
    evalset, ranks = scored.evalset, scored.classes.ranks
    wrong = torch.nonzero(ranks > 0).flatten().tolist()
    of_class = {sample.label: index for index, sample in reversed([*enumerate(evalset.samples)])}
    return [
        {
            "picture": _picture(evalset, index),
            "actual": evalset.classnames[evalset.samples[index].label],
            "said": evalset.classnames[said],
            "example": _picture(evalset, of_class[said]) if said in of_class else None,
            "rank": int(ranks[index]) + 1,
        }
        for index in sorted(_sample(evalset, wrong, MISTAKES))
        for said in (int(scored.classes.top[index, 0]),)
    ]


def confusions(scored: Scored) -> list[tuple[str, str, int]]:
    """The commonest mistakes (true class, given class, times), of those made more than once."""
    assert scored.classes is not None
    labels = [sample.label for sample in scored.evalset.samples]
    given = scored.classes.top[:, 0].tolist()
    pairs = Counter(pair for pair in zip(labels, given, strict=True) if pair[0] != pair[1])
    names = scored.evalset.classnames
    return [(names[t], names[g], n) for (t, g), n in pairs.most_common(10) if n > 1]


def _drawn(evalset: EvalSet, ranking: Ranking, right: int, whatever: int) -> list[tuple[str, int]]:
    """Queries to show: some of those answered right, then some of all."""
    among = torch.nonzero(ranking.ranks == 0).flatten().tolist()
    good = _sample(evalset, among, right)
    rest = [query for query in range(len(ranking)) if query not in set(good)]
    told = f"drawn from the {len(among):,} of {len(ranking):,} answered right"
    return [(told, query) for query in good] + [
        (f"drawn from the other {len(rest):,}", query) for query in _sample(evalset, rest, whatever)
    ]


def _sample(evalset: EvalSet, population: Sequence[int], count: int) -> list[int]:
    draw = random.Random(f"{evalset.fingerprint}:{len(population)}")
    return draw.sample(population, min(count, len(population)))


def _picture(evalset: EvalSet, index: int) -> str:
    return thumbnail(evalset.samples[index].image.read())
