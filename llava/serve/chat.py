"""A conversation about pictures with one model: what every front end shares, and no terminal in it.

`ChatSession` holds the turns and pictures of one conversation; several may share a model. Every turn prefills the whole
conversation anew: a question is never asked of rows that were pruned for an earlier one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.images import is_url
from llava.inference import Answer, GenerationOptions, Picture, Prompt, Turn
from llava.pruning import Method
from llava.utils import UserError


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

    @property
    def pictures(self) -> list[Picture]:
        """Every picture of the conversation, those that wait for the next question last."""
        return [*(picture for turn in self.turns for picture in turn.pictures), *self.waiting]

    def drop_picture(self, number: int | None = None) -> Picture:
        """Take a picture out of the conversation. What was answered with it stays said.

        Args:
            number: of the picture in `pictures`, from 1; None: the last.

        Raises:
            UserError: there is none of that number, or its question says where it stands.
        """
        count = len(self.pictures)
        if not count:
            raise UserError("there is no picture to drop")
        left = count if number is None else number
        if not 1 <= left <= count:
            raise UserError(f"there is no picture {left}; the conversation has pictures 1 to {count}")
        for place, turn in enumerate(self.turns):
            if left <= len(turn.pictures):
                if DEFAULT_IMAGE_TOKEN in turn.question:
                    raise UserError(f"picture {number or count} has a place in its question; /reset forgets both")
                pictures = [*turn.pictures]
                dropped = pictures.pop(left - 1)
                # Its figures were of a conversation with this picture; what was said remains.
                self.turns[place] = replace(turn, pictures=pictures, answer=None, said=turn.reply)
                return dropped
            left -= len(turn.pictures)
        return self.waiting.pop(left - 1)

    @contextmanager
    def asking_again(self) -> Iterator[str]:
        """A block in which the newest question, which it gives, is not asked yet; after an error it was.

        Raises:
            UserError: nothing was asked yet.
        """
        if not self.turns:
            raise UserError("nothing was asked yet")
        turns, waiting = self.turns, self.waiting
        self.turns, self.waiting = turns[:-1], [*turns[-1].pictures]
        try:
            yield turns[-1].question
        except BaseException:
            self.turns = turns
            raise
        finally:
            self.waiting = waiting

    def load(self, saved: Any) -> None:
        """Go on with a conversation that `to_dict` described; its pictures are opened anew.

        Raises:
            UserError: it is none, or a picture cannot be opened; the conversation is as it was before.
        """
        turns = []
        try:
            for turn in saved["turns"]:
                question, said, sources = turn["question"], turn["answer"], turn["images"]
                if not (isinstance(question, str) and isinstance(said, str) and isinstance(sources, list)):
                    raise TypeError
                pictures = [self.model.checkpoint.read_picture(str(source)) for source in sources]
                turns.append(Turn(question, pictures, said=said))
        except (KeyError, TypeError) as error:
            raise UserError("this is no conversation: turns with question, answer and images are needed") from error
        self.turns, self.waiting = turns, []

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
                    "images": [_lasting(picture.source) for picture in turn.pictures],
                    **(turn.answer.to_dict() if turn.answer else {"answer": turn.reply}),
                }
                for turn in self.turns
            ],
        }


def _lasting(source: str) -> str:
    """A picture's source as it is found from every folder."""
    path = Path(source).expanduser()
    return source if is_url(source) or not path.is_file() else str(path.resolve())
