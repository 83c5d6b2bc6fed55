"""Where the keys and values of running answers lie: one slab a layer, a segment of it for every answer.

Layers of a pruned prompt hold different numbers of rows, so every layer has a slab of its own. An answer gets its
segments once, with room for all the tokens that it may still get, and gives them back when it ends; nobody else's rows
move for that. Only where no gap is large enough does a slab become a larger one, in which the segments lie side by side
again: twice as large as long as the budget allows, so that a row is moved a bounded number of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from llava.pruning.cache import CacheLease, Cursor, RaggedLayer
from llava.pruning.varlen import to_device

MIN_ROWS = 1024
"""A slab's smallest size."""


class Segment:
    """Rows of a slab that belong to one answer.

    Attributes:
        start: its first row; changes when the slab is laid out anew.
        room: rows it has room for.
        filled: rows of the prompt that it holds.
        gap: positions up to the prompt's last that no row of this layer has, see `CacheLease.gaps`.
    """

    __slots__ = ("filled", "gap", "room", "start")

    def __init__(self, start: int, room: int, filled: int, gap: int = 0) -> None:
        self.start, self.room, self.filled, self.gap = start, room, filled, gap


class Slab:
    """One layer's keys and values, each `[rows, kv_heads, head_dim]`, and who has which rows."""

    def __init__(self, like: torch.Tensor) -> None:
        """`like`: keys of this layer, `[1, kv_heads, rows, head_dim]`."""
        shape = (0, like.shape[1], like.shape[3])
        self.keys, self.values = (like.new_empty(shape) for _ in range(2))
        self.segments: list[Segment] = []  # in the order in which they lie

    @property
    def rows(self) -> int:
        """Rows in use."""
        return sum(segment.room for segment in self.segments)

    @property
    def row_bytes(self) -> int:
        """Of one row, key and value."""
        return 2 * self.keys.element_size() * self.keys.shape[1] * self.keys.shape[2]

    def take(self, keys: torch.Tensor, values: torch.Tensor, room: int, gap: int, more_bytes: int) -> Segment:
        """A new segment with `room` for rows, the first of them these: `[kv_heads, rows, head_dim]`.

        `more_bytes`: what the slab may grow by beyond what it needs.
        """
        place = self._find(room)
        if place is None:
            self._lay_out(room, more_bytes // self.row_bytes)
            place = self._find(room)
            assert place is not None
        number, start = place
        segment = Segment(start, room, keys.shape[1], gap)
        self.segments.insert(number, segment)
        rows = slice(start, start + keys.shape[1])
        self.keys[rows], self.values[rows] = keys.transpose(0, 1), values.transpose(0, 1)
        return segment

    def give_back(self, segment: Segment) -> None:
        self.segments.remove(segment)

    def _find(self, room: int) -> tuple[int, int] | None:
        """The first gap that is large enough: the number of the segment before which it lies, and its first row."""
        end = 0
        for number, segment in enumerate(self.segments):
            if segment.start - end >= room:
                return number, end
            end = segment.start + segment.room
        return (len(self.segments), end) if len(self.keys) - end >= room else None

    def _lay_out(self, room: int, more_rows: int) -> None:
        """Move all segments side by side to the front of a slab with `room` behind them."""
        needed, there = self.rows + room, len(self.keys)
        # In a slab that is half empty gaps are the trouble and not the size.
        wanted = there if 2 * needed <= there else max(2 * there, MIN_ROWS)
        size = max(needed, min(wanted, there + max(more_rows, 0)))
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(size, *old.shape[1:])
            end = 0
            for segment in self.segments:
                new[end : end + segment.room] = old[segment.start : segment.start + segment.room]
                end += segment.room
            setattr(self, name, new)
        end = 0
        for segment in self.segments:
            segment.start, end = end, end + segment.room


class PooledLayer(RaggedLayer):
    """One layer of the cache as a decoding step sees it: the slab, and where the answers of this step lie in it."""

    def __init__(self, lease: CacheLease, slab: Slab) -> None:
        super().__init__(lease)
        self.slab = slab
        self.is_initialized = True
        self.dtype, self.device = slab.keys.dtype, slab.keys.device

    is_uniform = False  # type: ignore[assignment]  # segments of one size lie anywhere

    def begin(self, segments: Sequence[Segment], cursor: Cursor, decoded: Sequence[int]) -> None:
        """Stand before the step of answers that hold `decoded` rows behind their prompts'."""
        self.keys, self.values = (part.transpose(0, 1)[None] for part in (self.slab.keys, self.slab.values))
        self.starts = [segment.start for segment in segments]
        self.lengths = [segment.filled + more for segment, more in zip(segments, decoded, strict=True)]
        self.gaps = [segment.gap for segment in segments]
        self.cursor = cursor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take up one new row an answer, `[batch, kv_heads, 1, head_dim]`."""
        assert self.cursor is not None
        self.slab.keys.index_copy_(0, self.cursor.next_rows, key_states[:, :, 0])
        self.slab.values.index_copy_(0, self.cursor.next_rows, value_states[:, :, 0])
        self.lengths = [length + 1 for length in self.lengths]
        return self.keys, self.values


class Pool:
    """The slabs of all layers. They come with the first answer and go with the last.

    Args:
        budget: bytes that slabs may grow to for the sake of growing; what is needed they get.

    Attributes:
        lease: of the cache that decoding steps read.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.lease = CacheLease()
        self.slabs: list[Slab] = []

    @property
    def used_bytes(self) -> int:
        """Of all segments, the room for tokens that are still to come included."""
        return sum(slab.rows * slab.row_bytes for slab in self.slabs)

    @property
    def held_bytes(self) -> int:
        """Of all slabs."""
        return sum(len(slab.keys) * slab.row_bytes for slab in self.slabs)

    def take(self, cache: DynamicCache, sample: int, spare: int) -> list[Segment]:
        """Copy one prompt of a prefill's cache into segments with `spare` rows behind its own, one a layer."""
        layers: Any = cache.layers
        if not self.slabs:
            self.slabs = [Slab(layer.keys) for layer in layers]
        more_bytes = (self.budget - self.held_bytes) // len(self.slabs)
        taken: list[Segment] = []
        try:
            for slab, layer in zip(self.slabs, layers, strict=True):
                rows = layer.segment(sample)
                keys, values = layer.keys[0, :, rows], layer.values[0, :, rows]
                room = layer.lengths[sample] + spare
                taken.append(slab.take(keys, values, room, layer.gaps[sample], more_bytes))
        except BaseException:
            self.give_back(taken)
            raise
        return taken

    def give_back(self, segments: Sequence[Segment]) -> None:
        """Let an answer's segments go."""
        for slab, segment in zip(self.slabs, segments, strict=False):
            slab.give_back(segment)
        if not any(slab.segments for slab in self.slabs):
            self.slabs = []

    def cache(self, answers: Sequence[Sequence[Segment]], decoded: Sequence[int]) -> DynamicCache:
        """The cache of one decoding step.

        Args:
            answers: for each answer its segments.
            decoded: for each the rows that it got since the prefill.
        """
        starts, filled = (
            np.array([[getattr(segment, name) for segment in segments] for segments in answers], dtype=np.int64)
            for name in ("start", "filled")
        )  # [batch, layers]
        lengths = (filled + np.array(decoded)[:, None]).T
        ends = starts.T + lengths
        cache = DynamicCache()
        cache.layers = []
        by_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for number, slab in enumerate(self.slabs):
            device = slab.keys.device
            if device not in by_device:
                # What a kernel for ragged batches asks for: segments may lie in any order, so the last entry of the
                # offsets, the end of the last segment, is read by nobody.
                offsets = np.concatenate([starts.T, ends[:, -1:]], axis=1)
                by_device[device] = (
                    to_device(torch.from_numpy(np.ascontiguousarray(ends)), torch.int64, device),
                    to_device(torch.from_numpy(np.ascontiguousarray(lengths + 1)), torch.int32, device),
                    to_device(torch.from_numpy(offsets), torch.int32, device),
                )
            layer = PooledLayer(self.lease, slab)
            next_rows, new_lengths, offsets_of = by_device[device]
            cursor = Cursor(next_rows[number], new_lengths[number], offsets_of[number])
            layer.begin([segments[number] for segments in answers], cursor, decoded)
            cache.layers.append(layer)
        return cache
