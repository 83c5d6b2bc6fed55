"""This project under lmms-eval itself, on a task of three local pictures.

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
    assert PYTHON is not None
    command = [PYTHON, "-m", "lmms_eval", "eval", "--model", "visipruner"]
    command += ["--model_args", f"pretrained={checkpoint},pruning_config={config},device=cpu"]
    command += ["--tasks", "three_pictures", "--include_path", str(task_folder), "--batch_size", str(batch_size)]
    command += ["--output_path", str(output), "--log_samples"]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(task_folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    (results,) = output.rglob("*_results.json")
    (samples,) = output.rglob("*_samples_three_pictures.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = [line["filtered_resps"][0] for line in sorted(lines, key=lambda line: line["doc_id"])]
    return json.loads(results.read_text()), answers


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


def test_the_entry_point_names_the_manifest() -> None:
    from importlib.metadata import entry_points

    (point,) = entry_points(group="lmms_eval.models", name="visipruner")
    assert callable(point.load())
