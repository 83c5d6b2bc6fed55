"""Chat with a model that transformers itself runs."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from tiny_stock import write_stock

from llava.inference import GenerationOptions, LoadedModel, LoadOptions, StockCheckpoint, open_checkpoint
from llava.pruning import UnsupportedModelError, prune
from llava.serve.chat import ChatSession
from llava.utils import UserError

CONFIG = {"mode": ["deep"], "mid_deep_layer": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_stock(tmp_path_factory.mktemp("stock") / "idefics3"))


def test_two_turns_answer_as_the_model_does_on_the_whole_conversation(checkpoint) -> None:
    assert isinstance(checkpoint, StockCheckpoint)
    chat = LoadedModel(checkpoint, LoadOptions(device="cpu"))
    session = ChatSession(chat, checkpoint.pruning_config(CONFIG), GenerationOptions(max_new_tokens=3))
    session.add_picture(Image.new("RGB", (40, 30), "red"))
    pieces: list[str] = []
    first = session.ask("what is this", on_text=pieces.append)
    second = session.ask("a cat")

    assert "".join(pieces).strip() == first.text
    assert first.visual_tokens == second.visual_tokens == 16
    assert second.rows_per_layer == [second.prompt_rows] * 4 + [second.prompt_rows - 16] * 4
    assert second.prompt_rows > first.prompt_rows
    assert first.flops_saved["paper"] == pytest.approx(0.5)

    prompt = checkpoint.encode(session.turns[:1])
    with prune(chat.model, CONFIG):
        direct = chat.model.generate(prompt.ids, **prompt.inputs, max_new_tokens=3, do_sample=False)
    # `encode` of the answered turn has its answer in it; the first turn alone has not.
    assert prompt.ids.shape[1] > first.prompt_rows
    assert direct.shape[1] == prompt.ids.shape[1] + 3


def test_the_default_config_is_scaled_to_the_model(checkpoint) -> None:
    assert checkpoint.pruning_config().shallow_mid_layer == 2  # 6 of 32, for 8 layers


def test_options_of_llava_checkpoints_are_refused(checkpoint) -> None:
    with pytest.raises(UserError, match="--conv-mode vicuna_v1 is for LLaVA checkpoints"):
        open_checkpoint(checkpoint.model_path, conv_mode="vicuna_v1")


def test_a_family_that_cannot_be_pruned_is_refused_before_weights(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllama"}))
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        open_checkpoint(tmp_path)
