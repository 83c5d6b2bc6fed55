"""One forward a prompt that tells how the first answer token would change if the image were treated otherwise.

The prompt is run once as it is. From the states at each layer copies go on in another way (`prune`'s forks), so that
layers below a boundary are not computed again for it. What comes out is what VTW, ShortV and VisiPruner are chosen by.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from llava.pruning import Method, PruningTrace, VisiPruner, prune
from llava.pruning.methods import VTW, ShortV
from llava.pruning.view import View

FIRST_WITHDRAWAL = 5
"""The first layer that VTW's own search tries (arXiv 2405.05803)."""


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        withdrawals: layers k: the image is gone from the input of layer k on (VTW).
        frozen: layers l: the image's rows are not updated in layer l alone (ShortV's layer contribution).
        boundaries: layers b: text reads no image below layer b (VisiPruner's shallow stage).
        sink: rule of the shallow stage for layer 0.
        shares: whether to record the shares of the last row, for VisiPruner's thresholds.
    """

    withdrawals: Sequence[int] = ()
    frozen: Sequence[int] = ()
    boundaries: Sequence[int] = ()
    sink: str = "first"
    shares: bool = True


@dataclass
class Measures:
    """Of one prompt; L layers, V visual rows, B boundaries and the run without one.

    Attributes:
        logits: of the first answer token, dense, float32 `[vocabulary]`.
        withdrawn: `KL(withdrawn || dense)` of the first answer token, natural logarithm, float64 `[withdrawals]`;
            its direction is that of VTW's search.
        frozen: the same with one layer frozen, `[frozen]`: ShortV's layer contribution.
        blind: `KL(dense || blind)`, `[boundaries]`.
        cosine, norm: the last row's shares, float32 `[1 + B, L, V]`: first of the dense run, then with each of the
            boundaries. NaN in layers below a boundary, where nothing may be selected.
        num_rows: N of the prompt.
        visual: positions of its visual rows, int64 `[V]`.
        image_spans: where each image lies, int64 `[images, 2]`.
    """

    logits: np.ndarray
    withdrawn: np.ndarray
    frozen: np.ndarray
    blind: np.ndarray
    cosine: np.ndarray
    norm: np.ndarray
    num_rows: int
    visual: np.ndarray
    image_spans: np.ndarray

    def trace(self) -> PruningTrace:
        """An empty trace of the prompt."""
        spans = [(int(first), int(stop)) for first, stop in self.image_spans]
        return PruningTrace(int(self.num_rows), self.visual.tolist(), spans)

    def save(self, path: Path) -> None:
        """Write them beside `path` and rename."""
        temporary = path.with_name(f".{path.name}")
        with open(temporary, "wb") as stream:
            np.savez(stream, **{each.name: getattr(self, each.name) for each in fields(self)})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Measures | None:
        """What `save` wrote; None: there is no such file, or it is broken."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(**{each.name: stored[each.name] for each in fields(cls)})
        except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error):
            return None


@dataclass(frozen=True)
class _Watch(Method):
    """Prunes nothing and keeps what VisiPruner would measure behind every layer from `first` on."""

    first: int = 0
    seen: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)

    def looks_behind(self, num_layers: int) -> Collection[int]:
        return range(self.first, num_layers)

    def decides_behind(self, num_layers: int) -> Collection[int]:
        return ()

    def measure(self, view: View) -> Mapping[str, torch.Tensor]:
        return view.shares()

    def decide(self, layer: int, measured: Mapping[str, np.ndarray] | None, trace: PruningTrace) -> None:
        if measured is not None:
            self.seen[layer] = measured


def divergence(of: torch.Tensor, against: torch.Tensor) -> np.ndarray:
    """`KL(of || against)` of distributions given as logits `[..., vocabulary]`: natural logarithm, float64."""
    p, q = of.double().log_softmax(-1), against.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).cpu().numpy()


@torch.inference_mode()
def measure(model: Any, wanted: Wanted, two: Mapping[str, Any], visual_mask: torch.Tensor | None = None) -> Measures:
    """Measure one prompt.

    Args:
        model: any that `prune` takes, in eval mode.
        two: what its forward takes for the prompt, twice in one batch: one goes on with the picture, and one does not
            read it. With no `boundaries` wanted once is enough.
        visual_mask: see `prune`.

    Raises:
        PruningConfigError: a layer that the model cannot be forked at.
    """
    dense = _Watch() if wanted.shares else None
    blind = VisiPruner(("shallow",), max(wanted.boundaries), shallow_sink=wanted.sink) if wanted.boundaries else None
    watches = [_Watch(first=boundary + 1) if wanted.shares else None for boundary in wanted.boundaries]
    forks: list[tuple[int, Method | None, int]] = [
        *((layer, VTW(layer), 0) for layer in wanted.withdrawals),
        *((layer, ShortV((layer,)), 0) for layer in wanted.frozen),
        *((boundary, watch, 1) for boundary, watch in zip(wanted.boundaries, watches, strict=True)),
    ]
    order = sorted(range(len(forks)), key=lambda number: forks[number][0])
    configs = [dense, blind] if blind is not None else [dense]
    with prune(model, configs, visual_mask=visual_mask, forks=[forks[number] for number in order]) as run:
        logits = model(**two, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    as_is = logits[0]
    ways = torch.empty_like(logits[len(configs) :])
    ways[order] = logits[len(configs) :]
    withdrawn, frozen, blinded = ways.split([len(wanted.withdrawals), len(wanted.frozen), len(wanted.boundaries)])
    trace = run.traces[0]
    shares = [watch.seen for watch in (dense, *watches) if watch is not None]
    num_layers = len(trace.rows_per_layer)
    return Measures(
        logits=as_is.cpu().numpy(),
        withdrawn=divergence(withdrawn, as_is),
        frozen=divergence(frozen, as_is),
        blind=divergence(as_is.expand_as(blinded), blinded),
        cosine=_stacked(shares, "cosine", num_layers, trace.num_visual),
        norm=_stacked(shares, "norm", num_layers, trace.num_visual),
        num_rows=trace.num_rows,
        visual=np.asarray(trace.visual_positions, dtype=np.int64),
        image_spans=np.asarray(trace.image_spans, dtype=np.int64).reshape(-1, 2),
    )


def _stacked(runs: Sequence[Mapping[int, Mapping[str, np.ndarray]]], name: str, layers: int, visual: int) -> np.ndarray:
    stacked = np.full((len(runs), layers, visual), np.nan, dtype=np.float32)
    for number, seen in enumerate(runs):
        for layer, measured in seen.items():
            stacked[number, layer] = measured[name]
    return stacked


def withdrawal_layer(divergences: np.ndarray, layers: Sequence[int], eta: float) -> int | None:
    """VTW's choice: the first layer whose mean divergence is at most `eta`; None where there is none.

    Args:
        divergences: `Measures.withdrawn` of every prompt, `[prompts, layers]`.
        layers: what they were measured at.
        eta: VTW's bound, natural logarithm; published for LLaVA-1.5-7B: 0.003.
    """
    means = divergences.mean(0)
    return next((layer for layer, mean in zip(layers, means, strict=True) if mean <= eta), None)


def contribution_order(contributions: np.ndarray) -> list[int]:
    """ShortV's order: layers from the least contribution to the greatest, ties to the lower layer.

    Args:
        contributions: `Measures.frozen` of every prompt and every layer, `[prompts, L]`.
    """
    return np.argsort(contributions.mean(0), kind="stable").tolist()
