"""How many calls of this project's own functions one pruned `generate` makes, before layer 0 and in all.

    python -m benchmarks.calls            # the shipped model, one picture, two new tokens
    python -m benchmarks.calls --list     # and each function with its count

Counts do not depend on the machine. Calls of transformers and torch are not counted; hooks and the attention function,
which they call, are.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import llava
from llava.constants import IMAGE_TOKEN_INDEX, SHIPPED_MODEL_PATH
from llava.conversation import build_prompt, conversation_mode
from llava.images import load_image
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

PACKAGE = str(Path(llava.__file__).parent)


class CallCounter:
    """Counts calls into the package while it is active, apart until `layer` is first entered."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.before, self.all = Counter[str](), Counter[str]()
        self._is_before = True
        # Registered last and run last: what other pre-hooks of the layer do stands before it.
        self._hook = layer.register_forward_pre_hook(self._entered)

    def _entered(self, *args: Any) -> None:
        self._is_before = False

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_name.startswith("<"):
            return
        function = getattr(code, "co_qualname", code.co_name)  # qualified from Python 3.11 on
        name = f"{Path(code.co_filename).relative_to(PACKAGE)}:{function}"
        self.all[name] += 1
        self.before[name] += self._is_before

    def __enter__(self) -> CallCounter:
        sys.setprofile(self._on_call)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.setprofile(None)
        self._hook.remove()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print every function with its counts")
    arguments = parser.parse_args(argv)
    tokenizer, model, processor, _ = load_pretrained_model(str(SHIPPED_MODEL_PATH), device="cpu")
    picture = load_image(str(sorted((Path(PACKAGE) / "assets" / "images").glob("*.png"))[0]))
    prompt = build_prompt(
        conversation_mode("tiny_llava", model.config), [("<image>\nWhat shape is in the image?", None)]
    )
    call = {
        "inputs": tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None],
        "images": process_images([picture], processor, model.config),
        "image_sizes": [picture.size],
        "pruning_config": f"@{SHIPPED_MODEL_PATH / 'pruning_config.json'}",
        "max_new_tokens": 2,
        "do_sample": False,
    }
    model.generate(**call)
    with CallCounter(model.get_decoder().layers[0]) as counter:
        model.generate(**call)
    files = {name.split(":")[0] for name in counter.all}
    print(f"calls before layer 0: {counter.before.total()}")
    print(f"calls in all: {counter.all.total()} into {len(counter.all)} functions in {len(files)} files")
    if arguments.list:
        for name, count in counter.all.most_common():
            print(f"{count:5d} {counter.before[name]:5d} {name}")


if __name__ == "__main__":
    main()
