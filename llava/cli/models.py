"""``visipruner models``: what ``--model-path`` takes."""

from __future__ import annotations

from collections.abc import Sequence

from llava.constants import SHIPPED_MODEL_PATH
from llava.errors import to_json
from llava.options import Parser

CHECKPOINTS = {
    "liuhaotian/llava-v1.5-7b": "LLaVA-1.5, 7 billion parameters; the published pruning config is its",
    "liuhaotian/llava-v1.5-13b": "LLaVA-1.5, 13 billion parameters",
    "liuhaotian/llava-v1.6-vicuna-7b": "LLaVA-1.6 (tiles), 7 billion parameters",
    "llava-hf/llava-1.5-7b-hf": "LLaVA-1.5, 7 billion parameters, in transformers' layout",
}
"""Some by name; any checkpoint of their layouts, and any model of the families, does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = Parser(description="Models that --model-path takes: the one that ships, hub ids, and model families.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    # Here, because torch and transformers take seconds to import.
    from llava.pruning.families import FAMILIES, REFUSED

    shipped = "ships with the package; 3.4 million parameters: coloured shapes and short texts"
    families = sorted(name for name, family in FAMILIES.items() if family.visual_token_keys)
    found = {
        "shipped": {str(SHIPPED_MODEL_PATH): shipped},
        "checkpoints": CHECKPOINTS,
        "families": families,
        "refused": REFUSED,
    }
    if args.json:
        print(to_json(found), end="")
        return 0
    print("Default of --model-path:")
    print(f"    {SHIPPED_MODEL_PATH}\n        {shipped}")
    print("LLaVA checkpoints of the original and the llava-hf layout, a folder or a hub id, such as:")
    for name, what in CHECKPOINTS.items():
        print(f"    {name:<34}{what}")
    print("Models of transformers' families (model_type in config.json), pruned as they are:")
    print(f"    {', '.join(families)}")
    print("Refused:")
    for name, why in REFUSED.items():
        print(f"    {name:<26}{why}")
    print("\ndocs/models.md says what is tested of each.")
    return 0
