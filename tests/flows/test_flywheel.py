"""Three weeks of rising noise, which the champion of each week takes out of the next one's data.

Pictures come again under other names, some with the captions of others, so that whoever has learnt
them can tell.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from evaclip_model.errors import InputError
from flows.graph.graph import load_graph
from flows.retrain import retrain
from tasks.artifacts.artifact import Artifact
from tasks.index.sample_index import SampleIndex
from tasks.register.promotion import read_decision
from tests.flows.command import run
from tests.flows.test_retrain import FIRST, Web, make_web, prefect_of, top1

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

RULE = "retrain.min_score=0.4"
NOISE = {2: 0.25, 3: 0.5}
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
    (data,) = [one for one in folder.iterdir() if one.name == dataset.parents["data"]]
    urls = [
        url for table in SampleIndex(data).iterate_chunks("url") for url in table["url"].to_pylist()
    ]
    return {urls[row] for row in rows}


def judged_by(web: Web, dataset: Artifact) -> dict[str, str]:
    """Role of the scores -> features."""
    return {role: digest for role, digest in dataset.parents.items() if role.startswith("scores")}


def test_week_1_has_no_champion_yet_and_says_so(
    web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    web.publish("1", [web.row(concept) for concept in web.concepts[:FIRST]])
    retrain(recipe=web.recipe, overrides=(RULE,))
    said = capsys.readouterr().out
    assert "judged by   nobody: there is no champion yet, so no sample is scored" in said
    assert web.made("embed") == []
    assert web.champion() == 1


@pytest.mark.parametrize("week", [2, 3])
def test_later_weeks_are_judged_by_the_champion_of_their_time(web: Web, week: int) -> None:
    champion = web.champion()
    wrong = publish(web, week)
    registered = retrain(recipe=web.recipe, overrides=(RULE,))
    assert registered is not None
    dataset, features = web.made("dataset")[-1], web.made("embed")
    scores = judged_by(web, dataset)
    assert sorted(scores) == [f"scores{number:04d}" for number in range(1, week)]
    assert [one.digest for one in features] == list(scores.values()), "judged once, used again"
    report = (features[-1].folder / "report.json").read_text()
    assert f'"model": "models:/weekly/{champion}"' in report

    gone = {url for url in left_out_urls(web, dataset) if f"week={week}" in url}
    print(
        week, len(gone & wrong), "of", len(wrong), "wrong ones found,", len(gone - wrong), "others"
    )
    assert len(gone & wrong) >= 0.8 * len(wrong)
    assert len(gone - wrong) <= 0.1 * FIRST
    decision = read_decision(registered.folder)
    assert decision.champion == champion
    assert decision.outcome != "reject", decision.summary
    assert top1(web)["trained"] > 0.2

    tree = run(["lineage", f"weekly/{week}"], web.root)
    assert (
        f"scores{week - 1:04d}: embed models:/weekly/{champion} {features[-1].digest}"
        in tree.output
    )


def test_a_rule_for_all_data_beside_that_of_the_champion_is_refused(web: Web) -> None:
    judge = "embed.models=['models:/weekly@champion']"
    with pytest.raises(InputError, match=r"dataset\.min_score and .*: leave out one of the two"):
        load_graph(web.recipe, (RULE, judge, "dataset.keep_share=0.5"))
