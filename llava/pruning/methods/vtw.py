"""VTW: visual tokens withdrawal (arXiv 2405.05803)."""

from __future__ import annotations

from dataclasses import dataclass

from ..decisions import LEAVE
from ..knobs import Layer, knob
from ..method import Method, register


@register("vtw")
@dataclass(frozen=True)
class VTW(Method):
    """All visual rows leave at the input of layer `layer`, whatever they are.

    Attributes:
        layer: k, the first layer that runs without the image, 1 … L; L is dense (published: 15 or 16 of 32).
    """

    layer: int = knob(Layer(may_be_end=True, drops=True), 16)

    def decide(self, layer, measured, trace):
        return LEAVE if layer + 1 == self.layer else None
