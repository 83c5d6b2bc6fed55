"""Methods that choose or merge before the decoder, and chains: against plain runs and formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_models import FAMILIES, LAYERS, family_model
from family_reference import GREEDY, Hidden, masks_hide
from test_engine import make_config, make_model, make_prompt
from torch.utils._python_dispatch import TorchDispatchMode

from llava.pruning import PruningConfigError, prune
from llava.pruning.methods.cdpruner import greedy_map
from llava.pruning.methods.divprune import farthest_first
from llava.pruning.methods.stride import evenly

LAYOUTS = ["image in the middle", "three images with text between"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def generate(model, rows, visual=None, config=None):
    masks = {} if visual is None else {"visual_mask": visual[None]}
    return model.generate(inputs_embeds=rows[None], pruning_config=config, max_new_tokens=5, **masks, **GREEDY)


def assert_same(one, other) -> None:
    assert one.sequences.tolist() == other.sequences.tolist()
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("knobs", [{"method": "divprune"}, {"method": "cdpruner", "relevance": "embeddings"}])
def test_a_renumbered_run_equals_a_plain_one_over_the_shorter_prompt(layout, knobs) -> None:
    model, (rows, visual) = make_model(2), make_prompt(layout)
    pruned = generate(model, rows, visual, {**knobs, "keep": 3})
    (trace,) = model.last_pruning_traces
    assert trace.kept_per_image == [3] * len(trace.image_spans)
    left = ~visual
    left[trace.kept_positions] = True
    assert_same(pruned, generate(model, rows[left]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_chain_ends_as_its_last_step_over_what_the_first_left(layout) -> None:
    model, (rows, visual) = make_model(8), make_prompt(layout)
    first = {"method": "divprune", "keep": 0.5}
    generate(model, rows, visual, first)
    chosen = model.last_pruning_traces[0].kept_positions
    left = ~visual
    left[chosen] = True
    last = make_config(model, rows[left], visual[left], ["shallow", "middle", "deep"])
    alone = generate(model, rows[left], visual[left], last)
    expected = model.last_pruning_traces[0]
    chained = generate(model, rows, visual, {"method": "chain", "steps": [first, last]})
    (trace,) = model.last_pruning_traces
    assert_same(chained, alone)
    assert trace.decisions[0].positions.tolist() == chosen and len(trace.decisions) > 1
    assert trace.kept_positions == left.nonzero()[:, 0][expected.kept_positions].tolist()
    assert trace.rows_per_layer == expected.rows_per_layer
    assert trace.smallest_cosine == pytest.approx(expected.smallest_cosine, abs=1e-5)


def test_rows_numbered_anew_after_others_left_in_the_decoder() -> None:
    model, (rows, visual) = make_model(2), make_prompt("image in the middle")
    anew = {"method": "pyramiddrop", "layers": [3], "keep": [6]}
    kept = {"method": "fastv", "layer": 5, "keep": 4}
    # Decoded tokens follow the rows that were there when rows were last numbered, in every layer.
    output = generate(model, rows, visual, {"method": "chain", "steps": [anew, kept]})
    (trace,) = model.last_pruning_traces
    text = len(rows) - 24
    assert trace.rows_per_layer == [len(rows)] * 3 + [text + 6] * 2 + [text + 4] * 3
    gaps = [layer.gaps for layer in output.past_key_values.layers]
    assert gaps == [[0]] * 5 + [[2]] * 3


@pytest.mark.parametrize(("count", "side", "factor"), [(25, 5, 2), (36, 6, 3), (23, None, 2), (9, 3, 4)])
def test_pooled_rows_are_means_of_blocks(count, side, factor) -> None:
    model = make_model(2)
    rows = torch.randn(7 + count + 6, 64, generator=torch.Generator().manual_seed(3))
    visual = torch.zeros(len(rows), dtype=torch.bool)
    visual[7 : 7 + count] = True
    blocks = {}
    for row in range(count):
        name = row // factor**2 if side is None else (row // side // factor, row % side // factor)
        blocks.setdefault(name, []).append(7 + row)
    pooled = generate(model, rows, visual, {"method": "pool", "factor": factor})
    (trace,) = model.last_pruning_traces
    averaged = rows.clone()
    for members in blocks.values():
        averaged[members[0]] = rows[members].mean(0)
    assert trace.kept_positions == sorted(members[0] for members in blocks.values())
    assert trace.decisions[0].groups == {members[0]: members for members in blocks.values() if len(members) > 1}
    with masks_hide(model, [Hidden.from_trace(trace, len(rows), 8)]):
        assert_same(pooled, generate(model, averaged))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.first_layer <= 1])
def test_every_family_pools_image_by_image(name) -> None:
    model, inputs = family_model(name), FAMILIES[name].inputs((4, "image", 3, "image", 5), (5, "image", 6), (9,))
    with prune(model, {"method": "pool", "factor": 2}) as run:
        model.generate(**inputs, max_new_tokens=2, **GREEDY)
    for trace in run.traces:
        assert len(trace.rows_per_layer) == LAYERS and len(set(trace.rows_per_layer)) == 1
        members = {first: rows for decision in trace.decisions for first, rows in decision.groups.items()}
        pooled = sum(map(len, members.values())) - len(members)
        assert trace.rows_per_layer[0] == trace.num_rows - pooled
        for first, last in [(rows[0], rows[-1]) for rows in members.values()]:
            assert any(begin <= first <= last < end for begin, end in trace.image_spans)


def test_strides_lie_evenly_in_both_directions() -> None:
    lines, columns = np.divmod(evenly(64, 576), 24)
    assert np.unique(lines).tolist() == np.unique(columns).tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
    for side in (1, 2, 5, 8):
        for count in range(side**2 + 1):
            kept = evenly(count, side**2)
            assert len(kept) == count == len(set(kept)) and sorted(kept) == list(kept)
            a_line = np.bincount(kept // side, minlength=side)
            assert count == 0 or np.ptp(a_line[a_line > 0]) <= 1
    assert evenly(3, 12).tolist() == [2, 6, 10]  # no square


def test_equal_rows_are_not_chosen_twice() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(5, 12, generator=generator)[torch.arange(20) % 5]
    _, order = farthest_first(rows, 10)
    assert order.isfinite().sum() == 10 and sorted(order[:5].tolist()) == [0, 1, 2, 3, 4]
    relevance = torch.rand(20, generator=generator)
    order = greedy_map(rows, relevance, 10)
    chosen = order.argsort()[:10]
    assert order.isfinite().sum() == 10 and len({int(row) % 5 for row in chosen[:5]}) == 5
    # Behind the rank of the kernel: what matters most.
    others = [row for row in relevance.argsort(descending=True).tolist() if order[row] > 4]
    assert chosen[5:].tolist() == others[:5]
    for count in (0, 1):
        assert (
            farthest_first(rows[:1], count)[1].isfinite().sum()
            == count
            == greedy_map(rows[:1], relevance[:1], count).isfinite().sum()
        )


class Transfers(TorchDispatchMode):
    """Counts operators that make the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("choose", [farthest_first, lambda rows, count: greedy_map(rows, rows[:, 0].abs(), count)])
