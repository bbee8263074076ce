"""The page of an evaluation: one HTML file that needs no other.

Covers: what each part of the page is filled with.
Not here: any figure (results.json has them all), drawing (charts.py, pictures.py), examples
(examples.py), the page's looks (report.html.j2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from evaclip_model.metrics import chance_of_hit, hit_rate
from tasks.evaluate.figures import TITLES, Scored, captions_of
from tasks.evaluate.report.charts import Line, line_chart
from tasks.evaluate.report.curves import Curve, loss_chart
from tasks.evaluate.report.examples import confusions, mistakes, readings, searches
from tasks.evaluate.report.numbers import interval, ordinal, percent, times


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
