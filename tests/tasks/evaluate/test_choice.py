"""Choice sets: their published files converted, and their figures beside counts by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from evaclip_model.errors import InputError
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.evaluate import evaluate_models
from tasks.evaluate.metrics.compute import chance_levels, compute_figures
from tasks.evaluate.metrics.metric import chance_of_jaccard, choose_rightly, jaccard_index
from tasks.evaluate.metrics.scored import score_set
from tasks.evaluate.sets.choice_questions import QUESTIONS, Question
from tasks.evaluate.sets.convert.convert import convert_choice
from tasks.evaluate.sets.published_layout import check_set, kind_of, open_set
from tasks.progress import report_nothing

PAIRS = ((0, 0), (1, 1))


@pytest.fixture
def images(tmp_path: Path, disc: Callable[[str, int], bytes]) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(("bear", "fish", "ex_0_img_0", "ex_0_img_1", "0001")):
        (folder / f"{name}.webp").write_bytes(disc(("red", "green", "blue")[number % 3], number))
    return folder


def sugarcrepe(folder: Path) -> Path:
    row = {"filename": "0001.webp", "caption": "a red disc", "negative_caption": "a blue disc"}
    path = folder / "swap_obj.json"
    path.write_text(json.dumps({"0": row, "1": {**row, "filename": "bear.webp"}}))
    return path


def winoground(folder: Path) -> Path:
    row = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "tag": "Noun"}
    path = folder / "examples.jsonl"
    path.write_text(json.dumps({**row, "caption_0": "a on b", "caption_1": "b on a"}) + "\n")
    return path


def winogavil(folder: Path) -> Path:
    path = folder / "test.csv"
    path.write_text(
        "cue,candidates,associations\nOcean,\"['bear', 'fish', '0001']\",\"['fish']\"\n"
    )
    return path


FORMS = {
    "texts": (sugarcrepe, {"accuracy": 1 / 2}),
    "two by two": (winoground, {"group_score": 1 / 6, "text_score": 1 / 4, "image_score": 1 / 4}),
    "images": (winogavil, {"jaccard": 1 / 3}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_published_list_becomes_a_set_with_its_figures_and_chance(
    tmp_path: Path, images: Path, form: str
):
    write, chance = FORMS[form]
    made = convert_choice(write(tmp_path), images, tmp_path / "set")
    evalset = open_set("mine", made.folder, kind_of(made.folder))
    assert (evalset.kind, evalset.questions[0].form) == ("choice", form)
    assert chance_levels(evalset) == pytest.approx(chance)
    draw = torch.Generator().manual_seed(0)
    unit = [
        torch.nn.functional.normalize(torch.randn(count, 8, generator=draw), dim=1)
        for count in (len(evalset), len(evalset.captions))
    ]
    figures = compute_figures(score_set(evalset, *unit))
    assert set(chance) <= figures.keys() and figures["questions"] == len(evalset.questions)
    assert not check_set(evalset)


def test_winogavils_prompt_is_its_papers(tmp_path: Path, images: Path):
    made = convert_choice(winogavil(tmp_path), images, tmp_path / "set")
    (question,) = open_set("mine", made.folder, "choice").questions
    assert question.texts == ("An ocean",)


def test_a_question_of_an_image_that_cannot_be_used_is_left_out_and_counted(
    tmp_path: Path, images: Path
):
    (images / "bear.webp").write_bytes(b"no image")
    made = convert_choice(sugarcrepe(tmp_path), images, tmp_path / "set")
    assert made.left_out()["is of an image that cannot be used"] == made.questions == 1
    assert len(open_set("mine", made.folder, "choice").questions) == 1


def test_an_equal_cosine_is_wrong_and_its_bounds_say_so():
    question = Question(images=("a", "b"), texts=("x", "y"), pairs=PAIRS)
    cosines = torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    assert not choose_rightly(question, cosines, "together")
    assert choose_rightly(question, cosines, "won")
    assert choose_rightly(question, cosines, "lost", images=True)


def test_jaccards_chance_is_the_mean_over_all_picks():
    question = Question(images=tuple("abcde"), texts=("cue",), pairs=((0, 0), (3, 0)))
    picks = [set(one) for one in combinations(range(5), 2)]
    mean = sum(len(one & {0, 3}) / len(one | {0, 3}) for one in picks) / len(picks)
    assert chance_of_jaccard(question) == pytest.approx(mean)
    cosines = torch.tensor([[0.9], [0.1], [0.2], [0.3], [0.8]])
    assert jaccard_index(question, cosines, "together") == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"images": ["s0000000"], "texts": ["a"], "pairs": [[0, 0]]}', "needs one image and"),
        ('{"images": ["s0000000"], "texts": ["a", "b"], "pairs": [[0, 2]]}', "counted from 0"),
        ('{"images": ["other"], "texts": ["a", "b"], "pairs": [[0, 0]]}', "has no image 'other'"),
        ("[" * 5000, "line 1"),
        ("", "questions of one form"),
    ],
)
def test_questions_of_another_form_are_one_sentence(
    tmp_path: Path, images: Path, line: str, reason: str
):
    made = convert_choice(sugarcrepe(tmp_path), images, tmp_path / "set")
    (made.folder / QUESTIONS).write_text(line)
    with pytest.raises(InputError, match=reason):
        open_set("mine", made.folder, "choice")


@pytest.mark.parametrize(
    "rows",
    [
        {"0": {"filename": "bear.webp", "caption": "x"}},
        {"0": {"filename": "bear.webp", "caption": "x", "negative_caption": float("nan")}},
        {"0": 1},
        [],
        [{"cue": "x"}],
    ],
)
def test_lists_of_another_form_are_one_sentence(tmp_path: Path, images: Path, rows: object):
    (tmp_path / "odd.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="expected SugarCrepe's"):
        convert_choice(tmp_path / "odd.json", images, tmp_path / "set")


def test_a_choice_set_goes_through_a_whole_evaluation(
    tmp_path: Path, images: Path, saved_model: Callable[[int], Path]
):
    made = convert_choice(sugarcrepe(tmp_path), images, tmp_path / "swap")
    config = EvaluateConfig.from_mapping(
        {"sets": [{"name": "swap", "kind": "choice", "folder": "x"}]}, "here"
    )
    models = {"one": saved_model(1), "two": saved_model(2)}
    done = evaluate_models(
        config, models, {"swap": made.folder}, (), tmp_path / "out", report_nothing
    )
    assert 0 <= done.counts["swap.accuracy"] <= 1
    assert "accuracy" in (tmp_path / "out" / "report.md").read_text()
    rows = parquet.read_table(tmp_path / "out" / "answers.parquet").to_pylist()
    assert [row["rank"] == 0 for row in rows if row["model"] == "one"].count(True) == (
        2 * done.counts["swap.accuracy"]
    )
    assert {name for row in rows for name in row["names"]} == {"a red disc", "a blue disc"}
