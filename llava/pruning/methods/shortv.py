"""ShortV: visual tokens are frozen in layers that do little with them (arXiv 2504.00502)."""

from __future__ import annotations

from dataclasses import dataclass

from ..method import Method, Treatment, check, check_layer, is_int, register


@register("shortv")
@dataclass(frozen=True)
class ShortV(Method):
    """No row leaves; in `frozen_layers` visual rows give keys and values, and their states go on unchanged.

    Attributes:
        frozen_layers: layers 0 … L-1, in any order (published for LLaVA-1.5-7B: 19 of 32).
    """

    frozen_layers: tuple[int, ...]

    def treatment(self, layer):
        return Treatment(update=layer not in self.frozen_layers)

    def __post_init__(self):
        layers = self.frozen_layers
        ok = isinstance(layers, list | tuple) and all(is_int(layer, 0) for layer in layers)
        check("frozen_layers", layers, ok and len(set(layers)) == len(layers), "a list of different layers from 0 to L-1")
        object.__setattr__(self, "frozen_layers", tuple(layers))

    def validate_for(self, num_layers, first_layer=0):
        for layer in self.frozen_layers:
            check_layer("frozen_layers", layer, num_layers, least=0)
        return self

    @property
    def is_dense(self):
        return not self.frozen_layers

    def describe(self, trace):
        frozen = len(self.frozen_layers)
        return f"kept all {trace.num_visual} visual tokens, not updated in {frozen} of {len(trace.rows_per_layer)} layers"
