"""Accuracy against compute, as the paper's Figure 1 shows it.

The figure's horizontal axis is not stated; here it is the image tower's forward pass. A circle
stands for forward GFLOPs times training samples, as the paper's caption says; its area here, where
the paper says diameter, because the range is two hundred to one.
"""

from __future__ import annotations

from markupsafe import Markup

from tasks.evaluate.paper.published import rows_of
from tasks.evaluate.report.charts import Bubble, bubble_chart
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.paper_form import beside_of

SET, METRIC = "imagenet1k", "top1"
GFLOPS = {
    "OpenAI CLIP-B/16": 35.1269,
    "OpenAI CLIP-L/14": 162.0255,
    "OpenAI CLIP-L/14+": 381.9198,
    "Open CLIP-B/16": 35.1269,
    "Open CLIP-L/14": 162.0255,
    "Open CLIP-H/14": 334.5903,
    "Open CLIP-g/14": 534.0631,
    "Open CLIP-G/14": 967.496,
    "EVA-01-CLIP-B/16": 35.1269,
    "EVA-01-CLIP-g/14": 534.0631,
    "EVA-01-CLIP-g/14+": 534.0631,
    "EVA-02-CLIP-B/16": 35.1269,
    "EVA-02-CLIP-L/14": 162.0003,
    "EVA-02-CLIP-L/14+": 381.8631,
    "EVA-02-CLIP-E/14": 2264.3269,
    "EVA-02-CLIP-E/14+": 2264.3269,
}
"""Of one image through the image tower of every model of Table 1a, as
`evaclip_model.training.cost.image_flops` counts them for these architectures."""


def compute_chart(found: Findings, images_seen: float) -> Markup | None:
    """The chart, when ImageNet-1K was evaluated.

    `images_seen` are the subject's image-text pairs where its training is known, else 0.
    """
    shares = {model: found.set_results(SET, model).get(METRIC) for model in found.models}
    if all(share is None for share in shares.values()):
        return None
    rows = {row.model: row.cells for row in rows_of("1a")}
    bubbles = [
        _make_bubble(
            name, row["in1k_zs_top1"], GFLOPS[name], row["samples_seen"], _model_family(name)
        )
        for name, row in rows.items()
    ]
    for model, share in shares.items():
        gflops = found.describe_model(model)["gflops"]
        if share is not None and gflops:
            beside = beside_of(found, model)
            samples = images_seen if model == found.subject and images_seen else None
            if samples is None and beside is not None and beside.is_released:
                samples = rows[beside.row]["samples_seen"]
            bubbles.append(_make_bubble(model, 100 * share, gflops, samples, "subject"))
    return bubble_chart(bubbles, x="forward GFLOPs an image", y="ImageNet-1K zero-shot top-1, %")


def _make_bubble(
    name: str, percent: float, gflops: float, samples: float | None, style: str
) -> Bubble:
    """One model; `samples` are the image-text pairs seen, None if unknown."""
    return Bubble(gflops, percent, None if samples is None else gflops * samples, name, style)


def _model_family(name: str) -> str:
    return "eva" if name.startswith("EVA") else "openai" if name.startswith("OpenAI") else "open"
