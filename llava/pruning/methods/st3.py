"""ST³: visual tokens leave a few at a time, layer after layer (arXiv 2412.20105)."""

from __future__ import annotations

from dataclasses import dataclass

from ..decisions import keep_best
from ..knobs import Count, Integer, Layer, check_first_layer, knob
from ..method import Method, number_to_keep, register


@register("st3")
@dataclass(frozen=True)
class ST3(Method):
    """From `layer` on, at every `stride`-th layer's input, the visual rows that the last row attends to least leave.

    Written from the paper's description, not from its code, and only its progressive pruning of the prompt: its
    annealing, which lets go of more while tokens are decoded, is left out. That little attended tokens leave step by
    step is its. The row that asks (the prompt's last, in the layer before, mean over heads, as FastV does), the steps
    (equally many rows each) and all defaults are ours, for the description leaves them open.

    Attributes:
        layer: the first layer that runs with fewer, 1 … L-1; None: an eighth of the model's, at least 1.
        stride: layers from one step to the next, from 1; None: an eighth of the model's, at least 1.
        keep: how many are left behind the last step: tokens an image, or a share of all, rounded half to even.
    """

    layer: int | None = knob(Layer(optional=True, drops=True), None)
    stride: int | None = knob(Integer(1, optional=True), None)
    keep: int | float = knob(Count(), 0.1)

    def steps(self, num_layers: int) -> range:
        """The layers at whose inputs rows leave, in a model of `num_layers`."""
        eighth = max(num_layers // 8, 1)
        return range(eighth if self.layer is None else self.layer, num_layers, self.stride or eighth)

    def looks_behind(self, num_layers):
        return {layer - 1 for layer in self.steps(num_layers)}

    def decides_behind(self, num_layers):
        return self.looks_behind(num_layers)

    def measure(self, view):
        return {"attention": view.attention().mean(0)[0]}

    def decide(self, layer, measured, trace):
        if measured is None:
            return None
        steps = self.steps(len(trace.score_pairs))
        leaving = trace.num_visual - number_to_keep(self.keep, trace)
        done = steps.index(layer + 1) + 1
        return keep_best(measured["attention"], trace.num_visual - leaving * done // len(steps))

    def validate_for(self, num_layers, first_layer=0):
        for layer in self.steps(num_layers)[:1]:
            check_first_layer("layer", layer, 0, first_layer)
        return super().validate_for(num_layers, first_layer)
