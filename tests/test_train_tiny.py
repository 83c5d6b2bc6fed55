"""The training of the shipped model: what it trains is the model that is exported, and it learns."""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from tiny_llava import train as training
from tiny_llava.data import Encoder, _stack, easy_batches, held_out_batch, picture_batch
from tiny_llava.easyvqa import easy_by_image, easy_labels, easy_picture
from tiny_llava.evaluate import evaluate, interval, logits_of
from tiny_llava.export import export
from tiny_llava.measure import Sample, Shipped, easy_samples, paired_difference, rendered_samples, score
from tiny_llava.model import Learner
from tiny_llava.questions import INSTRUCTION
from tiny_llava.renderer import COLORS, SHAPES
from tiny_llava.tokenizer import build_tokenizer, prompt
from tiny_llava.train import Run, Stage

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.utils import fast_autocast, fast_dtype

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(build_tokenizer())


def test_any_text_can_be_typed_and_read_back(encoder: Encoder) -> None:
    for text in ("Is there a café? 東京 🙂", "  two  spaces\n\nand lines\t", f"What?\n{INSTRUCTION}", "k7q, X2."):
        ids = encoder.tokenizer(text, add_special_tokens=False).input_ids
        assert encoder.tokenizer.decode(ids) == text
        assert encoder.tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("question", ["What is the red shape?", "What is written?\nReference OCR token: k7q, 3x", "Hm"])
def test_training_rows_are_the_prompts_ids(encoder: Encoder, question: str) -> None:
    asked = f"{question}\n{INSTRUCTION}"
    whole = tokenizer_image_token(prompt(asked, "k7"), encoder.tokenizer)
    place = whole.index(IMAGE_TOKEN_INDEX)
    ids, targets = encoder.turn(((asked, "k7"),))
    assert whole[:place] == encoder.before
    assert whole[place + 1 :] == [*ids, encoder.tokenizer.eos_token_id]
    unanswered = tokenizer_image_token(prompt(asked), encoder.tokenizer)
    assert whole[: len(unanswered)] == unanswered
    said = [target for target in targets if target != -100]
    assert encoder.tokenizer.decode(said).strip() == "k7</s>"


def test_the_prompt_around_the_picture_has_at_most_45_rows(encoder: Encoder) -> None:
    for sample in rendered_samples("validation", 40):
        if sample.task != "text_ocr":
            assert len(tokenizer_image_token(prompt(sample.question), encoder.tokenizer)) - 1 <= 45


def test_labels_of_easy_vqa_agree_with_its_answers() -> None:
    for image, asked in easy_by_image("test")[:200]:
        labels = easy_labels(easy_picture("test", image))
        (shape,), (color,) = (set(labels[:, part].tolist()) - {0} for part in (0, 1))
        for _, answer in asked:
            if answer in SHAPES:
                assert answer == SHAPES[shape - 1]
            elif answer in COLORS:
                assert answer == list(COLORS)[color - 1]


