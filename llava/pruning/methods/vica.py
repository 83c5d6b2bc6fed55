"""ViCA: visual rows are never updated, and text reads them in a few layers only (arXiv 2602.07574)."""

from __future__ import annotations

from dataclasses import dataclass

from ..decisions import Treatment
from ..knobs import Layers, knob
from ..method import Method, register

PUBLISHED_LAYERS, PUBLISHED_DEPTH = (0, 1, 7, 8, 9, 10, 11, 14), 32


@register("vica")
@dataclass(frozen=True)
class ViCA(Method):
    """No row leaves, and none is updated: a layer's keys and values of the image are those of the projected embeddings.

    Text reads them in `layers`. In all others text attends to text alone, as if there were no image, in the prefill
    and while decoding: there visual rows cost nothing and have no place in the cache.

    Written from the paper's description, not from its code: frozen rows, text's reading and the list of layers are its;
    that other layers do not count the image in their softmax, and the list for other depths, are ours. The paper trains
    models for it: on weights that were not, this is its cost and not its accuracy.

    Attributes:
        layers: where text reads the image, 0 … L-1, in any order; None: the published list, scaled to the model's depth
            (0, 1, 7-11 and 14 of 32).
    """

    layers: tuple[int, ...] | None = knob(Layers(least=0, optional=True), None)

    def treatments(self, num_layers):
        reading = self.reading_layers(num_layers)
        return [Treatment(update=False, present=layer in reading) for layer in range(num_layers)]

    def reading_layers(self, num_layers: int) -> set[int]:
        """The layers of a model of `num_layers` where text reads the image."""
        if self.layers is not None:
            return set(self.layers)
        return {layer * num_layers // PUBLISHED_DEPTH for layer in PUBLISHED_LAYERS}

    def describe(self, trace):
        num_layers = len(trace.rows_per_layer)
        reading = len(self.reading_layers(num_layers))
        return f"updated none of {trace.num_visual} visual tokens, text reads them in {reading} of {num_layers} layers"
