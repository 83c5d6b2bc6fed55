"""ShortV: visual tokens are frozen in layers that do little with them (arXiv 2504.00502)."""

from __future__ import annotations

from dataclasses import dataclass

from ..decisions import Treatment
from ..knobs import Layers, knob
from ..method import Method, register


@register("shortv")
@dataclass(frozen=True)
class ShortV(Method):
    """No row leaves; in `frozen_layers` visual rows give keys and values, and their states go on unchanged.

    Attributes:
        frozen_layers: layers 0 … L-1, in any order (published for LLaVA-1.5-7B: 19 of 32).
    """

    frozen_layers: tuple[int, ...] = knob(Layers(least=0))

    def treatments(self, num_layers):
        return [Treatment(update=layer not in self.frozen_layers) for layer in range(num_layers)]

    @property
    def is_dense(self):  # type: ignore[override]
        return not self.frozen_layers

    def describe(self, trace):
        frozen = len(self.frozen_layers)
        return (
            f"kept all {trace.num_visual} visual tokens, not updated in {frozen} of {len(trace.rows_per_layer)} layers"
        )