def test_greedy_choices_stay_on_the_device(choose) -> None:
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(6))
    with Transfers() as transfers:
        choose(rows, 12)
    assert transfers.count == 0


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.first_layer <= 1])
def test_every_family_renumbered_equals_its_decoder_over_fewer_rows(name) -> None:
    model, inputs = family_model(name), FAMILIES[name].inputs((4, "image", 3, "image", 5))
    entering = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    if "mrope_section" in model.get_decoder().config.rope_parameters:  # lines and columns are no number in the row
        with pytest.raises(
            PruningConfigError, match=r"'divprune': rows cannot be numbered anew.*'positions' to 'keep'"
        ):
            prune(model, {"method": "divprune", "keep": 3}).__enter__()
        hook.remove()
        return
    with hook, prune(model, {"method": "divprune", "keep": 3}) as run:
        pruned = model.generate(**inputs, max_new_tokens=1, **GREEDY)
    (trace,) = run.traces
    left = np.setdiff1d(np.arange(trace.num_rows), np.setdiff1d(trace.visual_positions, trace.kept_positions))
    plain = model.get_decoder()(inputs_embeds=entering[0][:, left]).last_hidden_state[:, -1]
    torch.testing.assert_close(pruned.logits[0], model.lm_head(plain), atol=1e-4, rtol=0)
