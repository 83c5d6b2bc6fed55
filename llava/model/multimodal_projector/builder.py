"""The projector: image features of the vision tower → rows of the language model."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from llava.utils import UserError


def build_vision_projector(config: Any) -> nn.Module:
    """The projector that ``config.mm_projector_type`` names: ``linear``, ``mlpNx_gelu`` or ``identity``.

    Maps ``[..., config.mm_hidden_size]`` to ``[..., config.hidden_size]``. The keys of an MLP are those of
    published checkpoints: ``0``, ``2``, … for its linear layers, exact (erf) GELU between them.

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
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(int(mlp[1]) - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
