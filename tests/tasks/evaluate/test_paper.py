"""Which row a model belongs beside, what is published of it, and the verdict on ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from evaclip_model.errors import InputError
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.paper.published import (
    CAPTIONS,
    PaperModel,
    PaperVerdict,
    average_table,
    find_published,
    judge_figure,
    members_of,
    paper,
    paper_model,
    rows_of,
    values_of,
)
from tasks.evaluate.sets.published_layout import EvalSet
from tasks.evaluate.sets.set_registry import known_sets
from tests.tasks.evaluate.answers import caption_set, class_set

ROW = "EVA-02-CLIP-B/16"
RELEASED = PaperModel(ROW, True)


def known_set(key: str, n: int | None = None) -> EvalSet:
    """A set of the registry as it should be, without its images."""
    known = known_sets()[key]
    n = known.n or 100 if n is None else n
    if known.kind == "retrieval":
        return caption_set([CAPTIONS[key] // n + (i < CAPTIONS[key] % n) for i in range(n)], known)
    names = [f"class {number}" for number in range(known.classes or 2)]
    return class_set([i % len(names) for i in range(n)], names, known)


def ruled(ours: float, key: str, metric: str = "top1", **told: object) -> PaperVerdict:
    """PaperVerdict on a figure of the released B/16."""
    reference = find_published(ROW, key, metric)
    assert reference is not None
    return judge_figure(ours, reference, known_set(key), RELEASED, **told)


@pytest.mark.parametrize(("source", "architecture", "expected"), [
    (
        "w/EVA02_CLIP_B_psz16_s8B.pt:EVA02-CLIP-B-16",
        "EVA02-CLIP-B-16 at 224 px",
        PaperModel(ROW, False),
    ),
    ("open_clip:EVA02-B-16/merged2b_s8b_b131k", "open_clip EVA02-B-16", RELEASED),
    ("runs/mine", "EVA02-CLIP-B-16 at 224 px", PaperModel(ROW, False)),
    ("mine.pt:EVA02-CLIP-B-16", "EVA02-CLIP-B-16 at 224 px", PaperModel(ROW, False)),
    ("runs/mine", "EVA02-CLIP-L-14 at 336 px", PaperModel("EVA-02-CLIP-L/14+", False)),
    ("runs/mine", "EVA02-CLIP-B-16 at 32 px", None),
    ("runs/mine", "own architecture at 224 px", None),
    ("open_clip:ViT-H-14/laion2b_s32b_b79k", "any", PaperModel("Open CLIP-H/14", True)),
    ("open_clip:ViT-H-14/my/own.pt", "open_clip ViT-H-14", None),
])  # fmt: skip
def test_a_model_belongs_beside_the_row_of_its_weights_or_else_of_its_architecture(
    source: str, architecture: str, expected: PaperModel | None
) -> None:
    assert paper_model(source, architecture) == expected


def test_a_file_is_the_released_one_by_its_content() -> None:
    openai = next(one for one in paper().models if one.row == "OpenAI CLIP-B/16")
    source = "open_clip:ViT-B-16/any/name.pt"
    assert paper_model(source, "open_clip ViT-B-16", openai.sha256[0]) == PaperModel(
        openai.row, True
    )
    ours = ("runs/x.pt:EVA02-CLIP-B-16", "EVA02-CLIP-B-16 at 224 px", "f" * 64)
    assert paper_model(*ours) == PaperModel(ROW, False)
    assert paper_model(*ours, {"f" * 64: ROW}) == RELEASED
    wrong = {"sets": [{"name": "mnist"}], "released": {"0" * 64: "EVA-02-CLIP-B"}}
    with pytest.raises(InputError, match="a row of the paper, not 'EVA-02-CLIP-B': OpenAI"):
        EvaluateConfig.from_mapping(wrong, where="here")


def test_every_open_clip_name_of_a_row_is_a_model_and_tag_of_that_library() -> None:
    peers = pytest.importorskip("tests.evaclip_model.peer_libraries")
    tags = {f"{name}/{tag}" for name, tag in peers.open_clip.list_pretrained()}
    rows = [row.model for row in rows_of("1a")]
    found = {
        row: [
            tag for tag in tags if (one := paper_model(f"open_clip:{tag}", "")) and one.row == row
        ]
        for row in rows
    }
    assert [row for row in rows if not found[row]] == ["EVA-01-CLIP-B/16"]  # never released


def test_every_figure_of_tables_2_to_4_is_published_for_every_row() -> None:
    rows = [row.model for row in rows_of("2")]
    for key, known in known_sets().items():
        metrics = (
            [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
            if known.metric == "retrieval"
            else [known.metric]
        )
        for row in rows:
            assert all(find_published(row, key, metric) is not None for metric in metrics)


def test_a_figure_of_another_metric_or_set_or_model_is_not_published() -> None:
    assert find_published(ROW, "imagenet1k", "mean_per_class") is None
    assert find_published(ROW, "kinetics400", "top1") is None
    assert find_published(ROW, "voc2007-multilabel", "map") is None
    assert find_published(ROW, "my-own-set", "top1") is None
    assert find_published("EVA-01-CLIP-B/16", "mnist", "top1") is None


def test_a_published_figure_is_the_corrected_one() -> None:
    read = find_published("OpenAI CLIP-L/14", "voc2007", "top1")
    assert read is not None and read.value == 78.3
    assert [note.split(",")[0] for note in read.errata] == ["E2"]
    assert read.errata[0].endswith("(printed: 67.6)")


def test_a_figure_within_the_tolerance_is_reproduced_and_one_outside_differs() -> None:
    assert ruled(0.7470, "imagenet1k").verdict == "reproduced"
    assert ruled(0.7455, "imagenet1k").verdict == "reproduced"
    assert ruled(0.7454, "imagenet1k") == PaperVerdict(
        "differs", "0.16 points from 74.7, where 0.15 count as the same"
    )
    assert ruled(0.6290 - 0.0110, "objectnet").verdict == "reproduced"
    assert ruled(0.587, "coco", "image_to_text_r1").verdict == "reproduced"
    assert ruled(0.580, "coco", "image_to_text_r1").verdict == "differs"


@pytest.mark.parametrize(
    "key",
    ["caltech101", "birdsnap", "fer2013", "resisc45", "ucf101"]
    + [f"kinetics{classes}" for classes in (400, 600, 700)],
)
def test_a_set_whose_images_the_paper_does_not_name_is_compared_only_if_the_recipe_does(
    key: str,
) -> None:
    metric = known_sets()[key].metric
    reference = find_published(ROW, key, metric)
    assert reference is not None
    share = reference.value / 100
    told = ruled(share, key, metric)
    assert told.verdict == "not comparable" and "split not stated" in told.reason
    assert ruled(share, key, metric, split="test list 1").verdict == "reproduced"
    assert ruled(share + 0.02, key, metric, split="test list 1").verdict == "differs"


def test_a_model_with_other_weights_is_not_the_papers() -> None:
    reference = find_published(ROW, "imagenet1k", "top1")
    assert reference is not None
    told = judge_figure(0.747, reference, known_set("imagenet1k"), PaperModel(ROW, False))
    assert told.verdict == "not comparable" and "not its weights" in told.reason


def test_a_row_that_was_measured_with_a_wrong_normalisation_is_not_compared_with() -> None:
    row = "Open CLIP-L/14"
    reference = find_published(row, "imagenet1k", "top1")
    assert reference is not None
    told = judge_figure(0.7525, reference, known_set("imagenet1k"), PaperModel(row, True))
    assert told.verdict == "not comparable" and "normalisation" in told.reason


def names(count: int) -> Sequence[str]:
    return [f"class {number}" for number in range(count)]


@pytest.mark.parametrize(("evalset", "reason"), [
    (known_set("mnist", 9_999), "9,999 images, the figure is of 10,000"),
    (class_set([0] * 10_000, names(9), known_sets()["mnist"]), "9 classes, the figure is of 10"),
    (replace(known_set("mnist"), templates=("{c}", "a {c}")), "2 prompts a class, others use 1"),
    (replace(known_set("mnist"), crop_px=2), "2 pixels are cut off"),
    (replace(known_set("mnist"), known=None), "not one of the paper's"),
], ids=["images", "classes", "prompts", "crop", "unknown"])  # fmt: skip
def test_other_images_classes_or_prompts_are_not_compared(evalset: EvalSet, reason: str) -> None:
    reference = find_published(ROW, "mnist", "top1")
    assert reference is not None
    told = judge_figure(reference.value / 100, reference, evalset, RELEASED)
    assert told.verdict == "not comparable" and reason in told.reason


def test_five_captions_an_image_are_not_cocos_25_010() -> None:
    reference = find_published(ROW, "coco", "text_to_image_r1")
    assert reference is not None
    evalset = caption_set([5] * 5_000, known_sets()["coco"])
    told = judge_figure(0.422, reference, evalset, RELEASED)
    assert told == PaperVerdict(
        "not comparable", "these are 25,000 captions, the figure is of 25,010"
    )


def test_a_row_that_others_measured_otherwise_says_so_where_ours_differs() -> None:
    row = "EVA-02-CLIP-E/14"
    reference = find_published(row, "imagenet1k", "top1")
    assert reference is not None
    told = judge_figure(0.8, reference, known_set("imagenet1k"), PaperModel(row, True))
    assert told.verdict == "differs" and "3.1 points" in told.reason


def published_values(row: str, table: str) -> dict[str, float]:
    """The row's figures as if they were ours."""
    found = {key: find_published(row, key, one.metric) for key, one in members_of(table).items()}
    return {key: one.value / 100 for key, one in found.items() if one is not None}


