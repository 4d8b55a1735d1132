"""The structure of the code: which files exist, who imports whom, and how long functions are."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND_FLOOR = ["common", "conversation", "vision", "model", "data", "checkpoint", "distributed", "train", "eval_scienceqa",
                "chat"]  # fmt: skip
WINGS = ("demo", "tools")  # above the ground floor; formats is below it
IMPORTS_OF_WINGS = {  # all that the ground floor imports from above, each inside a function
    ("chat", "demo.world"), ("chat", "tools.answer"), ("conversation", "tools.pages"),
    ("distributed", "tools.fast_cpu"), ("eval_scienceqa", "demo.world"),
    ("eval_scienceqa", "tools.pages"), ("train", "demo.exam"), ("train", "demo.world"), ("train", "tools.plots"),
}  # fmt: skip
LONGEST = {"train": 90, "parse_arguments": 62}  # lines of a function; others have at most 60

FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for folder in (".", "formats", *WINGS) for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"}  # fmt: skip
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(tree: ast.AST) -> set[str]:
    """The files of this project that the statements below `tree` import."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & FILES.keys()


def at_import(tree: ast.Module) -> set[str]:
    """The files that a file imports when it is imported itself."""
    statements = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return set().union(*map(imports, statements))


def test_the_root_holds_the_ground_floor_only():
    assert {path.stem for path in ROOT.glob("*.py")} == set(GROUND_FLOOR)


def test_no_import_circle():
    """Also counting imports inside functions."""
    edges = {name: imports(tree) for name, tree in TREES.items()}
    edges = {name: {to for to in found if (name, to) not in IMPORTS_OF_WINGS} for name, found in edges.items()}
    while free := [name for name, found in edges.items() if not found & edges.keys()]:
        for name in free:
            del edges[name]
    assert not edges, f"these import each other in a circle: {edges}"


def test_the_ground_floor_looks_up_in_the_listed_lines_only():
    found = {(name, to) for name in GROUND_FLOOR for to in imports(TREES[name]) if to.startswith(WINGS)}
    assert found == IMPORTS_OF_WINGS
    for name, to in IMPORTS_OF_WINGS:
        assert to not in at_import(TREES[name]), f"{name}.py must import {to} inside a function"


def test_formats_import_nothing_from_above():
    for name in FILES:
        if name.startswith("formats."):
            assert all(to == "common" or to.startswith("formats.") for to in imports(TREES[name])), name


@pytest.mark.parametrize("name", sorted(FILES))
def test_functions_are_short(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST.get(node.name, 60), f"{name}.py {node.name} has {length} lines"


def test_every_file_has_a_header():
    for name, tree in TREES.items():
        assert ast.get_docstring(tree), f"{name} has no docstring"


def test_every_file_has_a_test_of_its_name():
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert {f"test_{name.split('.')[-1]}" for name in FILES} <= tests


def test_commands_of_the_wings_also_run_by_their_path():
    """`python tools/plan.py` finds the files above as `python -m tools.plan` does."""
    commands = [path for name, path in FILES.items() if name.startswith(WINGS) and "run_command(main)" in path.read_text()]
    for path in commands:
        assert f"for `python {path.relative_to(ROOT)}`\n" in path.read_text(), path
    done = subprocess.run([sys.executable, "tools/plan.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(commands) > 8, done.stderr


def test_contributing_lists_every_file():
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The house")[1].split("```")[1]
    listed = set(re.findall(r"^ *(\w+\.py) ", tree, re.MULTILINE))
    assert listed == {path.name for path in [*FILES.values(), *(ROOT / "bench").glob("*.py")]}
