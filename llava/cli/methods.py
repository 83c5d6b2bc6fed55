"""``visipruner methods``: the registered pruning methods and their knobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from importlib.metadata import entry_points
from typing import Any

from llava.errors import to_json
from llava.options import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = Parser(description="Pruning methods that --pruning-config takes by name, and their knobs.")
    parser.add_argument("name", nargs="*", help="only these (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    # Here, because torch takes seconds to import.
    from llava.pruning.method import ENTRY_POINTS, METHODS, method_named

    others = [entry.name for entry in entry_points(group=ENTRY_POINTS)]
    methods = {name: method_named(name) for name in args.name or sorted({*METHODS, *others})}
    found = {name: _about(method) for name, method in methods.items()}
    if args.json:
        print(to_json(found), end="")
        return 0
    for name, about in found.items():
        print(f"{name}: {about['does']}")
        for knob, values in about["knobs"].items():
            default = json.dumps(values["default"], ensure_ascii=False).replace("null", "none")
            print(f"    {knob:<20}{'needed' if values['needed'] else default:<20} {values['allowed']}".rstrip())
    example = {"method": "fastv", "layer": 3, "keep": 128}
    print(f"\nOne is chosen by its name: --pruning-config '{json.dumps(example)}'. docs/methods.md compares them.")
    return 0


def _about(method: Any) -> dict[str, Any]:
    does = " ".join((method.__doc__ or "").strip().split("\n\n")[0].split())
    return {"does": does, "knobs": {field.name: _knob(field) for field in fields(method)}}


def _knob(field: Field[Any]) -> dict[str, Any]:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    kind = field.metadata.get("kind")
    return {
        "needed": default is MISSING,
        "default": None if default is MISSING else default,
        "allowed": kind.allowed(None) if kind else "",
    }
