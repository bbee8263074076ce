"""From a trained model to its report and its place in the registry."""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_link_artifact

from evaclip_model.training.config import METRICS_FILE, MODEL_FOLDER
from flows.chart import find_files
from flows.parameters import Handed, Overrides, RecipeName
from flows.session import open_session
from tasks.artifact import Artifact, read_artifact
from tasks.evaluate.task import evaluate as evaluate_stage
from tasks.register.task import register


@flow(name="evaluate")
def evaluate(
    recipe: RecipeName = "demo", overrides: Overrides = (), model: Handed = None
) -> Artifact:
    """Evaluate the trained beside the untrained model, write the report, register the model.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
        model: What `train` made; by default looked up from the recipe.
    """
    with open_session("evaluate", recipe, overrides) as session:
        chart, wanted = session.chart, session.recipe
        model = model or session.finished(chart.train[-1], "train")
        untrained = session.finished(chart.initialise, "train")
        sets = {
            one.name: find_files(one.folder, chart.demo, f"evaluate.sets '{one.name}'")[0]
            for one in wanted.evaluate.sets
        }
        evaluated = session.make(
            *(evaluate_stage, chart.evaluate, wanted.evaluate),
            {"trained": model.folder / MODEL_FOLDER, "untrained": untrained.folder / MODEL_FOLDER},
            sets,
            [address.folder / METRICS_FILE for address in chart.train],
            inputs={"evaluation": read_artifact(chart.demo.folder)} if chart.demo else {},
            attach=("report.html", "results.json"),
        )
        report = session.run.url() or (evaluated.folder / "report.html").as_uri()
        create_link_artifact(link=report, link_text="Evaluation report", key="evaluation-report")
        return session.make(
            *(register, chart.register, wanted.registry, model, evaluated),
            *(session.store, session.root, session.run.run_id()),
        )
