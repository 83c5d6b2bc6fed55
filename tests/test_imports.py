"""Who may import whom: no circles, and every package knows only what lies below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llava"

# The lowest rooms: no model in them.
BASE = {"constants", "conversation", "errors", "examples", "extras", "images", "mm_utils", "options", "utils"}
MODEL = {"model", "pruning", *BASE}
INFERENCE = {"inference", *MODEL}
# What each room may import beside itself. The first directory or file under `llava` is a room.
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(BASE, BASE),
    "__init__": set(),
    "pruning": {"utils"},
    "model": {"pruning", "constants", "errors", "extras", "mm_utils", "images", "conversation", "utils"},
    "inference": MODEL,
    "train": MODEL,
    "eval": INFERENCE,
    "calibrate": {"eval", *INFERENCE},
    "visualize": {"__init__", "eval", *INFERENCE},
    "integrations": {"eval", "serve", "serving", *INFERENCE},
    "serving": INFERENCE,
    "serve": {"serving", "visualize", *INFERENCE},
    "cli": {"__init__", *INFERENCE},  # and the programs, by name
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


class RunCode(ast.NodeTransformer):
    """Leaves out what is under `if TYPE_CHECKING`."""

    def visit_If(self, node: ast.If) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
        return self.generic_visit(node)


def imported(name: str, path: Path) -> Iterator[str]:
    """Modules of the project that one of them imports anywhere, in functions too; for type checkers alone is none."""
    parents = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    tree = RunCode().visit(ast.parse(path.read_text(encoding="utf-8")))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"  # a module, or a name in one
                found = inner if inner in MODULES else source
                if found in MODULES:
                    yield found


IMPORTS = {name: set(imported(name, path)) - {name} for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def circle_from(start: str) -> list[str] | None:
    """A way along imports that leads back to where it began."""
    ways, seen = [[start]], set()
    while ways:
        way = ways.pop()
        for target in sorted(IMPORTS[way[-1]]):
            if target == start:
                return [*way, start]
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return None


def test_every_room_is_known() -> None:
    assert {room_of(name) for name in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_circle(name: str) -> None:
    circle = circle_from(name)
    assert circle is None, " -> ".join(circle or [])


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_directions(room: str) -> None:
    wrong = {
        f"{name} -> {target}"
        for name in MODULES
        if room_of(name) == room
        for target in IMPORTS[name]
        if room_of(target) not in ALLOWED[room] | {room}
    }
    assert not wrong


def test_imports_are_found() -> None:
    """The tests above look at something."""
    assert {"llava.pruning", "llava.mm_utils", "llava.inference.answer"} <= IMPORTS["llava.inference.model"]
    assert "llava.visualize.patches" in IMPORTS["llava.visualize.draw"]  # relative
    assert "llava.serve.terminal" in IMPORTS["llava.serve.cli_pruning"]  # in a function
