"""A schedule given instead of found, so that a benchmark on random weights prunes as a trained model does."""

from __future__ import annotations

from dataclasses import dataclass

from ..method import (
    LEAVE,
    Method,
    PruningConfigError,
    Read,
    Treatment,
    check,
    check_first_layer,
    is_int,
    keep_best,
    register,
)
from .visipruner import SINKS


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

    shallow_mid_layer: int
    select_layer: int
    keep: int
    exit_layer: int | None = None
    shallow_sink: str = "first"

    def treatment(self, layer):
        if layer >= self.shallow_mid_layer:
            return Treatment()
        return Treatment(SINKS[self.shallow_sink] if layer == 0 else Read.NO_IMAGE)

    def looks(self, layer):
        return layer > self.shallow_mid_layer

    def measure(self, view):
        return view.shares()

    def decide(self, layer, measured, trace):
        if layer == self.select_layer:
            return keep_best(measured["norm"], self.keep)
        return LEAVE if layer + 1 == self.exit_layer else None

    def __post_init__(self):
        check("keep", self.keep, is_int(self.keep, 0), "an integer from 0")
        check("shallow_sink", self.shallow_sink, self.shallow_sink in SINKS, f"one of {list(SINKS)}")
        layers = [self.shallow_mid_layer, self.select_layer, *([self.exit_layer] if self.exit_layer is not None else [])]
        if not all(isinstance(layer, int) for layer in layers) or sorted({-1, *layers}) != [-1, *layers]:
            raise PruningConfigError(
                f"schedule: layers {self.shallow_mid_layer} < {self.select_layer} < {self.exit_layer} must ascend from 0"
            )

    def validate_for(self, num_layers, first_layer=0):
        last = self.select_layer + 1 if self.exit_layer is None else self.exit_layer
        if last > num_layers:
            raise PruningConfigError(
                f"schedule: layers {self.shallow_mid_layer} < {self.select_layer} < {self.exit_layer} must ascend "
                f"within 0 … {num_layers}"
            )
        check_first_layer("select_layer", self.select_layer, 1, first_layer)
        return self
