"""One picture, one question, one answer, and everything that can be seen of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava.inference import GenerationOptions, LoadedModel, Picture, Turn
from llava.pruning import Method, PruningConfig, PruningTrace
from llava.utils import UserError

from .lenses import readable
from .patches import PatchMap, kept_rows, patch_maps
from .record import Recording, RowRecord, record


@dataclass(frozen=True)
class Observation:
    """A recorded run.

    Attributes:
        picture: what was asked about.
        question: what was asked.
        answer: what the model said.
        config: pruning config of the run; None: dense.
        trace: what was decided.
        savings: fraction of the dense prefill's FLOPs that was saved, by convention (`llava.pruning.flops`).
        recording: the rows that were recorded.
        patches: where each visual row looks, in the order of `recording.visual_positions`; without boxes where that
            is not known (`PatchMap.is_known`).
        labels: a word for each row of the prompt and each token of the answer: the vocabulary's piece, or
            "patch i".
        answer_ids: the answer's tokens.
    """

    picture: Picture
    question: str
    answer: str
    config: Method | None
    trace: PruningTrace
    savings: dict[str, float]
    recording: Recording
    patches: PatchMap
    labels: list[str]
    answer_ids: tuple[int, ...]

    @property
    def last(self) -> RowRecord:
        """The prompt's last row, which the first token of the answer is read from."""
        return self.recording.row(-1)

    @property
    def kept(self) -> np.ndarray:
        """Visual rows left after selection, bool [visual rows]; all where nothing was selected."""
        return kept_rows(self.trace)

    def answer_row(self, token: int) -> RowRecord:
        """The row that predicted token number `token` of the answer; the first one is the prompt's last row."""
        return self.recording.row(self.recording.num_rows - 1 + token)


def observe(
    chat: LoadedModel,
    picture: Any,
    question: str,
    config: Any = None,
    *,
    rows: Iterable[int] = (),
    max_new_tokens: int = 32,
) -> Observation:
    """Ask a question about a picture, greedily, and record the rows that the answer was read from.

    Args:
        chat: the model.
        picture: a path, a URL, a `PIL.Image.Image`, or a prepared `Picture`.
        question: the text; the picture is put before it.
        config: pruning config in any form `PruningConfig.from_any` takes; None: dense.
        rows: further rows of the prompt to record; negative ones count from its end.
        max_new_tokens: longest answer in tokens.

    Raises:
        UserError: a picture, config or question that cannot be used.
    """
    checkpoint = chat.checkpoint
    if not question.strip():
        raise UserError("the question is empty; ask something about the picture")
    shown = picture if isinstance(picture, Picture) else checkpoint.read_picture(picture)
    checked = None if config is None else checkpoint.pruning_config(config)
    prompt = checkpoint.encode([Turn(question, [shown])])
    is_visual = prompt.is_visual.numpy()

    # Row N - 1 + k predicts token k.
    watched = [*rows, *range(prompt.num_rows - 1, prompt.num_rows - 1 + max_new_tokens)]
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    # Dense runs have a trace too: an empty mode prunes nothing and changes no bit.
    config = PruningConfig(mode=()) if checked is None else checked
    with record(chat.model, is_visual, watched) as recording:
        answer = chat.answer(prompt, config, options)
    assert answer.trace is not None

    def pieces(ids: Iterable[int]) -> list[str]:
        return [readable(str(piece)) for piece in chat.tokenizer.convert_ids_to_tokens(list(ids))]

    patches = (f"patch {number}" for number in range(prompt.num_visual))
    words = iter(pieces(prompt.row_ids[~prompt.is_visual].tolist()))
    labels = [next(patches if visual else words) for visual in is_visual]
    (where,) = patch_maps(checkpoint, prompt)
    return Observation(
        picture=shown,
        question=question,
        answer=answer.text,
        config=checked,
        trace=answer.trace,
        savings=answer.flops_saved,
        recording=recording,
        patches=where,
        labels=[*labels, *pieces(answer.ids)],
        answer_ids=answer.ids,
    )
