"""One rank of the gathered loss: FEATURES SCALE OUT; a file a rank, `OUT/way-rank.safetensors`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from evaclip_model.reading.order import share_of_batch
from evaclip_model.training.loss import contrastive
from tests.evaclip_model.plain_loss import WAYS, pair_numbers, teachers_of, with_gradients


def main(features: str, scale: float, out: Path) -> None:
    contrastive.BLOCK_ROWS, contrastive.BLOCK_COLUMNS = 3, 5  # no size is a multiple of them
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = load_file(features)
    samples = len(whole["image_features_all"])
    mine = share_of_batch(samples, rank, ranks)
    cut = slice(mine.start, mine.stop)
    image, text = (whole[f"{side}_features_all"][cut].clone() for side in ("image", "text"))
    captions = pair_numbers(samples)[cut]
    terms = partial(contrastive.pair_terms, is_uneven=samples % ranks > 0)
    for name, way in WAYS.items():
        own = [one[cut] for one in teachers_of(samples, way.get("teachers", ()))]
        found = with_gradients(terms, image, text, captions, scale, way, own)
        save_file(
            {key: value.contiguous() for key, value in found.items()},
            out / f"{name}-{rank}.safetensors",
        )
    dist.destroy_process_group()


main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
