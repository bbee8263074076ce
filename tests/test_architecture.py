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
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text()) for path in MODULES}
NAMED_ALIKE = {"__init__", "__main__", "config"}
"""Modules that are one of a kind in every folder."""
HEADLESS = re.compile(
    r"(What|Whether|Where|How|Who|Whose|When|Which|Why|None|Nothing|Those|As|Likewise)\b"
)
IS_NO = re.compile(
    r"(?<!there )\b(is|are|was|were|be) no (?!longer|more|other|faster)\w+", re.IGNORECASE
)
"""Not English: "is no file" for "is not a file"; "there is no file" is."""


def where(path: Path, line: int = 1) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def stages() -> list[str]:
    """Every stage: a folder of tasks/ whose config names it."""
    configs = sorted((ROOT / "tasks").glob("*/config.py"))
    return [path.parent.name for path in configs if "\nSTAGE = " in path.read_text()]


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


def test_every_stage_has_a_row_in_the_table() -> None:
    rows = re.findall(r"^\| (\w+) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    assert len(stages()) > 8
    assert [stage for stage in stages() if stage not in rows] == []


def test_what_the_page_says_of_imports_is_what_the_contracts_hold() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contracts = linter["contracts"]
    table = re.search(r"\| imported \| only in \|\n\|---\|---\|\n((?:\|.*\n)+)", page)
    assert table is not None
    said = {}
    for row in table[1].splitlines():
        imported, importing = (re.findall(r"`([^`]+)`", cell) for cell in row.split("|")[1:3])
        said |= {name: {one.removesuffix(".py") for one in importing} for name in imported}
    held = {}
    for contract in (one for one in contracts if one["type"] == "forbidden"):
        free = set(PACKAGES) - set(contract["source_modules"])
        held |= {name: set(free) for name in contract["forbidden_modules"]}
        for ignored in contract.get("ignore_imports", ()):
            importer, _, imported = ignored.partition(" -> ")
            held[imported].add(importer.removesuffix(".*").replace(".", "/"))
    assert said == held

    (stages_apart,) = (one for one in contracts if one["type"] == "independence")
    assert stages_apart["modules"] == ["tasks.*"]
    shared = {
        one.removeprefix("tasks.** -> ").removesuffix(".**").replace(".", "/")
        for one in stages_apart["ignore_imports"]
    }
    sentence = re.search(r"\nStages never import each other: .*?\.\n", page, re.DOTALL)
    assert sentence is not None
    named = re.findall(r"`(tasks/\w[\w/.]*)`", sentence[0])
    assert {one.removesuffix(".py") for one in named} == shared

    for layers in (one["layers"] for one in contracts if one["type"] == "layers"):
        names = layers if "flows" in layers else [f"`{one.replace('.', '/')}`" for one in layers]
        assert re.search(".*?".join(map(re.escape, names)), page, re.DOTALL)


def test_a_class_has_a_name_of_its_own() -> None:
    at: dict[str, list[str]] = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                at.setdefault(node.name, []).append(where(path, node.lineno))
    assert {name: places for name, places in at.items() if len(places) > 1} == {}


def test_a_module_has_a_name_of_its_own() -> None:
    """But for the forms: config.py, a stage's own `tasks/merge/merge.py`, flows, commands."""
    at: dict[str, list[str]] = {}
    for path in MODULES:
        name = path.relative_to(ROOT).as_posix()
        is_form = path.stem in NAMED_ALIKE or re.fullmatch(
            r"flows/(commands/)?\w+\.py|tasks/(\w+)/\2\.py", name
        )
        if not is_form:
            at.setdefault(path.stem, []).append(name)
    assert {name: places for name, places in at.items() if len(places) > 1} == {}


def test_functions_say_what_they_do_in_more_than_one_word() -> None:
    names = [
        node.name.strip("_")
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("__")
        and not any("property" in ast.unparse(one) for one in node.decorator_list)
    ]
    short = [name for name in names if "_" not in name]
    assert len(short) / len(names) < 0.2


def test_a_docstring_begins_with_a_thing_or_a_verb() -> None:
    found = [
        f"{where(path, getattr(node, 'lineno', 1))}: {said.splitlines()[0]}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for said in [ast.get_docstring(node) or ""]
        if HEADLESS.match(said)
    ]
    assert found == []


def test_texts_say_that_something_is_not_a_file_rather_than_no_file() -> None:
    found = [
        f"{where(path, node.lineno)}: {phrase[0]}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for phrase in [IS_NO.search(re.sub(r"\s+", " ", node.value))]
        if phrase
    ]
    assert found == []


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
    pins = (ROOT / "infra/constraints.txt").read_text()
    pinned = set(re.findall(r"^([\w.-]+)==", pins, re.MULTILINE))
    assert len(re.findall(r"^[\w.-]+==\S+.* \\\n    --hash=sha256:", pins, re.MULTILINE)) == len(
        pinned
    )
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


def test_every_slow_test_has_a_make_target() -> None:
    words = set((ROOT / "Makefile").read_text().split())
    tests = (file for file in (ROOT / "tests").rglob("test_*.py") if file != Path(__file__))
    slow = [one.relative_to(ROOT) for one in tests if "pytest.mark.slow" in one.read_text()]
    assert len(slow) > 20
    left = [file for file in slow if not words & {str(file), str(file.parent)}]
    assert [file for file in left if file.parts[1] != "infra"] == [], "make check-infra runs those"


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_names_in_code_type_are_names_in_the_code(page: str) -> None:
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    known = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    known |= {node.id for node in nodes if isinstance(node, ast.Name)}
    known |= {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
    known |= {"utils"}  # which there must not be
    named = re.findall(r"`([A-Za-z_]\w+)`", (ROOT / page).read_text())
    assert len(named) > 10
    assert [name for name in named if name not in known] == []
