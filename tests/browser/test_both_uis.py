"""A person fills the form of a deployment, watches the demo, and finds its model in MLflow.

With PICTURES=FOLDER, what the person sees on the way is kept there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="`make test-browser` installs it")

from tests.browser.person import Person, person
from tests.flows.command import small_demo
from tests.infra.site import Site, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not shutil.which("chromedriver"), reason="needs `apt-get install chromium chromium-driver`"
    ),
]
RUN_S = 1200.0
TEXT_FIELDS = "//textarea[contains(@class, 'p-textarea__control')]"
SUBMIT = "//button[@type='submit']"
STATE = (
    "//*[contains(@class, 'page-heading-flow-run')]//*[contains(@class, 'state-badge')]"
    "[contains(., '{}')]"
)
ASSISTANT = "//button[@data-component-id='mlflow.assistant.chat_panel.close']"
SHOWN = "^(loss|logit_scale|grad_norm|images_per_second|lr_vision|text_to_image_accuracy)$"
"""Metrics in the picture."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("site")) as up:
        yield up


@pytest.fixture(scope="module")
def somebody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    folder = tmp_path_factory.mktemp("browser")
    with person(folder / "profile", Path(os.environ.get("PICTURES", folder / "pictures"))) as one:
        yield one


def test_from_the_form_to_the_model_in_both_uis(site: Site, somebody: Person) -> None:
    fill_the_form(site, somebody)
    watch(site, somebody)
    tracked = read_the_summary(site, somebody)
    follow_to_mlflow(site, somebody, tracked)


def fill_the_form(site: Site, somebody: Person) -> None:
    somebody.visit(site.link)
    somebody.click("//a[normalize-space()='pipeline'][contains(@href, 'deployment/')]")
    somebody.sees("Runs", "Parameters")
    deployment = site.ask("deployments/name/pipeline/pipeline")["id"]
    somebody.visit(f"{site.prefect}/deployments/deployment/{deployment}/run")
    somebody.sees("What happens to a better model", "Only write the plan")
    somebody.picture("prefect-form")

    somebody.write(somebody.find(TEXT_FIELDS), "dmeo")
    somebody.click(SUBMIT)
    somebody.sees("Validation failed for field 'recipe'")

    somebody.write(somebody.find(TEXT_FIELDS), "demo")
    for number, override in enumerate(small_demo(site.root).overrides, start=1):
        somebody.click("//button[contains(., 'Add item')]")
        somebody.find(f"({TEXT_FIELDS})[{number + 1}]")
        somebody.write(somebody.all(TEXT_FIELDS)[number], override)
    somebody.click(SUBMIT)
    somebody.sees("scheduled to start now")


def watch(site: Site, somebody: Person) -> None:
    somebody.click("(//a[contains(@href, '/runs/flow-run/')])[1]")
    somebody.find(STATE.format("Running"), RUN_S)
    somebody.find(STATE.format("Completed"), RUN_S)
    (run,) = site.ask("flow_runs/filter", {"flow_runs": {"parent_task_run_id": {"is_null_": True}}})
    page = f"{site.prefect}/runs/flow-run/{run['id']}"
    somebody.visit(page)  # anew, so that the graph begins with all of the run in it
    somebody.find(STATE.format("Completed"))
    somebody.picture("prefect-run")
    assert site.ask("flow_runs/count", {}) == 1, "the stages are tasks of the one flow run"
    somebody.sees("dataset: samples")  # in the log
    somebody.picture("prefect-stages")


def read_the_summary(site: Site, somebody: Person) -> str:
    """Address of the MLflow run that the flow run links to."""
    somebody.click("//li[@id='artifacts']")
    artifact = "//a[contains(@href, '/artifacts/artifact/')][contains(., '{}')]"
    names = ("summary", "mlflow-run")
    links = {name: somebody.goes_where(artifact.format(name)) for name in names}
    somebody.visit(links["summary"])
    page = somebody.sees("Decision", "Training", "laion2b", "coyo700m")
    assert "PROMOTE: no champion yet" in page
    somebody.picture("prefect-summary")
    somebody.visit(links["mlflow-run"])
    return somebody.goes_where("//a[normalize-space()='MLflow run']")


def follow_to_mlflow(site: Site, somebody: Person, tracked: str) -> None:
    assert tracked.startswith(site.mlflow)
    somebody.visit(site.link_to_mlflow("experiments"))  # from now on the browser adds the secret
    somebody.visit(tracked)
    somebody.sees("pipeline demo", "Finished", "train stage1", "evaclip-demo")
    back = somebody.goes_where("//a[normalize-space()='Prefect run']")
    somebody.click(ASSISTANT)
    somebody.picture("mlflow-run")

    somebody.click("//a[normalize-space()='train stage1']")
    somebody.sees("Datasets", "dataset (", "loss", "images_per_second")
    somebody.click("//*[@role='tab'][normalize-space()='Model metrics'] | //a[.='Model metrics']")
    somebody.write(somebody.find("//input[@placeholder='Search metric charts']"), SHOWN)
    somebody.sees("logit_scale")
    somebody.picture("mlflow-metrics")

    somebody.visit(f"{site.mlflow}/#/models/evaclip-demo/versions/1")
    somebody.sees("champion", "pipeline demo", "mlflow.pyfunc.load_model")
    somebody.picture("mlflow-model")

    somebody.visit(back)
    somebody.find(STATE.format("Completed"))
