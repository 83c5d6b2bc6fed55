"""SparseVLM: what the question's words attend to stays, and some of the rest is merged (arXiv 2410.04417)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from ..decisions import BEFORE_DECODER, Keep, keep_best
from ..knobs import Choice, Count, Integer, Layers, Number, knob, refuse
from ..method import Method, number_to_keep, register
from ..varlen import to_device

PUBLISHED_LAYERS = {"v1": (2, 6, 15, 19), "v1_5": (2, 6, 15), "v2": (2, 6, 15)}
# The lists of the published code for an average of 192 of 576 tokens a layer.
PUBLISHED_KEEP = {"v1": None, "v1_5": (300, 200, 110), "v2": (300, 200, 118)}


@register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(Method):
    """Raters are the text rows behind the image whose embeddings the image's are closer to than to the average.

    Behind each of `layers`, what the raters attend to ranks the visual rows, merged ones among them. Those of the
    largest scores stay; of the others the better 30 % are clustered, ten a cluster, and each cluster goes on as one
    more row behind them, the mean of its members' states, in the place of its centre.

    Attributes:
        variant: `"v1_5"`; `"v2"` (SparseVLM+) corrects scores by what distance alone does to them, ranks by `heads`
            heads, and merges nothing; `"v1"` keeps rank(attention) · `scale` + `bias` rows, and is here to be compared.
        layers: behind which rows leave, ascending, each 0 … L-1. None: as published, 2, 6 and 15 of 32, v1 also 19.
        keep: how many stay behind each of them, merged rows apart: tokens an image, or a share of the original count,
            rounded half to even. At least one row leaves. None: as published for an average of 192 tokens.
        positions: `"renumber"` (published for v1 and v1_5): after each drop all rows are numbered from 0 again, and
            every layer goes on from the rows that it holds. `"keep"` (published for v2): rows keep their positions, and
            merged ones take their centre's. None: as published.
        heads: of v2, those with the largest sums (published: 14, whatever the model).
        scale, bias: of v1's rule.
    """

    variant: str = knob(Choice(tuple(PUBLISHED_KEEP)), "v1_5")
    layers: tuple[int, ...] = knob(Layers(least=0, drops=True, behind=1, optional=True), None)  # settled below
    keep: tuple[int | float, ...] = None  # type: ignore[assignment]  # settled below
    positions: str | None = knob(Choice(("renumber", "keep"), optional=True), None)
    heads: int = knob(Integer(1), 14)
    scale: float = knob(Number(), 13.5)
    bias: float = knob(Number(above=-np.inf), 0.0)

    def looks_behind(self, num_layers):
        return {BEFORE_DECODER, *self.layers}

    def decides_behind(self, num_layers):
        return self.layers

    def measure(self, view):
        if view.layer == BEFORE_DECODER:
            image, text = view.hidden[view.visual], view.hidden[view.text[view.num_prefix :]]
            return {"raters": view.product(image, text.T).softmax(-1).mean(0)}
        votes = view.trace.measured_before["raters"]
        chosen = votes > votes.mean() if np.ptp(votes) else slice(None)
        raters, measured = view.rows.text[view.num_prefix :][chosen], {}
        weights = view.attention(raters)  # [heads, raters, visual]
        if self.variant == "v2":
            apart = view.rotary_scores(raters)
            sums = (weights := weights / apart).sum((1, 2))
            weights = weights[sums.sort(descending=True, stable=True).indices[: self.heads]]
            measured = {"heads": sums, "smallest": apart.min()}
        elif self.variant == "v1":
            measured = {"rank": torch.linalg.matrix_rank(weights.mean(0))}
        measured["attention"] = scores = weights.mean((0, 1))
        there = len(scores)
        count = self._count(view.layer, view.trace, measured)
        if self.variant == "v2" or count == there:
            return measured
        recycled = scores.sort(descending=True, stable=True).indices[count:][: int(0.3 * (there - count)) + 1]
        states = view.hidden[view.visual]
        centres, nearest = _clusters(states[recycled].float(), len(recycled) // 10 + 1)
        groups = nearest.new_full((there,), -1).scatter(0, recycled, nearest)
        view.trace.projection_flops += 2 * len(centres) * states.numel()  # of the means, see `decide`
        return {**measured, "centres": recycled[centres], "groups": groups}

    def decide(self, layer, measured, trace):
        if layer == BEFORE_DECODER or measured is None:
            return None
        if measured.get("smallest", 1) <= 0:
            warnings.warn(
                "the question is so far from the image that the scores of SparseVLM v2, divided by what rotary "
                "positions make of ones, change their signs; use variant 'v1_5'",
                stacklevel=2,
            )
        best = keep_best(measured["attention"], self._count(layer, trace, measured))
        if "centres" not in measured:
            return best if len(best.rows) < len(trace.alive) else None
        centres = measured["centres"].astype(int)
        members = measured["groups"] == np.arange(len(centres))[:, None]  # [merged, visual]
        means = torch.from_numpy(members / (members.sum(1, keepdims=True) + 1e-6))

        def merge(states):
            merged = to_device(means, torch.float32, states.device) @ states.float()
            kept = states[to_device(torch.from_numpy(best.rows), torch.int64, states.device)]
            return torch.cat([kept, merged.to(states.dtype)])

        groups = {centre: np.flatnonzero(own) for centre, own in zip(centres.tolist(), members, strict=True)}
        return Keep(np.concatenate([best.rows, centres]), merge, groups)

    def _count(self, layer, trace, measured):
        there = len(trace.alive)
        if self.variant == "v1":
            rank = int(measured["rank"])  # a transfer of its own; the other variants know their counts beforehand
            return there if rank == there else min(max(int(rank * self.scale + self.bias), 0), there - 1)
        return min(number_to_keep(self.keep[self.layers.index(layer)], trace), there - 1)

    def __post_init__(self):
        super().__post_init__()
        if self.layers is None:
            object.__setattr__(self, "layers", PUBLISHED_LAYERS[self.variant])
        if self.keep is None:
            object.__setattr__(self, "keep", PUBLISHED_KEEP[self.variant])
        if self.positions is None:
            object.__setattr__(self, "positions", "keep" if self.variant == "v2" else "renumber")
        listed = isinstance(self.keep, list | tuple) and len(self.keep) == len(self.layers)
        if self.variant != "v1" and not (listed and all(Count().fits(one, None) for one in self.keep)):
            refuse("keep", self.keep, "a list with a share or a number of tokens an image for each of 'layers'")


def _clusters(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Density peaks among `rows`, float32 [rows, hidden_size]: the rows that are centres, int64 [count], and of which
    of them each row is a member, int64 [rows]. The published code's random tie-breaking is left out."""
    # Of differences: the quadratic form errs by more than what the choices hang on.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") / rows.shape[1] ** 0.5
    density = (-distances.topk(count, largest=False).values.square().mean(1)).exp()
    denser = density > density[:, None]  # [row, other]
    apart = torch.where(denser, distances, torch.inf).amin(1)
    peaks = density * torch.where(denser.any(1), apart, distances.max())
    centres = peaks.sort(descending=True, stable=True).indices[:count]
    nearest = distances[:, centres].sort(dim=1, stable=True).indices[:, 0]
    return centres, nearest.scatter(0, centres, torch.arange(count, device=rows.device))
