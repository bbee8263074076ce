"""The committed pictures and names: complete, small, licensed."""

import io

import pytest
from PIL import Image

from tasks.demo.demo import ARTISTS, DATA, artist_zip, read_concepts, read_drawings

CONCEPTS = read_concepts()


def test_there_are_about_1500_concepts_with_names_and_captions_of_their_own():
    assert 1_500 <= len(CONCEPTS) <= 1_650
    assert len({concept.name for concept in CONCEPTS}) == len(CONCEPTS)
    assert len({concept.key for concept in CONCEPTS}) == len(CONCEPTS)
    assert all("\n" not in concept.name and concept.name.strip() for concept in CONCEPTS)
    differing = sum(c.noto.lower() != c.fluent.lower() for c in CONCEPTS)
    assert differing > 0.7 * len(CONCEPTS)


def test_no_concept_is_a_flag_or_a_skin_tone_variant():
    points = {point for concept in CONCEPTS for point in concept.key.split("-")}
    assert points.isdisjoint({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
    assert not any("1f1e6" <= point <= "1f1ff" for point in points)


@pytest.mark.parametrize("artist", ARTISTS)
def test_every_artist_drew_every_concept_in_64_pixels_on_white(artist):
    drawings = read_drawings(artist)
    assert set(drawings) == {concept.key for concept in CONCEPTS}
    for key in list(drawings)[::40]:
        with Image.open(io.BytesIO(drawings[key])) as image:
            assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (64, 64))


def test_the_three_artists_drew_the_same_concepts_differently():
    noto, fluent, twemoji = (read_drawings(artist) for artist in ARTISTS)
    assert all(len({noto[key], fluent[key], twemoji[key]}) == 3 for key in noto)


def test_the_pictures_take_at_most_6_megabytes_with_their_names():
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 6_000_000


def test_every_file_and_every_licence_is_named():
    text = (DATA / "LICENSES.md").read_text()
    for name in [*(artist_zip(artist).name for artist in ARTISTS), "concepts.json"]:
        assert f"`{name}`" in text
    for licence in ("Apache License 2.0", "CC-BY 4.0", "| MIT |", "Unicode License v3"):
        assert licence in text
    assert "Twitter, Inc and other contributors" in text
