"""Calibration: its measures against recorded runs, its sweep against real runs, its command line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_runs import CASES, GoldenCase
from PIL import Image
from tiny_stock import write_stock

from llava.calibrate import __main__ as command
from llava.calibrate.candidates import Candidate, Recording, near, replay, spread, visipruner_candidates
from llava.calibrate.candidates import front as front_of
from llava.calibrate.goal import Figure, Goal, Result
from llava.calibrate.measure import Measures, Wanted, contribution_order, measure, withdrawal_layer
from llava.calibrate.samples import BUILT_IN, halves, read_samples
from llava.constants import SHIPPED_MODEL_PATH
from llava.inference import GenerationOptions, LoadedModel, LoadOptions, Turn, open_checkpoint
from llava.pruning import PruningConfig, VisiPruner
from llava.pruning.methods import VTW
from llava.utils import UserError

MINI = Path(__file__).parent.parent / "playground/data/mini/textvqa"
QUESTIONS = MINI / "llava_textvqa_val_v051_ocr.jsonl"


def measured(case: GoldenCase, wanted: Wanted, sample: int | None = None) -> Measures:
    rows, visual = case.rows(sample)
    twice = {"inputs_embeds": rows[None].repeat(2, 1, 1), "visual_mask": visual[None].repeat(2, 1)}
    return measure(case.model, wanted, twice if wanted.boundaries else {k: v[:1] for k, v in twice.items()})


# --- what published calibrations recorded ---


@pytest.mark.parametrize("name", ["vtw__findk_a", "vtw__findk_ga"])
def test_the_withdrawal_layer_is_the_recorded_one(name: str) -> None:
    case = GoldenCase.load(name)
    layers = case.facts["expected"]["candidate_layers"]
    recorded = case.tensors["kl"].double().numpy()
    samples = [measured(case, Wanted(withdrawals=layers, shares=False), number) for number in range(len(recorded))]
    found = np.stack([each.withdrawn for each in samples])
    np.testing.assert_allclose(found, recorded, atol=1e-5, rtol=0)
    for eta, layer in case.facts["expected"]["k_for_eta"].items():
        assert withdrawal_layer(found, layers, float(eta)) == layer


def test_layer_contributions_and_their_order_are_the_recorded_ones() -> None:
    case = GoldenCase.load("shortv__contribution")
    recorded = case.tensors["scores"].double().numpy()
    frozen = range(recorded.shape[1])
    found = np.stack([measured(case, Wanted(frozen=frozen, shares=False), n).frozen for n in range(len(recorded))])
    np.testing.assert_allclose(found, recorded, atol=1e-5, rtol=0)
    assert contribution_order(found) == case.facts["expected"]["order"]


# --- the offline sweep against real runs ---


def selecting(case: GoldenCase) -> bool:
    return "middle" in (case.facts["pruning_config"] or {}).get("mode", [])


@pytest.mark.parametrize("name", [name for name in CASES if selecting(GoldenCase.load(name))])
def test_replaying_measures_selects_as_the_recorded_run(name: str) -> None:
    case = GoldenCase.load(name)
    expected, model = case.facts["expected"], case.model
    layers = len(model.get_decoder().layers)
    config = PruningConfig.from_any(case.facts["pruning_config"]).bind(layers, model.config._name_or_path)
    boundaries = [config.shallow_mid_layer] if config.shallow else []
    measures = measured(case, Wanted(boundaries=boundaries, sink=config.shallow_sink or "first"))
    trace = replay(config, measures, boundaries)
    assert trace.select_layer == expected["select_layer"]
    assert trace.kept_positions == (expected["selected_indices"] or [])
    # Behind the drop, cosines are those of the unpruned run: only without an exit are all rows known.
    stop = layers if not config.deep or trace.select_layer is None else trace.select_layer + 2
    assert trace.rows_per_layer[:stop] == expected["seq_len_per_layer"][:stop]


@pytest.fixture(scope="module")
def shipped() -> LoadedModel:
    return LoadedModel(open_checkpoint(SHIPPED_MODEL_PATH), LoadOptions("cpu", "float32"))


def prompts_of(loaded: LoadedModel, count: int) -> list:
    records = [json.loads(line) for line in QUESTIONS.read_text().splitlines()[:: max(1, 200 // count)]]
    return [
        loaded.checkpoint.encode(
            [Turn(each["text"], [loaded.checkpoint.read_picture(MINI / "train_images" / each["image"])])]
        )
        for each in records[:count]
    ]


def test_the_sweep_predicts_the_shipped_models_runs_to_the_row(shipped: LoadedModel) -> None:
    prompts, boundaries = prompts_of(shipped, 4), [1, 3]
    measures = [
        measure(shipped.model, Wanted(boundaries=boundaries), dict(shipped.checkpoint.batch([prompt] * 2)))
        for prompt in prompts
    ]
    candidates = visipruner_candidates(Recording(measures, boundaries, shipped.shape), "first")
    compared = 0
    for candidate in candidates[:: len(candidates) // 8]:
        method = candidate.method
        assert isinstance(method, VisiPruner)
        exact = VisiPruner.from_any({**method.to_dict(), "mode": [stage for stage in method.mode if stage != "deep"]})
        for prompt, each in zip(prompts, measures, strict=True):
            answer = shipped.answer(prompt, exact, GenerationOptions(1))
            trace = replay(exact, each, boundaries)
            assert trace.rows_per_layer == answer.rows_per_layer
            assert trace.kept_positions == answer.trace.kept_positions
            assert trace.select_layer == answer.trace.select_layer
            compared += trace.select_layer is not None
    assert compared > 8


def test_measures_are_those_of_whole_runs(shipped: LoadedModel) -> None:
    (prompt,) = prompts_of(shipped, 1)
    found = measure(
        shipped.model, Wanted(withdrawals=[4], boundaries=[3]), dict(shipped.checkpoint.batch([prompt] * 2))
    )

    def first_logits(config) -> torch.Tensor:
        return shipped.answer(prompt, config, GenerationOptions(1), keep_logits=True).first_logits.double()

    dense, gone, blind = (
        first_logits(config).log_softmax(-1) for config in (None, VTW(4), VisiPruner(("shallow",), 3))
    )
    np.testing.assert_allclose(torch.from_numpy(found.logits).double().log_softmax(-1), dense, atol=1e-4)
    np.testing.assert_allclose(found.withdrawn, [(gone.exp() * (gone - dense)).sum()], atol=1e-4)
    np.testing.assert_allclose(found.blind, [(dense.exp() * (dense - blind)).sum()], atol=1e-4)
    assert np.isnan(found.cosine[1, :4]).all() and not np.isnan(found.cosine[1, 4:]).any()


# --- choosing ---


def result(agreement: float, saved: float, divergence: float = 0.0, error: float = 0.01) -> Result:
    def figure(mean: float, spread: float = 0.0) -> Figure:
        return Figure(mean, mean - 2 * spread, mean + 2 * spread)

    return Result(VTW(round(1000 * saved)), 50, figure(agreement, error), figure(divergence), figure(saved), figure(9))


def test_the_least_divergence_decides_among_equal_agreements() -> None:
    results = [result(0.98, 0.42, 0.3), result(0.975, 0.41, 0.1), result(0.9, 0.45, 0.01), result(1.0, 0.3)]
    ranked = Goal(save_flops=0.4).ranked(results)
    assert [each.agreement.mean for each in ranked] == [0.975, 0.98, 0.9]
    assert [each.saved.mean for each in Goal(min_agreement=0.97).ranked(results)] == [0.42, 0.41, 0.3]
    assert Goal(save_flops=0.6).ranked(results) == []


def test_an_interval_resamples_pictures_whole() -> None:
    values = [1.0] * 50 + [0.0] * 50
    alone = Figure.of(values, list(range(100)), 0)
    # Two pictures with fifty questions each know as much as two questions.
    together = Figure.of(values, [0] * 50 + [1] * 50, 0)
    assert alone.mean == together.mean == 0.5
    assert alone.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert (together.low, together.high) == (0.0, 1.0)


def test_an_interval_of_equal_answers_is_not_a_point() -> None:
    z2 = 1.96**2
    same, other = Figure.of_shares([1.0] * 8, [0, 0, 1, 1, 2, 2, 3, 3], 0), Figure.of_shares([0.0] * 4, range(4), 0)
    assert (same.low, same.high) == (pytest.approx(4 / (4 + z2), abs=1e-4), 1.0)
    assert (other.low, other.high) == (0.0, pytest.approx(z2 / (4 + z2), abs=1e-4))


def test_candidates_are_taken_along_the_front_and_near_the_goal() -> None:
    many = [Candidate(VTW(number + 1), number / 20, unread=abs(10 - number) / 10) for number in range(20)]
    best = front_of(many)
    assert [each.saving for each in best] == [number / 20 for number in range(10, 20)]
    assert [each.saving for each in spread(best, 3)] == [0.5, pytest.approx(0.7, abs=0.06), 0.95]
    assert near(many, 0.6, 2) == [many[12], many[13]]


# --- the command line ---


def run(out: Path, *more: object, images: Path = MINI / "train_images", questions: Path | None = QUESTIONS) -> int:
    asked = ["--questions", str(questions)] if questions else []
    arguments = ["--images", str(images), *asked, "-o", str(out), "--device", "cpu", *map(str, more)]
    return command.main(arguments)


def test_a_calibration_leaves_a_config_that_programs_take(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, "--save-flops", 0.2, "--pictures", 6) == 0
    assert not (out / command.WORK).exists()
    found = json.loads((out / "calibration.json").read_text())
    config = json.loads((out / "pruning_config.json").read_text())
    assert found["pruning_config"] == config
    assert PruningConfig.from_any(f"@{out / 'pruning_config.json'}").to_dict() == config
    assert found["held_out"]["saved"]["mean"] >= 0.2
    assert set(found["methods"]) == {"visipruner", "random"}
    assert (
        found["about"]["data"]["to_choose_on"] + found["about"]["data"]["held_out"] == found["about"]["data"]["asked"]
    )
    rows = list(csv.DictReader((out / "calibration.csv").open()))
    assert {row["method"] for row in rows} == {"visipruner", "random"}
    assert {row["prompts"] for row in rows} == {"to choose on", "held out"}
    page = (out / "calibration.html").read_text()
    assert "<script" not in page and not re.search(r"""(src|href)=["']?http""", page)
    assert "svg" in (out / "calibration.svg").read_text()[:400]


