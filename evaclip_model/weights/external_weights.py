"""Weights that stay where they are: a small file in their place says where, how many, and which."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pydantic import Field

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.weights.checkpoint_files import WEIGHTS_FILE

REFERENCE_FILE = f"{WEIGHTS_FILE}.json"
"""Stands in a saved model's folder where the weights would."""
Download = Callable[[str, Path], Path]
"""From a URI and a folder to the file that was put there."""


class Reference(Config):
    """Place of a model's weights."""

    uri: str
    """`file:///…`, or a URI of an object store."""
    size: int = Field(gt=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def read(cls, folder: Path) -> Reference | None:
        """The reference in a model's folder, if any; raises InputError if it cannot be read."""
        path = folder / REFERENCE_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not a reference to weights ({error})") from None
        return cls.from_mapping(values, where=str(path))

    @property
    def path(self) -> Path | None:
        """The file, if it is one of this machine's or of a disk that it shares."""
        parts = urlsplit(self.uri)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

    def obtain_weights(self, folder: Path, download: Download) -> Path:
        """The weights: in their place if that can be reached, else put into `folder`; raises
        InputError."""
        try:
            file = self.path or download(self.uri, folder)
            is_same_size = file.stat().st_size == self.size
        except Exception as error:  # every store has errors of its own
            raise InputError(
                f"the weights at {self.uri} cannot be read ({type(error).__name__}: "
                f"{str(error)[:160]}): make that place reachable from here"
            ) from error
        if is_same_size:
            with file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() == self.sha256:
                    return file
        raise InputError(
            f"the weights at {self.uri} are not those that were registered (size or sha256 "
            "differs): put the originals back, or register the model again"
        )


@contextmanager
def at_hand(folder: Path, download: Download) -> Iterator[Path]:
    """A saved model's folder with its weights in it, whether they are there or referred to; what
    had to be fetched is deleted at the end. Raises as `Reference.obtain_weights`."""
    reference = Reference.read(folder)
    if reference is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="evaclip-weights-") as temporary:
        whole = Path(temporary) / "model"
        whole.mkdir()
        for file in folder.iterdir():
            if file.name != REFERENCE_FILE:
                (whole / file.name).symlink_to(file.absolute())
        weights = reference.obtain_weights(Path(temporary), download)
        (whole / WEIGHTS_FILE).symlink_to(weights.absolute())
        yield whole
