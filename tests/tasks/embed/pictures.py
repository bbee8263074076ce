"""Verified shards of noise with captions, and a model small enough to look at them in no time."""

import io
import json
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from evaclip_model.model.model_config import ModelConfig
from tasks.artifacts.artifact import Address, Artifact, produce_artifact
from tasks.progress import report_nothing
from tasks.verify.config import STAGE as VERIFY, VerifyConfig
from tasks.verify.verify import verify_shards

TINY = ModelConfig.load("EVA02-CLIP-demo").at_image_px(16)
CAPTIONS = ("a red apple", "two dogs", "a house by the sea", "rain", "a green pear on a table")


def write_pictures(folder: Path, shards: int, samples: int) -> None:
    """Shards whose uid is their number with the sample's; that of "12" has no image."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number in range(shards):
        with webdataset.TarWriter(str(folder / f"{number:06d}.tar")) as tar:
            for place in range(samples):
                encoded = io.BytesIO()
                pixels = noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(encoded, "PNG")
                uid = f"{number}{place}"
                image = b"no image" if uid == "12" else encoded.getvalue()
                record = json.dumps({"uid": uid, "source": "s"})
                caption = CAPTIONS[place % len(CAPTIONS)]
                tar.write({"__key__": uid, "png": image, "txt": caption, "json": record})


def verify_pictures(root: Path, shards: int, samples: int) -> Artifact:
    write_pictures(root / "download" / "d" / "shards", shards, samples)
    config = VerifyConfig(max_bad_share=0.5, min_image_px=1)
    address = Address.of(root, VERIFY, config, {"download": "d"})
    return produce_artifact(
        address, lambda out: verify_shards(config, root / "download" / "d", out, 1, report_nothing)
    )
