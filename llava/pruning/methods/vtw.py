"""VTW: visual tokens withdrawal (arXiv 2405.05803)."""

from __future__ import annotations

from dataclasses import dataclass

from ..method import LEAVE, Method, check, check_first_layer, check_layer, is_int, register


@register("vtw")
@dataclass(frozen=True)
class VTW(Method):
    """All visual rows leave at the input of layer `layer`, whatever they are.

    Attributes:
        layer: k, the first layer that runs without the image, 1 … L; L is dense (published: 15 or 16 of 32).
    """

    layer: int = 16

    def decide(self, layer, measured, trace):
        return LEAVE if layer + 1 == self.layer else None

    def __post_init__(self):
        check("layer", self.layer, is_int(self.layer, 1), "an integer from 1 to L (L layers)")

    def validate_for(self, num_layers, first_layer=0):
        check_layer("layer", self.layer, num_layers, most=num_layers)
        check_first_layer("layer", self.layer, 0, first_layer)
        return self
