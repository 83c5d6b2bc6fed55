"""Chat with a transformers model of any supported family, through its own processor and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.images import load_image
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import context_length
from llava.model.recommended import FILE_NAME
from llava.model.stock import StockModel, StockProcessor, stock_model_type
from llava.pruning import PruningConfig
from llava.pruning.families import adapter_for
from llava.pruning.geometry import PatchGrid, Size
from llava.serve.chat import Checkpoint, LoadOptions, Picture, Prompt, Turn
from llava.utils import UserError


def open_checkpoint(
    model_path: str | Path, model_base: str | Path | None = None, conv_mode: str | None = None
) -> Checkpoint:
    """A LLaVA checkpoint of any layout, or a transformers model of a supported family.

    Raises:
        UserError: see `Checkpoint` and `StockCheckpoint`; options that only LLaVA checkpoints have.
    """
    model_type = stock_model_type(model_path)
    if model_type is None:
        return Checkpoint(model_path, model_base, conv_mode)
    for name, value in (("--model-base", model_base), ("--conv-mode", conv_mode)):
        if value is not None:
            raise UserError(
                f"{name} {value} is for LLaVA checkpoints; a {model_type} model brings its own chat template"
            )
    return StockCheckpoint(model_path)


class StockCheckpoint(Checkpoint):
    """Everything about a transformers model but its weights."""

    def __init__(self, model_path: str | Path) -> None:
        self.source = StockProcessor(model_path)
        self.model_path, self.model_base = model_path, None
        self.name = get_model_name_from_path(str(model_path))
        self.config = self.source.config
        self.conv_mode = "chat template"
        self.tokenizer = self.source.tokenizer
        self.image_processor = self.source.processor.image_processor
        self.context_len = context_length(self.source.text_config)
        skeleton = self.source.skeleton()
        self._adapter = adapter_for(skeleton)
        self.num_layers = len(self._adapter.layers)

    @property
    def stop_string(self) -> str:
        """None: the chat template's turns end in a token."""
        return ""

    def load(self, options: LoadOptions) -> tuple[Any, Any]:
        """Tokenizer and model."""
        return self.tokenizer, StockModel(self.source, **asdict(options))

    def pruning_config(self, given: Any = None) -> PruningConfig:
        """`given` in any form, else the one beside the weights, else `PruningConfig.for_model`."""
        file = self.source.folder / FILE_NAME
        config = PruningConfig.from_any(f"@{file}" if given is None and file.is_file() else given)
        config = config or PruningConfig.for_model(self._adapter.model)
        config.validate_for(self.num_layers, self._adapter.first_layer)
        return config

    def read_picture(self, source: str | Path | Image.Image) -> Picture:
        """Open a picture. The processor sees it later, together with the text."""
        is_open = isinstance(source, Image.Image)
        image = source.convert("RGB") if isinstance(source, Image.Image) else load_image(source)
        return Picture("picture" if is_open else str(source), image, torch.empty(0))

    def encode(self, turns: Sequence[Turn]) -> Prompt:
        """The prompt that asks the last of `turns`. Raises `UserError` where it fills the context."""
        conversation = [
            (turn.question, [picture.image for picture in turn.pictures], turn.answer.text if turn.answer else None)
            for turn in turns
        ]
        inputs = self.source.encode([conversation])
        ids = inputs.pop("input_ids")
        del inputs["attention_mask"]
        visual = self._adapter.visual_mask(ids)
        row_ids = ids if visual is None else ids.masked_fill(visual, IMAGE_TOKEN_INDEX)
        return self._within_context(Prompt(ids, inputs, [], row_ids[0]))

    def patch_grids(self, prompt: Prompt, sizes: Sequence[Size]) -> list[list[PatchGrid]] | None:
        """Where the prompt's visual rows look in its pictures of these sizes; see `Adapter.patch_grids`."""
        return self._adapter.patch_grids(self.image_processor, prompt.pixels, sizes, prompt.num_visual)
