"""This project under lmms-eval itself: on a task of three local pictures, and on the shipped small benchmarks.

lmms-eval asks for more packages than the rest of the tests together, so it lives in an environment of its own:
`scripts/lmms_eval_environment.sh FOLDER` makes one, and `LMMS_EVAL_PYTHON=FOLDER/bin/python pytest
tests/test_lmms_eval.py` runs these there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from family_models import FAMILIES
from PIL import Image
from tiny_checkpoints import tiny_config, tiny_model, write_original
from tiny_stock import write_stock

from llava.constants import SHIPPED_MODEL_PATH
from llava.eval.eval_mme import judge, read_truth, score_mme
from llava.eval.eval_textvqa import normalize, soft_scores
from llava.inference import GenerationOptions, LoadedModel, LoadOptions, Turn, open_checkpoint

REPOSITORY = Path(__file__).parents[1]
PYTHON = os.environ.get("LMMS_EVAL_PYTHON") or (sys.executable if find_spec("lmms_eval") else None)
needs_lmms_eval = pytest.mark.skipif(
    PYTHON is None, reason="lmms-eval is not installed and LMMS_EVAL_PYTHON names no Python that has it"
)

TASK = """
task: three_pictures
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function functions.pictures
doc_to_text: !function functions.question
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
process_results: !function functions.judge
metric_list:
  - metric: length
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
from PIL import Image


def pictures(doc):
    return [Image.open(path) for path in doc["images"]]


def question(doc, kwargs=None):
    return doc["question"]


