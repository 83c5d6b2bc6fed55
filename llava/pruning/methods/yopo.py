"""YOPO: no work for visual tokens in the last layers (arXiv 2410.06169)."""

from __future__ import annotations

from dataclasses import dataclass

from ..decisions import LEAVE
from ..knobs import Layer, knob, refuse
from ..method import Method, register


@register("yopo")
@dataclass(frozen=True)
class YOPO(Method):
    """The last `last` layers do no visual work: all visual rows leave at the input of the first of them.

    Written from the paper's description, not from its code, and only one of its four strategies: the neighbour-aware
    attention, the pruned heads and the sparse projections inside the layers before are left out. That text does not
    read the image there either, and how many layers it is, the description leaves open; both are ours. So this is
    `vtw` with `layer` counted from the model's end.

    Attributes:
        last: layers without visual work, 0 (dense) … L-1; None: a quarter of them, rounded down.
    """

    last: int | None = knob(Layer(least=0, optional=True), None)

    @property
    def is_dense(self):  # type: ignore[override]
        return self.last == 0

    def first_without(self, num_layers: int) -> int:
        """The first of the layers that run without the image."""
        return num_layers - (num_layers // 4 if self.last is None else self.last)

    def decides_behind(self, num_layers):
        return {self.first_without(num_layers) - 1}

    def decide(self, layer, measured, trace):
        return LEAVE if layer + 1 == self.first_without(len(trace.score_pairs)) else None

    def validate_for(self, num_layers, first_layer=0):
        super().validate_for(num_layers, first_layer)
        if self.first_without(num_layers) < first_layer:
            most = num_layers - first_layer
            refuse(
                "last",
                self.last,
                f"at most {most} for this model, whose image features join up to layer {first_layer - 1}",
            )
        return self
