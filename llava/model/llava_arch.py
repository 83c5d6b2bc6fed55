"""LLaVA on transformers' own classes: the tree of ``LlavaForConditionalGeneration`` under LLaVA's names.

Modules, names of weights and the way from rows to logits are transformers' own. What is added is what LLaVA's scripts
call: ``encode_images``, ``generate(images=…)``, and the splice, which puts image rows where one ``IMAGE_TOKEN_INDEX``
stands; transformers wants one placeholder a row, with an id that published vocabularies lack. The splice is the only
place that knows where an image went. It says so in ``visual_mask``, and everything after it (pruning, traces, figures)
goes by that mask, never by a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaModel,
    LlavaForConditionalGeneration,
    LlavaModel,
    MistralConfig,
    MistralModel,
)
from transformers.generation.streamers import BaseStreamer

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import Size, get_anyres_image_grid_shape, merge_type, unpadded_box
from llava.model import checkpoint
from llava.model.key_mapping import module_names, original_name
from llava.model.vision import VisionTower, build_projector, has_vision_tower
from llava.pruning import Method, PruningRun, PruningTrace, call_lock, open_run, prune
from llava.pruning.generation import Generation
from llava.utils import UserError

SAMPLING_KEYS = ("temperature", "top_p", "top_k")


class LlavaConfig(LlamaConfig):
    """A LLaMA config with LLaVA's ``mm_*`` keys; ``vision_config`` (a dict) describes a tower kept inside."""

    model_type = "llava_llama"
    text_config = property(lambda self: self, doc="Where transformers' LLaVA looks for its decoder's config.")


class LlavaMistralConfig(MistralConfig):
    """A Mistral config with LLaVA's ``mm_*`` keys; ``vision_config`` (a dict) describes a tower kept inside."""

    model_type = "llava_mistral"
    text_config = LlavaConfig.text_config


@dataclass
class SplicedInputs:
    """A batch of prompts with their image rows in place, left-padded to the longest.

    Attributes:
        inputs_embeds: ``[B, N, H]`` in the model's dtype; padding rows are zero.
        attention_mask: int64 ``[B, N]``, 0 on padding.
        position_ids: int64 ``[B, N]``, from 0 at each sample's first row.
        image_numbers: int64 ``[B, N]``, on rows that came from an image (newline rows included) its number, from 1
            through the batch; 0 on others.
        input_ids: int64 ``[B, N]``, the id each row came from: ``IMAGE_TOKEN_INDEX`` on visual rows, 0 on padding.
        rows_per_id: int64 ``[B, T]``, how many rows each prompt id became; 0 on the prompts' padding.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    image_numbers: torch.Tensor
    input_ids: torch.Tensor
    rows_per_id: torch.Tensor

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels ``[B, T]`` of the prompts' ids as labels ``[B, N]`` of the rows; images and padding have none.

        Raises:
            UserError: not as many labels as ids.
        """
        if labels.shape != self.rows_per_id.shape:
            raise UserError(f"labels have shape {list(labels.shape)}; the prompt ids {list(self.rows_per_id.shape)}")
        counts = self.rows_per_id.flatten()
        of_rows = torch.full_like(self.input_ids, IGNORE_INDEX)
        of_rows = of_rows.masked_scatter(
            self.attention_mask.bool(), labels.to(counts.device).flatten().repeat_interleave(counts)
        )
        return of_rows.masked_fill(self.visual_mask, IGNORE_INDEX)

    @property
    def visual_mask(self) -> torch.Tensor:
        """Bool ``[B, N]``, true on rows that came from an image."""
        return self.image_numbers > 0


class LlavaParts(LlavaModel):
    """Tower, projector and decoder; without the first two where the config names no tower."""

    def __init__(self, config: Any, decoder: type) -> None:
        super(LlavaModel, self).__init__(config)  # past LlavaModel's own, which knows one tower and one projector
        self.language_model = decoder(config)
        if has_vision_tower(config):
            self.vision_tower = VisionTower(config)
            if getattr(config, "mm_hidden_size", None) is None:
                config.mm_hidden_size = self.vision_tower.hidden_size
            self.multi_modal_projector = build_projector(config)
            if "unpad" in merge_type(config):
                self.image_newline = nn.Parameter(torch.zeros(config.hidden_size))
        self.post_init()

    # Where LLaVA's scripts reach them.
    embed_tokens = property(lambda self: self.language_model.embed_tokens)
    layers = property(lambda self: self.language_model.layers)
    norm = property(lambda self: self.language_model.norm)
    rotary_emb = property(lambda self: self.language_model.rotary_emb)
    mm_projector = property(lambda self: self.multi_modal_projector)


