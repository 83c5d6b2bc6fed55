"""The lenses against hand computations: formed attention, transformers' own states, marked pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import ANYRES, PATCHES_PER_SIDE, TILE, tiny_config, tiny_model
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from visual_helpers import LAYERS, noise, word_tokenizer, write_checkpoint

from llava.inference import GenerationOptions, LoadedModel, Turn, open_checkpoint
from llava.mm_utils import process_images
from llava.pruning import Cause, PruningTrace, Read, prune
from llava.pruning.trace import Decision
from llava.utils import UserError
from llava.visualize import (
    attention_shares,
    attention_to_image,
    logit_lens,
    observe,
    patch_map,
    project,
    record,
    smallest_cosines,
    stay_of,
    through_output_projection,
    token_probabilities,
    value_norms,
    value_output_lens,
)

PREFIX, VISUAL, TEXT = 3, 9, 5
ROWS = PREFIX + VISUAL + TEXT
CONFIGS = {
    "dense": None,
    "shallow-first": {"mode": ["shallow"], "shallow_mid_layer": 3, "shallow_sink": "first"},
    "shallow-half": {"mode": ["shallow"], "shallow_mid_layer": 3, "shallow_sink": "half"},
    "all-stages": {
        "mode": ["shallow", "middle", "deep"],
        "shallow_mid_layer": 1,
        "layer_threshold": 0.9999,
        "tokens_threshold": 0.6,
        "exit_threshold": 0.9,
    },
    "fixed-exit": {"mode": ["deep"], "mid_deep_layer": 3},
}


@pytest.fixture(scope="module")
def model():
    config = tiny_config(num_hidden_layers=LAYERS, attn_implementation="eager")
    return tiny_model(config, seed=5)


@pytest.fixture(scope="module")
def inputs():
    embeds = torch.randn(1, ROWS, 24, generator=torch.Generator().manual_seed(1))
    visual = torch.zeros(1, ROWS, dtype=torch.bool)
    visual[:, PREFIX : PREFIX + VISUAL] = True
    return {"inputs_embeds": embeds, "visual_mask": visual}


def run_recorded(model, inputs, config, rows, new_tokens=4):
    with prune(model, config) as run, record(model, inputs["visual_mask"][0], rows) as recording:
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    return recording, run.traces[0], ids


# --- recording -------------------------------------------------------------------------------------------------


def test_attention_rows_and_states_equal_what_transformers_forms(model, inputs):
    rows = [0, 5, -1]
    recording, _, ids = run_recorded(model, inputs, None, [*rows, ROWS, ROWS + 1])
    answer = model.get_input_embeddings()(ids[:, :-1]).detach()
    full = torch.cat([inputs["inputs_embeds"], answer], dim=1)
    with torch.no_grad():
        expected = model(inputs_embeds=full, output_attentions=True, output_hidden_states=True)
    for position in (0, 5, ROWS - 1, ROWS, ROWS + 1):
        row = recording.row(position)
        formed = torch.stack([layer[0, :, position, : position + 1] for layer in expected.attentions])
        np.testing.assert_allclose(row.attention, formed, atol=2e-6)
        states = torch.stack([state[0, position] for state in expected.hidden_states[:-1]])
        np.testing.assert_allclose(row.hidden[:-1], states, rtol=1e-5, atol=1e-4)
        normed = model.model.norm(torch.from_numpy(row.hidden[-1]))
        np.testing.assert_allclose(normed.detach(), expected.hidden_states[-1][0, position], rtol=1e-5, atol=1e-4)


OTHERS = {
    "frozen": {"method": "shortv", "frozen_layers": [1, 2]},
    "absent": {"method": "vica", "layers": [1, 4]},
    "chosen-before": {"method": "divprune", "keep": 4, "positions": "keep"},
}


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_recorded_weights_times_values_are_the_attention_output(model, inputs, name):
    """Whatever a stage takes away, the weights that are shown are those that made the output."""
    seen = {}

    def watch(layer):
        def hook(module, args):
            seen.setdefault(layer, []).append(args[0][0, -1].clone())

        return hook

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(watch(n)) for n, layer in enumerate(model.model.layers)]
    try:
        recording, trace, _ = run_recorded(model, inputs, {**CONFIGS, **OTHERS}[name], [-1, ROWS, ROWS + 1])
    finally:
        for hook in hooks:
            hook.remove()
    if name == "all-stages":
        assert trace.select_layer is not None and trace.exit_layer is not None
        assert 0 < len(trace.kept_positions) < VISUAL
    for step, position in enumerate((ROWS - 1, ROWS, ROWS + 1)):
        for layer in range(LAYERS):
            real = seen[layer][step].view(4, -1)
            np.testing.assert_allclose(recording.row(position).output[layer], real, atol=2e-5)
    assert recording.present.sum(axis=1).tolist() == trace.rows_per_layer


@pytest.mark.parametrize("name", CONFIGS)
def test_all_rows_of_a_stage_are_recorded_as_they_were_used(model, inputs, name):
    """Each row of the prompt, visual ones too: the shallow stage treats them differently."""
    seen = {}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args, n=n: seen.__setitem__(n, args[0][0].clone())
        )
        for n, layer in enumerate(model.model.layers)
    ]
    try:
        recording, _, _ = run_recorded(model, inputs, CONFIGS[name], range(ROWS), new_tokens=1)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in range(LAYERS):
        for index, position in enumerate(np.flatnonzero(recording.present[layer])):
            real = seen[layer][index].view(4, -1)
            np.testing.assert_allclose(recording.row(position).output[layer], real, atol=2e-5)


def test_recording_changes_no_result_and_leaves_nothing_behind(model, inputs):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    for config in CONFIGS.values():
        before = hooks()
        _, trace, ids = run_recorded(model, inputs, config, [-1])
        assert hooks() == before
        with prune(model, config) as run:
            plain = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(ids, plain)
        assert run.traces[0].to_dict() == trace.to_dict()


def test_the_order_of_prune_and_record_does_not_matter(model, inputs):
    config = CONFIGS["all-stages"]
    inside, _, _ = run_recorded(model, inputs, config, [-1, ROWS])
    with record(model, inputs["visual_mask"][0], [-1, ROWS]) as around, prune(model, config):
        model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for position in (-1, ROWS):
        np.testing.assert_array_equal(inside.row(position).attention, around.row(position).attention)
        np.testing.assert_array_equal(inside.row(position).hidden, around.row(position).hidden)


def test_only_asked_rows_are_kept(model, inputs):
    recording, _, _ = run_recorded(model, inputs, None, [-1])
    assert list(recording.rows) == [ROWS - 1]
    with pytest.raises(UserError, match=r"row 4 was not recorded; recorded are \[16\]"):
        recording.row(4)
    with pytest.raises(UserError, match="row -99 lies before the prompt"), record(model, [True, False], [-99]):
        pass


def test_more_than_one_prompt_is_refused(model, inputs):
    two = {key: value.repeat(2, 1, 1) if value.ndim == 3 else value.repeat(2, 1) for key, value in inputs.items()}
    with record(model, inputs["visual_mask"][0]), pytest.raises(UserError, match="one prompt at a time"):
        model.generate(**two, max_new_tokens=1)


def test_a_mask_that_is_too_short_is_refused(model, inputs):
    with record(model, inputs["visual_mask"][0, :-1]), pytest.raises(UserError, match="is_visual has 16 rows"):
        model.generate(**inputs, max_new_tokens=1)


# --- lenses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_logit_lens_at_the_last_layer_is_the_models_own_distribution(model, inputs, name):
    recording, _, ids = run_recorded(model, inputs, CONFIGS[name], [-1, ROWS])
    with torch.no_grad():
        logits = model(**inputs, pruning_config=CONFIGS[name] or {"mode": []}).logits[0, -1]
    row = recording.row(-1)
    np.testing.assert_allclose(project(model, row.hidden)[-1], torch.softmax(logits, -1), atol=1e-6)
    top = logit_lens(model, word_tokenizer(), row, k=3)
    assert top.ids.shape == top.probabilities.shape == top.texts.shape == (LAYERS + 1, 3)
    assert top.ids[-1, 0] == ids[0, 0]
    assert logit_lens(model, word_tokenizer(), recording.row(ROWS)).ids[-1, 0] == ids[0, 1]
    word = int(ids[0, 0])
    assert top.texts[-1, 0] == word_tokenizer().convert_ids_to_tokens(word)
    assert token_probabilities(model, row, [word])[-1, 0] == top.probabilities[-1, 0]


@pytest.mark.parametrize("bias", [False, True])
def test_value_output_shares_and_the_rest_make_the_attention_output(inputs, bias):
    model = tiny_model(tiny_config(num_hidden_layers=2, attention_bias=bias), seed=7)
    real = {}
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, a, o, n=n: real.__setitem__(n, o[0][0, -1].detach()))
        for n, layer in enumerate(model.model.layers)
    ]
    with record(model, inputs["visual_mask"][0], range(ROWS)) as recording, torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    last = recording.row(-1)
    for layer in range(2):
        values = np.stack([recording.row(position).values[layer] for position in range(ROWS)])
        written = through_output_projection(model, layer, values)  # [rows, heads, hidden]
        weighted = last.attention[layer].T[:, :, None] * written
        visual = recording.is_visual
        rest = weighted[~visual].sum((0, 1))
        if bias:
            rest = rest + model.model.layers[layer].self_attn.o_proj.bias.detach().numpy()
        np.testing.assert_allclose(weighted[visual].sum((0, 1)) + rest, real[layer], atol=1e-5)
        image = through_output_projection(model, layer, last.image_output[layer]).sum(0)
        np.testing.assert_allclose(image, weighted[visual].sum((0, 1)), atol=1e-5)


def test_value_output_lens_is_norm_and_head_of_a_slice(model, inputs):
    recording, _, _ = run_recorded(model, inputs, None, [4])
    values = recording.row(4).values
    top = value_output_lens(model, word_tokenizer(), values, k=2, per_head=True)
    assert top.ids.shape == (LAYERS, 4, 2)
    layer, head, head_dim = 3, 2, 6
    weight = model.model.layers[layer].self_attn.o_proj.weight.detach()
    vector = torch.from_numpy(values[layer, head // 2])  # four heads share two KV heads
    one = weight[:, head * head_dim : (head + 1) * head_dim] @ vector
    with torch.no_grad():
        expected = torch.softmax(model.lm_head(model.model.norm(one)), -1).topk(2)
    np.testing.assert_array_equal(top.ids[layer, head], expected.indices)
    np.testing.assert_allclose(top.probabilities[layer, head], expected.values, atol=1e-6)
    whole = weight @ torch.from_numpy(values[layer]).repeat_interleave(2, dim=0).flatten()
    summed = value_output_lens(model, word_tokenizer(), values, k=1)
    with torch.no_grad():
        assert summed.ids[layer, 0] == model.lm_head(model.model.norm(whole)).argmax()


def test_shares_are_parts_of_a_whole(model, inputs):
    for name, config in CONFIGS.items():
        recording, _, _ = run_recorded(model, inputs, config, [-1, 1, ROWS])
        for position in (-1, 1, ROWS):
            shares = attention_shares(recording, recording.row(position))
            np.testing.assert_allclose(sum(shares), 1, atol=1e-5)
        shares = attention_shares(recording, recording.row(-1))
        if name == "dense":
            last = recording.row(-1).attention.mean(1)
            np.testing.assert_allclose(shares.image, last[:, PREFIX : PREFIX + VISUAL].sum(1), atol=1e-6)
            np.testing.assert_allclose(shares.prefix, last[:, :PREFIX].sum(1), atol=1e-6)
            np.testing.assert_allclose(shares.lost, 0, atol=1e-6)
        if name == "shallow-first":
            assert shares.image[0] > 0.01 and shares.lost[0] < 1e-6  # all of it on the first visual row
            assert attention_to_image(recording, recording.row(-1))[0, 1:].max() == 0
            assert (shares.image[1:3] == 0).all() and (shares.lost[1:3] > 0.01).all()
            assert (shares.lost[3:] < 1e-6).all()
        assert attention_shares(recording, recording.row(1)).image.max() == 0  # before the image


def test_single_heads_and_rows_before_the_image(model, inputs):
    recording, _, _ = run_recorded(model, inputs, None, [-1, 1, 6])
    heads = [attention_to_image(recording, recording.row(-1), head) for head in range(4)]
    np.testing.assert_allclose(np.mean(heads, 0), attention_to_image(recording, recording.row(-1)), atol=1e-7)
    assert attention_to_image(recording, recording.row(1)).max() == 0
    assert attention_to_image(recording, recording.row(6))[:, 6 - PREFIX + 1 :].max() == 0


def test_value_norms_are_sums_of_absolute_values(model, inputs):
    recording, _, _ = run_recorded(model, inputs, CONFIGS["all-stages"], range(ROWS))
    norms = value_norms(recording)
    for layer in range(LAYERS):
        for index, position in enumerate(recording.visual_positions):
            if recording.present[layer, position]:
                expected = np.abs(recording.row(position).values[layer]).sum()
                assert norms[layer, index] == pytest.approx(expected, rel=1e-5)
            else:
                assert np.isnan(norms[layer, index])
    assert np.isnan(norms).any(), "this config prunes"


def test_cosine_curve_is_what_the_engine_decides_from(model, inputs):
    config = CONFIGS["all-stages"]
    recording, trace, _ = run_recorded(model, inputs, config, [-1])
    curve = smallest_cosines(recording.row(-1))
    for layer, value in trace.smallest_cosine.items():
        assert curve[layer] == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(recording.row(-1).norm[trace.select_layer], trace.selection_norm, atol=1e-5)
    dense, _, _ = run_recorded(model, inputs, None, [-1])
    assert not np.isnan(smallest_cosines(dense.row(-1))).any()
    assert np.isnan(curve[0]) and np.isnan(curve[trace.exit_layer :]).all()


def test_a_visual_row_that_was_pruned_is_nan_from_there_on(model, inputs):
    config = CONFIGS["all-stages"]
    _, trace, _ = run_recorded(model, inputs, config, [-1])
    gone = next(p for p in trace.visual_positions if p not in trace.kept_positions)
    recording, _, _ = run_recorded(model, inputs, config, [gone])
    row, selected = recording.row(gone), trace.select_layer
    assert not np.isnan(row.hidden[: selected + 2]).any() and np.isnan(row.hidden[selected + 2 :]).all()
    top = logit_lens(model, word_tokenizer(), row)
    assert (top.texts[selected + 2 :] == "").all() and (top.texts[: selected + 2] != "").all()


# --- patches ---------------------------------------------------------------------------------------------------

PROCESSOR = CLIPImageProcessorPil(
    size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, resample=Image.Resampling.BOX
)
GRID = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": ANYRES["image_grid_pinpoints"]}
PREPARATIONS = {
    "pad": {"image_aspect_ratio": "pad"},
    "crop": {"image_aspect_ratio": None},
    "anyres-unpad": {**GRID, "mm_patch_merge_type": "spatial_unpad"},
    "anyres-spatial": {**GRID, "mm_patch_merge_type": "spatial"},
    "anyres-flat": {**GRID, "mm_patch_merge_type": "flat"},
}


class BrightnessTower(nn.Module):
    """Stands in for CLIP: a patch's feature is its mean brightness."""

    num_patches_per_side = PATCHES_PER_SIDE
    image_size = TILE

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, images):
        patch = TILE // PATCHES_PER_SIDE
        return nn.functional.avg_pool2d(images.mean(1, keepdim=True), patch).flatten(2).transpose(1, 2)


