"""The demo artifact: layout, evaluation sets, the same bytes every time."""

import io
import tarfile

import pytest
from PIL import Image

from evaclip_model.errors import InputError
from tasks.artifacts.artifact import Address, produce_artifact, sha256_of
from tasks.demo.config import STAGE, DemoConfig
from tasks.demo.demo import (
    ARTISTS,
    CONCEPTS_FILE,
    artist_zip,
    make_demo,
    read_concepts,
    read_drawings,
)

CONCEPTS = read_concepts()


def make(root, port=8923):
    config = DemoConfig(port=port)
    return produce_artifact(Address.of(root, STAGE, config), lambda out: make_demo(config, out))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("runs"))


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_the_artifact_holds_metadata_and_evaluation_sets(world):
    assert set(world.files) == {
        "metadata/laion2b/part-00000.snappy.parquet",
        "metadata/laion2b/part-00001.snappy.parquet",
        "metadata/coyo700m/part-00000.snappy.parquet",
        "eval/emoji-twemoji/classnames.txt",
        "eval/emoji-twemoji/zeroshot_classification_templates.txt",
        "eval/emoji-twemoji/test/nshards.txt",
        "eval/emoji-twemoji/test/0.tar",
        "eval/emoji-twemoji-retrieval/dataset_type.txt",
        "eval/emoji-twemoji-retrieval/test/nshards.txt",
        "eval/emoji-twemoji-retrieval/test/0.tar",
    }
    assert world.counts["concepts"] == len(CONCEPTS)
    assert world.counts["laion2b.rows"] > len(CONCEPTS)
    assert world.counts["coyo700m.rows"] > len(CONCEPTS)


def test_two_makings_give_the_same_bytes(world, tmp_path):
    again = make(tmp_path)
    assert again.digest == world.digest
    assert again.files == world.files


def test_another_port_is_another_artifact_with_the_same_evaluation_sets(world, tmp_path):
    other = make(tmp_path, port=9001)
    assert other.digest != world.digest
    changed = {name for name in world.files if other.files[name] != world.files[name]}
    assert changed == {name for name in world.files if name.startswith("metadata/")}


def test_classification_set_labels_each_held_out_drawing_with_its_concept(world):
    folder = world.folder / "eval/emoji-twemoji"
    names = (folder / "classnames.txt").read_text().splitlines()
    assert names == [concept.name for concept in CONCEPTS]
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert templates
    assert all(template.count("{c}") == 1 for template in templates)
    assert (folder / "test/nshards.txt").read_text().strip() == "1"
    files = members(folder / "test/0.tar")
    assert len(files) == 2 * len(CONCEPTS)
    drawings = read_drawings("twemoji")
    for number in range(0, len(CONCEPTS), 50):
        label = int(files[f"s{number:07d}.cls"])
        assert label == number
        assert files[f"s{number:07d}.webp"] == drawings[CONCEPTS[label].key]
    assert Image.open(io.BytesIO(files["s0000000.webp"])).size == (64, 64)


def test_retrieval_set_has_captions_one_a_line(world):
    folder = world.folder / "eval/emoji-twemoji-retrieval"
    assert (folder / "dataset_type.txt").read_text().strip() == "retrieval"
    files = members(folder / "test/0.tar")
    for number, concept in enumerate(CONCEPTS):
        lines = files[f"s{number:07d}.txt"].decode().splitlines()
        assert tuple(lines) == concept.twemoji
        assert lines[0] == concept.name


def test_a_port_that_needs_root_is_refused_in_one_sentence():
    with pytest.raises(InputError, match=r"demo: 'port' .*1024.*got 80"):
        DemoConfig.from_mapping({"port": 80}, where="demo")


def test_the_stage_version_rises_with_the_committed_data():
    digests = [sha256_of(path)[:8] for path in (CONCEPTS_FILE, *map(artist_zip, ARTISTS))]
    assert (STAGE.version, digests) == (1, ["7c8aca6b", "5fdeaf9e", "933f64fc", "4fe1a280"]), (
        "new pictures or captions: raise tasks.demo.config.STAGE.version, then note their digests"
    )
