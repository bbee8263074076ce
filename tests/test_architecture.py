"""Holds the decisions ARCHITECTURE.md states and the import linter cannot see."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "evaclip_model")
STAGES = (
    *("demo", "merge", "download", "verify", "dataset"),
    *("initialise", "train", "evaluate", "register"),
)


@pytest.mark.parametrize("package", PACKAGES)
def test_our_package_names_lead_to_this_checkout(package: str) -> None:
    code = f"import importlib.util as u; print(u.find_spec('{package}').origin)"
    origin = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(origin).is_relative_to(ROOT)


def test_no_other_distribution_owns_our_package_names() -> None:
    owners = importlib.metadata.packages_distributions()
    foreign = {name: set(owners.get(name, [])) - {"evaclip"} for name in PACKAGES}
    assert foreign == {name: set() for name in PACKAGES}


def test_importing_a_pure_module_does_not_drag_prefect_torch_or_mlflow_in() -> None:
    code = (
        "import flows.graph.graph, sys; "
        "print([m for m in ('prefect', 'torch', 'mlflow', 'duckdb', 'deepspeed') "
        "if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_every_stage_is_a_folder_with_a_config() -> None:
    for stage in STAGES:
        assert (ROOT / "tasks" / stage / "config.py").is_file()


def test_one_file_computes_every_address() -> None:
    calling = [
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if "Address.of(" in path.read_text()
    ]
    assert calling == ["flows/graph/step.py"]


def test_no_flow_calls_another() -> None:
    """A flow inside a flow would not see its session, or would need a global to find it."""
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "flows").rglob("*.py")}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    flows = {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(one).startswith("flow(") for one in node.decorator_list)
    }
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert "pipeline" in flows and flows & calls == set()


def test_stage_packages_import_nothing_by_themselves() -> None:
    for init in (ROOT / "tasks").rglob("__init__.py"):
        assert not re.search(r"^\s*(import|from)\s", init.read_text(), re.M), init


def test_no_module_is_called_utils_or_named_after_a_dependency() -> None:
    installed = set(importlib.metadata.packages_distributions()) - set(PACKAGES)
    shadowing = installed | set(sys.stdlib_module_names) | {"utils", "helpers", "common", "misc"}
    shadowing -= {"config", "profile", "trace"}  # our words; nobody imports the profilers here
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            assert path.stem not in shadowing, path
        for path in (ROOT / package).rglob("*.py"):
            assert path.stem not in {"utils", "helpers", "common", "misc"}, path


def test_no_test_folder_is_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_dependency_has_bounds_a_reason_and_a_tested_version() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    pinned = {
        re.split(r"==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "infra/constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *extras.values()]
    for requirement in (one for some in lists for one in some):
        name = re.match(r"[\w\-]+", requirement)[0]
        if name == project["name"]:  # one extra that brings another
            continue
        assert "<" in requirement, f"{requirement}: no upper bound"
        line = next(line for line in text.splitlines() if f'"{requirement}"' in line)
        assert "#" in line, f"{requirement}: no reason"
        # What is built on the user's machine, against its CUDA, has no version tested here.
        is_tested = name.lower().replace("_", "-") in pinned or requirement in extras["cuda"]
        assert is_tested, f"{requirement}: no tested version"


def test_the_back_port_that_breaks_prefect_is_not_installed() -> None:
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    assert "dataclasses" not in installed, "run `make setup`, or pip uninstall dataclasses"


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_and_targets_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    paths = re.findall(r"`((?:flows|tasks|evaclip_model|infra|tests)/[\w./-]+\.\w+)`", text)
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"`make ([\w-]+)`", text))
    assert named <= set(targets), named - set(targets)
