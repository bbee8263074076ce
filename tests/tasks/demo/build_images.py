"""The script that built the demo's committed data from the original packages; it ran once.

Covers: one zip of 64 px WebP drawings per artist and `concepts.json` (names, captions, hashes).
Not here: metadata, URLs and evaluation sets, which are made of these files (tasks/demo/demo.py).

The originals, fetched with `npm pack NAME` into one folder (versions as used):
emoji-datasource-google@16.0.0, emoji-datasource-twitter@16.0.0, fluentui-emoji@1.3.0,
fluentui-emoji-js@1.2.1 (which drawing is which code point), cldr-annotations-full@48.2.0 and
cldr-annotations-derived-full@48.2.0. Fluent's drawings are SVG and need `pip install resvg-py`,
which nothing else in the project uses. Then: `python -m tests.tasks.demo.build_images FOLDER`.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tasks.demo.demo import ARTISTS, CONCEPTS_FILE, DATA, Artist, Concept, artist_zip

IMAGE_PX = 64
WEBP_QUALITY = 85
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""Every member's time stamp, so that the same drawings give the same bytes."""
KEYWORDS: Mapping[Artist, int] = {"noto": 3, "fluent": 2, "twemoji": 3}
"""How many keywords a source's captions carry after the name."""
LEFT_OUT = ("Flags", "Component")
"""Categories without a drawing of their own thing: flags, bare skin-tone swatches."""


@dataclass(frozen=True)
class Packages:
    """The unpacked originals that name and draw the concepts."""

    emoji: tuple[Mapping[str, Any], ...]
    annotations: Mapping[str, Mapping[str, list[str]]]
    """Emoji without variation selectors -> CLDR's `tts` (name) and `default` (keywords)."""
    fluent_names: Mapping[str, str]
    """Emoji without variation selectors -> Fluent's own name of its drawing."""
    drawings: Mapping[Artist, Mapping[str, bytes]]
    """Artist -> file name -> PNG, or SVG for Fluent."""


def main(folder: Path) -> None:
    """Write the three zips and `concepts.json` into the data folder of tasks/demo."""
    packages = read_packages(folder)
    concepts: list[Concept] = []
    images: dict[Artist, dict[str, bytes]] = {artist: {} for artist in ARTISTS}
    for emoji in sorted(packages.emoji, key=lambda entry: int(entry["sort_order"])):
        found = draw(emoji, packages)
        if found is None:
            continue
        concept, drawings = found
        concepts.append(concept)
        for artist, image in drawings.items():
            images[artist][f"{concept.key}.webp"] = image
    DATA.mkdir(exist_ok=True)
    for artist, members in images.items():
        write_zip(artist_zip(artist), members)
    lines = ",\n".join(json.dumps(c.model_dump(), ensure_ascii=False) for c in concepts)
    CONCEPTS_FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    sys.stdout.write(f"{len(concepts)} concepts in {DATA}\n")


def draw(
    emoji: Mapping[str, Any], packages: Packages
) -> tuple[Concept, dict[Artist, bytes]] | None:
    """One concept with its drawings, or None when an artist lacks it or it is left out."""
    glyph = bare("".join(chr(int(point, 16)) for point in emoji["unified"].split("-")))
    annotation = packages.annotations.get(glyph)
    fluent_name = packages.fluent_names.get(glyph)
    if emoji["category"] in LEFT_OUT or annotation is None or fluent_name is None:
        return None
    found = {
        "noto": packages.drawings["noto"].get(emoji["image"]),
        "fluent": fluent_drawing(fluent_name, packages.drawings["fluent"]),
        "twemoji": packages.drawings["twemoji"].get(emoji["image"]),
    }
    if any(data is None for data in found.values()):
        return None
    images = {artist: as_webp(on_white(found[artist] or b"")) for artist in ARTISTS}
    name = annotation["tts"][0]
    noto_name = str(emoji["name"] or name).lower()
    names = [noto_name] if said_in(name, [noto_name]) else [noto_name, name]
    keywords = annotation.get("default", [])
    noto_words = [word for word in keywords if not said_in(word, names)]
    fluent_words = [word for word in keywords if not said_in(word, [fluent_name])]
    words = [word for word in keywords if not said_in(word, [name])]
    concept = Concept(
        key=emoji["unified"].lower(),
        name=name,
        noto=", ".join(names + noto_words[: KEYWORDS["noto"]]),
        fluent=", ".join([fluent_name, *fluent_words[-KEYWORDS["fluent"] :]]),
        twemoji=(name, ", ".join([name, *words[::2][: KEYWORDS["twemoji"]]])),
        fluent_phash=phash(Image.open(io.BytesIO(images["fluent"]))),
    )
    return concept, images


