"""Videos whose every frame says its number, for tests.

Covers: writing them with PyAV in any codec and container; reading the number off a frame.
Not here: anything of the project.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 8
WIDTH, HEIGHT = 128, 64
_BAR = WIDTH // BITS


def write_video(path: Path, frames: int, codec: str = "mpeg4", b_frames: int = 2) -> Path:
    """A video of `frames` frames; frame i shows the bits of i as black and white bars."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = 12
        if codec in ("mpeg4", "libx264"):
            stream.codec_context.max_b_frames = b_frames
        for number in range(frames):
            bars = [255 * (number >> bit & 1) for bit in range(BITS)]
            row = np.repeat(np.array(bars, np.uint8), _BAR)
            picture = np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def number_of(image: Image.Image) -> int:
    """The number that a frame shows."""
    row = np.asarray(image.convert("L"))[HEIGHT // 2]
    return sum(int(row[bit * _BAR + _BAR // 2] > 127) << bit for bit in range(BITS))
