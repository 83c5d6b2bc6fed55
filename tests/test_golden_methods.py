"""Other methods against recorded runs of their own published code (`tests/golden_methods/`)."""

from __future__ import annotations

import pytest
import torch
from golden_runs import METHOD_CASES, GoldenCase

from llava.pruning import Method
from llava.pruning.methods import VTW, ShortV

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
CALIBRATIONS = {"shortv__contribution", "vtw__findk_a", "vtw__findk_ga"}
# Their decoding ranks anew in every step; prefill and first token are the method's.
PREFILL_ONLY = {"mask", "inplace"}
# Sixty rounds that each sort cosines 1e-6 apart: another machine's rounding may choose other near-duplicates.
CHAOTIC = {"vispruner__t64_r05", "vispruner__t128_r05"}
BEFORE_DECODER = {"vispruner", "scope", "holov", "visionzip"}


def knobs(case: GoldenCase) -> dict:
    """The case's config under the names that JSON has here."""
    given, method = case.facts["config"], case.facts["method"]
    if method == "fastv":
        return {"method": method, "layer": given["K"], "keep": given["num_kept"]}
    if method == "vtw":
        return {"method": method, "layer": given["k"]}
    if method == "pyramiddrop":
        ratios, positions = given["image_token_ratio_list"], given["positions"]
        return {"method": method, "layers": given["layer_list"], "keep": ratios, "positions": positions}
    images = case.facts["input"].get("num_images", 1)
    if method == "vispruner":
        return {"method": method, "keep": given["visual_token_num"], "important": given["important_ratio"]}
    if method == "scope":  # its budget is that of all images
        return {"method": method, "keep": given["num_token"] // images, "alpha": given["alpha"]}
    if method == "holov":
        published = {"overflow": "zeros", "order": "published"}
        return {"method": method, "keep": given["visual_token_num"], "crops": given["num_crops"], **published}
    return {"method": method, **given}


@pytest.fixture(params=[name for name in METHOD_CASES if name not in CALIBRATIONS])
def case(request) -> GoldenCase:
    return GoldenCase.load(request.param)


def test_generation_equals_the_recorded_run(case: GoldenCase) -> None:
    expected, model = case.facts["expected"], case.model
    is_prefill_only = case.facts["config"].get("mode") in PREFILL_ONLY
    new = 1 if is_prefill_only else case.facts["max_new_tokens"]
    output = model.generate(**case.inputs(), pruning_config=knobs(case), max_new_tokens=new, **GREEDY)
    (trace,) = model.last_pruning_traces

    # Of methods before the decoder, the rows that the language model sees were recorded.
    before_decoder = case.facts["method"] in BEFORE_DECODER
    assert (trace.rows_per_layer[0] if before_decoder else trace.num_rows) == expected["num_rows"]
    kept = {str(one.layer): sorted(p for p in one.positions.tolist() if p >= 0) for one in trace.decisions}
    if case.name in CHAOTIC:
        ours, recorded = kept["-1"], expected["kept_positions_after_layer"]["-1"]
        assert len(ours) == len(recorded) and len(set(ours) & set(recorded)) >= 0.75 * len(recorded)
        return
    assert kept == expected["kept_positions_after_layer"]
    assert output.sequences[0].tolist() == expected["generated_ids"][:new]
    logits = torch.stack(output.logits, dim=1)[0]
    torch.testing.assert_close(logits, case.tensors["logits"][:new], atol=1e-3, rtol=0)
    if case.facts["config"].get("mode") not in PREFILL_ONLY:
        assert trace.rows_per_layer == expected["rows_per_layer"]
        held = [layer.get_seq_length() for layer in output.past_key_values.layers]
        assert held == expected["kv_len_per_layer_after_generation"]
    if "updated_rows_per_layer" in expected:
        assert trace.updated_rows_per_layer == expected["updated_rows_per_layer"]
    for decision in trace.decisions:
        recorded = case.tensors.get(f"scores_{decision.layer + 1}")
        if recorded is not None and case.facts["method"] == "pyramiddrop":
            torch.testing.assert_close(torch.as_tensor(decision.measured["attention"]), recorded, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in METHOD_CASES if name.split("__")[0] in BEFORE_DECODER])
def test_choices_before_the_decoder_are_the_recorded_ones_picture_by_picture(name: str) -> None:
    case = GoldenCase.load(name)
    expected, method = case.facts["expected"], case.facts["method"]
    case.model.generate(**case.inputs(), pruning_config=knobs(case), max_new_tokens=1, **GREEDY)
    (decision,) = case.model.last_pruning_traces[0].decisions
    images, first = len(case.pixels), int(decision.before[0])
    of = {key: torch.as_tensor(part).view(images, -1) for key, part in decision.measured.items()}
    scores = of["score" if method == "scope" else "attention"]
    torch.testing.assert_close(scores, case.tensors["scores"], atol=1e-5, rtol=1e-5)
    rows = (decision.positions - first).reshape(images, -1)
    for image, own in enumerate(rows):
        patches = (own[own >= 0] - image * 576).tolist()
        if method == "scope":
            order = of["kept"][image].argsort(descending=True, stable=True)[: len(own)]
            assert order.tolist() == expected["selection_order"][image] and patches == expected["kept_patches"][image]
        if method == "vispruner":
            assert set(expected["important_patches"][image]) <= set(patches)
        if method == "vispruner" and name not in CHAOTIC:
            assert patches == sorted(expected["important_patches"][image] + expected["diverse_patches"][image])
        if method == "holov":
            assert patches == expected["kept_patches_in_order"][image]
            assert len(own) - len(patches) == expected["zero_rows"][image]
        if method == "visionzip":
            targets = expected["contextual_target_patches"][image]
            assert own[0] < 0 and patches == expected["dominant_patches"][image] + targets
            start = first + image * 576
            merged = [[one - start for one in decision.groups[start + target]] for target in targets]
            recorded = expected["merged_patches_per_target"][image]
            assert merged == [sorted([target, *own]) for target, own in zip(targets, recorded, strict=True)]


