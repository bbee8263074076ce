"""Figures of the code itself: `python tests/benchmarks/measure_house.py [CHECKOUT]`, one a line.

Covers: lines, modules, imports, names, as counted by `ast` over the three packages.
Not here: speed (the bench_*.py beside this file), the rules that a test holds
(tests/test_architecture.py).
"""

from __future__ import annotations

import ast
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("flows", "tasks", "evaclip_model")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def read_modules(checkout: Path) -> dict[Path, ast.Module]:
    """Every Python file of the three packages -> its tree."""
    files = (file for package in PACKAGES for file in sorted((checkout / package).rglob("*.py")))
    return {file: ast.parse(file.read_text()) for file in files}


def count_code_lines(file: Path, tree: ast.Module) -> int:
    """Lines that hold something other than comments, docstrings and blanks."""
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    }
    strings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    with file.open("rb") as content:
        lines = {
            line
            for token in tokenize.tokenize(content.readline)
            if token.type not in skipped
            for line in range(token.start[0], token.end[0] + 1)
        }
    return len(lines - strings)


def iterate_functions(tree: ast.Module) -> Iterator[Function]:
    """Functions and methods that carry a name of our choosing: no dunders, no properties."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("__") or any(map(is_property, node.decorator_list)):
            continue
        yield node


def is_property(decorator: ast.expr) -> bool:
    """True for `@property`, `@cached_property` and setters."""
    name = decorator.attr if isinstance(decorator, ast.Attribute) else decorator
    text = name if isinstance(name, str) else ast.unparse(name)
    return text.split("(")[0] in {"property", "cached_property", "setter"}


def count_words(name: str) -> int:
    """Words of a snake_case name."""
    return len([word for word in name.strip("_").split("_") if word])


def measure(checkout: Path) -> dict[str, float]:
    """Title -> figure."""
    modules = read_modules(checkout)
    names = {
        ".".join(file.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__"): file
        for file in modules
    }
    importers: Counter[str] = Counter()
    import_lines = code_lines = 0
    for file, tree in modules.items():
        code_lines += count_code_lines(file, tree)
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                import_lines += (node.end_lineno or node.lineno) - node.lineno + 1
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
            elif isinstance(node, ast.Import):
                found |= {one.name for one in node.names}
        importers.update(name for name in found if name in names and names[name] != file)
    functions = [one for tree in modules.values() for one in iterate_functions(tree)]
    one_word = [one for one in functions if count_words(one.name) < 2]
    classes = Counter(
        node.name
        for tree in modules.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    lines = sum(len(file.read_text().splitlines()) for file in modules)
    one_importer = [name for name in names if importers[name] == 1]
    return {
        "lines": lines,
        "code lines (no docstring, comment, blank)": code_lines,
        "modules": len(modules),
        "modules with one importer": len(one_importer),
        "imports, % of code lines": 100 * import_lines / code_lines,
        "functions (no dunders, no properties)": len(functions),
        "functions of one word, %": 100 * len(one_word) / len(functions),
        "class names with several meanings": sum(count > 1 for count in classes.values()),
    }


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2]
    for title, figure in measure(where).items():
        print(f"{title:45} {figure:>10,.1f}" if figure % 1 else f"{title:45} {figure:>10,.0f}")
