"""The report of an evaluation as a browser shows it: of one set to all, of one model to four.

With PICTURES=FOLDER, pictures of it are kept there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="`make test-browser` installs it")

from tasks.evaluate.report.write_reports import write_reports
from tasks.evaluate.sets.set_registry import known_sets
from tests.browser.person import Person, person
from tests.tasks.evaluate.made_up import made_up

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("chromedriver"), reason="needs `apt-get install chromium chromium-driver`"
    ),
]
OTHERS = ("untrained", "open_clip/ViT-B-16-SigLIP2-512/webli", "epoch 12")
"""Models beside the two that are made up."""
THREE = ("cifar10", "flickr30k", "voc2007-multilabel")
EVERY = tuple(key for key, known in known_sets().items() if known.tables)


@pytest.fixture(scope="module")
def somebody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    folder = tmp_path_factory.mktemp("browser")
    with person(folder / "profile", Path(os.environ.get("PICTURES", folder / "pictures"))) as one:
        yield one


@pytest.mark.parametrize(
    ("name", "sets", "models", "scheme"),
    [
        ("report-one-set", ("cifar10",), 1, "light"),
        ("report-three-sets", THREE, 4, "dark"),
        ("report-all-sets", EVERY, 2, "light"),
    ],
)
def test_a_report_fits_the_window(
    name: str, sets: tuple[str, ...], models: int, scheme: str, somebody: Person, tmp_path: Path
) -> None:
    page = write_report(tmp_path, sets, models)
    somebody.prefers(scheme)
    somebody.visit(page.as_uri())
    somebody.sees("All sets at a glance", "Set by set")
    assert somebody.runs("return document.documentElement.scrollWidth <= window.innerWidth")
    somebody.picture(name, height=1000)


def write_report(folder: Path, sets: tuple[str, ...], count: int) -> Path:
    """The page of a made-up evaluation of `count` models."""
    results, scored = made_up(folder, list(sets), images_per_class=1)
    wanted = ["candidate", "champion", *OTHERS][:count]
    for key in sets:
        by_model = results["results"][key]
        for name in wanted[2:]:
            by_model[name] = deepcopy(by_model["champion"])
            scored[key] = {**scored[key], name: scored[key]["champion"]}
            results["paired"][key][name] = results["paired"][key]["champion"]
            results["models"][name] = {**results["models"]["champion"], "source": name}
            for averages in results["averages"].values():
                averages[name] = averages["champion"]
        if count == 1:
            results["paired"] = {}
            del by_model["champion"]
            scored[key] = {"candidate": scored[key]["candidate"]}
    results["models"] = {name: results["models"][name] for name in wanted}
    return write_reports(folder, results, scored)[0]
