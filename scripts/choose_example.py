"""How the first example was chosen: texts in pictures, read from kept patches and from as many drawn at random.

``python scripts/choose_example.py`` asks the shipped model what the bundled pictures with a text say, and some held-out
ones. Of each it prints the answer with the recommended config and how many of eight random draws of the same size, from
the same layer on, answer something else. The first example is the bundled picture where all eight do: its text is the
longest, and a lost patch is a lost letter. The last line says how the held-out pictures fare, so that nobody takes the
example for the rule.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tiny_llava.measure import Sample, Shipped, rendered_samples

from llava.constants import SHIPPED_MODEL_PATH
from llava.examples import FOLDER
from llava.pruning.methods import Random

DRAWS = 8
QUESTION = "What does the text in the image say?"
TEXTS = {"scene_0.png": "l3", "scene_1.png": "zt", "scene_2.png": "6vm"}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=150, help="held-out pictures to look at; not all have a text")
    args = parser.parse_args(argv)
    bundled = [Sample(Image.open(FOLDER / name).convert("RGB"), QUESTION, text, name) for name, text in TEXTS.items()]
    held_out = [sample for sample in rendered_samples("test", args.pictures) if sample.task == "text"]
    samples = bundled + held_out
    model = Shipped()
    config = json.loads((Path(SHIPPED_MODEL_PATH) / "pruning_config.json").read_text(encoding="utf-8"))
    answers, traces = model.answer(samples, config)
    wrong = []
    for sample, answer, trace in zip(samples, answers, traces, strict=True):
        draws = []
        if trace.select_layer is not None:
            for seed in range(DRAWS):
                draws += model.answer([sample], Random(trace.num_kept, trace.select_layer + 1, seed))[0]
        wrong.append(sum(draw != sample.answer for draw in draws))
        print(f"{sample.task}: {sample.answer!r}, kept {trace.num_kept}: {answer!r}; at random: {draws}", flush=True)
    right = sum(answer == sample.answer for answer, sample in zip(answers, samples, strict=True) if sample in held_out)
    count = len(held_out)
    print(f"held out: {right} of {count} right, and {sum(wrong[len(bundled) :])} of {DRAWS * count} draws wrong")


if __name__ == "__main__":
    main()
