"""Everything about a model but its weights: a bad path, config, picture or a prompt that is too long is found here.

`open_checkpoint` is the one way in. What differs between LLaVA checkpoints and transformers' own families (prompt
template, picture processing, how prompts are put into one batch, loading) differs between two classes here, and
nowhere behind them.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from llava.constants import (
    ANSWER_INSTRUCTION,
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import build_prompt, conv_templates, conversation_mode
from llava.images import load_image
from llava.inference.answer import Answer
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model import checkpoint as files
from llava.model.builder import context_length, load_image_processor, load_pretrained_model, load_tokenizer
from llava.model.configs import is_hf_layout, model_class, model_config, with_decoder_of
from llava.model.placement import placement_for, quantization_for
from llava.model.recommended import FILE_NAME, recommended_config
from llava.pruning import Method, PruningConfig, PruningConfigError, UnsupportedModelError
from llava.pruning.families import FAMILIES, REFUSED, adapter_for
from llava.utils import UserError

# These are read by `load_pretrained_model`, in both layouts.
_LLAVA_TYPES = ("llava", "llava_next", "llava_llama", "llava_mistral")


@dataclass(frozen=True)
class LoadOptions:
    """Where and how to run a model; the fields are those of `load_pretrained_model`."""

    device: str | None = None
    dtype: str | None = None
    load_8bit: bool = False
    load_4bit: bool = False
    attn_implementation: str | None = None


@dataclass(frozen=True)
class Picture:
    """A picture in a conversation.

    Attributes:
        source: where it came from.
        image: RGB.
        pixels: float ``[3, S, S]`` or ``[tiles, 3, S, S]`` as LLaVA's tower takes it; None where the checkpoint's
            own processor takes it together with the text.
    """

    source: str
    image: Image.Image
    pixels: torch.Tensor | None = None


@dataclass
class Turn:
    """A question, the pictures that came with it, and the answer once there is one.

    `said` is an answer's text where no more of it is known: somebody else kept the conversation.
    """

    question: str
    pictures: list[Picture] = field(default_factory=list)
    answer: Answer | None = None
    said: str | None = None

    @property
    def reply(self) -> str | None:
        """The answer's text."""
        return self.answer.text if self.answer is not None else self.said


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model takes it, pictures included.

    Attributes:
        text: with the template's marks, and a placeholder where each picture goes.
        pictures: in the order of their placeholders.
        ids: int64 ``[1, T]``.
        row_ids: int64 ``[rows]``, the id that each row of the decoder came from; ``IMAGE_TOKEN_INDEX`` on visual ones.
        inputs: what the checkpoint's own processor made of the pictures, by name.
        question: the last turn's, bare: without template, picture placeholders, and the benchmarks' instruction on how
            to answer.
    """

    text: str
    pictures: list[Picture]
    ids: torch.Tensor
    row_ids: torch.Tensor
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    question: str = ""

    @property
    def is_visual(self) -> torch.Tensor:
        """Bool ``[rows]``."""
        return self.row_ids == IMAGE_TOKEN_INDEX

    @property
    def num_rows(self) -> int:
        """Rows of the decoder."""
        return len(self.row_ids)

    @property
    def num_visual(self) -> int:
        """Rows from pictures."""
        return int(self.is_visual.sum())


def bare_question(turn: Turn) -> str:
    """What is asked, without the places of pictures and the instruction on how to answer."""
    return turn.question.replace(DEFAULT_IMAGE_TOKEN, "").replace(ANSWER_INSTRUCTION, "").strip()


def open_checkpoint(
    model_path: str | Path, model_base: str | Path | None = None, conv_mode: str | None = None
) -> Checkpoint:
    """A LLaVA checkpoint of any layout, or a transformers model of a supported family.

    Args:
        model_path: a folder, or a hub id.
        model_base: base model of a LoRA or projector-only LLaVA checkpoint.
        conv_mode: prompt template of a LLaVA checkpoint; absent, its own, else by its name.

    Raises:
        UserError: anything about the checkpoint's small files that makes it unusable, or an option that it has not.
        UnsupportedModelError: a family that `llava.pruning.prune` refuses, with the reason.
    """
    model_type = files.read_json(files.resolve_folder(model_path) / "config.json").get("model_type", "")
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"{model_path} is a {model_type!r} model, which cannot be pruned: {REFUSED[model_type]}"
        )
    family = FAMILIES.get(model_type)
    if model_type in _LLAVA_TYPES or family is None or not family.visual_token_keys:
        return LlavaCheckpoint(model_path, model_base, conv_mode)
    for name, value in (("--model-base", model_base), ("--conv-mode", conv_mode)):
        if value is not None:
            raise UserError(
                f"{name} {value} is for LLaVA checkpoints; a {model_type} model brings its own chat template"
            )
    return StockCheckpoint(model_path)


class Checkpoint(ABC):
    """What every program knows about a model before its weights are read; see `open_checkpoint`.

    Attributes:
        model_path, model_base: as they were given.
        name: of the model, from its path.
        config: of the whole model.
        conv_mode: name of the prompt template.
        stop_string: text that ends an answer; "" where only end tokens do.
        tokenizer, image_processor: the processor's parts; a model without vision tower has no image processor.
        num_layers: of the decoder.
        context_len: rows that a prompt and its answer may have together.
    """

    model_path: str | Path
    model_base: str | Path | None = None
    config: Any
    conv_mode: str
    stop_string: str = ""
    tokenizer: Any
    image_processor: Any
    num_layers: int
    context_len: int

    def __init__(self, model_path: str | Path) -> None:
        self.model_path = model_path
        self.folder = files.resolve_folder(model_path)
        self.name = get_model_name_from_path(str(model_path))
        # A fast tokenizer may not be used by two threads at once.
        self._tokenizing = threading.Lock()

    @abstractmethod
    def pruning_config(self, given: Any = None) -> Method:
        """The config to prune with: ``given`` in any form, else the one recommended for this checkpoint.

        Raises:
            PruningConfigError: malformed, unknown key, out of range, or not for this model.
        """

    @abstractmethod
    def encode(self, turns: Sequence[Turn]) -> Prompt:
        """The prompt that asks the last of ``turns``.

        Raises:
            UserError: ``<image>`` in a question a wrong number of times, or a prompt that fills the context.
        """

    @abstractmethod
    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What the model's ``generate`` takes for prompts of one batch, left-padded."""

    @abstractmethod
    def load(self, options: LoadOptions) -> tuple[Any, Any]:
        """Tokenizer and model, in eval mode. Raises as `load_pretrained_model` does."""

    def new_ids(self, output: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The generated ids, int64 ``[batch, new]``, in what ``generate`` gave for ``inputs``."""
        return output

    def read_picture(self, source: str | Path | Image.Image) -> Picture:
        """Open a picture (path, URL, or one that is open already).

        Raises:
            ImageError: it cannot be used. UserError: the model has no vision tower.
        """
        if self.image_processor is None:
            raise UserError(f"{self.model_path} has no vision tower and takes no pictures")
        if isinstance(source, Image.Image):
            return Picture("picture", source.convert("RGB"))
        return Picture(str(source), load_image(source))

    def _within_context(self, prompt: Prompt) -> Prompt:
        if prompt.num_rows >= self.context_len:
            raise UserError(
                f"the prompt has {prompt.num_rows:,} tokens, {prompt.num_visual:,} of them from pictures, and leaves "
                f"no room for an answer: the model's context is {self.context_len:,}; ask a shorter question, with "
                "fewer pictures or earlier turns"
            )
        return prompt


class LlavaCheckpoint(Checkpoint):
    """A LLaVA checkpoint, of the original or the Hugging Face layout."""

    def __init__(
        self, model_path: str | Path, model_base: str | Path | None = None, conv_mode: str | None = None
    ) -> None:
        super().__init__(model_path)
        self.model_base = model_base = files.base_of(self.folder, model_base)
        raw = files.read_json(self.folder / "config.json")
        tokenizer_folder = self.folder
        if model_base is not None:
            base_folder = files.resolve_folder(model_base)
            base = files.read_json(base_folder / "config.json")
            base = model_config(base).to_dict() if is_hf_layout(base) else base
            raw = with_decoder_of(base, raw)
            if not any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
                tokenizer_folder = base_folder
        self.config = model_config(raw, self.name)
        self.conv_mode = conversation_mode(self.name, self.config, conv_mode)
        stop = conv_templates[self.conv_mode].stop_string
        self.stop_string = stop if stop.strip() else ""  # white space ends turns of a template, not answers
        self.num_layers = self.config.num_hidden_layers
        self.context_len = context_length(self.config)
        self.tokenizer = load_tokenizer(tokenizer_folder)
        self.image_processor = load_image_processor(self.folder, self.config)
        # On the meta device the tower gives every picture's number of rows, tiles and newline rows included,
        # for next to nothing.
        with torch.device("meta"):
            self._skeleton = model_class(self.config)(self.config)

    @property
    def num_patches_per_side(self) -> int:
        """Of the vision tower's input; of a tile where the picture is cut into tiles."""
        return self._skeleton.get_vision_tower().num_patches_per_side

    def pruning_config(self, given: Any = None) -> Method:
        config = recommended_config(self.model_path) if given is None else PruningConfig.from_any(given)
        assert config is not None  # None comes only from None
        try:
            return config.validate_for(self.num_layers)
        except PruningConfigError as error:
            if given is not None:
                raise
            raise PruningConfigError(
                f"{error}; {self.model_path} brings no pruning config of its own and the published one does not fit: "
                "give one with --pruning-config, or --dense"
            ) from error

    def read_picture(self, source: str | Path | Image.Image) -> Picture:
        picture = super().read_picture(source)
        pixels = process_images([picture.image], self.image_processor, self.config)[0]
        return Picture(picture.source, picture.image, pixels)

    def encode(self, turns: Sequence[Turn]) -> Prompt:
        texts = [(self._question(turn), turn.reply) for turn in turns]
        text = build_prompt(self.conv_mode, texts)
        with self._tokenizing:
            ids = tokenizer_image_token(text, self.tokenizer, return_tensors="pt")
        assert isinstance(ids, torch.Tensor)
        pictures = [picture for turn in turns for picture in turn.pictures]
        rows_of_id = torch.ones_like(ids)
        if pictures:
            pixels, sizes = _as_images(pictures, "meta")
            counts = [len(rows) for rows in self._skeleton.image_rows(pixels, sizes)]
            rows_of_id[ids == IMAGE_TOKEN_INDEX] = torch.tensor(counts)
        rows = ids.repeat_interleave(rows_of_id)
        return self._within_context(Prompt(text, pictures, ids[None], rows, question=bare_question(turns[-1])))

    def _question(self, turn: Turn) -> str:
        slots, pictures = turn.question.count(DEFAULT_IMAGE_TOKEN), len(turn.pictures)
        if slots not in (0, pictures):
            raise UserError(
                f"the question holds {DEFAULT_IMAGE_TOKEN} {slots} times for {pictures} new pictures; "
                "leave it out, or place each picture once"
            )
        slot = DEFAULT_IMAGE_TOKEN
        if getattr(self.config, "mm_use_im_start_end", False):
            slot = DEFAULT_IM_START_TOKEN + slot + DEFAULT_IM_END_TOKEN
        if slots:
            return turn.question.replace(DEFAULT_IMAGE_TOKEN, slot)
        return f"{slot}\n" * pictures + turn.question

    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        ids = [prompt.ids[0] for prompt in prompts]
        pictures = [picture for prompt in prompts for picture in prompt.pictures]
        images, sizes = _as_images(pictures) if pictures else (None, None)
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_side="left"),
            "attention_mask": pad_sequence(list(map(torch.ones_like, ids)), batch_first=True, padding_side="left"),
            "images": images,
            "image_sizes": sizes,
        }

    def load(self, options: LoadOptions) -> tuple[Any, Any]:
        tokenizer, model, _, _ = load_pretrained_model(self.model_path, self.model_base, self.name, **asdict(options))
        return tokenizer, model


