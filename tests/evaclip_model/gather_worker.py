"""One rank of the gathered loss, as a process of its own: RANK RENDEZVOUS FEATURES OUT."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from evaclip_model.training.loss import gathered_terms

RANKS = 2


def main(rank: int, rendezvous: str, features: str, scale: float, out: str) -> None:
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=RANKS)
    whole = load_file(features)
    image, text = (
        whole[key].chunk(RANKS)[rank].clone().requires_grad_()
        for key in ("image_features_all", "text_features_all")
    )
    logit_scale = torch.tensor(scale, requires_grad=True)
    terms = gathered_terms(image, text, logit_scale)
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
        out,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5])
