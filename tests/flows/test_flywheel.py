"""Three weeks of rising noise, which the champion of each week takes out of the next one's data.

Pictures come again under other names, some with the captions of others, so that whoever has learnt
them can tell.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from evaclip_model.errors import InputError
from flows.graph.graph import load_graph
from flows.pipeline import retrain
from tasks.artifacts.artifact import Artifact
from tasks.index.sample_index import SampleIndex
from tasks.register.promotion import read_decision
from tests.flows.command import run
from tests.flows.test_retrain import FIRST, Web, make_web, prefect_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

RULE = "retrain.min_score=0.75"
HASTY = "train.only.samples_seen=3_600"
"""The first model leaves something to learn, so that the second becomes champion."""
NOISE = {2: 0.25, 3: 0.75}
"""Week -> share of its captions that belong to other pictures."""


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    made = make_web(tmp_path_factory.mktemp("flywheel"))
    with prefect_of(made):
        yield made


def publish(web: Web, week: int) -> set[str]:
    """Every picture again, some with wrong captions; their URLs."""
    draw = random.Random(week)
    concepts = list(web.concepts[:FIRST])
    wrong = draw.sample(range(FIRST), int(NOISE[week] * FIRST))
    names = {
        at: concepts[other].name for at, other in zip(wrong, [*wrong[1:], wrong[0]], strict=True)
    }
    rows = [web.row(one, copy=f"?week={week}") for one in concepts]
    rows = [replace(row, caption=names.get(at, row.caption)) for at, row in enumerate(rows)]
    web.publish(str(week), rows)
    return {rows[at].url or "" for at in wrong}


def left_out_urls(web: Web, dataset: Artifact) -> set[str]:
    """URLs of what was left out for its score."""
    gone = pq.read_table(dataset.folder / "left_out.parquet").to_pylist()
    rows = [one["row"] for one in gone if one["reason"] == "low_score"]
    folder = web.root / ("join" if len(web.made("verify")) > 1 else "verify")
    (data,) = [one for one in folder.iterdir() if one.name == dataset.parents["verify"]]
    urls = [
        url for table in SampleIndex(data).iterate_chunks("url") for url in table["url"].to_pylist()
    ]
    return {urls[row] for row in rows}


def test_week_1_has_no_champion_yet_and_says_so(
    web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    web.publish("1", [web.row(concept) for concept in web.concepts[:FIRST]])
    retrain(recipe=web.recipe, overrides=(RULE, HASTY))
    said = capsys.readouterr().out
    assert "judged by   nobody: there is no champion yet, so no sample is scored" in said
    assert web.made("embed") == []
    assert web.champion() == 1


@pytest.mark.parametrize("week", [2, 3])
def test_later_weeks_are_judged_by_the_champion_of_their_time(web: Web, week: int) -> None:
    champion = web.champion()
    assert champion == week - 1
    wrong = publish(web, week)
    if week == 3:
        shutil.copytree(web.root, web.folder / "plain", ignore=shutil.ignore_patterns("prefect"))
    registered = retrain(recipe=web.recipe, overrides=(RULE,))
    assert registered is not None
    dataset, features = web.made("dataset")[-1], web.made("embed")
    judged = {role: one for role, one in dataset.parents.items() if role.startswith("judged")}
    assert sorted(judged) == [f"judged{number:04d}" for number in range(1, week)]
    assert [one.digest for one in features] == list(judged.values()), "judged once, used again"
    report = json.loads((features[-1].folder / "report.json").read_text())
    assert report["model"] == f"models:/weekly/{champion}"

    gone = {url for url in left_out_urls(web, dataset) if f"week={week}" in url}
    found, others = len(gone & wrong), len(gone - wrong)
    print(f"week {week}: {found} of {len(wrong)} wrong ones found, {others} others")
    assert found >= 0.8 * len(wrong)
    assert others <= 0.1 * FIRST
    decision = read_decision(registered.folder)
    assert decision.champion == champion
    assert decision.outcome in (("promote",), ("promote", "hold"))[week - 2], decision.summary

    tree = run(["lineage", f"weekly/{week}"], web.root).output
    for number, one in enumerate(features, start=1):
        assert f"judged{number:04d}: embed models:/weekly/{number} {one.digest}" in tree


def test_without_a_judge_the_same_week_makes_a_worse_model(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVACLIP_ROOT", str(web.folder / "plain"))
    registered = retrain(recipe=web.recipe)
    assert registered is not None
    plain = read_decision(registered.folder)
    print(f"week 3 without a judge: {plain.summary}")
    assert plain.outcome == "reject", plain.summary


def test_a_rule_for_all_data_beside_that_of_the_champion_is_refused(web: Web) -> None:
    judge = "embed.models=['models:/weekly@champion']"
    with pytest.raises(InputError, match=r"dataset\.min_score and .*: leave out one of the two"):
        load_graph(web.recipe, (RULE, judge, "dataset.keep_share=0.5"))
