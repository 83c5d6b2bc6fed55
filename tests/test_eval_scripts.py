"""The benchmark scripts, from another working folder, on the small benchmarks with the model that ships."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava.constants import SHIPPED_MODEL_PATH
from llava.eval.benchmarks import BENCHMARKS, DATA, published
from llava.eval.files import read_jsonl
from llava.eval.questions import read_questions
from llava.utils import UserError

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts" / "v1_5"
ALL = sorted(SCRIPTS.rglob("*.sh"))


def _run(script, folder, **variables):
    env = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_VISIBLE")}
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    env |= settings | {key: str(value) for key, value in variables.items()}
    return subprocess.run(
        ["bash", str(script)], cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.parametrize("name", sorted(BENCHMARKS.keys() - {"mme"}))
def test_pruned_script_ends_with_a_score_the_dense_one_and_what_was_saved(name, tmp_path):
    """A dozen questions each; a whole set is the next test's."""
    results = tmp_path / "results"
    ended = _run(SCRIPTS / "visiPruner_eval" / f"{name}.sh", tmp_path, RESULTS=results, LIMIT=12)
    assert ended.returncode == 0, ended.stderr
    assert f"{name}, mini data in {ROOT}" in ended.stdout
    assert re.search(r"VisiPruner, this run.*12/", ended.stdout)
    assert re.search(r"dense, this model.*12/", ended.stdout)
    assert "FLOPs saved, % (executed)" in ended.stdout
    assert "PARTIAL: 12 of" in ended.stdout
    (scores,) = results.glob("*/mini/tiny_llava/pruned-*/scores.json")
    content = json.loads(scores.read_text())
    assert content["data"] == "mini" and "dense" in content and content["pruning"]["questions"] == 12
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.fixture
def a_users_mme(tmp_path):
    """A folder as LLaVA's eval.zip leaves it: two of MME's tasks, six pictures each, two questions a picture."""
    mini, root = DATA / "mini" / "MME", tmp_path / "eval" / "MME"
    questions = read_jsonl(mini / "llava_mme.jsonl")
    chosen = [q for task in ("existence", "OCR") for q in [q for q in questions if q["category"] == task][:12]]
    root.mkdir(parents=True)
    (root / "llava_mme.jsonl").write_text("".join(json.dumps(question) + "\n" for question in chosen))
    for name in {question["image"] for question in chosen}:
        picture = Path("MME_Benchmark_release_version") / name
        # MME keeps questions beside the picture in some tasks, in a folder of their own in others.
        questions_of = picture.parents[1] / "questions_answers_YN" / f"{picture.stem}.txt"
        for path in (picture, picture.with_suffix(".txt"), questions_of):
            if (mini / path).exists():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(mini / path, root / path)
    return root.parent


def test_whole_benchmark_in_two_processes_then_nothing_to_do(a_users_mme, tmp_path):
    settings = {"RESULTS": tmp_path / "results", "DATA": a_users_mme, "MODEL": SHIPPED_MODEL_PATH}
    script = SCRIPTS / "visiPruner_eval" / "mme.sh"
    ended = _run(script, tmp_path, PROCESSES=2, BATCH_SIZE=16, **settings)
    assert ended.returncode == 0, ended.stderr
    assert f"mme, eval data in {a_users_mme}" in ended.stdout and "dense, this model" not in ended.stdout
    assert "24 of 24 answers" in ended.stdout and "Perception" in ended.stdout and "PARTIAL" not in ended.stdout
    (folder,) = (tmp_path / "results").glob("mme/eval/tiny_llava/pruned-*")
    # MME's own script reads these.
    assert {path.name for path in (folder / "results").iterdir()} == {"existence.txt", "OCR.txt"}
    again = _run(script, tmp_path, **settings)
    assert again.returncode == 0 and "Nothing to do: all 24 answers" in again.stdout


def test_dense_script(tmp_path):
    ended = _run(SCRIPTS / "eval" / "pope.sh", tmp_path, RESULTS=tmp_path / "results", LIMIT=6)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"dense, this run.*6/360", ended.stdout) and "FLOPs" not in ended.stdout


def test_missing_data_says_what_is_expected_where(tmp_path):
    ended = _run(SCRIPTS / "eval" / "gqa.sh", tmp_path, DATA=tmp_path / "nowhere")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and "gqa/llava_gqa_testdev_balanced.jsonl" in ended.stderr
    assert "gqa/data/images/" in ended.stderr and "Traceback" not in ended.stderr


