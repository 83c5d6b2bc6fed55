"""A model that may be talked to before its weights are there."""

from __future__ import annotations

import threading
from typing import Any

from llava.inference import Answer, Checkpoint, LoadedModel, LoadOptions
from llava.utils import UserError


class LateModel:
    """A `llava.serve.chat.ChatModel` whose weights `load` reads, while its page is open already. Answers wait for them.

    Args:
        checkpoint: what is known without them.
        options: where and how to run the model.
    """

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions) -> None:
        self.checkpoint = checkpoint
        self._options = options
        self._model: LoadedModel | None = None
        self._is_here = threading.Event()

    def load(self) -> None:
        """Read the weights. Raises as `LoadedModel` does."""
        self._model = LoadedModel(self.checkpoint, self._options)
        self._is_here.set()

    @property
    def is_here(self) -> bool:
        """Whether the weights are there."""
        return self._is_here.is_set()

    @property
    def placement(self) -> str:
        """Where it runs, for people; "" as long as nobody knows."""
        return self._model.placement if self._model else ""

    def wait(self, stop: threading.Event | None = None) -> LoadedModel:
        """The model, once it is there.

        Raises:
            UserError: `stop` was set before.
        """
        while not self._is_here.wait(0.1):
            if stop is not None and stop.is_set():
                raise UserError("stopped while the model's weights were being read; ask again")
        assert self._model is not None
        return self._model

    def answer(
        self,
        prompt: Any,
        config: Any = None,
        options: Any = None,
        on_text: Any = None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """As `LoadedModel.answer`."""
        return self.wait(stop).answer(prompt, config, options, on_text, stop)

    def warm_up(self, prompt: Any, config: Any) -> None:
        """As `LoadedModel.warm_up`."""
        self.wait().warm_up(prompt, config)
