"""`View`: what a method may look at between two layers. Nothing is computed before it is asked for, and never more
than the rows that are asked for: no [rows x rows] weights exist anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .attention import Tally
from .rows import Rows
from .shares import measure_largest_shares, measure_visual_shares
from .tower import Crop, Picture
from .trace import PruningTrace
from .varlen import to_device


class Attended(NamedTuple):
    """One prompt's attention in one layer, after rotary positions.

    Attributes:
        query, output: `[heads, rows, head_dim]`; output is before the output projection.
        keys, values: `[kv_heads, rows, head_dim]`.
        scale: of the scores.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor
    scale: float


@dataclass(frozen=True)
class ComingLayer:
    """The layer behind a view, before it runs.

    Attributes:
        module: transformers' decoder layer; None behind the last.
        position_embeddings: cosines and sines of the rows, each `[1, rows, head_dim]`.
    """

    module: Any
    position_embeddings: tuple[torch.Tensor, ...]


class View:
    """One prompt's rows between layer `layer` and the next.

    Attributes:
        layer: the layer that has run; -1: the decoder's input.
        hidden: `[rows, hidden_size]`, the rows' states.
        rows: which of them are visual (`rows.visual`, local indices) and which text (`rows.text`).
        trace: what was decided so far.
        num_prefix: text rows in front of the first image; `text[num_prefix:]` are those behind.
        tally: counts the pairs that were scored here, for `layer`.
    """

    def __init__(
        self,
        layer: int,
        hidden: torch.Tensor,
        rows: Rows,
        trace: PruningTrace,
        attended: Attended | None,
        coming: ComingLayer,
        pictures: Sequence[Picture] = (),
        final_norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
        crops: Sequence[Crop] | None = None,
    ):
        self.layer, self.hidden, self.rows, self.trace = layer, hidden, rows, trace
        self.num_prefix = trace.visual_positions[0] if trace.visual_positions else trace.num_rows
        self._attended, self._coming, self._pictures = attended, coming, pictures
        self._final_norm, self._crops = final_norm, crops
        self.tally = Tally()

    @property
    def attended(self) -> Attended:
        """Queries, keys, values and outputs of `layer`. There are none before the decoder."""
        if self._attended is None:
            raise ValueError("no layer has run before the decoder; look at `hidden`, or at what comes with `coming`")
        return self._attended

    @property
    def pictures(self) -> Sequence[Picture]:
        """What the vision tower made of each crop of this prompt (`needs_tower` methods, before the decoder)."""
        return self._pictures

    @property
    def crops(self) -> Sequence[Crop]:
        """Which visual rows show which crop (before the decoder). Rows that end a line of tiles are in none.

        Where nobody knows how an image lies in its rows, all of them are one crop.
        """
        if self._crops is not None:
            return self._crops
        images = enumerate(self.trace.alive_per_image)
        return [Crop(number, 1, rows, np.arange(len(rows))) for number, rows in images]

    @cached_property
    def text(self) -> torch.Tensor:
        """Local indices of the rows that are not visual, int64."""
        return self.rows.text_index(self.hidden.device)

    @cached_property
    def visual(self) -> torch.Tensor | slice:
        """Local indices of the visual rows: a slice where they lie in one stretch, else int64."""
        return self.rows.visual_index(self.hidden.device)

    @property
    def final_states(self) -> torch.Tensor:
        """`hidden` under the norm that stands behind the decoder's last layer, `[rows, hidden_size]`."""
        assert self._final_norm is not None
        return self._final_norm(self.hidden).to(self.hidden.device)

    @property
    def keys(self) -> torch.Tensor:
        """Keys of `layer` after rotary positions, `[kv_heads, rows, head_dim]`."""
        return self.attended.keys

    def attention(self, rows: Sequence[int] | np.ndarray | None = None) -> torch.Tensor:
        """Weights that `rows` (local indices; None: the prompt's last) put on the visual rows in `layer`.

        Returns:
            Float32 `[heads, len(rows), visual]`, after a softmax over all rows that each may see.
        """
        return self._weights(self._query_of(self.attended.query, rows), self.keys, rows, self.attended.scale)

    def next_attention(self, rows: Sequence[int] | np.ndarray | None = None) -> torch.Tensor:
        """What `attention` of the coming layer would be if every row went on into it.

        Costs that layer's norm and keys of all rows, and the queries of `rows`.
        """
        layer = self._coming.module
        if layer is None:
            raise ValueError("no layer comes behind the last")
        module, states = layer.self_attn, layer.input_layernorm(self.hidden[None])
        asking = states[:, self._asking(rows)]
        query, keys = (
            self._rotated(module, name, part, positions)
            for name, part, positions in (("q", asking, self._asking(rows)), ("k", states, slice(None)))
        )
        self.trace.projection_flops += 2 * states.shape[-1] * (query[0].numel() + keys[0].numel())
        return self._weights(query[0], keys[0], rows, module.scaling)

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`left @ right` in float32, entered into the trace as the method's own work."""
        self.trace.projection_flops += 2 * left.numel() * right.shape[-1]
        return left.float() @ right.float()

    def rotary_scores(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """What positions alone do: the scaled score of an all-one query in each of `rows` and an all-one key in each
        visual row under rotary positions, float32 `[len(rows), visual]`. Falls with the distance, and below 0."""
        cos, sin = (part.to(self.hidden.device).float() for part in self._coming.position_embeddings)
        ones = cos.new_ones(1, *cos.shape)
        turned = apply_rotary_pos_emb(ones, ones[:, :0], cos, sin)[0][0, 0]  # [rows, head_dim]
        return self.product(turned[self._asking(rows)], turned[self.visual].T) * self.attended.scale

    def shares(self, rows: torch.Tensor | None = None) -> Mapping[str, torch.Tensor]:
        """Each visual row's share of an attention output in `layer` (`shares.Shares`).

        Args:
            rows: whose output, local indices, int64; of several, each visual row's largest share. None: the prompt's
                last.
        """
        query, keys, values, output, scale = self.attended
        prompt = slice(0, self.rows.num_prompt)
        keys, values = keys[:, prompt], values[:, prompt]
        asking = 1 if rows is None else len(rows)
        self.tally.scores += query.shape[0] * asking * self.rows.num_prompt
        self.tally.values += query.shape[0] * asking * len(self.rows.visual)
        if rows is None:
            last = self.rows.num_prompt - 1
            shares = measure_visual_shares(query[:, last], keys, values, output[:, last], self.visual, scale)
        else:
            shares = measure_largest_shares(query[:, rows], keys, values, output[:, rows], self.visual, scale, rows)
        return shares._asdict()

    # -- inside --------------------------------------------------------------------------------------------------

    def _asking(self, rows: Sequence[int] | np.ndarray | None) -> torch.Tensor | slice:
        if rows is None:
            return slice(self.rows.num_prompt - 1, self.rows.num_prompt)
        return to_device(torch.as_tensor(rows), torch.int64, self.hidden.device)

    def _query_of(self, query: torch.Tensor, rows: Sequence[int] | np.ndarray | None) -> torch.Tensor:
        return query[:, self._asking(rows)]

    def _rotated(self, module: Any, name: str, states: torch.Tensor, positions: torch.Tensor | slice) -> torch.Tensor:
        """A projection of `states` under rotary positions, `[1, heads, rows, head_dim]`."""
        projected = getattr(module, f"{name}_proj")(states).view(*states.shape[:2], -1, module.head_dim)
        norm = getattr(module, f"{name}_norm", None)
        heads = (norm(projected) if norm is not None else projected).transpose(1, 2)
        cos, sin = (part.to(heads.device)[:, positions] for part in self._coming.position_embeddings)
        return apply_rotary_pos_emb(heads, heads[:, :0], cos, sin)[0]

    def _weights(
        self, query: torch.Tensor, keys: torch.Tensor, rows: Sequence[int] | np.ndarray | None, scale: float
    ) -> torch.Tensor:
        """Softmax weights on the visual rows, `[heads, asking rows, visual]`."""
        heads, asking, head_dim = query.shape
        keys = keys[:, : self.rows.num_prompt].float()
        self.tally.scores += heads * asking * keys.shape[1]
        grouped = query.float().reshape(keys.shape[0], -1, head_dim)  # [kv_heads, group * asking, head_dim]
        scores = (grouped @ keys.transpose(1, 2) * scale).view(heads, asking, -1)
        if rows is not None:
            seen = torch.arange(keys.shape[1], device=keys.device) <= self._asking(rows)[:, None]  # type: ignore[index]
            scores = scores.masked_fill(~seen, -torch.inf)
        return torch.softmax(scores, dim=-1)[:, :, self.visual]
