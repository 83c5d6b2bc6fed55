"""From pictures and prompts to what a LLaVA model takes: image tensors and ids with image placeholders."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.utils import UserError

Size = tuple[int, int]
"""Width and height in pixels, the order of ``PIL.Image.size``."""


# --- prompts ---


def tokenizer_image_token(
    prompt: str,
    tokenizer: Any,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Token ids of ``prompt`` with ``image_token_index`` where each ``<image>`` stands.

    The text between images is tokenised piece by piece; only the first piece keeps its BOS.

    Returns:
        A list of ints, or an int64 tensor ``[T]`` with ``return_tensors="pt"``.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors={return_tensors!r} is not supported; use 'pt' or None")
    pieces = [tokenizer(piece).input_ids for piece in prompt.split(DEFAULT_IMAGE_TOKEN)]
    bos = tokenizer.bos_token_id
    ids: list[int] = list(pieces[0])
    for piece in pieces[1:]:
        starts_with_bos = bos is not None and piece[:1] == [bos]
        ids += [image_token_index, *(piece[1:] if starts_with_bos else piece)]
    return torch.tensor(ids, dtype=torch.long) if return_tensors == "pt" else ids


def get_model_name_from_path(model_path: str) -> str:
    """The name LLaVA reads meaning from: the last path component, with its parent for ``checkpoint-*`` folders."""
    parts = str(model_path).strip("/").split("/")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop once every sample's new text contains one of ``keywords``.

    Args:
        input_ids: int64 ``[B, P]`` prompt ids if ``generate`` returns them too; ``None`` (as here, where only new
            ids come back) means that everything is new.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor | None = None) -> None:
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.prompt_ids = input_ids
        # A keyword cannot span more tokens than it has bytes, so older text need not be decoded again.
        self.window = max((len(keyword.encode()) for keyword in self.keywords), default=0) + 1

    def __call__(self, output_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        """Bool ``[B]``: which samples are done."""
        start = 0
        prompt = self.prompt_ids
        if prompt is not None and output_ids.shape[1] >= prompt.shape[1]:
            same = output_ids[:, : prompt.shape[1]] == prompt.to(output_ids.device)
            start = prompt.shape[1] if bool(same.all()) else 0
        recent = output_ids[:, max(start, output_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(recent, skip_special_tokens=False)
        done = [any(keyword in text for keyword in self.keywords) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=output_ids.device)


# --- pictures ---


def expand2square(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """The picture centred on a square of its longer side, filled with ``background``."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, square_offset(image.size))
    return square


def square_offset(size: Size) -> Size:
    """Where :func:`expand2square` puts the top-left corner of a picture of ``size``."""
    side = max(size)
    return (side - size[0]) // 2, (side - size[1]) // 2


def grid_pinpoints(value: Any) -> list[Size]:
    """``image_grid_pinpoints`` of a config (a list, or its text) as ``(width, height)`` pairs.

    Raises:
        UserError: it is anything else.
    """
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        sizes = [(int(width), int(height)) for width, height in pairs]
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(
            f"image_grid_pinpoints is {value!r}; a list of [width, height] is needed for anyres images"
        ) from error
    if not sizes:
        raise UserError("image_grid_pinpoints is empty; a list of [width, height] is needed for anyres images")
    return sizes


def select_best_resolution(original_size: Size, possible_resolutions: Sequence[Sequence[int]]) -> Size:
    """The grid for a picture: most pixels of the picture kept, then the least area wasted, then the first.

    Args:
        original_size: (width, height) of the picture.
        possible_resolutions: (width, height) of each grid.
    """
    width, height = original_size

    def rank(resolution: Sequence[int]) -> tuple[int, int]:
        grid_width, grid_height = resolution
        scale = min(grid_width / width, grid_height / height)
        scaled = int(width * scale) * int(height * scale)
        effective = min(scaled, width * height)
        return effective, effective - grid_width * grid_height

    best = max(possible_resolutions, key=rank)
    return best[0], best[1]


def get_anyres_image_grid_shape(image_size: Size, grid: Any, patch_size: int) -> Size:
    """How many tiles of ``patch_size`` pixels the chosen grid has: (columns, rows)."""
    width, height = select_best_resolution(image_size, grid_pinpoints(grid))
    return width // patch_size, height // patch_size


