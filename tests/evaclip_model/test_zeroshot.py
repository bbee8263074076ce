"""Ranks and ties against hand-made cases and a brute-force reference; text classifiers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings, strategies as some
from torch import Tensor

from evaclip_model.create import create_model
from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.tokenizer.tokenizer import tokenize
from evaclip_model.zeroshot import exact_ranks, statistics
from evaclip_model.zeroshot.encode_chunks import EvaSubject, embed_texts, exact_arithmetic


@pytest.fixture(scope="module")
def model() -> EvaClip:
    return create_model("EVA02-CLIP-demo", seed=0).eval()


def units(rows: int, width: int, seed: int) -> Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return exact_ranks.normalise_features(drawn, "test")


def brute_order(logits: Sequence[float]) -> list[int]:
    """Answers from best to worst: larger first, equal ones by index."""
    return sorted(range(len(logits)), key=lambda index: (-logits[index], index))


def test_equal_logits_are_ranked_by_lower_index():
    logits = torch.tensor([[0.5, 0.9, 0.9, 0.1, 0.9]]).repeat(5, 1)
    ranking = exact_ranks.rank_targets(logits, torch.arange(5))
    assert ranking.ranks.tolist() == [3, 0, 1, 4, 2]
    assert ranking.best_ranks.tolist() == [3, 0, 0, 4, 0]
    assert ranking.worst_ranks.tolist() == [3, 2, 2, 4, 2]
    assert ranking.tied.all()
    assert ranking.top[0].tolist() == [1, 2, 4, 0, 3]


def test_a_tie_below_the_first_place_is_not_a_tied_winner():
    ranking = exact_ranks.rank_targets(torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([2]))
    assert not ranking.tied.any()
    assert (ranking.ranks, ranking.best_ranks) == (torch.tensor([2]), torch.tensor([1]))


def test_a_collapsed_model_scores_the_share_of_the_first_class_and_says_that_all_is_tied():
    same = units(1, 8, seed=0).repeat(6, 1)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    ranking = exact_ranks.rank_classes(same, same[:3], labels)
    assert statistics.hit_rate(ranking.ranks, 1) == pytest.approx(1 / 3)
    assert ranking.tied.all()


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_a_brute_force_sort_of_coarse_logits_full_of_ties(seed: int):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 6, (40, 23), generator=draw).float() / 8
    targets = torch.randint(0, 23, (40,), generator=draw)
    ranking = exact_ranks.rank_targets(logits, targets, k=7)
    for query, row in enumerate(logits.tolist()):
        order = brute_order(row)
        assert ranking.ranks[query] == order.index(int(targets[query]))
        assert ranking.top[query].tolist() == order[:7]
        assert ranking.tied[query] == (row.count(max(row)) > 1)
        assert ranking.best_ranks[query] <= ranking.ranks[query] <= ranking.worst_ranks[query]


@given(some.data())
@settings(max_examples=60, deadline=None)
def test_any_ties_are_ranked_as_a_stable_sort_ranks_them(data: some.DataObject):
    gallery = data.draw(some.integers(1, 9))
    row = data.draw(some.lists(some.integers(0, 3), min_size=gallery, max_size=gallery))
    target, k = data.draw(some.integers(0, gallery - 1)), data.draw(some.integers(1, 10))
    ranking = exact_ranks.rank_targets(torch.tensor([row]).float(), torch.tensor([target]), k)
    order = brute_order(row)
    assert ranking.top[0].tolist() == order[:k]
    assert int(ranking.ranks) == order.index(target)
    assert int(ranking.best_ranks) == sum(value > row[target] for value in row)
    assert int(ranking.worst_ranks) == sum(value >= row[target] for value in row) - 1
    assert bool(ranking.tied) == (row.count(max(row)) > 1)


def test_logits_are_fp32_whatever_the_program_around_allows_itself():
    images, classes = units(70, 32, seed=7), units(9, 32, seed=8)
    expected = exact_ranks.Gallery.from_features(classes).compute_logits(images)
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = exact_ranks.Gallery.from_features(classes).compute_logits(images)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_less_precision_have_fp32_logits_without_ties(dtype: torch.dtype):
    images, classes = units(400, 64, seed=9).to(dtype), units(50, 64, seed=10).to(dtype)
    labels = torch.arange(400) % 50
    found = exact_ranks.rank_classes(images, classes, labels)
    assert torch.equal(
        found.ranks, exact_ranks.rank_classes(images.float(), classes.float(), labels).ranks
    )
    assert not found.tied.any()


def test_scores_of_many_images_are_those_of_each():
    images, classes = units(exact_ranks.ROWS + 3, 16, seed=11), units(5, 16, seed=12)
    scores = exact_ranks.class_scores(images, classes)
    assert torch.allclose(scores, images @ classes.T, atol=1e-6)


def test_a_ranking_of_some_queries_is_theirs():
    logits = torch.tensor([[0.5, 0.9, 0.9], [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    whole = exact_ranks.rank_targets(logits, torch.tensor([2, 2, 2]))
    some_of_them = whole.select_queries(torch.tensor([True, False, True]))
    assert some_of_them.ranks.tolist() == [1, 2] and some_of_them.tied.tolist() == [True, False]
    assert len(some_of_them) == 2 and some_of_them.top.tolist() == [[1, 2, 0], [0, 1, 2]]


def test_duplicate_class_names_tie_exactly_wherever_they_stand():
    classifier = units(301, 48, seed=1)
    classifier[300] = classifier[7]  # an edge column of a matrix kernel, and an inner one
    logits = exact_ranks.Gallery.from_features(classifier).compute_logits(units(500, 48, seed=2))
    assert torch.equal(logits[:, 300], logits[:, 7])


def test_classify_is_the_same_for_more_queries_than_fit_in_one_chunk():
    images, classes = units(exact_ranks.ROWS * 2 + 5, 16, seed=3), units(11, 16, seed=4)
    labels = torch.arange(len(images)) % 11
    ranking = exact_ranks.rank_classes(images, classes, labels, k=3)
    for query, row in enumerate((images.double() @ classes.double().T).tolist()):
        assert ranking.top[query].tolist() == brute_order(row)[:3]
        assert ranking.ranks[query] == brute_order(row).index(int(labels[query]))


def test_retrieval_both_ways_equals_a_brute_force_search():
    images, texts = units(30, 8, seed=5), units(70, 8, seed=6)
    owner = torch.arange(70) % 30
    texts[41] = texts[3]  # one caption, verbatim, of two images
    to_text = exact_ranks.retrieve_texts(images, texts, owner)
    to_image = exact_ranks.retrieve_images(images, texts, owner)
    logits = images @ texts.T
    logits[:, 41] = logits[:, 3]
    for image, row in enumerate(logits.tolist()):
        places = [place for place, text in enumerate(brute_order(row)) if owner[text] == image]
        assert to_text.ranks[image] == min(places)
    for text, row in enumerate(logits.T.tolist()):
        assert to_image.ranks[text] == brute_order(row).index(int(owner[text]))


def test_how_many_logits_are_held_at_once_changes_no_rank(monkeypatch: pytest.MonkeyPatch):
    images, texts, owner = units(30, 8, seed=5), units(70, 8, seed=6), torch.arange(70) % 30
    whole = exact_ranks.retrieve_texts(images, texts, owner)
    monkeypatch.setattr(exact_ranks, "LOGITS", 300)
    portions = exact_ranks.Gallery.from_features(texts).split_queries(30)
    assert [len(rows) for rows in portions] == [4] * 7 + [2]
    assert torch.equal(exact_ranks.retrieve_texts(images, texts, owner).top, whole.top)
    monkeypatch.setattr(exact_ranks, "LOGITS", 1)
    assert torch.equal(exact_ranks.retrieve_texts(images, texts, owner).ranks, whole.ranks)


def test_ties_among_an_images_own_captions_cost_nothing():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    ranking = exact_ranks.retrieve_texts(image, texts, torch.tensor([1, 0, 0]))
    assert ranking.ranks.tolist() == ranking.worst_ranks.tolist() == [0, 0]


def test_the_verbatim_caption_of_another_image_wins_or_loses_by_index():
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    ranking = exact_ranks.retrieve_texts(image, texts, torch.tensor([0, 1]))
    assert ranking.ranks.tolist() == [0, 1]
    assert ranking.best_ranks.tolist() == [0, 0]
    assert ranking.worst_ranks.tolist() == [1, 1]


def test_features_that_are_not_finite_are_refused_instead_of_ranking_first():
    with pytest.raises(InputError, match="diverged"):
        exact_ranks.normalise_features(torch.tensor([[1.0, float("nan")]]), "image")


def test_texts_are_encoded_as_if_padded_and_equal_texts_get_equal_features(model: EvaClip):
    texts = ["a red apple", "a dog", "a red apple", "a photo of a very long sentence, indeed!"]
    with exact_arithmetic("cpu"):
        features = embed_texts(EvaSubject(model), texts)
    with torch.inference_mode():
        padded = model.encode_text(tokenize(texts), normalize=True)
    assert torch.allclose(features, padded, atol=1e-5)
    assert torch.equal(features[0], features[2])


def test_the_classifier_is_the_renormalised_mean_of_normalised_prompts(model: EvaClip):
    templates = ("a photo of a {c}.", "{c}", "art of {c} and {c}")
    names = ["crane", "owl", "crane"]
    asked = exact_ranks.fill_templates(names, templates)
    classifier = exact_ranks.build_classifier(embed_texts(EvaSubject(model), asked), names)
    prompts = ["a photo of a owl.", "owl", "art of owl and owl"]
    with torch.inference_mode():
        mean = model.encode_text(tokenize(prompts), normalize=True).mean(dim=0)
    assert torch.allclose(classifier[1], mean / mean.norm(), atol=1e-5)
    assert torch.equal(classifier[0], classifier[2])
    assert math.isclose(float(classifier[0].norm()), 1.0, rel_tol=1e-5)


def test_a_template_without_a_place_for_the_class_is_refused():
    with pytest.raises(InputError, match=r"has no \{c\}"):
        exact_ranks.fill_templates(["crane"], ["a photo"])
