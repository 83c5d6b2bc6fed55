"""PyramidDrop: stage by stage, what the coming layer would attend to stays (arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass

from ..decisions import keep_best
from ..knobs import Choice, Count, Layers, knob, refuse
from ..method import Method, number_to_keep, register


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(Method):
    """Before each of `layers` runs, the attention it would give from the last row ranks visual rows; the best stay.

    Attributes:
        layers: where rows leave, ascending, each 1 … L-1 (published: 8, 16, 24 of 32).
        keep: how many stay at each of them: a share of the original count in [0, 1], truncated, or tokens an image.
        positions: `"renumber"` (published): after each drop all rows are numbered from 0 again, and every layer goes on
            from the rows that it holds. `"keep"`: survivors keep their positions.
    """

    layers: tuple[int, ...] = knob(Layers(drops=True), (8, 16, 24))
    keep: tuple[int | float, ...] = (0.5, 0.25, 0.125)
    positions: str = knob(Choice(("renumber", "keep")), "renumber")

    def looks_behind(self, num_layers):
        return {layer - 1 for layer in self.layers}

    def measure(self, view):
        return {"attention": view.next_attention().mean(0)[0]}

    def decide(self, layer, measured, trace):
        if measured is None:
            return None
        keep = self.keep[self.layers.index(layer + 1)]
        count = int(trace.num_visual * keep) if isinstance(keep, float) else number_to_keep(keep, trace)
        return keep_best(measured["attention"], count)

    def __post_init__(self):
        super().__post_init__()
        listed = isinstance(self.keep, list | tuple) and len(self.keep) == len(self.layers)
        if not listed or not all(Count().fits(one, None) or one in (0.0, 1.0) for one in self.keep):
            refuse(
                "keep", self.keep, "a list with a share from 0 to 1 or a number of tokens an image for each of 'layers'"
            )
        object.__setattr__(self, "keep", tuple(self.keep))
