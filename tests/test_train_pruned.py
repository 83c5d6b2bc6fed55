"""Training with pruning on: rows that left cost nothing, and what is left learns as if they had been masked."""

from __future__ import annotations

import pytest
import torch
from naive import heads_of, shallow_edit
from torch.nn import functional as F

from llava.constants import IGNORE_INDEX
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.pruning import Method, Read, UnsupportedCallError

HIDDEN, LAYERS = 32, 6
LENGTHS = {"one image": (3, 12, 5), "two images": (2, 6, 3, 6, 4)}  # text and image take turns
CONFIGS = {
    "random": {"method": "random", "keep": 4, "layer": 2},
    "random before the decoder": {"method": "random", "keep": 4, "layer": 0},
    "stride": {"method": "stride", "keep": 4, "layer": 0},
    "fastv": {"method": "fastv", "keep": 4, "layer": 2},
    "vtw": {"method": "vtw", "layer": 3},
    "divprune": {"method": "divprune", "keep": 4, "positions": "keep"},
    "divprune, renumbered": {"method": "divprune", "keep": 4},
    "shortv": {"method": "shortv", "frozen_layers": [1, 3]},
    "pyramiddrop": {"method": "pyramiddrop", "layers": [2, 4], "keep": [0.5, 0.25], "positions": "keep"},
    "chain": {
        "method": "chain",
        "steps": [{"method": "random", "keep": 4, "layer": 0}, {"method": "fastv", "keep": 2, "layer": 3}],
    },
    "middle": {"mode": ["middle"], "shallow_mid_layer": 1, "layer_threshold": 0.9999, "tokens_threshold": 0.3},
    "shallow": {"mode": ["shallow"], "shallow_mid_layer": 3, "shallow_sink": "first"},
    "shallow, half": {"mode": ["shallow"], "shallow_mid_layer": 3, "shallow_sink": "half"},
    "deep": {"mode": ["deep"], "mid_deep_layer": 3},
    "shallow and deep": {
        "mode": ["shallow", "deep"],
        "shallow_mid_layer": 2,
        "mid_deep_layer": 4,
        "shallow_sink": "first",
    },
}


def make_model(seed: int = 0) -> LlavaLlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlavaConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=53,
        initializer_range=0.2,
        use_cache=False,
    )
    return LlavaLlamaForCausalLM(config).double().train()


def make_batch(seed: int = 1):
    """Both layouts, left-padded: rows, mask, which are visual (images numbered), labels on the last text."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(map(sum, LENGTHS.values()))
    rows = torch.zeros(len(LENGTHS), longest, HIDDEN, dtype=torch.float64)
    mask, visual = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
    labels = torch.full((2, longest), IGNORE_INDEX)
    for number, lengths in enumerate(LENGTHS.values()):
        pad = longest - sum(lengths)
        rows[number, pad:] = torch.randn(sum(lengths), HIDDEN, generator=generator, dtype=torch.float64)
        mask[number, pad:] = 1
        numbers = [torch.full((length,), (part + 1) // 2 if part % 2 else 0) for part, length in enumerate(lengths)]
        visual[number, pad:] = torch.cat(numbers)
        labels[number, -lengths[-1] + 1 :] = torch.randint(53, (lengths[-1] - 1,), generator=generator)
    return rows.requires_grad_(), mask, visual, labels


def masked_logits(model, rows, visual, trace, method):
    """One prompt at full length: every row in every layer, and those that left masked out. Nothing of the engine."""
    decoder = model.model
    present = torch.ones(LAYERS, len(rows), dtype=torch.bool)
    for decision in trace.decisions:
        present[decision.layer + 1 :, visual] = False
        present[decision.layer + 1 :, torch.from_numpy(decision.positions)] = True
    hidden = rows[None]
    causal = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
    treatments = method.treatments(LAYERS)
    for number, layer in enumerate(decoder.layers):
        before = hidden
        counted = present[number].long().cumsum(0) - 1 if method.renumbers else torch.arange(len(rows))
        cos, sin = decoder.rotary_emb(hidden, position_ids=counted.clamp(min=0)[None])
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = heads_of(attention, normed, cos, sin)
        scores = query[0] @ key.transpose(1, 2) * attention.scaling
        weights = torch.softmax(scores.masked_fill(~(causal & present[number]), -1e30), dim=-1)
        rule = {Read.NO_IMAGE: "none", Read.FIRST_SINK: "first", Read.HALF_SINK: "half"}.get(treatments[number].read)
        if rule:
            weights = shallow_edit(weights, visual, len(rows), rule)
        heads = weights @ value
        hidden = hidden + attention.o_proj(heads.transpose(0, 1).flatten(1)[None])
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if not treatments[number].update:
            hidden = torch.where(visual[:, None], before, hidden)
    return model.lm_head(decoder.norm(hidden[0]))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_loss_and_gradients_equal_those_of_a_masked_run_at_full_length(config) -> None:
    model = make_model()
    rows, mask, visual, labels = make_batch()
    loss = model(inputs_embeds=rows, attention_mask=mask, visual_mask=visual, labels=labels, pruning_config=config).loss
    traces = model.last_pruning_traces
    parameters = [*model.parameters(), rows]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)

    method = Method.from_any(config)
    losses = []
    for number, trace in enumerate(traces):
        start = rows.shape[1] - trace.num_rows
        logits = masked_logits(model, rows[number, start:], visual[number, start:] > 0, trace, method)
        losses.append(F.cross_entropy(logits[:-1], labels[number, start + 1 :], ignore_index=-100, reduction="sum"))
    wanted = sum(losses) / (labels != IGNORE_INDEX).sum()
    drops = config.get("mode") != ["shallow"] and config.get("method") != "shortv"
    assert all((trace.rows_per_layer[-1] < trace.num_rows) is drops for trace in traces)
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=0)  # the loss is taken in float32
    for own, masked in zip(gradients, torch.autograd.grad(wanted, parameters, allow_unused=True), strict=True):
        if own is None or masked is None:
            assert own is masked
        else:
            torch.testing.assert_close(own, masked, atol=1e-6, rtol=1e-5)


def test_prompts_without_a_picture_learn_as_without_pruning() -> None:
    model = make_model()
    ids = torch.randint(53, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])  # padded on the right, as batches to train on are
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    dense = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    pruned = model(input_ids=ids, attention_mask=mask, labels=labels, pruning_config=CONFIGS["fastv"]).loss
    torch.testing.assert_close(pruned, dense, atol=1e-6, rtol=0)


def test_gradient_checkpointing_is_refused() -> None:
    model = make_model()
    model.gradient_checkpointing_enable()
    rows, mask, visual, labels = make_batch()
    with pytest.raises(UnsupportedCallError, match="--gradient_checkpointing False"):
        model(inputs_embeds=rows, attention_mask=mask, visual_mask=visual, labels=labels, pruning_config=CONFIGS["vtw"])


def test_a_target_that_only_a_row_that_left_could_give_is_nobodys() -> None:
    model = make_model()
    rows, mask, visual, labels = make_batch()
    labels[0, -5] = 7  # of the first row behind the image
    config = CONFIGS["deep"]
    with_it = model(inputs_embeds=rows, attention_mask=mask, visual_mask=visual, labels=labels, pruning_config=config)
    labels[0, -5] = IGNORE_INDEX
    without = model(inputs_embeds=rows, attention_mask=mask, visual_mask=visual, labels=labels, pruning_config=config)
    assert with_it.loss == without.loss
