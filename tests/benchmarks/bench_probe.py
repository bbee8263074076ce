"""The linear probe and kNN beside scikit-learn's and CLIP_benchmark's, on the same features.

Features: scikit-learn's handwritten digits (unit vectors of 64 pixels), and made-up ones with the
large common mean of a CLIP model's. Every gradient is that of the same objective at the solution
found, in fp64. CLIP_benchmark trains on a GPU alone: here `.cuda()` does nothing.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from tasks.evaluate.config import ProbeConfig
from tasks.evaluate.metrics.probes import LabelledFeatures, neighbour_votes, solve_regression

L2 = 1e-5


def digits() -> tuple[LabelledFeatures, LabelledFeatures]:
    values, labels = load_digits(return_X_y=True)
    unit = torch.nn.functional.normalize(torch.from_numpy(values).float(), dim=1)
    data = LabelledFeatures(unit, torch.from_numpy(labels).long())
    return split(data, 1200)


def made_up() -> tuple[LabelledFeatures, LabelledFeatures]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 50, (12_000,), generator=draw)
    centres = 0.16 * torch.randn(50, 256, generator=draw) + 2
    noisy = centres[labels] + torch.randn(12_000, 256, generator=draw)
    return split(LabelledFeatures(torch.nn.functional.normalize(noisy, dim=1), labels), 10_000)


def split(data: LabelledFeatures, train: int) -> tuple[LabelledFeatures, LabelledFeatures]:
    first, rest = (
        LabelledFeatures(data.values[one], data.labels[one])
        for one in (slice(train), slice(train, None))
    )
    return first, rest


def measure(train: LabelledFeatures, test: LabelledFeatures) -> None:
    classes = int(train.labels.max()) + 1
    inputs, labels = train.values.double().numpy(), train.labels.numpy()

    def ours() -> tuple[Tensor, Tensor]:
        solved = solve_regression(train.values, train.labels, classes, L2)
        return solved.weights, solved.bias

    def theirs(tolerance: float, steps: int) -> Callable[[], tuple[Tensor, Tensor]]:
        def fit() -> tuple[Tensor, Tensor]:
            model = LogisticRegression(C=1 / (L2 * len(labels)), tol=tolerance, max_iter=steps)
            with warnings.catch_warnings(action="ignore"):
                model.fit(inputs, labels)
            return torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)

        return fit

    rows = {
        "ours": ours,
        "scikit-learn, as it comes": theirs(1e-4, 100),
        "scikit-learn, tol 1e-8": theirs(1e-8, 20_000),
        **{
            f"CLIP_benchmark, lr {lr:g}, seed {seed}": clip_benchmark(train, classes, lr, seed)
            for lr in (0.1, 0.01)
            for seed in (0, 1)
        },
    }
    for name, fit in rows.items():
        start = time.monotonic()
        weights, bias = fit()
        seconds = time.monotonic() - start
        right = (test.values.double() @ weights + bias).argmax(dim=1) == test.labels
        share, slope = 100 * right.double().mean(), gradient(train, weights, bias)
        print(f"| {name} | {share:.2f} | {slope:.0e} | {seconds:.2f} |")


def gradient(train: LabelledFeatures, weights: Tensor, bias: Tensor) -> float:
    """Largest entry of the objective's gradient."""
    inputs = torch.cat([train.values.double(), torch.ones(len(train.labels), 1)], dim=1)
    chances = (train.values.double() @ weights + bias).softmax(dim=1)
    chances[torch.arange(len(chances)), train.labels] -= 1
    whole = inputs.T.double() @ chances / len(chances)
    whole[:-1] += L2 * weights
    return float(whole.abs().max())


def clip_benchmark(
    train: LabelledFeatures, classes: int, lr: float, seed: int
) -> Callable[[], tuple[Tensor, Tensor]]:
    from clip_benchmark.metrics import linear_probe

    torch.nn.Module.cuda = torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign]

    def fit() -> tuple[Tensor, Tensor]:
        data = linear_probe.FeatureDataset(train.values, train.labels)
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)
        with contextlib.redirect_stdout(io.StringIO()):
            model = linear_probe.train(
                loader, train.values.shape[1], classes, 0.0, lr, 10, False, "cpu", seed
            )
        layer = model.module
        return layer.weight.detach().double().T, layer.bias.detach().double()

    return fit


def measure_neighbours(train: LabelledFeatures, test: LabelledFeatures) -> None:
    config = ProbeConfig(neighbours=20, weighted=True)
    start = time.monotonic()
    classes = int(train.labels.max()) + 1
    votes = torch.cat([one for _, one in neighbour_votes(train, test.values, classes, config)])
    ours, seconds = votes.argmax(dim=1), time.monotonic() - start
    start = time.monotonic()
    theirs = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda far: np.exp((1 - far) / 0.07)
    ).fit(train.values.numpy(), train.labels.numpy())
    said = torch.from_numpy(theirs.predict(test.values.numpy()))
    for name, answers, took in (
        ("ours, kNN", ours, seconds),
        ("scikit-learn, kNN", said, time.monotonic() - start),
    ):
        share = 100 * (answers == test.labels).double().mean()
        print(f"| {name} | {share:.2f} | | {took:.2f} |")


if __name__ == "__main__":
    for what, data in (
        ("digits, 1,200 x 64, 10 classes", digits()),
        ("made up, 10,000 x 256, 50 classes", made_up()),
    ):
        print(f"\n| {what} | accuracy, % | largest gradient | s |\n|---|--:|--:|--:|")
        measure(*data)
        measure_neighbours(*data)
