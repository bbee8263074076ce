"""The guides of CONTRIBUTING.md hold: what a row says is done, in a copy of the checkout.

A stage, a metric and a loss are added by touching exactly the files that their rows name; then the
copy plans, makes and traces a dataset, writes the report of an evaluation, and trains.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from evaclip_model.create import create_model
from evaclip_model.weights.load import save_model
from tests.evaclip_model.conftest import write_small_shards
from tests.evaclip_model.trainer_runs import TINY, job_of
from tests.flows.command import environment
from tests.tasks.adopt.test_adopt import write_pictures

ROOT = Path(__file__).parents[1]
COPIED = ("flows", "tasks", "evaclip_model", "pyproject.toml", "ARCHITECTURE.md")
Edit = str | Callable[[str], str]
"""Content of a new file, or what becomes of an old one's."""


def replaced(there: str, by: str) -> Callable[[str], str]:
    """Put `by` in the only place where `there` stands."""

    def edit(text: str) -> str:
        assert text.count(there) == 1, f"{text.count(there)} times: {there}"
        return text.replace(there, by)

    return edit


def after(line: str, added: str) -> Callable[[str], str]:
    """Add text behind the only place where `line` is."""
    return replaced(line, line + added)


def all_of(*edits: Callable[[str], str]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        for one in edits:
            text = one(text)
        return text

    return edit


def files_to_touch(what: str, **names: str) -> set[str]:
    """The files that the row "To add `what`" names; `<name>` in a path stands for names["name"]."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    row = re.search(rf"^\| {re.escape(what)} \| (.*) \|$", page, re.MULTILINE)
    assert row is not None, f"no row on {what}"
    files = set()
    for path in re.findall(r"`([^`]+)`", row[1]):
        parts = [part.strip("{}").split(", ") for part in re.split(r"(\{[^}]*\})", path)]
        for chosen in itertools.product(*parts):
            file = re.sub(r"<(\w+)>", lambda name: names[name[1]], "".join(chosen))
            if re.fullmatch(r"[\w/.-]+\.(py|toml|md|json)", file):
                files.add(file)
    return files


class Copy:
    """A copy of the checkout that may be changed, and what was changed in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, root / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, root / name)
        (root / "tests").symlink_to(ROOT / "tests")
        self._before = self._digests()

    def change(self, edits: dict[str, Edit]) -> None:
        for name, edit in edits.items():
            path = self.root / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(edit if isinstance(edit, str) else edit(path.read_text()))

    def changed(self) -> set[str]:
        now = self._digests()
        return {name for name in now | self._before if now.get(name) != self._before.get(name)}

    def run(self, *command: str | Path, expected: int = 0) -> str:
        """What a program prints that finds the copy's packages and no others of their names."""
        settings = {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=self.root,
            env=environment(self.root / "runs", **settings),
            capture_output=True,
            text=True,
        )
        assert ran.returncode == expected, f"{ran.stdout}\n{ran.stderr}"[-4000:]
        return ran.stdout

    def _digests(self) -> dict[str, str]:
        return {
            path.relative_to(self.root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for name in COPIED
            for path in [self.root / name, *(self.root / name).rglob("*")]
            if path.is_file()
        }


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    (tmp_path / "copy").mkdir()
    return Copy(tmp_path / "copy")


STAGE: dict[str, Edit] = {
    "tasks/score_images/__init__.py": '"""A score of every verified image."""\n',
    "tasks/score_images/config.py": '''"""The `[score_images]` table of a recipe."""

from __future__ import annotations

from pydantic import Field

from evaclip_model.config import Config
from tasks.artifacts.artifact import Stage

STAGE = Stage("score_images", 1)
SCORES = "scores.json"


class ScoreImagesConfig(Config):
    """The `[score_images]` table."""

    scale: float = Field(1.0, gt=0)
    """Largest score."""
''',
    "tasks/score_images/score_images.py": '''"""Scores of verified images, made of their hashes."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.artifacts.artifact import Made
from tasks.index.sample_index import SampleIndex
from tasks.progress import Report
from tasks.score_images.config import SCORES, ScoreImagesConfig


def score_images(config: ScoreImagesConfig, verified: Path, out: Path, report: Report) -> Made:
    """Write the score of every sample by its row."""
    scores = [
        config.scale * int(row["stored_sha256"][:2], 16) / 255
        for chunk in SampleIndex(verified).iterate_chunks("stored_sha256")
        for row in chunk.to_pylist()
    ]
    report(len(scores), len(scores), "scored")
    (out / SCORES).write_text(json.dumps(scores))
    return Made({"samples": len(scores)}, (out / SCORES,))
''',
    "flows/config/recipe.py": all_of(
        after(
            "from tasks.register.config import RegisterConfig\n",
            "from tasks.score_images.config import ScoreImagesConfig\n",
        ),
        after(
            "    verify: VerifyConfig = VerifyConfig()\n",
            "    score_images: ScoreImagesConfig | None = None\n",
        ),
        replaced('= ("adopt",', '= ("adopt", "score_images",'),
    ),
    "flows/graph/graph.py": all_of(
        after(
            "from tasks.register.config import "
            "DECISION, DECISION_PAGE, STAGE as REGISTER, RegisterConfig\n",
            "from tasks.score_images.config import STAGE as SCORE_IMAGES, ScoreImagesConfig\n",
        ),
        replaced(
            "    dataset = dataset_step(site, rules, data, embed, recipe.captions, judged)\n",
            "    if recipe.score_images is not None:\n"
            "        data = score_images_step(site, recipe.score_images, data)\n"
            "    dataset = dataset_step(site, rules, data, embed, recipe.captions, judged)\n",
        ),
        replaced(
            "\n\ndef dataset_step(",
            '''

def score_images_step(site: Site, config: ScoreImagesConfig, data: Step | Artifact) -> Step:
    """A score of every verified image."""

    def make(_: Profile, out: Path, report: Report) -> Made:
        from tasks.score_images.score_images import score_images

        return score_images(config, data.folder, out, report)

    return Step(site.root, SCORE_IMAGES, config, {Role.DATA: data}, make, "a score an image")


def dataset_step(''',
        ),
    ),
    "ARCHITECTURE.md": lambda text: re.sub(
        r"(?m)^\| verify \|.*\n",
        r"\g<0>| score_images | a verification | `scores.json` | |\n",
        text,
    ),
}
ADOPTED = """
name = "mine"
title = "Ten pictures"
[[adopt.sources]]
name = "photos"
files = "{photos}"
[score_images]
[initialise]
model = "EVA02-CLIP-demo"
image_px = 32
[[train]]
name = "tune"
image_px = 32
global_batch = 2
samples_seen = 4
warmup_steps = 1
lanes = 2
"""
MAKE = """
import sys
from flows.graph.ancestry import find_data
from flows.graph.graph import load_graph
from tasks.artifacts.artifact import read_artifacts
from tasks.index.sample_index import SampleIndex
from tasks.progress import report_nothing

_, profile, graph = load_graph(sys.argv[1], ())
made = [step.make_artifact(profile, report_nothing) for step in graph.data_steps]
print(*(one.kind for one in made))
data = find_data(made[-1], read_artifacts(graph.site.root))
print(data.kind, next(SampleIndex(data.folder).iterate_chunks("uid")).to_pylist()[3]["uid"])
"""


def without_free_space(plan: str) -> str:
    """The plan of a machine on which others write to the disk meanwhile."""
    return re.sub(r"[\d.]+ [MGT]B are free", "are free", plan)


@pytest.mark.slow
def test_a_stage_is_added_by_what_its_row_names(copy: Copy, tmp_path: Path) -> None:
    before = without_free_space(copy.run("-m", "flows", "plan", "demo"))
    copy.change(STAGE)
    named = files_to_touch("a stage", stage="score_images", noun="score_images")
    assert copy.changed() == named and len(named) == 6

    assert without_free_space(copy.run("-m", "flows", "plan", "demo")) == before
    plan = copy.run("-m", "flows", "plan", "demo", "--set", "score_images.scale=2")
    stages = re.findall(r"(?m)^(\w+) .* [0-9a-f]{16}$", plan)
    at = stages.index("score_images")
    assert (stages[at - 1], stages[at + 1]) == ("verify", "dataset")

    write_pictures(tmp_path / "photos", range(10))
    for number in range(10):
        (tmp_path / "photos" / f"{number}.txt").write_text(f"photo {number}")
    (tmp_path / "mine.toml").write_text(ADOPTED.format(photos=tmp_path / "photos"))
    kinds, data = copy.run("-c", MAKE, tmp_path / "mine.toml").splitlines()
    assert kinds.split() == ["adopt", "verify", "score_images", "dataset"]
    kind, uid = data.split()
    assert kind == "verify"
    trace = copy.run("-m", "flows", "trace", "--uid", uid)
    assert re.search(r"(?m)^made by +adopt \w+, verify \w+$", trace)
    assert re.search(r"(?m)^dataset +[0-9a-f]{16}: holds it$", trace)


def test_the_import_contracts_hold_of_a_stage_that_they_do_not_name(copy: Copy) -> None:
    copy.change(STAGE)
    lint = Path(sys.executable).with_name("lint-imports")
    copy.run(lint, "--no-logo", "--no-cache")
    scores = "tasks/score_images/score_images.py"
    copy.change({scores: lambda text: f"{text}\nimport tasks.merge.schema\n"})
    said = copy.run(lint, "--no-logo", "--no-cache", expected=1)
    assert "tasks.score_images is not allowed to import tasks.merge" in said


WRITE_REPORT = """
import sys
from pathlib import Path
from tasks.evaluate.report.write_reports import write_reports
from tests.tasks.evaluate.fixed_evaluation import fixed_evaluation

out = Path(sys.argv[1])
out.mkdir()
results, scored, _ = fixed_evaluation(out / "pictures")
write_reports(out, results, scored)
"""


@pytest.mark.slow
def test_a_metric_is_added_by_what_its_row_names(copy: Copy, tmp_path: Path) -> None:
    copy.change(
        {"tasks/evaluate/metrics/metric.py": after("    define_top(5),\n", "    define_top(10),\n")}
    )
    named = files_to_touch("a metric of an evaluation")
    assert copy.changed() == named and len(named) == 1
    copy.run("-c", WRITE_REPORT, tmp_path / "report")
    for page in ("report.html", "report.md"):
        assert "top-10" in (tmp_path / "report" / page).read_text()
    rows = (tmp_path / "report" / "figures.csv").read_text().splitlines()
    added = [row for row in rows if "top10" in row]
    assert len(added) >= 4
    golden = (ROOT / "tests/golden/evaluation/figures.csv").read_text().splitlines()
    assert [row for row in rows if row not in added] == golden


PAIRWISE = '''"""`objective = "pairwise"`: a pair against all others, each a question of its own."""

import torch
import torch.nn.functional as F

from evaclip_model.training.loss.objective import LossTerms


class PairwiseObjective:
    parameters = {"logit_scale": 2.3, "logit_bias": -3.0}
    bounds = {"logit_scale": (0.0, 4.6), "logit_bias": (-2.99, 0.0)}

    def __init__(self, config):
        pass

    def read_scalars(self, model):
        scale, bias = model.logit_scale.float().exp(), model.logit_bias.float()
        return {"logit_scale": scale.squeeze(0), "logit_bias": bias.squeeze(0)}

    def compute_terms(self, image, text, scalars, *, captions=None, is_whole_batch=False):
        logits = scalars["logit_scale"] * image @ text.T + scalars["logit_bias"]
        signs = 2 * torch.eye(len(image)) - 1
        hits = (logits.argmax(1) == torch.arange(len(image))).float().mean()
        return LossTerms(-F.logsigmoid(signs * logits).sum() / len(image), hits, hits)

    def gpu_bytes(self, rows, columns):
        return 4.0 * rows * columns
'''
LOSS: dict[str, Edit] = {
    "evaclip_model/training/loss/pairwise.py": PAIRWISE,
    "evaclip_model/training/config.py": after(
        '    "softmax": "evaclip_model.training.loss.objective:Objective",\n',
        '    "pairwise": "evaclip_model.training.loss.pairwise:PairwiseObjective",\n',
    ),
}


def test_a_loss_is_added_by_what_its_row_names(copy: Copy, tmp_path: Path) -> None:
    copy.change(LOSS)
    named = files_to_touch("a loss", name="pairwise")
    assert copy.changed() == named and len(named) == 2
    copy.run("-m", "flows", "plan", "demo", "--set", "train.stage1.objective=pairwise")
    data = tmp_path / "data"
    data.mkdir()
    save_model(create_model(TINY, seed=0), write_small_shards(data) / "start")
    settings = {"objective": "pairwise", "samples_seen": 48, "lr_other": 1e-2, "warmup_steps": 0}
    for parts in ({}, {"micro_batch": 8}):
        run = tmp_path / f"run-{len(parts)}"
        job = job_of(data, run, engine="torch", job=parts, **settings)
        copy.run("-m", "evaclip_model.training.worker", job)
        rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2]
        assert rows[0]["loss"] > rows[1]["loss"]
        assert rows[0]["logit_bias"] == -3.0
        assert rows[1]["logit_bias"] == pytest.approx(-2.99)  # the engine keeps what is bounded
        assert load_file(run / "model" / "model.safetensors")["logit_bias"].shape == ()
