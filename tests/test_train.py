"""The three stages on a tiny random LLaVA: what they learn, write, resume and refuse."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_checkpoints import (
    DECODER,
    VOCAB,
    original_weights,
    tiny_model,
    tiny_tokenizer,
    write_json,
    write_original,
    write_tower,
    write_weights,
)
from torch.nn import functional as F

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import build_prompt
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model import builder
from llava.model.builder import load_for_training, load_pretrained_model
from llava.train import train as train_module
from llava.train.arguments import parse
from llava.train.data import ConversationDataset, collate, place_pictures, read_samples, split
from llava.train.train import train
from llava.train.trainer import ModalitySampler
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts" / "v1_5"
PATCHES = 4  # rows of a picture
COLORS = ("red", "blue")


def said(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A language model, a tower, a whole LLaVA of the same weights, pictures, captions and questions."""
    root = tmp_path_factory.mktemp("parts")
    model = tiny_model()
    write_tower(root / "tower", model)
    write_original(root / "llava", model)
    (root / "lm").mkdir()
    write_json(root / "lm" / "config.json", {**DECODER, "model_type": "llama"})
    inside = ("vision_tower", "mm_projector")
    weights = {name: own for name, own in original_weights(model).items() if not any(part in name for part in inside)}
    write_weights(root / "lm", weights)
    tiny_tokenizer().save_pretrained(root / "lm")
    (root / "images").mkdir()
    captions, questions = [], []
    for number in range(24):
        color, name = COLORS[number % 2], f"{number}.png"
        Image.new("RGB", (40, 30), color).save(root / "images" / name)
        sample = {"id": f"s{number}", "image": name}
        captions.append({**sample, "conversations": said("<image>", f"a {color} cat")})
        turns = ["what is this\n<image>", f"a {color} cat", "what is a cat", color][: 2 + 2 * (number % 3 == 0)]
        questions.append({**sample, "conversations": said(*turns)})
    two = {"id": "two", "image": ["0.png", "1.png"], "conversations": said("<image> what is <image>", "red blue")}
    none = [{"id": f"text{number}", "conversations": said("what is a cat", "red")} for number in range(5)]
    write_json(root / "captions.json", captions)
    write_json(root / "questions.json", [*questions, two, *none])
    return root


def command(parts: Path, out: Path, *flags: str, model: str = "lm") -> list[str]:
    settings = {
        "model_name_or_path": parts / model,
        "data_path": parts / "questions.json",
        "image_folder": parts / "images",
        "output_dir": out,
        "version": "v1",
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "max_steps": 4,
        "save_steps": 2,
        "disable_tqdm": True,
    }
    if model == "lm":
        settings["vision_tower"] = parts / "tower"
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))] + list(flags)


PROJECTOR = ("--tune_mm_mlp_adapter", "True", "--version", "plain")
LORA = ("--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--mm_projector_lr", "1e-3")
STAGES = {"projector": PROJECTOR, "lora": LORA, "full": ()}
TRAINED = {
    "projector": {"model.multi_modal_projector"},
    "lora": {"model.multi_modal_projector", "lora"},
    "full": {"model.multi_modal_projector", "model.language_model", "lm_head"},
}


def data_of(stage: str, parts: Path) -> tuple[str, ...]:
    return ("--data_path", str(parts / "captions.json")) if stage == "projector" else ()


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    """Every stage trained once: its trainer, its folder and the weights it began with."""
    found = {}
    for stage, flags in STAGES.items():
        out = tmp_path_factory.mktemp("trained") / f"tiny-{stage}"
        before = {}

        def kept(*args, before=before, **kwargs):
            loaded = load_for_training(*args, **kwargs)
            before.update({name: own.detach().clone() for name, own in loaded[1].named_parameters()})
            return loaded

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_module, "load_for_training", kept)
            trainer = train(*parse(command(parts, out, *flags, *data_of(stage, parts))))
        found[stage] = trainer, out, before
    return found


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def logits_of(model, tokenizer, image_processor, parts: Path) -> torch.Tensor:
    prompt = build_prompt("v1", [("<image>\nwhat is this", None)])
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = process_images([Image.open(parts / "images" / "1.png")], image_processor, model.config)
    with torch.no_grad():
        return model.eval()(input_ids=ids, images=pixels).logits