@pytest.mark.parametrize(
    "name", ["vispruner__t544_r05_few_rounds", "scope__t64", "holov__t288_zero_rows", "visionzip__d54_c10"]
)
def test_pictures_of_a_left_padded_batch_are_told_apart(name: str) -> None:
    case, other = GoldenCase.load(name), GoldenCase.load("scope__t101_two_images_alpha05")
    model, new = case.model, case.facts["max_new_tokens"]
    prompts = [other.tensors["input_ids"][0], case.tensors["input_ids"][0], torch.tensor([1, 5, 7])]
    width = max(map(len, prompts)) + 2
    ids, attention = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for number, own in enumerate(prompts):
        ids[number, -len(own) :], attention[number, -len(own) :] = own, 1
    options = {"pruning_config": knobs(case), "max_new_tokens": new, **GREEDY}
    output = model.generate(ids, torch.cat([other.pixels, case.pixels]), attention_mask=attention, **options)
    traces = model.last_pruning_traces
    assert output.sequences[1].tolist() == case.facts["expected"]["generated_ids"]
    torch.testing.assert_close(torch.stack(output.logits, dim=1)[1], case.tensors["logits"], atol=1e-3, rtol=0)
    alone = model.generate(**other.inputs(), **options)
    assert output.sequences[0].tolist() == alone.sequences[0].tolist()
    assert traces[0].kept_positions == model.last_pruning_traces[0].kept_positions
    assert not traces[2].decisions
    # Beams: the tower saw each picture once.
    model.generate(**case.inputs(), pruning_config=knobs(case), max_new_tokens=2, num_beams=2, do_sample=False)
    assert model.last_pruning_traces[0].kept_positions == traces[1].kept_positions


def test_a_left_padded_batch_with_another_prompt_decides_as_each_alone(case: GoldenCase) -> None:
    if case.pixels is not None:
        pytest.skip("the same rows as the cases of features")
    model, config = case.model, knobs(case)
    rows, visual = case.rows()
    # The other prompt: the same picture behind a shorter text, and a text without a picture.
    prompts = [(rows[20:], visual[20:]), (rows, visual), (rows[~visual], visual[~visual])]
    longest = max(len(own) for own, _ in prompts) + 2
    embeds = torch.zeros(3, longest, rows.shape[1])
    mask, attention = torch.zeros(3, longest, dtype=torch.bool), torch.zeros(3, longest, dtype=torch.long)
    for number, (own, own_visual) in enumerate(prompts):
        embeds[number, -len(own) :], mask[number, -len(own) :], attention[number, -len(own) :] = own, own_visual, 1
    options = {"pruning_config": config, "max_new_tokens": 4, **GREEDY}
    together = model.generate(inputs_embeds=embeds, visual_mask=mask, attention_mask=attention, **options)
    traces = model.last_pruning_traces
    for number, (own, own_visual) in enumerate(prompts):
        alone = model.generate(inputs_embeds=own[None], visual_mask=own_visual[None], **options)
        (trace,) = model.last_pruning_traces
        assert together.sequences[number].tolist() == alone.sequences[0].tolist()
        assert traces[number].rows_per_layer == trace.rows_per_layer
        assert traces[number].kept_positions == trace.kept_positions
        logits = [torch.stack(output.logits, dim=1) for output in (together, alone)]
        torch.testing.assert_close(logits[0][number], logits[1][0], atol=1e-4, rtol=0)


def first_logits(case: GoldenCase, sample: int, method: Method) -> torch.Tensor:
    rows, visual = case.rows(sample)
    with torch.no_grad():
        return case.model(inputs_embeds=rows[None], visual_mask=visual[None], pruning_config=method).logits[0, -1]


def divergence(changed: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """KL(changed || dense), natural logarithm."""
    return (changed.softmax(-1) * (changed.log_softmax(-1) - dense.log_softmax(-1))).sum()


@pytest.mark.parametrize("name", ["vtw__findk_a", "vtw__findk_ga"])
def test_withdrawal_at_every_layer_diverges_as_recorded(name: str) -> None:
    case = GoldenCase.load(name)
    for sample in range(len(case.tensors["kl"])):
        dense = first_logits(case, sample, VTW(layer=len(case.model.get_decoder().layers)))
        torch.testing.assert_close(dense, case.tensors[f"logits_dense_{sample}"], atol=1e-3, rtol=0)
        for number, layer in enumerate(case.facts["expected"]["candidate_layers"]):
            withdrawn = first_logits(case, sample, VTW(layer=layer))
            recorded = case.tensors[f"logits_withdrawn_{sample}"][number]
            torch.testing.assert_close(withdrawn, recorded, atol=1e-3, rtol=0)
            torch.testing.assert_close(
                divergence(withdrawn, dense), case.tensors["kl"][sample, number], atol=1e-5, rtol=0
            )


def test_freezing_each_layer_alone_diverges_as_recorded() -> None:
    case = GoldenCase.load("shortv__contribution")
    recorded = case.tensors["scores"]
    measured = torch.zeros_like(recorded)
    for sample in range(len(recorded)):
        dense = first_logits(case, sample, ShortV(frozen_layers=()))
        for layer in range(recorded.shape[1]):
            measured[sample, layer] = divergence(first_logits(case, sample, ShortV((layer,))), dense)
    torch.testing.assert_close(measured, recorded, atol=1e-5, rtol=0)
    assert measured.mean(0).argsort().tolist() == case.facts["expected"]["order"]
