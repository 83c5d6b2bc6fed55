"""FastV: what the last row attends to after a few layers stays (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass

from ..decisions import keep_best
from ..knobs import Count, Layer, knob
from ..method import Method, number_to_keep, register


@register("fastv")
@dataclass(frozen=True)
class FastV(Method):
    """The last row's attention in layer `layer` - 1, mean over heads, ranks visual rows; the best `keep` stay.

    Attributes:
        layer: K, the first layer that runs without the others, 1 … L-1 (paper: 2).
        keep: tokens an image, or a share of all, rounded half to even.
    """

    layer: int = knob(Layer(drops=True), 2)
    keep: int | float = knob(Count(), 288)

    def looks_behind(self, num_layers):
        return {self.layer - 1}

    def measure(self, view):
        return {"attention": view.attention().mean(0)[0]}

    def decide(self, layer, measured, trace):
        return keep_best(measured["attention"], number_to_keep(self.keep, trace)) if measured else None
