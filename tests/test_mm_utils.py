"""Pictures and prompts on their way to the model, and rows on their way back to the picture."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from PIL import Image, ImageDraw
from sentencepiece import sentencepiece_model_pb2
from tiny_checkpoints import ANYRES, TILE, tiny_config, tiny_model, tiny_tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    get_model_name_from_path,
    process_images,
    select_best_resolution,
    tokenizer_image_token,
)
from llava.model.builder import load_tokenizer
from llava.utils import UserError
from llava.visualize.patches import patch_map

RECORDED = json.loads((Path(__file__).parent / "data" / "conversation_prompts.json").read_text())["templates"]
V16_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


# --- tokenising ---


def write_recorded_vocabulary(file: Path) -> None:
    """A sentencepiece model with the few pieces of the real LLaMA vocabulary that the recorded prompts use.

    The pieces are spelt out here; that text and recorded ids fit together, piece by piece, is what fixes their ids.
    """
    spelt = {
        "vicuna_v1": "<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant . ▁The"
        " ▁assistant ▁gives ▁helpful , ▁detailed , ▁and ▁pol ite ▁answers ▁to ▁the ▁user ' s ▁questions . ▁US ER : ▁",
        "llava_v1": "<s> ▁A ▁chat ▁between ▁a ▁curious ▁human ▁and ▁an ▁artificial ▁intelligence ▁assistant . ▁The"
        " ▁assistant ▁gives ▁helpful , ▁detailed , ▁and ▁pol ite ▁answers ▁to ▁the ▁human ' s ▁questions . ▁US ER : ▁",
        "llava_llama_2": "<s> ▁[ INST ] ▁<< SY S >> \n You ▁are ▁a ▁helpful ▁language ▁and ▁vision ▁assistant . ▁You"
        " ▁are ▁able ▁to ▁understand ▁the ▁visual ▁content ▁that ▁the ▁user ▁provides , ▁and ▁assist ▁the ▁user ▁with"
        " ▁a ▁variety ▁of ▁tasks ▁using ▁natural ▁language . \n < </ SY S >> \n \n",
    }
    after = {"vicuna_v1": "▁ \n What ▁is ▁this ? ▁A SS IST ANT :", "llava_llama_2": "▁ \n What ▁is ▁this ? ▁[ / INST ]"}
    pieces = {0: "<unk>", 1: "<s>", 2: "</s>"}
    for key, texts in (("ids_before_image", spelt), ("ids_after_image", after)):
        for name, text in texts.items():
            for piece, index in zip(text.split(" "), RECORDED[name][key], strict=True):
                assert pieces.setdefault(index, piece) == piece
    assert pieces.pop(13) == "\n"  # the vocabulary's byte pieces start at 3
    known = set(pieces.values())
    # Byte-pair encoding reaches a piece letter by letter; the pieces on the way get ids that no prompt above has.
    words = sorted((piece for index, piece in pieces.items() if index > 2), key=lambda piece: piece[0] != "▁")
    grown = [word[:end] for word in words for end in range(2, len(word) + 1)]
    rank = {piece: index for index, piece in reversed(list(enumerate(grown)))}
    free = (index for index in range(260, 32000) if index not in pieces)
    for piece in sorted({*grown, *"".join(words), "▁▁"} - known):
        pieces[next(free)] = piece
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    kinds = {0: 2, 1: 3, 2: 3}  # unknown, control, control
    for index in range(32000):
        is_byte = index not in pieces and 3 <= index < 259
        piece = pieces.get(index, f"<0x{index - 3:02X}>" if is_byte else f"<unused{index}>")
        kind = kinds.get(index, 6 if is_byte else 1)
        proto.pieces.add(piece=piece, score=-float(rank.get(piece, 10**6)), type=kind)
    file.write_bytes(proto.SerializeToString())


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_recorded_vocabulary(folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("name", [name for name, record in RECORDED.items() if "ids_before_image" in record])
def test_recorded_prompts_have_the_recorded_ids(llama_folder, name):
    record = RECORDED[name]
    ids = tokenizer_image_token(record["one_turn"], load_tokenizer(llama_folder))
    assert ids == [*record["ids_before_image"], IMAGE_TOKEN_INDEX, *record["ids_after_image"]]
    lengths = {"vicuna_v1": 35, "llava_v1": 35, "llava_llama_2": 52, "mistral_instruct": 5}
    assert ids.index(IMAGE_TOKEN_INDEX) == lengths[name]


@pytest.mark.parametrize("text", [" and", "and", " ", "\n", "  the user.", "\nWhat is this", "a  the", "."])
def test_pieces_have_the_ids_that_sentencepiece_gives(llama_folder, text):
    original = sentencepiece.SentencePieceProcessor(model_file=str(llama_folder / "tokenizer.model"))
    assert load_tokenizer(llama_folder)(text).input_ids == [1, *original.encode(text)]


def test_only_the_first_piece_keeps_its_bos():
    ids = tokenizer_image_token("<image> red <image><image> blue", tiny_tokenizer())
    assert ids == [1, -200, 8, -200, -200, 9]


def test_a_prompt_without_images_is_tokenised_as_it_is():
    tensor = tokenizer_image_token("USER: what", tiny_tokenizer(), return_tensors="pt")
    assert tensor.dtype == torch.long and tensor.tolist() == [1, 3, 5]


def test_return_tensors_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="'tf'"):
        tokenizer_image_token("a", tiny_tokenizer(), return_tensors="tf")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("/models/llava-v1.5-7b/", "llava-v1.5-7b"),
        ("/models/llava-lora/checkpoint-400", "llava-lora_checkpoint-400"),
    ],
)
def test_model_name_from_path(path, name):
    assert get_model_name_from_path(path) == name


def test_keywords_stop_a_sample_once_they_are_in_its_new_text():
    tokenizer = tiny_tokenizer()
    stop = KeywordsStoppingCriteria(["cat"], tokenizer)
    assert stop(torch.tensor([[5, 11, 8], [5, 6, 8]]), None).tolist() == [True, False]
    prompt = torch.tensor([[11, 5]])
    stop = KeywordsStoppingCriteria(["cat"], tokenizer, prompt)
    assert stop(torch.tensor([[11, 5, 6]]), None).tolist() == [False]
    assert stop(torch.tensor([[11, 5, 11]]), None).tolist() == [True]


# --- pictures ---


def processor(**overrides) -> CLIPImageProcessorPil:
    settings = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}, **overrides}
    return CLIPImageProcessorPil(**settings)


@pytest.mark.parametrize("size", [(5, 9), (9, 5), (7, 7), (1, 4)])
def test_expand2square_keeps_every_pixel_and_fills_the_rest(size):
    picture = Image.new("RGB", size, (255, 0, 0))
    square = expand2square(picture, (1, 2, 3))
    side = max(size)
    assert square.size == (side, side)
    colours = {colour: count for count, colour in square.getcolors()}
    assert colours[(255, 0, 0)] == size[0] * size[1]
    assert colours.get((1, 2, 3), 0) == side * side - size[0] * size[1]


def test_pad_uses_the_processors_mean_colour():
    ours = processor(image_mean=[0.5, 0.25, 0.75])
    config = SimpleNamespace(image_aspect_ratio="pad")
    pixels = process_images([Image.new("RGB", (TILE, TILE // 2))], ours, config)
    assert pixels.shape == (1, 3, TILE, TILE)
    expected = [
        (math.floor(mean * 255) / 255 - mean) / std for mean, std in zip(ours.image_mean, ours.image_std, strict=True)
    ]
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor(expected), atol=1e-5, rtol=0)


def test_without_an_aspect_ratio_the_centre_is_cropped():
    picture = Image.new("RGB", (3 * TILE, TILE), (255, 0, 0))
    picture.paste((0, 255, 0), (TILE, 0, 2 * TILE, TILE))
    pixels = process_images([picture], processor(), SimpleNamespace())
    green = processor().preprocess(Image.new("RGB", (TILE, TILE), (0, 255, 0)))["pixel_values"][0]
    torch.testing.assert_close(pixels[0], torch.as_tensor(green))


# Worked by hand from the published rule: largest effective resolution, then least waste, in (width, height).
@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((672, 672), (672, 672)),
        ((1000, 1000), (672, 672)),
        ((100, 100), (336, 672)),  # every grid holds all of it; the first two waste least, the first wins
        ((640, 480), (672, 672)),
        ((336, 672), (336, 672)),
        ((672, 336), (672, 336)),
        ((2000, 300), (1008, 336)),
        ((300, 2000), (336, 1008)),
    ],
)
def test_best_resolution(size, grid):
    assert select_best_resolution(size, V16_GRIDS) == grid
    assert get_anyres_image_grid_shape(size, V16_GRIDS, 336) == (grid[0] // 336, grid[1] // 336)


def test_grids_may_be_text_and_nonsense_is_an_error():
    assert get_anyres_image_grid_shape((600, 300), str(V16_GRIDS), 336) == (2, 1)
    for nonsense in ("[[1, 2", None, [[1]], []):
        with pytest.raises(UserError, match="image_grid_pinpoints"):
            get_anyres_image_grid_shape((600, 300), nonsense, 336)


def test_tiles_go_row_by_row():
    picture = Image.new("RGB", (4, 4))
    for index, corner in enumerate([(0, 0), (2, 0), (0, 2), (2, 2)]):
        picture.paste((index, 0, 0), (*corner, corner[0] + 2, corner[1] + 2))
    assert [tile.getpixel((0, 0))[0] for tile in divide_to_patches(picture, 2)] == [0, 1, 2, 3]


def test_anyres_pictures_of_equal_grids_stack_and_of_others_do_not():
    config = SimpleNamespace(**ANYRES)
    wide, square = Image.new("RGB", (90, 40)), Image.new("RGB", (60, 60))
    assert process_images([wide, wide], processor(), config).shape == (2, 4, 3, TILE, TILE)
    mixed = process_images([wide, square], processor(), config)
    assert [tuple(pixels.shape) for pixels in mixed] == [(4, 3, TILE, TILE), (5, 3, TILE, TILE)]


# --- rows back to the picture ---


def visible_boxes(size, config, image_processor, tower):
    """What each row shows of the picture (left, top, right, bottom, clipped to it), or None."""
    rows = patch_map(size, image_processor, config, tower.num_patches_per_side)
    limits = (*size, *size)
    return [
        tuple(min(max(edge, 0), limit) for edge, limit in zip(box, limits, strict=True)) if shown else None
        for box, shown in zip(rows.boxes.tolist(), rows.on_picture.tolist(), strict=True)
    ]


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def brightest_row(model, config, image_processor, picture, among):
    """The row whose patch (or patches' mean) is brightest, read from the pixels that the tower would get."""
    pixels = process_images([picture], image_processor, config)[0]
    tiles = pixels if pixels.ndim == 4 else pixels[None]
    tower, side = model.get_vision_tower(), model.get_vision_tower().num_patches_per_side
    patch = tower.image_size // side
    means = tiles.mean(dim=1).unfold(1, patch, patch).unfold(2, patch, patch).mean(dim=(-1, -2))  # [tiles, side, side]

    # Stands for tower and projector: a row is its patch's brightness.
    model.encode_images = lambda images: means.flatten(1)[..., None].expand(-1, -1, config.hidden_size)
    try:
        rows = model.image_rows(pixels[None], [picture.size])[0][:, 0]
    finally:
        del model.encode_images
    return max(among, key=lambda row: rows[row].item())


@pytest.mark.parametrize("size", [(224, 224), (300, 200), (150, 400), (413, 97)])
@pytest.mark.parametrize(
    "layout",
    [
        {"image_aspect_ratio": "pad"},
        {"image_aspect_ratio": None},
        ANYRES,
        {**ANYRES, "mm_patch_merge_type": "flat"},
        {**ANYRES, "mm_patch_merge_type": "spatial"},
    ],
    ids=["pad", "crop", "anyres-unpad", "anyres-flat", "anyres-spatial"],
)
def test_a_marked_box_lights_up_its_own_row(size, layout):
    config = tiny_config(**layout)
    model = tiny_model(config)
    image_processor = processor(image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0])
    boxes = visible_boxes(size, config, image_processor, model.get_vision_tower())
    pixels = process_images([Image.new("RGB", size)], image_processor, config)
    assert len(boxes) == len(model.image_rows(pixels, [size])[0])

    per_tile = model.get_vision_tower().num_patches
    shown = [row for row, box in enumerate(boxes) if box is not None]
    # Slivers at the border of the padding are too thin to outshine the blur of their neighbours.
    largest = max(area(boxes[row]) for row in shown[per_tile:] or shown)
    for row in shown:
        box = boxes[row]
        if area(box) < 0.5 * largest:
            continue
        picture = Image.new("RGB", size)
        corners = [math.ceil(box[0]), math.ceil(box[1]), math.floor(box[2]) - 1, math.floor(box[3]) - 1]
        ImageDraw.Draw(picture).rectangle(corners, fill=(255, 255, 255))
        is_whole_tile = row < per_tile
        among = [other for other in shown if (other < per_tile) == is_whole_tile]
        assert brightest_row(model, config, image_processor, picture, among) == row


