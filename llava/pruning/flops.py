"""FLOPs by the conventions of the literature, and what a prefill really executed.

The conventions differ in what they count (visual tokens alone, or the whole prompt) and in whether a
multiply-add is one operation or two. A saving is only comparable within one of them, so every figure is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .families import adapter_for
from .trace import PruningTrace

CONVENTIONS = {
    "paper": "visual tokens alone, multiply–adds (VisiPruner, PyramidDrop)",
    "fastv": "visual tokens alone, an MLP of two matrices (FastV)",
    "prompt": "the whole prompt, two operations a multiply–add (ShortV, VTW)",
    "executed": "what was really called, probe and output head in, vision tower apart",
}
"""What each convention counts, by its name."""


@dataclass(frozen=True)
class DecoderShape:
    """What the FLOPs of a decoder depend on.

    Attributes:
        num_layers, hidden_size, intermediate_size, num_heads, head_dim, vocab_size: as in the config.
        linear_weights: weights of a layer's linear maps, so that a row costs 2 * `linear_weights` FLOPs there.
        key_value_weights: those of them that make keys and values, all that a row costs which is not updated.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    vocab_size: int
    linear_weights: int
    key_value_weights: int

    @classmethod
    def of(cls, model: nn.Module) -> DecoderShape:
        """The shape of a supported model's decoder. Raises `UnsupportedModelError` for other models."""
        adapter = adapter_for(model)
        config = adapter.decoder.config
        layer = adapter.layers[0]
        return cls(
            num_layers=len(adapter.layers),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            linear_weights=_linear_weights(layer),
            key_value_weights=_linear_weights(layer.self_attn.k_proj) + _linear_weights(layer.self_attn.v_proj),
        )


def _linear_weights(module: nn.Module) -> int:
    return sum(part.in_features * part.out_features for part in module.modules() if isinstance(part, nn.Linear))


Rows = Sequence[float]


def paper_flops(visual_rows: Rows, shape: DecoderShape, updated: Rows | None = None) -> float:
    """VisiPruner's and PyramidDrop's count: multiply-adds of the visual tokens alone, `4nd² + 2n²d + 3ndm` a layer.

    Args:
        visual_rows: visual rows n in each layer.
        updated: those u of them that the layer updates (None: all); the others cost their keys and values alone:
            `2nd² + 2ud² + 2und + 3udm`.
    """
    d, m = shape.hidden_size, shape.intermediate_size
    pairs = zip(visual_rows, visual_rows if updated is None else updated, strict=True)
    return sum(2 * (n + u) * d**2 + 2 * u * n * d + 3 * u * d * m for n, u in pairs)


def fastv_flops(visual_rows: Rows, shape: DecoderShape, updated: Rows | None = None) -> float:
    """FastV's count: `4nd² + 2n²d + 2ndm` a layer (an MLP of two matrices), visual tokens alone."""
    d, m = shape.hidden_size, shape.intermediate_size
    pairs = zip(visual_rows, visual_rows if updated is None else updated, strict=True)
    return sum(2 * (n + u) * d**2 + 2 * u * n * d + 2 * u * d * m for n, u in pairs)


def prompt_flops(rows: Rows, shape: DecoderShape, updated: Rows | None = None) -> float:
    """ShortV's and VTW's count: the whole prompt, two FLOPs a multiply-add, `2n(4d + 3m)d + 4n²d` a layer.

    `rows`: all rows n in each layer; `updated`: as in `paper_flops`.
    """
    d, m = shape.hidden_size, shape.intermediate_size
    pairs = zip(rows, rows if updated is None else updated, strict=True)
    return sum(4 * (n + u) * d**2 + 6 * u * d * m + 4 * u * n * d for n, u in pairs)


def executed_flops(trace: PruningTrace, shape: DecoderShape) -> int:
    """What the prefill really called, two FLOPs a multiply-add, the vision tower apart.

    Linear layers over the rows each layer processed (keys and values alone for rows that it did not update);
    attention as the rectangle of every call, a method's measures and the scores the shallow stage needs included;
    the output head over the rows it was given.
    """
    updating = shape.linear_weights - shape.key_value_weights
    updated = trace.updated_rows_per_layer or trace.rows_per_layer
    linear = shape.key_value_weights * sum(trace.rows_per_layer) + updating * sum(updated)
    attention = shape.head_dim * (sum(trace.score_pairs) + sum(trace.value_pairs))
    head = trace.lm_head_rows * shape.hidden_size * shape.vocab_size
    return 2 * (linear + attention + head) + trace.projection_flops


def note_dense(trace: PruningTrace, num_layers: int, num_heads: int) -> PruningTrace:
    """Enter what the model's own kernels do with a prompt: every row in every layer, one full rectangle each.

    Returns `trace`.
    """
    pairs = num_heads * trace.num_rows**2
    trace.rows_per_layer, trace.updated_rows_per_layer = ([trace.num_rows] * num_layers for _ in range(2))
    trace.score_pairs, trace.value_pairs = ([pairs] * num_layers for _ in range(2))
    trace.visual_rows_read = [trace.num_visual] * num_layers
    return trace


def dense_trace(trace: PruningTrace, shape: DecoderShape) -> PruningTrace:
    """The same prompt without pruning."""
    dense = PruningTrace(trace.num_rows, trace.visual_positions, lm_head_rows=trace.lm_head_rows)
    return note_dense(dense, shape.num_layers, shape.num_heads)


def flops(trace: PruningTrace, shape: DecoderShape) -> dict[str, float]:
    """A prefill's count by every convention of `CONVENTIONS`."""
    text = trace.num_rows - trace.num_visual
    rows, updated = trace.rows_per_layer, trace.updated_rows_per_layer or trace.rows_per_layer
    visual_rows, visual_updated = ([count - text for count in counts] for counts in (rows, updated))
    return {
        "paper": paper_flops(visual_rows, shape, visual_updated),
        "fastv": fastv_flops(visual_rows, shape, visual_updated),
        "prompt": prompt_flops(rows, shape, updated),
        "executed": executed_flops(trace, shape),
    }


def savings(trace: PruningTrace, model: nn.Module | DecoderShape) -> dict[str, float]:
    """Fraction of the dense prefill's FLOPs that was saved, 0 … 1, by every convention.

    0 where the dense count is 0 (a prompt without an image, in the conventions that count images alone).
    """
    shape = model if isinstance(model, DecoderShape) else DecoderShape.of(model)
    spent, dense = flops(trace, shape), flops(dense_trace(trace, shape), shape)
    return {name: 1 - spent[name] / dense[name] if dense[name] else 0.0 for name in CONVENTIONS}


def vision_attention_saved(trace: PruningTrace) -> float:
    """Fraction of vision-related attention that was saved, 0 … 1; 0 for a prompt without an image.

    Vision-related attention is, over all layers of the prefill, the number of pairs in which a text row reads a
    visual row's value. It is proportional to the visual rows that text may read in each layer.
    """
    if not trace.num_visual:
        return 0.0
    return 1 - sum(trace.visual_rows_read) / (trace.num_visual * len(trace.visual_rows_read))


def _fused_attention_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    """Two rectangles, as torch's own formula for the other fused kernels has it."""
    batch, heads, rows, head_dim = query_shape
    return 2 * batch * heads * rows * key_shape[2] * (head_dim + value_shape[3])


def counter_mapping() -> dict:
    """For `torch.utils.flop_counter.FlopCounterMode(custom_mapping=…)`: the CPU's fused attention, which torch's
    own table leaves out."""
    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention_flops}