def test_trained_and_exported_model_are_the_same(encoder: Encoder, tmp_path: Path) -> None:
    """Questions packed behind one picture get the logits that the loaded checkpoint gives each alone."""
    torch.manual_seed(0)
    learner = Learner(len(encoder.tokenizer)).eval()
    with torch.no_grad():  # so that the float16 file holds exactly what is compared
        for parameter in learner.parameters():
            parameter.copy_(parameter.half().float())
    export(learner, encoder.tokenizer, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 8_000_000
    samples = rendered_samples("validation", 1)[:5]
    batch = held_out_batch(encoder, 0, 1)
    before = torch.tensor(encoder.before)
    with torch.no_grad():
        packed = logits_of(learner, before, batch)[0][0]
    shipped = Shipped(str(tmp_path))
    for number, sample in enumerate(samples, start=1):
        rows, _ = encoder.turn(((sample.question, sample.answer),))
        ids = torch.tensor([[*encoder.before, IMAGE_TOKEN_INDEX, *rows]])
        images = process_images([sample.picture], shipped.processor, shipped.model.config)
        with torch.no_grad():
            alone = shipped.model(ids, images=images).logits[0, -len(rows) :]
        assert torch.allclose(packed[batch.segments[0] == number], alone, atol=1e-4)


def test_generated_answers_agree_with_teacher_forcing(encoder: Encoder, tmp_path: Path) -> None:
    """`evaluate` counts an answer as right exactly where greedy generation gives it."""
    stage = Stage("joint", 6, 4, 3e-3, easy=1.0)
    run = Run(tmp_path / "run", (stage,))
    run.report = lambda batches: {}  # type: ignore[assignment,misc]
    run.run(every=1e9)
    export(run.learner, run.tokenizer, tmp_path / "model")
    shipped = Shipped(str(tmp_path / "model"))
    batches = list(easy_batches(encoder, "test", 4, limit=4))
    right, asked = evaluate(run.learner, run.before, batches)["easy-VQA"]
    samples = easy_samples(4)
    generated = score(samples, shipped.answer(samples)[0])["easy-VQA"]
    assert generated[1] == asked == len(samples)
    assert abs(generated[0] - right) <= 1  # training's bfloat16 may turn a tie


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    stages = (Stage("tower", 3, 2, 1e-3), Stage("language", 2, 2, 1e-3), Stage("joint", 2, 2, 1e-3))
    whole = Run(tmp_path / "whole", stages)
    report, whole.report = whole.report, lambda batches: report(1)  # type: ignore[assignment,misc]
    whole.run(every=1e9)
    Run(tmp_path / "parts", stages[:2]).run(every=1e9)
    resumed = Run(tmp_path / "parts", stages)
    assert resumed.stage == 2
    resumed.report = lambda batches: {}  # type: ignore[assignment,misc]  # what is measured disturbs nothing
    resumed.run(every=1e9)
    for name, value in whole.learner.state_dict().items():
        assert torch.equal(value, resumed.learner.state_dict()[name]), name


@pytest.mark.parametrize(("instructions", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_computes_in_bfloat16_only_where_the_processor_has_instructions_for_it(
    monkeypatch, instructions, dtype
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    assert fast_dtype(cpu) == dtype
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fast_autocast(cpu):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_stages_train_what_they_say(tmp_path: Path) -> None:
    run = Run(tmp_path, (Stage("align", 1, 2, 1e-2),))
    before = {name: value.clone() for name, value in run.learner.state_dict().items()}
    run.report = lambda batches: {}  # type: ignore[assignment,misc]
    run.run(every=1e9)
    changed = {name for name, value in run.learner.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".multi_modal_projector." in name for name in changed)


def test_blind_layers_hide_the_picture_from_questions_alone(encoder: Encoder) -> None:
    torch.manual_seed(0)
    learner = Learner(len(encoder.tokenizer)).eval()
    before = torch.tensor(encoder.before)
    batch = held_out_batch(encoder, 0, 2)
    swapped = _stack(
        [np.stack([getattr(batch, name)[k] for name in ("ids", "segments", "places", "targets")]) for k in range(2)],
        batch.tasks,
        pixels=list(batch.pixels.flip(0).numpy()),
        labels=list(batch.labels.numpy()),
    )
    everywhere = range(12)
    with torch.no_grad():
        one, other = (logits_of(learner, before, each, everywhere)[0] for each in (batch, swapped))
        seeing = logits_of(learner, before, swapped)[0]
    asked = batch.segments > 0
    assert torch.equal(one[asked], other[asked])
    assert not torch.allclose(other[asked], seeing[asked])


def test_naming_losses_look_at_the_rows_and_patches_they_should(encoder: Encoder) -> None:
    """Read back from ids and labels alone: the words up to the row, and what the patches are labelled."""
    batch = picture_batch(encoder, random.Random(0), 12, easy=0.0)
    found = batch.mentions
    assert found is not None and found.patches is not None and batch.labels is not None
    written = nouns = 0
    for number, (sample, row) in enumerate(found.where.tolist()):
        same = (batch.segments[sample] == batch.segments[sample, row]).nonzero()[:, 0]
        said = encoder.tokenizer.decode(batch.ids[sample, int(same[0]) : row + 1])
        labels = batch.labels[sample][found.patches[number]]
        if found.written[number]:
            assert said.endswith("ASSISTANT:")
            assert set(labels[:, 0].tolist()) == {len(SHAPES) + 1}
            written += 1
            continue
        *_, color, noun = ["", *said.split()]
        shape = next((name for name in SHAPES if noun in (name, f"{name}s", f"{name}es")), None)
        if shape:
            assert set(labels[:, 0].tolist()) <= {SHAPES.index(shape) + 1}
            assert (found.labels[number, 0] == 0) == (len(labels) == 0)
            nouns += 1
        if shape and color in COLORS:
            assert set(labels[:, 1].tolist()) <= {list(COLORS).index(color) + 1}
    assert written > 5
    assert nouns > 20


def test_interval_is_wilsons() -> None:
    low, high = interval(8, 10)  # 0.4902 … 0.9433, Wilson (1927) without continuity correction
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)


def test_paired_difference_counts_what_changes() -> None:
    samples = [Sample(Image.new("RGB", (1, 1)), "", "yes", "color")] * 100
    before = ["yes"] * 60 + ["no"] * 40
    after = ["no"] * 10 + ["yes"] * 54 + ["no"] * 36  # ten become wrong, four right
    cost = paired_difference(samples, before, after)
    assert (cost["points_lost"], cost["lost"], cost["won"]) == (6.0, 10, 4)
    assert cost["interval95"] == [-1.24, 13.24]  # 6 ± 1.96 · sqrt((0.14 − 0.06²) / 100), in points


@pytest.mark.slow
@pytest.mark.timeout(3600)  # its bound is its steps, on a machine of any speed
def test_smoke_run_learns(tmp_path: Path) -> None:
    """The whole program, in little: the answers' loss at least halves, easy-VQA goes from nothing to over 30 %."""
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train_tiny.py"),
        "--smoke",
        "--every",
        "1e9",
        "--out",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [entry["answer"] for entry in entries if "answer" in entry]
    assert losses[-1] < losses[0] / 2
    run = Run(tmp_path, training.CURRICULA["smoke"])
    right, asked = evaluate(run.learner, run.before, easy_batches(run.encoder, "test", 8, limit=32))["easy-VQA"]
    assert right / asked > 0.3
