"""The engine against a plain full-length implementation, and against the unpatched model under masks."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from family_models import family_model
from family_reference import Hidden, Recorder, between, masks_hide
from naive import NaiveResult, naive_generate
from transformers import DynamicCache, StaticCache

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.pruning import (
    Method,
    PruningConfig,
    PruningConfigError,
    UnsupportedCallError,
    UnsupportedModelError,
    prune,
)
from llava.pruning.generation import Generation
from llava.utils import UserError

NUM_LAYERS, HIDDEN, NEW = 8, 64, 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

# Where the image rows are: (text, image, text, image, …) lengths.
LAYOUTS = {
    "image first": [0, 24, 9],
    "image in the middle": [5, 24, 9],
    "image after a long text": [40, 16, 6],
    "three images with text between": [4, 12, 3, 10, 5, 8, 7],
}
MODES = {
    "middle": ["middle"],
    "middle and deep": ["middle", "deep"],
    "deep": ["deep"],
    "shallow": ["shallow"],
    "shallow and middle": ["shallow", "middle"],
    "all": ["shallow", "middle", "deep"],
    "shallow and deep": ["shallow", "deep"],
}


def make_model(kv_heads: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlavaLlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlavaConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        vocab_size=97,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.25,
    )
    return LlavaLlamaForCausalLM(config).eval().to(dtype)


@pytest.fixture(params=[8, 2], ids=["MHA", "GQA"])
def kv_heads(request) -> int:
    return request.param


def make_prompt(layout: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = LAYOUTS[layout]
    visual = torch.cat([torch.full((length,), bool(number % 2)) for number, length in enumerate(lengths)])
    rows = torch.randn(len(visual), HIDDEN, generator=generator, dtype=torch.float64)
    return rows.to(dtype), visual


def make_config(model, rows, visual, mode: list[str], sink: str = "first") -> dict:
    """Thresholds that make every stage act on this prompt, taken from its own measures."""
    config = {"mode": mode, "shallow_mid_layer": 2, "shallow_sink": sink}
    if "middle" not in mode:
        return config | ({"mid_deep_layer": 4} if "deep" in mode else {})

    shallow = [stage for stage in mode if stage == "shallow"]
    recorder = Recorder({}, 3, PruningConfig(mode=shallow, shallow_mid_layer=2, shallow_sink=sink))
    with torch.no_grad(), prune(model, recorder, visual_mask=visual[None]):
        model(inputs_embeds=rows[None])
    # Select at layer 3, keep about a third.
    shares = recorder.shares[3]
    threshold = float(shares["cosine"].min()) + 1e-3
    ordered = sorted(shares["norm"].tolist())
    cut = 2 * len(ordered) // 3
    kept = (ordered[cut - 1] + ordered[cut]) / 2
    config |= {"layer_threshold": min(threshold, 0.9999), "tokens_threshold": kept}
    if "deep" in mode:
        config |= {"exit_threshold": 0.05, "exit_patience": 2}
    return config


def run_engine(model, rows, visual, config, **options):
    output = model.generate(
        inputs_embeds=rows[None], visual_mask=visual[None], pruning_config=config, **(GREEDY | options)
    )
    return output, model.last_pruning_traces[0]


def assert_equal_runs(output, trace, naive: NaiveResult, tolerance: float, number: int = 0) -> None:
    assert trace.select_layer == naive.select_layer
    assert trace.kept_positions == naive.kept
    assert trace.exit_layer == naive.exit_layer
    assert trace.rows_per_layer == naive.present.sum(1).tolist()
    assert output.sequences[number].tolist() == naive.tokens
    logits = torch.stack(output.logits, dim=1)[number]
    # generate hands logits out in float32, whatever the weights are.
    torch.testing.assert_close(logits.double(), torch.stack(naive.logits).double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("sink", ["first", "half"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_stage_equals_the_naive_method(layout, mode, sink, kv_heads) -> None:
    if sink == "half" and "shallow" not in mode:
        pytest.skip("layer 0 is only edited in shallow mode")
    model = make_model(kv_heads)
    rows, visual = make_prompt(layout)
    config = make_config(model, rows, visual, mode, sink)
    naive = naive_generate(model, rows, visual, config, sink, NEW)
    if "middle" in mode:
        assert 0 < len(naive.kept) < int(visual.sum())
    if "deep" in mode:
        assert naive.exit_layer is not None
    output, trace = run_engine(model, rows, visual, config)
    assert_equal_runs(output, trace, naive, 1e-4)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("sink", ["first", "half"])
@torch.no_grad()
def test_float64_weights_agree_to_a_millionth(mode, sink, kv_heads) -> None:
    model = make_model(kv_heads, torch.float64)
    rows, visual = make_prompt("three images with text between", torch.float64)
    config = make_config(model, rows, visual, mode, sink)
    naive = naive_generate(model, rows, visual, config, sink, NEW)
    output, trace = run_engine(model, rows, visual, config)
    assert_equal_runs(output, trace, naive, 1e-6)


def left_padded(prompts) -> dict[str, torch.Tensor]:
    longest = max(len(rows) for rows, _ in prompts)
    embeds = torch.zeros(len(prompts), longest, HIDDEN, dtype=prompts[0][0].dtype)
    visual = torch.zeros(len(prompts), longest, dtype=torch.bool)
    attention = torch.zeros(len(prompts), longest, dtype=torch.long)
    for number, (rows, is_visual) in enumerate(prompts):
        embeds[number, -len(rows) :], visual[number, -len(rows) :], attention[number, -len(rows) :] = rows, is_visual, 1
    return {"inputs_embeds": embeds, "visual_mask": visual, "attention_mask": attention}


BATCH = ["image in the middle", "three images with text between", "image after a long text"]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@torch.no_grad()
def test_batch_of_three_equals_the_naive_method_on_each(mode, kv_heads) -> None:
    model = make_model(kv_heads)
    prompts = [make_prompt(layout, seed=seed) for seed, layout in enumerate(BATCH)]
    config = make_config(model, *prompts[0], mode)
    output = model.generate(**left_padded(prompts), pruning_config=config, **GREEDY)
    for number, (rows, visual) in enumerate(prompts):
        naive = naive_generate(model, rows, visual, config, "first", NEW)
        assert_equal_runs(output, model.last_pruning_traces[number], naive, 1e-4, number)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("mode", ["middle", "middle and deep", "deep"])
@torch.no_grad()
def test_equals_the_unpatched_model_whose_masks_hide_the_pruned_rows(mode, beams, kv_heads) -> None:
    model = make_model(kv_heads)
    prompts = [make_prompt(layout, seed=seed) for seed, layout in enumerate(BATCH)]
    config = make_config(model, *prompts[0], MODES[mode])
    inputs = left_padded(prompts)
    options = GREEDY | {"num_beams": beams, "output_logits": True, "pad_token_id": 0}
    pruned = model.generate(**inputs, pruning_config=config, **options)
    traces = model.last_pruning_traces
    assert len(traces) == len(prompts)

    width = inputs["inputs_embeds"].shape[1]
    hidden = [Hidden.from_trace(trace, width, NUM_LAYERS) for trace in traces]
    plain = {key: value for key, value in inputs.items() if key != "visual_mask"}
    with masks_hide(model, hidden, beams):
        masked = model.generate(**plain, **options)
    assert pruned.sequences.tolist() == masked.sequences.tolist()
    for mine, its in zip(pruned.logits, masked.logits, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-4, rtol=0)


# -- VisiPruner's knobs beyond the paper ------------------------------------------------------------------------------

KNOBS = {
    "text": {"probe_rows": "text"},
    "relative": {"relative": True},
    "text, relative": {"probe_rows": "text", "relative": True},
    "keep": {"keep": 5},
    "text, relative, keep": {"probe_rows": "text", "relative": True, "keep": 5},
}


def own_config(model, rows, visual, knobs: dict, mode: list[str]) -> dict:
    """As `make_config`, with the thresholds that these knobs need."""
    config = make_config(model, rows, visual, mode) | knobs
    recorder = Recorder({}, 3, PruningConfig(mode=()), knobs.get("probe_rows", "last"))
    with torch.no_grad(), prune(model, recorder, visual_mask=visual[None]):
        model(inputs_embeds=rows[None])
    shares = recorder.shares[3]
    config["layer_threshold"] = min(float(shares["cosine"].min()) + 1e-3, 0.9999)
    config["tokens_threshold"] = between(shares["part" if knobs.get("relative") else "norm"])
    if "keep" in knobs:
        del config["tokens_threshold"]
    if "deep" in mode:
        config["exit_threshold"] = 0.001
    return config


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_own_knobs_equal_the_naive_method(layout, knobs, kv_heads) -> None:
    model = make_model(kv_heads)
    rows, visual = make_prompt(layout)
    config = own_config(model, rows, visual, knobs, ["middle", "deep"])
    naive = naive_generate(model, rows, visual, config, "first", NEW)
    assert 0 < len(naive.kept) < int(visual.sum()) and naive.exit_layer is not None
    output, trace = run_engine(model, rows, visual, config)
    assert_equal_runs(output, trace, naive, 1e-4)
    assert "keep" not in knobs or trace.num_kept == knobs["keep"] * len(trace.image_spans)


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
@torch.no_grad()
def test_own_knobs_decide_in_a_batch_as_alone(knobs, kv_heads) -> None:
    model = make_model(kv_heads)
    prompts = [make_prompt(layout, seed=seed) for seed, layout in enumerate(BATCH)]
    config = own_config(model, *prompts[0], knobs, ["middle", "deep"])
    output = model.generate(**left_padded(prompts), pruning_config=config, **GREEDY)
    for number, (rows, visual) in enumerate(prompts):
        naive = naive_generate(model, rows, visual, config, "first", NEW)
        assert_equal_runs(output, model.last_pruning_traces[number], naive, 1e-4, number)


# -- generation modes ---------------------------------------------------------------------------------------------


@pytest.fixture
def ready():
    model = make_model(2)
    rows, visual = make_prompt("three images with text between")
    config = make_config(model, rows, visual, MODES["all"])
    return model, rows, visual, config


@torch.no_grad()
def test_sampling_draws_what_the_naive_distribution_gives(ready) -> None:
    model, rows, visual, config = ready
    torch.manual_seed(7)
    output, _ = run_engine(model, rows, visual, config, do_sample=True, temperature=0.7, num_return_sequences=1)
    naive = naive_generate(model, rows, visual, config, "first", 1)
    torch.testing.assert_close(output.logits[0][0], naive.logits[0], atol=1e-4, rtol=0)
    torch.manual_seed(7)
    again, _ = run_engine(model, rows, visual, config, do_sample=True, temperature=0.7, num_return_sequences=1)
    assert output.sequences.tolist() == again.sequences.tolist()


@torch.no_grad()
def test_several_sequences_of_a_prompt_share_one_trace(ready) -> None:
    model, rows, visual, config = ready
    output, _ = run_engine(model, rows, visual, config, do_sample=True, num_return_sequences=3)
    assert output.sequences.shape[0] == 3
    assert len(model.last_pruning_traces) == 1


@torch.no_grad()
def test_a_streamer_gets_the_tokens_of_the_answer(ready) -> None:
    model, rows, visual, config = ready

    tokens: list[int] = []

    class Collect:
        def put(self, value):
            tokens.extend(value.flatten().tolist())

        def end(self):
            pass

    output, _ = run_engine(model, rows, visual, config, streamer=Collect())
    assert tokens == output.sequences[0].tolist()


@torch.no_grad()
def test_a_decode_loop_by_hand_equals_generate(ready) -> None:
    model, rows, visual, config = ready
    expected, _ = run_engine(model, rows, visual, config)
    with prune(model, config):
        output = model(inputs_embeds=rows[None], visual_mask=visual[None], use_cache=True)
        tokens = [int(output.logits[0, -1].argmax())]
        while len(tokens) < NEW:
            output = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values)
            tokens.append(int(output.logits[0, -1].argmax()))
    assert tokens == expected.sequences[0].tolist()


@torch.no_grad()
def test_a_decode_loop_by_hand_over_a_padded_batch_equals_the_unpatched_model(ready) -> None:
    # Every sample is padded, so no layer holds as many rows as the positions have run.
    model = ready[0]
    inputs = left_padded([make_prompt(layout, seed=seed) for seed, layout in enumerate(BATCH)])
    padded = {
        key: torch.nn.functional.pad(value, (0, 0, 3, 0) if value.ndim == 3 else (3, 0))
        for key, value in inputs.items()
    }

    def by_hand(**first):
        output = model(**first, use_cache=True)
        logits, attention = [output.logits[:, -1]], first["attention_mask"]
        for _ in range(3):
            attention = torch.nn.functional.pad(attention, (0, 1), value=1)
            tokens = torch.tensor([[5], [6], [7]])
            output = model(input_ids=tokens, attention_mask=attention, past_key_values=output.past_key_values)
            logits.append(output.logits[:, -1])
        return torch.stack(logits)

    expected = by_hand(**padded)
    with prune(model, Method()):
        torch.testing.assert_close(by_hand(**padded), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_assisted_decoding_takes_draft_tokens_for_decoded_ones(ready) -> None:
    # Drafts ride along with the prefill: the last prompt row is not the last row.
    model, rows, visual, config = ready
    expected = naive_generate(model, rows, visual, config, "first", 4)
    drafts = torch.tensor([expected.tokens[:3]])
    embeds = torch.cat([rows, model.get_input_embeddings()(drafts)[0]])
    mask = torch.cat([visual, torch.zeros(3, dtype=torch.bool)])
    with prune(model, config) as run:
        run._generation = Generation(is_assisted=True)
        output = model(inputs_embeds=embeds[None], visual_mask=mask[None], logits_to_keep=4)
    assert run.traces[0].num_rows == len(rows)
    assert run.traces[0].kept_positions == expected.kept
    torch.testing.assert_close(output.logits[0], torch.stack(expected.logits), atol=1e-4, rtol=0)


@torch.no_grad()
def test_prompt_lookup_gives_the_same_answer(ready) -> None:
    model, rows, visual, config = ready
    plain, _ = run_engine(model, rows, visual, config, max_new_tokens=12)
    looked_up, trace = run_engine(model, rows, visual, config, max_new_tokens=12, prompt_lookup_num_tokens=2)
    assert looked_up.sequences.tolist() == plain.sequences.tolist()
    assert trace.num_rows == len(rows)


@torch.no_grad()
def test_long_answers_outgrow_the_spare_rows(ready) -> None:
    model, rows, visual, config = ready
    output, trace = run_engine(model, rows, visual, config, max_new_tokens=200)
    naive = naive_generate(model, rows, visual, config, "first", 3)
    assert output.sequences[0, :3].tolist() == naive.tokens
    held = [layer.get_seq_length() for layer in output.past_key_values.layers]
    assert held == [count + 199 for count in trace.rows_per_layer]


# -- what must not change -------------------------------------------------------------------------------------------


def snapshot(model) -> dict:
    state = {"config": copy.deepcopy(vars(model.config)), "attributes": set(vars(model))}
    for name, module in model.named_modules():
        state[name] = (
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            set(vars(module)) - {"_last_pruning_traces"},
        )
    state["attributes"] -= {"_last_pruning_traces"}
    return state


@pytest.mark.parametrize("config", [None, {"mode": []}], ids=["no config", "empty mode"])
@torch.no_grad()
def test_no_pruning_is_bit_equal_to_the_unpatched_model(config, kv_heads) -> None:
    model = make_model(kv_heads)
    inputs = left_padded([make_prompt(layout, seed=seed) for seed, layout in enumerate(BATCH)])
    plain = {key: value for key, value in inputs.items() if key != "visual_mask"}
    expected = model.generate(**plain, **GREEDY)
    output = model.generate(**inputs, pruning_config=config, **GREEDY)
    assert output.sequences.tolist() == expected.sequences.tolist()
    for mine, its in zip(output.logits, expected.logits, strict=True):
        assert torch.equal(mine, its)
    if config is not None:
        assert [trace.rows_per_layer for trace in model.last_pruning_traces] == [
            [int(mask.sum())] * NUM_LAYERS for mask in inputs["attention_mask"]
        ]


@torch.no_grad()
def test_an_empty_mode_needs_no_visual_mask() -> None:
    model = make_model(8)
    rows, _ = make_prompt("image first")
    expected = model(inputs_embeds=rows[None]).logits
    with prune(model, {"mode": []}):
        assert torch.equal(model(inputs_embeds=rows[None]).logits, expected)


@torch.no_grad()
def test_nothing_is_left_on_the_model(ready) -> None:
    model, rows, visual, config = ready
    before = snapshot(model)
    expected = model(inputs_embeds=rows[None]).logits
    before = snapshot(model)
    with prune(model, config):
        model(inputs_embeds=rows[None], visual_mask=visual[None])
        assert snapshot(model) != before
    assert snapshot(model) == before
    with pytest.raises(ZeroDivisionError), prune(model, config):
        raise ZeroDivisionError
    assert snapshot(model) == before
    with pytest.raises(RuntimeError), prune(model, config):
        model(inputs_embeds=rows[None, :, :-1], visual_mask=visual[None])
    assert snapshot(model) == before
    model.generate(inputs_embeds=rows[None], visual_mask=visual[None], pruning_config=config, max_new_tokens=2)
    assert snapshot(model) == before
    assert torch.equal(model(inputs_embeds=rows[None]).logits, expected)


@torch.no_grad()
def test_a_second_block_is_refused_by_name_and_the_first_goes_on(ready) -> None:
    model, rows, visual, config = ready
    before = snapshot(model)
    inputs = {"inputs_embeds": rows[None], "visual_mask": visual[None]}
    with prune(model, config) as run:
        pruned = model(**inputs).logits
        with pytest.raises(RuntimeError, match=r"open on this model: PruningRun\(.*shallow_mid_layer"), prune(model):
            pass
        with pytest.raises(RuntimeError, match="open on this model"):
            model.generate(**inputs, pruning_config=config)
        assert torch.equal(model(**inputs).logits, pruned)
        assert run.traces[0].select_layer == 3
    assert snapshot(model) == before


@torch.no_grad()
def test_every_prompt_of_a_batch_may_have_a_config_of_its_own(ready) -> None:
    model, _, _, config = ready
    prompts = [make_prompt(layout, seed=seed) for seed, layout in enumerate(BATCH)]
    configs = [config, None, {"method": "vtw", "layer": 3}]
    inputs = left_padded(prompts)
    with prune(model, configs, visual_mask=inputs.pop("visual_mask")) as run:
        output = model.generate(**inputs, **GREEDY)
    for number, ((rows, visual), own) in enumerate(zip(prompts, configs, strict=True)):
        alone, trace = run_engine(model, rows, visual, own or {"mode": []})
        assert output.sequences[number].tolist() == alone.sequences[0].tolist()
        assert run.traces[number].rows_per_layer == trace.rows_per_layer
    with pytest.raises(UnsupportedCallError, match="2 pruning configs were given for 3 prompts"):
        model.generate(**left_padded(prompts), pruning_config=configs[:2])


@torch.no_grad()
def test_a_call_after_an_error_inside_a_block_starts_clean(ready) -> None:
    model, rows, visual, config = ready
    inputs = {"inputs_embeds": rows[None], "visual_mask": visual[None]}
    with prune(model, config):
        expected = model(**inputs).logits
        with pytest.raises(RuntimeError):
            model(inputs_embeds=rows[None, :, :-1], visual_mask=visual[None])
        assert torch.equal(model(**inputs).logits, expected)


def test_the_model_is_not_kept_alive(ready) -> None:
    _, rows, visual, config = ready
    alone = make_model(8)
    with torch.no_grad():
        alone.generate(inputs_embeds=rows[None], visual_mask=visual[None], pruning_config=config, max_new_tokens=2)
    reference = weakref.ref(alone)
    del alone
    gc.collect()
    assert reference() is None


# -- prompts that do not prune ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_prompt_without_an_image_runs_dense_and_silently(ready, recwarn) -> None:
    model, rows, visual, config = ready
    expected = model.generate(inputs_embeds=rows[None], **GREEDY)
    output, trace = run_engine(model, rows, torch.zeros_like(visual), config)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert trace.rows_per_layer == [len(rows)] * NUM_LAYERS
    assert not [warning for warning in recwarn if "visual" in str(warning.message)]


@torch.no_grad()
def test_a_prompt_that_ends_in_the_image_runs_dense_with_a_warning(ready) -> None:
    model, rows, visual, config = ready
    visual = visual.clone()
    visual[-1] = True
    expected = model.generate(inputs_embeds=rows[None], **GREEDY)
    with pytest.warns(UserWarning, match="ends in a visual row"):
        output, trace = run_engine(model, rows, visual, config)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert trace.rows_per_layer == [len(rows)] * NUM_LAYERS


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"dola_layers": "high"}, "dola_layers"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"output_attentions": True}, "output_attentions"),
        ({"use_cache": False}, "use_cache"),
        ({"past_key_values": StaticCache}, "past_key_values"),
        ({"assistant_model": "itself"}, "assistant_model"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(ready, options, named) -> None:
    model, rows, visual, config = ready
    if options.get("past_key_values"):
        options = {"past_key_values": StaticCache(model.config, max_cache_len=128)}
    if options.get("assistant_model"):
        options = {"assistant_model": model}
    before = snapshot(model)
    with pytest.raises(UnsupportedCallError, match=named):
        run_engine(model, rows, visual, config, **options)
    assert snapshot(model) == before


@torch.no_grad()
def test_the_cache_of_a_pruned_prompt_is_not_continued_past_its_block(ready) -> None:
    model, rows, visual, config = ready
    output, _ = run_engine(model, rows, visual, config)
    token = torch.tensor([[5]])
    with pytest.raises(RuntimeError, match="pruned prompt"):
        model(input_ids=token, past_key_values=output.past_key_values)
    with pytest.raises(UnsupportedCallError, match="past_key_values"):
        run_engine(model, rows, visual, config, past_key_values=output.past_key_values)
    dense = DynamicCache()
    model(inputs_embeds=rows[None], past_key_values=dense, use_cache=True)
    with pytest.raises(UnsupportedCallError, match="past_key_values"), prune(model, config):
        model(input_ids=token, past_key_values=dense)


def test_rows_without_a_visual_mask_are_refused(ready) -> None:
    model, rows, visual, config = ready
    with pytest.raises(UnsupportedCallError, match="visual_mask"):
        model.generate(inputs_embeds=rows[None], pruning_config=config, max_new_tokens=2)
    with pytest.raises(UnsupportedCallError, match="visual_mask has shape"):
        model.generate(inputs_embeds=rows[None], visual_mask=visual[None, :-1], pruning_config=config, max_new_tokens=2)


def test_right_padding_is_refused(ready) -> None:
    model, rows, visual, config = ready
    attention = torch.ones(1, len(rows), dtype=torch.long)
    attention[0, -2:] = 0
    with pytest.raises(UnsupportedCallError, match="left padding"):
        model(inputs_embeds=rows[None], visual_mask=visual[None], attention_mask=attention, pruning_config=config)


def test_an_attention_mask_of_another_width_is_refused(ready) -> None:
    # Such as the mask of the ids, when rows are given whose images are in place.
    model, rows, visual, config = ready
    inputs = {"inputs_embeds": rows[None], "visual_mask": visual[None]}
    attention = torch.ones(1, len(rows) - 3, dtype=torch.long)
    with pytest.raises(UnsupportedCallError, match="attention_mask has shape"):
        model(**inputs, attention_mask=attention, pruning_config=config)
    with pytest.raises(UserError, match="attention_mask has shape"):
        model.generate(**inputs, attention_mask=attention, pruning_config=config)


def test_labels_are_refused_where_a_model_does_not_let_them_follow_its_rows() -> None:
    # All rows may survive in this prompt and not in the next: the loss would be of other tokens, or none.
    # This project's own models take them: test_train_pruned.py.
    model = family_model("llava")
    ids = torch.tensor([[5, 6, 7]])
    config = {"mode": ["deep"], "mid_deep_layer": 1}
    with prune(model, config), pytest.raises(UnsupportedCallError, match="labels"):
        model(input_ids=ids, labels=ids)


def test_a_layer_out_of_the_models_range_is_refused_before_work(ready) -> None:
    model, _, _, config = ready
    with pytest.raises(PruningConfigError, match="shallow_mid_layer"), prune(model, config | {"shallow_mid_layer": 8}):
        pass


def test_unsupported_models_are_refused_by_name() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8))
    with pytest.raises(UnsupportedModelError, match="gpt2"), prune(model, {"mode": []}):
        pass


def test_sliding_windows_are_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(
        MistralConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=8,
            sliding_window=4,
        )
    )
    with pytest.raises(UnsupportedModelError, match="sliding"), prune(model, {"mode": []}):
        pass


# -- two callers ------------------------------------------------------------------------------------------------------


def test_two_threads_generate_one_after_the_other(ready) -> None:
    model, rows, visual, config = ready
    inputs = {"inputs_embeds": rows[None], "visual_mask": visual[None], "max_new_tokens": 30, "do_sample": False}
    expected = {
        "pruned": model.generate(**inputs, pruning_config=config).tolist(),
        "dense": model.generate(**inputs).tolist(),
    }
    failures: list[str] = []

    def work(kind: str) -> None:
        for _ in range(4):
            answer = model.generate(**inputs, pruning_config=config if kind == "pruned" else None).tolist()
            if answer != expected[kind]:
                failures.append(kind)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in ("pruned", "dense", "pruned", "dense")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_block_of_another_thread_is_refused(ready) -> None:
    model, _, _, config = ready
    raised: list[Exception] = []

    def work() -> None:
        try:
            with prune(model, config):
                pass
        except RuntimeError as error:
            raised.append(error)

    with prune(model, config):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert "another thread" in str(raised[0])


def test_a_worker_thread_may_generate_inside_a_block(ready) -> None:
    # The usual way to stream: generate in a thread, read the streamer in this one.
    model, rows, visual, config = ready
    expected, _ = run_engine(model, rows, visual, config)
    answers: list[list[int]] = []
    with prune(model, config) as run:
        thread = threading.Thread(
            target=lambda: answers.append(
                model.generate(inputs_embeds=rows[None], visual_mask=visual[None], max_new_tokens=NEW, do_sample=False)[
                    0
                ].tolist()
            )
        )
        thread.start()
        thread.join()
    assert answers == [expected.sequences[0].tolist()]
    assert run.traces[0].select_layer == 3


def test_config_objects_json_and_files_mean_the_same(ready, tmp_path) -> None:
    import json

    model, rows, visual, config = ready
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    traces = []
    for form in (config, PruningConfig.from_any(config), json.dumps(config), f"@{file}"):
        traces.append(run_engine(model, rows, visual, form)[1].to_dict())
    assert all(trace == traces[0] for trace in traces)
