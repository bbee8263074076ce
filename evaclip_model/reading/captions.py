"""Further captions of a shard's samples (recaptions, other languages), apart from its tar: the file
that holds them, and which caption a sample is shown with.

A file is gzipped JSON Lines, one sample a line: `["KEY", {"NAME": ["CAPTION", ...], ...}]`.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.reading.urls import open_binary

STORED = "stored"
"""Name of the caption that lies beside the image, among `caption_weights`."""
Captions = Mapping[str, Sequence[str]]
"""Name -> a sample's captions of that name."""
_STREAM = 2
"""Sets these draws apart from those of the order."""


def read_captions(location: str) -> dict[str, Captions]:
    """Key in the shard -> captions, of a file or URL that can be read (InputError if not)."""
    try:
        with open_binary(location) as raw, gzip.open(raw) as lines:
            return dict(map(json.loads, lines))
    except InputError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zlib.error) as error:
        raise InputError(
            f"{location} cannot be read as captions ({error}): make the dataset again"
        ) from None


def write_captions(path: Path, samples: Iterable[tuple[str, Captions]]) -> None:
    """Write a file, the same bytes for the same captions."""
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(path, gzip.compress(lines.encode(), compresslevel=3, mtime=0))


def choose_caption(
    stored: str, further: Captions, weights: Mapping[str, float], *, seed: int, position: int
) -> str:
    """The caption that a sample is shown with at a position of the training stream.

    `weights` are shares of the draws by name (or `STORED`), in any scale; of a name with several
    captions any is drawn. Names that the sample lacks are passed over; where it has none of them,
    the stored caption is shown. The draw depends on `seed` and `position` alone.
    """
    there = {
        name: weight for name, weight in weights.items() if name == STORED or further.get(name)
    }
    if not there:
        return stored
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, position, _STREAM))))
    bounds = np.cumsum(list(there.values()))
    place = int(np.searchsorted(bounds, draw.random() * bounds[-1], side="right"))
    name = list(there)[min(place, len(there) - 1)]
    captions = [stored] if name == STORED else further[name]
    return captions[int(draw.integers(len(captions)))]
