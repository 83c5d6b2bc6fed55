"""LLaVA's training data: JSON with ``id``, ``image`` (or none, or several) and ``conversations`` → samples → batches.

The JSON is checked as a whole before anything is loaded; pictures are opened when their turn comes.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.images import load_image
from llava.mm_utils import process_images
from llava.model.checkpoint import name_some
from llava.train.masking import tokenize
from llava.utils import UserError

logger = logging.getLogger(__name__)

_PEOPLE, _MODELS = ("human", "user"), ("gpt", "assistant")


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        name: its ``id``, else its number in the file.
        images: the pictures, in the order of the ``<image>`` in its questions.
        turns: ``(question, answer)``.
    """

    name: str
    images: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]

    @property
    def words(self) -> int:
        """How many words it has, a cheap measure of its length."""
        return sum(len(text.split()) for turn in self.turns for text in turn)


def read_samples(path: str | Path, image_folder: str | Path | None = None, skip_bad: bool = True) -> list[Sample]:
    """The samples of a data file. Those that cannot be used are counted and named.

    Raises:
        UserError: the file cannot be read, a sample cannot be used and ``skip_bad`` is false, or none can.
    """
    samples, problems = [], {}
    folder = Path(image_folder).expanduser() if image_folder else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"--image_folder {image_folder} is no folder")
    for number, entry in enumerate(_read_entries(Path(path).expanduser())):
        name = str(entry.get("id", number)) if isinstance(entry, Mapping) else str(number)
        try:
            samples.append(_sample(name, entry, folder))
        except UserError as error:
            problems[name] = str(error)
    if problems and not skip_bad:
        name, reason = next(iter(problems.items()))
        raise UserError(f"{path}: {len(problems)} samples cannot be used; the first, {name}: {reason}")
    if not samples:
        raise UserError(f"{path} holds no sample that can be used" + "".join(f"; {r}" for r in set(problems.values())))
    for reason, count in Counter(problems.values()).items():
        named = name_some([name for name, own in problems.items() if own == reason], limit=5)
        logger.warning(f"{path}: {count} samples skipped, {reason}: {named}")
    return samples


def _read_entries(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read training data {path}: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:
        raise UserError(f"training data {path} is not valid JSON ({error}); was its download cut off?") from error
    if not isinstance(entries, list):
        raise UserError(f"training data {path} must hold a list of samples")
    return entries


def _sample(name: str, entry: Any, folder: Path | None) -> Sample:
    """One entry of the file.

    Raises:
        UserError: what is wrong with it, without its name.
    """
    said = entry.get("conversations") if isinstance(entry, Mapping) else None
    if not isinstance(said, list) or not all(isinstance(turn, Mapping) for turn in said):
        raise UserError("no list of conversations")
    who = [turn.get("from") for turn in said]
    texts = [turn.get("value") for turn in said]
    if who and who[0] in _MODELS:  # LLaVA leaves out an answer to nothing
        who, texts = who[1:], texts[1:]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError("a turn without text, or no turns")
    if len(who) % 2:
        raise UserError("the last question has no answer")
    if any(person not in _PEOPLE for person in who[::2]) or any(model not in _MODELS for model in who[1::2]):
        raise UserError("human and gpt do not take turns")
    given = entry.get("image") or []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(file, str) for file in names):
        raise UserError("image is neither a name nor a list of names")
    slots = sum(text.count(DEFAULT_IMAGE_TOKEN) for text in texts[::2])
    if any(DEFAULT_IMAGE_TOKEN in text for text in texts[1::2]):
        raise UserError(f"an answer holds {DEFAULT_IMAGE_TOKEN}")
    if slots != len(names):
        raise UserError(f"{slots} {DEFAULT_IMAGE_TOKEN} for {len(names)} pictures")
    images = tuple(folder / file if folder else Path(file) for file in names)
    if not all(image.is_file() for image in images):
        raise UserError(f"a picture that does not exist in {folder or Path.cwd()}")
    return Sample(name, images, tuple(zip(texts[::2], texts[1::2], strict=True)))


