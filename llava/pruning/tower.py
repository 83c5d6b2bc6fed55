"""What the vision tower made of an image, for methods that choose before the decoder.

A hook at the tower's layer that the language model reads keeps that layer's input and output while a call lasts.
Attention of the class token and keys are computed from them when a method asks, for that one row and that one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .errors import UnsupportedCallError
from .trace import PruningTrace


class Picture:
    """One image as a CLIP-style tower sees it: a class token (row 0) and N patches.

    Attributes:
        states: `[1 + N, hidden]`, the output of the layer that the projector reads.
        flops: of the products that were made here for a method, two a multiply-add.
    """

    def __init__(self, layer: Any, projector: nn.Module, entering: torch.Tensor, states: torch.Tensor):
        self._layer, self._projector, self._entering = layer, projector, entering
        self.states = states
        self.flops = 0

    def __len__(self) -> int:
        """N, the patches."""
        return len(self.states) - 1

    @cached_property
    def keys(self) -> torch.Tensor:
        """Keys of that layer, `[heads, 1 + N, head_dim]`."""
        return self._heads("k_proj", self._normed)

    @cached_property
    def class_weights(self) -> torch.Tensor:
        """What the class token puts on the patches, float32 `[heads, N]`, after a softmax over all rows."""
        query = self._heads("q_proj", self._normed[:1]).float()
        scores = self.product(query, self.keys.float().transpose(1, 2)) * self._layer.self_attn.scale
        return torch.softmax(scores, dim=-1)[:, 0, 1:]

    def similarity(self) -> torch.Tensor:
        """Cosines of the patches' states, float32 `[N, N]`."""
        directions = functional.normalize(self.states[1:].float(), dim=-1)
        return self.product(directions, directions.T)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """Rows of the decoder from states of that layer, merged or not, `[rows, hidden]`."""
        linear = [part for part in self._projector.modules() if isinstance(part, nn.Linear)]
        self.flops += 2 * len(states) * sum(part.in_features * part.out_features for part in linear)
        return self._projector(states)

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`left @ right`, entered into `flops`."""
        result = left @ right
        self.flops += 2 * left.shape[-1] * result.numel()
        return result

    @cached_property
    def _normed(self) -> torch.Tensor:
        return self._layer.layer_norm1(self._entering)

    def _heads(self, name: str, normed: torch.Tensor) -> torch.Tensor:
        attention = self._layer.self_attn
        projected = getattr(attention, name)(normed)
        self.flops += 2 * normed.shape[-1] * projected.numel()
        return projected.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)


class TowerWatch:
    """Keeps what one tower layer got and gave, until the prefill that it was for takes it."""

    def __init__(self, layer: Any, projector: nn.Module):
        self._layer, self._projector = layer, projector
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def install(self) -> Callable[[], None]:
        """Hook the layer; returns what takes the hook off."""
        return self._layer.register_forward_hook(self._after, with_kwargs=True).remove

    def _after(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        self._seen.append((entering, output[0] if isinstance(output, tuple) else output))

    def forget(self) -> None:
        """Drop what no prefill took."""
        self._seen = []

    def take(self, traces: Sequence[PruningTrace], copies: int) -> list[list[Picture]]:
        """The pictures of every prompt, in order; forgets them.

        Args:
            traces: of the prompts, `copies` of which are in the batch one behind the other. The tower may have seen
                each picture once, or once a copy.

        Raises:
            UnsupportedCallError: not one crop for every image and one row for every patch, so that nothing says which
                crop is whose.
        """
        seen, self._seen = self._seen, []
        pictures = [Picture(self._layer, self._projector, *pair) for batch in seen for pair in zip(*batch, strict=True)]
        patches, rows = len(pictures[0]) if pictures else 1, [trace.num_visual for trace in traces]
        if len(pictures) * patches == sum(rows) * copies:
            pictures = pictures[::copies]
        if len(pictures) * patches != sum(rows) or any(count % patches for count in rows):
            images = sum(len(trace.image_spans) for trace in traces)
            raise UnsupportedCallError(
                f"the vision tower saw {len(pictures)} crops for {images} images of {sum(rows)} rows; this method "
                "needs one crop an image and one row a patch (pass pictures and not rows, and no tiles)"
            )
        one_by_one = iter(pictures)
        return [[next(one_by_one) for _ in range(count // patches)] for count in rows]