def test_bad_pruning_config_ends_the_script_with_one_error(tmp_path):
    ended = _run(SCRIPTS / "visiPruner_eval" / "gqa.sh", tmp_path, PRUNING_CONFIG='{"mode": "all"}')
    assert ended.returncode == 2 and "'mode'" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("script", ALL, ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_scripts_are_shellcheck_clean_and_strict(script):
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck, "pip install -e '.[dev]' brings shellcheck"
    checked = subprocess.run([shellcheck, "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    defaults = re.findall(r"^(\w+)=\$\{\1:-", script.read_text(), re.MULTILINE)
    if script.name == "common.sh":
        everyone, pruned = {"MODEL", "DATA", "BATCH_SIZE", "RESULTS", "LIMIT", "PROCESSES"}, {"PRUNING_CONFIG", "DENSE"}
        assert set(defaults) == everyone | pruned
    elif script.name != "train_common.sh":
        assert not defaults and "set -euo pipefail" in script.read_text()


# --- which data ---


@pytest.fixture
def playground(tmp_path, monkeypatch):
    """A playground/data of its own: mini as it is, no user's data."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "mini").symlink_to(DATA / "mini")
    monkeypatch.setattr("llava.eval.benchmarks.DATA", data)
    return data


def test_the_users_data_is_taken_where_its_question_file_is_and_mini_elsewhere(playground):
    assert BENCHMARKS["gqa"].files().kind == "mini"
    shutil.copytree(DATA / "mini" / "gqa", playground / "eval" / "gqa")
    files = BENCHMARKS["gqa"].files()
    assert files.kind == "eval" and files.questions.is_relative_to(playground / "eval")
    assert BENCHMARKS["pope"].files().kind == "mini"


def test_the_two_are_never_mixed(playground):
    shutil.copytree(DATA / "mini" / "gqa", playground / "eval" / "gqa")
    shutil.rmtree(playground / "eval" / "gqa" / "data" / "images")
    with pytest.raises(UserError, match=r"eval/gqa/data/images is missing"):
        BENCHMARKS["gqa"].files()


@pytest.mark.parametrize(
    ("model", "benchmark", "kind", "expected"),
    [
        ("liuhaotian/llava-v1.5-7b", "gqa", "eval", {"dense": 62.0, "VisiPruner": 60.3}),
        ("/models/llava-1.5-7b-hf", "mme", "eval", {"dense": 1510.7, "VisiPruner": 1428.3}),
        ("liuhaotian/llava-v1.5-13b", "textvqa", "eval", {"dense": 61.3}),
        ("liuhaotian/llava-v1.5-7b", "gqa", "mini", {}),
        ("liuhaotian/llava-v1.6-vicuna-7b", "gqa", "eval", {}),
        (SHIPPED_MODEL_PATH, "gqa", "eval", {}),
    ],
)
def test_published_scores_stand_only_beside_what_they_were_measured_with(model, benchmark, kind, expected):
    assert published(model, benchmark, kind) == expected


# --- the small benchmarks ---


def test_small_benchmarks_are_small_and_have_a_few_hundred_questions_each():
    files = [path for path in (DATA / "mini").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    for benchmark in BENCHMARKS.values():
        found = benchmark.files(DATA / "mini")
        questions = read_questions(found.questions, found.images)
        assert 200 <= len(questions) <= 600
        assert all(question.image is not None and question.image.is_file() for question in questions)


def _perfect(name):
    """Answers that a model which is always right would give, from the truth files and not from the scorer."""
    root = DATA / "mini"
    records = read_jsonl(root / BENCHMARKS[name].question_file)
    if name == "gqa":
        truth = json.loads((root / "gqa/data/testdev_balanced_questions.json").read_text())
        texts = [truth[record["question_id"]]["answer"] for record in records]
    elif name == "mme":
        texts = ["Yes" if index % 2 == 0 else "No" for index in range(len(records))]
    elif name == "textvqa":
        data = json.loads((root / "textvqa/TextVQA_0.5.1_val.json").read_text())["data"]
        texts = [max(entry["answers"], key=entry["answers"].count) for entry in data]
    else:
        labels = {path: read_jsonl(path) for path in sorted((root / "pope/coco").iterdir())}
        by_text = {
            (path.stem.removeprefix("coco_pope_"), entry["image"], entry["text"]): entry["label"]
            for path, entries in labels.items()
            for entry in entries
        }
        texts = [by_text[r["category"], r["image"], r["text"].split("\n")[0]] for r in records]
    return [
        {"question_id": record["question_id"], "prompt": record["text"], "text": text}
        for record, text in zip(records, texts, strict=True)
    ]


@pytest.mark.parametrize(("name", "best"), [("gqa", 100), ("mme", 1000), ("textvqa", 100), ("pope", 100)])
def test_layout_question_and_truth_fit_together(name, best, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in _perfect(name)))
    scores = BENCHMARKS[name].score(BENCHMARKS[name].files(DATA / "mini"), path)
    assert scores["score"] == pytest.approx(best)
    assert scores["answered"] == scores["total"] == len(_perfect(name))


def test_the_committed_script_makes_the_committed_questions(tmp_path):
    """Text files byte for byte; pictures may differ where another Pillow smooths edges otherwise."""
    pytest.importorskip("easy_vqa")
    script = ROOT / "scripts" / "make_mini_benchmarks.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True, capture_output=True)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    committed = {path.relative_to(DATA / "mini") for path in (DATA / "mini").rglob("*") if path.is_file()}
    assert made == committed
    for path in made:
        if path.suffix != ".png":
            assert (tmp_path / path).read_bytes() == (DATA / "mini" / path).read_bytes(), path
