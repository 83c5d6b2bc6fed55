"""The engine against recorded runs of the published implementation."""

from __future__ import annotations

import pytest
import torch
from golden_runs import CASES, GoldenCase

from llava.pruning import PruningConfig

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}


@pytest.fixture(params=CASES)
def case(request) -> GoldenCase:
    return GoldenCase.load(request.param)


def test_generation_equals_the_recorded_run(case: GoldenCase) -> None:
    expected = case.facts["expected"]
    model = case.model
    config = case.facts["pruning_config"]
    # Without a config no trace is kept; an empty mode is dense with a trace.
    output = model.generate(
        **case.inputs(),
        pruning_config=config or {"mode": []},
        max_new_tokens=case.facts["max_new_tokens"],
        **GREEDY,
    )
    (trace,) = model.last_pruning_traces

    assert output.sequences[0].tolist() == expected["generated_ids"]
    assert trace.num_rows == case.facts["input"]["expanded_len"]
    assert trace.rows_per_layer == expected["seq_len_per_layer"]
    assert trace.select_layer == expected["select_layer"]
    assert trace.kept_positions == (expected["selected_indices"] or [])
    assert trace.exit_layer == expected["exit_layer"]
    held = [layer.get_seq_length() for layer in output.past_key_values.layers]
    assert held == expected["kv_len_per_layer_after_generation"]

    logits = torch.stack(output.logits, dim=1)[0]
    torch.testing.assert_close(logits, case.tensors["logits"], atol=1e-3, rtol=0)
    prefill = output.hidden_states[0]
    # transformers norms the last state, so the last layer's is left out.
    last_rows = torch.stack([state[0, -1] for state in prefill[:-1]])
    torch.testing.assert_close(last_rows, case.tensors["hidden_last"][:-1], atol=1e-4, rtol=0)
    means = torch.stack([state[0].mean(0) for state in prefill[1:-1]])
    torch.testing.assert_close(means, case.tensors["hidden_mean"][:-1], atol=1e-4, rtol=0)
    if expected["select_layer"] is not None:
        torch.testing.assert_close(torch.as_tensor(trace.selection_cosine), case.tensors["sel_cos"], atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.as_tensor(trace.selection_norm), case.tensors["sel_l2"], atol=1e-4, rtol=0)
    if case.pixels is not None:
        features = model.encode_images(case.pixels)[:, ::16]
        torch.testing.assert_close(features, case.tensors["image_features_head"], atol=1e-4, rtol=0)


def test_prefill_holds_the_recorded_keys_and_values(case: GoldenCase) -> None:
    model = case.model
    with torch.no_grad():
        output = model(**case.inputs(), pruning_config=case.facts["pruning_config"], use_cache=True)
    layers = output.past_key_values.layers
    expected = case.facts["expected"]["kv_len_per_layer_after_prefill"]
    assert [layer.get_seq_length() for layer in layers] == expected
    for name, recorded in (("keys", "k_mean"), ("values", "v_mean")):
        means = torch.stack([getattr(layer, name)[0].mean(1) for layer in layers])
        torch.testing.assert_close(means, case.tensors[recorded], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.logits[0, -1], case.tensors["logits"][0], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "names",
    [
        ("a_smd_7b_gap_exit", "a_text_only_7b", "a_middle_7b", "a_smd_7b_no_exit"),
        ("a_middle_deep_7b_gap_exit", "a_middle_7b", "a_smd_13b_two_images"),
        ("a_smd_13b_fast_exit", "a_shallow_middle_13b", "a_smd_13b_two_images"),
        ("ga_smd_13b_fast_exit", "ga_middle_13b", "ga_shallow_7b", "ga_md_7b_gap_exit"),
        ("a_shallow_7b", "a_smd_7b_zero_tokens", "a_text_only_7b"),
    ],
)
def test_a_sample_in_a_batch_decides_and_answers_as_it_does_alone(names: tuple[str, ...]) -> None:
    cases = [GoldenCase.load(name) for name in names]
    model, config = cases[0].model, cases[0].facts["pruning_config"]
    prompts = [case.rows() for case in cases]
    model.config._name_or_path = cases[0].facts["name_or_path"]  # the first case's name selects the rule for layer 0
    longest = max(len(rows) for rows, _ in prompts) + 3
    embeds = torch.zeros(len(prompts), longest, model.config.hidden_size)
    visual = torch.zeros(len(prompts), longest, dtype=torch.bool)
    attention = torch.zeros(len(prompts), longest, dtype=torch.long)
    for number, (rows, is_visual) in enumerate(prompts):
        start = longest - len(rows)
        embeds[number, start:], visual[number, start:], attention[number, start:] = rows, is_visual, 1

    def run(**inputs):
        output = model.generate(**inputs, pruning_config=config, max_new_tokens=8, **GREEDY)
        return output, model.last_pruning_traces

    together, traces = run(inputs_embeds=embeds, visual_mask=visual, attention_mask=attention)
    assert PruningConfig.from_any(config).mode
    for number, (rows, is_visual) in enumerate(prompts):
        alone, (trace,) = run(inputs_embeds=rows[None], visual_mask=is_visual[None])
        assert together.sequences[number].tolist() == alone.sequences[0].tolist()
        mine, its = traces[number].to_dict(), trace.to_dict()
        for key in ("selection_cosine", "selection_norm", "smallest_cosine"):
            mine.pop(key), its.pop(key)
        mine.pop("lm_head_rows"), its.pop("lm_head_rows")
        assert mine == its
        logits = [torch.stack(output.logits, dim=1) for output in (together, alone)]
        torch.testing.assert_close(logits[0][number], logits[1][0], atol=1e-4, rtol=0)
        for layer, (batch_state, own_state) in enumerate(
            zip(together.hidden_states[0], alone.hidden_states[0], strict=True)
        ):
            count = own_state.shape[1]
            torch.testing.assert_close(
                batch_state[number, -count:], own_state[0], atol=1e-4, rtol=0, msg=f"after layer {layer - 1}"
            )
    held = [layer.get_seq_length() for layer in together.past_key_values.layers]
    new = together.sequences.shape[1] - 1
    assert held == [max(counts) + new for counts in zip(*(trace.rows_per_layer for trace in traces), strict=True)]
