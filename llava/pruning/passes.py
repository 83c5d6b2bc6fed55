"""One forward of the decoder: a prefill, whose rows thin out from layer to layer, or a decoding step.

In a prefill the surviving rows of all samples travel packed one behind the other, without padding, so that every
linear layer sees exactly them. Attention looks at one sample at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from . import varlen
from .attention import Tally, attend_behind, attend_prompt
from .cache import RaggedLayer
from .errors import UnsupportedCallError
from .policy import Cause, Decision, Policy, Reading
from .probe import Probe, ProbeTensors, measure_visual_shares
from .rows import Rows
from .trace import PruningTrace


@dataclass
class Sample:
    """One prompt on its way through the layers.

    Attributes:
        original: for a copy of a prompt (a beam), the first of its copies. It alone is measured and decides: beams
            take over each other's cache, so they must never differ, not even by rounding.
    """

    rows: Rows
    policy: Policy
    trace: PruningTrace
    decision: Decision | None = None
    probe: ProbeTensors | None = None
    original: Sample | None = None


@dataclass
class Prefill:
    """The state of one forward over prompts. Lives as long as the forward.

    Attributes:
        padding: leading rows of each sample that are padding, in the unpruned batch.
        first_layer: the first layer at whose input rows may be missing.
    """

    samples: list[Sample]
    padding: list[int]
    cache: DynamicCache | None
    first_layer: int = 1
    position_embeddings: tuple[torch.Tensor, ...] = ()
    position_ids: torch.Tensor | None = None
    counts_per_layer: list[list[int]] = field(default_factory=list)
    _segments: varlen.Segments | None = None  # of `counts`, made when needed

    @property
    def counts(self) -> list[int]:
        """Rows of each sample in the current layer."""
        return [sample.rows.count for sample in self.samples]

    # -- between layers ---------------------------------------------------------------------------------------

    def enter_layer(self, layer: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Rows for `layer`, `[1, rows of all samples, hidden_size]`; sets what goes with them in `kwargs`."""
        if layer == 0:
            hidden = self.pack(hidden)
            self.position_embeddings = tuple(self.pack(part) for part in kwargs["position_embeddings"])
            position_ids = kwargs.get("position_ids")
            self.position_ids = self.pack(position_ids[..., None])[..., 0] if position_ids is not None else None
        else:
            self._settle(layer - 1)
            hidden = self._drop_rows(hidden)
        kwargs["position_embeddings"] = self.position_embeddings
        kwargs["position_ids"] = self.position_ids
        kwargs["attention_mask"] = None
        self.counts_per_layer.append(self.counts)
        for sample in self.samples:
            sample.trace.rows_per_layer.append(sample.rows.count)
        if self.cache is not None:
            cast(RaggedLayer, self.cache.layers[layer]).expect_prefill(self.counts)
        return hidden

    def leave(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """After the last layer: the surviving rows as a left-padded batch, `[batch, longest, hidden_size]`."""
        self._settle(layer)
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

    def _drop_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Take out the rows that the samples' decisions drop."""
        if not any(sample.decision is not None for sample in self.samples):
            return hidden
        survivors, start = [], 0
        for sample in self.samples:
            left, index = sample.rows, np.arange(sample.rows.count)
            if sample.decision is not None:
                left, index = sample.rows.without(sample.decision.keep)
                sample.decision = None
            survivors.append(index + start)
            start += sample.rows.count
            sample.rows = left
        self._segments = None
        everyone = varlen.to_device(torch.from_numpy(np.concatenate(survivors)), torch.int64, hidden.device)
        self.position_embeddings = tuple(_select_rows(part, everyone) for part in self.position_embeddings)
        if self.position_ids is not None:
            self.position_ids = _select_rows(self.position_ids, everyone)
        return _select_rows(hidden, everyone)

    # -- decisions --------------------------------------------------------------------------------------------

    def _settle(self, layer: int) -> None:
        """Ask the policies what `layer` decided. One transfer to the host, where anything was measured."""
        probed = [(number, sample.probe) for number, sample in enumerate(self.samples) if sample.probe is not None]
        measures: dict[int, Probe] = {}
        if probed:
            host = torch.cat([torch.stack(probe) for _, probe in probed], dim=1).detach().cpu().numpy()
            ends = np.cumsum([len(probe.cosine) for _, probe in probed])
            for (number, _), part in zip(probed, np.split(host, ends[:-1], axis=1), strict=True):
                measures[number] = Probe(*part)
        for number, sample in enumerate(self.samples):
            sample.probe = None
            if sample.original is not None:
                sample.decision = sample.original.decision
            elif len(sample.rows.visual):
                self._decide(sample, layer, measures.get(number))

    def _decide(self, sample: Sample, layer: int, probe: Probe | None) -> None:
        trace, rows = sample.trace, sample.rows
        if probe is not None:
            trace.smallest_cosine[layer] = float(probe.cosine.min())
        decision = sample.policy.decide(layer, len(rows.visual), probe)
        if decision is None:
            return
        if layer + 1 < self.first_layer:
            raise UnsupportedCallError(
                f"the policy drops rows at the input of layer {layer + 1}; this model needs every row up to layer "
                f"{self.first_layer - 1}, where the last image features join"
            )
        last = layer == len(trace.score_pairs) - 1
        if decision.cause is Cause.SELECTION:
            trace.select_layer = layer
            trace.kept_positions = rows.positions[decision.keep].tolist()
            if probe is not None:
                trace.selection_cosine, trace.selection_norm = probe.cosine, probe.norm
        elif not last:
            trace.exit_layer = layer + 1
        if not last:
            sample.decision = decision

    # -- inside a layer ---------------------------------------------------------------------------------------

    def attend(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of every sample over its own rows; all tensors `[1, heads, rows of all samples, head_dim]`.

        Returns `[1, rows of all samples, heads, head_dim]`.
        """
        readings = [sample.policy.reading(layer) if len(sample.rows.visual) else Reading.ALL for sample in self.samples]
        together = None
        if len(self.samples) > 1 and set(readings) == {Reading.ALL} and varlen.is_usable(query):
            if self._segments is None:
                self._segments = varlen.Segments.of(self.counts, query.device)
            together = varlen.attend_packed(query[0], keys[0], values[0], self._segments, scale)
        outputs, start = [], 0
        for sample, reading in zip(self.samples, readings, strict=True):
            rows, tally = sample.rows, Tally()
            segment = slice(start, start + rows.count)
            start += rows.count
            own = query[0, :, segment], keys[0, :, segment], values[0, :, segment]
            if together is None:
                output = attend_prompt(*own, scale, rows, reading, tally)
                outputs.append(output)
            else:
                output = together[:, segment]
                tally.add(*own[:2])
            if len(rows.visual) and sample.policy.needs_probe(layer):
                sample.probe = self._probe(rows, *own, output, scale, tally)
            sample.trace.score_pairs[layer] += tally.scores
            sample.trace.value_pairs[layer] += tally.values
            sample.trace.visual_rows_read.append(reading.visible(len(rows.visual)))
        if together is not None:
            return together.transpose(0, 1)[None]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return joined.transpose(0, 1)[None]

    @staticmethod
    def _probe(
        rows: Rows,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        scale: float,
        tally: Tally,
    ) -> ProbeTensors:
        last, prompt = rows.num_prompt - 1, slice(0, rows.num_prompt)
        heads = query.shape[0]
        tally.scores += heads * rows.num_prompt
        tally.values += heads * len(rows.visual)
        visual = rows.visual_index(query.device)
        return measure_visual_shares(query[:, last], keys[:, prompt], values[:, prompt], output[:, last], visual, scale)


def _select_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return rows.index_select(1, index.to(rows.device))


class Decoding:
    """The state of one forward over new tokens: the same number of rows for every sample, no decisions."""

    def __init__(self, cache: DynamicCache):
        self.cache = cache

    def enter_layer(self, layer: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        kwargs["attention_mask"] = None
        return hidden

    def leave(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def attend(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """`query` `[batch, heads, new, head_dim]`; keys and values are the layer's whole ragged storage."""
        stored = cast(RaggedLayer, self.cache.layers[layer])
        batch, heads, new, head_dim = query.shape
        if new == 1 and (batch == 1 or stored.is_uniform):
            # One call for all, and no more operators than the unpatched model needs: a step is bound by their launches.
            if batch > 1:
                shape = (keys.shape[1], batch, stored.capacity[0], head_dim)
                keys, values = keys[0].view(shape).transpose(0, 1), values[0].view(shape).transpose(0, 1)
            length = stored.lengths[0]
            keys, values = keys.narrow(2, 0, length), values.narrow(2, 0, length)
            output = nn.functional.scaled_dot_product_attention(
                query, keys, values, scale=scale, enable_gqa=heads != keys.shape[1]
            )
            return output.transpose(1, 2)
        if new == 1 and stored.cursor is not None and varlen.is_usable(query):
            segments = varlen.Segments(stored.cursor.offsets, max(stored.lengths))
            return varlen.attend_last(query, keys[0], values[0], segments, stored.cursor.lengths, scale)
        outputs, tally = [], Tally()
        for sample in range(batch):
            segment = stored.segment(sample)
            outputs.append(attend_behind(query[sample], keys[0, :, segment], values[0, :, segment], scale, tally))
        return torch.stack(outputs).transpose(1, 2)
