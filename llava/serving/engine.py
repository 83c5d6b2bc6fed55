"""Prefills and decoding steps over many answers at once. Knows no queue and no clock; `scheduler.py` decides who runs.

A prefill is one `generate` of one token inside a `prune` block, so that pictures, positions and decisions are those of
any other program; its ragged cache is then taken apart. A decoding step is one call of the model with one new token an
answer and a cache put together from their segments: all linear layers see all answers' rows together, attention sees
each answer's own keys.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicCache

from llava.inference import GenerationOptions, LoadedModel
from llava.pruning import PruningTrace, prune
from llava.pruning.cache import RaggedLayer
from llava.pruning.varlen import to_device

from .pool import Pool, Segment
from .request import Request
from .text import AnswerText

GREEDY_BELOW = 1e-5
"""Temperatures below it are greedy: logits over them may not be finite, and drawing from such ends a GPU's process."""


@dataclass
class Prefilled:
    """Prompts that went through the model together.

    Attributes:
        logits: float32 `[batch, vocabulary]` of each prompt's last row.
        cache: keys and values, packed and ragged.
        traces: what was decided, one a prompt.
        positions: of each prompt's last row, int64 `[axes, batch]`.
        renumbered: for each prompt, whether its rows were numbered anew.
        history: for each prompt, ids that a repetition penalty counts.
    """

    logits: torch.Tensor
    cache: DynamicCache
    traces: list[PruningTrace]
    positions: np.ndarray
    renumbered: list[bool]
    history: list[list[int]]

    def rows(self, sample: int) -> int:
        """Rows of one prompt in all layers together."""
        layers: Any = self.cache.layers
        return sum(layer.lengths[sample] for layer in layers)


@dataclass
class Answering:
    """One answer that is being written.

    Attributes:
        text: its text so far.
        generator: of its sampling; None: greedy.
        limit: tokens it may get.
        position: of the prompt's last row, one number an axis.
        ids: its tokens.
        segments: where its keys and values lie, one a layer; empty before the first token and after the last.
    """

    request: Request
    index: int
    text: AnswerText
    generator: torch.Generator | None
    limit: int
    position: np.ndarray
    renumbered: bool
    history: list[int]
    ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    @property
    def decoded(self) -> int:
        """Rows behind those of the prompt: all tokens but the newest, whose row the next step makes."""
        return len(self.ids) - 1


