"""What the vision tower made of an image, for methods that choose before the decoder.

A hook at the tower's layer that the language model reads keeps that layer's input and output while a call lasts.
Attention of the class token and keys are computed from them when a method asks, for that one row and that one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import UnsupportedCallError


class Picture:
    """One image as a CLIP-style tower sees it: a class token (row 0) and N patches.

    Attributes:
        states: `[1 + N, hidden]`, the output of the layer that the projector reads.
    """

    def __init__(self, layer: Any, entering: torch.Tensor, states: torch.Tensor):
        self._layer, self._entering = layer, entering
        self.states = states

    def keys(self) -> torch.Tensor:
        """Keys of that layer, `[heads, 1 + N, head_dim]`."""
        return self._heads("k_proj", self._layer.layer_norm1(self._entering))

    def class_attention(self) -> torch.Tensor:
        """Weights of the class token on the patches, float32 `[heads, N]`, after a softmax over all rows."""
        normed = self._layer.layer_norm1(self._entering)
        query, keys = self._heads("q_proj", normed[:1]).float(), self._heads("k_proj", normed).float()
        scores = query @ keys.transpose(1, 2) * self._layer.self_attn.scale
        return torch.softmax(scores, dim=-1)[:, 0, 1:]

    def _heads(self, name: str, normed: torch.Tensor) -> torch.Tensor:
        attention = self._layer.self_attn
        return getattr(attention, name)(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)


class TowerWatch:
    """Keeps what one tower layer got and gave, until the prefill that it was for takes it."""

    def __init__(self, layer: Any):
        self._layer = layer
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def install(self) -> Callable[[], None]:
        """Hook the layer; returns what takes the hook off."""
        return self._layer.register_forward_hook(self._after, with_kwargs=True).remove

    def _after(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        self._seen.append((entering, output[0] if isinstance(output, tuple) else output))

    def take(self, images_per_prompt: Sequence[int]) -> list[list[Picture]]:
        """The pictures of every prompt, in order; forgets them.

        Raises:
            UnsupportedCallError: not one crop for every image, so that nothing says which crop is whose.
        """
        seen, self._seen = self._seen, []
        pictures = [Picture(self._layer, *pair) for batch in seen for pair in zip(*batch, strict=True)]
        if len(pictures) != sum(images_per_prompt):
            raise UnsupportedCallError(
                f"the vision tower saw {len(pictures)} crops for {sum(images_per_prompt)} images; this method needs "
                "one crop an image (pass pictures and not rows, and an image_aspect_ratio without tiles)"
            )
        one_by_one = iter(pictures)
        return [[next(one_by_one) for _ in range(count)] for count in images_per_prompt]
