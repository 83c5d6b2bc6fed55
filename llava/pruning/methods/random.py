"""Random: the floor that a choice has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..decisions import keep_best
from ..knobs import Count, Integer, Layer, knob
from ..method import Method, number_to_keep, register


@register("random")
@dataclass(frozen=True)
class Random(Method):
    """`keep` visual rows drawn at random stay, from the input of layer `layer` on.

    Attributes:
        keep: tokens an image, or a share of all, rounded half to even.
        layer: the first layer that runs without the others; 0: chosen before the decoder.
        seed: of the draw; prompts with equally many visual rows keep the same ones.
    """

    keep: int | float = knob(Count(), 64)
    layer: int = knob(Layer(least=0, drops=True), 0)
    seed: int = knob(Integer(), 0)

    def decide(self, layer, measured, trace):
        if layer + 1 != self.layer:
            return None
        scores = np.random.default_rng(self.seed).random(len(trace.alive))
        return keep_best(scores, number_to_keep(self.keep, trace))