class Engine:
    """A loaded model and the keys and values of the answers it is writing. One thread at a time.

    Args:
        model: the model.
        kv_bytes: see `Pool`.
    """

    def __init__(self, model: LoadedModel, kv_bytes: int) -> None:
        self._loaded, self._model = model, model.model
        self.pool = Pool(kv_bytes)
        self._decoding: ExitStack | None = None
        # Nobody else's, so that no lock is needed between two tokens.
        self._tokenizer = copy.deepcopy(model.tokenizer)
        # Text is read without special tokens, so one that ends a turn of the template is known by its id.
        special = set(self._tokenizer.all_special_tokens) & set(model.stop_strings)
        self._end_ids = {*model.end_ids, *map(self._tokenizer.convert_tokens_to_ids, special)}
        self._penalty = getattr(self._model.generation_config, "repetition_penalty", None) or 1.0

    # -- the model -----------------------------------------------------------------------------------------------

    def prefill(self, requests: Sequence[Request]) -> Prefilled:
        """Prompts through the model, packed."""
        self.rest()
        given = self._loaded.inputs_for([request.prompt for request in requests])
        configs = [request.config and request.config.for_question(request.prompt.question) for request in requests]
        with prune(self._model, configs, ragged=True) as run:
            output = self._model.generate(
                **given,
                max_new_tokens=1,
                return_dict_in_generate=True,
                output_logits=True,
                **GenerationOptions().to_kwargs(),
            )
        layer = output.past_key_values.layers[0]
        assert isinstance(layer, RaggedLayer) and layer.lease.last_positions is not None
        positions = layer.lease.last_positions[..., 0].cpu().numpy()  # [(axes,) batch or 1]
        positions = positions.reshape(-1, positions.shape[-1])
        # Ids where `generate` works on ids, nothing where it was given rows.
        prompts, mask = output.sequences[:, :-1].tolist(), given["attention_mask"].tolist()
        return Prefilled(
            logits=output.logits[0],
            cache=output.past_key_values,
            traces=list(run.traces),
            positions=np.broadcast_to(positions, (len(positions), len(requests))),
            renumbered=layer.lease.renumbered,
            history=[
                [id for id, counts in zip(ids, valid, strict=False) if counts]
                for ids, valid in zip(prompts, mask, strict=True)
            ],
        )

    def step(self, answers: Sequence[Answering]) -> torch.Tensor:
        """One token more for every answer: float32 logits `[batch, vocabulary]`. Changes nothing if it fails."""
        if self._decoding is None:
            with ExitStack() as block:
                block.enter_context(prune(self._model, None, ragged=True)).adopt(self.pool.lease)
                self._decoding = block.pop_all()
        self.pool.lease.renumbered = [answer.renumbered for answer in answers]
        decoded = [answer.decoded for answer in answers]
        device = self._model.get_input_embeddings().weight.device
        positions = np.stack([answer.position for answer in answers], axis=1) + np.array(decoded) + 1  # [axes, batch]
        position_ids = to_device(torch.from_numpy(positions), torch.int64, device)[..., None]
        output = self._model(
            input_ids=to_device([answer.ids[-1] for answer in answers], torch.int64, device)[:, None],
            position_ids=position_ids if len(position_ids) > 1 else position_ids[0],
            past_key_values=self.pool.cache([answer.segments for answer in answers], decoded),
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def rest(self) -> None:
        """Leave nothing on the model until the next call."""
        if self._decoding is not None:
            self._decoding.close()
            self._decoding = None

    # -- answers -------------------------------------------------------------------------------------------------

    def answers(self, request: Request, done: Prefilled, sample: int, limit: int) -> list[Answering]:
        """The answers to a prefilled prompt, before their first tokens."""
        answers = []
        for index in range(request.copies):
            generator = None
            if request.options.temperature >= GREEDY_BELOW:
                generator = torch.Generator(done.logits.device)
                if request.seed is None:
                    generator.seed()
                else:
                    generator.manual_seed((request.seed + index) % 2**63)
            answers.append(
                Answering(
                    request,
                    index,
                    AnswerText(self._tokenizer, [*request.stop, *self._loaded.stop_strings]),
                    generator,
                    limit,
                    done.positions[:, sample],
                    done.renumbered[sample],
                    done.history[sample],
                )
            )
        return answers

    def choose(self, answers: Sequence[Answering], logits: torch.Tensor) -> list[int]:
        """The next token of every answer: the likeliest, or drawn from its own generator."""
        if self._penalty != 1.0:
            penalty = RepetitionPenaltyLogitsProcessor(self._penalty)
            histories = [torch.tensor([answer.history + answer.ids], device=logits.device) for answer in answers]
            logits = torch.cat(
                [
                    penalty(ids, row[None]) if ids.numel() else row[None]
                    for ids, row in zip(histories, logits, strict=True)
                ]
            )
        tokens = logits.argmax(dim=-1)
        for number, answer in enumerate(answers):
            if answer.generator is not None:
                ids: Any = None  # none of these processors reads them
                scores = _warpers(answer.request.options)(ids, logits[number : number + 1])
                tokens[number] = torch.multinomial(scores.softmax(dim=-1), 1, generator=answer.generator)[0, 0]
        return tokens.tolist()

    def accept(self, answer: Answering, token: int) -> tuple[str, str | None]:
        """Add a token to an answer: the text it grew by, and why it ends (``stop`` or ``length``; None: it goes on)."""
        answer.ids.append(token)
        text, finish = "", None
        if token in self._end_ids:
            finish = "stop"
        else:
            text = answer.text.push(token)
            if answer.text.stopped:
                finish = "stop"
            elif len(answer.ids) >= answer.limit:
                finish = "length"
        return (text if finish is None else text + answer.text.finish()), finish

    def place(self, answer: Answering, done: Prefilled, sample: int) -> None:
        """Give an answer that goes on its segments."""
        answer.segments = self.pool.take(done.cache, sample, answer.limit)

    def release(self, answer: Answering) -> None:
        """Take them back."""
        self.pool.give_back(answer.segments)
        answer.segments = []


def _warpers(options: GenerationOptions) -> LogitsProcessorList:
    warpers: list[Any] = [TemperatureLogitsWarper(float(options.temperature))]
    if options.top_p is not None and options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    return LogitsProcessorList(warpers)