def letterbox(size: Size, target: Size) -> tuple[int, int, int, int]:
    """Where a picture of ``size`` lies once fitted into ``target`` and centred: (left, top, width, height)."""
    width, height = size
    target_width, target_height = target
    if target_width * height < target_height * width:
        new_width = target_width
        new_height = min(-(-height * target_width // width), target_height)
    else:
        new_height = target_height
        new_width = min(-(-width * target_height // height), target_width)
    return (target_width - new_width) // 2, (target_height - new_height) // 2, new_width, new_height


def resize_and_pad_image(image: Image.Image, target: Size) -> Image.Image:
    """The picture scaled to fit into ``target`` (width, height), centred on black."""
    left, top, width, height = letterbox(image.size, target)
    canvas = Image.new("RGB", target, (0, 0, 0))
    canvas.paste(image.resize((width, height)), (left, top))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Square tiles of ``patch_size`` pixels, row by row."""
    return [
        image.crop((x, y, x + patch_size, y + patch_size))
        for y in range(0, image.height, patch_size)
        for x in range(0, image.width, patch_size)
    ]


def processor_shortest_edge(processor: Any) -> int:
    """Pixels of the shorter side to which a CLIP processor resizes."""
    size = dict(processor.size)
    return int(size.get("shortest_edge") or min(size["height"], size["width"]))


def merge_type(config: Any) -> str:
    """How the tiles of an anyres image become rows: ``flat``, ``spatial`` or ``spatial_unpad``.

    Raises:
        UserError: the config says anything else.
    """
    kind = getattr(config, "mm_patch_merge_type", None) or "flat"
    if kind not in ("flat", "spatial", "spatial_unpad"):
        raise UserError(f"mm_patch_merge_type is {kind!r}; known are flat, spatial and spatial_unpad")
    return kind


def _pixels(image: Image.Image, processor: Any) -> torch.Tensor:
    return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


def process_anyres_image(image: Image.Image, processor: Any, pinpoints: Any) -> torch.Tensor:
    """Float ``[1 + tiles, 3, S, S]``: the whole picture squeezed into one tile, then the chosen grid's tiles."""
    tile = processor.crop_size["height"]
    grid = select_best_resolution(image.size, grid_pinpoints(pinpoints))
    whole = image.resize((processor_shortest_edge(processor),) * 2)
    tiles = divide_to_patches(resize_and_pad_image(image, grid), tile)
    return torch.stack([_pixels(part, processor) for part in (whole, *tiles)])


def process_images(images: Sequence[Image.Image], image_processor: Any, model_cfg: Any) -> Any:
    """Pictures as the model's vision tower takes them, prepared as ``model_cfg.image_aspect_ratio`` says.

    ``pad``: centred on a square of the processor's mean colour. ``anyres``: the best grid of
    ``image_grid_pinpoints`` plus the whole picture. Anything else: resized and cropped by the processor.

    Args:
        images: pictures; other modes than RGB are converted.
        image_processor: a CLIP image processor.
        model_cfg: the model's config.

    Returns:
        Float ``[n, 3, S, S]``; with anyres pictures of different grids a list of ``[1 + tiles, 3, S, S]``, of
        equal grids ``[n, 1 + tiles, 3, S, S]``.
    """
    images = [image.convert("RGB") for image in images]
    aspect = getattr(model_cfg, "image_aspect_ratio", None)
    if aspect == "pad":
        background = tuple(int(channel * 255) for channel in image_processor.image_mean)
        prepared = [_pixels(expand2square(image, background), image_processor) for image in images]
    elif aspect == "anyres":
        prepared = [process_anyres_image(image, image_processor, model_cfg.image_grid_pinpoints) for image in images]
    else:
        prepared = [_pixels(image, image_processor) for image in images]
    if prepared and all(pixels.shape == prepared[0].shape for pixels in prepared):
        return torch.stack(prepared)
    return prepared


def unpadded_box(original_size: Size, map_size: Size) -> tuple[int, int, int, int]:
    """The part of a feature map that shows the picture and not its padding.

    Args:
        original_size: (width, height) of the picture.
        map_size: (columns, rows) of the map, over the whole grid.

    Returns:
        left, top, right, bottom, in cells of the map, ends exclusive.
    """
    width, height = original_size
    columns, rows = map_size
    if width * rows > columns * height:
        padding = (rows - height * columns // width) // 2
        return 0, padding, columns, rows - padding
    padding = (columns - width * rows // height) // 2
    return padding, 0, columns - padding, rows
