"""The report of an evaluation: one HTML page that needs no other file.

Covers: loss curves from `metrics.jsonl`, which examples are shown, filling the page's template.
Not here: any figure (results.json has them all), drawing (pictures.py), the page's looks
(report.html.j2).

Examples are drawn at random with a seed made of the set's fingerprint, never picked by looks;
where only right answers or only mistakes are drawn from, the page says so.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import torch

from evaclip_model.errors import InputError
from evaclip_model.zeroshot import Ranking, chance_of_hit, hit_rate
from tasks.artifact import write_atomically
from tasks.evaluate.figures import TITLES, Scored, captions_of, image_of_caption
from tasks.evaluate.pictures import Line, line_chart, thumbnail
from tasks.evaluate.sets import EvalSet

QUERIES_RIGHT, QUERIES_ANY = 3, 5
MISTAKES = 15
CAPTIONS_SHOWN = 4
SMOOTH = 0.03
"""Window of the smoothed loss, as a share of the curve."""
CURVE_POINTS = 400


@dataclass(frozen=True)
class Curve:
    """What one training stage wrote down, step by step."""

    name: str
    samples: tuple[float, ...]
    """Image-text pairs seen so far."""
    losses: tuple[float, ...]
    batch: float
    """Image-text pairs contrasted in one step."""
    seconds: float
    """Wall time of all steps."""
    images_per_second: float
    """Median over steps."""
    logit_scale: float
    """At the end."""


def read_curve(path: Path) -> Curve:
    """Read a training stage's `metrics.jsonl`; its name is in `train.json` beside it.

    Raises:
        InputError: no such file, or no step in it.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} is missing: a training stage writes it, train first") from None
    steps = [step for step in map(_step, lines) if step is not None]
    if not steps:
        raise InputError(f"{path} holds no training step: train again")
    job = path.with_name("train.json")
    named = json.loads(job.read_text())["train"]["name"] if job.is_file() else path.parent.name
    return Curve(
        name=str(named),
        samples=tuple(float(step["samples"]) for step in steps),
        losses=tuple(float(step["loss"]) for step in steps),
        batch=float(steps[-1]["samples"]) / int(steps[-1]["step"]),
        seconds=sum(float(step.get("step_s", 0)) for step in steps),
        images_per_second=median(float(step.get("images_per_second", 0)) for step in steps),
        logit_scale=float(steps[-1].get("logit_scale", float("nan"))),
    )


def write_report(
    path: Path,
    results: Mapping[str, Any],
    scored: Mapping[str, Mapping[str, Scored]],
    curves: Sequence[Curve],
) -> None:
    """Write the page of `results` (results.json's content) with pictures from `scored`."""
    write_atomically(path, page(results, scored, curves))


def page(
    results: Mapping[str, Any],
    scored: Mapping[str, Mapping[str, Scored]],
    curves: Sequence[Curve],
) -> str:
    """The whole page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "times": times,
        "ordinal": ordinal,
    }
    subject = results["subject"]
    own = {name: by_model[subject] for name, by_model in scored.items()}
    return environment.get_template("report.html.j2").render(
        results=results,
        subject=subject,
        others=[name for name in results["models"] if name != subject],
        titles=TITLES,
        headlines=headlines(results),
        curves=[(curve, loss_chart(curve)) for curve in curves],
        images_seen=sum(curve.samples[-1] for curve in curves),
        depth={name: depth_chart(by_model, results) for name, by_model in scored.items()},
        searches={name: searches(one) for name, one in own.items() if one.images},
        readings={name: readings(one) for name, one in own.items() if one.texts},
        mistakes={name: mistakes(one) for name, one in own.items() if one.classes},
        confusions={name: confusions(one) for name, one in own.items() if one.classes},
    )


def headlines(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures a reader wants first: top-1 and top-5, and R@1 and R@10 of each direction."""
    wanted = ("top1", "top5", "text_to_image_r1", "image_to_text_r1")
    subject = results["subject"]
    return [
        {"set": name, "metric": metric, "value": by_model[subject][metric]}
        | {"interval": by_model[subject]["intervals"][metric], "chance": chance}
        | {"others": {m: one[metric] for m, one in by_model.items() if m != subject}}
        for name, by_model in results["results"].items()
        for metric, chance in results["chance"][name].items()
        if metric in wanted
    ]


def loss_chart(curve: Curve) -> str:
    """Loss over samples seen, every step and smoothed, and the loss of guessing, ln(batch)."""
    stride = max(1, len(curve.losses) // CURVE_POINTS)
    raw = list(zip(curve.samples, curve.losses, strict=True))
    width = max(1, round(len(raw) * SMOOTH))
    smooth = [
        (x, sum(part) / len(part))
        for index, x in enumerate(curve.samples)
        for part in (curve.losses[max(0, index - width + 1) : index + 1],)
    ]
    guessing = [(curve.samples[0], log(curve.batch)), (curve.samples[-1], log(curve.batch))]
    lines = [
        Line(guessing, "guessing", "chance"),
        Line(raw[::stride], "each step", "raw"),
        Line(smooth[::stride], f"mean of {width} steps", "subject"),
    ]
    return line_chart(lines, x="image-text pairs seen", y="contrastive loss")


def depth_chart(by_model: Mapping[str, Scored], results: Mapping[str, Any]) -> str:
    """Share of right answers among the first k, over k, for every model and for chance."""
    rankings = {name: next(iter(one.rankings().values())) for name, one in by_model.items()}
    first = next(iter(by_model.values()))
    answers = len(first.evalset.classnames) or len(captions_of(first.evalset))
    ks = sorted({max(1, round(answers ** (i / 40))) for i in range(41)})
    owned = [max(1, len(sample.captions)) for sample in first.evalset.samples]
    chance = [(k, 100 * chance_of_hit(k, answers, owned)) for k in ks]
    lines = [Line(chance, "chance", "chance")]
    for name, ranking in reversed(rankings.items()):
        style = "subject" if name == results["subject"] else "other"
        lines.append(Line([(k, 100 * hit_rate(ranking.ranks, k)) for k in ks], name, style))
    return line_chart(lines, x="first k answers", y="right answer among them, %", log_x=True)


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


def percent(value: float) -> str:
    """A share as people read it: 6.21 %, 0.07 %, 100 %."""
    digits = 2 if value < 0.1 else 1
    return f"{100 * value:.{digits}f} %" if value < 1 else "100 %"


def interval(bounds: tuple[float, float]) -> str:
    """A range of shares: 5.12 – 7.51 %."""
    low, high = (percent(value).removesuffix(" %") for value in bounds)
    return f"{low} – {high} %"


def times(value: float, chance: float) -> str:
    """How many times chance a share is."""
    ratio = value / chance
    return f"{ratio:.0f} ×" if ratio >= 10 else f"{ratio:.1f} ×"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 1,021st."""
    teens = number % 100 in (11, 12, 13)
    suffix = "th" if teens else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{suffix}"


def _step(line: str) -> dict[str, Any] | None:
    """One step; a line cut off by a kill is none."""
    try:
        step = json.loads(line)
    except ValueError:
        return None
    return step if isinstance(step, dict) and {"step", "samples", "loss"} <= step.keys() else None


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
