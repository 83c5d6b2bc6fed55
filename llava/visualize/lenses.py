"""Lenses: what recorded rows hold and read, as arrays. `llava.visualize.draw` draws them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from llava.pruning.families import adapter_for

from .record import Recording, RowRecord


class TopTokens(NamedTuple):
    """The likeliest tokens, falling.

    Attributes:
        ids: int64 [..., k].
        probabilities: float32 [..., k].
        texts: str [..., k], the vocabulary's pieces ("▁" is a leading space).
    """

    ids: np.ndarray
    probabilities: np.ndarray
    texts: np.ndarray


class Shares(NamedTuple):
    """Where a row's attention goes, mean over heads; each float32 [L].

    Attributes:
        prefix: on rows before the first visual row.
        image: on visual rows.
        text: on the other rows behind the first visual row, the answer's included.
        lost: taken away by the shallow stage, whose weights are not renormalised.
    """

    prefix: np.ndarray
    image: np.ndarray
    text: np.ndarray
    lost: np.ndarray


@torch.no_grad()
def project(model: nn.Module, hidden: np.ndarray) -> np.ndarray:
    """Next-token probabilities that states would give if they were the last layer's: final norm → `lm_head`.

    Args:
        model: a supported model.
        hidden: float32 [..., hidden_size], *before* the final norm, as `RowRecord.hidden` holds them. Of what
            transformers calls `hidden_states` the last entry is normed already and does not belong here.

    Returns:
        float32 [..., vocabulary]; NaN where `hidden` is.
    """
    adapter = adapter_for(model)
    decoder: Any = adapter.decoder
    norm, head = decoder.norm, adapter.model.get_output_embeddings()
    weight = norm.weight
    states = torch.from_numpy(np.ascontiguousarray(hidden)).to(weight.device, weight.dtype)
    logits = head(norm(states))
    return torch.softmax(logits.float(), dim=-1).cpu().numpy()


def top_tokens(probabilities: np.ndarray, tokenizer: Any, k: int = 5) -> TopTokens:
    """The `k` likeliest tokens of distributions [..., vocabulary]. Where a distribution is NaN the texts are ""."""
    is_there = ~np.isnan(probabilities[..., :1])
    order = np.argsort(-np.nan_to_num(probabilities), axis=-1, kind="stable")[..., :k]
    pieces = tokenizer.convert_ids_to_tokens(order.reshape(-1).tolist())
    # Ids behind the vocabulary (padded embedding tables) have no piece.
    named = [
        readable(piece) if piece is not None else f"<{each}>" for piece, each in zip(pieces, order.flat, strict=True)
    ]
    texts = np.where(is_there, np.array(named, dtype=object).reshape(order.shape), "")
    return TopTokens(order, np.take_along_axis(probabilities, order, axis=-1), texts)


def readable(piece: str) -> str:
    """A vocabulary's piece for people, whatever its alphabet: "▁" for a leading space, "↵" for a line end."""
    return piece.replace("\u0120", "▁").replace("\u010a", "↵").replace("\n", "↵")


def logit_lens(model: nn.Module, tokenizer: Any, row: RowRecord, k: int = 5) -> TopTokens:
    """What a row would say after every layer: [L + 1, k], entry 0 the layers' input, entry i + 1 after layer i.

    The last entry is the model's own next-token distribution. (Logit lens: nostalgebraist 2020; paper, section on
    where task words appear.)
    """
    return top_tokens(project(model, row.hidden), tokenizer, k)


def token_probabilities(model: nn.Module, row: RowRecord, ids: Any) -> np.ndarray:
    """Probability of chosen tokens in the logit lens, float32 [L + 1, len(ids)]."""
    return project(model, row.hidden)[:, list(ids)]


