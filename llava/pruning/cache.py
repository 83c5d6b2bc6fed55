"""The KV cache of a pruned prompt: every layer, and every sample in it, has its own number of rows.

Samples lie one behind the other along the row axis, each in a segment of its own. Nothing is padded, and a
pruned row never gets a place. The prefill's keys and values are kept as they come; the first decoded token
moves them once into a buffer with spare rows, which then grows by a share of its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from .varlen import Segments, to_device

# Spare rows a segment gets when it is full: at least this many, and at least an eighth of what it holds, so
# that a row is copied a bounded number of times however long the answer gets.
MIN_SPARE_ROWS = 64
SPARE_SHARE = 8


class CacheLease:
    """What the engine that filled a cache remembers of it. One a cache.

    Attributes:
        active: whether that engine is still in charge.
        last_positions: int64 [(axes,) batch or 1, 1], the position of each sample's last row. Layers hold fewer rows
            than that, so it cannot be told from their lengths.
        renumbered: for each sample, whether its rows may be numbered anew, so that a new row's position in a layer
            is the number of rows that the layer holds and of those that left since they were last numbered.
        coming: rows of each sample that a prefill's next layer takes up.
        gaps: rows of each sample that left since they were last numbered, at a prefill's next layer.
    """

    def __init__(self) -> None:
        self.active = True
        self.last_positions: torch.Tensor | None = None
        self.renumbered: list[bool] = []
        self.coming: list[int] = []
        self.gaps: list[int] = []

    def note_positions(self, position_ids: torch.Tensor | None, width: int, device: torch.device | None = None) -> None:
        """Remember where the rows of a call end, for a loop by hand, which gives no `position_ids` of its own."""
        if position_ids is None:
            self.last_positions = torch.full((1, 1), width - 1, device=device)
        else:
            self.last_positions = position_ids[..., -1:]

    def following_positions(self, width: int) -> torch.Tensor | None:
        """Positions of the next `width` rows, int64 [(axes,) batch or 1, width]; None where nothing was noted."""
        if self.last_positions is None:
            return None
        return self.last_positions + torch.arange(1, width + 1, device=self.last_positions.device)


@dataclass
class Cursor:
    """Where the samples of a batch end, on the device: a decoding step needs no word from the host.

    Attributes:
        next_rows: int64 [batch], the row that each sample's next token goes to.
        lengths: int32 [batch], rows that each sample holds.
        offsets: int32 [batch + 1], where segments begin and end.
    """

    next_rows: torch.Tensor
    lengths: torch.Tensor
    offsets: torch.Tensor

    def advance(self, rows: int) -> None:
        self.next_rows += rows
        self.lengths += rows


class RaggedLayer(DynamicLayer):
    """One layer's keys and values, `[1, kv_heads, rows of all samples, head_dim]`.

    Attributes:
        lengths: rows each sample holds.
        starts: where each sample's segment begins. Its spare rows lie behind its rows.
        gaps: positions up to each sample's last that no row of this layer has, see `CacheLease.gaps`.
    """

    keys: torch.Tensor  # type: ignore[assignment]  # None until the first update, as in the parent class
    values: torch.Tensor  # type: ignore[assignment]

    def __init__(self, lease: CacheLease):
        super().__init__()
        self.lease = lease
        self.lengths: list[int] = []
        self.starts: list[int] = []
        self.gaps: list[int] = []
        self.cursor: Cursor | None = None  # with more than one sample, from the first decoded token on

    # -- what the engine calls ------------------------------------------------------------------------------

    def segment(self, sample: int) -> slice:
        """Where `sample`'s rows lie on the row axis."""
        return slice(self.starts[sample], self.starts[sample] + self.lengths[sample])

    @property
    def capacity(self) -> list[int]:
        """Rows each segment has room for."""
        ends = [*self.starts[1:], self.keys.shape[2]]
        return [end - start for start, end in zip(self.starts, ends, strict=True)]

    @property
    def is_uniform(self) -> bool:
        """Whether all samples hold the same number of rows in segments of one size."""
        return len(set(self.lengths)) == 1 and len(set(self.capacity)) == 1

    # -- transformers' interface ----------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take up new rows and return all, both `[1, kv_heads, rows, head_dim]`.

        During prefill the new rows are packed, `[1, kv_heads, rows of all samples, head_dim]`; afterwards they
        are `[batch, kv_heads, new, head_dim]`, the same number for every sample.

        Raises:
            RuntimeError: the `prune` block that filled this cache has ended.
        """
        if not self.lease.active:
            raise RuntimeError(
                "this KV cache holds a pruned prompt, and the `prune` block or call that filled it has ended; "
                "prefill the prompt anew, or continue inside the block"
            )
        if not self.is_initialized:
            self.lengths = list(self.lease.coming)
            self.starts = _starts(self.lengths)
            self.gaps = list(self.lease.gaps)
            self.keys, self.values = key_states, value_states
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            return self.keys, self.values

        batch, _, new, _ = key_states.shape
        if any(length + new > room for length, room in zip(self.lengths, self.capacity, strict=True)):
            self._grow(new)
        if batch == 1:
            self.keys.narrow(2, self.lengths[0], new).copy_(key_states)
            self.values.narrow(2, self.lengths[0], new).copy_(value_states)
        else:
            assert self.cursor is not None
            rows = self.cursor.next_rows
            if new > 1:
                rows = (rows[:, None] + torch.arange(new, device=self.device)).flatten()  # [batch * new]
            for store, states in ((self.keys, key_states), (self.values, value_states)):
                packed = states.transpose(0, 1).flatten(1, 2)  # [kv_heads, batch * new, head_dim]
                store[0].index_copy_(1, rows, packed)
            self.cursor.advance(new)
        self.lengths = [length + new for length in self.lengths]
        return self.keys, self.values

    def _grow(self, new: int) -> None:
        """Move every segment into a larger buffer."""
        # The same for all, so that all are full at once and equal samples stay uniform.
        spare = max(MIN_SPARE_ROWS, min(self.lengths) // SPARE_SHARE)
        rooms = [length + new + spare for length in self.lengths]
        starts = _starts(rooms)
        old_segments = [self.segment(sample) for sample in range(len(self.lengths))]
        for name in ("keys", "values"):
            old = getattr(self, name)
            store = old.new_empty(1, old.shape[1], sum(rooms), old.shape[3])
            for start, rows in zip(starts, old_segments, strict=True):
                store[:, :, start : start + rows.stop - rows.start] = old[:, :, rows]
            setattr(self, name, store)
        self.starts = starts
        self._place_cursor()

    def _place_cursor(self) -> None:
        device = self.keys.device
        if len(self.starts) > 1:
            ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
            self.cursor = Cursor(
                to_device(ends, torch.int64, device),
                to_device(self.lengths, torch.int32, device),
                Segments.of(self.capacity, device).offsets,
            )

    def get_seq_length(self) -> int:
        """Rows this layer really holds; with a batch, the longest sample's."""
        return max(self.lengths, default=0)

    def reset(self) -> None:
        super().reset()
        self.cursor = None
        self.is_initialized = False
        self.lengths, self.starts = [], []

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` rows of every sample (what assisted decoding rejects)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: {tokens_to_remove} is not supported; a negative number of rows to remove is needed"
            )
        self.lengths = [length + tokens_to_remove for length in self.lengths]
        if self.cursor is not None:
            self.cursor.advance(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let sample b go on from what sample `beam_idx[b]` holds. Both must hold equally many rows."""
        if not self.lengths:
            return
        order = beam_idx.to(self.keys.device)
        rooms = self.capacity
        starts = to_device(self.starts, torch.int64, self.keys.device)
        sizes = to_device(rooms, torch.int64, self.keys.device)
        shift = (starts[order] - starts).repeat_interleave(sizes, output_size=sum(rooms))
        source = torch.arange(sum(rooms), device=self.keys.device) + shift
        self.keys = self.keys.index_select(2, source)
        self.values = self.values.index_select(2, source)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([sample for sample in range(len(self.lengths)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(len(self.lengths))[indices.cpu()].tolist())

    def _select(self, samples: list[int]) -> None:
        """Become a batch of copies of `samples`."""
        segments = [self.segment(sample) for sample in samples]
        self.keys = torch.cat([self.keys[:, :, rows] for rows in segments], dim=2)
        self.values = torch.cat([self.values[:, :, rows] for rows in segments], dim=2)
        self.lengths = [self.lengths[sample] for sample in samples]
        self.gaps = [self.gaps[sample] for sample in samples]
        self.starts = _starts(self.lengths)
        self._place_cursor()

    def offload(self) -> None:
        raise RuntimeError("an offloaded KV cache cannot hold a pruned prompt; use the default cache_implementation")

    prefetch = offload


def make_ragged(cache: DynamicCache) -> CacheLease:
    """Turn an empty `DynamicCache` into a ragged one, in place; layers come as they are filled. Returns its lease."""
    lease = CacheLease()
    cache.layers, cache.layer_class_to_replicate = [], partial(RaggedLayer, lease)  # type: ignore[assignment]
    return lease


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths[:-1]:
        starts.append(starts[-1] + length)
    return starts
