"""The benchmarks compare what they say they compare, and leave behind what they say."""

import json
from functools import partialmethod

import pytest
import torch

from benchmarks import all as every
from benchmarks import decode, layers, memory, prefill, probe, throughput
from benchmarks import methods as methods_at_a_budget
from benchmarks.hardware import Machine, prefill_roofline
from benchmarks.shapes import SHAPES, Prompts, Schedule, build_decoder, twin
from benchmarks.timing import Timings, interleave
from benchmarks.variants import CEILING, DENSE, EAGER, OURS_DENSE, PRUNED, cache_bytes, make_variants, run_layers
from llava.pruning import PruningConfigError, PruningTrace, methods
from llava.pruning.flops import DecoderShape, dense_trace, executed_flops
from llava.utils import UserError

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]
SMALL = ["--shape", "tiny", "--device", "cpu", "--visual", "24", "--prefix", "3", "--text", "6", "--warmup", "1"]


@pytest.fixture(scope="module")
def model():
    return build_decoder(TINY, CPU, torch.float32)


def test_pruned_computes_what_the_published_way_computes(model):
    # Eager attention, masks after the softmax and shares formed one by one share no code with the engine.
    prompts = Prompts.make([(5, 60, 9)], TINY.hidden, CPU, torch.float32)
    variants = make_variants(model, [TINY.schedule])
    pruned, published = (variants[name].prefill(prompts) for name in (PRUNED, EAGER))
    lengths = [[layer.keys.shape[2] for layer in output.past_key_values.layers] for output in (pruned, published)]
    assert lengths[0] == lengths[1] == TINY.schedule.rows_per_layer(74, 60, 8)
    torch.testing.assert_close(pruned.logits, published.logits, atol=1e-5, rtol=1e-5)
    dense = variants[DENSE].prefill(prompts)
    assert (dense.logits - pruned.logits).abs().max() > 1e-4
    assert torch.equal(variants[OURS_DENSE].prefill(prompts).logits, dense.logits)
    assert torch.equal(variants[PRUNED].generate(prompts, 4), variants[EAGER].generate(prompts, 4))


def test_kernel_ceiling_at_full_rows_is_the_dense_model(model):
    prompts = Prompts.make([(5, 60, 9)], TINY.hidden, CPU, torch.float32)
    dense = make_variants(model, [TINY.schedule])[DENSE].prefill(prompts)
    assert torch.equal(run_layers(model, prompts, [74] * 8), dense.logits)


def test_variants_share_weights_and_nothing_else(model):
    other = twin(model)
    assert {weight.data_ptr() for weight in other.parameters()} == {weight.data_ptr() for weight in model.parameters()}
    other.config._attn_implementation = "eager"
    assert model.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert other.model.layers[0].self_attn.config is other.config


def test_ragged_prompts_are_left_padded_and_can_be_taken_alone():
    prompts = Prompts.make([(2, 4, 3), (1, 2, 2)], 8, CPU, torch.float32)
    assert prompts.attention_mask.tolist() == [[1] * 9, [0] * 4 + [1] * 5]
    assert prompts.visual[1].nonzero()[:, 0].tolist() == [5, 6]
    alone = prompts.alone(1)
    assert alone.attention_mask is None and alone.visual.tolist() == [[False, True, True, False, False]]
    assert torch.equal(alone.embeds, prompts.embeds[1:, 4:])


@pytest.mark.parametrize("layers", [(-1, 3, 5), (3, 3, 5), (2, 6, 5), (2, 3, 9)])
def test_a_forced_schedule_out_of_order_is_refused(layers):
    shallow, select, leave = layers
    with pytest.raises(PruningConfigError, match=r"must ascend|'(shallow_mid|exit)_layer' is"):
        methods.Schedule(shallow, select, 5, leave).validate_for(8)


def test_ratios_are_medians_of_pairs():
    timings = Timings({"a": [1.0, 10.0, 3.0], "b": [2.0, 5.0, 6.0]}, {"a": [1.0] * 3, "b": [4.0] * 3})
    assert timings.ratio("a", "b") == 0.5  # pairs 0.5, 2 and 0.5; the ratio of medians would be 0.6
    assert timings.ratio("a", "b", "cpu") == 0.25
    assert timings.summary("a")["median_ms"] == 3000


