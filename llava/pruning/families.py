"""What differs from one model family to the next, and nothing else.

An adapter answers: where is the decoder and its layers, which input ids are visual, how many rows an image has, and
from which layer on may rows be dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CLIPVisionModel, PreTrainedModel, SiglipVisionModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .errors import PruningConfigError, UnsupportedCallError, UnsupportedModelError
from .tower import Tiles


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        visual_token_keys: config attributes that hold the ids of visual placeholders in `input_ids`. Empty: only a
            `visual_mask` can tell which rows are visual.
        first_layer: given the outer config, the first layer at whose input rows may be missing.
        row_kwargs: keyword arguments of the decoder that are laid out like its rows, `[batch, rows]`.
        images: given the forward's keyword arguments, how many images there are, where all have equally many rows
            and no text needs to stand between two of them; None: an image is a stretch of visual rows.
        flat_pixels: whether `pixel_values` are those of all prompts one behind the other, so that nothing but the
            placeholders says which prompt an entry belongs to.
        tower: given the model, the layer of its CLIP or SigLIP tower whose output the projector reads; None: no such
            tower, or rows that are not its patches one by one.
        tiles: given the model and the keyword arguments of its call, how the crops of every image lie in its rows;
            None: they do not say.
    """

    visual_token_keys: tuple[str, ...] = ()
    first_layer: Callable[[Any], int] = lambda config: 0
    row_kwargs: tuple[str, ...] = ()
    images: Callable[[Mapping[str, Any]], int | None] = lambda kwargs: None
    flat_pixels: bool = False
    tower: Callable[[Any], Any] | None = None
    tiles: Callable[[Any, Mapping[str, Any]], list[Tiles] | None] = lambda model, kwargs: None


def _count_pictures(kwargs: Mapping[str, Any]) -> int | None:
    pixels = kwargs.get("pixel_values")
    return len(pixels) if pixels is not None else None


def _tower_layer(model: Any) -> Any:
    """The CLIP or SigLIP layer whose output LLaVA's projector reads; None in a model without such a tower."""
    tower = next((part for part in model.modules() if isinstance(part, CLIPVisionModel | SiglipVisionModel)), None)
    if tower is None:
        return None
    selected = getattr(model.config, "mm_vision_select_layer", getattr(model.config, "vision_feature_layer", -2))
    # Entry 0 of the hidden states is the embedding, entry i + 1 what layer i gave.
    layers = getattr(
        tower, "vision_model", tower
    ).encoder.layers  # older versions of transformers wrap SigLIP once more
    return layers[range(len(layers) + 1)[selected] - 1]


def _own_tiles(model: Any, kwargs: Mapping[str, Any]) -> list[Tiles] | None:
    """Of this project's own classes, which lay tiles out themselves."""
    images = kwargs.get("images")
    if images is None:
        return None
    return [Tiles(*own) for own in model.tile_rows(images, kwargs.get("image_sizes"))]


