"""Methods at the same number of visual tokens a layer: what was asked for is what the traces say."""

import json

import pytest
from eval_helpers import read_lines, write_benchmark, write_model
from tiny_stock import write_stock

from llava.eval.budgets import RULES, Budget, method_for
from llava.eval.compare import interval_of, main
from llava.utils import UserError

COARSE = {"pool": 16, "vtw": 4, "yopo": 4}  # a whole factor, a whole layer: how far off they may be here
LAYERS, VISUAL = 8, 64


def _argv(model, bench, out, *more):
    argv = ["--model-path", model, "--question-file", bench / "questions.jsonl", "--image-folder", bench / "images"]
    argv += ["--batch-size", 4, "--max_new_tokens", 2, "--device", "cpu", "--num-workers", 0, "-o", out, *more]
    return [str(part) for part in argv]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("bench") / "b")


@pytest.fixture(scope="module")
def compared(tmp_path_factory, bench):
    folder = tmp_path_factory.mktemp("budgets")
    model = write_model(folder / "m", layers=LAYERS, patches_per_side=8)
    methods = [name for name in RULES if name not in ("random", "stride", "pool")]
    own = {"mode": ["deep"], "mid_deep_layer": 4}
    argv = ["--method", ",".join(methods), "--tokens", "32,16,10", "--config", f"own={json.dumps(own)}"]
    assert main(_argv(model, bench, folder / "out", *argv)) == 0
    return model, folder / "out"


def _result(folder):
    return json.loads((folder / "report.json").read_text())["benchmarks"]["questions"]


def test_measured_tokens_a_layer_are_those_asked_for(compared):
    result = _result(compared[1])
    assert not result["left_out"]
    assert set(result["runs"]) == {"dense", "own", *(f"{name}-{tokens}" for name in RULES for tokens in (32, 16, 10))}
    for way, run in result["runs"].items():
        budget = run["tokens_a_layer"]
        expected = {"dense": VISUAL, "own": VISUAL / 2}.get(way, budget["asked"])
        assert abs(budget["measured"] - expected) <= COARSE.get(way.split("-")[0], 1), (way, budget)
        assert (budget["asked"] is None) == (way in ("dense", "own"))