def split(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on, and a share of them held out, drawn by ``seed``."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[: max(1, round(fraction * len(samples)))] if fraction else [])
    if len(held_out) == len(samples):
        raise UserError(f"holding out {fraction} of {len(samples)} samples leaves none to train on")
    train = [sample for number, sample in enumerate(samples) if number not in held_out]
    return train, [samples[number] for number in sorted(held_out)]


class ConversationDataset(Dataset):
    """Samples as ids, labels and pixels, made when they are asked for.

    Args:
        samples: see :func:`read_samples`.
        mode: the prompt template.
        tokenizer, image_processor: the model's.
        skeleton: the model without weights, which tells how many rows a picture has.
        max_rows: longer samples are cut.
        skip_bad: whether another sample stands in for one with an unreadable picture.

    Attributes:
        unreadable, cut: bool ``[samples]``, which were found to be so, shared with the loader's processes.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        mode: str,
        tokenizer: Any,
        image_processor: Any,
        skeleton: Any,
        max_rows: int,
        skip_bad: bool = True,
    ) -> None:
        self.samples, self.mode, self.tokenizer, self.image_processor = samples, mode, tokenizer, image_processor
        self.skeleton, self.max_rows, self.skip_bad = skeleton, max_rows, skip_bad
        self.unreadable, self.cut = (torch.zeros(len(samples), dtype=torch.bool).share_memory_() for _ in range(2))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """``input_ids`` and ``labels``, int64 ``[T]``; ``images`` and ``image_sizes``, lists of one entry a picture."""
        for candidate in range(number, number + len(self.samples)):
            candidate %= len(self.samples)
            try:
                if not self.unreadable[candidate]:
                    return self._prepare(candidate)
            except UserError as error:
                if not self.skip_bad:
                    raise UserError(f"sample {self.samples[candidate].name} cannot be used: {error}") from error
                logger.warning(f"sample {self.samples[candidate].name} skipped, the next one stands in: {error}")
                self.unreadable[candidate] = True
        raise UserError("no sample can be used: see the warnings above")

    def _prepare(self, number: int) -> dict[str, Any]:
        sample, config = self.samples[number], self.skeleton.config
        pictures = [load_image(path) for path in sample.images]
        images = list(process_images(pictures, self.image_processor, config)) if pictures else []
        sizes = [picture.size for picture in pictures]
        turns = [(place_pictures(question, config), answer) for question, answer in sample.turns]
        ids, labels = tokenize(self.mode, turns, self.tokenizer)
        rows = torch.ones_like(ids)
        if images:
            counts = [len(patch_of) for _, _, patch_of in self.skeleton.tile_rows(images, sizes)]
            rows[ids == IMAGE_TOKEN_INDEX] = torch.tensor(counts)
        fits = rows.cumsum(0) <= self.max_rows
        if not fits.all():
            self.cut[number] = True
            ids, labels = ids[fits], labels[fits]
            kept = int((ids == IMAGE_TOKEN_INDEX).sum())
            images, sizes = images[:kept], sizes[:kept]
        if not (labels[1:] != IGNORE_INDEX).any():
            raise UserError(f"no answer within {self.max_rows} rows (--model_max_length)")
        return {"input_ids": ids, "labels": labels, "images": images, "image_sizes": sizes}

    def report(self) -> str:
        """What was skipped and cut so far, in one line; empty where nothing was."""
        parts = []
        for what, flags in (("unreadable and skipped", self.unreadable), ("cut to --model_max_length", self.cut)):
            if names := [self.samples[number].name for number in flags.nonzero().flatten().tolist()]:
                parts.append(f"{len(names)} samples {what}: {name_some(names, limit=5)}")
        return "; ".join(parts)


def place_pictures(question: str, config: Any) -> str:
    """A question as LLaVA trains it: its one picture in front, in a line of its own; of several, each in its place."""
    slot = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        slot = DEFAULT_IM_START_TOKEN + slot + DEFAULT_IM_END_TOKEN
    if question.count(DEFAULT_IMAGE_TOKEN) == 1:
        return f"{slot}\n{question.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
    return question.replace(DEFAULT_IMAGE_TOKEN, slot)


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: ids and labels ``[B, T]`` padded on the right, and all pictures in the order of their ids."""
    ids = [sample["input_ids"] for sample in samples]
    images = [image for sample in samples for image in sample["images"]]
    batch: dict[str, Any] = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(own) for own in ids], batch_first=True),
        "labels": pad_sequence(
            [sample["labels"] for sample in samples], batch_first=True, padding_value=float(IGNORE_INDEX)
        ),
    }
    if images:
        same = all(image.shape == images[0].shape for image in images)
        batch["images"] = torch.stack(images) if same else images
        batch["image_sizes"] = [size for sample in samples for size in sample["image_sizes"]]
    return batch
