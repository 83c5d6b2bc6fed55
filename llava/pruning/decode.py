"""One forward of the decoder over new tokens: the same number of rows for every sample, no decisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers.cache_utils import DynamicCache

from . import varlen
from .attention import Tally, attend_behind, attend_one
from .cache import RaggedLayer
from .varlen import to_device


class Decoding:
    """The state of one forward over new tokens. Lives as long as the forward.

    Args:
        cache: the ragged cache of a pruned prompt.
        rotate: the decoder's rotary embedding, for prompts whose rows were numbered anew, so that every layer counts
            its own. Decoding of the others goes on at the unpruned length in all layers.
    """

    updated = None

    def __init__(self, cache: DynamicCache, rotate: Callable[..., tuple[torch.Tensor, ...]]):
        self.cache = cache
        self.rotate = rotate
        self.renumbered = cast(RaggedLayer, cache.layers[0]).lease.renumbered
        self._positions: tuple[list[int], torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    def enter_layer(self, layer: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        kwargs["attention_mask"] = None
        if any(self.renumbered):
            stored = cast(RaggedLayer, self.cache.layers[layer])
            ends = [length + gap for length, gap in zip(stored.lengths, stored.gaps, strict=True)]
            if self._positions is None or self._positions[0] != ends:
                first = to_device(ends, torch.int64, hidden.device)[:, None]
                own = first + torch.arange(hidden.shape[1], device=hidden.device)
                renumbered = to_device(self.renumbered, torch.bool, hidden.device)[:, None]
                position_ids = torch.where(renumbered, own, kwargs["position_ids"])
                self._positions = ends, position_ids, tuple(self.rotate(hidden, position_ids))
            _, kwargs["position_ids"], kwargs["position_embeddings"] = self._positions
        return hidden

    def leave(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def attend(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """`query` `[batch, heads, new, head_dim]`; keys and values are the layer's whole ragged storage."""
        stored = cast(RaggedLayer, self.cache.layers[layer])
        batch, _, new, head_dim = query.shape
        if new == 1 and (batch == 1 or stored.is_uniform):
            # One call for all, and no more operators than the unpatched model needs: a step is bound by their launches.
            if batch > 1:
                shape = (keys.shape[1], batch, stored.capacity[0], head_dim)
                keys, values = keys[0].view(shape).transpose(0, 1), values[0].view(shape).transpose(0, 1)
            start, length = stored.starts[0], stored.lengths[0]
            keys, values = keys.narrow(2, start, length), values.narrow(2, start, length)
            return attend_one(query, keys, values, scale).transpose(1, 2)
        if new == 1 and stored.cursor is not None and varlen.is_usable(query):
            segments = varlen.Segments(stored.cursor.offsets, max(stored.lengths))
            return varlen.attend_last(query, keys[0], values[0], segments, stored.cursor.lengths, scale)
        outputs, tally = [], Tally()
        for sample in range(batch):
            segment = stored.segment(sample)
            outputs.append(attend_behind(query[sample], keys[0, :, segment], values[0, :, segment], scale, tally))
        return torch.stack(outputs).transpose(1, 2)
