from __future__ import annotations

import pytest

from evaclip_model.model_config import ModelConfig
from evaclip_model.training.cost import (
    image_flops,
    parameter_counts,
    peak_flops,
    text_flops,
    train_flops_per_sample,
)

# GFLOPs: image, image with half its patches, text of 77 and of 20 tokens, training whole, masked,
# masked with packed text. Counted by hand from the published architectures.
GFLOPS = {
    "EVA02-CLIP-B-16": (35.1, 17.4, 6.0, 1.5, 123, 70, 57),
    "EVA02-CLIP-L-14": (162, 79.8, 13.3, 3.4, 526, 279, 250),
    "EVA02-CLIP-L-14-336": (382, 183, 13.3, 3.4, 1185, 590, 561),
    "EVA01-CLIP-g-14": (534, 265, 13.3, 3.4, 1642, 834, 804),
    "EVA01-CLIP-g-14-plus": (534, 265, 47.1, 12.1, 1743, 935, 830),
    "EVA02-CLIP-E-14": (2264, 1129, 47.1, 12.1, 6934, 3529, 3424),
    "EVA02-CLIP-E-14-plus": (2264, 1129, 97.9, 25.2, 7087, 3681, 3463),
}
# Counted from the authors' code: image tower with its head, text tower.
PARAMETERS = {
    "EVA01-CLIP-B-16": (86_201_600, 63_428_096),
    "EVA01-CLIP-g-14": (1_012_588_928, 123_846_912),
    "EVA01-CLIP-g-14-plus": (1_012_588_928, 354_032_640),
    "EVA02-CLIP-B-16": (86_263_040, 63_428_096),
    "EVA02-CLIP-L-14": (304_105_152, 123_650_304),
    "EVA02-CLIP-L-14-336": (304_432_832, 123_650_304),
    "EVA02-CLIP-E-14": (4_350_556_928, 354_032_640),
    "EVA02-CLIP-E-14-plus": (4_350_556_928, 694_332_160),
}


@pytest.mark.parametrize("name", GFLOPS)
def test_flops_are_those_of_the_published_architectures_within_two_percent(name: str) -> None:
    config = ModelConfig.load(name)
    ours = [
        image_flops(config),
        image_flops(config, 0.5),
        text_flops(config, 77),
        text_flops(config, 20),
        train_flops_per_sample(config, patch_dropout=0, text_tokens=77),
        train_flops_per_sample(config, patch_dropout=0.5, text_tokens=77),
        train_flops_per_sample(config, patch_dropout=0.5, text_tokens=20),
    ]
    assert [flops / 1e9 for flops in ours] == pytest.approx(GFLOPS[name], rel=0.02)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_counted_exactly(name: str) -> None:
    vision, text = PARAMETERS[name]
    assert parameter_counts(ModelConfig.load(name)) == {"vision": vision, "text": text, "other": 1}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("A10", 125e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("Tesla V100-SXM2-32GB", None),
        ("cpu", None),
    ],
)
def test_a_gpu_is_known_by_the_words_of_its_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
