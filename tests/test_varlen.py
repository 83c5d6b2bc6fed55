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


def test_not_used_on_a_cpu_or_in_float32():
    assert not varlen.is_usable(torch.zeros(4, 3, 16, dtype=torch.bfloat16))


def test_a_torch_without_the_keywords_is_not_used(monkeypatch):
    query = torch.zeros(1, 1, 8, device="meta")
    assert not varlen.is_usable(query) and not varlen.is_usable(torch.zeros(1, 1, 8))
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: None)
    varlen._is_there.cache_clear()
    assert not varlen._is_there()
    varlen._is_there.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's kernel runs on CUDA")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_kernel_agrees_with_ordinary_attention(dtype, head_dim):
    device, scale = torch.device("cuda"), head_dim**-0.5
    torch.manual_seed(0)
    query, keys, values = (torch.randn(heads, 14, head_dim, device=device).to(dtype) for heads in (4, 2, 2))
    newest = torch.randn(2, 4, 1, head_dim, device=device).to(dtype)
    if not varlen.is_usable(query):
        pytest.skip("this torch or GPU goes the other way")

    def expected(rows, start, stop, causal):
        own, read = (part[None, :, start:stop].repeat_interleave(2, dim=1).float() for part in (keys, values))
        scored = torch.nn.functional.scaled_dot_product_attention
        return scored(rows[None].float(), own, read, is_causal=causal, scale=scale)[0].to(dtype)

    def close(got, want):
        torch.testing.assert_close(got, want, atol=0.02, rtol=0)

    segments = varlen.Segments.of([5, 9], device)
    packed = varlen.attend_packed(query, keys, values, segments, scale)
    close(packed[:, :5], expected(query[:, :5], 0, 5, True))
    close(packed[:, 5:], expected(query[:, 5:], 5, 14, True))
    single, lse = varlen.attend_with_lse(query[:, :5], keys[:, :5], values[:, :5], scale, causal=True)
    close(single, expected(query[:, :5], 0, 5, True))
    scores = query[:, :5].float() @ keys[:, :5].repeat_interleave(2, dim=0).float().transpose(1, 2) * scale
    close(lse, scores.masked_fill(torch.ones(5, 5, dtype=torch.bool, device=device).triu(1), -torch.inf).logsumexp(-1))
    lengths = varlen.to_device([4, 7], torch.int32, device)
    last = varlen.attend_last(newest, keys, values, varlen.Segments(segments.offsets, 7), lengths, scale)
    close(last[0].transpose(0, 1), expected(newest[0], 0, 4, False))
    close(last[1].transpose(0, 1), expected(newest[1], 5, 12, False))
