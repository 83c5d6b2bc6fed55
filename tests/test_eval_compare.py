"""The comparison: its figures against the traces, the configs' own FLOPs and the answers it writes."""

import json

import pytest
from eval_helpers import PRUNING, read_lines, write_benchmark, write_model

from llava.eval import compare
from llava.eval.compare import main, spread
from llava.eval.traces import PruningSummary
from llava.utils import UserError


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    model, bench = write_model(folder / "m"), write_benchmark(folder / "b")
    everything = {"mode": ["middle"], "shallow_mid_layer": 1, "layer_threshold": 0.5, "tokens_threshold": 0.3}
    argv = ["--model-path", model, "--question-file", bench / "questions.jsonl", "--image-folder", bench / "images"]
    argv += ["--config", f"published={json.dumps(PRUNING)}", "--config", f"never={json.dumps(everything)}"]
    argv += ["--batch-size", 3, "--max_new_tokens", 6, "--device", "cpu", "-o", folder / "out"]
    assert main([str(part) for part in argv]) == 0
    return folder / "out", argv


def _runs(folder):
    report = json.loads((folder / "report.json").read_text())
    return report, report["benchmarks"]["questions"]["runs"]


def test_the_report_says_what_its_figures_depend_on(compared):
    about = _runs(compared[0])[0]["about"]
    keys = {"model", "device", "dtype", "hardware", "batch_size", "seed", "torch", "transformers", "python", "command"}
    assert keys <= about.keys() and all(about[key] not in (None, "") for key in keys)


def test_agreement_is_the_share_of_equal_answers(compared):
    folder, _ = compared
    _, runs = _runs(folder)
    texts = {way: [a["text"] for a in read_lines(folder / "questions" / way / "answers.jsonl")] for way in runs}
    for way, run in runs.items():
        equal = sum(a == b for a, b in zip(texts[way], texts["dense"], strict=True))
        assert run["agreement_with_dense"] == equal / 12


def test_a_threshold_that_never_fires_prunes_nothing_and_costs_only_the_probe(compared):
    _, runs = _runs(compared[0])
    never, dense = runs["never"], runs["dense"]
    assert never["agreement_with_dense"] == 1
    assert never["pruning"]["select_layer"] is None and never["pruning"]["kept"] == 4
    assert never["kv_bytes_after_prefill"] == dense["kv_bytes_after_prefill"]
    assert never["flops_saved"]["paper"] == 0
    assert never["prefill_flops"]["executed"] >= dense["prefill_flops"]["executed"]


def test_what_was_saved_is_the_difference_to_dense(compared):
    _, runs = _runs(compared[0])
    pruned, dense = runs["published"], runs["dense"]
    assert dense["flops_saved"] == dict.fromkeys(dense["flops_saved"], 0)
    assert 0 < pruned["flops_saved"]["paper"] < 1
    assert pruned["prefill_flops"]["paper"] < dense["prefill_flops"]["paper"]
    assert pruned["kv_bytes_after_prefill"] < dense["kv_bytes_after_prefill"]
    histogram = pruned["pruning"]["select_histogram"]
    assert sum(histogram.values()) == pruned["pruning"]["questions"] == 11  # one question has no image
    layers = [int(layer) for layer, count in histogram.items() if layer != "none" for _ in range(count)]
    assert pruned["pruning"]["select_layer"] == pytest.approx(sum(layers) / len(layers))


def test_dense_kv_bytes_by_hand(compared):
    """Rows of the prompt times layers, keys and values, two KV heads of six numbers, four bytes."""
    import types

    import torch

    config = types.SimpleNamespace(num_key_value_heads=2, head_dim=6)
    assert compare.kv_bytes([10, 10, 4], config, torch.float32) == 24 * 2 * 2 * 6 * 4


def test_clock_figures_are_there_for_every_run(compared):
    for run in _runs(compared[0])[1].values():
        assert 0 < run["time_to_first_token_s"]["median"] <= run["time_to_first_token_s"]["p90"]
        assert run["decode_tokens_per_s"]["median"] > 0 and run["questions_per_s"] > 0


def test_table_and_plot(compared):
    folder, _ = compared
    table = (folder / "report.md").read_text()
    assert "|  | dense | published | never |" in table
    assert "| visual tokens kept | – | " in table and "questions by selecting layer" in table
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_an_older_report_is_moved_aside(compared):
    folder, argv = compared
    old = (folder / "report.json").read_bytes()
    assert main([str(part) for part in (*argv, "--limit", 2)]) == 0
    (backup,) = folder.glob("report.json.bak-*")
    assert backup.read_bytes() == old


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("-o", "x"), "--benchmark or --question-file"),
        (("-o", "x", "--question-file", "q"), "--image-folder"),
        (("-o", "x", "--benchmark", "gqa", "--limit", "0"), "--limit is 0"),
    ],
)
def test_bad_arguments(flags, named):
    with pytest.raises(UserError, match=named):
        main(list(flags))


@pytest.mark.parametrize("given", ["noname", "=x", "dense={}", "a={"])
def test_bad_configs(given, compared):
    argv = [str(part) for part in compared[1]]
    with pytest.raises(UserError):
        main([*argv, "--config", given])


def test_spread():
    assert spread([]) == {"median": None, "p90": None}
    assert spread([2.0]) == {"median": 2.0, "p90": 2.0}
    assert spread([float(i) for i in range(11)]) == {"median": 5.0, "p90": 9.0}


def test_summary_leaves_out_questions_without_an_image():
    saved = {"paper": 0.5, "fastv": 0.5, "prompt": 0.4, "executed": 0.4}
    nothing = dict.fromkeys(saved, 0.0)
    records = [
        {"visual_tokens": 10, "kept": 2, "select_layer": 3, "exit_layer": 6, "flops_saved": saved},
        {"visual_tokens": 10, "kept": 10, "select_layer": None, "exit_layer": None, "flops_saved": nothing},
        {"visual_tokens": 0, "kept": 0, "select_layer": None, "exit_layer": None, "flops_saved": nothing},
    ]
    summary = PruningSummary.of(records)
    assert (summary.questions, summary.kept, summary.select_layer, summary.exit_layer) == (2, 6, 3, 6)
    assert summary.select_histogram == {"3": 1, "none": 1}
    assert summary.flops_saved["paper"] == 0.25
