"""Which tokens of a conversation are learnt: the answers, and what ends them. Each template, token by token."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.train.masking import tokenize

TURNS = [("<image>\nWhat is it?", "A cat."), ("Its colour?", "Red, I think.")]
VICUNA = (
    "A chat between a curious {} and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the {}'s questions. USER: <image>\nWhat is it? ASSISTANT:[[ A cat.</s>]]USER: Its colour? "
    "ASSISTANT:[[ Red, I think.</s>]]"
)
# The whole text, written out by hand; what is learnt stands in [[ ]].
MARKED = {
    "vicuna_v1": VICUNA.format("user", "user"),
    "v1": VICUNA.format("user", "user"),
    "llava_v1": VICUNA.format("human", "human"),
    "plain": "<image>[[A cat.\n]][[Red, I think.\n]]",
    "llava_llama_2": "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.\n"
    "<</SYS>>\n\n<image>\nWhat is it? [/INST][[ A cat. </s>]]<s>[INST] Its colour? [/INST][[ Red, I think. </s>]]",
    "mistral_instruct": "[INST] <image>\nWhat is it? [/INST][[ A cat. </s>]][INST] Its colour? "
    "[/INST][[ Red, I think. </s>]]",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?"
    "<|im_end|><|im_start|>assistant\n[[A cat.<|im_end|>]]<|im_start|>user\nIts colour?<|im_end|>"
    "<|im_start|>assistant\n[[Red, I think.<|im_end|>]]",
}


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """`byte`: as SmolLM2's, without BOS; `metaspace`: as LLaMA's, with BOS and "▁"."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "byte":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    texts = [text.replace("[[", "").replace("]]", "") for text in MARKED.values()]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=150, special_tokens=special))
    if kind == "metaspace":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bos = "<s>" if kind == "metaspace" else None
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token=bos, eos_token="</s>")


@pytest.fixture(scope="module", params=["byte", "metaspace"])
def tokenizer(request):
    return make_tokenizer(request.param)


def wanted_labels(marked: str, tokenizer) -> tuple[list[int], list[int]]:
    """Counted as LLaVA counts: how many ids the text has up to where an answer begins, and to where it ends."""
    parts = marked.replace("]]", "[[").split("[[")
    ids = tokenizer_image_token("".join(parts), tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    for number in range(1, len(parts), 2):
        begin, end = (len(tokenizer_image_token("".join(parts[:upto]), tokenizer)) for upto in (number, number + 1))
        labels[begin:end] = ids[begin:end]
    return ids, labels


@pytest.mark.parametrize("mode", MARKED)
def test_answers_are_learnt_and_nothing_else(mode, tokenizer) -> None:
    ids, labels = tokenize(mode, TURNS, tokenizer)
    wanted_ids, wanted = wanted_labels(MARKED[mode], tokenizer)
    assert ids.tolist() == wanted_ids
    assert list(zip(ids.tolist(), labels.tolist(), strict=True)) == list(zip(wanted_ids, wanted, strict=True))
    assert IMAGE_TOKEN_INDEX in wanted_ids


def test_every_registered_template_is_stated_here() -> None:
    stated = {id(conv_templates[mode]) for mode in MARKED}
    unstated = [mode for mode, template in conv_templates.items() if id(template) not in stated]
    assert set(unstated) <= {"smollm2"}  # stated where it is made


def test_a_template_registered_later_is_trained_like_the_others(tokenizer, monkeypatch) -> None:
    later = Conversation(system="Be brief.", roles=("Q", "A"), sep="\n", sep_style=SeparatorStyle.SINGLE)
    monkeypatch.setitem(conv_templates, "later", later)
    ids, labels = tokenize("later", TURNS, tokenizer)
    marked = "Be brief.\nQ: <image>\nWhat is it?\nA:[[ A cat.\n]]Q: Its colour?\nA:[[ Red, I think.\n]]"
    assert (ids.tolist(), labels.tolist()) == wanted_labels(marked, tokenizer)


def test_a_conversation_without_a_picture_is_learnt_too(tokenizer) -> None:
    ids, labels = tokenize("chatml_direct", [("What is it?", "A cat.")], tokenizer)
    marked = (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\n[[A cat.<|im_end|>]]"
    )
    assert (ids.tolist(), labels.tolist()) == wanted_labels(marked, tokenizer)
