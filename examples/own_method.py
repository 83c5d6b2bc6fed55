"""A pruning method of one's own, beside FastV at the same number of tokens.

python examples/own_method.py
"""

from dataclasses import dataclass

import numpy as np

from llava.constants import SHIPPED_MODEL_PATH
from llava.inference import LoadedModel, Turn, open_checkpoint
from llava.pruning import Keep, Method, register


@register("longest")  # now a config can name it: {"method": "longest", "keep": 24}
@dataclass(frozen=True)
class Longest(Method):
    """Behind layer `layer`, the `keep` visual rows with the longest shares in the last row's output stay."""

    layer: int = 4
    keep: int = 24

    def looks_behind(self, num_layers):
        return [self.layer]

    def measure(self, view):
        return view.shares()

    def decide(self, layer, measured, trace):
        if measured is None:  # a layer that it does not look behind
            return None
        longest = np.argsort(-measured["norm"])[: self.keep]
        return Keep(np.sort(longest))


checkpoint = open_checkpoint(SHIPPED_MODEL_PATH)
picture = checkpoint.read_picture(SHIPPED_MODEL_PATH.parent / "images" / "scene_2.png")
prompt = checkpoint.encode([Turn("What does the text in the image say?", [picture])])
model = LoadedModel(checkpoint)
for config in ({"method": "longest"}, {"method": "fastv", "layer": 5, "keep": 24}):
    answer = model.answer(prompt, checkpoint.pruning_config(config))
    print(f"{config['method']}: {answer.text}, {answer.kept} kept, {answer.flops_saved['executed']:.0%} FLOPs saved")
