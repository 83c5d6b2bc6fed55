"""PyramidDrop: stage by stage, what the coming layer would attend to stays (arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass

from ..method import Method, check, check_first_layer, check_layer, is_int, keep_best, register


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(Method):
    """Before each of `layers` runs, the attention it would give from the last row ranks visual rows; the best stay.

    Attributes:
        layers: where rows leave, ascending, each 1 … L-1 (published: 8, 16, 24 of 32).
        keep: how many stay at each of them: a share of the original count in [0, 1], truncated, or a number of tokens.
        positions: `"renumber"` (published): after each drop all rows are numbered from 0 again, and every layer goes on
            from the rows that it holds. `"keep"`: survivors keep their positions.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    keep: tuple[int | float, ...] = (0.5, 0.25, 0.125)
    positions: str = "renumber"

    @property
    def renumbers(self):
        return self.positions == "renumber"

    def looks(self, layer):
        return layer + 1 in self.layers

    def measure(self, view):
        return {"attention": view.next_attention().mean(0)[0]}

    def decide(self, layer, measured, trace):
        if measured is None:
            return None
        keep = self.keep[self.layers.index(layer + 1)]
        return keep_best(measured["attention"], int(trace.num_visual * keep) if isinstance(keep, float) else keep)

    def __post_init__(self):
        layers, keep = self.layers, self.keep
        ok = isinstance(layers, list | tuple) and all(is_int(layer, 1) for layer in layers)
        check("layers", layers, ok and list(layers) == sorted(set(layers)), "a list of ascending layers from 1 to L-1")
        ok = isinstance(keep, list | tuple) and len(keep) == len(layers)
        ok = ok and all(is_int(one, 0) or (isinstance(one, float) and 0 <= one <= 1) for one in keep)
        check("keep", keep, ok, "a list with a share from 0 to 1 or a number of tokens for each of 'layers'")
        check("positions", self.positions, self.positions in ("renumber", "keep"), "'renumber' or 'keep'")
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "keep", tuple(keep))

    def validate_for(self, num_layers, first_layer=0):
        for layer in self.layers:
            check_layer("layers", layer, num_layers)
            check_first_layer("layers", layer, 0, first_layer)
        return self
