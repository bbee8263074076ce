"""Our figures beside those of clip-benchmark and torchmetrics, on the same logits without ties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evaclip_model.zeroshot import exact_ranks, statistics
from tests.evaclip_model.peer_torchvision import torchvision  # noqa: F401

classification = pytest.importorskip(
    "torchmetrics.functional.classification", reason="torchmetrics is not installed"
)
retrieval = pytest.importorskip(
    "torchmetrics.functional.retrieval", reason="torchmetrics is not installed"
)
their_classes = pytest.importorskip(
    "clip_benchmark.metrics.zeroshot_classification",
    reason="clip-benchmark is not installed: pip install --no-deps clip-benchmark",
)
their_retrieval = pytest.importorskip(
    "clip_benchmark.metrics.zeroshot_retrieval",
    reason="clip-benchmark is not installed: pip install --no-deps clip-benchmark",
)

TOLERANCE = 1e-6
SEEDS = range(3)
IMAGES, CLASSES, WIDTH = 600, 37, 48


def near(value: float) -> object:
    return pytest.approx(value, abs=TOLERANCE)


@pytest.fixture(params=SEEDS)
def features(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Images near the classes they are of, classes, and labels of uneven frequency."""
    draw = torch.Generator().manual_seed(request.param)
    classes = exact_ranks.normalise_features(torch.randn(CLASSES, WIDTH, generator=draw), "class")
    labels = (torch.rand(IMAGES, generator=draw) ** 2 * CLASSES).long()
    noise = torch.randn(IMAGES, WIDTH, generator=draw) / 3
    return exact_ranks.normalise_features(classes[labels] + noise, "image"), classes, labels


@pytest.fixture
def old_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of one number are numbers to `float` again, as clip-benchmark 1.6.2 takes them."""
    numpy = Tensor.numpy
    monkeypatch.setattr(Tensor, "numpy", lambda tensor: numpy(tensor.squeeze()))


@pytest.mark.usefixtures("old_numpy")
def test_top_1_top_5_and_mean_per_class_are_theirs(features: tuple[Tensor, Tensor, Tensor]):
    images, classes, labels = features
    ranking, logits = exact_ranks.rank_classes(images, classes, labels), images @ classes.T
    assert not ranking.tied.any()
    first, fifth = (statistics.hit_rate(ranking.ranks, k) for k in (1, 5))
    assert 0.1 < first < fifth < 1
    assert [near(first), near(fifth)] == their_classes.accuracy(logits, labels, topk=(1, 5))
    for k, ours in ((1, first), (5, fifth)):
        theirs = classification.multiclass_accuracy(
            logits, labels, num_classes=CLASSES, average="micro", top_k=k
        )
        assert near(ours) == float(theirs)
    ours = statistics.mean_per_class(ranking.ranks < 1, labels)
    said = logits.argmax(dim=1)
    assert near(ours) == their_classes.balanced_accuracy_score(labels, said)
    assert near(ours) == float(
        classification.multiclass_accuracy(said, labels, num_classes=CLASSES, average="macro")
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_mean_average_precision_is_theirs(seed: int):
    draw = torch.Generator().manual_seed(seed)
    shown = torch.rand(500, 20, generator=draw) < 0.1
    scores = torch.randn(500, 20, generator=draw) + shown
    ours = statistics.mean_average_precision(scores, shown)
    assert near(ours) == float(their_classes.average_precision_per_class(scores, shown).mean())
    theirs = classification.multilabel_average_precision(
        scores, shown.long(), num_labels=20, average="macro"
    )
    assert near(ours) == float(theirs)


def test_average_precision_with_ties_is_torchmetrics():
    draw = torch.Generator().manual_seed(0)
    shown = torch.rand(200, 6, generator=draw) < 0.3
    scores = torch.randint(0, 9, (200, 6), generator=draw).float() / 8
    theirs = classification.multilabel_average_precision(
        scores, shown.long(), num_labels=6, average="none"
    )
    assert torch.allclose(
        statistics.average_precisions(scores, shown).float(), theirs, rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_hit_rates_of_retrieval_both_ways_are_theirs(seed: int):
    draw = torch.Generator().manual_seed(seed)
    images = exact_ranks.normalise_features(torch.randn(120, WIDTH, generator=draw), "image")
    owner = torch.cat([torch.arange(120).repeat(4), torch.arange(0, 120, 7)])
    noise = torch.randn(len(owner), WIDTH, generator=draw)
    texts = exact_ranks.normalise_features(images[owner] + noise / 1.5, "text")
    scores, right = texts @ images.T, owner[:, None] == torch.arange(120)[None, :]
    to_text = exact_ranks.retrieve_texts(images, texts, owner)
    to_image = exact_ranks.retrieve_images(images, texts, owner)
    for k in (1, 5, 10):
        for ranking, logits, positives in ((to_text, scores.T, right.T), (to_image, scores, right)):
            ours = statistics.hit_rate(ranking.ranks, k)
            assert 0.1 < ours < 1
            found = their_retrieval.recall_at_k(logits, positives, k) > 0
            assert near(ours) == float(found.float().mean())
            rates = [
                retrieval.retrieval_hit_rate(row, truth, top_k=k)
                for row, truth in zip(logits, positives, strict=True)
            ]
            assert near(ours) == float(torch.stack(rates).mean())
