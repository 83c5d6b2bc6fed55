"""The vision tower: transformers' CLIP, read at the layer LLaVA was trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.utils import UserError


class ClipVisionTransformer(CLIPVisionModel):
    """transformers' CLIP vision model under a name of its own.

    transformers renames the keys of anything called ``CLIPVisionModel`` while it loads and saves; here keys stay
    as original LLaVA checkpoints have them.
    """


def _side(size: Any) -> int:
    """transformers lets a square be given as one number or as two."""
    return int(size) if isinstance(size, int) else int(size[0])


class _ClipWeights(nn.Module):
    """Gives the tower's keys the ``vision_tower.vision_model.`` of published checkpoints."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.vision_model = ClipVisionTransformer(config)


class CLIPVisionTower(nn.Module):
    """Images → patch features of one CLIP layer.

    Args:
        vision_config: the tower's architecture.
        select_layer: index into CLIP's hidden states (0 is the embedding); LLaVA uses -2.
        select_feature: ``"patch"`` drops the class token, ``"cls_patch"`` keeps it.
        name: what checkpoints call this tower (a hub id or a folder), for messages.
    """

    is_loaded = True  # existing scripts ask; here a tower is always built and loaded with its model

    def __init__(
        self,
        vision_config: CLIPVisionConfig,
        select_layer: int = -2,
        select_feature: str = "patch",
        name: str | None = None,
    ) -> None:
        super().__init__()
        if select_feature not in ("patch", "cls_patch"):
            raise UserError(f"mm_vision_select_feature is {select_feature!r}; known are patch and cls_patch")
        depth = vision_config.num_hidden_layers + 1
        if not -depth <= select_layer < depth:
            raise UserError(
                f"mm_vision_select_layer is {select_layer}; the vision tower has hidden states {-depth} … {depth - 1}"
            )
        self.vision_tower_name = name
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.image_processor: Any = None
        self.vision_tower = _ClipWeights(vision_config)

    def load_model(self, device_map: Any = None) -> None:
        """Nothing to do: the tower was loaded with the model. Existing LLaVA scripts call this."""

    @property
    def _clip(self) -> ClipVisionTransformer:
        return self.vision_tower.vision_model

    @property
    def config(self) -> CLIPVisionConfig:
        return self._clip.config

    @property
    def device(self) -> torch.device:
        return self._clip.device

    @property
    def dtype(self) -> torch.dtype:
        return self._clip.dtype

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Pixels a side of the square images that the tower takes."""
        return _side(self.config.image_size)

    @property
    def num_patches_per_side(self) -> int:
        return self.image_size // _side(self.config.patch_size)

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features ``[n, patches, hidden]`` of images ``[n, 3, S, S]`` (any device and float dtype).

        Runs only the layers below the selected one. transformers' ``output_hidden_states`` is no way to get them: once
        the decoder around the tower has been asked for its hidden states too, it reports each of the tower's twice.
        """
        clip = self._clip
        images = images.to(self.dtype)
        if self.device.type != "meta":  # weights offloaded by accelerate; its hooks move the input
            images = images.to(self.device)
        hidden = clip.pre_layrnorm(clip.embeddings(images))
        num_layers = range(len(clip.encoder.layers) + 1)[self.select_layer]
        for layer in clip.encoder.layers[:num_layers]:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, 1:] if self.select_feature == "patch" else hidden
