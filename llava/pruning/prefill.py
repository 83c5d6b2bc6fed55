"""One forward of the decoder over prompts, whose rows thin out from layer to layer.

The surviving rows of all samples travel packed one behind the other, without padding, so that every linear layer sees
exactly them. Attention looks at one sample at a time. Between two layers the method looks, decides, and rows leave.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from . import varlen
from .attention import Tally, attend_prompt
from .cache import CacheLease
from .decisions import BEFORE_DECODER, Cause, Keep, Treatment
from .errors import UnsupportedCallError
from .method import Method
from .rows import Rows
from .tower import Crop, Picture
from .trace import Decision, PruningTrace
from .view import Attended, ComingLayer, View


@dataclass(frozen=True)
class Plan:
    """What is known of a prompt's pruning before the prompt is.

    Attributes:
        method: decides; None: nothing is decided.
        treatments: what each layer does with the image.
        looks: layers behind which the method looks.
        renumbers: whether it numbers rows anew.
    """

    method: Method | None
    treatments: Sequence[Treatment]
    looks: Collection[int]
    renumbers: bool = False

    @classmethod
    def of(cls, method: Method | None, num_layers: int) -> Plan:
        if method is None:
            return cls(None, [Treatment()] * num_layers, ())
        return cls(method, method.treatments(num_layers), method.looks_behind(num_layers), method.renumbers)

    def renumbers_behind(self, layer: int) -> bool:
        return self.method is not None and self.method.renumbers_behind(layer, len(self.treatments))


@dataclass(frozen=True)
class Fork:
    """A copy of a prompt that goes its own way from one layer on, from the states that the prompt has there.

    Attributes:
        layer: the first that the copy runs by itself. Its method is asked from behind the layer before.
        plan: of the copy; what it says of earlier layers is not read.
        of: index of the prompt in the batch.
    """

    layer: int
    plan: Plan
    of: int = 0


@dataclass
class Sample:
    """One prompt on its way through the layers.

    Attributes:
        rows: those that are left.
        here: those of them that the current layer is given: all, or without the visual rows that sit it out.
        keep: what was decided behind the last layer and is not carried out yet.
        original: for a copy of a prompt (a beam), the first of its copies. It alone is measured and decides: beams
            take over each other's cache, so they must never differ, not even by rounding.
        gap: rows that have left since the rows were last numbered.
    """

    rows: Rows
    plan: Plan
    trace: PruningTrace
    keep: Keep | None = None
    attended: Attended | None = None
    original: Sample | None = None
    pictures: Sequence[Picture] = ()
    crops: Sequence[Crop] | None = None
    gap: int = 0
    here: Rows = field(init=False)

    def __post_init__(self) -> None:
        self.here = self.rows

    def treatment(self, layer: int) -> Treatment:
        """What `layer` does with the visual rows that it is given."""
        return self.plan.treatments[layer] if len(self.here.visual) else Treatment()

    def positions_here(self) -> np.ndarray:
        """Positions in the unpruned prompt of the rows in `here`, int64; -1: a row that stands for no patch."""
        text = np.setdiff1d(np.arange(self.trace.num_rows), self.trace.visual_positions, assume_unique=True)
        positions = np.empty(self.here.num_prompt, dtype=np.int64)
        positions[self.here.text], positions[self.here.visual] = text, self.here.positions
        return positions


@dataclass
class Prefill:
    """The state of one forward over prompts. Lives as long as the forward.

    Attributes:
        padding: leading rows of each sample that are padding, in the unpruned batch.
        lease: of the cache that takes up keys and values; None without a cache.
        layers: the decoder's layers.
        first_layer: the first layer at whose input rows may be missing.
        rotate: the decoder's rotary embedding, for rows that are numbered anew.
        final_norm: the norm behind the decoder's last layer, for methods that look through it.
        forks: copies that are made on the way; as further samples they come out behind the prompts, in the order of
            their layers. For forwards without a cache.
        updated: local indices of the packed rows that the current layer updates, int64; None: all.
    """

    samples: list[Sample]
    padding: list[int]
    lease: CacheLease | None
    layers: Sequence[Any]
    first_layer: int = 0
    rotate: Callable[..., tuple[torch.Tensor, ...]] | None = None
    final_norm: Callable[[torch.Tensor], torch.Tensor] | None = None
    forks: Sequence[Fork] = ()
    position_embeddings: tuple[torch.Tensor, ...] = ()
    position_ids: torch.Tensor | None = None
    counts_per_layer: list[list[int]] = field(default_factory=list)
    updated: torch.Tensor | None = None
    _segments: varlen.Segments | None = None  # of `counts`, made when needed
    _outside: tuple[torch.Tensor, torch.Tensor] | None = None  # all rows, and which of them the current layer has

    @property
    def counts(self) -> list[int]:
        """Rows of each sample in the current layer."""
        return [sample.here.count for sample in self.samples]

    # -- between layers ------------------------------------------------------------------------------------------

    def enter_layer(self, layer: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Rows for `layer`, `[1, rows of all samples, hidden_size]`; sets what goes with them in `kwargs`."""
        if layer == 0:
            hidden = self.pack(hidden)
            self.position_embeddings = tuple(self.pack(part) for part in kwargs["position_embeddings"])
            position_ids = kwargs.get("position_ids")
            self.position_ids = self.pack(position_ids[..., None])[..., 0] if position_ids is not None else None
        hidden = self._come_back(hidden)
        hidden = self._fork(layer, hidden)
        self._decide_behind(layer - 1, hidden)
        hidden = self._carry_out(layer - 1, hidden)
        if layer == 0:
            for sample in self.samples:
                sample.trace.projection_flops += sum(picture.flops for picture in sample.pictures)
                sample.pictures = ()  # read before the decoder only
        hidden = self._sit_out(layer, hidden, kwargs)
        kwargs["attention_mask"] = None
        counts = self.counts
        self.counts_per_layer.append(counts)
        self.updated = self._updated_rows(layer, hidden.device)
        for sample in self.samples:
            sample.trace.rows_per_layer.append(sample.here.count)
            frozen = 0 if sample.treatment(layer).update else len(sample.here.visual)
            sample.trace.updated_rows_per_layer.append(sample.here.count - frozen)
        if self.lease is not None:
            self.lease.coming = counts
            self.lease.gaps = [sample.gap + sample.rows.count - sample.here.count for sample in self.samples]
        return hidden

    def leave(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """After the last layer: the surviving rows as a left-padded batch, `[batch, longest, hidden_size]`."""
        self._decide_behind(layer, self._come_back(hidden))
        return self.unpack(hidden, self.counts_per_layer[-1])

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """`[batch or 1, width, ...]` → `[1, rows of all samples, ...]`, without padding."""
        if len(self.samples) == 1 and not self.padding[0]:
            return rows
        rows = rows.expand(len(self.samples), *rows.shape[1:])
        return torch.cat([rows[number, pad:] for number, pad in enumerate(self.padding)])[None]

    def unpack(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """`[1, rows of all samples, size]` → `[batch, longest, size]`, padded on the left with zeros."""
        if len(counts) == 1:
            return rows
        batch = rows.new_zeros(len(counts), max(counts), *rows.shape[2:])
        for number, part in enumerate(rows[0].split(list(counts))):
            batch[number, max(counts) - len(part) :] = part
        return batch

    def _sit_out(self, layer: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The rows that `layer` is given, and in `kwargs` their positions; the others wait for `_come_back`."""
        kwargs["position_embeddings"], kwargs["position_ids"] = self.position_embeddings, self.position_ids
        waiting, start = [], 0
        for sample in self.samples:
            sample.here = sample.rows
            if not sample.plan.treatments[layer].present:
                sample.here = sample.rows.without_visual()
                waiting.append(sample.rows.visual + start)
            start += sample.rows.count
        if not any(map(len, waiting)):
            return hidden
        here = np.setdiff1d(np.arange(start), np.concatenate(waiting), assume_unique=True)
        index = varlen.to_device(torch.from_numpy(here), torch.int64, hidden.device)
        self._outside, self._segments = (hidden, index), None
        kwargs["position_embeddings"] = tuple(_select_rows(part, index) for part in self.position_embeddings)
        if self.position_ids is not None:
            kwargs["position_ids"] = _select_rows(self.position_ids, index)
        return _select_rows(hidden, index)

    def _come_back(self, hidden: torch.Tensor) -> torch.Tensor:
        """What a layer gave, with the rows in their places that sat it out."""
        if self._outside is None:
            return hidden
        (whole, index), self._outside, self._segments = self._outside, None, None
        return whole.to(hidden.device).index_copy(1, index.to(hidden.device), hidden)

    # -- decisions -----------------------------------------------------------------------------------------------

    def _decide_behind(self, layer: int, hidden: torch.Tensor) -> None:
        """Show the method what stands behind `layer`, and ask what leaves. At most one transfer to the host."""
        measures: dict[int, dict[str, torch.Tensor]] = {}
        start = 0
        for number, sample in enumerate(self.samples):
            segment, start = slice(start, start + sample.rows.count), start + sample.rows.count
            method = sample.plan.method
            if method is None or layer not in sample.plan.looks or not self._asks(sample):
                continue
            view = View(
                layer,
                hidden[0, segment],
                sample.rows,
                sample.trace,
                sample.attended,
                self._coming(layer + 1, segment),
                sample.pictures if layer == BEFORE_DECODER else (),
                self.final_norm,
                sample.crops if layer == BEFORE_DECODER else None,
            )
            with torch.no_grad():  # a choice has no gradient
                measured = method.measure(view)
            if measured:
                measures[number] = dict(measured)
                at = max(layer, 0)
                sample.trace.score_pairs[at] += view.tally.scores
                sample.trace.value_pairs[at] += view.tally.values
        on_host = _to_host(measures)
        for number, sample in enumerate(self.samples):
            sample.attended = None
            if sample.original is not None:
                sample.keep = sample.original.keep
            elif self._asks(sample):
                self._decide(sample, layer, on_host.get(number))

    @staticmethod
    def _asks(sample: Sample) -> bool:
        """Whether a sample has a method of its own, and something left to decide about."""
        return sample.plan.method is not None and sample.original is None and len(sample.rows.visual) > 0

    def _coming(self, layer: int, segment: slice) -> ComingLayer:
        module = self.layers[layer] if layer < len(self.layers) else None
        return ComingLayer(module, tuple(part[:, segment] for part in self.position_embeddings))

    def _decide(self, sample: Sample, layer: int, measured: dict[str, np.ndarray] | None) -> None:
        trace, rows, method = sample.trace, sample.rows, sample.plan.method
        assert method is not None
        if measured and layer == BEFORE_DECODER:
            trace.measured_before = measured
        if measured and "cosine" in measured:
            trace.smallest_cosine[layer] = float(measured["cosine"].min())
        keep = method.decide(layer, measured, trace)
        if keep is None:
            return
        there = len(rows.visual)
        if len(np.unique(keep.rows)) < len(keep.rows) or (
            len(keep.rows) and not 0 <= keep.rows.min() <= keep.rows.max() < there
        ):
            raise ValueError(
                f"method {method.name!r} keeps rows {keep.rows.tolist()} behind layer {layer}; each must be one of the "
                f"{there} visual rows that are there, and be named once"
            )
        if layer + 1 < self.first_layer:
            raise UnsupportedCallError(
                f"the method drops rows at the input of layer {layer + 1}; this model needs every row up to layer "
                f"{self.first_layer - 1}, where the last image features join"
            )
        is_last = layer + 1 == len(self.layers)
        if is_last and keep.cause is Cause.EXIT:
            return  # nothing runs behind it
        positions = rows.positions
        groups = {int(positions[row]): positions[members].tolist() for row, members in (keep.groups or {}).items()}
        trace.decisions.append(
            Decision(layer, keep.cause, keep.positions(positions), groups, measured or {}, before=positions)
        )
        if not is_last:
            sample.keep = keep

    def _carry_out(self, behind: int, hidden: torch.Tensor) -> torch.Tensor:
        """Let the rows go that decisions behind layer `behind` drop, merge and number anew where they say so."""
        if all(sample.keep is None for sample in self.samples):
            return hidden
        sources: list[np.ndarray] = []
        merged: list[tuple[int, Rows, torch.Tensor]] = []
        renumbered = [False] * len(self.samples)
        start = 0
        for number, sample in enumerate(self.samples):
            rows, keep = sample.rows, sample.keep
            source = np.arange(rows.count)
            if keep is not None:
                renumbered[number] = sample.plan.renumbers_behind(behind)
                sample.gap = 0 if renumbered[number] else sample.gap + len(rows.visual) - len(keep.rows)
                left, source = rows.keeping(keep.rows)
                left.positions = keep.positions(rows.positions)
                if keep.from_tower is not None or keep.merge is not None:
                    states = hidden[0, start : start + rows.count][rows.visual_index(hidden.device)]
                    if keep.from_tower is not None:
                        states = keep.from_tower((sample.original or sample).pictures, states).to(hidden.device)
                    elif keep.merge is not None:
                        states = keep.merge(states)
                    merged.append((sum(len(source) for source in sources), left, states))
                sample.rows, sample.keep = left, None
            sources.append(source + start)
            start += rows.count
        everyone = self._index(sources, hidden.device)
        hidden = _select_rows(hidden, everyone)
        for begin, left, states in merged:
            hidden[0, begin : begin + left.count][left.visual_index(hidden.device)] = states.to(hidden.dtype)
        if any(renumbered):
            self._number_anew(renumbered, everyone, hidden)
        else:
            self._select_positions(everyone)
        return hidden

    def _fork(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Put copies behind the samples whose own way begins at `layer`."""
        forks = [fork for fork in self.forks if fork.layer == layer]
        if not forks:
            return hidden
        ends = np.cumsum([sample.rows.count for sample in self.samples])
        own = np.split(np.arange(ends[-1]), ends[:-1])
        everyone = self._index([*own, *(own[fork.of] for fork in forks)], hidden.device)
        for fork in forks:
            prompt = self.samples[fork.of]
            self.samples.append(replace(prompt, plan=fork.plan, trace=deepcopy(prompt.trace)))
        self._select_positions(everyone)
        return _select_rows(hidden, everyone)

    def _index(self, sources: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
        """Packed indices of the rows that every sample goes on with, given one by one; the layout changes."""
        self._segments = None
        return varlen.to_device(torch.from_numpy(np.concatenate(sources)), torch.int64, device)

    def _select_positions(self, rows: torch.Tensor) -> None:
        self.position_embeddings = tuple(_select_rows(part, rows) for part in self.position_embeddings)
        if self.position_ids is not None:
            self.position_ids = _select_rows(self.position_ids, rows)

    def _number_anew(self, renumbered: Sequence[bool], survivors: torch.Tensor, hidden: torch.Tensor) -> None:
        """Positions 0, 1, … for the rows of every sample that is `renumbered`; the others keep theirs."""
        if self.position_ids is None or self.rotate is None or self.position_ids.ndim != 2:
            raise UnsupportedCallError("this method numbers rows anew, and this model's layers are not told positions")
        kept = _select_rows(self.position_ids, survivors)[0].split([sample.rows.count for sample in self.samples])
        self.position_ids = torch.cat(
            [
                torch.arange(len(own), device=own.device, dtype=own.dtype) if anew else own
                for anew, own in zip(renumbered, kept, strict=True)
            ]
        )[None]
        self.position_embeddings = tuple(self.rotate(hidden, self.position_ids))

    # -- inside a layer ------------------------------------------------------------------------------------------

    def _updated_rows(self, layer: int, device: torch.device) -> torch.Tensor | None:
        """Packed indices of the rows that `layer` updates; None: all of them."""
        if all(sample.treatment(layer).update for sample in self.samples):
            return None
        frozen, start = [], 0
        for sample in self.samples:
            if not sample.treatment(layer).update:
                frozen.append(sample.here.visual + start)
            start += sample.here.count
        updated = np.setdiff1d(np.arange(start), np.concatenate(frozen), assume_unique=True)
        return varlen.to_device(torch.from_numpy(updated), torch.int64, device)

    def attend(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of every sample over its own rows; all tensors `[1, heads, rows of all samples, head_dim]`.

        Returns `[1, rows of all samples, heads, head_dim]`.
        """
        treatments = [sample.treatment(layer) for sample in self.samples]
        together = None
        if len(self.samples) > 1 and set(treatments) == {Treatment()} and varlen.is_usable(query):
            if self._segments is None:
                self._segments = varlen.Segments.of(self.counts, query.device)
            together = varlen.attend_packed(query[0], keys[0], values[0], self._segments, scale)
        outputs, start = [], 0
        forks_next = any(fork.layer == layer + 1 for fork in self.forks)  # a copy's method may look behind this layer
        for sample, treatment in zip(self.samples, treatments, strict=True):
            rows, tally = sample.here, Tally()
            segment = slice(start, start + rows.count)
            start += rows.count
            own = query[0, :, segment], keys[0, :, segment], values[0, :, segment]
            if together is None:
                output = attend_prompt(*own, scale, rows, treatment, tally)
                outputs.append(output)
            else:
                output = together[:, segment]
                tally.add(*own[:2])
            sample.trace.score_pairs[layer] += tally.scores
            sample.trace.value_pairs[layer] += tally.values
            sample.trace.visual_rows_read.append(treatment.read.visible(len(rows.visual)))
            if forks_next or (layer in sample.plan.looks and self._asks(sample)):
                sample.attended = Attended(*own, output, scale)
        if together is not None:
            return together.transpose(0, 1)[None]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return joined.transpose(0, 1)[None]


def _select_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return rows.index_select(1, index.to(rows.device))


def _to_host(measures: dict[int, dict[str, torch.Tensor]]) -> dict[int, dict[str, np.ndarray]]:
    """All measures of all samples in one transfer."""
    if not measures:
        return {}
    flat = [part.detach().float().flatten() for named in measures.values() for part in named.values()]
    pieces = iter(np.split(torch.cat(flat).cpu().numpy(), np.cumsum([len(part) for part in flat])[:-1]))
    return {
        number: {name: next(pieces).reshape(part.shape) for name, part in named.items()}
        for number, named in measures.items()
    }
