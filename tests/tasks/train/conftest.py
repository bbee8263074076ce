"""Data and a model that are small enough to train in seconds."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from evaclip_model.create import create_model
from evaclip_model.reading.samples import Shard, ShardManifest
from evaclip_model.weights.load import save_model

SAMPLES = 24
VISION = {"image_px": 8, "patch_px": 4, "width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 2}
KIND = {"mlp": "swiglu", "fused_qkv": False, "sub_norm": True, "norm_placement": "pre"}
ROPE = {"rope_reference_grid": 2, "layer_scale_init": None}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """One shard of 24 samples, and a tiny model to start from."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(SAMPLES):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(image, "png")
            record = {"uid": str(number), "source": "a"}
            members = {"png": image.getvalue(), "txt": b"thing %d" % number}
            for extension, content in {**members, "json": json.dumps(record).encode()}.items():
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    size = (folder / "0.tar").stat().st_size
    shard = Shard(path="0.tar", source="a", samples=SAMPLES, bytes=size, sha256="0" * 64)
    ShardManifest(shards=(shard,)).write(folder / "shards.json")
    architecture = {"embed_dim": 8, "vision": {**VISION, **KIND, **ROPE}, "text": TEXT}
    save_model(create_model(architecture, seed=0), folder / "start")
    return folder
