"""Where visual rows look, for every family: a spot painted into a picture must move the row that the map says.

Pictures go through the family's own image processor and the model's own vision code; nothing of this project is
between a picture and its rows.
"""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from family_models import FAMILIES, PINPOINTS
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from llava.visualize.patches import map_of_grids, patch_grids

SHARP = {"resample": Image.Resampling.BOX}
CROP = {"crop_size": {"height": 28, "width": 28}}
QWEN = {"patch_size": 7, "merge_size": 2, "size": {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}, **SHARP}
SPLIT = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}, **SHARP}

PROCESSORS = {
    "llava": lambda: CLIPImageProcessorPil(size={"shortest_edge": 28}, **CROP, **SHARP),
    "llava-next": lambda: LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, image_grid_pinpoints=PINPOINTS, **CROP, **SHARP
    ),
    "llava-onevision": lambda: LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS, **SHARP
    ),
    "internvl": lambda: GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=6, **SHARP
    ),
    "smolvlm": lambda: SmolVLMImageProcessorPil(do_image_splitting=True, **SPLIT),
    "idefics3": lambda: Idefics3ImageProcessorPil(do_image_splitting=True, **SPLIT),
    "qwen2-vl": lambda: Qwen2VLImageProcessorPil(**QWEN),
    "qwen2.5-vl": lambda: Qwen2VLImageProcessorPil(**QWEN),
    "qwen3-vl": lambda: Qwen2VLImageProcessorPil(**QWEN),
}
# Towers without layers, where a config may ask for that: a row then depends on its own patches alone.
SETTINGS = {
    "internvl": {"vision_config": {"num_hidden_layers": 0}},
    "smolvlm": {"vision_config": {"num_hidden_layers": 0}},
    "idefics3": {"vision_config": {"num_hidden_layers": 0}},
    "qwen2-vl": {"vision_config": {"depth": 0}},
    "qwen2.5-vl": {"vision_config": {"depth": 0}},
    "qwen3-vl": {"vision_config": {"depth": 0, "deepstack_visual_indexes": []}},
}
# In the others, what a layer adds is set to zero.
ADDED = re.compile(r"vision_tower\..*layers\.\d+\.(self_attn\.out_proj|mlp\.fc2)\.")


class Eye:
    """A family's model and processor, from pictures to visual rows."""

    def __init__(self, name: str, processor=None, nested=False, **settings):
        config = copy.deepcopy(FAMILIES[name].settings)
        for key, value in {**SETTINGS.get(name, {}), **settings}.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
        torch.manual_seed(3)
        config = AutoConfig.for_model(config.pop("model_type"), **config)
        self.model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if ADDED.search(key):
                    parameter.zero_()
                elif key.endswith("image_newline"):
                    parameter.fill_(torch.nan)  # newline rows show nothing
        self.processor = processor or PROCESSORS[name]()
        self.nested = nested or name in ("smolvlm", "idefics3")

    def inputs(self, *pictures):
        return dict(self.processor([pictures] if self.nested else list(pictures), return_tensors="pt"))

    @torch.no_grad()
    def rows(self, *pictures) -> np.ndarray:
        """float [visual rows of all pictures, hidden]."""
        inputs = self.inputs(*pictures)
        for not_for_the_model in ("num_patches", "rows", "cols"):
            inputs.pop(not_for_the_model, None)
        features = self.model.model.get_image_features(**inputs).pooler_output
        parts = features if isinstance(features, list | tuple) else [features]
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).float().numpy()

    def maps(self, *pictures):
        sizes = [picture.size for picture in pictures]
        inputs, num_visual = self.inputs(*pictures), len(self.rows(*pictures))
        grids = patch_grids(self.model.config, self.processor, inputs, sizes, num_visual)
        return grids and [map_of_grids(size, own) for size, own in zip(sizes, grids, strict=True)]


