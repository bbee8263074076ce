"""The time that models take for one image, side by side on this machine."""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from evaclip_model import open_model

ROUNDS = 9


def latencies_ms(models: Mapping[str, Path]) -> dict[str, float]:
    """Name -> median time of one image on the CPU, in milliseconds, of saved models by folder."""
    opened = {name: open_model(folder).eval() for name, folder in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in opened}
    with torch.inference_mode():
        for _ in range(ROUNDS + 1):
            for name, model in opened.items():
                side = model.config.vision.image_px
                image = torch.zeros(1, 3, side, side)
                started = time.perf_counter()
                model.encode_image(image)
                taken[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(times[1:]) for name, times in taken.items()}
