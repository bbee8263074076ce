"""One rank of the gathered loss: FEATURES SCALE OUT; a file a rank, `OUT/way-rank.safetensors`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from evaclip_model.training.config import LossSettings
from evaclip_model.training.loss import contrastive
from evaclip_model.training.loss.contrastive import gathered_terms

WAYS = {
    "full": LossSettings("full"),
    "streamed": LossSettings("streamed"),
    "full, smoothed": LossSettings("full", 0.1),
    "streamed, smoothed": LossSettings("streamed", 0.1),
}


def main(features: str, scale: float, out: Path) -> None:
    contrastive.CHUNK_ROWS, contrastive.CHUNK_COLUMNS = 3, 5  # no size is a multiple of them
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = load_file(features)
    for way, settings in WAYS.items():
        image, text = (
            whole[key].chunk(ranks)[rank].clone().requires_grad_()
            for key in ("image_features_all", "text_features_all")
        )
        logit_scale = torch.tensor(scale, requires_grad=True)
        terms = gathered_terms(image, text, logit_scale, settings=settings)
        terms.loss.backward()
        save_file(
            {
                "loss": terms.loss.detach(),
                "i2t": terms.image_to_text_accuracy,
                "t2i": terms.text_to_image_accuracy,
                "d_image": image.grad,
                "d_text": text.grad,
                "d_scale": logit_scale.grad,
            },
            out / f"{way}-{rank}.safetensors",
        )
    dist.destroy_process_group()


main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