@pytest.mark.parametrize("size", [(224, 224), (300, 200), (150, 400)])
@pytest.mark.parametrize("layout", [{"image_aspect_ratio": "pad"}, ANYRES], ids=["pad", "anyres"])
def test_boxes_cover_the_picture_exactly(size, layout):
    config = tiny_config(**layout)
    tower = tiny_model(config).get_vision_tower()
    boxes = visible_boxes(size, config, processor(), tower)
    whole, tiles = boxes[: tower.num_patches], boxes[tower.num_patches :]
    assert sum(area(box) for box in whole if box) == pytest.approx(size[0] * size[1])
    if layout is ANYRES:
        # A row of cells that is mostly padding is dropped with it, so the tiles may miss a rim of the picture.
        covered = sum(area(box) for box in tiles if box)
        assert 0.5 * size[0] * size[1] < covered <= size[0] * size[1] * (1 + 1e-9)


def test_a_square_672_picture_has_2928_rows_under_v16():
    vision = {"image_size": 336, "patch_size": 14, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = tiny_config(
        vision_config={**vision, "num_attention_heads": 1}, mm_hidden_size=8, mm_vision_select_layer=-1
    )
    config.image_aspect_ratio, config.mm_patch_merge_type = "anyres", "spatial_unpad"
    config.image_grid_pinpoints = V16_GRIDS
    model = tiny_model(config)
    pixels = process_images(
        [Image.new("RGB", (672, 672))], processor(size={"shortest_edge": 336}, crop_size=336), config
    )
    assert len(model.image_rows(pixels, [(672, 672)])[0]) == 576 + 48 * 48 + 48
