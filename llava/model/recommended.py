"""The pruning config to use for a checkpoint when the user names none."""

from __future__ import annotations

from pathlib import Path

from llava.model.checkpoint import resolve_folder
from llava.pruning import PruningConfig

PUBLISHED = PruningConfig(
    mode=("shallow", "middle", "deep"), shallow_mid_layer=6, layer_threshold=0.995, tokens_threshold=0.2
)
"""The config published for LLaVA-1.5 (arXiv 2510.17205)."""

FILE_NAME = "pruning_config.json"


def recommended_config(model_path: str | Path) -> PruningConfig:
    """``pruning_config.json`` beside the checkpoint's weights, else the published config.

    Raises:
        UserError: no such checkpoint, or a file that holds no usable config.
    """
    file = resolve_folder(model_path) / FILE_NAME
    config = PruningConfig.from_any(f"@{file}") if file.is_file() else PUBLISHED
    assert config is not None  # None comes only from None
    return config