def rows_of(picture, settings):
    """Each row's brightness, through the project's own preparation and splice; newline rows are NaN."""
    model = tiny_model(tiny_config(**settings))
    model.model.vision_tower = BrightnessTower(model.get_vision_tower().config)
    model.model.multi_modal_projector = nn.Identity()
    if hasattr(model.model, "image_newline"):
        model.model.image_newline = nn.Parameter(torch.full((1,), torch.nan))
    pixels = process_images([picture], PROCESSOR, model.config)
    return model.image_rows(pixels, [picture.size])[0][:, 0].detach().numpy(), model.config


@pytest.mark.parametrize("preparation", PREPARATIONS)
@pytest.mark.parametrize("size", [(84, 56), (56, 84), (60, 60), (112, 40), (30, 97)])
def test_a_marked_patch_comes_back_at_its_place(preparation, size):
    settings = PREPARATIONS[preparation]
    patches = None
    dark, config = rows_of(Image.new("RGB", size, (90, 90, 90)), settings)
    patches = patch_map(size, PROCESSOR, config, PATCHES_PER_SIDE)
    assert patches.boxes.shape == (len(dark), 4)
    np.testing.assert_array_equal(np.isnan(dark), np.isnan(patches.boxes[:, 0]))
    for row in np.flatnonzero(patches.on_picture):
        left, top, right, bottom = patches.boxes[row]
        # The middle half of the box, so that rounding to whole pixels cannot touch its neighbours.
        inner = (
            round(max(left, 0) * 0.75 + min(right, size[0]) * 0.25),
            round(max(top, 0) * 0.75 + min(bottom, size[1]) * 0.25),
            round(max(left, 0) * 0.25 + min(right, size[0]) * 0.75),
            round(max(top, 0) * 0.25 + min(bottom, size[1]) * 0.75),
        )
        if inner[2] <= inner[0] or inner[3] <= inner[1]:
            continue  # less than two pixels of the picture
        picture = Image.new("RGB", size, (90, 90, 90))
        picture.paste((255, 255, 255), inner)
        lit, _ = rows_of(picture, settings)
        change = np.nan_to_num(lit - dark)
        same_view = patches.views == patches.views[row]
        assert change[same_view].argmax() == np.flatnonzero(same_view).tolist().index(row)
        centre = (inner[0] + inner[2]) / 2, (inner[1] + inner[3]) / 2
        assert row in patches.rows_at(*centre)