def test_runs_take_turns_in_rotating_order():
    order = []
    timings = interleave({name: lambda name=name: order.append(name) for name in "abc"}, CPU, repetitions=2, warmup=1)
    assert "".join(order) == "abcbcacab"
    assert [len(timings.wall[name]) for name in "abc"] == [2, 2, 2]


def test_roofline_is_arithmetic_or_bandwidth():
    shape = DecoderShape(4, 64, 128, 4, 16, 100, 4 * 64 * 64 + 3 * 64 * 128, 2 * 64 * 64)
    trace = dense_trace(PruningTrace(50, list(range(5, 40))), shape)
    busy = prefill_roofline([trace], shape, torch.float32, Machine(flops=1e9, bandwidth=1e30))
    assert busy == pytest.approx(executed_flops(trace, shape) / 1e9)
    starved = prefill_roofline([trace], shape, torch.float32, Machine(flops=1e30, bandwidth=1e6))
    assert starved == pytest.approx(4 * (4 * shape.linear_weights + 4 * 4 * 50 * 64 + 64 * 100) / 1e6)


def test_cache_bytes_count_what_is_held(model):
    prompts = Prompts.make([(5, 60, 9)], TINY.hidden, CPU, torch.float32)
    cache = make_variants(model, [TINY.schedule])[PRUNED].prefill(prompts).past_key_values
    rows = sum(Schedule.rows_per_layer(TINY.schedule, 74, 60, 8))
    assert cache_bytes(cache) == 2 * 4 * rows * TINY.kv_heads * TINY.hidden // TINY.heads


