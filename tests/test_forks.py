"""Copies of a prompt that go their own way from a layer on, against whole runs under the same config."""

from __future__ import annotations

import pytest
import torch
from family_models import FAMILIES, LAYERS, family_model
from golden_runs import GoldenCase

from llava.pruning import Method, PruningConfigError, UnsupportedCallError, VisiPruner, prune
from llava.pruning.methods import VTW, FastV, Scope, ShortV, Stride

PROMPTS = [(4, "image", 3, "image", 5), (5, "image", 6)]


def logits(model, inputs, config=None, forks=()) -> torch.Tensor:
    with torch.no_grad(), prune(model, config, forks=forks):
        return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_ends_as_the_prompt_alone_under_its_config(name: str) -> None:
    family, model = FAMILIES[name], family_model(name)
    inputs = family.inputs(*PROMPTS)
    first = family.first_layer
    forks: list[tuple[int, Method | None, int]] = [
        *((layer, VTW(layer), layer % 2) for layer in range(max(1, first), LAYERS)),
        *((layer, ShortV((layer,)), 0) for layer in range(first, LAYERS)),
        # These look behind the layer before their own first one.
        (first + 2, FastV(first + 2, 4), 1),
        (first + 3, Stride(0.5, first + 3), 0),
    ]
    forks.sort(key=lambda fork: fork[0])
    together = logits(model, inputs, None, forks)
    assert together.shape[0] == len(PROMPTS) + len(forks)
    torch.testing.assert_close(together[:2], logits(model, inputs), atol=1e-5, rtol=0)
    for row, (_, config, prompt) in zip(together[2:], forks, strict=True):
        alone = logits(model, inputs, config)[prompt]
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sink", ["first", "half"])
def test_a_copy_of_a_blind_prompt_ends_its_shallow_stage_at_the_fork(sink: str) -> None:
    model, inputs = family_model("llava"), FAMILIES["llava"].inputs(*PROMPTS)
    blind = VisiPruner(("shallow",), LAYERS - 1, shallow_sink=sink)
    forks = [(layer, None, prompt) for layer in range(1, LAYERS - 1) for prompt in range(2)]
    together = logits(model, inputs, blind, forks)
    for row, (layer, _, prompt) in zip(together[2:], forks, strict=True):
        alone = logits(model, inputs, VisiPruner(("shallow",), layer, shallow_sink=sink))[prompt]
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=0)


def test_traces_of_copies_hold_their_own_rows_behind_the_forks() -> None:
    model, inputs = family_model("llava"), FAMILIES["llava"].inputs(PROMPTS[1])
    with torch.no_grad(), prune(model, None, forks=[(2, VTW(2), 0), (5, VTW(5), 0)]) as run:
        model(**inputs, use_cache=False)
    dense, early, late = run.traces
    text = dense.num_rows - dense.num_visual
    assert dense.rows_per_layer == [dense.num_rows] * LAYERS
    assert early.rows_per_layer == [dense.num_rows] * 2 + [text] * (LAYERS - 2)
    assert late.rows_per_layer == [dense.num_rows] * 5 + [text] * (LAYERS - 5)
    assert (early.exit_layer, late.exit_layer, dense.exit_layer) == (2, 5, None)


def test_nothing_stays_on_the_model() -> None:
    model, inputs = family_model("llava"), FAMILIES["llava"].inputs(PROMPTS[0])
    with torch.no_grad():
        before = model(**inputs).logits
        logits(model, inputs, None, [(3, ShortV((3,)), 0)])
        assert torch.equal(model(**inputs).logits, before)


def test_a_fork_needs_a_layer_of_the_model_and_no_cache() -> None:
    model, inputs = family_model("llava"), FAMILIES["llava"].inputs(PROMPTS[0])
    with pytest.raises(PruningConfigError, match=rf"a fork at layer {LAYERS}: .* layers 0 to {LAYERS - 1}"):
        logits(model, inputs, None, [(LAYERS, None, 0)])
    with pytest.raises(PruningConfigError, match="ascending layer"):
        logits(model, inputs, None, [(3, None, 0), (2, None, 0)])
    for prompt in (1, -1):
        with pytest.raises(UnsupportedCallError, match=f"a fork of prompt {prompt} .* the batch has 1"):
            logits(model, inputs, None, [(2, VTW(2), prompt)])
    with (
        pytest.raises(UnsupportedCallError, match="use_cache=False"),
        torch.no_grad(),
        prune(model, None, forks=[(2, VTW(2), 0)]),
    ):
        model(**inputs, use_cache=True)
    with pytest.raises(PruningConfigError, match="a fork cannot prune by 'scope'"):
        logits(model, inputs, None, [(2, Scope(keep=4), 0)])
    late = next(name for name, family in FAMILIES.items() if family.first_layer)
    with pytest.raises(PruningConfigError, match="a fork at layer 0"):
        logits(family_model(late), FAMILIES[late].inputs(PROMPTS[1]), None, [(0, None, 0)])


def test_withdrawals_of_one_pass_are_the_recorded_ones() -> None:
    case = GoldenCase.load("vtw__findk_a")
    layers = case.facts["expected"]["candidate_layers"]
    for sample in range(len(case.tensors["kl"])):
        rows, visual = case.rows(sample)
        with torch.no_grad(), prune(case.model, None, forks=[(layer, VTW(layer), 0) for layer in layers]):
            found = case.model(
                inputs_embeds=rows[None], visual_mask=visual[None], use_cache=False, logits_to_keep=1
            ).logits[:, -1]
        torch.testing.assert_close(found[0], case.tensors[f"logits_dense_{sample}"], atol=1e-3, rtol=0)
        torch.testing.assert_close(found[1:], case.tensors[f"logits_withdrawn_{sample}"], atol=1e-3, rtol=0)