def judge(doc, results):
    return {"length": len(results[0])}
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    colours = ("red", "green", "blue")
    for colour in colours:
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
    # One picture, a longer question, two pictures and none: a batch that needs padding.
    documents = [
        {"question": "what is this", "images": [f"{folder}/red.png"], "answer": "red"},
        {"question": "what is this red blue a cat", "images": [f"{folder}/green.png"], "answer": "green"},
        {"question": "what is this", "images": [f"{folder}/blue.png", f"{folder}/red.png"], "answer": "blue"},
        {"question": "what is a cat", "images": [], "answer": "cat"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    (folder / "three_pictures.yaml").write_text(TASK.format(folder=folder))
    (folder / "functions.py").write_text(FUNCTIONS)
    return folder


def run(task_folder: Path, checkpoint: Path, config: str, batch_size: int, output: Path) -> tuple[dict, list[str]]:
    """lmms-eval's result file and the answers, in the questions' order."""
    tasks = {"three_pictures": 4}
    results, samples = evaluate(task_folder, tasks, f"{checkpoint},pruning_config={config}", batch_size, output)
    return results, [answer_of(line) for line in samples["three_pictures"]]


def answer_of(sample: dict) -> str:
    """The text itself, or in a list of one, as versions of lmms-eval have it."""
    answer = sample["filtered_resps"]
    return answer if isinstance(answer, str) else answer[0]


def evaluate(
    task_folder: Path, tasks: dict[str, int], model: str, batch_size: int, output: Path
) -> tuple[dict, dict[str, list[dict]]]:
    """lmms-eval's result file, and each task's samples in the questions' order. `tasks`: questions of each."""
    assert PYTHON is not None
    command = [PYTHON, "-m", "lmms_eval", "eval", "--model", "visipruner"]
    command += ["--model_args", f"pretrained={model},device=cpu", "--limit", str(max(tasks.values()))]
    command += ["--tasks", ",".join(tasks), "--include_path", str(task_folder), "--batch_size", str(batch_size)]
    command += ["--output_path", str(output), "--log_samples"]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(output / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    (results,) = output.rglob("*_results.json")
    samples = {}
    for task, count in tasks.items():
        (file,) = output.rglob(f"*_samples_{task}.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = sorted(lines, key=lambda line: line["doc_id"])
        assert len(lines) == count
    return json.loads(results.read_text()), samples


def throughput_of(results: dict) -> dict[str, float]:
    return results["throughput"]


@needs_lmms_eval
def test_llava_checkpoint(task_folder, tmp_path) -> None:
    checkpoint = write_original(tmp_path / "llava-tiny", tiny_model(tiny_config()))
    config = '{"mode":["deep"],"mid_deep_layer":2}'
    results, answers = run(task_folder, checkpoint, config, 3, tmp_path / "batched")
    figures = throughput_of(results)
    # 4 visual rows a picture; (1 + 1 + 2 + 0) pictures in 4 questions; the exit leaves none.
    assert figures["avg_visual_tokens"] == pytest.approx(4 * 4 / 4)
    assert figures["avg_visual_tokens_kept"] == 0
    # One of three layers runs without them; the question without a picture saves nothing by this convention.
    assert figures["avg_flops_saved_paper"] == pytest.approx(3 / 4 * 1 / 3, abs=1e-3)
    assert 0 < figures["avg_flops_saved_executed"] < 1
    assert results["results"]["three_pictures"]["length,none"] > 0

    _, alone = run(task_folder, checkpoint, config, 1, tmp_path / "alone")
    assert alone == answers


@needs_lmms_eval
def test_stock_model(task_folder, tmp_path) -> None:
    checkpoint = write_stock(tmp_path / "idefics3")
    results, _ = run(task_folder, checkpoint, '{"mode":["deep"],"mid_deep_layer":4}', 2, tmp_path / "out")
    figures = throughput_of(results)
    assert figures["avg_visual_tokens"] == pytest.approx(16 * 4 / 4)
    assert figures["avg_flops_saved_paper"] == pytest.approx(3 / 4 * 1 / 2, abs=1e-3)
    assert FAMILIES["idefics3"].settings["model_type"] == "idefics3"


@needs_lmms_eval
def test_the_shipped_benchmarks(tmp_path) -> None:
    """Batched under lmms-eval as one question at a time without it: answers, scores, kept tokens, FLOPs."""
    count = 6
    tasks = dict.fromkeys(("gqa_mini", "mme_mini", "textvqa_mini"), count)
    tasks_folder = REPOSITORY / "playground" / "lmms_eval"
    results, samples = evaluate(tasks_folder, tasks, str(SHIPPED_MODEL_PATH), 4, tmp_path / "out")

    mini = REPOSITORY / "playground" / "data" / "mini"
    chat = LoadedModel(open_checkpoint(SHIPPED_MODEL_PATH), LoadOptions(device="cpu"))
    checkpoint = chat.checkpoint
    config, answers = checkpoint.pruning_config(), []
    texts: dict[str, list[dict]] = {}
    for task, questions, pictures in (
        ("gqa_mini", "gqa/llava_gqa_testdev_balanced.jsonl", "gqa/data/images"),
        ("mme_mini", "MME/llava_mme.jsonl", "MME/MME_Benchmark_release_version"),
        ("textvqa_mini", "textvqa/llava_textvqa_val_v051_ocr.jsonl", "textvqa/train_images"),
    ):
        texts[task] = []
        for line in (mini / questions).read_text().splitlines()[:count]:
            asked = json.loads(line)
            picture = checkpoint.read_picture(mini / pictures / asked["image"])
            prompt = checkpoint.encode([Turn(asked["text"], [picture])])
            answers.append(chat.answer(prompt, config, GenerationOptions(max_new_tokens=16)))
            texts[task].append({**asked, "prompt": asked["text"], "text": answers[-1].text})
        assert [answer_of(line) for line in samples[task]] == [each["text"] for each in texts[task]]

    scores = results["results"]
    gqa = json.loads((mini / "gqa/data/testdev_balanced_questions.json").read_text())
    right = [each["text"].lower() == gqa[each["question_id"]]["answer"] for each in texts["gqa_mini"]]
    assert scores["gqa_mini"]["exact_match,none"] == pytest.approx(sum(right) / count)
    truth = read_truth(mini / "MME/MME_Benchmark_release_version")
    mme = score_mme(judge(texts["mme_mini"], truth), truth, allow_partial=True)
    assert scores["mme_mini"]["mme_perception_score,none"] == pytest.approx(mme["perception"])
    people = json.loads((mini / "textvqa/TextVQA_0.5.1_val.json").read_text())["data"]
    soft = [
        soft_scores(entry["answers"]).get(normalize(each["text"]), 0)
        for each, entry in zip(texts["textvqa_mini"], people[:count], strict=True)
    ]
    assert scores["textvqa_mini"]["exact_match,none"] == pytest.approx(sum(soft) / count)

    figures = throughput_of(results)
    expected = {
        "avg_visual_tokens": [answer.visual_tokens for answer in answers],
        "avg_visual_tokens_kept": [answer.kept for answer in answers],
        "avg_flops_saved_paper": [answer.flops_saved["paper"] for answer in answers],
        "avg_flops_saved_executed": [answer.flops_saved["executed"] for answer in answers],
    }
    for name, values in expected.items():
        assert figures[name] == pytest.approx(sum(values) / len(values), rel=1e-3, abs=1e-3), name


def test_the_entry_point_names_the_manifest() -> None:
    from importlib.metadata import entry_points

    (point,) = entry_points(group="lmms_eval.models", name="visipruner")
    assert callable(point.load())