class LlavaLlamaForCausalLM(LlavaForConditionalGeneration):
    """Takes ``images`` and ``pruning_config`` in ``forward`` and ``generate``."""

    config_class: Any = LlavaConfig
    decoder_class: Any = LlamaModel
    labels_follow_rows = True  # so that they may be given while rows are pruned
    _last_pruning_traces: tuple[PruningTrace, ...] = ()
    sampling_settings: Mapping[str, float] = MappingProxyType({})
    """What the checkpoint's generation_config.json says of sampling without turning it on; used by callers who do."""

    def __init__(self, config: Any) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)  # past the one that would build LlavaModel
        self.model = LlavaParts(config, self.decoder_class)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """transformers' own, for a folder (or hub id) of the original layout with everything inside.

        :func:`llava.model.builder.load_pretrained_model` takes all checkpoints, and checks them first.
        """
        if path is None:
            return super().from_pretrained(None, *args, **kwargs)
        folder = checkpoint.resolve_folder(path)
        checkpoint.fetch_weights(path, folder)
        given = {"config": cls.config_class.from_pretrained(folder)} | kwargs
        weights = module_names(checkpoint.open_weights(folder))
        model = super().from_pretrained(None, *args, state_dict=weights, **given)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """torch's own, for weights under the names of any layout."""
        return super().load_state_dict(module_names(state_dict), *args, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """transformers' own, under the names of original checkpoints."""
        weights = kwargs.pop("state_dict", None) or self.state_dict()
        if not any(weight.is_meta for weight in weights.values()):  # offloaded ones are found by their modules' names
            weights = {original_name(key): weight for key, weight in weights.items()}
        super().save_pretrained(save_directory, state_dict=weights, **kwargs)

    def get_model(self) -> LlavaParts:
        """Tower, projector and decoder."""
        return self.model

    def get_vision_tower(self) -> VisionTower | None:
        """The vision tower, or ``None`` in a model without one."""
        return getattr(self.model, "vision_tower", None)

    @property
    def last_pruning_traces(self) -> list[PruningTrace]:
        """What the last ``forward`` or ``generate`` with a ``pruning_config`` decided, one trace a sample."""
        return list(self._last_pruning_traces)

    # --- images → rows ---

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Projected features ``[n, patches, H]`` of images ``[n, 3, S, S]``."""
        return self.model.multi_modal_projector(self._require_tower()(images))

    def _require_tower(self) -> VisionTower:
        tower = getattr(self.model, "vision_tower", None)
        if tower is None:
            raise UserError("images were given, but this model has no vision tower; pass inputs_embeds and visual_mask")
        return tower

    def image_rows(
        self, images: torch.Tensor | Sequence[torch.Tensor], image_sizes: Sequence[Size] | None = None
    ) -> list[torch.Tensor]:
        """The rows ``[rows, H]`` that each image adds to its prompt.

        Args:
            images: ``[n, 3, S, S]``, ``[n, tiles, 3, S, S]`` or a list of either without ``n``.
            image_sizes: (width, height) of each original picture; needed to unpad anyres tiles.

        Raises:
            UserError: a shape that is no image, or sizes that are needed and missing.
        """
        if isinstance(images, torch.Tensor) and images.ndim == 4:
            self._check_pixels(images)
            return list(self.encode_images(images))
        stacks = [image[None] if image.ndim == 3 else image for image in images]
        for stack in stacks:
            self._check_pixels(stack)
        if not stacks:
            return []
        features = self.encode_images(torch.cat([stack.to(stacks[0].device) for stack in stacks]))
        newline = self.model.image_newline if "unpad" in merge_type(self.config) else None
        return self._lay_out(features.split([len(stack) for stack in stacks]), image_sizes, newline)

    def tile_rows(
        self, images: torch.Tensor | Sequence[torch.Tensor], image_sizes: Sequence[Size] | None = None
    ) -> list[tuple[int, int, np.ndarray]]:
        """What the rows of :meth:`image_rows` show, for each image: its tiles (the whole picture is the first of them),
        the patches of a tile, and int64 ``[rows]``, the patch of each row, counted through all tiles; -1: a newline.
        """
        patches = self._require_tower().num_patches
        if isinstance(images, torch.Tensor) and images.ndim == 4:
            return [(1, patches, np.arange(patches))] * len(images)
        counts = [1 if image.ndim == 3 else len(image) for image in images]
        numbers = [torch.arange(count * patches).view(count, patches, 1) for count in counts]
        newline = torch.tensor([-1]) if "unpad" in merge_type(self.config) else None
        laid_out = self._lay_out(numbers, image_sizes, newline)
        return [(count, patches, rows[:, 0].numpy()) for count, rows in zip(counts, laid_out, strict=True)]

    def _check_pixels(self, pixels: torch.Tensor) -> None:
        side = self._require_tower().image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, side, side):
            raise UserError(
                f"images have shape {list(pixels.shape)}; the vision tower takes [n, 3, {side}, {side}] "
                "(process_images makes them)"
            )

    def _lay_out(
        self, parts: Sequence[torch.Tensor], image_sizes: Sequence[Size] | None, newline: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Rows of each image from the features ``[tiles, patches, H]`` of its tiles; ``newline`` ``[H]`` ends lines."""
        if merge_type(self.config) == "flat":
            return [part.flatten(0, 1) for part in parts]
        sizes = list(image_sizes) if image_sizes is not None else [None] * len(parts)
        if len(sizes) != len(parts):
            raise UserError(f"{len(parts)} images but {len(sizes)} image_sizes; give one (width, height) an image")
        return [self._merge_tiles(part, size, newline) for part, size in zip(parts, sizes, strict=True)]

    def _merge_tiles(self, features: torch.Tensor, size: Size | None, newline: torch.Tensor | None) -> torch.Tensor:
        """Rows of one image: its whole-picture tile, then the map of the other tiles, row by row."""
        whole, tiles = features[0], features[1:]
        if len(tiles) == 0:
            return whole if newline is None else torch.cat([whole, newline[None].to(whole)])
        if size is None:
            raise UserError("anyres images need image_sizes, the (width, height) of each original picture")
        tower = self._require_tower()
        side = tower.num_patches_per_side
        columns, rows = get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, tower.image_size)
        if len(tiles) != columns * rows:
            raise UserError(
                f"an image of size {tuple(size)} takes {columns} x {rows} tiles and the whole picture, "
                f"but {len(features)} tiles were given; were image_sizes swapped?"
            )
        # [tiles, side · side, H] → [rows · side, columns · side, H]
        grid = tiles.unflatten(1, (side, side)).unflatten(0, (rows, columns))
        grid = grid.transpose(1, 2).reshape(rows * side, columns * side, -1)
        if newline is None:
            return torch.cat([whole, grid.flatten(0, 1)])
        left, top, right, bottom = unpadded_box(size, (columns * side, rows * side))
        grid = grid[top:bottom, left:right]
        line_ends = newline.to(grid).expand(len(grid), 1, -1)
        return torch.cat([whole, torch.cat([grid, line_ends], dim=1).flatten(0, 1)])

    # --- the splice ---

    def splice(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        images: torch.Tensor | Sequence[torch.Tensor] | None = None,
        image_sizes: Sequence[Size] | None = None,
    ) -> SplicedInputs:
        """Put each image's rows where its ``IMAGE_TOKEN_INDEX`` stands.

        Images are taken in the order of their tokens through the batch; a sample may have none. Padding, on
        either side, is dropped by ``attention_mask``; what comes back is left-padded.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: ``[B, T]``, 0 on padding; absent, every id counts.
            images, image_sizes: see :meth:`image_rows`.

        Raises:
            UserError: not as many images as image tokens, or shapes that do not fit.
        """
        if input_ids.ndim != 2:
            raise UserError(f"prompt ids have shape {list(input_ids.shape)}; they must be [batch, ids]")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise UserError(
                f"attention_mask has shape {list(attention_mask.shape)}; it must be that of the prompt ids, "
                f"{list(input_ids.shape)}"
            )
        embed = self.model.language_model.embed_tokens
        if embed.weight.device.type != "meta":  # offloaded by accelerate; its hooks move the input
            input_ids = input_ids.to(embed.weight.device)
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
        is_image = keep.bool() & (input_ids == IMAGE_TOKEN_INDEX)
        num_tokens, num_images = int(is_image.sum()), 0 if images is None else len(images)
        if num_tokens != num_images:
            raise UserError(
                f"the prompts hold {num_tokens} image tokens, but {num_images} images were given; "
                "every image needs one <image> in its prompt"
            )
        rows = [] if images is None else self.image_rows(images, image_sizes)
        # No row for padding, one for a token, an image's many where its token stands.
        lengths = torch.tensor([len(image) for image in rows], dtype=torch.long, device=input_ids.device)
        counts = keep.bool().long().masked_scatter(is_image, lengths)
        totals = counts.sum(dim=1, keepdim=True)
        longest = int(totals.max())
        attention = torch.arange(longest, device=input_ids.device) >= longest - totals
        row_ids = torch.zeros_like(attention, dtype=torch.long)
        row_ids = row_ids.masked_scatter(attention, input_ids.flatten().repeat_interleave(counts.flatten()))
        visual = row_ids == IMAGE_TOKEN_INDEX
        embeds = embed(row_ids.masked_fill(visual, 0)).masked_fill(~attention[..., None], 0)
        if rows:
            embeds = embeds.masked_scatter(visual[..., None], torch.cat([image.to(embeds) for image in rows]))
        positions = (attention.cumsum(dim=-1) - 1).clamp(min=0)
        of_ids = is_image.flatten().cumsum(dim=0) * is_image.flatten()
        numbers = torch.zeros_like(row_ids).masked_scatter(attention, of_ids.repeat_interleave(counts.flatten()))
        return SplicedInputs(embeds, attention.long(), positions, numbers, row_ids, counts)

    def _beside_a_picture(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``[B, N, H]`` of prompts without a picture, to which a black one adds 0: in distributed training every
        process has to come by the same weights."""
        tower = self.get_vision_tower()
        if tower is None:
            return rows
        black = torch.zeros(1, 3, tower.image_size, tower.image_size, device=rows.device)
        return rows + 0 * self.encode_images(black).sum().to(rows)

    # --- forward and generate ---

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        images: torch.Tensor | Sequence[torch.Tensor] | None = None,
        image_sizes: Sequence[Size] | None = None,
        visual_mask: torch.Tensor | None = None,
        pruning_config: Method | Mapping[str, Any] | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's forward, over ids with images or over rows already spliced.

        Args:
            input_ids: int64 ``[B, T]``, ``IMAGE_TOKEN_INDEX`` where an image goes.
            images, image_sizes: see :meth:`image_rows`.
            inputs_embeds: ``[B, N, H]`` instead of ``input_ids``.
            visual_mask: bool ``[B, N]``, which rows of ``inputs_embeds`` are visual; read on prefill only.
            labels: int64 ``[B, T]`` for ``input_ids`` (``[B, N]`` for rows already spliced), ``IGNORE_INDEX`` where
                none is to be learnt; image rows have none.
            pruning_config: prune this call. The logits are those of the rows that survive; ``[:, -1]`` is the last
                prompt row.

        The other arguments are transformers' own.
        """
        if pruning_config is not None:
            with call_lock(self), prune(self, pruning_config) as own_run:
                outputs = self(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    inputs_embeds=inputs_embeds,
                    labels=labels,
                    use_cache=use_cache,
                    logits_to_keep=logits_to_keep,
                    images=images,
                    image_sizes=image_sizes,
                    visual_mask=visual_mask,
                    **kwargs,
                )
            self._last_pruning_traces = tuple(own_run.traces)
            return outputs
        if images is not None and input_ids is None:
            raise UserError("images go with input_ids; rows in inputs_embeds already hold theirs")
        is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        run = None if labels is None else open_run(self)
        if is_prefill and input_ids is not None:
            if run is None and images is None and not bool((input_ids == IMAGE_TOKEN_INDEX).any()):
                visual_mask = torch.zeros_like(input_ids, dtype=torch.bool)
            else:
                spliced = self.splice(input_ids, attention_mask, images, image_sizes)
                labels = None if labels is None else spliced.labels(labels)
                input_ids, inputs_embeds = None, spliced.inputs_embeds
                attention_mask, visual_mask = spliced.attention_mask, spliced.image_numbers
                position_ids = spliced.position_ids
            if images is None and self.training and torch.distributed.is_initialized():
                rows = self.model.language_model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
                input_ids, inputs_embeds = None, self._beside_a_picture(rows)
        if is_prefill and visual_mask is not None:
            kwargs["visual_mask"] = visual_mask
        # Attention functions take keywords that they do not know, so without an engine the mask goes unread.
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels if run is None else None,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if run is not None and labels is not None:
            targets = _targets(labels, run).to(outputs.logits.device)
            vocabulary = self.config.vocab_size
            outputs.loss = self.loss_function(outputs.logits, None, vocabulary, shift_labels=targets, **kwargs)
        return outputs

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        images: torch.Tensor | Sequence[torch.Tensor] | None = None,
        image_sizes: Sequence[Size] | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_mask: torch.Tensor | None = None,
        pruning_config: Method | Mapping[str, Any] | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` for prompts with images. Returns new ids only.

        Args:
            inputs: int64 ``[B, T]`` prompt ids (also as ``input_ids``), ``IMAGE_TOKEN_INDEX`` where an image goes;
                padding, on either side, must be 0 in ``attention_mask``.
            images, image_sizes: see :meth:`image_rows`.
            inputs_embeds: ``[B, N, H]`` rows already spliced, left-padded, instead of ids; with ``visual_mask``, bool
                ``[B, N]``, where a pruning config is given.
            pruning_config: prune this call (``PruningConfig``, dict, JSON or ``@file``); ``None`` runs the model as
                it is. Decisions are in :attr:`last_pruning_traces` afterwards.
            **kwargs: anything transformers' ``generate`` takes.

        Raises:
            UserError: image tokens and images do not match, or both ids and rows were given.
        """
        ids = input_ids if inputs is None else inputs
        if inputs_embeds is not None and images is not None:
            raise UserError("images go with prompt ids; rows in inputs_embeds already hold theirs")
        if ids is None and inputs_embeds is None:
            raise UserError("generate needs a prompt: ids (with images) or inputs_embeds")
        if inputs_embeds is not None:
            if ids is not None and ids.shape[1] < inputs_embeds.shape[1]:
                raise UserError("give the prompt as ids or as inputs_embeds, not both")
            if ids is None and attention_mask is not None and attention_mask.shape != inputs_embeds.shape[:2]:
                raise UserError(
                    f"attention_mask has shape {list(attention_mask.shape)}; inputs_embeds has "
                    f"{list(inputs_embeds.shape[:2])} rows"
                )
        if pruning_config is None and kwargs.get("use_cache") is False:
            raise UserError("use_cache=False is not supported: rows of images are given once, at the first step")
        self._settle_sampling(kwargs)
        # One call at a time: another thread may be pruning, which shows on the model while it lasts.
        generation = Generation.of(self, kwargs)
        with call_lock(self), ExitStack() as block:
            run = None if pruning_config is None else block.enter_context(prune(self, pruning_config))
            if run is not None:
                given = {**kwargs, "images": images, "image_sizes": image_sizes}
                block.enter_context(run.generating(generation, given))
            row_ids = None
            if inputs_embeds is None and ids is not None:
                kwargs.pop("position_ids", None)  # positions of ids say nothing once image rows are in place
                spliced = self.splice(ids, attention_mask, images, image_sizes)
                inputs_embeds, visual_mask = spliced.inputs_embeds, spliced.image_numbers
                attention_mask, row_ids = spliced.attention_mask, spliced.input_ids
            elif ids is not None:
                kwargs["input_ids"] = ids  # as a candidate generator of assisted decoding calls its assistant
            rows = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "visual_mask": visual_mask}
            kwargs |= {key: value for key, value in rows.items() if value is not None}
            stand_ins = 0
            if "input_ids" not in kwargs and generation.is_assisted:
                stand_ins = self._give_every_row_an_id(kwargs, row_ids)
            outputs: Any = super().generate(**kwargs)  # type: ignore[misc]
        if run is not None:
            self._last_pruning_traces = tuple(run.traces)
        if stand_ins and isinstance(outputs, torch.Tensor):
            return outputs[:, stand_ins:]
        if stand_ins:
            outputs.sequences = outputs.sequences[:, stand_ins:]
        return outputs

    def _settle_sampling(self, kwargs: dict[str, Any]) -> None:
        """The checkpoint's sampling settings where the caller samples and gives none; none at all where not."""
        if kwargs.get("generation_config") is not None:
            return
        if kwargs.get("do_sample", self.generation_config.do_sample):
            kwargs.update({**self.sampling_settings, **kwargs})
        else:
            kwargs.update(dict.fromkeys(SAMPLING_KEYS))

    def _give_every_row_an_id(self, kwargs: dict[str, Any], row_ids: torch.Tensor | None) -> int:
        """Assisted decoding counts ids, so every row gets one. Gives how many ids are to come off the answer."""
        assistant = kwargs.get("assistant_model")
        if assistant is not None and not (
            isinstance(assistant, LlavaLlamaForCausalLM)
            and assistant.config.hidden_size == self.config.hidden_size
            and assistant.config.vocab_size == self.config.vocab_size
        ):
            raise UserError(
                "assistant_model must be a LLaVA model of this package with the same hidden size and vocabulary: "
                "it is given the same rows"
            )
        batch, length = kwargs["inputs_embeds"].shape[:2]
        device = kwargs["inputs_embeds"].device
        # Without a mask transformers would take stand-ins that equal the padding id for padding.
        kwargs.setdefault("attention_mask", torch.ones(batch, length, dtype=torch.long, device=device))
        if row_ids is None:
            row_ids = torch.full((batch, length), IMAGE_TOKEN_INDEX, device=device)
        # Rows without an id of their own get one that ends nothing; drafts made of it are verified like any other.
        end = self.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        stand_in = next(index for index in range(len(ends) + 1) if index not in ends)
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _WithoutPrompt(kwargs["streamer"])
        kwargs["input_ids"] = row_ids.masked_fill(row_ids == IMAGE_TOKEN_INDEX, stand_in)
        return length

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Any,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own; at the first step of assisted decoding the draft ids follow the given rows."""
        if is_first_iteration and inputs_embeds is not None and input_ids.shape[1] > inputs_embeds.shape[1]:
            drafts = self.model.language_model.embed_tokens(input_ids[:, inputs_embeds.shape[1] :])
            inputs_embeds = torch.cat([inputs_embeds, drafts.to(inputs_embeds)], dim=1)
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            next_sequence_length = inputs_embeds.shape[1] - past
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )


def _targets(labels: torch.Tensor, run: PruningRun) -> torch.Tensor:
    """What each row that is left has to predict: the label of the row that was behind it in the whole prompt.

    ``labels`` are those of all rows, ``[B, N]``, left-padded; so are the targets, ``[B, longest]``. What only a row
    that left could have predicted, nobody does.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    targets = []
    for own, trace, left in zip(following, run.traces, run.rows_left, strict=True):
        positions = torch.from_numpy(left).to(own.device)
        own = own[len(own) - trace.num_rows :]
        targets.append(own[positions.clamp(min=0)].masked_fill(positions < 0, IGNORE_INDEX))
    return pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX, padding_side="left")


class _WithoutPrompt(BaseStreamer):
    """Hands a streamer everything but the prompt's ids, which come first."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer = streamer
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(value[:, :0] if self.is_prompt else value)
        self.is_prompt = False

    def end(self) -> None:
        self.streamer.end()


class LlavaMistralForCausalLM(LlavaLlamaForCausalLM):
    """The same on a Mistral decoder."""

    config_class = LlavaMistralConfig
    decoder_class = MistralModel


for _config, _model in ((LlavaConfig, LlavaLlamaForCausalLM), (LlavaMistralConfig, LlavaMistralForCausalLM)):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)
