"""transformers' own vision-language models, with their own processor and chat template.

`load_pretrained_model` reads LLaVA checkpoints into this project's classes. Every other supported family stays what
transformers makes of it; `StockModel` gives it the interface that the programs here know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from llava.model import checkpoint as files
from llava.model.placement import placement_for, quantization_for
from llava.pruning import PruningConfig, PruningTrace, prune
from llava.pruning.families import FAMILIES, REFUSED, UnsupportedModelError
from llava.utils import UserError

Conversation = Sequence[tuple[str, Sequence[Image.Image], str | None]]
"""Turns, oldest first: question, the pictures that come with it, and the answer (None: the one to be given)."""

# These are read by `load_pretrained_model`, in both layouts.
_OWN = ("llava", "llava_next", "llava_llama", "llava_mistral")


def stock_model_type(model_path: str | Path) -> str | None:
    """`model_type` of a checkpoint that transformers itself has to run; None for a LLaVA checkpoint.

    Raises:
        UserError: no such checkpoint, or no readable `config.json`.
        UnsupportedModelError: a family that `prune` refuses, with the reason.
    """
    model_type = files.read_json(files.resolve_folder(model_path) / "config.json").get("model_type", "")
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"{model_path} is a {model_type!r} model, which cannot be pruned: {REFUSED[model_type]}"
        )
    family = FAMILIES.get(model_type)
    return model_type if family is not None and family.visual_token_keys and model_type not in _OWN else None


class StockProcessor:
    """A checkpoint without its weights: config and processor.

    Raises:
        UserError: the processor cannot be made; it names what is missing.
    """

    def __init__(self, model_path: str | Path) -> None:
        self.folder = files.resolve_folder(model_path)
        self.model_path = model_path
        self.config: Any = AutoConfig.from_pretrained(self.folder)
        try:
            self.processor: Any = AutoProcessor.from_pretrained(self.folder)
        except (ImportError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{model_path}: transformers cannot make its processor: {reason}") from error
        if self.processor.chat_template is None and self.processor.tokenizer.chat_template is None:
            raise UserError(f"{model_path} has no chat template: its prompts are unknown")
        self.processor.tokenizer.padding_side = "left"

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def text_config(self) -> Any:
        """The decoder's config."""
        return self.config.get_text_config(decoder=True)

    def skeleton(self) -> torch.nn.Module:
        """The model without weights, on the meta device."""
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(self.config)

    def encode(self, conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        """What the model's `generate` takes: left-padded int64 ids `[batch, rows]`, their mask, and the pictures."""
        texts, pictures = [], []
        for conversation in conversations:
            messages: list[dict[str, Any]] = []
            own: list[Image.Image] = []
            for question, images, answer in conversation:
                content: list[dict[str, str]] = [{"type": "image"} for _ in images]
                messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
                own += images
                if answer is not None:
                    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            texts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            pictures.append(own)
        given: dict[str, Any] = {}
        if any(pictures):
            # Some processors ask for the pictures of each prompt, the others take them one behind the other.
            nested = self.config.model_type in ("idefics3", "smolvlm")
            given["images"] = pictures if nested else [image for own in pictures for image in own]
        return dict(self.processor(text=texts, padding=True, return_tensors="pt", **given))


class StockModel:
    """A loaded model behind the interface of this project's own.

    Args:
        source: its processor.
        load_8bit, load_4bit, device, dtype, attn_implementation: as in `load_pretrained_model`.
    """

    def __init__(
        self,
        source: StockProcessor,
        load_8bit: bool = False,
        load_4bit: bool = False,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> None:
        where = placement_for(device, None, dtype)
        files.fetch_weights(source.model_path, source.folder)
        self.source = source
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            source.folder,
            dtype=where.dtype,
            device_map=where.device_map,
            quantization_config=quantization_for(load_8bit, load_4bit),
            attn_implementation=attn_implementation,
        ).eval()
        self.last_pruning_traces: list[PruningTrace] = []

    def get_base_model(self) -> Any:
        """The model inside, as PEFT's wrappers name it."""
        return self.model

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    def generate(
        self,
        input_ids: torch.Tensor,
        images: Mapping[str, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        pruning_config: PruningConfig | Mapping[str, Any] | str | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """New ids only, int64 `[batch, new]`.

        Args:
            images: all that `StockProcessor.encode` gave beside ids and mask.
            pruning_config: as in this project's own models; None is dense.
        """
        inputs = {
            key: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for key, value in (images or {}).items()
        }
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        kwargs.pop("image_sizes", None)  # among `images`, where the family has them
        config = PruningConfig.from_any(pruning_config)
        call = {"input_ids": input_ids.to(self.device), "attention_mask": attention_mask.to(self.device)}
        if config is None:
            output = self.model.generate(**call, **inputs, **kwargs)
        else:
            with prune(self.model, config) as run:
                output = self.model.generate(**call, **inputs, **kwargs)
            self.last_pruning_traces = run.traces
        return output[:, input_ids.shape[1] :]
