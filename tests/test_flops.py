"""FLOPs: published figures by closed form, and `executed` against torch's own counter on real runs."""

import pytest
import torch
from family_models import FAMILIES, family_model
from golden_runs import GoldenCase
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from llava.pruning import PruningTrace, prune
from llava.pruning.flops import (
    DecoderShape,
    counter_mapping,
    dense_trace,
    executed_flops,
    fastv_flops,
    flops,
    paper_flops,
    prompt_flops,
    savings,
    vision_attention_saved,
)
from llava.pruning.methods import Schedule

LLAVA_7B = DecoderShape(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    num_heads=32,
    head_dim=128,
    vocab_size=32000,
    linear_weights=4 * 4096**2 + 3 * 4096 * 11008,
    key_value_weights=2 * 4096**2,
)


def test_dense_llava_7b_by_the_published_conventions():
    assert paper_flops([576] * 32, LLAVA_7B) == pytest.approx(3.817e12, rel=2e-4)
    assert fastv_flops([576] * 32, LLAVA_7B) == pytest.approx(2.99e12, rel=2e-3)
    assert prompt_flops([651] * 32, LLAVA_7B) == pytest.approx(8.654e12, rel=1e-4)


def test_published_saving_comes_from_the_published_averages_with_a_selection_behind_14_6_layers():
    # 10.3 rows kept and an exit at layer 23.9 are published, the selecting layer is not: the saving determines it.
    dense = paper_flops([576], LLAVA_7B)
    kept = paper_flops([10.3], LLAVA_7B)

    def saving(whole_layers: float) -> float:
        return 1 - (whole_layers * dense + (23.9 - whole_layers) * kept) / (32 * dense)

    assert saving(14.6) == pytest.approx(0.539, abs=1e-3)
    # The earliest selection that mid-layer 6 allows would save far more, so the published figure is an average.
    assert saving(8) == pytest.approx(0.741, abs=1e-3)


def test_executed_dense_equals_the_prompt_convention_and_the_output_head():
    trace = dense_trace(PruningTrace(651, list(range(35, 611)), lm_head_rows=1), LLAVA_7B)
    assert executed_flops(trace, LLAVA_7B) == prompt_flops([651] * 32, LLAVA_7B) + 2 * 4096 * 32000


def decoder(kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        vocab_size=200,
    )
    return LlamaForCausalLM(config).eval()