# --- the loss ---


def test_fifty_steps_equal_a_plain_loop_over_the_same_batches(parts, tmp_path) -> None:
    flags = ("--max_steps", "50", "--train_sampling_strategy", "sequential", "--lr_scheduler_type", "constant")
    train(*parse(command(parts, tmp_path / "out", *flags, "--save_strategy", "no", model="llava")))

    tokenizer, model, image_processor, _ = load_pretrained_model(parts / "llava", device="cpu")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    samples = read_samples(parts / "questions.json", parts / "images")
    dataset = ConversationDataset(samples, "v1", tokenizer, image_processor, model, 512)
    epoch = [range(len(samples))[start : start + 4] for start in range(0, len(samples), 4)]
    wanted = []
    for batch in (epoch * 10)[:50]:
        terms, count = [], 0
        for number in batch:  # one sample at a time: no padding
            sample = dataset[number]
            images = torch.stack(sample["images"]) if sample["images"] else None
            logits = model(input_ids=sample["input_ids"][None], images=images).logits[0]
            labels = []
            for token, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
                labels += [IGNORE_INDEX] * PATCHES if token == IMAGE_TOKEN_INDEX else [label]
            targets = torch.tensor(labels[1:])
            terms.append(F.cross_entropy(logits[:-1], targets, ignore_index=IGNORE_INDEX, reduction="sum"))
            count += int((targets != IGNORE_INDEX).sum())
        loss = sum(terms) / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        wanted.append(loss.item())
    own = losses(tmp_path / "out")
    assert len(own) == 50
    assert own[-1] < 0.5 * own[0]
    torch.testing.assert_close(torch.tensor(own), torch.tensor(wanted), atol=1e-5, rtol=0)


def test_accumulated_steps_equal_a_batch_taken_at_once(parts, tmp_path) -> None:
    order = ("--train_sampling_strategy", "sequential", "--save_strategy", "no", "--max_steps", "2")
    train(*parse(command(parts, tmp_path / "a", *order, model="llava")))
    accumulated = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4")
    train(*parse(command(parts, tmp_path / "b", *order, *accumulated, model="llava")))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)


def test_gradient_checkpointing_changes_nothing(parts, tmp_path) -> None:
    for name, flag in (("a", "False"), ("b", "True")):
        flags = (*LORA, "--lora_dropout", "0", "--gradient_checkpointing", flag, "--max_steps", "2")
        train(*parse(command(parts, tmp_path / name, *flags)))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-6)


def test_bfloat16_trains_float32_weights(parts, tmp_path) -> None:
    flags = (*LORA, "--bf16", "True", "--use_cpu", "True", "--max_steps", "2")
    trainer = train(*parse(command(parts, tmp_path / "out", *flags)))
    dtypes = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


# --- the stages ---


@pytest.mark.parametrize("stage", STAGES)
def test_only_what_a_stage_names_changes(stage, trained) -> None:
    trainer, _, before = trained[stage]
    changed = set()
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            changed |= {"lora"} if "lora_B" in name and parameter.any() else set()
            continue
        name = name.removeprefix("base_model.model.").replace("base_layer.", "")
        if not torch.equal(parameter, before[name]):
            changed.add(next(part for part in (*TRAINED["full"], "model.vision_tower") if name.startswith(part)))
    assert changed == TRAINED[stage]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("part", ["", "checkpoint-4"])
def test_what_a_stage_writes_loads_and_answers(stage, part, trained, parts) -> None:
    trainer, out, _ = trained[stage]
    folder = out / part
    base = None if stage == "full" else parts / "lm"
    tokenizer, model, image_processor, _ = load_pretrained_model(
        folder, base, get_model_name_from_path(str(folder)), device="cpu"
    )
    expected = logits_of(trainer.model, tokenizer, image_processor, parts)
    torch.testing.assert_close(
        logits_of(model, tokenizer, image_processor, parts), expected, atol=1e-4, rtol=0
    )  # LoRA merged equals LoRA beside
    prompt = tokenizer_image_token(build_prompt("v1", [("what is a cat", None)]), tokenizer, return_tensors="pt")
    assert model.generate(prompt[None], max_new_tokens=2, do_sample=False).shape[1] in (1, 2)


