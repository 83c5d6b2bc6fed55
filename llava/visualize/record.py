"""Recording what chosen rows of a prompt, and generated tokens, read and wrote in every layer.

Hooks on the decoder's layers and on their projections recompute, for the rows that are asked for and no others,
what fused attention never shows. One row of weights a layer is kept, never a [rows x rows] matrix, so that a
prompt with thousands of visual rows can be looked at wherever it can be run. Pruned and dense runs are recorded
alike: weights are those that were really used, after a stage took some of them away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.pruning.decisions import Read
from llava.pruning.families import adapter_for
from llava.pruning.prefill import Prefill
from llava.pruning.shares import measure_visual_shares
from llava.utils import UserError


@dataclass
class RowRecord:
    """One row through the layers (L). Entries of layers that the row did not reach are NaN.

    Attributes:
        position: of the row, in the unpruned prompt with the answer behind it.
        hidden: float32 [L + 1, hidden_size]; entry 0 is the input of layer 0, entry i + 1 what layer i gave,
            before the final norm.
        attention: float32 [L, heads, position + 1]: weight on each position as it was used; 0 on rows that were
            pruned. A row sums to 1, or to less where the shallow stage took the image's share away.
        values: float32 [L, kv_heads, head_dim], the row's own value vectors.
        output: float32 [L, heads, head_dim], attention output before the output projection.
        image_output: the part of `output` that came from visual rows, the same shape.
        cosine, norm: float32 [L, visual rows], the probe's measures (`llava.pruning.shares`) of each visual row's
            share in `output`; NaN where there is no such row or the image is not freely read.
    """

    position: int
    hidden: np.ndarray
    attention: np.ndarray
    values: np.ndarray
    output: np.ndarray
    image_output: np.ndarray
    cosine: np.ndarray
    norm: np.ndarray


@dataclass
class Recording:
    """What `record` gives.

    Attributes:
        is_visual: bool [N], which rows of the prompt are visual.
        num_layers: L.
        rows: the records of the rows that were asked for and came by, by position.
        present: bool [L, N], the prompt's rows that each layer processed.
        value_l1: float32 [L, N], L1 norm of each prompt row's value vectors (all KV heads); NaN where it was
            pruned.
    """

    is_visual: np.ndarray
    num_layers: int
    rows: dict[int, RowRecord] = field(default_factory=dict)
    present: np.ndarray = field(init=False)
    value_l1: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.present = np.zeros((self.num_layers, len(self.is_visual)), dtype=bool)
        self.value_l1 = np.full((self.num_layers, len(self.is_visual)), np.nan, dtype=np.float32)

    @property
    def num_rows(self) -> int:
        """N, rows of the prompt."""
        return len(self.is_visual)

    @property
    def visual_positions(self) -> np.ndarray:
        return np.flatnonzero(self.is_visual)

    def row(self, position: int) -> RowRecord:
        """The record of a row; negative positions count from the end of the prompt.

        Raises:
            UserError: it was not asked for, or never came by.
        """
        position = position + self.num_rows if position < 0 else position
        if position not in self.rows:
            raise UserError(
                f"row {position} was not recorded; recorded are {sorted(self.rows)} "
                f"(the prompt has rows 0 to {self.num_rows - 1}, the answer's tokens follow)"
            )
        return self.rows[position]


@contextmanager
def record(model: nn.Module, is_visual: Any, rows: Iterable[int] = (-1,)) -> Iterator[Recording]:
    """Record `rows` of one prompt, and tokens generated behind it, in calls of `model` inside the block.

    Works inside or around a `prune` block, and without one. The model's results do not change.

    Args:
        model: a supported model (`llava.pruning.supported_models`) whose layers have query, key, value and output
            projections, with rotary positions.
        is_visual: bool [N], which rows of the spliced prompt are visual.
        rows: positions; negative ones count from the end of the prompt, so -1 is its last row. N + k is the row
            of the k-th generated token, seen where it is fed back to the model.

    Raises:
        UserError: a position before the prompt, or a model whose attention this does not know.
        UnsupportedModelError: see `llava.pruning.prune`.
    """
    adapter = adapter_for(model)
    visual = np.asarray(is_visual.cpu() if isinstance(is_visual, torch.Tensor) else is_visual, dtype=bool)
    if visual.ndim != 1:
        raise UserError(f"is_visual has shape {visual.shape}; one prompt's rows, [N], are needed")
    wanted = set()
    for row in rows:
        if row < -len(visual):
            raise UserError(f"row {row} lies before the prompt, which has {len(visual)} rows")
        wanted.add(row + len(visual) if row < 0 else int(row))
    recorder = _Recorder(Recording(visual, len(adapter.layers)), wanted, adapter.decoder.config)
    undo: list[Callable[[], None]] = []
    try:
        for number, layer in enumerate(adapter.layers):
            attention = layer.self_attn
            if not all(hasattr(attention, f"{name}_proj") for name in "qkvo"):
                raise UserError(
                    f"{type(attention).__name__} cannot be recorded: only attention with q, k, v and o projections "
                    "is known"
                )
            undo += recorder.watch(number, layer)
        yield recorder.recording
    finally:
        for remove in undo:
            remove()


class _Recorder:
    """The hooks of one `record` block."""

    def __init__(self, recording: Recording, wanted: set[int], config: Any):
        self.recording = recording
        self.wanted = wanted
        self.hidden_size = config.hidden_size
        self.projected: dict[str, torch.Tensor] = {}
        self.is_prefill = True
        self.entering = np.empty(0, dtype=np.int64)  # positions of the rows that this pass began with
        self.positions = self.entering  # of those in the layer that runs
        # Positions of the keys that each layer holds, prompt and answer.
        self.key_positions: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * recording.num_layers

    def watch(self, number: int, layer: Any) -> list[Callable[[], None]]:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._note_positions(number, hidden, kwargs)

        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            self._note_hidden(number, entering, output[0] if isinstance(output, tuple) else output)

        def projection(name: str) -> Callable:
            return lambda module, args, output: self.projected.__setitem__(name, output)

        def attended(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            try:
                self._note_attention(number, module, kwargs)
            finally:
                self.projected.clear()

        attention = layer.self_attn
        hooks = [
            # Registered last and run last: other pre-hooks (a prune block's) have set the rows by then.
            attention.register_forward_pre_hook(before, with_kwargs=True),
            attention.register_forward_hook(attended, with_kwargs=True),
            layer.register_forward_hook(after, with_kwargs=True, prepend=True),
            *(_before_rotation(attention, name).register_forward_hook(projection(name)) for name in "qkv"),
        ]
        return [hook.remove for hook in hooks]

    # -- which rows ---------------------------------------------------------------------------------------------

    def _note_positions(self, layer: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
        if hidden.shape[0] != 1:
            raise UserError(f"one prompt at a time can be recorded, without beams; this call has {hidden.shape[0]}")
        recording = self.recording
        if layer == 0:
            # What came before is the prompt and what was decoded since; position ids would not do, since a family may
            # count a picture's rows otherwise.
            cache, state = kwargs.get("past_key_values"), kwargs.get("forward_state")
            self.is_prefill = cache is None or cache.get_seq_length(0) == 0
            count = state.samples[0].trace.num_rows if isinstance(state, Prefill) else hidden.shape[1]
            first = 0 if self.is_prefill else int(self.entering[-1]) + 1
            self.entering = np.arange(first, first + count)
            if self.is_prefill and hidden.shape[1] > recording.num_rows:
                raise UserError(f"is_visual has {recording.num_rows} rows, but the prompt has {hidden.shape[1]}")
        positions = self._still_there(kwargs.get("forward_state"))
        if self.is_prefill:
            self.key_positions[layer] = positions
            recording.present[layer] = False
            recording.present[layer, positions] = True
        else:
            self.key_positions[layer] = np.concatenate([self.key_positions[layer], positions])
        self.positions = positions

    def _still_there(self, state: Any) -> np.ndarray:
        """Positions of the rows in this layer. `state`: of a prune block; None without one."""
        if not isinstance(state, Prefill):
            return self.entering
        if len(state.samples) != 1:
            raise UserError(f"one prompt at a time can be recorded, without beams; this call has {len(state.samples)}")
        (sample,) = state.samples
        if (sample.here.positions < 0).any():
            raise UserError(
                "this method puts rows into the prompt that stand for no patch, so they have no place in a picture of "
                "it; take another method to look at"
            )
        gone = np.setdiff1d(sample.trace.visual_positions, sample.here.positions)
        return self.entering[~np.isin(self.entering, gone)]

    def _asked(self) -> list[tuple[int, int]]:
        """(index in this pass, position) of the wanted rows."""
        return [(index, int(at)) for index, at in enumerate(self.positions) if int(at) in self.wanted]

    def _start(self, position: int, heads: int, kv_heads: int, head_dim: int) -> RowRecord:
        recording = self.recording
        if position not in recording.rows:

            def empty(*shape: int) -> np.ndarray:
                return np.full((recording.num_layers, *shape), np.nan, dtype=np.float32)

            num_visual = int(recording.is_visual.sum())
            recording.rows[position] = RowRecord(
                position=position,
                hidden=np.full((recording.num_layers + 1, self.hidden_size), np.nan, dtype=np.float32),
                attention=empty(heads, position + 1),
                values=empty(kv_heads, head_dim),
                output=empty(heads, head_dim),
                image_output=empty(heads, head_dim),
                cosine=empty(num_visual),
                norm=empty(num_visual),
            )
        return recording.rows[position]

    # -- what they did ------------------------------------------------------------------------------------------

    def _note_hidden(self, layer: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        for index, position in self._asked():
            row = self.recording.rows[position]
            if layer == 0:
                row.hidden[0] = _host(entering[0, index])
            row.hidden[layer + 1] = _host(leaving[0, index])

    @torch.no_grad()
    def _note_attention(self, layer: int, attention: Any, kwargs: dict[str, Any]) -> None:
        recording, held = self.recording, self.key_positions[layer]
        head_dim = attention.head_dim
        # [1, rows, heads * head_dim], or with the heads apart already → [1, heads, rows, head_dim]
        query, keys, values = (
            self.projected[name].reshape(1, len(self.positions), -1, head_dim).transpose(1, 2) for name in "qkv"
        )
        if self.is_prefill:
            recording.value_l1[layer] = np.nan
            recording.value_l1[layer, held] = _host(values[0].float().abs().sum(dim=(0, 2)))
        asked = self._asked()
        if not asked:
            return
        own_values = values
        query, keys = apply_rotary_pos_emb(query, keys, *kwargs["position_embeddings"])
        if not self.is_prefill:
            stored = kwargs["past_key_values"].layers[layer]
            keys, values = (part[:, :, : len(held)] for part in (stored.keys, stored.values))
        in_prompt = held < recording.num_rows
        visual = np.zeros(len(held), dtype=bool)
        visual[in_prompt] = recording.is_visual[held[in_prompt]]
        visual_rows = np.searchsorted(recording.visual_positions, held[visual])
        reading = _reading(layer, kwargs) if self.is_prefill and visual.any() else Read.ALL

        for index, position in asked:
            row = self._start(position, query.shape[1], keys.shape[1], head_dim)
            seen = int(np.searchsorted(held, position)) + 1
            weights = _weights(query[0, :, index], keys[0, :, :seen], attention.scaling)
            is_read = torch.from_numpy(visual[:seen]).to(weights.device)
            weights = as_read(weights, is_read, reading, int(visual.sum()))
            shares = _expand(values[0, :, :seen].float(), weights.shape[0])
            output = torch.einsum("hk,hkd->hd", weights, shares)
            row.attention[layer] = 0
            row.attention[layer][:, held[:seen]] = _host(weights)
            row.values[layer] = _host(own_values[0, :, index])
            row.output[layer] = _host(output)
            row.image_output[layer] = _host(torch.einsum("hk,hkd->hd", weights * is_read, shares))
            if reading is Read.ALL and visual[:seen].any():
                measured = measure_visual_shares(
                    query[0, :, index],
                    keys[0, :, :seen],
                    values[0, :, :seen],
                    output,
                    is_read.nonzero()[:, 0],
                    attention.scaling,
                )
                ahead = visual_rows[: int(visual[:seen].sum())]
                row.cosine[layer, ahead], row.norm[layer, ahead] = _host(measured.cosine), _host(measured.norm)


def as_read(weights: torch.Tensor, visual: torch.Tensor, reading: Read, num_visual: int) -> torch.Tensor:
    """One row's attention weights, [heads, keys], after a stage took its share (paper, shallow stage).

    Args:
        weights: softmax over the keys the row may see; the last key is the row itself.
        visual: bool [keys].
        reading: what the stage lets rows read.
        num_visual: visual rows of the whole prompt.
    """
    if reading is Read.ALL or not visual.any():
        return weights
    row_is_visual = bool(visual[-1])
    hidden = visual
    if row_is_visual:
        if reading is Read.NO_IMAGE:
            return weights
    elif reading is Read.HALF_SINK:
        hidden = visual.clone()
        hidden[visual.nonzero()[num_visual // 2 :, 0]] = False
    kept = weights.masked_fill(hidden, 0)
    if reading is Read.FIRST_SINK and not row_is_visual:
        kept[:, visual.nonzero()[0, 0]] = weights[:, visual].sum(dim=-1)
    return kept


def _before_rotation(attention: Any, name: str) -> nn.Module:
    """The module whose output is what rotary positions turn: a head's norm where there is one, else the projection."""
    return getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")


def _reading(layer: int, kwargs: dict[str, Any]) -> Read:
    """What a prune block lets this prompt read in `layer`."""
    state = kwargs.get("forward_state")
    return Read.ALL if not isinstance(state, Prefill) else state.samples[0].treatment(layer).read


def _weights(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax weights [heads, keys] of one query [heads, head_dim] on keys [kv_heads, keys, head_dim], float32."""
    grouped = query.float().view(keys.shape[0], -1, query.shape[-1])
    return torch.softmax(grouped @ keys.float().transpose(1, 2) * scale, dim=-1).flatten(0, 1)


def _expand(values: torch.Tensor, heads: int) -> torch.Tensor:
    """[kv_heads, ...] → [heads, ...]; heads of a group share a KV head."""
    return values.repeat_interleave(heads // values.shape[0], dim=0)


def _host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
