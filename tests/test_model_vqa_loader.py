"""The benchmark runner: nothing lost, nothing asked twice, one clear error for everything that can be wrong."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from eval_helpers import (
    PRUNING,
    arguments,
    environment,
    program,
    read_lines,
    run,
    torchrun,
    without_ids,
    write_benchmark,
    write_lines,
    write_model,
)

from llava.eval.model_vqa_loader import main
from llava.eval.questions import chunk
from llava.eval.run_files import ShardedFile, line_of_answer
from llava.inference import LoadedModel, checkpoint
from llava.utils import UserError

QUESTIONS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny-v1")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("bench") / "b", QUESTIONS)


@pytest.fixture(scope="module")
def whole(model, bench, tmp_path_factory):
    """Answers of an uninterrupted run, one question at a time."""
    path = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    assert main(arguments(model, bench, path, "--trace-file", path.with_name("trace.jsonl"))) == 0
    return path


def _never_load(*args, **kwargs):
    raise AssertionError("weights were read")


@pytest.fixture
def no_weights(monkeypatch):
    """The run must end before weights are read."""
    monkeypatch.setattr(checkpoint, "load_pretrained_model", _never_load)


# --- answers ---


def test_answers_have_llavas_keys_and_every_line_is_answered_repeated_ids_and_duplicates_too(whole, bench):
    answers, questions = read_lines(whole), read_lines(bench / "questions.jsonl")
    assert len(answers) == QUESTIONS
    assert [list(answer) for answer in answers] == [
        ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    ] * QUESTIONS
    assert [(a["question_id"], a["prompt"]) for a in answers] == [(q["question_id"], q["text"]) for q in questions]
    assert len({answer["question_id"] for answer in answers}) < QUESTIONS  # ids do repeat
    assert answers[4]["text"] == answers[5]["text"]  # one line twice
    assert all(answer["metadata"] == {} and answer["model_id"] == "tiny-v1" for answer in answers)
    assert len({answer["answer_id"] for answer in answers}) == QUESTIONS


def test_answers_equal_those_of_the_model_asked_directly(whole, bench, model):
    from PIL import Image

    from llava.conversation import build_prompt
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    tokenizer, llava, processor, _ = load_pretrained_model(model, None, "tiny-v1", device="cpu")
    for question, answer in list(zip(read_lines(bench / "questions.jsonl"), read_lines(whole), strict=True))[:8]:
        slot = "<image>\n" if "image" in question else ""
        prompt = build_prompt("llava_v1", [(slot + question["text"], None)])
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
        pixels = None
        if "image" in question:
            image = Image.open(bench / "images" / question["image"]).convert("RGB")
            pixels = process_images([image], processor, llava.config)
        new = llava.generate(ids, images=pixels, pruning_config=PRUNING, max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(new[0], skip_special_tokens=True).strip() == answer["text"]


@pytest.mark.parametrize("batch_size", [3, 8])
def test_batch_size_changes_no_answer_and_no_decision(whole, model, bench, tmp_path, batch_size):
    trace = tmp_path / "trace.jsonl"
    flags = ("--batch-size", batch_size, "--num-workers", 1, "--trace-file", trace)
    assert main(arguments(model, bench, tmp_path / "a.jsonl", *flags)) == 0
    assert without_ids(tmp_path / "a.jsonl") == without_ids(whole)
    decisions = [
        [(t["line"], t["select_layer"], t["kept_positions"], t["rows_per_layer"]) for t in read_lines(path)]
        for path in (trace, whole.with_name("trace.jsonl"))
    ]
    assert decisions[0] == decisions[1]
    assert len({(select, tuple(kept)) for _, select, kept, _ in decisions[0]}) > 3  # the batch really is mixed


def test_a_trace_line_says_what_was_kept_and_saved(whole):
    for trace in read_lines(whole.with_name("trace.jsonl")):
        if trace["select_layer"] is not None:
            assert trace["kept"] == len(trace["kept_positions"])
        if trace["select_layer"] == 2 and trace["kept"] < trace["visual_tokens"]:
            assert 0 < trace["flops_saved"]["executed"] < 1
            assert trace["rows_per_layer"][3] == trace["num_rows"] - trace["visual_tokens"] + trace["kept"]


def test_dense_without_a_pruning_config(model, bench, tmp_path):
    argv = arguments(model, bench, tmp_path / "dense.jsonl")
    place = argv.index("--pruning-config")
    del argv[place : place + 2]
    assert main(argv) == 0
    assert len(read_lines(tmp_path / "dense.jsonl")) == QUESTIONS


def test_sampling_is_repeated_by_its_seed(model, bench, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(arguments(model, bench, tmp_path / name, "--temperature", 1, "--top_p", 0.9, "--seed", seed))
    assert without_ids(tmp_path / "a") == without_ids(tmp_path / "b") != without_ids(tmp_path / "c")


def test_chunks_by_hand_cover_everything_and_one_past_the_end_is_empty(whole, model, bench, tmp_path):
    parts = []
    for index in range(5):
        path = tmp_path / f"{index}.jsonl"
        assert main(arguments(model, bench, path, "--num-chunks", 5, "--chunk-idx", index)) == 0
        parts.append(without_ids(path))
    assert [len(part) for part in parts] == [5, 5, 5, 5, 4]
    assert [answer for part in parts for answer in part] == without_ids(whole)
    assert chunk(list(range(4)), 5, 4) == []
    assert main(arguments(model, bench, tmp_path / "x", "--num-chunks", 23, "--chunk-idx", 13)) == 0
    assert (tmp_path / "x").read_text() == ""


def test_limit_can_be_raised_later(whole, model, bench, tmp_path):
    path = tmp_path / "a.jsonl"
    assert main(arguments(model, bench, path, "--limit", 3)) == 0
    assert without_ids(path) == without_ids(whole)[:3]
    assert main(arguments(model, bench, path)) == 0
    assert without_ids(path) == without_ids(whole)


# --- resuming ---


def test_a_finished_run_started_again_reads_no_weights_changes_nothing_and_says_so(
    whole, model, bench, no_weights, capsys
):
    before = whole.read_bytes()
    assert main(arguments(model, bench, whole)) == 0
    assert "Nothing to do: all 24 answers" in capsys.readouterr().out
    assert whole.read_bytes() == before


@pytest.mark.parametrize("torn", [b'{"question_id": "id1", "te', b"\0\0\0\0", b"\xff", b'{"question_id": 1}'])
def test_a_torn_last_line_is_discarded(whole, model, bench, tmp_path, torn):
    path = _copy(whole, tmp_path)
    lines = whole.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:10]) + torn)
    assert main(arguments(model, bench, path)) == 0
    assert without_ids(path) == without_ids(whole)
    assert path.read_bytes().startswith(b"".join(lines[:10]))  # not asked again


def test_a_torn_line_that_ends_in_a_newline_is_discarded_too(whole, model, bench, tmp_path):
    path = _copy(whole, tmp_path)
    path.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:10]) + b'{"que\n')
    assert main(arguments(model, bench, path)) == 0
    assert without_ids(path) == without_ids(whole)


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_written(whole, model, bench, tmp_path, no_weights):
    path = _copy(whole, tmp_path)
    lines = whole.read_bytes().splitlines(keepends=True)
    lines[6] = b'{"question_id"\n'
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match="line 7 is broken"):
        main(arguments(model, bench, path))
    assert path.read_bytes() == b"".join(lines)


def test_answers_in_any_order_and_in_shards_of_any_number_are_taken_up(whole, model, bench, tmp_path):
    path = _copy(whole, tmp_path)
    lines = whole.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[20:]))
    Path(f"{path}.shard-1").write_text("".join(reversed(lines[5:9])))
    Path(f"{path}.shard-7").write_text(lines[6] + lines[0] + lines[1][:20])
    Path(f"{path}.shard-x").write_text("the user's own")
    assert main(arguments(model, bench, path)) == 0
    assert without_ids(path) == without_ids(whole)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, f"{path.name}.run.json", f"{path.name}.shard-x"}


def _copy(whole: Path, folder: Path) -> Path:
    for suffix in ("", ".run.json"):
        shutil.copy(f"{whole}{suffix}", folder / f"{whole.name}{suffix}")
    return folder / whole.name


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--pruning-config", '{"mode": []}'), "pruning config: .*0.995.* there"),
        (("--max_new_tokens", 9), "max_new_tokens: 8 there, 9 now"),
        (("--dtype", "bfloat16"), "dtype: .*float32.* there, .*bfloat16.* now"),
        (("--conv-mode", "vicuna_v1"), "conversation template: .*llava_v1.* there"),
        (("--num-chunks", 2), r"chunk: \[0, 1\] there, \[0, 2\] now"),
    ],
)
def test_other_settings_are_refused_with_the_difference_named(whole, model, bench, no_weights, flags, named):
    with pytest.raises(UserError, match=named):
        main(arguments(model, bench, whole, *flags))


def test_another_model_or_question_file_is_refused(whole, model, bench, tmp_path, no_weights):
    other = write_model(tmp_path / "tiny-v1", seed=5)  # same name, same shapes, other weights
    with pytest.raises(UserError, match=r"another run.*model: "):
        main(arguments(other, bench, whole))
    moved = tmp_path / "moved"
    shutil.copytree(model, moved / "tiny-v1")
    assert main(arguments(moved / "tiny-v1", bench, whole)) == 0  # the same model in another place
    shutil.copytree(bench, tmp_path / "bench")
    questions = read_lines(bench / "questions.jsonl")
    questions[7]["text"] += " x"
    write_lines(tmp_path / "bench" / "questions.jsonl", questions)
    with pytest.raises(UserError, match="question file: "):
        main(arguments(model, tmp_path / "bench", whole))


def test_answers_of_unknown_origin_are_not_touched(model, bench, tmp_path, no_weights):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question_id": 1}\n')
    with pytest.raises(UserError, match="nothing beside it says what wrote it"):
        main(arguments(model, bench, path))
    assert path.read_text() == '{"question_id": 1}\n'


def test_an_answer_that_does_not_fit_its_question_is_found(whole, model, bench, tmp_path, no_weights):
    path = _copy(whole, tmp_path)
    answers = read_lines(whole)
    answers[2]["prompt"] = "something else"
    write_lines(path, answers)
    with pytest.raises(UserError, match="line 3 that does not fit"):
        main(arguments(model, bench, path))


def test_no_resume_moves_the_old_answers_aside(whole, model, bench, tmp_path):
    path = _copy(whole, tmp_path)
    old = path.read_bytes()
    assert main(arguments(model, bench, path, "--no-resume", "--limit", 2)) == 0
    assert len(read_lines(path)) == 2
    (backup,) = tmp_path.glob("answers.jsonl.bak-*")
    assert backup.read_bytes() == old
    assert main(arguments(model, bench, path, "--no-resume", "--limit", 2)) == 0
    assert len(list(tmp_path.glob("answers.jsonl.bak-*"))) == 2  # also within the same second


def test_two_runs_at_once_on_one_file_are_refused(whole, model, bench, tmp_path):
    path = _copy(whole, tmp_path)
    path.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:3]))
    with subprocess.Popen(
        [*program()[:1], "-c", f"import pathlib,time; from llava.eval.run_files import PartWriter; "
         f"w=PartWriter(pathlib.Path({str(path)!r})); print('locked',flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "locked\n"
        try:
            with pytest.raises(UserError, match="another run is writing"):
                main(arguments(model, bench, path))
        finally:
            other.kill()
    assert len(read_lines(path)) == 3


# --- killed and stopped ---

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["llava.eval.model_vqa_loader"])


def _child(argv, env):
    os.environ.update(env, HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    os._exit(main(argv))


def _start(argv, rank=0, world=1, port=0):
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = _SERVER.Process(target=_child, args=(argv, {key: str(value) for key, value in env.items()}))
    process.start()
    return process


def _written(answers: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in ShardedFile(answers, line_of_answer).parts())


def _kill_after(processes, answers: Path, new_lines: int, delay: float) -> None:
    """SIGKILL all once so many more lines are there (or they are through)."""
    goal, patience = _written(answers) + new_lines, time.monotonic() + 600
    while _written(answers) < goal and any(p.is_alive() for p in processes) and time.monotonic() < patience:
        time.sleep(0.002)
    time.sleep(delay)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def test_ten_kills_at_random_moments_and_then_a_whole_run(model, tmp_path):
    bench = write_benchmark(tmp_path / "b", 60, seed=3)
    assert main(arguments(model, bench, tmp_path / "whole.jsonl", "--batch-size", 8)) == 0
    path, rng = tmp_path / "a.jsonl", random.Random(7)
    trace = tmp_path / "trace.jsonl"
    argv = arguments(model, bench, path, "--batch-size", 2, "--num-workers", 1, "--trace-file", trace)
    kills = 0
    for _ in range(10):
        before = _written(path)
        _kill_after([_start(argv)], path, rng.randint(0, 4), rng.uniform(0, 0.05))
        kills += _written(path) < 60
        assert _written(path) >= before  # nothing that was answered is lost
    assert kills >= 9, "the run was over before the kills"
    assert main(argv) == 0
    assert without_ids(path) == without_ids(tmp_path / "whole.jsonl")
    assert [record["line"] for record in read_lines(trace)] == list(range(60))
    left = {p.name for p in tmp_path.iterdir()} - {"b", "whole.jsonl", "whole.jsonl.run.json"}
    assert left == {"a.jsonl", "a.jsonl.run.json", "trace.jsonl"}


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_begun_on_one_process_carried_on_by_three_ended_by_two(model, tmp_path):
    bench = write_benchmark(tmp_path / "b", 40, seed=4)
    assert main(arguments(model, bench, tmp_path / "whole.jsonl", "--batch-size", 8)) == 0
    path = tmp_path / "a.jsonl"
    argv = arguments(model, bench, path, "--trace-file", tmp_path / "trace.jsonl")
    _kill_after([_start(argv)], path, 5, 0)
    assert 5 <= _written(path) < 40
    port = _port()
    _kill_after([_start(argv, rank, 3, port) for rank in range(3)], path, 9, 0)
    assert Path(f"{path}.shard-1").exists() or Path(f"{path}.shard-2").exists()
    assert 14 <= _written(path) < 40
    ended = run(program(*argv, launcher=torchrun(2)))
    assert ended.returncode == 0, ended.stderr
    assert "40 of 40 answers" in ended.stdout
    assert without_ids(path) == without_ids(tmp_path / "whole.jsonl")
    assert [record["line"] for record in read_lines(tmp_path / "trace.jsonl")] == list(range(40))
    assert not list(tmp_path.glob("*.shard-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_batch_with_130_and_the_command_that_goes_on(model, tmp_path, number):
    bench = write_benchmark(tmp_path / "b", 400)
    path = tmp_path / "answers with space.jsonl"
    command = program(*arguments(model, bench, path, "--batch-size", 2, "--num-workers", 1))
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        # A shell's background jobs, these tests among them, may ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not (path.exists() and _written(path) >= 2) and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, number)  # as a terminal or a scheduler does it
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert (
        errors.rstrip().splitlines()[-1].endswith("--batch-size 2 --num-workers 1")
        and "'" in errors.rstrip().splitlines()[-1]
    )
    answers = read_lines(path)
    assert 2 <= len(answers) < 400 and len(answers) % 2 == 0
    assert sorted(map(line_of_answer, answers)) == list(range(len(answers)))


# --- what goes wrong ---


def test_an_unreadable_image_never_becomes_an_answer(whole, model, bench, tmp_path, capsys):
    broken = shutil.copytree(bench, tmp_path / "b")
    (broken / "images" / "2.png").write_bytes((bench / "images" / "2.png").read_bytes()[:60])
    (broken / "images" / "1.png").unlink()
    path = tmp_path / "a.jsonl"
    argv = arguments(model, broken, path, "--batch-size", 3)
    assert main(argv) == 1
    errors = capsys.readouterr().err
    # images 1 and 2 of 0 … 3; question 5 is a copy of 4, which has image 0
    expected = [i for i in range(QUESTIONS) if i % 4 not in (1, 2) or i == 5]
    assert [line_of_answer(answer) for answer in read_lines(path)] == expected
    assert f"{QUESTIONS - len(expected)} questions could not be asked" in errors
    assert "line 2 (id0)" in errors and "line 3 (id1)" in errors and "1.png" in errors
    assert main([*argv, "--on-error", "skip"]) == 0
    shutil.copytree(bench / "images", broken / "images", dirs_exist_ok=True)
    assert main(argv) == 0
    assert without_ids(path) == without_ids(whole)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../secret.png", "..", "", ".", "x\0y"])
def test_image_paths_that_leave_the_folder_are_refused(model, bench, tmp_path, no_weights, name):
    shutil.copytree(bench / "images", tmp_path / "images")
    (tmp_path / "secret.png").write_bytes((bench / "images" / "0.png").read_bytes())
    write_lines(tmp_path / "questions.jsonl", [{"question_id": 1, "image": name, "text": "what"}])
    with pytest.raises(UserError, match=r"question 1: the path .* leads out of"):
        main(arguments(model, tmp_path, tmp_path / "a.jsonl"))
    assert not (tmp_path / "a.jsonl").exists()


def test_a_url_in_a_question_file_is_a_file_name_and_is_not_fetched(model, bench, tmp_path):
    shutil.copytree(bench / "images", tmp_path / "images")
    lines = [{"question_id": 1, "image": image, "text": "w1"} for image in ("0.png", "http://127.0.0.1:9/x.png")]
    write_lines(tmp_path / "questions.jsonl", lines)
    assert main(arguments(model, tmp_path, tmp_path / "a.jsonl")) == 1
    assert len(read_lines(tmp_path / "a.jsonl")) == 1


def test_empty_question_file(model, bench, tmp_path, no_weights):
    shutil.copytree(bench / "images", tmp_path / "images")
    (tmp_path / "questions.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no questions"):
        main(arguments(model, tmp_path, tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"question_id": 1, "text": "x"', "line 3: not valid JSON"),
        ("[1]", "line 3: a JSON object was expected"),
        ('{"text": "x"}', 'question 3: "question_id"'),
        ('{"question_id": 1}', 'question 3: "text"'),
        ('{"question_id": 1, "text": "x", "image": 5}', 'question 3: "image"'),
    ],
)
def test_a_broken_question_line_is_named(model, bench, tmp_path, no_weights, line, named):
    shutil.copytree(bench / "images", tmp_path / "images")
    first = (bench / "questions.jsonl").read_text().splitlines()[:2]
    (tmp_path / "questions.jsonl").write_text("\n".join([*first, line]) + "\n")
    with pytest.raises(UserError, match=named):
        main(arguments(model, tmp_path, tmp_path / "a.jsonl"))


def test_a_question_without_an_image_is_asked_as_text_alone(whole, bench):
    assert "image" not in read_lines(bench / "questions.jsonl")[3]
    assert read_lines(whole)[3]["text"]
    assert read_lines(whole.with_name("trace.jsonl"))[3]["visual_tokens"] == 0


def test_a_prompt_longer_than_the_context_is_listed_not_answered(model, bench, tmp_path, capsys):
    shutil.copytree(bench / "images", tmp_path / "images")
    questions = read_lines(bench / "questions.jsonl")[:3]
    questions[1]["text"] = "w1 " * 600
    write_lines(tmp_path / "questions.jsonl", questions)
    assert main(arguments(model, tmp_path, tmp_path / "a.jsonl", "--batch-size", 3)) == 1
    assert "line 2 (id0): the prompt has" in capsys.readouterr().err
    assert [line_of_answer(answer) for answer in read_lines(tmp_path / "a.jsonl")] == [0, 2]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--pruning-config", "{"), "not valid JSON"),
        (("--pruning-config", '{"mode": ["middle"], "layer": 1}'), "unknown key 'layer'"),
        (("--pruning-config", json.dumps({**PRUNING, "shallow_mid_layer": 4})), "4 layers"),
        (("--model-path", "/nowhere"), "/nowhere does not exist"),
        (("--question-file", "/nowhere.jsonl"), "cannot read /nowhere.jsonl"),
        (("--image-folder", "/nowhere"), "/nowhere does not exist"),
        (("--batch-size", 0), "--batch-size is 0"),
        (("--limit", 0), "--limit is 0"),
        (("--num-chunks", 2, "--chunk-idx", 2), "--chunk-idx 2"),
        (("--temperature", -1), "temperature is -1"),
        (("--num_beams", 0), "num_beams is 0"),
        (("--max_new_tokens", 0), "max_new_tokens is 0"),
        (("--dtype", "int8"), "int8"),
        (("--device", "tpu"), "tpu"),
        (("--conv-mode", "nonesuch"), "nonesuch"),
        (("--batch-size", "many"), "invalid int"),
        (("--answers-file", "/proc/nowhere/a.jsonl"), "cannot write /proc"),
        (("--answers-file", "/dev/null/a.jsonl"), "cannot write /dev/null"),
    ],
)
def test_bad_input_is_one_error_before_weights_are_read(model, bench, tmp_path, no_weights, flags, named):
    with pytest.raises(UserError, match=named):
        main(arguments(model, bench, tmp_path / "a.jsonl", *flags))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(model, bench, tmp_path, no_weights):
    with pytest.raises(UserError, match="sees no CUDA GPU"):
        main(arguments(model, bench, tmp_path / "a.jsonl", "--device", "cuda"))


def test_on_the_command_line_an_error_is_one_line_and_code_2(model, bench, tmp_path):
    ended = run(program(*arguments(model, bench, tmp_path / "a.jsonl", "--pruning-config", '{"mode": ["odd"]}')))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


def test_a_full_disk_keeps_what_was_written_and_the_run_goes_on_later(whole, model, bench, tmp_path):
    path = tmp_path / "a.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # files may not grow further: the same as no space
    try:
        with pytest.raises(UserError, match=r"cannot write .*a\.jsonl: .*The answers before this batch are safe"):
            main(arguments(model, bench, path, "--batch-size", 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = read_lines(path)  # whole lines only
    assert 2 <= len(kept) < QUESTIONS
    assert main(arguments(model, bench, path)) == 0
    assert without_ids(path) == without_ids(whole)
    assert read_lines(path)[: len(kept)] == kept


def test_out_of_memory_halves_the_batch_goes_on_and_says_so(whole, model, bench, tmp_path, monkeypatch, capsys):
    sizes = []
    answer_batch = LoadedModel.answer_batch

    def with_little_memory(self, prompts, *args, **kwargs):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return answer_batch(self, prompts, *args, **kwargs)

    monkeypatch.setattr(LoadedModel, "answer_batch", with_little_memory)
    assert main(arguments(model, bench, tmp_path / "a.jsonl", "--batch-size", 8)) == 0
    assert without_ids(tmp_path / "a.jsonl") == without_ids(whole)
    assert sizes == [8, 4, *[2] * 12]
    assert "batches of 2 instead of 8" in capsys.readouterr().err


def test_out_of_memory_for_a_single_question_is_not_hidden(model, bench, tmp_path, monkeypatch):
    def without_memory(self, prompts, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LoadedModel, "answer_batch", without_memory)
    with pytest.raises(torch.OutOfMemoryError):
        main(arguments(model, bench, tmp_path / "a.jsonl", "--batch-size", 4))


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory(model, bench, tmp_path, monkeypatch):
    calls = []

    def broken(self, prompts, *args, **kwargs):
        calls.append(len(prompts))
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(LoadedModel, "answer_batch", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        main(arguments(model, bench, tmp_path / "a.jsonl", "--batch-size", 4))
    assert calls == [4]
