"""From pixels to language rows: CLIP read at one of its layers, and the projector.

These two stand beside transformers' LLaVA classes, which know one projector (two layers) and one way to a layer's
features (all layers, then a choice). Checkpoints have other projectors; and the layers above the chosen one are work
for nothing: with LLaVA-1.5's tower 6 % of its time, for equal bits.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.utils import UserError

_VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {**_VIT_L, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_VIT_L, "image_size": 224},
}
"""Architectures of the towers that published LLaVA checkpoints name, so that no hub is asked for them."""


def tower_name(config: Any) -> str | None:
    """The hub id or folder of the tower that ``config`` names, if any."""
    return getattr(config, "mm_vision_tower", None) or None


def has_vision_tower(config: Any) -> bool:
    """Whether a model of this config has a vision tower (and with it a projector)."""
    return bool(tower_name(config) or getattr(config, "vision_config", None))


def vision_config_of(config: Any) -> CLIPVisionConfig:
    """Architecture of the tower: ``config.vision_config``, else that of the tower ``mm_vision_tower`` names.

    Raises:
        UserError: the tower is not CLIP, or its config cannot be read.
    """
    given = getattr(config, "vision_config", None)
    if given:
        return _clip_config(given)
    name = tower_name(config)
    if name is None:
        raise UserError("the config names no vision tower (neither vision_config nor mm_vision_tower)")
    if name in KNOWN_TOWERS and not Path(name).is_dir():
        return CLIPVisionConfig(**KNOWN_TOWERS[name])
    try:
        return _clip_config(CLIPVisionConfig.get_config_dict(name)[0])
    except (OSError, KeyError) as error:
        raise UserError(
            f"cannot read the config of vision tower {name!r}; give a CLIP folder that exists here as "
            "mm_vision_tower in config.json, or connect to the hub"
        ) from error


def _clip_config(values: dict[str, Any]) -> CLIPVisionConfig:
    """From the config of a tower, or of a whole CLIP with its text side."""
    kind = values.get("model_type", CLIPVisionConfig.model_type)
    if kind not in (CLIPVisionConfig.model_type, "clip"):
        raise UserError(f"vision tower of type {kind!r} is not supported; only CLIP towers are")
    vision = values.get("vision_config", values) if kind == "clip" else values
    return CLIPVisionConfig(**{key: value for key, value in vision.items() if key not in ("model_type", "dtype")})


class ConvolutionStem(nn.Module):
    """Patches of a picture through 3×3 convolutions, where CLIP has one linear map of each patch's pixels.

    A transformer this small learns from far fewer pictures behind one. Each of ``widths`` halves the picture's sides,
    the last is the tower's hidden size; then ``blocks`` residual convolutions between patches.

    Args:
        widths: channels behind each halving.
        blocks: number of residual convolutions.
        norm: what stands behind every convolution: nothing, or ``nn.BatchNorm2d`` while a tower is trained from
            scratch (`scripts/smollm2/tower.py` folds it into the convolutions).
    """

    def __init__(self, widths: list[int], blocks: int, norm: Callable[[int], nn.Module] = nn.Identity) -> None:
        super().__init__()
        steps = [*zip([3, *widths], widths, [2] * len(widths), strict=False), *[(widths[-1], widths[-1], 1)] * blocks]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=stride, padding=1) for a, b, stride in steps)
        self.norms = nn.ModuleList(norm(out) for _, out, _ in steps)

    @property
    def weight(self) -> torch.Tensor:
        """CLIP asks its patch embedding for the dtype of this."""
        return self.convolutions[0].weight  # type: ignore[return-value]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``[n, 3, S, S]`` → ``[n, hidden, side, side]``."""
        hidden = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            out = nn.functional.gelu(norm(convolution(hidden)))
            hidden = out if out.shape != hidden.shape else hidden + out
        return hidden


class VisionTower(CLIPVisionModel):
    """transformers' CLIP, run up to the layer that ``mm_vision_select_layer`` of a LLaVA config names.

    A vision config with ``stem_widths`` and ``stem_blocks`` has a `ConvolutionStem` as its patch embedding.

    The layer is an index into CLIP's hidden states (0 is the embedding; LLaVA uses -2, the default);
    ``mm_vision_select_feature`` is ``"patch"``, which drops the class token, or ``"cls_patch"``.
    """

    is_loaded = True  # existing scripts ask; here a tower is always built and loaded with its model
    image_processor: Any = None

    def __init__(self, config: Any) -> None:
        super().__init__(vision_config_of(config))
        if widths := getattr(self.config, "stem_widths", None):
            stem = ConvolutionStem(widths, self.config.stem_blocks)
            self.embeddings.patch_embedding = stem  # type: ignore[assignment]
        layer = getattr(config, "mm_vision_select_layer", -2)
        feature = getattr(config, "mm_vision_select_feature", "patch")
        depth = self.config.num_hidden_layers + 1
        if feature not in ("patch", "cls_patch"):
            raise UserError(f"mm_vision_select_feature is {feature!r}; known are patch and cls_patch")
        if not -depth <= layer < depth:
            raise UserError(
                f"mm_vision_select_layer is {layer}; the vision tower has hidden states {-depth} … {depth - 1}"
            )
        self.num_layers = range(depth)[layer]
        self.first_row = int(feature == "patch")

    def load_model(self, device_map: Any = None) -> None:
        """Nothing to do: the tower was loaded with the model. Existing LLaVA scripts call this."""

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

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Features ``[n, patches, hidden]`` of images ``[n, 3, S, S]`` (any device and float dtype)."""
        images = images.to(self.dtype)
        if self.device.type != "meta":  # weights offloaded by accelerate; its hooks move the input
            images = images.to(self.device)
        hidden = self.pre_layrnorm(self.embeddings(images))
        for layer in self.encoder.layers[: self.num_layers]:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, self.first_row :]


def _side(size: Any) -> int:
    """transformers lets a square be given as one number or as two."""
    return int(size) if isinstance(size, int) else int(size[0])


def build_projector(config: Any) -> Any:
    """The projector that ``config.mm_projector_type`` names: ``linear``, ``mlpNx_gelu`` or ``identity``.

    Maps ``[..., config.mm_hidden_size]`` to ``[..., config.hidden_size]``. An MLP's layers have transformers' names,
    ``linear_1``, ``linear_2``, …, with exact (erf) GELU between them.

    Raises:
        UserError: an unknown projector type.
    """
    kind = getattr(config, "mm_projector_type", None) or "linear"
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    mlp = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if mlp is None:
        raise UserError(f"unknown mm_projector_type {kind!r}; known are linear, mlpNx_gelu and identity")
    layers: OrderedDict[str, nn.Module] = OrderedDict(linear_1=nn.Linear(config.mm_hidden_size, config.hidden_size))
    for number in range(2, int(mlp[1]) + 1):
        layers[f"act_{number - 1}"] = nn.GELU()
        layers[f"linear_{number}"] = nn.Linear(config.hidden_size, config.hidden_size)
    return nn.Sequential(layers)
