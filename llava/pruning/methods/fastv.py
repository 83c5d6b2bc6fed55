"""FastV: what the last row attends to after a few layers stays (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass

from ..method import Method, check, check_first_layer, check_keep, check_layer, is_int, keep_best, number_to_keep, register


@register("fastv")
@dataclass(frozen=True)
class FastV(Method):
    """The last row's attention in layer `layer` - 1, mean over heads, ranks visual rows; the best `keep` stay.

    Attributes:
        layer: K, the first layer that runs without the others, 1 … L-1 (paper: 2).
        keep: tokens an image, or a share of all, rounded half to even.
    """

    layer: int = 2
    keep: int | float = 288

    def looks(self, layer):
        return layer == self.layer - 1

    def measure(self, view):
        return {"attention": view.attention().mean(0)[0]}

    def decide(self, layer, measured, trace):
        return keep_best(measured["attention"], number_to_keep(self.keep, trace)) if measured else None

    def __post_init__(self):
        check("layer", self.layer, is_int(self.layer, 1), "an integer from 1 to L-1 (L layers)")
        check_keep(self.keep)

    def validate_for(self, num_layers, first_layer=0):
        check_layer("layer", self.layer, num_layers)
        check_first_layer("layer", self.layer, 0, first_layer)
        return self