def read_packages(folder: Path) -> Packages:
    """Read what is needed straight out of the `npm pack` archives in `folder`."""
    noto = read_members(folder, "emoji-datasource-google", r"/img/google/64/.*\.png$|/emoji\.json$")
    emoji = tuple(json.loads(noto.pop("emoji.json")))
    annotations: dict[str, Mapping[str, list[str]]] = {}
    for package, key in (
        ("cldr-annotations-derived-full", "annotationsDerived"),
        ("cldr-annotations-full", "annotations"),
    ):
        members = read_members(folder, package, r"/en/annotations\.json$")
        found = json.loads(members["annotations.json"])[key]["annotations"]
        annotations |= {bare(glyph): entry for glyph, entry in found.items() if "tts" in entry}
    listed = json.loads(
        read_members(folder, "fluentui-emoji-js", r"/emojiData\.json$")["emojiData.json"]
    )
    names = {
        bare(entry["glyph"]): entry["folder"].split("/")[1]
        for entry in listed
        if len(entry["folder"].split("/")) == 2 or entry["folder"].endswith("/Default")
    }
    return Packages(
        emoji=emoji,
        annotations=annotations,
        fluent_names=names,
        drawings={
            "noto": noto,
            "fluent": read_members(folder, "fluentui-emoji", r"/icons/flat/.*\.svg$"),
            "twemoji": read_members(
                folder, "emoji-datasource-twitter", r"/img/twitter/64/.*\.png$"
            ),
        },
    )


def read_members(folder: Path, package: str, wanted: str) -> dict[str, bytes]:
    """File name -> bytes of the members of `package-VERSION.tgz` whose path matches `wanted`."""
    (archive,) = (
        path for path in folder.glob(f"{package}-*.tgz") if path.name[len(package) + 1].isdigit()
    )
    members: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if re.search(wanted, member.name):
                file = tar.extractfile(member)
                assert file is not None
                members[Path(member.name).name] = file.read()
    return members


def fluent_drawing(name: str, drawings: Mapping[str, bytes]) -> bytes | None:
    """Fluent's flat SVG of that name; people come in skin tones, of which `default` is taken."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    stem = re.sub(r"[^a-z0-9]+", "-", straight(plain)).strip("-")
    return drawings.get(f"{stem}.svg") or drawings.get(f"{stem}-default.svg")


def on_white(data: bytes) -> Image.Image:
    """Decode PNG or SVG to RGB of 64 x 64 pixels, transparent parts white."""
    if data.lstrip().startswith(b"<svg"):
        import resvg_py  # type: ignore[import-not-found]

        text = data.decode()
        data = bytes(resvg_py.svg_to_bytes(svg_string=text, width=IMAGE_PX, height=IMAGE_PX))
    art = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", art.size, "white")
    image = Image.alpha_composite(white, art).convert("RGB")
    if image.size != (IMAGE_PX, IMAGE_PX):
        image = image.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)
    return image


def as_webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


def phash(image: Image.Image) -> str:
    """64-bit perceptual hash, 16 hex digits: signs of the low 8 x 8 cosine terms at 32 x 32."""
    pixels = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BICUBIC), np.float64)
    step = np.arange(32)
    cosines = np.cos(np.pi / 32 * (step[None, :] + 0.5) * step[:8, None])  # [8, 32]
    terms = (cosines @ pixels @ cosines.T).ravel()  # [64]
    bits = terms > np.median(terms[1:])
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"


def write_zip(path: Path, members: Mapping[str, bytes]) -> None:
    """Write members uncompressed (WebP is), in name order, with one fixed time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, ZIP_TIME), members[name])


def bare(glyph: str) -> str:
    """The emoji without variation selectors, on whose presence the packages disagree."""
    return glyph.replace("\ufe0f", "")


def said_in(word: str, names: Iterable[str]) -> bool:
    """Whether every word of `word` occurs in `names`, whatever the case, order or apostrophe."""
    said = {part for name in names for part in re.findall(r"\w+", straight(name))}
    return said.issuperset(re.findall(r"\w+", straight(word)))


def straight(text: str) -> str:
    return re.sub("['’]", "", text.lower())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
