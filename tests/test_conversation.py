"""Prompts against the recorded ones of the published project."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava.conversation import build_prompt, conv_templates, conversation_mode
from llava.utils import UserError

RECORDED = json.loads((Path(__file__).parent / "data" / "conversation_prompts.json").read_text())["templates"]
QUESTION = "<image>\nWhat is this?"


@pytest.mark.parametrize("name", RECORDED)
def test_one_turn_prompt_is_the_recorded_one(name):
    assert build_prompt(name, [(QUESTION, None)]) == RECORDED[name]["one_turn"]


@pytest.mark.parametrize("name", [name for name, record in RECORDED.items() if record["two_turns"]])
def test_two_turn_prompt_is_the_recorded_one(name):
    turns = [(QUESTION, "A cat."), ("What colour is it?", None)]
    assert build_prompt(name, turns) == RECORDED[name]["two_turns"]


def test_v1_is_vicuna_v1():
    assert build_prompt("v1", [(QUESTION, None)]) == RECORDED["vicuna_v1"]["one_turn"]


def test_an_empty_answer_still_ends_its_turn():
    prompt = build_prompt("vicuna_v1", [("a?", ""), ("b?", None)])
    assert prompt.endswith("USER: a? ASSISTANT: </s>USER: b? ASSISTANT:")


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        ("vicuna_v1", "</s>"),
        ("llava_v1", "</s>"),
        ("llava_llama_2", "</s>"),
        ("mistral_instruct", "</s>"),
        ("chatml_direct", "<|im_end|>"),
        ("smollm2", "<|im_end|>"),
        ("plain", "\n"),
    ],
)
def test_stop_string_ends_an_assistant_turn(template, stop):
    assert conv_templates[template].stop_string == stop


def test_templates_are_not_changed_by_conversations():
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message("USER", "hello")
    assert conv_templates["vicuna_v1"].messages == []


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llava-v1.5-7b", "llava_v1"),
        ("llava-llama-2-13b-v1", "llava_llama_2"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("LLaVA-V1.6-34B", "chatml_direct"),
        ("tiny", "vicuna_v1"),
    ],
)
def test_mode_follows_the_name_where_nothing_else_says(name, mode):
    assert conversation_mode(name) == mode


def test_mode_asked_for_wins_over_config_and_config_over_name():
    config = SimpleNamespace(conv_mode="plain")
    assert conversation_mode("llava-v1.5-7b", config, "vicuna_v1") == "vicuna_v1"
    assert conversation_mode("llava-v1.5-7b", config) == "plain"
    assert conversation_mode("llava-v1.5-7b", {"conv_mode": "mistral_instruct"}) == "mistral_instruct"


def test_an_unknown_mode_is_an_error_that_names_the_choices():
    with pytest.raises(UserError, match=r"'vicuna_v2'.*vicuna_v1, v1, llava_v1"):
        conversation_mode("llava-v1.5-7b", None, "vicuna_v2")
