"""DART: a few pivots each keep the visual tokens least like them (arXiv 2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..decisions import Keep
from ..knobs import Choice, Count, Integer, Layer, knob
from ..method import Method, number_to_keep, register


@register("dart")
@dataclass(frozen=True)
class DART(Method):
    """Pivots are the rows of the largest keys (after rotary positions, L1 norm over all heads) in layer `layer` - 1.

    Pivot by pivot, the equal share of visual rows whose states differ most from the pivot's stays: by the cosine of the
    layer's outputs under the model's final norm. Several images are one pool.

    Attributes:
        layer: K, the first layer that runs without the others, 1 … L-1 (published: 2).
        keep: tokens an image, or a share of all, truncated. As published, the pivots share it in whole picks and the
            image pivots come on top, so that 128 keeps 132.
        image_pivots: visual rows that are pivots; they stay themselves.
        text_pivots: rows of the text behind the image that are pivots.
        exact: whether the image pivots count, and what does not divide goes to the first pivots, so that `keep` rows
            stay.
    """

    layer: int = knob(Layer(drops=True), 2)
    keep: int | float = knob(Count(), 128)
    image_pivots: int = knob(Integer(1), 4)
    text_pivots: int = knob(Integer(), 4)
    exact: bool = knob(Choice((False, True)), False)

    def looks_behind(self, num_layers):
        return {self.layer - 1}

    def measure(self, view):
        size = view.keys.float().abs().sum((0, 2))  # [rows]
        visual, text = torch.arange(len(size), device=size.device)[view.visual], view.text[view.num_prefix :]
        most = min(self.image_pivots, self._budget(view.trace)) if self.exact else self.image_pivots
        image = size[visual].sort(descending=True, stable=True).indices[:most]
        behind = size[text].sort(descending=True, stable=True).indices[: self.text_pivots]
        pivots = torch.cat([visual[image], text[behind]])
        states = torch.nn.functional.normalize(view.final_states.float(), dim=-1)
        cosines = view.product(states[pivots], states[visual].T)  # [pivots, visual]
        return {"key_norm": size[visual], "pivots": pivots, "image_pivots": image, "cosines": cosines}

    def decide(self, layer, measured, trace):
        if measured is None:
            return None
        pivots, image = measured["pivots"].astype(int).tolist(), measured["image_pivots"].astype(int)
        kept = np.zeros(len(trace.alive), dtype=bool)
        kept[image] = True
        budget = self._budget(trace) - len(image) * self.exact
        each, rest = divmod(min(budget, len(kept) - len(image)), max(len(pivots), 1))
        # Who chooses first matters. The published order is that of a CPython set of row numbers: arbitrary, but fixed.
        for turn, pivot in enumerate(set(pivots)):
            cosines = np.where(kept, np.inf, measured["cosines"][pivots.index(pivot)])
            kept[np.argsort(cosines, kind="stable")[: each + (self.exact and turn < rest)]] = True
        return Keep(kept)

    def _budget(self, trace):
        return int(trace.num_visual * self.keep) if isinstance(self.keep, float) else number_to_keep(self.keep, trace)
