"""A schedule given instead of found, so that a benchmark on random weights prunes as a trained model does."""

from __future__ import annotations

from dataclasses import dataclass

from ..decisions import LEAVE, keep_best
from ..errors import PruningConfigError
from ..knobs import Choice, Integer, Layer, check_first_layer, knob
from ..method import Method, register
from .visipruner import SINKS, shallow_stage


@register("schedule")
@dataclass(frozen=True)
class Schedule(Method):
    """VisiPruner with its decisions given: all that its three stages compute is computed, and nothing is compared.

    Attributes:
        shallow_mid_layer: text reads no image in layers below it; 0: no shallow stage.
        select_layer: behind it the `keep` visual tokens with the longest shares stay.
        keep: visual tokens of the prompt, however many images.
        exit_layer: at its input they leave too; None: never.
        shallow_sink: layer 0's rule, `"first"` or `"half"`.

    Raises:
        PruningConfigError: layers out of order; 0 <= shallow_mid_layer < select_layer < exit_layer is needed.
    """

    shallow_mid_layer: int = knob(Layer(least=0))
    select_layer: int = knob(Layer())
    keep: int = knob(Integer())
    exit_layer: int | None = knob(Layer(optional=True, may_be_end=True, drops=True), None)
    shallow_sink: str = knob(Choice(tuple(SINKS)), "first")

    def treatments(self, num_layers):
        return shallow_stage(self.shallow_mid_layer, num_layers, self.shallow_sink)

    def looks_behind(self, num_layers):
        return range(self.shallow_mid_layer + 1, num_layers)

    def measure(self, view):
        return view.shares()

    def decide(self, layer, measured, trace):
        if layer == self.select_layer:
            return keep_best(measured["norm"], self.keep)
        return LEAVE if layer + 1 == self.exit_layer else None

    def __post_init__(self):
        super().__post_init__()
        layers = [self.shallow_mid_layer, self.select_layer, *([] if self.exit_layer is None else [self.exit_layer])]
        if layers != sorted(set(layers)):
            raise PruningConfigError(f"pruning config of 'schedule': layers {layers} must ascend")

    def validate_for(self, num_layers, first_layer=0):
        check_first_layer("select_layer", self.select_layer, 1, first_layer)
        return super().validate_for(num_layers, first_layer)
