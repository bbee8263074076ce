"""The script that built the committed data: its pure parts, on tiny pictures."""

import io
import tarfile

import numpy as np
from PIL import Image

from tasks.demo.demo import read_concepts, read_drawings
from tests.tasks.demo.build_images import (
    as_webp,
    fluent_drawing,
    on_white,
    phash,
    read_members,
    said_in,
    write_zip,
)


def png(colour, size=(64, 64)):
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_transparent_art_lies_on_white():
    assert on_white(png((0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert on_white(png((255, 0, 0, 255))).getpixel((0, 0)) == (255, 0, 0)
    assert on_white(png((0, 0, 0, 0), size=(72, 72))).size == (64, 64)


def test_the_same_drawing_gives_the_same_bytes(tmp_path):
    members = {f"{name}.webp": as_webp(on_white(png((0, 9, 0, 99)))) for name in "ba"}
    write_zip(tmp_path / "one.zip", members)
    write_zip(tmp_path / "two.zip", dict(reversed(members.items())))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_the_perceptual_hash_survives_recompression_and_tells_drawings_apart():
    drawings = read_drawings("fluent")
    first, other = (
        Image.open(io.BytesIO(drawings[key])).convert("RGB") for key in ("1f34e", "1f697")
    )
    smaller = first.resize((48, 48))

    def distance(one, two):
        return (int(phash(one), 16) ^ int(phash(two), 16)).bit_count()

    assert distance(first, smaller) <= 4
    assert distance(first, other) > 12
    assert phash(Image.fromarray(np.zeros((64, 64, 3), np.uint8))) == "0" * 16


def test_committed_hashes_belong_to_the_committed_drawings():
    drawings = read_drawings("fluent")
    for concept in read_concepts()[::100]:
        image = Image.open(io.BytesIO(drawings[concept.key])).convert("RGB")
        distance = int(phash(image), 16) ^ int(concept.fluent_phash, 16)
        assert distance.bit_count() <= 6


def test_a_keyword_that_a_name_already_says_is_recognised():
    assert said_in("curly hair", ["man: Curly Hair"])
    assert said_in("woman’s", ["womans clothes"])
    assert not said_in("apple", ["pineapple"])


def test_fluent_files_are_found_by_name_in_their_default_skin_tone():
    drawings = {"piata.svg": b"a", "pinata.svg": b"b", "artist-default.svg": b"c"}
    assert fluent_drawing("Piñata", drawings) == b"b"
    assert fluent_drawing("Artist", drawings) == b"c"
    assert fluent_drawing("Harp", drawings) is None


def test_a_package_is_not_mistaken_for_one_with_a_longer_name(tmp_path):
    for package, content in (("emoji-1.0.0", b"short"), ("emoji-js-1.0.0", b"long")):
        with tarfile.open(tmp_path / f"{package}.tgz", "w:gz") as tar:
            member = tarfile.TarInfo("package/emoji.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert read_members(tmp_path, "emoji", r"\.json$") == {"emoji.json": b"short"}
