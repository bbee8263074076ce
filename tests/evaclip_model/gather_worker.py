"""One rank of the gathered loss: FEATURES SCALE OUT; a file a rank, `OUT/way-rank.safetensors`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from evaclip_model.training.loss import contrastive
from tests.evaclip_model.plain_loss import WAYS, pair_numbers, teachers_of, with_gradients


def main(features: str, scale: float, out: Path) -> None:
    contrastive.BLOCK_ROWS, contrastive.BLOCK_COLUMNS = 3, 5  # no size is a multiple of them
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = load_file(features)
    image, text = (
        whole[key].chunk(ranks)[rank].clone() for key in ("image_features_all", "text_features_all")
    )
    captions = pair_numbers(len(image) * ranks).chunk(ranks)[rank]
    for name, way in WAYS.items():
        teachers = teachers_of(len(image) * ranks, way.get("teachers", ()))
        own = [one.chunk(ranks)[rank] for one in teachers]
        found = with_gradients(contrastive.pair_terms, image, text, captions, scale, way, own)
        save_file(
            {key: value.contiguous() for key, value in found.items()},
            out / f"{name}-{rank}.safetensors",
        )
    dist.destroy_process_group()


main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