RUNS = {
    "prefill": (prefill, ["--repetitions", "2"]),
    "decode": (decode, ["--tokens", "4"]),
    "throughput": (throughput, ["--repetitions", "2", "--batch", "3", "--tokens", "3"]),
    "memory": (memory, []),
    "probe": (probe, []),
    "layers": (layers, ["--repetitions", "2"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_benchmark_prints_and_writes_its_figures(name, tmp_path, capsys, monkeypatch):
    benchmark, own = RUNS[name]
    # What torch's compiler writes in C++ is torch's; the `eager` backend needs no compiler and half a minute less.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    benchmark.main([*SMALL, *own, "--output", str(tmp_path)])
    assert "random weights" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith(f"{name}_tiny_cpu_float32")
    content = json.loads(path.read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert content["settings"]["visual"] == 24
    facts, tables = content["facts"], content["tables"]
    if name == "prefill":
        assert facts["rows per layer"] == [33] * 4 + [19] * 2 + [9] * 2
        assert facts["ideal speed-up (executed FLOPs)"] == pytest.approx(facts["TFLOP dense"] / facts["TFLOP pruned"])
        assert {DENSE, OURS_DENSE, PRUNED, EAGER, CEILING} <= {row["variant"] for row in tables["prefill"]}
        assert len(content["seconds"]["prefill"]["wall"][PRUNED]) == 2
    if name == "decode":
        assert facts["ideal speed-up (bytes read)"] > 1
        assert len(content["seconds"]["per token"]["wall"][DENSE]) == 3
    if name == "throughput":
        assert facts["rows through linear layers"] == facts["rows, prompts alone"] < facts["rows, padded dense"]
        assert facts["answers equal to those alone"] == "3 of 3"
    if name == "memory":
        assert facts["KV_MB_after_prefill, pruned / dense"] == pytest.approx((33 * 4 + 19 * 2 + 9 * 2) / (33 * 8))
    if name == "layers":
        assert list(tables) == ["4 layers, 19 rows", "4 layers, 9 rows", "4 layers, 1 rows"]
        assert all({layers.EAGER, layers.COMPILED} <= {row["variant"] for row in table} for table in tables.values())
    if name == "probe":
        assert facts["probes in a prefill"] == 3
        assert 0 < facts["probe's share of the prefill's operator time"] < 1


def test_methods_are_compared_at_one_budget_and_their_choice_is_timed(tmp_path, capsys) -> None:
    own = ["--visual", "25", "--tokens", "12", "--repetitions", "2", "--output", str(tmp_path)]
    methods_at_a_budget.main([*SMALL, *own])
    assert "random weights" in capsys.readouterr().out
    content = json.loads((tmp_path / "methods_tiny_cpu_float32_b1_v25.json").read_text())
    facts = content["facts"]
    assert set(facts["left out (12 visual tokens a layer)"]) >= {"shortv", "chain", "schedule"}
    (rows,) = content["tables"].values()
    dense, *table = rows
    assert dense["method"] == DENSE and dense["dense / this"] == 1
    by_name = {row["method"]: row for row in table}
    assert by_name.keys() == set(facts["knobs (12 visual tokens a layer)"])
    assert by_name.keys() >= {"fastv", "sparsevlm", "visionzip", "scope", "divprune", methods_at_a_budget.FORCED}
    coarse = {"pool": 4, "vtw": 2, "yopo": 2}
    for name, row in by_name.items():
        assert abs(row["tokens a layer"] - 12) <= coarse.get(name, 1), name
        assert row["by FLOPs"] > 1 and row["ms"] > 0 and row["ceiling / this"] > 0
        assert 0 < row["choosing, % of this"] < 100
    assert by_name["scope"]["tower signals, ms"] > 0 and by_name["visionzip"]["merge, ms"] > 0
    assert by_name["divprune"]["tower signals, ms"] == by_name["divprune"]["merge, ms"] == 0
    assert by_name["divprune"]["measure, ms"] > by_name["random"]["measure, ms"]


def test_nested_sections_are_timed_for_the_inner_one() -> None:
    sections = methods_at_a_budget.Sections(CPU)
    inner = sections.timed("tower signals", lambda: sum(range(200_000)))
    with sections.section("measure"):
        inner()
    spent = sections.seconds(sections.take(), "cpu")
    assert 0 <= spent["measure"] < spent["tower signals"] and spent["decide"] == 0
    assert sections.take() == []


@pytest.mark.parametrize("tokens", [40, 8])
def test_forced_decisions_meet_the_budget(tokens) -> None:
    budget = methods_at_a_budget.Budget(tokens, 60, 8)
    if tokens == 8:
        with pytest.raises(UserError, match="layers 0 and 1 hold all 60"):
            methods_at_a_budget.forced(budget, TINY.schedule)
    else:
        method = methods_at_a_budget.forced(budget, TINY.schedule)
        assert abs(budget.mean([method.select_layer + 1], [method.keep]) - tokens) <= 0.5
    first, last = methods_at_a_budget.chained(methods_at_a_budget.Budget(20, 60, 8), TINY.schedule).steps
    assert abs(first.keep * (last.select_layer + 1) + last.keep * (last.exit_layer - last.select_layer - 1) - 160) <= 2


def test_layers_alone_compute_what_the_decoder_computes(model):
    hidden = torch.randn(1, 7, TINY.hidden)
    given = (hidden, *model.model.rotary_emb(hidden, position_ids=torch.arange(7)[None]))
    reference = model(inputs_embeds=hidden, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(model.model.norm(layers.Layers(model.model)(*given)), reference, atol=1e-5)


def test_the_published_schedule_shapes_fit_their_models():
    for shape in SHAPES.values():
        rows = shape.schedule.rows_per_layer(651, 576, shape.layers)
        assert len(rows) == shape.layers and rows[0] == 651 and rows[-1] == 75


def test_all_hands_shared_arguments_on_and_goes_on_after_running_out_of_memory(monkeypatch):
    runs = []

    def short_of_memory(argv):
        runs.append(argv)
        if "2304" in argv:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(every.gc, "collect", lambda: None)  # seconds in a process as large as this
    for benchmark in (prefill, decode, throughput, methods_at_a_budget, probe, layers):
        monkeypatch.setattr(benchmark, "main", runs.append)
    monkeypatch.setattr(memory, "main", short_of_memory)
    with pytest.raises(SystemExit, match="2304: tried to allocate 2 GiB"):
        every.main(["--shape", "7b", "--batches", "1", "8", "--device", "cpu", "--visual", "576"])
    assert all(argv[:4] == ["--shape", "7b", "--device", "cpu"] for argv in runs)
    assert [argv[4:] for argv in runs[:4]] == [
        ["--batch", "1"],
        ["--batch", "8"],
        ["--visual", "1152", "--no-tower"],
        ["--visual", "2928", "--no-tower"],
    ]
    assert runs[-1][4:] == []


def test_a_missing_device_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: --device cuda: this torch sees no CUDA device"):
        memory.main(["--device", "cuda"])
