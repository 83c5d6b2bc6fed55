"""How an answer is drawn, and what came back: text, tokens, what was pruned, and the clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llava.pruning import Method, PruningTrace
from llava.utils import UserError


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are drawn.

    Attributes:
        max_new_tokens: longest answer in tokens.
        temperature: 0 is greedy, anything above samples.
        top_p: nucleus of the sampling, in (0, 1]; None: all.
        num_beams: 1 streams; more than 1 searches and gives the answer at its end.

    Raises:
        UserError: a value out of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or greater")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be greater than 0 and at most 1")
        if self.num_beams < 1:
            raise UserError(f"num_beams is {self.num_beams}; it must be at least 1")

    def to_kwargs(self) -> dict[str, Any]:
        """Arguments for transformers' ``generate``."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else {}
        # Named even where None: a checkpoint's generation_config.json may hold values of its own.
        return {
            "temperature": None,
            "top_p": None,
            "top_k": None,
            **sampling,
            "do_sample": self.temperature > 0,
            "num_beams": self.num_beams,
        }


@dataclass(frozen=True)
class Clock:
    """What a batch took; its answers share one object.

    Attributes:
        answers: how many prompts were in it.
        new_tokens: tokens that all of them got, end tokens included.
        first_token: seconds from the call to the first token; vision tower and prefill in, reading pictures out.
        seconds: for the whole batch.
        first_token_processor: processor seconds of the calling thread up to the first token. With one thread on a CPU
            that other programs use too, the steadier clock; else it leaves out what other threads and a GPU did.
    """

    answers: int
    new_tokens: int
    first_token: float
    seconds: float
    first_token_processor: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed: tokens after the first ones by the time they took; None where there are none."""
        decoded, took = self.new_tokens - self.answers, self.seconds - self.first_token
        return decoded / took if decoded > 0 and took > 0 else None


@dataclass(frozen=True)
class Answer:
    """What the model said, what was pruned on the way, and how long it took.

    Attributes:
        text: the answer as the model wrote it, stripped; not yet safe for a terminal (`llava.utils.clean_text`).
        ids: its tokens, the end token included.
        finish: ``stop`` (the model ended it), ``length``, or ``interrupted``.
        config: the pruning config of this answer; None: dense.
        trace: what was decided; None for a dense answer.
        flops_saved: fraction of the dense prefill's FLOPs saved, by convention; empty for a dense answer.
        num_layers: decoder layers.
        prompt_rows, visual_tokens: rows of the prompt with the pictures in place, and those of them from pictures.
        clock: of the batch it was answered in.
        first_logits: of its first token, float32 ``[vocabulary]``, where they were asked for.
    """

    text: str
    ids: tuple[int, ...]
    finish: str
    config: Method | None
    trace: PruningTrace | None
    flops_saved: dict[str, float]
    num_layers: int
    prompt_rows: int
    visual_tokens: int
    clock: Clock
    first_logits: torch.Tensor | None = None

    @property
    def new_tokens(self) -> int:
        """Tokens generated, the end token included."""
        return len(self.ids)

    @property
    def rows_per_layer(self) -> list[int]:
        """Rows each layer processed in the prefill, ``[num_layers]``."""
        return self.trace.rows_per_layer if self.trace else [self.prompt_rows] * self.num_layers

    @property
    def kept(self) -> int:
        """Visual tokens that were left after selection; all of them where nothing was selected or removed."""
        return self.trace.num_kept if self.trace else self.visual_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return {
            "answer": self.text,
            "finish": self.finish,
            "pruning_config": self.config.to_dict() if self.config else None,
            "prompt_rows": self.prompt_rows,
            "visual_tokens": self.visual_tokens,
            "kept_visual_tokens": self.kept,
            "select_layer": self.trace.select_layer if self.trace else None,
            "exit_layer": self.trace.exit_layer if self.trace else None,
            "rows_per_layer": list(self.rows_per_layer),
            "flops_saved": self.flops_saved,
            "new_tokens": self.new_tokens,
            "time_to_first_token_s": self.clock.first_token,
            "seconds": self.clock.seconds,
            "tokens_per_second": self.clock.tokens_per_second,
            "trace": self.trace.to_dict() if self.trace else None,
        }