def test_names_of_files_and_weights_are_llavas(trained) -> None:
    projector = torch.load(trained["projector"][1] / "mm_projector.bin", weights_only=True)
    assert set(projector) == {f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    assert (trained["projector"][1] / "mm_projector.safetensors").is_file()
    extras = torch.load(trained["lora"][1] / "non_lora_trainables.bin", weights_only=True)
    assert set(extras) == {f"base_model.model.{name}" for name in projector}
    config = json.loads((trained["lora"][1] / "config.json").read_text())
    assert (config["conv_mode"], config["mm_projector_type"], config["image_aspect_ratio"]) == (
        "v1",
        "mlp2x_gelu",
        "pad",
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one(stage, trained, parts, tmp_path) -> None:
    trainer, out, _ = trained[stage]
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(out / "checkpoint-2", resumed / "checkpoint-2")
    again = train(*parse(command(parts, resumed, *STAGES[stage], *data_of(stage, parts))))
    assert losses(resumed) == losses(out)
    for own, whole in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(own, whole)


def test_the_second_stage_starts_from_the_projector_of_the_first(trained, parts, tmp_path) -> None:
    file = trained["projector"][1] / "mm_projector.bin"
    flags = (*LORA, "--pretrain_mm_mlp_adapter", str(file), "--freeze_mm_mlp_adapter", "True", "--max_steps", "1")
    train(*parse(command(parts, tmp_path / "out", *flags)))
    extras = torch.load(tmp_path / "out" / "non_lora_trainables.bin", weights_only=True)
    for name, weight in torch.load(file, weights_only=True).items():
        assert torch.equal(extras[f"base_model.model.{name}"], weight)


def test_merged_weights_are_a_whole_checkpoint(trained, parts, tmp_path, monkeypatch) -> None:
    call = [ROOT / "scripts" / "merge_lora_weights.py", "--model-path", trained["lora"][1]]
    call += ["--model-base", parts / "lm", "--save-model-path", tmp_path / "merged"]
    monkeypatch.setattr(sys, "argv", list(map(str, call)))
    for status in (0, 2):  # it overwrites nothing
        with pytest.raises(SystemExit) as end:
            runpy.run_path(sys.argv[0], run_name="__main__")
        assert end.value.code == status
    tokenizer, model, image_processor, _ = load_pretrained_model(tmp_path / "merged", device="cpu")
    expected = logits_of(trained["lora"][0].model, tokenizer, image_processor, parts)
    torch.testing.assert_close(logits_of(model, tokenizer, image_processor, parts), expected, atol=1e-4, rtol=0)


def test_the_projectors_learning_rate_is_its_own(trained) -> None:
    trainer = trained["lora"][0]
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates.setdefault("projector" if "projector" in names[id(parameter)] else "lora", set()).add(
                group["initial_lr"]
            )
    assert rates == {"projector": {1e-3}, "lora": {3e-3}}


def test_pruned_training_learns_and_prunes(parts, tmp_path) -> None:
    config = json.dumps({"method": "random", "keep": 1, "layer": 1})
    trainer = train(*parse(command(parts, tmp_path / "out", "--pruning_config", config, "--max_steps", "6")))
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    traces = trainer.model.last_pruning_traces
    with_picture = [trace for trace in traces if trace.num_visual == PATCHES]
    assert with_picture
    for trace in with_picture:
        assert trace.rows_per_layer == [trace.num_rows, *[trace.num_rows - PATCHES + 1] * 2]


def test_held_out_loss_is_logged(parts, tmp_path) -> None:
    trainer = train(*parse(command(parts, tmp_path / "out", "--eval_fraction", "0.2", "--max_steps", "2")))
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert len(trainer.eval_dataset) == 6


def test_a_batch_without_pictures_comes_by_the_projector_in_distributed_training(parts, monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = tiny_model().train()
    ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.model.mm_projector.parameters())
    monkeypatch.undo()
    assert torch.equal(model(input_ids=ids).logits, tiny_model().train()(input_ids=ids).logits)


# --- the data ---


def test_bad_samples_are_named_and_skipped_or_refused(parts, tmp_path, caplog) -> None:
    good = {"id": "good", "conversations": said("what is this", "a cat")}
    bad = {
        "no picture": {"image": "nowhere.png", "conversations": said("<image>", "a cat")},
        "no answer": {"conversations": said("what is this")},
        "no slot": {"image": "0.png", "conversations": said("what is this", "a cat")},
        "same twice": {
            "conversations": [*said("a", "b"), {"from": "gpt", "value": "c"}, {"from": "gpt", "value": "d"}]
        },
        "no text": {"conversations": [{"from": "human"}, {"from": "gpt", "value": "c"}]},
        "nothing": {},
    }
    file = tmp_path / "data.json"
    write_json(file, [good, *({"id": name, **entry} for name, entry in bad.items())])
    with caplog.at_level("WARNING", logger="llava.train"):
        samples = read_samples(file, parts / "images")
    assert [sample.name for sample in samples] == ["good"]
    assert all(name in caplog.text for name in bad)
    with pytest.raises(
        UserError, match="6 samples cannot be used; the first, no picture: a picture that does not exist"
    ):
        read_samples(file, parts / "images", skip_bad=False)
    write_json(file, [bad["nothing"]])
    with pytest.raises(UserError, match="no sample that can be used"):
        read_samples(file)


def test_the_data_that_ships_can_be_used_as_a_whole() -> None:
    folder = ROOT / "playground" / "data" / "train"
    for file, turns in (("captions.json", 1), ("questions.json", 4)):
        samples = read_samples(folder / file, folder / "images", skip_bad=False)
        assert len(samples) == len(json.loads((folder / file).read_text())) > 150
        assert max(len(sample.turns) for sample in samples) == turns


def test_json_lines_are_read_too(tmp_path) -> None:
    file = tmp_path / "data.jsonl"
    lines = [json.dumps({"id": number, "conversations": said("what", "cat")}) for number in range(3)]
    file.write_text("\n".join(lines))
    assert [sample.name for sample in read_samples(file)] == ["0", "1", "2"]


def dataset_of(parts: Path, samples: list, max_rows: int = 512, skip_bad: bool = True) -> ConversationDataset:
    tokenizer, model, image_processor, _ = load_pretrained_model(parts / "llava", device="cpu")
    return ConversationDataset(samples, "v1", tokenizer, image_processor, model, max_rows, skip_bad)


def test_an_unreadable_picture_gives_way_to_the_next_sample(parts, tmp_path, caplog) -> None:
    (tmp_path / "broken.png").write_bytes((parts / "images" / "0.png").read_bytes()[:40])
    shutil.copy(parts / "images" / "1.png", tmp_path / "whole.png")
    entries = [{"id": n, "image": f"{n}.png", "conversations": said("<image>", "a cat")} for n in ("broken", "whole")]
    write_json(tmp_path / "data.json", entries)
    samples = read_samples(tmp_path / "data.json", tmp_path)
    dataset = dataset_of(parts, samples)
    with caplog.at_level("WARNING", logger="llava.train"):
        assert torch.equal(dataset[0]["images"][0], dataset[1]["images"][0])
    assert "broken" in caplog.text
    assert dataset.report() == "1 samples unreadable and skipped: broken"
    with pytest.raises(UserError, match="sample broken cannot be used"):
        dataset_of(parts, samples, skip_bad=False)[0]


def test_long_samples_are_cut_by_rows_and_counted(parts) -> None:
    samples = read_samples(parts / "questions.json", parts / "images")
    whole = dataset_of(parts, samples)[0]
    rows = len(whole["input_ids"]) + PATCHES - 1
    dataset = dataset_of(parts, samples, max_rows=rows - 2)
    assert torch.equal(dataset[0]["input_ids"], whole["input_ids"][:-2])
    assert dataset.report() == "1 samples cut to --model_max_length: s0"


def test_several_pictures_stay_in_their_places_and_one_comes_first() -> None:
    assert place_pictures("what is\n<image>", None) == "<image>\nwhat is"
    assert place_pictures("<image>", None) == "<image>"
    assert place_pictures("<image> or <image>?", None) == "<image> or <image>?"


def test_a_batch_mixes_pictures_and_none(parts) -> None:
    samples = {s.name: n for n, s in enumerate(read_samples(parts / "questions.json", parts / "images"))}
    dataset = dataset_of(parts, read_samples(parts / "questions.json", parts / "images"))
    batch = collate([dataset[samples[name]] for name in ("two", "text0", "s3")])
    assert (batch["input_ids"] == IMAGE_TOKEN_INDEX).sum(1).tolist() == [2, 0, 1]
    assert batch["images"].shape == (3, 3, 28, 28)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all()
    assert "images" not in collate([dataset[samples["text0"]]])


def test_held_out_samples_are_drawn_by_seed(parts) -> None:
    samples = read_samples(parts / "captions.json", parts / "images")
    train_part, held_out = split(samples, 0.25, seed=1)
    assert (len(train_part), len(held_out)) == (18, 6)
    assert split(samples, 0.25, seed=1)[1] == held_out != split(samples, 0.25, seed=2)[1]


def test_batches_by_modality_and_length() -> None:
    lengths = torch.randint(1, 100, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    pictures = [number % 3 != 0 for number in range(50)]
    sampler = ModalitySampler(lengths, pictures, batch_size=8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(50))
    whole = [order[start : start + 8] for start in range(0, 48, 8)]
    assert sum(len({pictures[number] for number in batch}) == 1 for batch in whole) >= 5  # the last mixes what is left
    assert all([lengths[n] for n in batch] == sorted((lengths[n] for n in batch), reverse=True) for batch in whole)
    sampler.set_epoch(1)
    assert list(sampler) != order


# --- what is refused ---


REFUSED = {
    "a finished model": (("--output_dir", "{llava}"), "holds a finished model"),
    "a missing model": (("--model_name_or_path", "/no/such"), "/no/such does not exist"),
    "no tower": (("--vision_tower", ""), "name the vision tower"),
    "missing data": (("--data_path", "/no/data.json"), "cannot read training data /no/data.json"),
    "missing pictures": (("--image_folder", "/no/pictures"), "is no folder"),
    "an unknown template": (("--version", "v7"), "unknown conversation template 'v7'"),
    "4 bits without LoRA": (("--bits", "4"), "needs --lora_enable"),
    "an unknown method": (("--pruning_config", '{"method": "visionzip"}'), "'visionzip' cannot be trained with"),
    "pruning with checkpointing": (
        ("--pruning_config", '{"method": "random"}', "--gradient_checkpointing", "True"),
        "exclude each other",
    ),
    "evaluation of nothing": (("--evaluation_strategy", "steps"), "--eval_data_path or --eval_fraction"),
    "a projector of another size": (
        ("--mm_projector_type", "mlp3x_gelu", "--pretrain_mm_mlp_adapter", "{bin}"),
        "missing",
    ),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_before_weights_are_read(flags, message, parts, trained, tmp_path, monkeypatch) -> None:
    class Reads:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            raise AssertionError("weights were read")

    monkeypatch.setattr(builder.model_class(tiny_model().config), "from_pretrained", Reads.from_pretrained)
    places = {"llava": parts / "llava", "bin": trained["projector"][1] / "mm_projector.bin"}
    for name, place in places.items():
        flags = [flag.replace(f"{{{name}}}", str(place)) for flag in flags]
    with pytest.raises(UserError, match=message):
        train(*parse(command(parts, tmp_path / "out", *flags)))


def test_four_bits_are_refused_without_bitsandbytes(parts, tmp_path) -> None:
    pytest.importorskip("peft")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="quant"):
            train(*parse(command(parts, tmp_path / "out", *LORA, "--bits", "4")))


def test_told_to_overwrite_a_run_starts_anew(parts, tmp_path) -> None:
    one = command(parts, tmp_path / "out", "--max_steps", "1", "--save_steps", "1")
    train(*parse(one))
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        train(*parse(one))
    trainer = train(*parse([*one, "--overwrite_output_dir", "True"]))
    assert trainer.state.global_step == 1


# --- scripts and settings for several GPUs ---

NUMBERS = {
    "pretrain": {"learning_rate": "1e-3", "batch": 256, "version": "plain", "tune_mm_mlp_adapter": "True"},
    "finetune": {"learning_rate": "2e-5", "batch": 128, "version": "v1"},
    "finetune_lora": {
        "learning_rate": "2e-4",
        "batch": 128,
        "lora_r": "128",
        "lora_alpha": "256",
        "mm_projector_lr": "2e-5",
    },
    "finetune_task": {"learning_rate": "2e-5", "batch": 128, "model_name_or_path": "liuhaotian/llava-v1.5-13b"},
    "finetune_task_lora": {"learning_rate": "2e-4", "batch": 128, "lora_r": "128", "mm_projector_lr": "2e-5"},
}
ALWAYS = {"num_train_epochs": "1", "warmup_ratio": "0.03", "lr_scheduler_type": "cosine", "weight_decay": "0."}


@pytest.mark.parametrize("name", NUMBERS)
def test_scripts_have_llavas_numbers_and_take_flags_at_their_end(name, tmp_path) -> None:
    python = tmp_path / "python"  # tells what it was called with
    python.write_text('#!/bin/bash\nif [[ $1 == -c ]]; then echo 0; else printf "%s\\n" "$@"; fi\n')
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "DATA": "data.json", "PATH": os.environ["PATH"], "OUTPUT": "out"}
    call = ["bash", SCRIPTS / f"{name}.sh", "--max_steps", "5"]
    words = subprocess.run(call, env=settings, check=True, capture_output=True, text=True).stdout.split("\n")
    flags = {word[2:]: value for word, value in pairwise(words) if word.startswith("--")}
    batch = int(flags["per_device_train_batch_size"]) * int(flags["gradient_accumulation_steps"])
    assert {**flags, "batch": batch}.items() >= {**NUMBERS[name], **ALWAYS}.items()
    assert (flags["data_path"], flags["output_dir"], flags["max_steps"]) == ("data.json", "out", "5")
    training = parse([w for w in words[words.index("llava.train.train") + 1 :] if w])[2]
    assert training.get_warmup_steps(1000) == 30


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_settings_load(name) -> None:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(str(ROOT / "scripts" / f"{name}.json"))
    assert config.is_zero2() is (name == "zero2")
    assert config.is_zero3() is (name != "zero2")
    assert config.is_offload() is name.endswith("offload")


@pytest.mark.parametrize("file", sorted((ROOT / "scripts" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_settings_load(file, monkeypatch) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.distributed_type.value in ("MULTI_GPU", "DEEPSPEED", "FSDP")
    if config.deepspeed_config:
        assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()


@pytest.mark.slow
def test_two_processes_learn_as_one_does(parts, tmp_path) -> None:
    flags = (*LORA, "--lora_dropout", "0", "--train_sampling_strategy", "sequential", "--use_cpu", "True")
    train(*parse(command(parts, tmp_path / "one", *flags, "--save_strategy", "no")))
    call = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "llava.train.train",
    ]
    call += command(parts, tmp_path / "two", *flags, "--per_device_train_batch_size", "2")
    subprocess.run(call, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert (tmp_path / "two" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_both_stages_learn_from_an_empty_clone_on_the_data_that_ships(tmp_path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(
        ROOT, clone, ignore=shutil.ignore_patterns(".git", ".venv", "checkpoints", "__pycache__", "figures", "results")
    )
    settings = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(clone)}
    for script in ("pretrain", "finetune_lora"):
        subprocess.run(["bash", clone / "scripts" / "v1_5" / f"{script}.sh"], check=True, env=settings)
    first, second = losses(clone / "checkpoints/small-pretrain"), losses(clone / "checkpoints/small-7b-lora")
    assert first[-1] < 0.7 * first[0]
    assert second[-1] < 0.7 * second[0]
    tokenizer, _, _, _ = load_pretrained_model(
        clone / "checkpoints/small-7b-lora", clone / "checkpoints/small/language_model", "small-7b-lora", device="cpu"
    )
    assert len(tokenizer) > VOCAB
