"""Random: the floor that a choice has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..method import Method, check, check_first_layer, check_keep, check_layer, is_int, keep_best, number_to_keep, register


@register("random")
@dataclass(frozen=True)
class Random(Method):
    """`keep` visual rows drawn at random stay, from the input of layer `layer` on.

    Attributes:
        keep: tokens an image, or a share of all, rounded half to even.
        layer: the first layer that runs without the others; 0: chosen before the decoder.
        seed: of the draw; prompts with equally many visual rows keep the same ones.
    """

    keep: int | float = 64
    layer: int = 0
    seed: int = 0

    def decide(self, layer, measured, trace):
        if layer + 1 != self.layer:
            return None
        scores = np.random.default_rng(self.seed).random(len(trace.alive))
        return keep_best(scores, number_to_keep(self.keep, trace))

    def __post_init__(self):
        check_keep(self.keep)
        check("layer", self.layer, is_int(self.layer, 0), "an integer from 0 to L-1 (L layers)")
        check("seed", self.seed, is_int(self.seed, 0), "an integer from 0")

    def validate_for(self, num_layers, first_layer=0):
        check_layer("layer", self.layer, num_layers, least=0)
        check_first_layer("layer", self.layer, 0, first_layer)
        return self
