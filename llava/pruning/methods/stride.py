"""Stride: evenly spaced patches, the floor that a choice by content has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np

from ..decisions import Keep
from ..knobs import Count, Layer, knob
from ..method import Method, number_of, register


@register("stride")
@dataclass(frozen=True)
class Stride(Method):
    """Of each image's visual rows, `keep` stay that lie evenly in both directions, from the input of `layer` on.

    An image with a square number of rows is taken as that square grid: about sqrt(keep) evenly spaced lines, each with
    evenly spaced patches. The grid of any other (anyres tiles with newline rows, a merger's oblong) is not known here:
    even steps are taken along its sequence of rows, and so along what another method has left of an image.

    Attributes:
        keep: tokens an image, or a share of its rows, rounded half to even.
        layer: the first layer that runs without the others; 0: chosen before the decoder.
    """

    keep: int | float = knob(Count(), 64)
    layer: int = knob(Layer(least=0, drops=True), 0)

    def decide(self, layer, measured, trace):
        if layer + 1 != self.layer:
            return None
        kept = []
        for image in trace.alive_per_image:
            count, is_whole = number_of(self.keep, len(image)), np.ptp(trace.alive[image]) < len(image)
            kept.append(image[(evenly if is_whole else steps)(count, len(image))])
        return Keep(np.concatenate(kept))


def steps(count: int, of: int) -> np.ndarray:
    """`count` different numbers below `of`, evenly spaced and centred, int64."""
    return (2 * np.arange(count) + 1) * of // (2 * max(count, 1))


def evenly(count: int, of: int) -> np.ndarray:
    """`count` evenly spaced of the `of` patches of a square grid, else along the sequence; int64, ascending."""
    side, lines = isqrt(of), round(count**0.5)
    if side**2 != of or not lines:
        return steps(count, of)
    bounds = np.arange(lines + 1) * count // lines
    return np.concatenate(
        [line * side + steps(many, side) for line, many in zip(steps(lines, side), np.diff(bounds), strict=True)]
    )
