"""The splice and the model classes around it, against transformers' own decoder given the same rows."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import ANYRES, DECODER, PATCHES_PER_SIDE, TILE, original_weights, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TextStreamer,
)

from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.mm_utils import Size
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.pruning import PruningTrace
from llava.utils import UserError

ROWS = PATCHES_PER_SIDE**2
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def plain(model):
    """transformers' LLaMA with the decoder's weights."""
    decoder = LlamaForCausalLM(LlamaConfig(**DECODER)).eval()
    decoder.load_state_dict({k: v for k, v in original_weights(model).items() if k in decoder.state_dict()})
    return decoder


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, TILE, TILE, generator=torch.Generator().manual_seed(seed))


def by_hand(model, ids: list[int], images: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """The rows of one prompt, put together one at a time."""
    features = iter(model.encode_images(images)) if len(images) else iter([])
    rows, visual = [], []
    for index in ids:
        new = list(next(features)) if index == IMAGE else [model.model.embed_tokens.weight[index]]
        rows += new
        visual += [index == IMAGE] * len(new)
    return torch.stack(rows), visual


# --- equal to the decoder ---


def test_text_logits_are_bit_equal_to_the_plain_decoder(model, plain):
    ids = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 11, 10, 4, 3, 2]])
    assert torch.equal(model(ids).logits, plain(ids).logits)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generated_text_is_the_plain_decoders_without_its_prompt(model, plain, options):
    ids = torch.tensor([[1, 5, 6, 7]])
    expected = plain.generate(ids, **GREEDY, **options)[:, ids.shape[1] :]
    assert torch.equal(model.generate(ids, **GREEDY, **options), expected)


def test_logits_with_an_image_are_the_plain_decoders_over_the_same_rows(model, plain):
    ids, images = [1, 3, IMAGE, 5, 6, 4], pictures(1)
    rows, _ = by_hand(model, ids, images)
    assert torch.equal(model(torch.tensor([ids]), images=images).logits, plain(inputs_embeds=rows[None]).logits)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"output_hidden_states": True, "return_dict_in_generate": True, "output_logits": True},
    ],
)
def test_generation_with_an_image_is_the_plain_decoders_over_the_same_rows(model, plain, options):
    ids, images = [1, 3, IMAGE, 5, 6, 4], pictures(1)
    rows, _ = by_hand(model, ids, images)
    got = model.generate(torch.tensor([ids]), images=images, **GREEDY, **options)
    expected = plain.generate(inputs_embeds=rows[None], **GREEDY, **options)
    if torch.is_tensor(expected):
        assert torch.equal(got, expected)
        return
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))
    for got_step, expected_step in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert len(got_step) == DECODER["num_hidden_layers"] + 1
        assert all(torch.equal(a, b) for a, b in zip(got_step, expected_step, strict=True))


def test_sampling_with_an_image_is_the_plain_decoders_over_the_same_rows(model, plain):
    ids, images = [1, 3, IMAGE, 5, 6, 4], pictures(1)
    rows, _ = by_hand(model, ids, images)
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7}
    torch.manual_seed(3)
    got = model.generate(torch.tensor([ids]), images=images, **options)
    torch.manual_seed(3)
    assert torch.equal(got, plain.generate(inputs_embeds=rows[None], **options))


def test_asking_for_hidden_states_does_not_change_the_features():
    model = tiny_model()  # a fresh one: what is guarded happens at the first such request
    ids, images = torch.tensor([[1, IMAGE, 5, 4]]), pictures(1)
    before = model.encode_images(images)
    model.generate(ids, images=images, **GREEDY, output_hidden_states=True, return_dict_in_generate=True)
    assert torch.equal(model.encode_images(images), before)


def test_mistral_is_transformers_mistral():
    model = tiny_model(tiny_config(mistral=True))
    plain = MistralForCausalLM(MistralConfig(**DECODER, sliding_window=None)).eval()
    plain.load_state_dict({k: v for k, v in original_weights(model).items() if k in plain.state_dict()})
    ids, images = [1, 3, IMAGE, 5, 4], pictures(1)
    rows, _ = by_hand(model, ids, images)
    assert torch.equal(model(torch.tensor([ids]), images=images).logits, plain(inputs_embeds=rows[None]).logits)


# --- the splice ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_any_images_is_spliced_sample_by_sample(model, side):
    prompts = [[1, 3, IMAGE, 5, IMAGE, IMAGE], [1, 5, 6], [IMAGE], [1, 7, 8, 9, 4, 3, 3, IMAGE]]
    images = pictures(5)
    longest = max(len(ids) for ids in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[index, place], mask[index, place] = torch.tensor(prompt), 1
    spliced = model.splice(ids, mask, images)
    counts = [prompt.count(IMAGE) for prompt in prompts]
    total = spliced.inputs_embeds.shape[1]
    for index, (prompt, own) in enumerate(zip(prompts, images.split(counts), strict=True)):
        rows, visual = by_hand(model, prompt, own)
        start = total - len(rows)
        torch.testing.assert_close(spliced.inputs_embeds[index, start:], rows, atol=1e-5, rtol=1e-5)
        assert spliced.visual_mask[index].tolist() == [False] * start + visual
        assert spliced.attention_mask[index].tolist() == [0] * start + [1] * len(rows)
        assert spliced.position_ids[index, start:].tolist() == list(range(len(rows)))
        assert spliced.input_ids[index, start:][~torch.tensor(visual)].tolist() == [i for i in prompt if i != IMAGE]
    assert spliced.visual_mask.sum() == ROWS * len(images)


def test_images_may_come_as_a_tensor_or_a_list(model):
    ids, images = torch.tensor([[1, IMAGE, 5, IMAGE]]), pictures(2)
    expected = model(ids, images=images).logits
    assert torch.equal(model(ids, images=list(images)).logits, expected)
    assert torch.equal(model(ids, images=[image[None] for image in images]).logits, expected)
    assert torch.equal(model(ids, images=images[:, None]).logits, expected)


def test_a_batch_answers_as_each_prompt_alone(model):
    images = pictures(3)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.tensor([[0, 0, 1, IMAGE, 5], [IMAGE, 5, 6, IMAGE, 4]])
    together = model.generate(ids, images=images, attention_mask=mask, **GREEDY)
    first = model.generate(ids[:1, 2:], images=images[:1], **GREEDY)
    second = model.generate(ids[1:], images=images[1:], **GREEDY)
    assert torch.equal(together, torch.cat([first, second]))
    logits = model(ids, images=images, attention_mask=mask).logits[:, -1]
    alone = torch.cat(
        [model(ids[:1, 2:], images=images[:1]).logits[:, -1], model(ids[1:], images=images[1:]).logits[:, -1]]
    )
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


def test_rows_given_as_embeddings_answer_like_ids(model):
    ids, images = torch.tensor([[1, 3, IMAGE, 5, 4]]), pictures(1)
    spliced = model.splice(ids, None, images)
    rows = {"inputs_embeds": spliced.inputs_embeds, "visual_mask": spliced.visual_mask}
    assert torch.equal(model.generate(**rows, **GREEDY), model.generate(ids, images=images, **GREEDY))
    assert torch.equal(model(**rows).logits, model(ids, images=images).logits)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_images_as_image_tokens_or_an_error(model, count):
    ids = torch.tensor([[1, IMAGE, 5, IMAGE]])
    images = pictures(count) if count else None
    for call in (model, model.generate):
        with pytest.raises(UserError, match=f"2 image tokens, but {count} images"):
            call(ids, images=images)


def test_calls_that_say_two_things_are_refused(model):
    ids, images = torch.tensor([[1, IMAGE]]), pictures(1)
    rows = model.splice(ids, None, images).inputs_embeds
    with pytest.raises(UserError, match="inputs_embeds already hold"):
        model.generate(inputs_embeds=rows, images=images)
    with pytest.raises(UserError, match="inputs_embeds already hold"):
        model(inputs_embeds=rows, images=images)
    with pytest.raises(UserError, match="not both"):
        model.generate(ids, inputs_embeds=rows)
    with pytest.raises(UserError, match="needs a prompt"):
        model.generate()
    with pytest.raises(UserError, match="use_cache=False"):
        model.generate(ids, images=images, use_cache=False)
    with pytest.raises(UserError, match="labels"):
        model(ids, images=images, labels=ids[:, :1])


def test_labels_go_with_their_ids_past_the_images_rows(model):
    ids, images = torch.tensor([[1, IMAGE, 5, 6], [1, 5, 7, 0]]), pictures(1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    spliced = model.splice(ids, mask, images)
    labels = spliced.labels(ids.masked_fill(ids == 5, -100))
    rows = spliced.inputs_embeds.shape[1]
    assert labels.tolist() == [[1] + [-100] * (rows - 2) + [6], [-100] * (rows - 3) + [1, -100, 7]]


def test_images_of_a_wrong_shape_are_refused(model):
    with pytest.raises(UserError, match=r"\[1, 3, 14, 14\].*\[n, 3, 28, 28\]"):
        model(torch.tensor([[1, IMAGE]]), images=torch.zeros(1, 3, 14, 14))


def test_prompts_of_a_wrong_shape_are_refused(model):
    with pytest.raises(UserError, match=r"\[3\].*\[batch, ids\]"):
        model.generate(torch.tensor([1, 5, 6]))
    with pytest.raises(UserError, match=r"attention_mask has shape \[1, 4\].*\[1, 3\]"):
        model.generate(torch.tensor([[1, 5, 6]]), attention_mask=torch.ones(1, 4))


def test_a_model_without_a_tower_refuses_images():
    with pytest.raises(UserError, match="no vision tower"):
        tiny_model(tiny_config(tower=False)).generate(torch.tensor([[1, IMAGE]]), images=pictures(1))


# --- anyres ---


def anyres_rows(features: torch.Tensor, size: Size, columns: int, rows: int, newline: torch.Tensor) -> torch.Tensor:
    """Rows of an anyres image, cell by cell: a cell stays if the published unpadding keeps it."""
    width, height = size
    side = PATCHES_PER_SIDE
    out = list(features[0])
    map_width, map_height = columns * side, rows * side
    skip_x = skip_y = 0
    if width / height > map_width / map_height:
        skip_y = (map_height - int(height * map_width / width)) // 2
    else:
        skip_x = (map_width - int(width * map_height / height)) // 2
    for y in range(skip_y, map_height - skip_y):
        for x in range(skip_x, map_width - skip_x):
            tile = (y // side) * columns + x // side
            out.append(features[1 + tile][(y % side) * side + x % side])
        out.append(newline)
    return torch.stack(out)


@pytest.mark.parametrize(
    ("size", "columns", "rows"), [((60, 60), 2, 2), ((90, 40), 3, 1), ((40, 90), 1, 3), ((56, 40), 2, 2)]
)
def test_anyres_rows_are_the_unpadded_map_with_newlines(size, columns, rows):
    model = tiny_model(tiny_config(**ANYRES))
    tiles = pictures(1 + columns * rows, seed=columns)
    expected = anyres_rows(model.encode_images(tiles), size, columns, rows, model.model.image_newline)
    torch.testing.assert_close(model.image_rows([tiles], [size])[0], expected)
    spliced = model.splice(torch.tensor([[1, IMAGE, 5]]), None, [tiles], [size])
    assert spliced.visual_mask[0].tolist() == [False] + [True] * len(expected) + [False]


def test_anyres_images_of_different_grids_in_one_batch():
    model = tiny_model(tiny_config(**ANYRES))
    tiles, sizes = [pictures(5, 1), pictures(4, 2)], [(60, 60), (90, 40)]
    ids = torch.tensor([[1, IMAGE, 5], [1, IMAGE, 6]])
    together = model.generate(ids, tiles, sizes, **GREEDY)
    alone = [model.generate(ids[i : i + 1], tiles[i : i + 1], sizes[i : i + 1], **GREEDY) for i in range(2)]
    assert torch.equal(together, torch.cat(alone))


def test_anyres_without_or_with_wrong_sizes_is_an_error():
    model = tiny_model(tiny_config(**ANYRES))
    ids, tiles = torch.tensor([[1, IMAGE]]), [pictures(4)]
    with pytest.raises(UserError, match="image_sizes"):
        model.generate(ids, images=tiles)
    with pytest.raises(UserError, match="were image_sizes swapped"):
        model.generate(ids, images=tiles, image_sizes=[(60, 60)])
    with pytest.raises(UserError, match="1 images but 2 image_sizes"):
        model.generate(ids, images=tiles, image_sizes=[(90, 40), (90, 40)])


# --- generation modes ---


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_assisted_decoding_answers_as_greedy_decoding(model, seed):
    ids, images = torch.tensor([[1, 3, IMAGE, 5, 6, 5, 6, 4]]), pictures(1, seed)
    options = {**GREEDY, "max_new_tokens": 12}
    expected = model.generate(ids, images=images, **options)
    assert torch.equal(model.generate(ids, images=images, prompt_lookup_num_tokens=3, **options), expected)
    for assistant in (model, tiny_model(tiny_config(tower=False), seed=1)):
        got = model.generate(ids, images=images, assistant_model=copy.deepcopy(assistant), **options)
        assert torch.equal(got, expected)
    rows = model.splice(ids, None, images)
    got = model.generate(
        inputs_embeds=rows.inputs_embeds, visual_mask=rows.visual_mask, prompt_lookup_num_tokens=3, **options
    )
    assert torch.equal(got, expected)


def test_an_assistant_that_cannot_take_the_rows_is_refused(model, plain):
    for assistant in (plain, tiny_model(tiny_config(tower=False, hidden_size=16))):
        with pytest.raises(UserError, match="assistant_model"):
            model.generate(torch.tensor([[1, 5]]), assistant_model=assistant, **GREEDY)


class Collecting(TextStreamer):
    """Keeps the ids instead of printing text."""

    def __init__(self):
        self.ids: list[int] = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        pass


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}])
def test_a_streamer_gets_the_new_ids_and_nothing_else(model, options):
    ids, streamer = torch.tensor([[1, IMAGE, 5, 4]]), Collecting()
    got = model.generate(ids, images=pictures(1), streamer=streamer, **GREEDY, **options)
    assert streamer.ids == got[0].tolist()


def test_visual_mask_reaches_the_decoder_at_prefill_only(model):
    seen = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("visual_mask")), with_kwargs=True
    )
    try:
        model.generate(torch.tensor([[1, IMAGE, 5]]), images=pictures(1), num_beams=2, **GREEDY)
    finally:
        handle.remove()
    assert seen[0].tolist() == [[False, True, True, True, True, False]] * 2
    assert len(seen) == GREEDY["max_new_tokens"] and all(mask is None for mask in seen[1:])


# --- pruning is asked for through the same calls ---

CONFIG = {"mode": ["middle"], "shallow_mid_layer": 1, "layer_threshold": 0.999999, "tokens_threshold": 1e9}


def test_generate_with_a_config_leaves_traces_and_nothing_else(model):
    ids, images = torch.tensor([[1, IMAGE, 5, 4]]), pictures(1)
    dense = model.generate(ids, images=images, **GREEDY)
    model.generate(ids, images=images, pruning_config=CONFIG, **GREEDY)
    (trace,) = model.last_pruning_traces
    assert isinstance(trace, PruningTrace)
    assert trace.num_rows == 3 + ROWS and list(trace.visual_positions) == [1, 2, 3, 4]
    model.last_pruning_traces.clear()
    assert len(model.last_pruning_traces) == 1
    assert torch.equal(model.generate(ids, images=images, **GREEDY), dense)
    assert len(model.last_pruning_traces) == 1


def test_forward_with_a_config_prunes_that_call(model):
    ids, images = torch.tensor([[1, IMAGE, 5, 4]]), pictures(1)
    spliced = model.splice(ids, None, images)
    by_ids = model(ids, images=images, pruning_config=CONFIG).logits[:, -1]
    by_rows = model(inputs_embeds=spliced.inputs_embeds, visual_mask=spliced.visual_mask, pruning_config=CONFIG).logits[
        :, -1
    ]
    assert torch.equal(by_ids, by_rows)
    assert len(model.last_pruning_traces) == 1
    assert torch.equal(model(ids, images=images, pruning_config={"mode": []}).logits, model(ids, images=images).logits)


# --- configs and classes ---


def test_a_plain_config_gives_a_model_without_tower():
    model = LlavaLlamaForCausalLM(LlavaConfig(**DECODER))
    assert model.get_vision_tower() is None
    assert not any("mm_projector" in name or "vision" in name for name in model.state_dict())


def test_weights_are_saved_and_taken_under_the_names_of_original_checkpoints(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    other = LlavaLlamaForCausalLM(tiny_config())
    assert not other.load_state_dict(saved).missing_keys
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in other.state_dict().items())
    names = set(saved)
    assert {
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "lm_head.weight",
    } <= names
    assert "model.image_newline" not in names
    assert "model.image_newline" in original_weights(tiny_model(tiny_config(**ANYRES)))


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("identity", []),
        ("linear", ["weight", "bias"]),
        ("mlp3x_gelu", [f"{i}.{k}" for i in (0, 2, 4) for k in ("weight", "bias")]),
    ],
)
def test_projectors_have_the_published_keys(kind, keys):
    hidden = 24 if kind == "identity" else 16
    vision = {**tiny_config().vision_config, "hidden_size": hidden, "num_attention_heads": 4}
    model = tiny_model(tiny_config(mm_projector_type=kind, vision_config=vision, mm_hidden_size=hidden))
    start = "model.mm_projector."
    assert [name.removeprefix(start) for name in original_weights(model) if name.startswith(start)] == keys
    assert model.encode_images(pictures(1)).shape == (1, ROWS, DECODER["hidden_size"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mm_projector_type": "resampler"}, "resampler"),
        ({"mm_vision_select_feature": "cls"}, "'cls'"),
        ({"mm_vision_select_layer": -9}, "-9"),
        ({"mm_patch_merge_type": "pool"}, "'pool'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "siglip"),
        ({"vision_config": None, "mm_vision_tower": "/nowhere/clip"}, "/nowhere/clip"),
    ],
)
def test_configs_that_make_no_model_are_errors_that_name_the_value(change, named):
    with pytest.raises(UserError, match=named):
        tiny_model(tiny_config(**change))


def test_cls_patch_keeps_the_class_token():
    model = tiny_model(tiny_config(mm_vision_select_feature="cls_patch"))
    assert len(model.image_rows(pictures(1))[0]) == ROWS + 1


def test_auto_classes_know_the_model():
    assert isinstance(AutoModelForCausalLM.from_config(tiny_config()), LlavaLlamaForCausalLM)


def test_the_tower_keeps_its_own_attention_setting(model):
    tower = model.get_vision_tower()
    before = tower.config._attn_implementation
    old = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        assert tower.config._attn_implementation == before
    finally:
        model.config._attn_implementation = old


def test_gradients_reach_tower_and_projector():
    model = tiny_model()
    model(torch.tensor([[1, IMAGE, 5]]), images=pictures(1)).logits.sum().backward()
    assert model.get_model().mm_projector[0].weight.grad.abs().sum() > 0
    tower = model.get_vision_tower()
    assert tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0
