"""The comparison: its figures against the traces, the configs' own FLOPs and the answers it writes."""

import json
import types

import pytest
from eval_helpers import PRUNING, read_lines, write_benchmark, write_model

from llava.eval import compare, compare_page
from llava.eval.compare import main, spread
from llava.eval.traces import PruningSummary
from llava.inference import Clock
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


def test_the_page_stands_alone_and_names_its_conventions(compared):
    page = (compared[0] / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page and 'src="data:image/png' in page
    for words in ("tokens a layer", "FLOPs (executed)", "paired bootstrap", "seed 0", "Wilson", "vision tower in it"):
        assert words in page
    assert '<th scope="row">published</th>' in page and "shallow_mid_layer" in page
    conventions = compare_page.conventions(_runs(compared[0])[0])
    assert all(words in (compared[0] / "report.md").read_text() for words in conventions.values())


def test_conventions_of_the_benchmarks_scores_are_named(compared):
    report, runs = _runs(compared[0])
    for name, scores, words in (
        ("mme", {"score": 1.0, "cognition": None}, "Perception, of 2000 (the sum of acc and acc+"),
        ("textvqa", {"score": 1.0, "prompts": {"with OCR tokens": 3, "without OCR tokens": 0}}, "with OCR tokens: 3"),
    ):
        report["benchmarks"] = {name: {"runs": {"dense": {**runs["dense"], "scores": scores}}}}
        assert words in compare_page.conventions(report)["score"]


def test_the_front_is_what_no_run_beats_in_both():
    points = [(3.0, 9.0), (1.0, 2.0), (2.0, 2.0), (2.0, 5.0), (4.0, 8.0)]
    assert compare_page.pareto_front(points) == [(1.0, 2.0), (2.0, 5.0), (3.0, 9.0)]


def test_times_to_the_first_token_are_compared_batch_by_batch():
    def asked(seconds, answers=2):
        clocks = [Clock(answers, 4, second, 2 * second, second / 2) for second in seconds]
        return types.SimpleNamespace(answers=[types.SimpleNamespace(clock=clock) for clock in clocks for _ in "ab"])

    dense, pruned = asked([1.0, 10.0, 3.0]), asked([0.5, 4.0, 3.0])
    for clock in ("first_token", "first_token_processor"):
        assert compare.first_token_over_dense(pruned, dense, clock) == 0.5  # pairs 0.5, 0.4 and 1
    assert compare.first_token_over_dense(pruned, asked([1.0, 10.0, 3.0], 1), "first_token") is None


def test_differences_to_dense_come_with_intervals(tmp_path):
    argv = ["--benchmark", "mme", "--limit", 8, "--batch-size", 4, "--max_new_tokens", 2, "--device", "cpu"]
    argv += ["--config", 'gone={"method": "vtw", "layer": 1}', "-o", tmp_path / "out"]
    assert main([str(part) for part in argv]) == 0
    runs = json.loads((tmp_path / "out" / "report.json").read_text())["benchmarks"]["mme"]["runs"]
    assert runs["dense"]["score_difference"] == {"value": 0.0, "interval": [0.0, 0.0]}
    difference = runs["gone"]["score_difference"]
    assert difference["value"] == pytest.approx(runs["gone"]["scores"]["score"] - runs["dense"]["scores"]["score"])
    low, high = difference["interval"]
    assert low <= difference["value"] <= high and low < 0
    assert f"{difference['value']:+.2f} ({low:+.2f} to {high:+.2f})" in (tmp_path / "out" / "report.md").read_text()


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
