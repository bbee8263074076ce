"""Tiny evaluation sets and models, written the way published ones are."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from evaclip_model.create import create_model
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.weights.load import save_model

COLOURS = ("red", "green", "blue", "yellow")


def picture(colour: str, number: int) -> bytes:
    """A disc whose place depends on `number`, as WebP."""
    image = Image.new("RGB", (48, 40), "white")
    ImageDraw.Draw(image).ellipse((4 + number, 4, 30 + number, 30), fill=colour)
    out = io.BytesIO()
    image.save(out, "WEBP", lossless=True)
    return out.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_set(folder: Path, tars: Sequence[Sequence[tuple[str, bytes]]], **texts: str) -> Path:
    """Tars and `nshards.txt`, and text files named by keyword (`classnames`, `dataset_type`)."""
    for index, members in enumerate(tars):
        write_tar(folder / "test" / f"{index}.tar", members)
    (folder / "test" / "nshards.txt").write_text(f"{len(tars)}\n")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture
def classification(tmp_path: Path) -> Path:
    """Twelve discs of four colours in two tars."""
    members = [
        (f"s{number:07d}.{extension}", content)
        for number in range(12)
        for extension, content in (
            ("webp", picture(COLOURS[number % 4], number)),
            ("cls", str(number % 4).encode()),
        )
    ]
    return write_set(
        tmp_path / "colours",
        [members[:14], members[14:]],
        classnames="".join(f"{colour} disc\n" for colour in COLOURS),
        zeroshot_classification_templates="a photo of a {c}.\n{c}\n",
    )


@pytest.fixture
def retrieval(tmp_path: Path) -> Path:
    """Six discs; the even ones have two captions."""
    members: list[tuple[str, bytes]] = []
    for number in range(6):
        caption = f"a {COLOURS[number % 4]} disc, number {number}"
        more = "\nthe same\\nthing" if number % 2 == 0 else ""
        members.append((f"s{number:07d}.webp", picture(COLOURS[number % 4], number)))
        members.append((f"s{number:07d}.txt", (caption + more).encode()))
    return write_set(tmp_path / "discs", [members], dataset_type="retrieval\n")


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Folder of the demo architecture at 16 px, initialised with a seed."""
    made: dict[int, Path] = {}

    def save(seed: int) -> Path:
        if seed not in made:
            made[seed] = tmp_path_factory.mktemp("model") / str(seed)
            config = ModelConfig.load("EVA02-CLIP-demo").at_image_px(16)
            save_model(create_model(config, seed=seed), made[seed])
        return made[seed]

    return save


@pytest.fixture
def sets(classification: Path, retrieval: Path) -> Mapping[str, Path]:
    return {"colours": classification, "discs": retrieval}


@pytest.fixture
def write() -> Callable[..., Path]:
    """`write_set`, for sets a test makes itself."""
    return write_set


@pytest.fixture
def disc() -> Callable[[str, int], bytes]:
    """`picture`, for sets a test makes itself."""
    return picture
