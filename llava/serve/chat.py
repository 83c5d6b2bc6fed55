"""A conversation about pictures with one model: what every front end shares, and no terminal in it.

`ChatSession` holds the turns and pictures of one conversation; several may share a model. Every turn prefills the whole
conversation anew: a question is never asked of rows that were pruned for an earlier one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from llava.inference import Answer, GenerationOptions, Picture, Prompt, Turn
from llava.pruning import Method


class ChatModel(Protocol):
    """What a conversation needs of a model: a `LoadedModel`, or one that a server has (`llava.serve.remote`).

    Attributes:
        checkpoint: its `Checkpoint`, or what stands for it: `name`, `model_path`, `conv_mode`, `pruning_config`,
            `read_picture`, and `encode`, which gives what `answer` takes.
        placement: where it runs, for people.
    """

    checkpoint: Any

    @property
    def placement(self) -> str: ...

    def answer(
        self,
        prompt: Any,
        config: Any = None,
        options: GenerationOptions | None = None,
        on_text: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Answer: ...

    def warm_up(self, prompt: Any, config: Any) -> None: ...


@dataclass(frozen=True)
class Comparison:
    """The same prompt answered twice."""

    dense: Answer
    pruned: Answer

    @property
    def agree(self) -> bool:
        """Whether both answers are the same text."""
        return self.dense.text == self.pruned.text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return {"dense": self.dense.to_dict(), "pruned": self.pruned.to_dict(), "agree": self.agree}


class ChatSession:
    """One conversation: its turns, the pictures that wait for the next question, and how to answer.

    Attributes:
        config: pruning config of the next answers; None: dense.
        options: how to draw them.
        turns: what was said, oldest first.
        waiting: pictures that go with the next question.
    """

    def __init__(self, model: ChatModel, config: Method | None, options: GenerationOptions | None = None):
        self.model = model
        self.config = config
        self.options = options or GenerationOptions()
        self.turns: list[Turn] = []
        self.waiting: list[Picture] = []

    @property
    def last_answer(self) -> Answer | None:
        """The newest answer."""
        return self.turns[-1].answer if self.turns else None

    def add_picture(self, source: str | Path | Image.Image | Picture) -> Picture:
        """Put a picture to the next question. Raises as `Checkpoint.read_picture` does."""
        picture = source if isinstance(source, Picture) else self.model.checkpoint.read_picture(source)
        self.waiting.append(picture)
        return picture

    def set_config(self, given: Any) -> None:
        """Prune the next answers with this config (any form that `PruningConfig.from_any` takes)."""
        self.config = self.model.checkpoint.pruning_config(given)

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self.turns, self.waiting = [], []

    def ask(
        self,
        question: str,
        on_text: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """Ask, and remember question and answer; after an error the conversation is as it was before.

        Raises:
            UserError: a prompt that fills the context, or `<image>` a wrong number of times.
        """
        turn, prompt = self._next(question)
        answer = self.model.answer(prompt, self.config, self.options, on_text, stop)
        self._remember(turn, answer)
        return answer

    def compare(self, question: str, stop: threading.Event | None = None) -> Comparison:
        """Ask dense and pruned; the pruned answer is remembered. With a dense session both are dense."""
        turn, prompt = self._next(question)
        self.model.warm_up(prompt, self.config)
        dense = self.model.answer(prompt, None, self.options, stop=stop)
        pruned = self.model.answer(prompt, self.config, self.options, stop=stop)
        self._remember(turn, pruned)
        return Comparison(dense, pruned)

    def last_prompt(self) -> Prompt:
        """What the newest answer was given to."""
        *earlier, last = self.turns
        return self.model.checkpoint.encode([*earlier, replace(last, answer=None)])

    def _next(self, question: str) -> tuple[Turn, Prompt]:
        turn = Turn(question, list(self.waiting))
        return turn, self.model.checkpoint.encode([*self.turns, turn])

    def _remember(self, turn: Turn, answer: Answer) -> None:
        self.turns.append(replace(turn, answer=answer))
        self.waiting = []

    def to_dict(self) -> dict[str, Any]:
        """The whole conversation in plain values, ready for `json.dumps`."""
        checkpoint = self.model.checkpoint
        return {
            "model": str(checkpoint.model_path),
            "conv_mode": checkpoint.conv_mode,
            "turns": [
                {
                    "question": turn.question,
                    "images": [picture.source for picture in turn.pictures],
                    **(turn.answer.to_dict() if turn.answer else {}),
                }
                for turn in self.turns
            ],
        }