def test_a_killed_calibration_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.calibrate import runs, search

    out, budget = tmp_path / "out", ("--save-flops", 0.2, "--pictures", 4)
    seen: list[str] = []
    plain_measure, plain_run = search.measure, runs.Runs._run

    def counted(*args):
        seen.append("measure")
        return plain_measure(*args)

    def killed(self, method, numbers):
        seen.append("run")
        if seen.count("run") == 3:
            raise KeyboardInterrupt
        return plain_run(self, method, numbers)

    monkeypatch.setattr(search, "measure", counted)
    monkeypatch.setattr(runs.Runs, "_run", killed)
    assert run(out, *budget) == 130
    assert not (out / "pruning_config.json").exists()
    with pytest.raises(UserError, match="unfinished calibration with another goal"):
        run(out, "--save-flops", 0.3, "--pictures", 4)
    with pytest.raises(UserError, match="unfinished calibration with another dtype"):
        run(out, *budget, "--dtype", "bfloat16")
    monkeypatch.setattr(runs.Runs, "_run", lambda *args: seen.append("run again") or plain_run(*args))
    measures = seen.count("measure")
    # What is broken is done again: one prompt's measures, and lines that a crash cut off.
    work = out / command.WORK
    (work / "measures-0.npz").write_bytes(b"")
    lines = (work / "runs.jsonl").read_text()
    (work / "runs.jsonl").write_text(lines + '[1]\n{"config": "x", "outcomes": {"0": [1]}}\n' + lines[:30])
    run(out, *budget)
    assert measures > 0 and seen.count("measure") == measures + 1
    whole = tmp_path / "whole"
    run(whole, *budget)
    read = lambda folder: json.loads((folder / "calibration.json").read_text())  # noqa: E731
    assert read(out)["methods"] == read(whole)["methods"]
    # A finished one is moved aside, not overwritten.
    run(whole, *budget)
    assert len(list(whole.glob("calibration.json.bak-*"))) == 1