@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_padding_shows_no_picture(preparation):
    """Rows whose pixels do not change with the picture are exactly those that the map says are off it."""
    size = (168, 28)
    dark, config = rows_of(Image.new("RGB", size, (90, 90, 90)), PREPARATIONS[preparation])
    bright, _ = rows_of(Image.new("RGB", size, (200, 200, 200)), PREPARATIONS[preparation])
    patches = patch_map(size, PROCESSOR, config, PATCHES_PER_SIDE)
    np.testing.assert_array_equal(np.nan_to_num(bright - dark) != 0, patches.on_picture)


def test_heatmap_paints_boxes():
    config = tiny_config(image_aspect_ratio="pad")
    patches = patch_map((56, 28), PROCESSOR, config, 4)  # four by four patches of 14 picture pixels
    assert patches.on_picture.tolist() == [False] * 4 + [True] * 8 + [False] * 4
    canvas = patches.heatmap(np.arange(16))
    assert canvas.shape == (28, 56)
    np.testing.assert_array_equal(canvas[::14, ::14], [[4, 5, 6, 7], [8, 9, 10, 11]])
    assert (canvas[:14, :14] == 4).all() and (canvas[14:, 42:] == 11).all()
    with pytest.raises(ValueError, match="scores have shape"):
        patches.heatmap(np.arange(3))


