"""Pictures that a page can hold without asking for another file.

Covers: thumbnails as data URIs.
Not here: which pictures are shown (examples.py).
"""

from __future__ import annotations

import base64
import io

from PIL import Image

THUMBNAIL_PX = 72
QUALITY = 72


def thumbnail(content: bytes, px: int = THUMBNAIL_PX) -> str:
    """An encoded image as a small WebP data URI, transparent parts on white."""
    with Image.open(io.BytesIO(content)) as image:
        rgba = image.convert("RGBA")
    rgba.thumbnail((px, px), Image.Resampling.BICUBIC)
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    out = io.BytesIO()
    flat.save(out, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
