"""Attention by parts against attention weights that are formed, softmaxed and then edited."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from naive import shallow_edit

from llava.pruning import Read, Treatment, attention
from llava.pruning.attention import Tally, attend_behind, attend_prompt, attend_with_lse, score_lse
from llava.pruning.rows import Rows
from llava.pruning.shares import measure_largest_shares, measure_visual_shares

HEADS, DIM, SCALE = 6, 16, 0.25
MASKS = {
    "one image": "ttvvvvvvttt",
    "image first": "vvvvvvtt",
    "two images": "tvvvvttvvvvvt",
    "images side by side, then one more": "ttvvvvttttvt",
    "single visual row": "tvt",
}


@pytest.fixture(params=["fused", "portable", "portable in small chunks"], autouse=True)
def lse_path(request, monkeypatch):
    """The log-sum-exp comes from the CPU's kernel, or is computed from scores as on every other device."""
    if request.param != "fused":
        monkeypatch.setattr(attention, "FUSED_LSE_DEVICES", ())
    if request.param == "portable in small chunks":
        monkeypatch.setattr(attention, "SCORE_CHUNK", 50)


@pytest.fixture(params=[6, 2], ids=["MHA", "GQA"])
def qkv(request):
    def make(rows: int, dtype=torch.float64):
        generator = torch.Generator().manual_seed(rows)
        shapes = (HEADS, request.param, request.param)
        return [torch.randn(heads, rows, DIM, generator=generator, dtype=torch.float64).to(dtype) for heads in shapes]

    return make


def weights_of(query, keys, causal=True):
    keys = keys.repeat_interleave(HEADS // len(keys), 0)
    scores = query @ keys.transpose(1, 2) * SCALE
    if causal:
        offset = keys.shape[1] - query.shape[1]
        scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(offset), -torch.inf)
    return scores


def rows_of(mask: str, drafts: int = 0) -> Rows:
    return Rows.of_prompt(np.array([letter == "v" for letter in mask + "t" * drafts]), drafts)


@pytest.mark.parametrize("causal", [True, False])
def test_log_sum_exps_are_those_of_the_scores(qkv, causal) -> None:
    query, keys, values = qkv(37)
    scores = weights_of(query, keys, causal)
    output, lse = attend_with_lse(query, keys, values, SCALE, causal=causal, tally=Tally())
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(score_lse(query, keys, SCALE, causal=causal, tally=Tally()), scores.logsumexp(-1))
    torch.testing.assert_close(output, scores.softmax(-1) @ values.repeat_interleave(HEADS // len(values), 0))


@pytest.mark.parametrize("last", [1, 5, 20])
def test_the_last_rows_see_all_earlier_keys_and_themselves(qkv, last) -> None:
    query, keys, values = qkv(20)
    output = attend_behind(query[:, -last:], keys, values, SCALE, Tally())
    weights = weights_of(query[:, -last:], keys).softmax(-1)
    torch.testing.assert_close(output, weights @ values.repeat_interleave(HEADS // len(values), 0))


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize(
    ("reading", "rule"),
    [(Read.NO_IMAGE, "none"), (Read.FIRST_SINK, "first"), (Read.HALF_SINK, "half")],
)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_shallow_reading_equals_weights_zeroed_after_the_softmax(qkv, mask, reading, rule, drafts) -> None:
    rows = rows_of(mask, drafts)
    query, keys, values = qkv(rows.count)
    visual = torch.zeros(rows.count, dtype=torch.bool)
    visual[rows.visual] = True
    weights = shallow_edit(weights_of(query, keys).softmax(-1), visual, rows.num_prompt, rule)
    expected = weights @ values.repeat_interleave(HEADS // len(values), 0)
    output = attend_prompt(query, keys, values, SCALE, rows, Treatment(reading), Tally())
    torch.testing.assert_close(output, expected)


def test_no_image_reads_no_value_of_the_image_for_text(qkv) -> None:
    rows = rows_of("ttvvvvttt")
    query, keys, values = qkv(rows.count)
    poisoned = values.clone()
    poisoned[:, 2:6] = torch.nan
    output = attend_prompt(query, keys, poisoned, SCALE, rows, Treatment(Read.NO_IMAGE), Tally())
    assert not output[:, [0, 1, 6, 7, 8]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_the_probe_equals_shares_taken_one_by_one(qkv, mask, dtype) -> None:
    rows = rows_of(mask)
    query, keys, values = qkv(rows.count, dtype)
    expanded = values.repeat_interleave(HEADS // len(values), 0).float()
    weights = weights_of(query[:, -1:].float(), keys.float()).softmax(-1)
    output = (weights @ expanded)[:, 0]
    visual = torch.as_tensor(rows.visual)
    shares = (weights[:, 0, visual, None] * expanded[:, visual]).transpose(0, 1).flatten(1)
    probe = measure_visual_shares(query[:, -1], keys, values, output.to(dtype), rows.visual_index(query.device), SCALE)
    # The output is what attention gave in the model's dtype; everything else is float32.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    cosine = torch.cosine_similarity(output.flatten() - shares, output.flatten()[None], dim=-1)
    torch.testing.assert_close(1 - probe.cosine, 1 - cosine, atol=1e-6, rtol=tolerance)
    torch.testing.assert_close(probe.norm, shares.norm(dim=-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(probe.attention, weights[:, 0, visual].mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("most", [1, 2**24], ids=["row by row", "at once"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_of_several_rows_each_measure_takes_the_row_to_which_a_token_matters_most(qkv, mask, most, monkeypatch) -> None:
    monkeypatch.setattr("llava.pruning.shares.MOST_SCORES", most)
    rows = rows_of(mask)
    query, keys, values = qkv(rows.count)
    expanded = values.repeat_interleave(HEADS // len(values), 0)
    output = weights_of(query, keys).softmax(-1) @ expanded
    asking = torch.as_tensor([row for row in rows.text if row > rows.visual[0]])
    visual = rows.visual_index(query.device)
    alone = []
    for row in asking.tolist():
        ahead = torch.as_tensor([place for place in rows.visual if place < row])
        upto = slice(0, row + 1)
        own = measure_visual_shares(query[:, row], keys[:, upto], values[:, upto], output[:, row], ahead, SCALE)
        unseen = len(rows.visual) - len(ahead)
        alone.append(
            [torch.nn.functional.pad(part, (0, unseen), value=0 if n else torch.inf) for n, part in enumerate(own)]
        )
    probe = measure_largest_shares(query[:, asking], keys, values, output[:, asking], visual, SCALE, asking)
    for measured, rows_alone, largest in zip(
        probe, zip(*alone, strict=True), (torch.amin, *[torch.amax] * 3), strict=True
    ):
        torch.testing.assert_close(measured, largest(torch.stack(rows_alone), 0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(probe.part.isfinite(), torch.ones(len(rows.visual), dtype=torch.bool))


def test_dropping_rows_keeps_order_positions_and_runs() -> None:
    rows = rows_of("ttvvvtvvt", drafts=2)
    left, survivors = rows.keeping(np.array([0, 2, 4]))
    assert survivors.tolist() == [0, 1, 2, 4, 5, 7, 8, 9, 10]
    assert left.visual.tolist() == [2, 3, 5]
    assert left.positions.tolist() == [2, 4, 7]
    assert left.runs == [(2, 4), (5, 6)]
    assert left.text.tolist() == [0, 1, 4, 6]
    assert (left.count, left.num_prompt) == (9, 7)
