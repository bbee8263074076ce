"""One rank: the self-test of a tiny model; rank 0 writes the result, or why it failed.

"broken" makes the loss lose the gradients of this rank's features on other ranks."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from evaclip_model.create import create_model
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.loss import contrastive
from evaclip_model.training.monitoring import self_test

MODEL = {
    "embed_dim": 8,
    "vision": {"image_px": 8, "patch_px": 4, "width": 16, "layers": 1, "heads": 2, "mlp_width": 16}
    | {"mlp": "gelu", "fused_qkv": True, "sub_norm": False, "norm_placement": "pre"},
    "text": {"context_length": 8, "vocab_size": 50, "width": 16, "layers": 1, "heads": 2},
}


def main(out, precision, behaviour):
    dist.init_process_group("gloo")
    if behaviour == "broken":
        contrastive._Gather.apply = contrastive._gather_tensor
    config = TrainConfig(name="x", image_px=8, samples_seen=48, global_batch=48)
    try:
        found = asdict(self_test.self_test(create_model(MODEL, precision=precision), config))
    except self_test.SelfTestFailed as error:
        found = {"failed": str(error)}
    out.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(found))


main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