@torch.no_grad()
def through_output_projection(model: nn.Module, layer: int, head_outputs: np.ndarray) -> np.ndarray:
    """What each head's vector adds to the residual stream in `layer`.

    Args:
        head_outputs: float32 [..., heads, head_dim]; value vectors of fewer KV heads, [..., kv_heads, head_dim],
            are expanded to the heads that share them.

    Returns:
        float32 [..., heads, hidden_size]. The sum over heads, and the projection's bias where it has one, is what
        the projection gives for all heads together.
    """
    adapter = adapter_for(model)
    block: Any = adapter.layers[layer]
    projection, norm = block.self_attn.o_proj, block.input_layernorm.weight
    heads = adapter.decoder.config.num_attention_heads
    vectors = torch.from_numpy(np.ascontiguousarray(head_outputs)).to(norm.device, norm.dtype)
    vectors = vectors.repeat_interleave(heads // vectors.shape[-2], dim=-2)
    # One head at a time, the others zero: the module itself knows about adapters and quantised weights.
    apart = vectors[..., :, None, :] * torch.eye(heads, device=norm.device, dtype=norm.dtype)[:, :, None]
    apart = apart.flatten(-2)
    none = projection(torch.zeros_like(apart[..., :1, :]))
    return (projection(apart) - none).float().cpu().numpy()


def value_output_lens(
    model: nn.Module, tokenizer: Any, vectors: np.ndarray, k: int = 5, per_head: bool = False
) -> TopTokens:
    """The words in a row's value vectors: through its heads' slices of the output projection → norm → `lm_head`.

    Args:
        vectors: float32 [L, kv_heads or heads, head_dim]: `RowRecord.values` (what others would read from the row),
            `RowRecord.output` (what the row read) or `RowRecord.image_output` (what it read from the image).
        per_head: each head by itself, or their sum.

    Returns:
        [L, k], or [L, heads, k] with `per_head`.
    """
    written = np.stack([through_output_projection(model, layer, each) for layer, each in enumerate(vectors)])
    return top_tokens(project(model, written if per_head else written.sum(axis=-2)), tokenizer, k)


def attention_to_image(recording: Recording, row: RowRecord, head: int | None = None) -> np.ndarray:
    """A row's attention on every visual row, float32 [L, visual rows]: the mean over heads, or one head's."""
    weights = row.attention.mean(axis=1) if head is None else row.attention[:, head]
    columns = recording.visual_positions
    return np.where(columns <= row.position, weights[:, np.minimum(columns, row.position)], 0)


def attention_shares(recording: Recording, row: RowRecord) -> Shares:
    """A row's attention on prefix, image and text in every layer: the paper's three stages at a glance."""
    weights = row.attention.mean(axis=1)
    visual = np.zeros(row.position + 1, dtype=bool)
    columns = recording.visual_positions
    visual[columns[columns <= row.position]] = True
    first = columns[0] if len(columns) else row.position + 1
    is_prefix = np.arange(row.position + 1) < first
    prefix, image = weights[:, is_prefix].sum(axis=1), weights[:, visual].sum(axis=1)
    text = weights[:, ~is_prefix & ~visual].sum(axis=1)
    return Shares(prefix, image, text, np.clip(1 - prefix - image - text, 0, 1))


def smallest_cosines(row: RowRecord) -> np.ndarray:
    """The probe's smallest cosine in every layer, float32 [L]; NaN where nothing was measured.

    On a dense run this is the curve that `layer_threshold` is chosen from.
    """
    measured = ~np.isnan(row.cosine).all(axis=1)
    smallest = np.full(len(row.cosine), np.nan, dtype=np.float32)
    smallest[measured] = np.nanmin(row.cosine[measured], axis=1)
    return smallest


def value_norms(recording: Recording) -> np.ndarray:
    """L1 norm of every visual row's value vectors, float32 [L, visual rows]; NaN where the row was pruned.

    Rows with much attention and short values are sinks: they are looked at, and nothing is taken from them.
    """
    return recording.value_l1[:, recording.visual_positions]
