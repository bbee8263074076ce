"""The one rule of names and labels: joined by what words say, not by position."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames
from tasks.evaluate.sets.class_order import ClassOrder, Words, order_classes, read_class_names
from tasks.evaluate.sets.prompts import imagenet_synsets, subset_classes
from tasks.evaluate.sets.published_layout import odd_names
from tasks.evaluate.sets.set_registry import find_set

PETS = ("Abyssinian", "Bengal", "american_bulldog", "basset_hound")
"""As text has them: capitals first."""


def ordered(words: tuple[str, ...], names: tuple[str, ...] = (), **options: object) -> ClassOrder:
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "names.txt"
        listed.write_text("\n".join(names))
        wanted = Words(classnames=str(listed) if names else "", **options)
        return order_classes(words, wanted, where="pets")


def named(found: ClassOrder) -> dict[str, str]:
    return {word: found.names[label] for word, label in found.labels.items()}


def test_a_list_in_another_order_is_joined_by_its_words() -> None:
    listed = ("Abyssinian", "American Bulldog", "Basset hound", "Bengal")
    found = ordered(PETS, listed)
    assert found.names == listed
    assert named(found) == dict(zip(sorted(PETS, key=str.casefold), listed, strict=True))


def test_a_list_of_more_classes_is_joined_by_its_words_and_empty_classes_are_said() -> None:
    found = ordered(("dog", "cat"), ("ant", "cat", "dog", "eel"))
    assert found.labels == {"dog": 2, "cat": 1}
    assert found.remarks == ("2 of 4 classes have no image here",)


def test_one_name_that_is_spelled_otherwise_takes_the_place_that_is_left() -> None:
    found = ordered(PETS, ("Bengal", "Abyssinian", "bulldog of America", "Basset hound"))
    assert named(found)["american_bulldog"] == "bulldog of America"
    assert "the one name that is left" in found.remarks[0]


def test_a_list_in_another_order_that_is_spelled_otherwise_is_refused() -> None:
    with pytest.raises(InputError, match="in another order than the classes of pets: 'Bengal' is"):
        ordered(PETS, ("Abyssinian", "bulldog of America", "hound of Basset", "Bengal"))
    with pytest.raises(InputError, match="in another order"):
        ordered(
            ("AnnualCrop", "PermanentForest", "RiverBed"),
            ("the forest, permanent", "a river", "annual land"),
        )


def test_names_that_cannot_be_compared_are_joined_by_position_and_this_is_said() -> None:
    found = ordered(("ad", "ae"), ("Andorra", "Emirates"))
    assert found.labels == {"ad": 0, "ae": 1}
    assert "by position (none could be compared): 'ad' is 'Andorra'" in found.remarks[0]


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_are_places_in_a_list_from_0_or_1(first: int) -> None:
    words = tuple(sorted(str(number) for number in range(first, first + 12)))
    names = tuple(f"flower {number}" for number in range(first, first + 12))
    assert named(ordered(words, names)) == {word: f"flower {word}" for word in words}
    padded = tuple(f"{int(word):05d}" for word in words)
    assert named(ordered(padded, names))[f"{first:05d}"] == f"flower {first}"
    text = ordered(words, names, order="text")
    assert [text.labels[word] for word in words] == list(range(12))


def test_numbers_that_could_count_from_either_are_asked_for() -> None:
    names = tuple(f"flower {number}" for number in range(12))
    with pytest.raises(InputError, match="say with --first 0 or --first 1 how they count"):
        ordered(("3", "4"), names)
    assert ordered(("3", "4"), names, first=1).labels == {"3": 2, "4": 3}
    with pytest.raises(InputError, match="they do not fit"):
        ordered(("1", "13"), names)
    with pytest.raises(InputError, match=r"names\.txt has 12 names, counted from 0"):
        ordered(("0", "12"), names)
    with pytest.raises(InputError, match="'cat' is not a number"):
        ordered(("1", "cat"), names, order="number")
    with pytest.raises(InputError, match="numbers, which are not names: give --classnames FILE"):
        ordered(("1", "2"))


def test_a_known_sets_own_list_gives_names_to_numbers_and_an_order_to_words() -> None:
    pytest.importorskip("clip_benchmark")
    words = tuple(sorted(str(number) for number in range(1, 103)))
    flowers = ordered(words, known=find_set("flowers102"))
    assert named(flowers)["1"] == "pink primrose" and named(flowers)["10"] == "globe thistle"
    listed = read_class_names("clip_benchmark", find_set("pets")).names
    folders = tuple(sorted(name.replace(" ", "_").swapcase() for name in listed))
    pets = ordered(folders, known=find_set("pets"))
    assert pets.names == listed
    assert all(name.replace(" ", "_").swapcase() == word for word, name in named(pets).items())
    assert ordered(tuple("0123456789"), known=find_set("mnist")).names == tuple("0123456789")


def test_imagenets_thousand_is_known_by_number_from_0_and_by_wordnet_id() -> None:
    known = find_set("imagenetv2")
    numbers = tuple(sorted(str(number) for number in range(1000)))
    assert named(ordered(numbers, known=known))["10"] == imagenet_classnames()[10]
    with pytest.raises(InputError, match="ILSVRC's ids"):
        ordered(tuple(str(number) for number in range(1, 1001)), known=known)
    synsets = tuple(reversed(imagenet_synsets()))
    assert ordered(synsets).names == imagenet_classnames()
    own = tuple(f"my {name} {place}" for place, name in enumerate(imagenet_classnames()))
    assert ordered(synsets, own).labels == {word: n for n, word in enumerate(imagenet_synsets())}


def test_a_subset_of_imagenet_has_its_names_in_imagenets_order() -> None:
    known = find_set("imagenet-a")
    classes = subset_classes(known)
    words = tuple(imagenet_synsets()[index] for index in classes)
    assert ordered(words, known=known).names == tuple(imagenet_classnames()[n] for n in classes)
    with pytest.raises(InputError, match="has 199 classes, but ImageNet-Adversarial has 200"):
        ordered(words[1:], known=known)


def test_numbers_and_ids_before_every_name_are_no_part_of_it() -> None:
    found = ordered(tuple(sorted(["1.cat", "2.Wild_dog", "10.eel"])))
    assert found.names == ("cat", "Wild dog", "eel")
    assert ordered(("n02085620-Chihuahua", "n02085782-Pug")).names == ("Chihuahua", "Pug")
    assert ordered(("2_doors", "cat")).names == ("2 doors", "cat")


@pytest.mark.parametrize(
    ("file", "content", "names", "words"),
    [
        ("a.txt", "cat\ndog, wild\n", ("cat", "dog, wild"), ()),
        ("b.txt", "c\tcat\nd\tdog\n", ("cat", "dog"), ("c", "d")),
        ("c.txt", "1 cat\n2 wild dog\n", ("cat", "wild dog"), ("1", "2")),
        ("d.txt", "n01440764 tench, Tinca\nn01443537 goldfish\n", ("tench, Tinca", "goldfish"),
         ("n01440764", "n01443537")),
        ("i.csv", '0,cat\n1,"dog, wild"\n', ("cat", "dog, wild"), ("0", "1")),
        ("e.txt", "3 cats\n7 dogs\n", ("3 cats", "7 dogs"), ()),
        ("f.json", json.dumps(["cat", "dog"]), ("cat", "dog"), ()),
        ("g.json", json.dumps({"1": "dog", "0": "cat"}), ("cat", "dog"), ()),
        ("h.json", json.dumps({"dog": 1, "cat": 0}), ("cat", "dog"), ()),
    ],
)  # fmt: skip
def test_files_of_names_have_several_forms(
    tmp_path: Path, file: str, content: str, names: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / file).write_text(content)
    found = read_class_names(str(tmp_path / file), None)
    assert (found.names, found.words) == (names, words)


def test_a_file_that_says_which_word_a_name_is_for_decides(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("dog\tcanis\ncat\tfelis\n")
    wanted = Words(classnames=str(tmp_path / "names.txt"))
    found = order_classes(("cat", "dog"), wanted, where="x")
    assert named(found) == {"cat": "felis", "dog": "canis"}
    with pytest.raises(InputError, match="has no name for the class 'eel' of x"):
        order_classes(("eel",), wanted, where="x")


@pytest.mark.parametrize(
    "text",
    ["{", "[" * 100_000, '{"0": "a", "2": "b"}', '{"a": "b"}', "[]", f'{{"{"1" * 5_000}": "a"}}'],
)
def test_another_json_file_than_of_names_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"expected \[.name., \.\.\.\]"):
        read_class_names(str(tmp_path / "x.json"), None)


def test_a_number_longer_than_python_reads_is_a_name() -> None:
    found = order_classes(("1" * 5_000, f"{'1' * 5_000} cat"), Words(), where="x")
    assert {*found.names} == {"1" * 5_000, f"{'1' * 5_000} cat"}


def test_what_is_odd_about_names_is_said() -> None:
    said = " | ".join(odd_names(("1", "cat", "Cat", "wild_dog", "a.jpg", "eel", "eel"), None))
    for words in (
        "1 names stand for several classes",
        "differ from another in case or punctuation alone: cat and Cat",
        "1 names are numbers",
        "1 names have an underscore",
        "1 names look like files",
    ):
        assert words in said


def test_names_of_a_known_set_in_another_order_are_noticed() -> None:
    pytest.importorskip("clip_benchmark")
    known = find_set("pets")
    names = read_class_names("clip_benchmark", known).names
    assert list(odd_names(names, known)) == []
    (said,) = odd_names(names[1:] + names[:1], known)
    assert "in another order (37 stand elsewhere" in said
    (said,) = odd_names((*names[:-1], "unknown cat"), known)
    assert "1 names are not in clip_benchmark's list of 'pets': unknown cat" in said


def test_a_list_of_which_some_lines_have_two_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\tcat\nb\n")
    with pytest.raises(
        InputError, match=r"names\.txt line 2 is not WORD<tab>NAME: all lines must be"
    ):
        read_class_names(str(tmp_path / "names.txt"), None)
