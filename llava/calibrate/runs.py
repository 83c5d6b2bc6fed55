"""Really running configs on the prompts: answers, first tokens and FLOPs beside the dense run's."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava.calibrate.candidates import key_of
from llava.calibrate.goal import Figure, Result
from llava.calibrate.measure import divergence
from llava.eval.budgets import tokens_a_layer
from llava.inference import Answer, GenerationOptions, LoadedModel, Prompt
from llava.pruning import Method

_TIMED_PROMPTS, _TIMED_ROUNDS = 6, 3


@dataclass(frozen=True)
class Outcome:
    """One prompt under one config; see `Result`."""

    same: bool
    divergence: float
    saved: float
    tokens: float


class Runs:
    """Runs configs, each prompt once, and remembers what came out in a file, so that a killed run goes on.

    Args:
        loaded: the model.
        prompts: all of them.
        groups: of each prompt, the number of its picture.
        options: how answers are drawn.
        batch_size: prompts at once.
        seed: of the intervals.
        file: one JSON object a line, a config's outcomes on some prompts; what it holds is not run again.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Prompt],
        groups: Sequence[int],
        options: GenerationOptions,
        batch_size: int,
        seed: int,
        file: Path,
    ) -> None:
        self.loaded, self.prompts, self.groups, self.options = loaded, prompts, groups, options
        self.batch_size, self.seed, self.file = batch_size, seed, file
        self._dense: dict[int, Answer] = {}
        self._known: dict[str, dict[int, Outcome]] = {}
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
            try:
                record = json.loads(line)
                found = {int(number): Outcome(*outcome) for number, outcome in record["outcomes"].items()}
                self._known.setdefault(record["config"], {}).update(found)
            except (ValueError, TypeError, LookupError, AttributeError):
                continue  # the line at which the process was killed

    def result(self, method: Method, half: Sequence[int]) -> Result:
        """How `method` does on the prompts of these numbers."""
        key = key_of(method)
        known = self._known.setdefault(key, {})
        missing = [number for number in half if number not in known]
        for numbers in self._batches(missing):
            found = self._run(method, numbers)
            known.update(found)
            with open(self.file, "a", encoding="utf-8") as stream:
                plain = {number: tuple(vars(outcome).values()) for number, outcome in found.items()}
                # Begins a line, too: the one before may have been cut off.
                stream.write("\n" + json.dumps({"config": key, "outcomes": plain}) + "\n")
        outcomes = [known[number] for number in half]
        groups = [self.groups[number] for number in half]
        return Result(
            method,
            len(half),
            agreement=Figure.of_shares([float(one.same) for one in outcomes], groups, self.seed),
            divergence=Figure.of([one.divergence for one in outcomes], groups, self.seed),
            saved=Figure.of([one.saved for one in outcomes], groups, self.seed),
            tokens=Figure.of([one.tokens for one in outcomes], groups, self.seed),
        )

    def timed(self, results: Sequence[Result], half: Sequence[int]) -> list[Result]:
        """The results with the time to the first token, all of them and the dense run in turns on the same prompts."""
        one = GenerationOptions(max_new_tokens=1)
        ways = [None, *(result.method for result in results)]
        seconds: list[list[float]] = [[] for _ in ways]
        for turn in range(_TIMED_ROUNDS + 1):
            for number in half[:_TIMED_PROMPTS]:
                for place, method in enumerate(ways):
                    answer = self.loaded.answer(self.prompts[number], method, one)
                    if turn:  # first use is charged to no one
                        seconds[place].append(answer.clock.first_token)
        dense, *others = map(statistics.median, seconds)
        return [
            replace(result, milliseconds=1000 * took, time_ratio=took / dense)
            for result, took in zip(results, others, strict=True)
        ]

    def saving(self, method: Method) -> float:
        """What `method` saves on the first prompt, by one prefill."""
        answer = self.loaded.answer(self.prompts[0], method, GenerationOptions(max_new_tokens=1))
        return answer.flops_saved.get("executed", 0.0)

    def _run(self, method: Method, numbers: Sequence[int]) -> dict[int, Outcome]:
        self._answer_dense(numbers)
        # An answer that goes on where the dense one ends is another one, however it ends.
        longest = max(self._dense[number].new_tokens for number in numbers)
        answers = self._answers(method, numbers, replace(self.options, max_new_tokens=longest))
        found = {}
        for number, answer in zip(numbers, answers, strict=True):
            dense = self._dense[number]
            assert dense.first_logits is not None and answer.first_logits is not None
            found[number] = Outcome(
                same=answer.ids[: dense.new_tokens] == dense.ids,
                divergence=float(divergence(dense.first_logits, answer.first_logits)),
                saved=answer.flops_saved["executed"],
                tokens=tokens_a_layer(answer),
            )
        return found

    def _answer_dense(self, numbers: Sequence[int]) -> None:
        missing = [number for number in numbers if number not in self._dense]
        for batch in self._batches(missing):
            self._dense.update(zip(batch, self._answers(None, batch, self.options), strict=True))

    def _answers(self, method: Method | None, numbers: Sequence[int], options: GenerationOptions) -> list[Answer]:
        prompts: list[Any] = [self.prompts[number] for number in numbers]
        with torch.inference_mode():
            return self.loaded.answer_batch(prompts, method, options, keep_logits=True)

    def _batches(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        return (numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size))
