"""From a trained model to its report and its place in the registry."""

from __future__ import annotations

from prefect import flow, runtime

from evaclip_model.training.config import METRICS_FILE, MODEL_FOLDER
from flows.chart import Chart, find_files
from flows.gate import Promote, register_and_judge, settle
from flows.parameters import Handed, Overrides, RecipeName
from flows.session import open_session
from flows.told import publish_evaluation, told_of
from tasks.artifact import Artifact, read_artifact
from tasks.dataset.config import LEFT_OUT
from tasks.evaluate.contamination import TrainingData
from tasks.evaluate.task import evaluate as evaluate_stage


@flow(name="evaluate")
def evaluate(
    recipe: RecipeName = "demo",
    overrides: Overrides = (),
    model: Handed = None,
    promote: Promote = "gate",
) -> Artifact:
    """Evaluate the trained beside the untrained model, write the report, register the model, and
    let the gate decide whether it becomes champion.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
        model: What `train` made; by default looked up from the recipe.
        promote: What happens to a better model. gate: it becomes champion; ask: once a person has
            said yes; never: it stays challenger.
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
            session.profile.machine,
            trained_on(chart),
            inputs={"evaluation": read_artifact(chart.demo.folder)} if chart.demo else {},
            **told_of(sets),
        )
        publish_evaluation(evaluated, session.run.stage_url(chart.evaluate))
        registered = register_and_judge(session, chart.register, model, evaluated)
    if runtime.flow_run.parent_flow_run_id is None:
        settle(session, registered, promote)
    return registered


def trained_on(chart: Chart) -> list[TrainingData]:
    """The data that test images are looked for in; none where they were cleared away."""
    data = TrainingData(chart.verify.folder, chart.dataset.folder / LEFT_OUT)
    return [data] if chart.verify.is_finished and data.left_out.is_file() else []