def test_a_budget_that_nothing_meets_is_said_and_writes_no_config(tmp_path: Path, capsys) -> None:
    assert run(tmp_path, "--max-ms", "0.0001x", "--pictures", 2, "--method", "vtw,fastv") == 1
    assert "No config of these methods meets the budget" in capsys.readouterr().out
    assert not (tmp_path / "pruning_config.json").exists()
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert found["best"] is None
    for name in ("vtw", "fastv"):
        assert found["methods"][name]["held_out"]["time_ratio"] > 0 and not found["methods"][name]["meets_the_goal"]


def test_every_method_at_a_bound_on_agreement_through_a_stock_processor(tmp_path: Path) -> None:
    model = write_stock(tmp_path / "stock")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.effect_noise((40, 30), 10 + 40 * number).convert("RGB").save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    code = run(
        tmp_path / "out",
        *("--min-agreement", 0.25, "--method", "all", "--model-path", model, "--max-new-tokens", 4),
        images=folder,
        questions=None,
    )
    found = json.loads((tmp_path / "out/calibration.json").read_text())
    assert code == (0 if found["best"] else 1)
    assert len(found["about"]["data"]["skipped"]) == 2 and "broken.png" in found["about"]["data"]["skipped"][0]
    assert found["about"]["data"]["questions"] == list(BUILT_IN)
    tried = {name for name, family in found["methods"].items() if family["run"]}
    assert {"visipruner", "vtw", "shortv", "fastv", "divprune", "random"} <= tried
    # Its tower has no class token.
    assert found["methods"]["scope"]["run"] or "scope" in found["methods"]["scope"]["why_not_tried"]
    assert "divergence" in found["measured"]["frozen_alone"]