@pytest.mark.parametrize("table", ["1b", "2", "3"])
def test_the_papers_own_figures_average_to_its_averages(table: str) -> None:
    for row in rows_of(table):
        found = average_table(table, published_values(row.model, table), row.model)
        assert found.value == pytest.approx(row.cells["avg"], abs=0.0501)
        assert (found.missing, found.reason) == ((), "")
        assert found.intersection_value == pytest.approx(found.intersection_reference)


def test_an_average_with_a_set_missing_is_refused_and_given_over_the_others_beside_the_papers() -> (
    None
):
    values = published_values(ROW, "2")
    del values["mnist"], values["pcam"]
    values = {key: value + 0.01 for key, value in values.items()}
    found = average_table("2", {**values, "flickr30k": 0.5, "mine": 0.1}, ROW)
    assert found.value is None and found.missing == ("mnist", "pcam") and len(found.sets) == 25
    assert found.reason == "2 of its 27 sets not evaluated: mnist, pcam"
    assert found.intersection_value == pytest.approx(found.intersection_reference + 1)


def test_an_average_of_a_model_without_a_row_has_nothing_beside_it() -> None:
    found = average_table("3", published_values(ROW, "3"))
    assert found.value is not None
    assert found.intersection_reference is None
    nothing = average_table("3", {})
    assert (nothing.value, nothing.intersection_value) == (None, None)


def test_the_gap_of_every_row_is_the_papers_and_is_refused_where_a_set_is_missing() -> None:
    for row in rows_of("1b"):
        delta = average_table("1b", published_values(row.model, "1b"), row.model).delta
        assert delta == pytest.approx(row.cells["delta"], abs=0.11)  # of rounded figures
    values = published_values(ROW, "1b")
    del values["objectnet"]
    found = average_table("1b", values, ROW)
    assert found.delta is None and found.value is None and "objectnet" in found.reason
    assert average_table("3", published_values(ROW, "3"), ROW).delta is None


def test_averages_take_a_sets_figure_in_the_papers_metric() -> None:
    figures = {
        "kinetics400": {"top1": 0.1, "kinetics_mean": 0.2},
        "ucf101": {"top1": 0.3, "mean_per_class": 0.4},
        "mine": {"top1": 0.5},
        "flickr30k": {"text_to_image_r1": 0.6},
    }
    assert values_of(figures) == {"kinetics400": 0.2, "ucf101": 0.3}