def _as_images(pictures: Sequence[Picture], device: str = "cpu") -> tuple[Any, list[tuple[int, int]]]:
    """Pictures as `process_images` hands several over, one tensor unless they were tiled, and their sizes."""
    pixels = [picture.pixels.to(device) for picture in pictures if picture.pixels is not None]
    sizes = [picture.image.size for picture in pictures]
    return (torch.stack(pixels) if all(part.ndim == 3 for part in pixels) else pixels), sizes


class StockCheckpoint(Checkpoint):
    """A model that stays what transformers makes of it, with its own processor and chat template."""

    conv_mode = "chat template"

    def __init__(self, model_path: str | Path) -> None:
        super().__init__(model_path)
        self.config = AutoConfig.from_pretrained(self.folder)
        try:
            self._processor: Any = AutoProcessor.from_pretrained(self.folder)
        except (ImportError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{model_path}: transformers cannot make its processor: {reason}") from error
        self.tokenizer, self.image_processor = self._processor.tokenizer, self._processor.image_processor
        if self._processor.chat_template is None and self.tokenizer.chat_template is None:
            raise UserError(f"{model_path} has no chat template: its prompts are unknown")
        self.tokenizer.padding_side = "left"
        self.context_len = context_length(self.config.get_text_config(decoder=True))
        with torch.device("meta"):
            self._adapter = adapter_for(AutoModelForImageTextToText.from_config(self.config))
        self.num_layers = len(self._adapter.layers)

    def pruning_config(self, given: Any = None) -> Method:
        file = self.folder / FILE_NAME
        config = PruningConfig.from_any(f"@{file}" if given is None and file.is_file() else given)
        config = config or PruningConfig.for_model(self._adapter.model)
        return self._adapter.check(config)

    def encode(self, turns: Sequence[Turn]) -> Prompt:
        messages = []
        for turn in turns:
            content = [*({"type": "image"} for _ in turn.pictures), {"type": "text", "text": turn.question}]
            messages.append({"role": "user", "content": content})
            if turn.reply is not None:
                answered = [{"type": "text", "text": turn.reply}]
                messages.append({"role": "assistant", "content": answered})
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        pictures = [picture for turn in turns for picture in turn.pictures]
        inputs = self._process([text], [pictures])
        ids = inputs.pop("input_ids")
        del inputs["attention_mask"]
        visual = self._adapter.visual_mask(ids)
        row_ids = ids if visual is None else ids.masked_fill(visual, IMAGE_TOKEN_INDEX)
        question = bare_question(turns[-1])
        return self._within_context(Prompt(text, pictures, ids, row_ids[0], inputs, question))

    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        if len(prompts) > 1:
            # Only the processor knows how its pictures of several prompts are put together.
            return self._process([prompt.text for prompt in prompts], [prompt.pictures for prompt in prompts])
        (prompt,) = prompts
        return {"input_ids": prompt.ids, "attention_mask": torch.ones_like(prompt.ids), **prompt.inputs}

    def _process(self, texts: list[str], pictures: list[list[Picture]]) -> dict[str, torch.Tensor]:
        images: list[Any] = [[picture.image for picture in own] for own in pictures]
        # Some processors ask for the pictures of each prompt, the others take them one behind the other.
        if self.config.model_type not in ("idefics3", "smolvlm"):
            images = [image for own in images for image in own]
        given = {"images": images} if any(pictures) else {}
        with self._tokenizing:
            return dict(self._processor(text=texts, padding=True, return_tensors="pt", **given))

    def load(self, options: LoadOptions) -> tuple[Any, Any]:
        where = placement_for(options.device, None, options.dtype)
        files.fetch_weights(self.model_path, self.folder)
        model = AutoModelForImageTextToText.from_pretrained(
            self.folder,
            dtype=where.dtype,
            device_map=where.device_map,
            quantization_config=quantization_for(options.load_8bit, options.load_4bit),
            attn_implementation=options.attn_implementation,
        )
        return self.tokenizer, model.eval()

    def new_ids(self, output: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        return output[:, inputs["input_ids"].shape[1] :]
