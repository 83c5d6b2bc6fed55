"""The CUDA path for packed batches, with a plain implementation of torch's `varlen_attn` in its place."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.shapes import Prompts, Schedule
from benchmarks.variants import PRUNED, make_variants
from llava.pruning import varlen

CPU = torch.device("cpu")


def plain_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """torch 2.13's contract, sample by sample: `[rows, heads, head_dim]`, int32 offsets, log-sum-exp [heads, rows]."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert window_size in ((-1, -1), (-1, 0)) and block_table is None
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert all(part.stride(-1) == 1 for part in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    output, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for sample in range(len(cu_seq_q) - 1):
        rows = slice(cu_seq_q[sample], cu_seq_q[sample + 1])
        start, stop = int(cu_seq_k[sample]), int(cu_seq_k[sample + 1])
        if seqused_k is not None:
            assert seqused_k.dtype == torch.int32
            stop = start + int(seqused_k[sample])
        assert rows.stop - rows.start <= max_q and stop - start <= max_k
        own_keys, own_values = (part[start:stop].repeat_interleave(groups, dim=1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[rows], own_keys) * scale
        if window_size == (-1, 0):
            ahead = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
            scores = scores.masked_fill(ahead, -torch.inf)
        output[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), own_values)
        lse[:, rows] = scores.logsumexp(-1)
    return (output, lse) if return_aux is not None and return_aux.lse else output


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Turns the path on, on the CPU; holds the number of samples of every call."""
    seen: list[int] = []

    def counted(query, key, value, cu_seq_q, *args, **kwargs):
        seen.append(len(cu_seq_q) - 1)
        return plain_varlen_attn(query, key, value, cu_seq_q, *args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(varlen, "is_usable", lambda query: True)
    return seen


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_kernel_gives_what_the_loop_over_samples_gives(calls, monkeypatch, kv_heads):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=100,
    )
    model = LlamaForCausalLM(config).eval()
    schedules = [Schedule(2, 4, 5, 6), Schedule(2, 3, 0, 7), Schedule(2, 5, 3, 8)]
    variant = make_variants(model, schedules)[PRUNED]
    prompts = Prompts.make([(3, 20, 5), (4, 31, 16), (1, 10, 9)], 32, CPU, torch.float32)

    def run() -> tuple[list[int], torch.Tensor, torch.Tensor]:
        with variant.block(prompts) as block, torch.no_grad():
            output = variant.forward(prompts)
            step = variant.model(
                input_ids=torch.ones(3, 1, dtype=torch.long), past_key_values=output.past_key_values, use_cache=True
            )
        return [trace.rows_per_layer for trace in block.traces], output.logits, step.logits

    rows, logits, next_logits = run()
    # Layers 2 to 7 of the prefill and all 8 of the step take every sample at once.
    assert calls.count(3) == 6 + 8
    monkeypatch.setattr(varlen, "is_usable", lambda query: False)
    calls.clear()
    expected_rows, expected, expected_next = run()
    assert calls == []
    assert rows == expected_rows
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(next_logits, expected_next, atol=1e-5, rtol=1e-5)


def test_the_check_on_first_use_accepts_the_contract_and_rejects_others(monkeypatch):
    check = varlen._agrees_with_sdpa.__wrapped__
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen_attn)
    assert check(CPU, torch.float32, 16)

    def rows_first_lse(*args, **kwargs):
        result = plain_varlen_attn(*args, **kwargs)
        return (result[0], result[1].T) if isinstance(result, tuple) else result

    def not_causal(*args, **kwargs):
        return plain_varlen_attn(*args, **kwargs | {"window_size": (-1, -1)})

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None):
        return query

    def unsupported(*args, **kwargs):
        raise RuntimeError("no kernel image is available for execution on the device")

    for broken in (rows_first_lse, not_causal, older, unsupported):
        monkeypatch.setattr(varlen, "varlen_attn", broken)
        assert not check(CPU, torch.float32, 16)


def test_not_used_on_a_cpu_or_in_float32():
    assert not varlen.is_usable(torch.zeros(4, 3, 16, dtype=torch.bfloat16))
