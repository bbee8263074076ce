"""Warnings that a reader of figures should know before trusting them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.sets.published_layout import EvalSet

TIES_WORTH_TELLING = 0.001
"""Share between the bounds under ties from which a reader is warned."""
CONSISTENT = 0.5
"""Share of a class's images that get one wrong answer, from which the answer is that class's."""
PERMUTED = 0.3
"""Share of classes with such an answer, from which the order of names is doubted."""
FEWEST_PERMUTED = 2


def warnings_of(
    evalset: EvalSet, scored: Scored, figures: Mapping[str, Any], chance: Mapping[str, float]
) -> list[str]:
    """Sentences about one set and the model that is evaluated."""
    found = list(evalset.warnings)
    duplicates = len(evalset.classnames) - len(set(evalset.classnames))
    if duplicates:
        found.append(f"{duplicates} class names occur more than once: their images tie exactly")
    if evalset.kind == "classification":
        absent = len(evalset.classnames) - len({sample.label for sample in evalset.samples})
        if absent:
            found.append(f"{absent} of {len(evalset.classnames)} classes have no image")
        swapped = permuted_classes(evalset, scored)
        if swapped:
            true, said = next(iter(swapped.items()))
            found.append(
                f"{len(swapped)} classes are answered by another class each, as if names and "
                f"labels were in different orders: most images labelled '{true}' are called "
                f"'{said}'"
            )
    for metric, (lost, won) in figures["bounds"].items():
        if won - lost > TIES_WORTH_TELLING:
            found.append(
                f"ties decide {metric}: {100 * lost:.1f} % if all were lost, "
                f"{100 * won:.1f} % if all were won"
            )
    for metric, (low, _) in figures["intervals"].items():
        if metric in chance and low <= chance[metric]:
            found.append(f"{metric} is not above chance within its 95 % interval")
    return found


def permuted_classes(evalset: EvalSet, scored: Scored) -> dict[str, str]:
    """Class -> the other class that most of its images are called, where such pairs are many and
    no two classes share one: a model that knows the classes and a list in the wrong order."""
    if scored.classes is None:
        return {}
    answers: dict[int, Counter[int]] = {}
    given = scored.classes.top[:, 0].tolist()
    for sample, answer in zip(evalset.samples, given, strict=True):
        answers.setdefault(sample.label, Counter())[answer] += 1
    commonest = {label: counted.most_common(1)[0] for label, counted in answers.items()}
    wrong = {
        label: answer
        for label, (answer, times) in commonest.items()
        if times >= CONSISTENT * answers[label].total()
        and evalset.classnames[answer] != evalset.classnames[label]
    }
    claimed = Counter(wrong.values())
    pairs = {label: answer for label, answer in wrong.items() if claimed[answer] == 1}
    if len(pairs) < max(FEWEST_PERMUTED, PERMUTED * len(answers)):
        return {}
    return {evalset.classnames[label]: evalset.classnames[said] for label, said in pairs.items()}
