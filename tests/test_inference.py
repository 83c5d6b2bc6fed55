"""Answers of one kind for every checkpoint: in batches as alone, and through the evaluation's programs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from eval_helpers import arguments, read_lines, without_ids, write_benchmark, write_model
from tiny_stock import write_stock
from visual_helpers import noise

from llava.constants import ANSWER_INSTRUCTION
from llava.eval import compare, model_vqa_loader
from llava.inference import GenerationOptions, LoadedModel, LoadOptions, Responder, Turn, open_checkpoint
from llava.pruning import Method, PruningConfigError
from llava.pruning.decisions import Keep
from llava.pruning.methods import VTW, Chain, FastV

# Of eight layers; keeps other tokens for other pictures.
STOCK_CONFIG = {"mode": ["middle"], "shallow_mid_layer": 2, "layer_threshold": 0.9999, "tokens_threshold": 0.2}
LLAVA_CONFIG = {"mode": ["middle"], "shallow_mid_layer": 1, "layer_threshold": 0.995, "tokens_threshold": 0.3}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return write_stock(tmp_path_factory.mktemp("stock") / "idefics3", splits=True)


@pytest.fixture(scope="module", params=["llava", "stock"])
def loaded(request, tmp_path_factory) -> LoadedModel:
    if request.param == "stock":
        folder = request.getfixturevalue("stock")
    else:
        folder = write_model(tmp_path_factory.mktemp("llava") / "tiny-v1")
    return LoadedModel(open_checkpoint(folder), LoadOptions(device="cpu"))


@pytest.fixture(scope="module")
def prompts(loaded):
    """One picture, a longer question, two pictures of other shapes, and none."""
    pictures = [loaded.checkpoint.read_picture(noise(size, seed)) for seed, size in enumerate([(40, 30), (30, 90)])]
    asked = [("w1", pictures[:1]), ("w2 w3 w4 w5 w6", pictures[1:]), ("w7 w8", pictures), ("w9", [])]
    return [loaded.checkpoint.encode([Turn(question, own)]) for question, own in asked]


def config_of(loaded):
    is_stock = loaded.checkpoint.conv_mode == "chat template"
    return loaded.checkpoint.pruning_config(STOCK_CONFIG if is_stock else LLAVA_CONFIG)


@pytest.mark.parametrize("way", ["dense", "pruned"])
def test_an_answer_does_not_depend_on_its_batch(loaded, prompts, way) -> None:
    config, options = (None if way == "dense" else config_of(loaded)), GenerationOptions(max_new_tokens=5)
    together = loaded.answer_batch(prompts, config, options)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = loaded.answer(prompt, config, options)
        assert (answer.ids, answer.text, answer.finish) == (alone.ids, alone.text, alone.finish)
        assert (answer.prompt_rows, answer.visual_tokens) == (prompt.num_rows, prompt.num_visual)
        assert answer.kept == alone.kept and answer.rows_per_layer == alone.rows_per_layer
        assert answer.flops_saved == alone.flops_saved
        assert (answer.trace is None) == (way == "dense")
        if answer.trace is not None:
            decided = [(trace.select_layer, trace.kept_positions) for trace in (answer.trace, alone.trace)]
            assert decided[0] == decided[1]
    assert len({id(answer.clock) for answer in together}) == 1
    assert together[0].clock.new_tokens == sum(answer.new_tokens for answer in together)


def test_answers_are_those_of_the_model_itself(loaded, prompts) -> None:
    inputs = loaded.checkpoint.batch(prompts[:1])
    output = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = loaded.answer(prompts[0], None, GenerationOptions(max_new_tokens=4))
    assert answer.ids == tuple(loaded.checkpoint.new_ids(output, inputs)[0].tolist())[: answer.new_tokens]


def test_any_method_prunes(loaded, prompts) -> None:
    answer = loaded.answer(prompts[0], FastV(layer=2, keep=1), GenerationOptions(max_new_tokens=1))
    assert answer.kept == len(answer.trace.image_spans) < answer.visual_tokens
    assert answer.flops_saved["paper"] > 0


def test_a_batch_is_drawn_with_its_first_prompts_seed(loaded, prompts) -> None:
    responder = Responder(loaded, None, GenerationOptions(max_new_tokens=4, temperature=1.0), batch_size=2)
    first = [answer.ids for answer in responder.answer(prompts, seeds=[3, 4, 5, 6])]
    torch.manual_seed(0)
    assert [answer.ids for answer in responder.answer(prompts[2:], seeds=[5, 6])] == first[2:]


def test_the_benchmark_runner_takes_transformers_families(stock, tmp_path) -> None:
    bench = write_benchmark(tmp_path / "b")
    more = ["--pruning-config", json.dumps(STOCK_CONFIG), "--num-workers", 2]
    for size in (1, 5):
        path = tmp_path / f"{size}.jsonl"
        own = ["--batch-size", size, "--trace-file", path.with_suffix(".trace")]
        assert model_vqa_loader.main(arguments(stock, bench, path, *more, *own)) == 0
    assert without_ids(tmp_path / "1.jsonl") == without_ids(tmp_path / "5.jsonl")
    traces = [read_lines(tmp_path / f"{size}.trace") for size in (1, 5)]
    assert [each["kept_positions"] for each in traces[0]] == [each["kept_positions"] for each in traces[1]]
    assert any(0 < each["kept"] < each["visual_tokens"] for each in traces[0])


def test_the_comparison_takes_transformers_families(stock, tmp_path) -> None:
    bench = write_benchmark(tmp_path / "b", 6)
    argv = ["--model-path", stock, "--question-file", bench / "questions.jsonl", "--image-folder", bench / "images"]
    argv += ["--batch-size", 3, "--max_new_tokens", 3, "--device", "cpu", "-o", tmp_path / "out"]
    argv += ["--config", f"exit={json.dumps({'mode': ['deep'], 'mid_deep_layer': 4})}"]
    assert compare.main([str(part) for part in argv]) == 0
    runs = json.loads((tmp_path / "out" / "report.json").read_text())["benchmarks"]["questions"]["runs"]
    assert runs["exit"]["flops_saved"]["paper"] == pytest.approx(0.5)
    assert runs["exit"]["kv_bytes_after_prefill"] < runs["dense"]["kv_bytes_after_prefill"]


@dataclass(frozen=True)
class Asked(Method):
    """Keeps as many rows as the question has words."""

    question: str | None = None

    def for_question(self, question):
        return replace(self, question=question)

    def looks_behind(self, num_layers):
        return {1}

    def decide(self, layer, measured, trace):
        return Keep(np.arange(len(self.question.split()))) if layer == 1 else None


def test_every_prompt_of_a_batch_is_pruned_for_its_own_bare_question(loaded) -> None:
    pictures = [loaded.checkpoint.read_picture(noise((40, 30), 0))]
    questions = ["w1", f"<image>\nw2 w3\n{ANSWER_INSTRUCTION}", "w4 w5 w6"]
    prompts = [loaded.checkpoint.encode([Turn(question.replace("<image>\n", ""), pictures)]) for question in questions]
    assert [prompt.question for prompt in prompts] == ["w1", "w2 w3", "w4 w5 w6"]
    for config in (Asked(), Chain((Asked(), VTW(3)))):
        answers = loaded.answer_batch(prompts, config, GenerationOptions(max_new_tokens=2))
        assert [answer.kept for answer in answers] == [1, 2, 3]
    # A later turn's question is the one that is asked.
    turns = [Turn("w1 w2 w3", pictures, answers[0]), Turn("w7 w8", [])]
    assert loaded.checkpoint.encode(turns).question == "w7 w8"


def test_cdpruner_takes_the_question_of_the_prompt_unless_it_has_one() -> None:
    config = Method.from_any({"method": "cdpruner", "relevance": "clip", "clip": "a/folder"})
    assert Method.from_any(config.to_dict()) == config
    assert config.for_question("What?").question == "What?"
    assert config.for_question("What?").for_question("Who?").question == "What?"
    chain = Chain((config, VTW(3))).for_question("What?")
    assert chain.steps[0].question == "What?"
    without = Method.from_any({"method": "cdpruner"})
    assert without.for_question("What?") is without
    with pytest.raises(PruningConfigError, match="'question' is missing"):
        config.bind(4, None)