def prompts(*parts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A left-padded batch. Each part: rows of text, image, text, image, …, text."""
    width = max(map(sum, parts))
    visual, valid = torch.zeros(len(parts), width, dtype=torch.bool), torch.zeros(len(parts), width, dtype=torch.long)
    for number, part in enumerate(parts):
        row = width - sum(part)
        valid[number, row:] = 1
        for position, count in enumerate(part):
            visual[number, row : row + count] = position % 2 == 1
            row += count
    torch.manual_seed(1)
    return {"embeds": torch.randn(len(parts), width, 64), "visual": visual, "valid": valid}


POLICIES = {
    "dense": {},
    "pruned": {"config": Schedule(2, 4, 5, 6)},
    "half": {"config": Schedule(2, 4, 5, 6, "half")},
    "shallow": {"config": {"mode": ["shallow"], "shallow_mid_layer": 3}},
    "deep": {"config": {"mode": ["deep"], "mid_deep_layer": 5}},
    "text": {
        "config": {
            "mode": ["middle", "deep"],
            "shallow_mid_layer": 2,
            "layer_threshold": 0.999999,
            "keep": 0.3,
            "exit_threshold": 0.001,
            "probe_rows": "text",
        }
    },
    "vtw": {"config": {"method": "vtw", "layer": 3}},
    "fastv": {"config": {"method": "fastv", "layer": 2, "keep": 0.3}},
    "dart": {"config": {"method": "dart", "layer": 2, "keep": 12, "image_pivots": 2, "text_pivots": 2}},
    "sparsevlm": {"config": {"method": "sparsevlm", "layers": [1, 4], "keep": [0.5, 0.2]}},
    "sparsevlm v2": {"config": {"method": "sparsevlm", "variant": "v2", "layers": [1, 4], "keep": [0.5, 0.2]}},
    "random before the decoder": {"config": {"method": "random", "keep": 4}},
    "pyramiddrop": {"config": {"method": "pyramiddrop", "layers": [2, 4, 5], "keep": [0.5, 0.25, 0.0]}},
    "divprune": {"config": {"method": "divprune", "keep": 7}},
    "cdpruner": {"config": {"method": "cdpruner", "keep": 7, "relevance": "embeddings"}},
    "stride": {"config": {"method": "stride", "keep": 7, "layer": 3}},
    "pool": {"config": {"method": "pool", "factor": 2}},
    "chain": {
        "config": {
            "method": "chain",
            "steps": [
                {"method": "divprune", "keep": 12},
                {"method": "pyramiddrop", "layers": [2, 3], "keep": [0.5, 0.25]},
                {"mode": ["middle"], "shallow_mid_layer": 3, "layer_threshold": 0.999, "tokens_threshold": 0.01},
            ],
        }
    },
    "shortv": {"config": {"method": "shortv", "frozen_layers": [0, 3, 4, 7]}},
    "st3": {"config": {"method": "st3"}},
    "yopo": {"config": {"method": "yopo"}},
    "vica": {"config": {"method": "vica", "layers": [0, 2, 3, 5]}},
    "vica behind divprune": {
        "config": {"method": "chain", "steps": [{"method": "divprune", "keep": 7}, {"method": "vica"}]}
    },
}


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    "parts",
    [((6, 40, 9),), ((6, 40, 9), (6, 40, 9), (6, 40, 9)), ((6, 40, 9), (3, 20, 4, 10, 5), (0, 30, 7))],
    ids=["one", "three", "ragged"],
)
def test_executed_equals_the_torch_counter(kv_heads, name, parts):
    if name == "dense" and len(set(parts)) > 1:
        pytest.skip("the unpatched model works on padding too, which is no sample's own")
    model, batch = decoder(kv_heads), prompts(*parts)
    mask = None if batch["valid"].all() else batch["valid"]
    with (
        torch.no_grad(),
        prune(model, visual_mask=batch["visual"], **POLICIES[name]) as run,
        FlopCounterMode(display=False, custom_mapping=counter_mapping()) as counter,
    ):
        model(inputs_embeds=batch["embeds"], attention_mask=mask, use_cache=True, logits_to_keep=1)
    shape = DecoderShape.of(model)
    rotary = counter.get_flop_counts().get("LlamaForCausalLM.model.rotary_emb", {})
    counted = counter.get_total_flops() - sum(rotary.values())  # angles are no part of any convention
    assert sum(executed_flops(trace, shape) for trace in run.traces) == pytest.approx(counted, rel=1e-3)
    assert len(run.traces) == len(parts)


@pytest.mark.parametrize(
    "config",
    [
        {"method": "vispruner", "keep": 100},
        {"method": "scope"},
        {"method": "holov", "crops": 10},
        {"method": "visionzip"},
    ],
    ids=lambda config: config["method"],
)
@pytest.mark.parametrize("name", ["scope__t101_two_images_alpha05", "scope__t100_anyres_2x1"])
def test_what_a_method_makes_of_the_towers_states_is_counted(name, config):
    case = GoldenCase.load(name)
    model = case.model

    def count(call):
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counter_mapping()) as counter:
            call()
        angles = counter.get_flop_counts().get("LlavaLlamaForCausalLM.model.language_model.rotary_emb", {})
        return counter.get_total_flops() - sum(angles.values())

    tower = count(lambda: model.encode_images(case.pixels))
    whole = count(lambda: model(**case.inputs(), pruning_config=config, logits_to_keep=1))
    (trace,) = model.last_pruning_traces
    assert trace.projection_flops > 0
    assert executed_flops(trace, DecoderShape.of(model)) == pytest.approx(whole - tower, rel=1e-3)


@pytest.mark.parametrize("method", ["vispruner", "scope", "holov", "visionzip"])
def test_what_is_made_of_a_tower_without_a_class_token_is_counted(method):
    model, inputs = family_model("llava-onevision"), FAMILIES["llava-onevision"].inputs((4, "image", 3))

    def count(call):
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counter_mapping()) as counter:
            call()
        angles = counter.get_flop_counts().get(f"{type(model).__name__}.model.language_model.rotary_emb", {})
        return counter.get_total_flops() - sum(angles.values())

    tower = count(lambda: model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]))
    knobs = {"dominant": 5, "contextual": 3} if method == "visionzip" else {}
    with prune(model, {"method": method, **knobs}) as run:
        whole = count(lambda: model(**inputs, logits_to_keep=1))
    assert executed_flops(run.traces[0], DecoderShape.of(model)) == pytest.approx(whole - tower, rel=1e-3)


def test_savings_agree_with_counts_and_know_prompts_without_images():
    model, batch = decoder(2), prompts((6, 40, 9))
    with torch.no_grad(), prune(model, Schedule(2, 4, 5, 6), visual_mask=batch["visual"]) as run:
        model(inputs_embeds=batch["embeds"], use_cache=True, logits_to_keep=1)
    trace, shape = run.traces[0], DecoderShape.of(model)
    saved = savings(trace, model)
    # 40 visual rows in layers 0 to 4, 5 in layer 5, none in 6 and 7.
    visual_rows = [40] * 5 + [5] + [0] * 2
    assert saved["paper"] == pytest.approx(1 - paper_flops(visual_rows, shape) / paper_flops([40] * 8, shape))
    assert saved["prompt"] == pytest.approx(
        1 - prompt_flops([55] * 5 + [20, 15, 15], shape) / prompt_flops([55] * 8, shape)
    )
    assert 0 < saved["executed"] < saved["paper"]
    # Read: one visual row in layer 0 (the sink), none in layer 1, all in 2 to 4, 5 in layer 5, of 8 layers of 40.
    assert vision_attention_saved(trace) == pytest.approx(1 - (1 + 3 * 40 + 5) / (8 * 40))

    text = dense_trace(PruningTrace(20, []), shape)
    assert savings(text, shape) == {"paper": 0.0, "fastv": 0.0, "prompt": 0.0, "executed": 0.0}
    assert vision_attention_saved(text) == 0.0
    assert flops(text, shape)["paper"] == 0


def test_shortv_and_vtw_save_what_their_papers_formulas_say():
    """Two FLOPs a multiply-add; a frozen layer: keys and values of all rows, everything else of text rows alone."""
    model, batch = decoder(8), prompts((6, 40, 9))
    shape, text, rows = DecoderShape.of(model), 15, 55
    d, m = shape.hidden_size, shape.intermediate_size

    def layers_run(method: dict) -> int:
        with torch.no_grad(), prune(model, method, visual_mask=batch["visual"]) as run:
            model(inputs_embeds=batch["embeds"], use_cache=True, logits_to_keep=1)
        return executed_flops(run.traces[0], shape) - 2 * shape.hidden_size * shape.vocab_size

    def layer(n: int) -> int:
        return 2 * n * (4 * d + 3 * m) * d + 4 * n * n * d

    frozen = 2 * 2 * rows * d * d + 2 * text * (2 * d + 3 * m) * d + 4 * d * (6 * 6 + 9 * (46 + 9))
    assert layers_run({"method": "vtw", "layer": 3}) == 3 * layer(rows) + 5 * layer(text)
    assert layers_run({"method": "shortv", "frozen_layers": [2, 5, 6]}) == 5 * layer(rows) + 3 * frozen


def test_shortvs_published_saving_comes_from_its_published_layers():
    """LLaVA-1.5-7B, 19 of 32 layers frozen: 8.5 -> 4.7 TFLOPs, 55 % (arXiv 2504.00502, table 1)."""
    rows, text = 576 + 60, 60
    dense = prompt_flops([rows] * 32, LLAVA_7B)
    frozen = prompt_flops([rows] * 32, LLAVA_7B, [rows] * 13 + [text] * 19)
    assert dense == pytest.approx(8.5e12, rel=0.01) and frozen == pytest.approx(4.7e12, rel=0.02)
    assert frozen / dense == pytest.approx(0.55, abs=0.005)
