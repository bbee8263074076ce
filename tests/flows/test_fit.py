"""Whether a recipe fits a machine: the yes or no at the end of a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.config.profile import Profile
from flows.config.recipe import Machines, load_recipe
from flows.graph.graph import draw_graph
from flows.planning.run_plan import Finding, Machine, recipe_findings, summarise_findings

LAPTOP = Machine(cores=4, memory_bytes=16 * 10**9, free_bytes=50 * 10**9)
STORE = "sqlite:///there.db"


def findings(
    root: Path, name: str, machine: Machine, given: Machines | None = None, **settings: str | int
) -> dict[str, Finding]:
    recipe, profile = load_recipe(name), Profile(_env_file=None, root=root, **settings)
    found = recipe_findings(recipe, draw_graph(recipe, root, STORE), profile, machine, given)
    return {one.what: one for one in found}


def test_the_demo_fits_a_laptop_and_the_plan_says_yes(tmp_path: Path) -> None:
    found = findings(tmp_path, "demo", LAPTOP)
    assert {one.level for one in found.values()} == {"ok"}
    assert summarise_findings(found.values()).startswith(
        "yes: disk: needs 189 MB, 50.0 GB are free; memory"
    )
    assert "none, 2 minutes on 4 cores" in found["GPUs for stage2"].found


def test_a_papers_recipe_on_a_laptop_is_told_everything_that_is_in_the_way(tmp_path: Path) -> None:
    found = findings(tmp_path, "eva02-clip-b-16", LAPTOP)
    assert found["inputs of merge"].found == "2 not here"
    assert "weights/EVA02_B_psz14to16.pt" in found["inputs of initialise"].do
    assert found["disk"].level == "fail" and "EVACLIP_ROOT" in found["disk"].do
    assert "years on 4 cores" in found["GPUs for b-16"].found
    assert all(one.do for one in found.values() if one.level != "ok")
    said = summarise_findings(found.values())
    assert said.startswith("no: inputs of merge: 2 not here; ") and "TB" in said


@pytest.mark.parametrize(
    ("gpus", "level", "told"),
    [
        ("64xA100-40GB", "ok", "GiB on 64 x A100 40 GB"),
        ("48xA100-40GB", "ok", "GiB on 48 x A100 40 GB"),  # 131,072 is no multiple of 48
        ("200000xA100-40GB", "fail", "200000 x A100 40 GB cannot share batches of 131,072"),
    ],
)
def test_gpus_that_are_given_are_looked_at_instead_of_this_machines(
    tmp_path: Path, gpus: str, level: str, told: str
) -> None:
    found = findings(tmp_path, "eva02-clip-b-16", LAPTOP, Machines.parse_spec(gpus))
    assert found["GPUs for b-16"].level == level and told in found["GPUs for b-16"].found
    assert "memory" not in found


def test_gpus_that_are_too_small_do_not_fit(tmp_path: Path) -> None:
    found = findings(tmp_path, "eva02-clip-e-14-plus", LAPTOP, Machines.parse_spec("8xA100-40GB"))
    assert {f.level for what, f in found.items() if what.startswith("GPUs")} == {"fail"}


def test_a_clusters_gpus_are_not_known_here_unless_they_are_given(tmp_path: Path) -> None:
    settings = {"launcher": "slurm", "ranks": 8, "nodes": 4}
    found = findings(tmp_path, "eva02-clip-b-16", LAPTOP, **settings)
    assert found["GPUs"].level == "warn" and "plan with --gpus" in found["GPUs"].do
    assert found["memory"].found == "of other machines"


def test_the_gpus_of_this_machine_count_where_it_has_some(tmp_path: Path) -> None:
    machine = Machine(32, 256 * 10**9, 10**15, Machines(8, "NVIDIA H100 80GB HBM3", 80))
    found = findings(tmp_path, "eva02-clip-b-16", machine)
    assert found["GPUs for b-16"].level == found["memory"].level == found["disk"].level == "ok"