def noise(size, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(60, 120, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def inner_box(box, size):
    """The middle half of what a box shows of the picture, in whole pixels; None where that is nothing."""
    left, top, right, bottom = box
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    inner = tuple(
        round(a * (1 - share) + b * share)
        for a, b, share in ((left, right, 0.25), (top, bottom, 0.25), (left, right, 0.75), (top, bottom, 0.75))
    )
    return inner if inner[2] > inner[0] and inner[3] > inner[1] else None


def assert_spots_come_back(eye: Eye, pictures: list[Image.Image], most: int = 12) -> None:
    before, maps = eye.rows(*pictures), eye.maps(*pictures)
    assert maps is not None and sum(len(each.boxes) for each in maps) == len(before)
    newline = np.isnan(before[:, 0])
    np.testing.assert_array_equal(newline, np.isnan(np.concatenate([each.boxes for each in maps])[:, 0]))
    start = 0
    for number, (picture, patches) in enumerate(zip(pictures, maps, strict=True)):
        places = np.flatnonzero(patches.on_picture)
        for row in places[:: max(1, len(places) // most)]:
            inner = inner_box(patches.boxes[row], picture.size)
            if inner is None:
                continue
            lit = picture.copy()
            lit.paste((255, 255, 255), inner)
            after = eye.rows(*pictures[:number], lit, *pictures[number + 1 :])
            change = np.nan_to_num(np.abs(after - before)).sum(1)
            own = change[start : start + len(patches.boxes)]
            assert change.sum() == pytest.approx(own.sum()), "another picture's rows moved"
            same_view = np.flatnonzero(patches.views == patches.views[row])
            assert same_view[own[same_view].argmax()] == row
        start += len(patches.boxes)


@pytest.mark.parametrize("size", [(84, 56), (50, 120), (60, 60)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_spot_moves_the_row_that_the_map_says(name, size) -> None:
    assert_spots_come_back(Eye(name), [noise(size)])


@pytest.mark.parametrize("name", PROCESSORS)
def test_several_pictures_of_a_prompt(name) -> None:
    assert_spots_come_back(Eye(name), [noise((84, 56)), noise((60, 100), 1)], most=6)


def test_onevision_does_not_cut_several_pictures_of_a_prompt() -> None:
    eye = Eye("llava-onevision", nested=True)
    pictures = [noise((84, 56)), noise((60, 100), 1)]
    maps = eye.maps(*pictures)
    assert all(len(each.boxes) == 17 and not each.has_tiles for each in maps)
    assert_spots_come_back(eye, pictures)


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
def test_rows_of_padding_are_off_the_picture(name) -> None:
    size, eye = (112, 28), Eye(name)
    dark, light = (eye.rows(Image.new("RGB", size, colour)) for colour in ("black", "white"))
    (patches,) = eye.maps(noise(size))
    moved = np.nan_to_num(np.abs(light - dark)).sum(1) > 1e-6
    np.testing.assert_array_equal(moved, patches.on_picture)


@pytest.mark.parametrize("name", ["internvl", "smolvlm", "idefics3"])
def test_pictures_that_are_not_cut(name) -> None:
    processor = PROCESSORS[name]()
    processor.crop_to_patches = processor.do_image_splitting = False
    eye = Eye(name, processor)
    (patches,) = eye.maps(noise((84, 56)))
    assert not patches.has_tiles
    assert_spots_come_back(eye, [noise((84, 56))])


def test_onevision_scales_a_large_map_down() -> None:
    eye = Eye("llava-onevision", vision_aspect_ratio="anyres_max_2")
    (patches,) = eye.maps(noise((60, 60)))
    assert (patches.views == "tiles").sum() < 8 * 8
    assert_spots_come_back(eye, [noise((60, 60))])


def test_settings_that_no_layout_reckons_with_are_not_guessed_at() -> None:
    eye = Eye("llava", vision_feature_select_strategy="full")  # a class token before the patches
    assert eye.maps(noise((60, 60))) is None


def test_a_video_has_no_place_in_a_picture() -> None:
    config = Eye("qwen2-vl").model.config
    assert patch_grids(config, None, {"pixel_values_videos": torch.zeros(1)}, [], 8) is None