def _packed_tiles(model: Any, kwargs: Mapping[str, Any]) -> list[Tiles] | None:
    """Of LLaVA-NeXT and OneVision: transformers' own packing, done with numbers in the place of features."""
    sizes, config = kwargs.get("image_sizes"), model.config
    if sizes is None or kwargs.get("pixel_values_videos") is not None:
        return None
    side, grid = config.vision_config.image_size, config.image_grid_pinpoints
    patches = (side // config.vision_config.patch_size) ** 2
    together = kwargs.get("batch_num_images")  # OneVision cuts the only image of a prompt alone into tiles
    is_cut = [True] * len(sizes) if together is None else [int(n) == 1 for n in together for _ in range(n)]
    counts = [
        image_size_to_num_patches(size, grid, side) if cut else 1 for size, cut in zip(sizes, is_cut, strict=True)
    ]
    numbers = [torch.arange(count * patches, dtype=torch.float64).view(count, patches, 1) for count in counts]
    own = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    if config.model_type == "llava_onevision":
        own = {"vision_aspect_ratio": kwargs.get("vision_aspect_ratio") or config.vision_aspect_ratio}
    packed, _ = model.model.pack_image_features(numbers, sizes, image_newline=torch.tensor([-1.0]), **own)
    if any((rows != rows.round()).any() for rows in packed):  # scaled down: a row is no patch's own
        return None
    return [Tiles(count, patches, rows[:, 0].long().numpy()) for count, rows in zip(counts, packed, strict=True)]


def _behind_deepstack(config: Any) -> int:
    """Deepstack adds a visual feature to every visual row behind each of the first layers."""
    return len(config.vision_config.deepstack_visual_indexes)


_IMAGE = ("image_token_id",)
_IMAGE_AND_VIDEO = ("image_token_id", "video_token_id")

# By the `model_type` of the outer config.
FAMILIES: dict[str, Family] = {
    "llava": Family(_IMAGE, images=_count_pictures, flat_pixels=True, tower=_tower_layer),
    # The newline rows inside an image have placeholders of their own, so they are visual too.
    "llava_next": Family(_IMAGE, flat_pixels=True, tower=_tower_layer, tiles=_packed_tiles),
    "llava_onevision": Family(_IMAGE_AND_VIDEO, flat_pixels=True, tower=_tower_layer, tiles=_packed_tiles),
    "internvl": Family(_IMAGE, flat_pixels=True),
    "smolvlm": Family(_IMAGE),
    "idefics3": Family(_IMAGE),
    "qwen2_vl": Family(_IMAGE_AND_VIDEO),
    "qwen2_5_vl": Family(_IMAGE_AND_VIDEO),
    "qwen3_vl": Family(
        _IMAGE_AND_VIDEO,
        first_layer=_behind_deepstack,
        row_kwargs=("visual_pos_masks",),
    ),
    # This project's own classes know their visual rows from the splice and hand them over as `visual_mask`.
    "llava_llama": Family(tower=_tower_layer, tiles=_own_tiles),
    "llava_mistral": Family(tower=_tower_layer, tiles=_own_tiles),
    # Language models alone: the caller brings `inputs_embeds` and says which rows are visual.
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}

_INSTEAD = "use a model of one of these types instead: "

# Reasons for those that a user is likely to try.
REFUSED: dict[str, str] = {
    "gemma3": "its image rows attend both ways, through masks of their own",
    "gemma3n": "its layers share keys and values and add features of their own to every row",
    "paligemma": "its whole prompt attends both ways",
    "mllama": "it reads images through cross-attention, so its prompt has no visual rows to prune",
    "idefics": "it reads images through cross-attention, so its prompt has no visual rows to prune",
    "blip-2": "its decoder is not one of the families here, and its images are 32 queries already",
    "instructblip": "its decoder is not one of the families here, and its images are 32 queries already",
    "qwen3_vl_moe": "its experts are not covered by the tests that every family here passes",
    "qwen2_5_omni": "its prompt mixes sound and pictures, and its talker reads the pruned rows",
}


def supported_models() -> list[str]:
    """`model_type`s that `prune` takes."""
    return sorted(FAMILIES)


@dataclass
class Adapter:
    """A model seen through its family.

    Attributes:
        model: the innermost model with `generate`.
        decoder: the module that runs the layers and is called once a forward.
        layers: the decoder's.
        first_layer: the first layer at whose input rows may be missing.
        wrappers: what the caller's model was wrapped in (`torch.compile`, PEFT), outermost first.
    """

    model: PreTrainedModel
    decoder: Any
    family: Family
    wrappers: list[nn.Module] = field(default_factory=list)
    layers: Any = field(init=False)  # an nn.ModuleList, of layers that are typed nowhere
    first_layer: int = field(init=False)

    def __post_init__(self) -> None:
        self.layers = self.decoder.layers
        self.first_layer = self.family.first_layer(self.model.config)

    @property
    def attention_configs(self) -> list[Any]:
        """The configs that the layers' attention reads its implementation from, each once."""
        configs = [self.decoder.config, *(layer.self_attn.config for layer in self.decoder.layers)]
        return list({id(config): config for config in configs}.values())

    def compiled_parts(self) -> list[tuple[nn.Module, str, Any]]:
        """`torch.compile`d modules that hold the decoder or lie in it; the vision tower is none of them.

        Each with the attribute, and the value for it, that make it run uncompiled.
        """
        parts: list[tuple[nn.Module, str, Any]] = []
        for part in dict.fromkeys([*self.wrappers, *self.model.modules()]):
            if hasattr(part, "_orig_mod"):  # torch.compile()
                uncompiled: tuple[nn.Module, str, Any] = (part, "forward", part._orig_mod.__call__)  # type: ignore[operator]
            elif getattr(part, "_compiled_call_impl", None) is not None:  # nn.Module.compile()
                uncompiled = (part, "_compiled_call_impl", None)
            else:
                continue
            inside = any(module is part for module in self.decoder.modules())
            if inside or any(module is self.decoder for module in part.modules()):
                parts.append(uncompiled)
        return parts

    def refuse_wrong_copies(self, copies: int, inputs: Mapping[str, Any]) -> None:
        """Refuse beams whose copies of a prompt would get another's pictures.

        Older versions of transformers (5.17 among them) repeat every entry of `pixel_values` in its place, whatever
        its prompt: right only where each prompt with pictures has exactly one. Newer ones copy what the tower gave.

        Args:
            copies: of each prompt.
            inputs: keyword arguments of `generate`.

        Raises:
            UnsupportedCallError: with the remedy.
        """
        ids = inputs.get("input_ids")
        if copies == 1 or ids is None or not self.family.flat_pixels:
            return
        if hasattr(self.model, "_expand_multimodal_outputs"):
            return
        for key, token in (("pixel_values", "image_token_id"), ("pixel_values_videos", "video_token_id")):
            if inputs.get(key) is None:
                continue
            with_pictures = int((ids == getattr(self.model.config, token)).any(dim=1).sum())
            if len(inputs[key]) != with_pictures:
                raise UnsupportedCallError(
                    f"{copies} copies of a prompt (num_beams or num_return_sequences) with several pictures or tiles: "
                    f"transformers {transformers.__version__} gives the copies each other's pictures; "
                    "use a newer transformers, or one copy and one beam"
                )

    def check(self, method: Any) -> Any:
        """A method whose knobs fit this model; returns it.

        Raises:
            PruningConfigError: with the key, the value and the allowed range.
            UnsupportedModelError: it looks at a vision tower that this model has not.
        """
        if method.needs_tower:
            self.tower_layer(method.name)
        method.validate_for(len(self.layers), self.first_layer)
        # These give every patch its line and column as a position, which a number in the row cannot stand for.
        if method.renumbers and "mrope_section" in (getattr(self.decoder.config, "rope_parameters", None) or {}):
            raise PruningConfigError(
                f"pruning config of {method.name!r}: rows cannot be numbered anew on this "
                f"{self.model.config.model_type} model, whose patches have positions on a grid; set 'positions' to "
                "'keep', or use a method that keeps them"
            )
        return method

    def tower_layer(self, method: str) -> Any:
        """The vision tower's layer that the language model reads, for the method of that name.

        Raises:
            UnsupportedModelError: there is none.
        """
        found = self.family.tower(self.model) if self.family.tower is not None else None
        if found is None:
            raise UnsupportedModelError(
                f"method {method!r} needs a vision tower with a class token (CLIP), whose attention it looks at, or a "
                "SigLIP tower (attention that patches receive), with patches that are the decoder's rows one by one; "
                f"this {self.model.config.model_type!r} model has no such tower, or merges patches behind it; choose a "
                "method that looks at rows alone, such as 'divprune' or 'cdpruner' (relevance 'embeddings' or 'none')"
            )
        return found

    @property
    def has_class_token(self) -> bool:
        """Whether the tower has a class token (CLIP)."""
        return any(isinstance(part, CLIPVisionModel) for part in self.model.modules())

    @property
    def projector(self) -> Any:
        """The module that makes rows of the language model from the states of `tower_layer`."""
        return self.model.model.multi_modal_projector

    def visual_mask(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Which of `input_ids` (int64 [batch, rows]) are visual, bool; None if ids cannot tell."""
        config = self.model.config
        ids = [getattr(config, key) for key in self.family.visual_token_keys if getattr(config, key, None) is not None]
        if not ids:
            return None
        return torch.isin(input_ids, torch.tensor(sorted(set(ids)), device=input_ids.device))


def adapter_for(model: Any) -> Adapter:
    """The adapter of a supported model.

    Raises:
        UnsupportedModelError: with the reason and what to use instead.
    """
    wrappers: list[nn.Module] = []
    inner = model
    while True:
        if hasattr(inner, "_orig_mod"):
            unwrapped = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            unwrapped = inner.get_base_model()
        else:
            break
        wrappers.append(inner)
        inner = unwrapped
    config = getattr(inner, "config", None)
    model_type = getattr(config, "model_type", None) or type(inner).__name__
    family = FAMILIES.get(model_type)
    if family is None:
        reason = REFUSED.get(model_type, "pruning has no adapter for this type")
        raise UnsupportedModelError(
            f"{model_type!r} models cannot be pruned: {reason}; {_INSTEAD}{', '.join(supported_models())}"
        )
    decoder = inner.get_decoder()
    _refuse_windows(model_type, decoder.config)
    return Adapter(inner, decoder, family, wrappers)


def _refuse_windows(model_type: str, config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if kinds or window:
        kind = ", ".join(sorted(kinds)) or "sliding_attention"
        raise UnsupportedModelError(
            f"this {model_type} model has {kind} layers (window {window}), which count rows that pruning removes; "
            "use a checkpoint with full attention"
        )