# --- a whole observation ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pad", "anyres"])
def chat(request, tmp_path_factory):
    # Tiles of the tower's size.
    anyres = {**ANYRES, "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
    settings = anyres if request.param == "anyres" else {}
    path = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", **settings)
    return LoadedModel(open_checkpoint(path))


@pytest.mark.parametrize("name", ["dense", "all-stages"])
def test_an_observation_fits_together(chat, name):
    picture = noise((60, 40))
    seen = observe(chat, picture, "what is this", CONFIGS[name], max_new_tokens=5)
    visual = seen.recording.visual_positions
    assert visual.tolist() == seen.trace.visual_positions
    assert len(seen.patches.boxes) == len(visual) == len(seen.kept)
    assert len(seen.labels) == seen.recording.num_rows + 5
    assert seen.labels[0] == "<s>" and seen.labels[visual[0]] == "patch 0"
    assert seen.labels[seen.recording.num_rows - 1] == "ASSISTANT:"
    for token, word in enumerate(seen.answer_ids):
        lens = logit_lens(chat.model, chat.tokenizer, seen.answer_row(token), k=1)
        assert lens.ids[-1, 0] == word
        assert lens.texts[-1, 0] == seen.labels[seen.recording.num_rows + token]
    plain = chat.answer(
        chat.checkpoint.encode([Turn(seen.question, [seen.picture])]), seen.config, GenerationOptions(5)
    )
    assert seen.answer == plain.text
    if plain.trace is not None:
        assert plain.trace.to_dict() == seen.trace.to_dict()
        assert plain.flops_saved == seen.savings


def test_an_empty_question_is_refused(chat):
    with pytest.raises(UserError, match="question is empty"):
        observe(chat, Image.new("RGB", (30, 30)), "  ")


def test_half_of_all_visual_rows_is_hidden_even_from_text_between_pictures(model):
    """Text between two pictures sees some visual rows, and the hidden half is counted over all of them."""
    embeds = torch.randn(1, 14, 24, generator=torch.Generator().manual_seed(2))
    visual = torch.zeros(1, 14, dtype=torch.bool)
    visual[:, 2:4] = True
    visual[:, 6:12] = True
    real = {}
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: real.__setitem__(0, args[0][0].clone())
    )
    with record(model, visual[0], range(14)) as recording:
        model(inputs_embeds=embeds, visual_mask=visual, pruning_config=CONFIGS["shallow-half"])
    hook.remove()
    for position in range(14):
        expected = real[0][position].view(4, -1).detach()
        np.testing.assert_allclose(recording.row(position).output[0], expected, atol=2e-5)
    assert Read.HALF_SINK.visible(8) == 4


