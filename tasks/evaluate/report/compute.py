"""Accuracy against compute, as the paper's Figure 1 shows it.

Covers: forward GFLOPs of the published models, from their architectures; the chart's circles.
Not here: published accuracies and samples seen (the paper's Table 1a), drawing (charts.py).

The figure's horizontal axis is not stated; here it is the image tower's forward pass. A circle
stands for forward GFLOPs times training samples, as the paper's caption says; its area here, where
the paper says diameter, because the range is two hundred to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from evaclip_model.model.model_config import ModelConfig
from evaclip_model.training.cost import image_flops
from tasks.evaluate.paper.published import rows_of
from tasks.evaluate.report.charts import Bubble, bubble_chart
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.paper_form import beside_of

SET = "imagenet1k"


@dataclass(frozen=True)
class _Tower:
    """Image tower of a published model that is none of ours: a plain ViT."""

    px: int
    patch_px: int
    width: int
    layers: int
    mlp_width: int
    embed_dim: int


_OURS = {
    "EVA-01-CLIP-B/16": "EVA01-CLIP-B-16",
    "EVA-01-CLIP-g/14": "EVA01-CLIP-g-14",
    "EVA-01-CLIP-g/14+": "EVA01-CLIP-g-14-plus",
    "EVA-02-CLIP-B/16": "EVA02-CLIP-B-16",
    "EVA-02-CLIP-L/14": "EVA02-CLIP-L-14",
    "EVA-02-CLIP-L/14+": "EVA02-CLIP-L-14-336",
    "EVA-02-CLIP-E/14": "EVA02-CLIP-E-14",
    "EVA-02-CLIP-E/14+": "EVA02-CLIP-E-14-plus",
}
_B16 = _Tower(224, 16, 768, 12, 3072, 512)
_L14 = _Tower(224, 14, 1024, 24, 4096, 768)
_OTHERS = {
    "OpenAI CLIP-B/16": _B16,
    "OpenAI CLIP-L/14": _L14,
    "OpenAI CLIP-L/14+": _Tower(336, 14, 1024, 24, 4096, 768),
    "Open CLIP-B/16": _B16,
    "Open CLIP-L/14": _L14,
    "Open CLIP-H/14": _Tower(224, 14, 1280, 32, 5120, 1024),
    "Open CLIP-g/14": _Tower(224, 14, 1408, 40, 6144, 1024),
    "Open CLIP-G/14": _Tower(224, 14, 1664, 48, 8192, 1280),
}


def published_gflops() -> Mapping[str, float]:
    """Forward GFLOPs an image of every model of Table 1a, by its name there."""
    ours = {name: image_flops(ModelConfig.load(shipped)) for name, shipped in _OURS.items()}
    others = {name: image_flops(_config(tower)) for name, tower in _OTHERS.items()}
    return {name: flops / 1e9 for name, flops in (ours | others).items()}


def bubble(label: str, accuracy: float, gflops: float, samples: float | None, style: str) -> Bubble:
    """One model: `accuracy` is a share, `samples` the image-text pairs seen, None if unknown."""
    area = gflops * samples if samples is not None else None
    return Bubble(gflops, 100 * accuracy, area, label, style)


def _config(tower: _Tower) -> ModelConfig:
    """A plain ViT in the terms of ours: only what its products depend on is set."""
    plain = ModelConfig.load("EVA01-CLIP-B-16")
    vision = plain.vision.model_copy(
        update={
            "image_px": tower.px,
            "patch_px": tower.patch_px,
            "width": tower.width,
            "layers": tower.layers,
            "mlp_width": tower.mlp_width,
        }
    )
    return plain.model_copy(update={"vision": vision, "embed_dim": tower.embed_dim})


def compute_chart(found: Findings, images_seen: float) -> Markup | None:
    """The chart, when ImageNet-1K was evaluated.

    `images_seen` are the subject's image-text pairs where its training is known, else 0.
    """
    evaluated = [model for model in found.models if found.share(SET, model, "top1") is not None]
    if not evaluated:
        return None
    gflops = published_gflops()
    rows = {row.model: row.cells for row in rows_of("1a")}
    bubbles = [
        bubble(name, row["in1k_zs_top1"] / 100, gflops[name], row["samples_seen"], _family(name))
        for name, row in rows.items()
    ]
    for model in evaluated:
        share, cost = found.share(SET, model, "top1"), found.about(model).get("gflops")
        if share is not None and cost:
            beside = beside_of(found, model)
            seen = images_seen if model == found.subject and images_seen else None
            if seen is None and beside is not None and beside.is_released:
                seen = rows[beside.row]["samples_seen"]
            bubbles.append(bubble(model, share, float(cost), seen, "subject"))
    return bubble_chart(bubbles, x="forward GFLOPs an image", y="ImageNet-1K zero-shot top-1, %")


def _family(name: str) -> str:
    return "eva" if name.startswith("EVA") else "openai" if name.startswith("OpenAI") else "open"