BAD = {
    "no budget": ([], "one budget is needed"),
    "two budgets": (["--save-flops", "0.4", "--min-agreement", "0.9"], "one budget is needed"),
    "all saved": (["--save-flops", "1"], "between 0 and 1"),
    "no agreement": (["--min-agreement", "0"], "above 0 and at most 1"),
    "more than agreement": (["--min-agreement", "1.2"], "above 0 and at most 1"),
    "no time": (["--max-ms", "0"], "milliseconds above 0"),
    "no number": (["--max-ms", "nan"], "milliseconds above 0"),
    "endless": (["--max-ms", "inf"], "milliseconds above 0"),
    "slower": (["--max-ms", "1.5x"], "share of the dense run's"),
    "time in words": (["--max-ms", "fast"], "'fast'"),
    "no such method": (["--save-flops", "0.3", "--method", "fastvv"], "fastv"),
    "no methods": (["--save-flops", "0.3", "--method", ","], "names of methods"),
    "a chain": (["--save-flops", "0.3", "--method", "chain"], "chain"),
    "no pictures": (["--save-flops", "0.3", "--pictures", "0"], "--pictures is 0"),
    "one picture": (["--save-flops", "0.3", "--pictures", "1"], "at least 2"),
    "no model": (["--save-flops", "0.3", "--model-path", "nowhere/at/all"], "nowhere/at/all"),
}


@pytest.mark.parametrize("arguments, said", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_a_model_is_loaded(arguments, said, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(LoadedModel, "__init__", lambda *args: pytest.fail("the model was loaded"))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=said):
        run(out, *arguments)
    assert not out.exists()


def test_questions_come_from_llavas_json_too(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "c.png")
    entries = [
        {"id": 0, "image": "c.png", "conversations": [{"from": "human", "value": "<image>\nAlone?"}]},
        {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}]},
        {"id": 2, "image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "<image><image>\nBoth?"}]},
        {"id": 3, "conversations": [{"from": "human", "value": "No picture?"}]},
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(entries))
    samples = read_samples(tmp_path, file, seed=0, pictures=9)
    assert {(len(each.pictures), each.question) for each in samples} == {
        (1, "Alone?"),
        (1, "What is it?"),
        (2, "Both?"),
    }
    # The two that share a picture are never in different halves.
    assert sorted(map(len, halves(samples))) == [1, 2] and len({each.group for each in samples}) == 2
    file.write_text(json.dumps([{"image": "../a.png", "text": "?"}, {"image": "b.png", "text": "?"}]))
    with pytest.raises(UserError, match="leads out of"):
        read_samples(tmp_path, file, seed=0, pictures=9)
    file.write_text(json.dumps([{"image": 3, "text": "?"}]))
    with pytest.raises(UserError, match="entry 1"):
        read_samples(tmp_path, file, seed=0, pictures=9)
    with pytest.raises(UserError, match="no picture in this folder"):
        read_samples(empty_folder(tmp_path), None, seed=0, pictures=9)


def empty_folder(folder: Path) -> Path:
    empty = folder / "empty"
    empty.mkdir()
    return empty


def test_no_picture_is_in_both_halves() -> None:
    samples = read_samples(MINI / "train_images", QUESTIONS, seed=3, pictures=21)
    first, second = halves(samples)
    assert sorted(first + second) == list(range(len(samples)))
    groups = [{samples[number].group for number in half} for half in (first, second)]
    assert not groups[0] & groups[1]
    assert abs(len(groups[0]) - len(groups[1])) <= 1
    again = read_samples(MINI / "train_images", QUESTIONS, seed=3, pictures=21)
    assert again == samples
    assert read_samples(MINI / "train_images", QUESTIONS, seed=4, pictures=21) != samples


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_a_model_of_few_layers_is_calibrated_by_what_fits_it(layers: int, tmp_path: Path, capsys) -> None:
    model = write_stock(tmp_path / "stock")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = layers
    config["text_config"].pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    for number in range(2):
        Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / f"{number}.png")
    arguments = ("--save-flops", 0.1, "--method", "visipruner,vtw", "--model-path", model, "--max-new-tokens", 2)
    assert run(tmp_path / "out", *arguments, images=tmp_path, questions=None) == 0
    found = json.loads((tmp_path / "out/calibration.json").read_text())["methods"]
    assert found["vtw"]["meets_the_goal"]
    why_not = found["visipruner"]["why_not_tried"]
    assert why_not is None if layers == 4 else f"there are {layers}" in why_not


def test_a_method_that_a_prompt_refuses_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.calibrate import runs

    plain_run = runs.Runs._run

    def refusing(self, method, numbers):
        if method.name == "fastv":
            raise UserError("not this prompt")
        return plain_run(self, method, numbers)

    monkeypatch.setattr(runs.Runs, "_run", refusing)
    assert run(tmp_path, "--save-flops", 0.2, "--pictures", 2, "--method", "fastv,vtw") == 0
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert found["methods"]["fastv"]["why_not_tried"] == "not this prompt" and found["best"] == "vtw"