# --- what became of patches --------------------------------------------------------------------------------------


def decided(layer, before, positions, groups=None, cause=Cause.SELECTION):
    return Decision(layer, cause, np.array(positions, dtype=np.int64), groups or {}, {}, np.array(before))


def test_patches_stay_as_long_as_their_rows_and_merged_ones_together():
    trace = PruningTrace(
        9,
        [2, 3, 4, 5, 6, 7],
        rows_per_layer=[9, 7, 6, 6, 3],
        decisions=[
            decided(0, [2, 3, 4, 5, 6, 7], [2, 4, 5, -1], {4: [4, 7]}),
            decided(1, [2, 4, 5, -1], [2, 4, -1], {4: [4, 5]}),
            decided(3, [2, 4, -1], [], cause=Cause.EXIT),
        ],
    )
    stay = stay_of(trace)
    np.testing.assert_allclose(stay.alone * 5, [4, 1, 1, 2, 1, 1])
    np.testing.assert_allclose(stay.merged * 5, [0, 0, 3, 2, 0, 3])
    assert stay.chosen.tolist() == [True, False, False, False, False, False]
    assert [group.tolist() for group in stay.groups] == [[2, 3, 5]] and stay.without_patch == 1


@pytest.mark.parametrize(
    "config",
    [
        {"method": "fastv", "layer": 2, "keep": 4},
        {"method": "sparsevlm", "layers": [0, 2], "keep": [4, 2]},
        {"method": "pool", "factor": 2},
        CONFIGS["all-stages"],
    ],
    ids=lambda config: config.get("method", "visipruner"),
)
def test_rows_of_patches_are_all_the_rows_there_were(model, inputs, config):
    with prune(model, config) as run:
        model(**inputs)
    (trace,) = run.traces
    stay = stay_of(trace)
    assert (stay.alone + stay.merged <= 1 + 1e-9).all() and stay.alone.max() > 0
    alone = stay.alone.sum() * len(trace.rows_per_layer)
    rows = sum(trace.rows_per_layer) - len(trace.rows_per_layer) * (trace.num_rows - trace.num_visual)
    assert alone == pytest.approx(rows) if not stay.merged.any() else alone < rows
    assert len(stay.groups) + stay.chosen.sum() == trace.num_kept


def test_without_pruning_every_patch_stays(model, inputs):
    with prune(model) as run:
        model(**inputs)
    stay = stay_of(run.traces[0])
    assert (stay.alone == 1).all() and stay.chosen.all() and not stay.groups