def test_the_report_has_a_row_a_run(compared):
    table = (compared[1] / "report.md").read_text()
    header = next(line for line in table.splitlines() if line.startswith("|  |"))
    columns = ("score", "answers as dense, %", "95 % interval", "tokens a layer, asked", "| tokens a layer |")
    assert all(column in header for column in columns)
    assert "\n| fastv-32 |" in table and "\n| random-10 |" in table and "\n| dense |" in table
    assert "Tokens a layer: visual rows that a layer processes" in table
    assert (compared[1] / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", sorted(RULES.keys() - COARSE.keys()))
@pytest.mark.parametrize(("visual", "layers", "tokens"), [(576, 32, 192), (576, 32, 32), (144, 12, 64), (144, 12, 16)])
def test_there_are_knobs_for_usual_budgets(name, visual, layers, tokens):
    method_for(name, Budget(tokens, visual, layers)).validate_for(layers)


def test_published_shapes_are_kept():
    """PyramidDrop's own average gives its own knobs back; a smaller budget leaves earlier, in the same proportions."""
    own = method_for("pyramiddrop", Budget(270, 576, 32))
    assert own.layers == (8, 16, 24) and [int(576 * keep) for keep in own.keep] == [288, 144, 72]
    small = method_for("pyramiddrop", Budget(128, 576, 32))
    assert small.layers == (2, 4, 6)
    assert method_for("visionzip", Budget(64, 576, 32)).to_dict() == {
        "method": "visionzip",
        "dominant": 54,
        "contextual": 10,
    }


def test_budgets_that_cannot_be_had_are_named_and_left_out(compared, bench, tmp_path):
    argv = ["--method", "fastv,visipruner,divprune", "--no-floors", "--tokens", "64,8,4", "--limit", 3]
    assert main(_argv(compared[0], bench, tmp_path / "out", *argv)) == 0
    result = _result(tmp_path / "out")
    assert {"divprune-8", "divprune-4"} < set(result["runs"])
    assert not any(way.endswith("-64") or way.startswith(("random", "fastv")) for way in result["runs"])
    assert "the prompts have 64 visual tokens" in result["left_out"]["divprune-64"]
    assert "layer 0 holds all 64" in result["left_out"]["fastv-4"]
    assert "fastv-4 is left out: 4 tokens a layer are too few" in (tmp_path / "out" / "report.md").read_text()
    assert len(read_lines(tmp_path / "out" / "questions" / "divprune-8" / "answers.jsonl")) == 3


@pytest.mark.parametrize(
    "knobs", [{"tokens_threshold": 0.3}, {"keep": 3, "relative": True, "probe_rows": "text"}], ids=str
)
def test_visipruner_by_its_threshold(compared, bench, tmp_path, knobs):
    config = {"mode": ["middle"], "shallow_mid_layer": 1, "layer_threshold": 0.9999, **knobs}
    (compared[0] / "pruning_config.json").write_text(json.dumps(config))
    try:
        assert main(_argv(compared[0], bench, tmp_path / "out", "--method", "visipruner", "--tokens", "40,2")) == 0
    finally:
        (compared[0] / "pruning_config.json").unlink()
    result = _result(tmp_path / "out")
    run = result["runs"]["visipruner-40"]
    assert abs(run["tokens_a_layer"]["measured"] - 40) <= 2
    assert run["config"].pop("tokens_threshold") > 0
    assert (
        run["config"].items() >= {key: config[key] for key in config if key not in ("tokens_threshold", "keep")}.items()
    )
    assert "no 'tokens_threshold' gives 2 tokens" in result["left_out"]["visipruner-2"]


def test_a_chain_keeps_before_the_decoder_what_visipruner_does_not_need(compared, bench, tmp_path):
    config = {"mode": ["middle"], "shallow_mid_layer": 1, "layer_threshold": 0.9999, "tokens_threshold": 0.3}
    (compared[0] / "pruning_config.json").write_text(json.dumps(config))
    chains = "divprune+visipruner,pool+visipruner,vtw+visipruner"
    argv = ["--method", chains, "--no-floors", "--tokens", "12"]
    try:
        assert main(_argv(compared[0], bench, tmp_path / "out", *argv)) == 0
    finally:
        (compared[0] / "pruning_config.json").unlink()
    result = _result(tmp_path / "out")
    run = result["runs"]["divprune+visipruner-12"]
    first, last = run["config"]["steps"]
    assert (run["config"]["method"], first["method"]) == ("chain", "divprune")
    assert config.items() <= last.items()  # the model's own knobs, untouched
    assert abs(run["tokens_a_layer"]["measured"] - 12) <= 1
    assert "behind layer" in result["left_out"]["vtw+visipruner-12"]


def test_a_model_without_the_tower_is_named(bench, tmp_path):
    model = write_stock(tmp_path / "m")
    argv = ["--method", "vispruner,fastv", "--no-floors", "--tokens", "8", "--limit", 2]
    assert main(_argv(model, bench, tmp_path / "out", *argv)) == 0
    result = _result(tmp_path / "out")
    assert "needs a vision tower with a class token" in result["left_out"]["vispruner-8"]
    assert abs(result["runs"]["fastv-8"]["tokens_a_layer"]["measured"] - 8) <= 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--method", "fastvv", "--tokens", "8"), "did you mean 'fastv'"),
        (("--method", "shortv", "--tokens", "8"), "--method shortv: no number of tokens a layer settles its knobs"),
        (("--method", "divprune+fastv", "--tokens", "8"), "like divprune\\+visipruner"),
        (("--method", "visipruner+visipruner", "--tokens", "8"), "a chain is one method and VisiPruner behind it"),
        (("--method", "divprun+visipruner", "--tokens", "8"), "did you mean 'divprune'"),
        (("--method", "shortv+visipruner", "--tokens", "8"), "no number of tokens a layer settles its knobs"),
        (("--method", "fastv"), "--method and --tokens go together"),
        (("--tokens", "8"), "--method and --tokens go together"),
        (("--method", "fastv", "--tokens", "8,x"), "--tokens 8,x"),
        (("--method", "fastv", "--tokens", "0"), "--tokens 0"),
        (("--method", ",", "--tokens", "8"), "--method ,"),
    ],
)
def test_bad_methods_are_refused_before_the_model_is_looked_for(flags, words, tmp_path):
    with pytest.raises(UserError, match=words):
        main(["--model-path", "nowhere", "--benchmark", "gqa", "-o", str(tmp_path), *flags])


def test_a_config_may_not_have_the_name_of_a_run(compared, bench, tmp_path):
    argv = ["--method", "fastv", "--tokens", "8", "--config", "random-8={}"]
    with pytest.raises(UserError, match="each name once"):
        main(_argv(compared[0], bench, tmp_path / "out", *argv))


def test_interval_of_a_share():
    assert interval_of([True] * 24) == pytest.approx([0.862, 1], abs=1e-3)
    low, high = interval_of([True] * 50 + [False] * 50)
    assert (low, high) == pytest.approx((0.404, 0.596), abs=1e-3)
