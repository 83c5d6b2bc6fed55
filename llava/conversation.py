"""Prompt templates: how a chat becomes the one string a LLaVA model was trained on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from llava.utils import UserError


class SeparatorStyle(Enum):
    """How turns are joined.

    ``TWO`` and ``SINGLE`` write ``ROLE: text`` after the system text; ``MPT`` (ChatML) and ``PLAIN`` write role
    and text side by side; ``LLAMA_2`` wraps user turns in ``[INST] … [/INST]``.
    """

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


@dataclass
class Conversation:
    """A template and the turns said so far; ``messages`` holds ``[role, text]`` pairs, user first.

    A text of ``None`` is a turn still to be generated: the prompt stops right where the model goes on.
    """

    system: str
    roles: tuple[str, str]
    sep: str
    sep_style: SeparatorStyle = SeparatorStyle.TWO
    sep2: str | None = None
    messages: list[list[str | None]] = field(default_factory=list)
    system_template: str = "{system}"

    def append_message(self, role: str, message: str | None) -> None:
        """Add one turn; ``message`` may be ``None`` for the turn to be generated."""
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """An independent conversation with the same template and turns."""
        return copy.deepcopy(self)

    @property
    def stop_string(self) -> str:
        """The text that ends an assistant turn."""
        return self.sep2 if self.sep2 is not None else self.sep

    def get_prompt(self) -> str:
        """The whole conversation as one prompt, ready for :func:`llava.mm_utils.tokenizer_image_token`."""
        if self.sep_style is SeparatorStyle.PLAIN:
            return "".join(text + self.sep for _, text in self.messages if text is not None)
        if self.sep_style is SeparatorStyle.MPT:
            return self._chatml_prompt()
        if self.sep_style is SeparatorStyle.LLAMA_2:
            return self._llama_2_prompt()
        return self._role_prompt()

    def _role_prompt(self) -> str:
        after_turn = (self.sep, self.stop_string)
        prompt = self.system + self.sep
        for index, (role, text) in enumerate(self.messages):
            prompt += f"{role}: {text}{after_turn[index % 2]}" if text is not None else f"{role}:"
        return prompt

    def _chatml_prompt(self) -> str:
        prompt = self.system + self.sep
        for role, text in self.messages:
            prompt += f"{role}{text}{self.sep}" if text is not None else f"{role}"
        return prompt

    def _llama_2_prompt(self) -> str:
        # The BOS that opens the prompt comes from the tokenizer; only those between turns are written out.
        prompt = ""
        for index, (_, text) in enumerate(self.messages):
            if text is None:
                continue
            if index % 2 == 0:
                if index == 0 and self.system:
                    text = self.system_template.format(system=self.system) + text
                prompt += f"{self.sep if index else ''}[INST] {text} [/INST]"
            else:
                prompt += f" {text} {self.sep2}"
        return prompt


_ASSISTANT = "gives helpful, detailed, and polite answers to the"


def _chat_between(person: str) -> Conversation:
    return Conversation(
        system=f"A chat between a curious {person} and an artificial intelligence assistant. "
        f"The assistant {_ASSISTANT} {person}'s questions.",
        roles=("USER", "ASSISTANT"),
        sep=" ",
        sep2="</s>",
        sep_style=SeparatorStyle.TWO,
    )


_vicuna_v1 = _chat_between("user")

conv_templates: dict[str, Conversation] = {
    "vicuna_v1": _vicuna_v1,
    "v1": _vicuna_v1,
    "llava_v1": _chat_between("human"),
    "plain": Conversation(system="", roles=("", ""), sep="\n", sep_style=SeparatorStyle.PLAIN),
    "llava_llama_2": Conversation(
        system="You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language.",
        roles=("USER", "ASSISTANT"),
        sep="<s>",
        sep2="</s>",
        sep_style=SeparatorStyle.LLAMA_2,
        system_template="<<SYS>>\n{system}\n<</SYS>>\n\n",
    ),
    "chatml_direct": Conversation(
        system="<|im_start|>system\nAnswer the questions.",
        roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
        sep="<|im_end|>",
        sep_style=SeparatorStyle.MPT,
    ),
    # As SmolLM2's own chat template writes it, whose system text stands where none is given.
    "smollm2": Conversation(
        system="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face",
        roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
        sep="<|im_end|>\n",
        sep2="<|im_end|>",
        sep_style=SeparatorStyle.MPT,
    ),
    "mistral_instruct": Conversation(
        system="",
        roles=("USER", "ASSISTANT"),
        sep="",
        sep2="</s>",
        sep_style=SeparatorStyle.LLAMA_2,
    ),
}
"""Every template by name. Take ``.copy()`` before appending turns."""

DEFAULT_MODE = "vicuna_v1"
_MODE_OF_NAME_PART = (
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("smollm2", "smollm2"),
    ("v1", "llava_v1"),
)


def conversation_mode(model_name: str, config: Any = None, asked: str | None = None) -> str:
    """The template to use, in the order every program follows.

    What was ``asked`` for (``--conv-mode``), else ``conv_mode`` of the checkpoint's ``config`` (an object or a
    dict), else the first match in the model's name, else ``vicuna_v1``.

    Raises:
        UserError: a template of that name does not exist.
    """
    named = config.get("conv_mode") if isinstance(config, dict) else getattr(config, "conv_mode", None)
    name = model_name.lower()
    by_name = (mode for part, mode in _MODE_OF_NAME_PART if part in name)
    mode = asked or named or next(by_name, DEFAULT_MODE)
    if mode not in conv_templates:
        raise UserError(f"unknown conversation template {mode!r}; choose one of {', '.join(conv_templates)}")
    return mode


def build_prompt(mode: str, turns: Sequence[tuple[str, str | None]]) -> str:
    """Prompt of ``(question, answer)`` turns under template ``mode``; the last answer is usually ``None``."""
    conversation = conv_templates[mode].copy()
    for question, answer in turns:
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], answer)
    return conversation.get_prompt()
