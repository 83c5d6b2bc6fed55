"""A conversation about pictures with one model: what every front end shares, and no terminal in it.

`Checkpoint` is everything about a model but its weights, so that a bad path, config, picture or a prompt that is too
long is found in a second. `ChatModel` adds the weights; several sessions may share one. `ChatSession` holds the turns
and pictures of one conversation. Every turn prefills the whole conversation anew: a question is never asked of rows
that were pruned for an earlier one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import build_prompt, conv_templates, conversation_mode
from llava.images import load_image
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    process_images,
    tokenizer_image_token,
)
from llava.model import checkpoint as files
from llava.model.builder import context_length, load_image_processor, load_pretrained_model, load_tokenizer
from llava.model.configs import is_hf_layout, model_class, model_config, with_decoder_of
from llava.model.recommended import recommended_config
from llava.pruning import PruningConfig, PruningConfigError, PruningTrace
from llava.pruning.flops import savings
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
class Picture:
    """A picture in a conversation: where it came from, the RGB image, and its pixels as the model takes them."""

    source: str
    image: Image.Image
    pixels: torch.Tensor


@dataclass
class Turn:
    """A question, the pictures that came with it, and the answer once there is one."""

    question: str
    pictures: list[Picture] = field(default_factory=list)
    answer: Answer | None = None


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model takes it.

    Attributes:
        ids: int64 ``[1, T]``, what ``generate`` gets.
        pixels: the pictures: a tensor, a list of tensors, or a processor's outputs by name.
        sizes: (width, height) of the pictures where the model asks for them.
        row_ids: int64 ``[rows]``, the id that each row of the decoder came from; ``IMAGE_TOKEN_INDEX`` on visual ones.
    """

    ids: torch.Tensor
    pixels: Any
    sizes: list[tuple[int, int]]
    row_ids: torch.Tensor

    @property
    def is_visual(self) -> torch.Tensor:
        """Bool ``[rows]``."""
        return self.row_ids == IMAGE_TOKEN_INDEX

    @property
    def num_rows(self) -> int:
        return len(self.row_ids)

    @property
    def num_visual(self) -> int:
        return int(self.is_visual.sum())


@dataclass(frozen=True)
class Answer:
    """What the model said, what was pruned on the way, and how long it took.

    Attributes:
        text: the answer as the model wrote it, stripped; not yet safe for a terminal (`llava.serve.text.clean_text`).
        config: the pruning config of this answer; None: dense.
        trace: what was decided; None for a dense answer.
        flops_saved: fraction of the dense prefill's FLOPs saved, by convention; empty for a dense answer.
        num_layers: decoder layers.
        prompt_rows, visual_tokens: rows of the prompt with the pictures in place, and those of them from pictures.
        new_tokens: tokens generated, the end token included.
        time_to_first_token: seconds from the call to the first token; vision tower and prefill in, reading the
            picture out.
        seconds: for the whole answer.
        finish: ``stop`` (the model ended it), ``length``, or ``interrupted``.
        ids: the tokens themselves.
    """

    text: str
    config: PruningConfig | None
    trace: PruningTrace | None
    flops_saved: dict[str, float]
    num_layers: int
    prompt_rows: int
    visual_tokens: int
    new_tokens: int
    time_to_first_token: float
    seconds: float
    finish: str
    ids: tuple[int, ...] = ()

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed: tokens after the first by the time they took; None for answers of one token."""
        decoding = self.seconds - self.time_to_first_token
        return (self.new_tokens - 1) / decoding if self.new_tokens > 1 and decoding > 0 else None

    @property
    def rows_per_layer(self) -> list[int]:
        """Rows each layer processed in the prefill, ``[num_layers]``."""
        return self.trace.rows_per_layer if self.trace else [self.prompt_rows] * self.num_layers

    @property
    def kept(self) -> int:
        """Visual tokens that were left after selection; all of them where nothing was selected or removed."""
        if self.trace is None or (self.trace.select_layer is None and self.trace.exit_layer is None):
            return self.visual_tokens
        return len(self.trace.kept_positions)

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
            "time_to_first_token_s": self.time_to_first_token,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "trace": self.trace.to_dict() if self.trace else None,
        }


@dataclass(frozen=True)
class LoadOptions:
    """Where and how to run a model; the fields are those of `load_pretrained_model`."""

    device: str | None = None
    dtype: str | None = None
    load_8bit: bool = False
    load_4bit: bool = False
    attn_implementation: str | None = None

    @classmethod
    def of_arguments(cls, args: Any) -> LoadOptions:
        """From a command line that has an option of each field's name."""
        return cls(**{option.name: getattr(args, option.name) for option in fields(cls)})


class Checkpoint:
    """A checkpoint without its weights: config, tokenizer, image processor and the shapes of everything.

    Args:
        model_path, model_base: as in `load_pretrained_model`.
        conv_mode: prompt template; absent, the checkpoint's own, else by its name.

    Raises:
        UserError: anything about the checkpoint's small files that makes it unusable.
    """

    def __init__(
        self, model_path: str | Path, model_base: str | Path | None = None, conv_mode: str | None = None
    ) -> None:
        self.model_path, self.model_base = model_path, model_base
        self.name = get_model_name_from_path(str(model_path))
        folder = files.resolve_folder(model_path)
        raw = files.read_json(folder / "config.json")
        tokenizer_folder = folder
        if model_base is not None:
            base_folder = files.resolve_folder(model_base)
            base = files.read_json(base_folder / "config.json")
            base = model_config(base).to_dict() if is_hf_layout(base) else base
            raw = with_decoder_of(base, raw)
            if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
                tokenizer_folder = base_folder
        self.config = model_config(raw, self.name)
        self.conv_mode = conversation_mode(self.name, self.config, conv_mode)
        self.num_layers: int = self.config.num_hidden_layers
        self.context_len = context_length(self.config)
        self.tokenizer = load_tokenizer(tokenizer_folder)
        self.image_processor = load_image_processor(folder, self.config)
        # On the meta device the tower gives every picture's number of rows, tiles and newline rows included,
        # for next to nothing.
        with torch.device("meta"):
            self._skeleton = model_class(self.config)(self.config)

    @property
    def num_patches_per_side(self) -> int:
        """Of the vision tower's input; of a tile where the picture is cut into tiles."""
        return self._skeleton.get_vision_tower().num_patches_per_side

    @property
    def stop_string(self) -> str:
        """Text that ends an answer."""
        return conv_templates[self.conv_mode].stop_string

    def load(self, options: LoadOptions) -> tuple[Any, Any]:
        """Tokenizer and model. Raises as `load_pretrained_model` does."""
        tokenizer, model, _, _ = load_pretrained_model(self.model_path, self.model_base, self.name, **asdict(options))
        return tokenizer, model

    def pruning_config(self, given: Any = None) -> PruningConfig:
        """The config to prune with: ``given`` in any form, else the one recommended for this checkpoint.

        Raises:
            PruningConfigError: malformed, unknown key, out of range, or not for this number of layers.
        """
        config = recommended_config(self.model_path) if given is None else PruningConfig.from_any(given)
        assert config is not None  # None comes only from None
        try:
            return config.validate_for(self.num_layers)
        except PruningConfigError as error:
            if given is not None:
                raise
            raise PruningConfigError(
                f"{error}; {self.model_path} brings no pruning config of its own and the published one does not fit: "
                "give one with --pruning-config, or --dense"
            ) from error

    def read_picture(self, source: str | Path | Image.Image) -> Picture:
        """Open a picture (path, URL, or one that is open already) and prepare it for the vision tower.

        Raises:
            ImageError: it cannot be used. UserError: the model has no vision tower.
        """
        if self.image_processor is None:
            raise UserError(f"{self.model_path} has no vision tower and takes no pictures")
        if isinstance(source, Image.Image):
            image, name = source.convert("RGB"), "picture"
        else:
            image, name = load_image(source), str(source)
        return Picture(name, image, process_images([image], self.image_processor, self.config)[0])

    def encode(self, turns: Sequence[Turn]) -> Prompt:
        """The prompt that asks the last of ``turns``.

        Raises:
            UserError: ``<image>`` in a question a wrong number of times, or a prompt that fills the context.
        """
        texts = [(self._question(turn), turn.answer.text if turn.answer else None) for turn in turns]
        ids = tokenizer_image_token(build_prompt(self.conv_mode, texts), self.tokenizer, return_tensors="pt")
        assert isinstance(ids, torch.Tensor)
        pictures = [picture for turn in turns for picture in turn.pictures]
        pixels = _stacked([picture.pixels for picture in pictures])
        sizes = [picture.image.size for picture in pictures]
        rows_of_id = torch.ones_like(ids)
        if pixels is not None:
            empty = pixels.to("meta") if isinstance(pixels, torch.Tensor) else [part.to("meta") for part in pixels]
            counts = [len(rows) for rows in self._skeleton.image_rows(empty, sizes)]
            rows_of_id[ids == IMAGE_TOKEN_INDEX] = torch.tensor(counts)
        return self._within_context(Prompt(ids[None], pixels, sizes, ids.repeat_interleave(rows_of_id)))

    def _within_context(self, prompt: Prompt) -> Prompt:
        if prompt.num_rows >= self.context_len:
            raise UserError(
                f"the prompt has {prompt.num_rows:,} tokens, {prompt.num_visual:,} of them from pictures, and leaves "
                f"no room for an answer: the model's context is {self.context_len:,}; ask a shorter question, with "
                "fewer pictures or earlier turns"
            )
        return prompt

    def _question(self, turn: Turn) -> str:
        slots, pictures = turn.question.count(DEFAULT_IMAGE_TOKEN), len(turn.pictures)
        if slots not in (0, pictures):
            raise UserError(
                f"the question holds {DEFAULT_IMAGE_TOKEN} {slots} times for {pictures} new pictures; "
                "leave it out, or place each picture once"
            )
        slot = DEFAULT_IMAGE_TOKEN
        if getattr(self.config, "mm_use_im_start_end", False):
            slot = DEFAULT_IM_START_TOKEN + slot + DEFAULT_IM_END_TOKEN
        if slots:
            return turn.question.replace(DEFAULT_IMAGE_TOKEN, slot)
        return f"{slot}\n" * pictures + turn.question


def _stacked(pixels: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor] | None:
    """As `process_images` hands over several pictures: one tensor, unless they were tiled."""
    if not pixels:
        return None
    return torch.stack(pixels) if all(part.ndim == 3 for part in pixels) else pixels


class ChatModel:
    """A loaded model that answers prompts, one at a time: calls from several threads wait for each other.

    Args:
        checkpoint: what is known about the model without its weights.
        options: where and how to run it; ``model_path`` and ``model_base`` are the checkpoint's.

    Raises:
        UserError: see `load_pretrained_model`.
    """

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions | None = None) -> None:
        options = options or LoadOptions()
        self.checkpoint = checkpoint
        self.tokenizer, self.model = checkpoint.load(options)
        self._lock = threading.Lock()
        self._is_warm = False

    @property
    def placement(self) -> str:
        """Device and dtype, for people: ``cuda:0, float16``."""
        return f"{self.model.device}, {str(self.model.dtype).removeprefix('torch.')}"

    def answer(
        self,
        prompt: Prompt,
        config: PruningConfig | None,
        options: GenerationOptions | None = None,
        on_text: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """Generate the answer to a prompt.

        Args:
            prompt: from `Checkpoint.encode`.
            config: prune with it; None: dense.
            options: how to draw; the answer is also bounded by what is left of the context.
            on_text: called with each piece of text as it comes; not with beams, whose text comes last.
            stop: set from anywhere, it ends the answer after the token that is being made.
        """
        options = options or GenerationOptions()
        limit = min(options.max_new_tokens, self.checkpoint.context_len - prompt.num_rows)
        watch = _Watch(stop)
        criteria: list[StoppingCriteria] = [watch]
        stop_string = self.checkpoint.stop_string
        if stop_string and stop_string != self.tokenizer.eos_token:
            criteria.append(KeywordsStoppingCriteria([stop_string], self.tokenizer))
        streamer = _Streamer(self.tokenizer, on_text) if on_text and options.num_beams == 1 else None
        with self._lock:
            begin = time.perf_counter()
            ids = self.model.generate(
                prompt.ids.to(self.model.device),
                images=prompt.pixels,
                image_sizes=prompt.sizes or None,
                pruning_config=config,
                max_new_tokens=limit,
                stopping_criteria=StoppingCriteriaList(criteria),
                streamer=streamer,
                **options.to_kwargs(),
            )[0].tolist()
            seconds = time.perf_counter() - begin
            trace = self.model.last_pruning_traces[0] if config is not None else None
        ends = _as_list(self.model.generation_config.eos_token_id)
        if ids and ids[-1] in ends:
            finish = "stop"
        elif stop is not None and stop.is_set():
            finish = "interrupted"
        else:
            finish = "length" if len(ids) >= limit else "stop"
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if stop_string:
            text = text.removesuffix(stop_string.strip()).rstrip()
        if on_text and options.num_beams > 1:
            on_text(text)
        return Answer(
            text=text,
            config=config,
            trace=trace,
            flops_saved=savings(trace, self.model) if trace is not None else {},
            num_layers=self.checkpoint.num_layers,
            prompt_rows=prompt.num_rows,
            visual_tokens=prompt.num_visual,
            new_tokens=len(ids),
            time_to_first_token=(watch.first_token_at or begin + seconds) - begin,
            seconds=seconds,
            finish=finish,
            ids=tuple(ids),
        )

    def warm_up(self, prompt: Prompt, config: PruningConfig | None) -> None:
        """Run a prompt once, dense and pruned, so that a comparison does not charge one of them for first use."""
        if self._is_warm:
            return
        for each in (None, config):
            self.answer(prompt, each, GenerationOptions(max_new_tokens=1))
        self._is_warm = True


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


class _Watch(StoppingCriteria):
    """Notes when the first token is there, and stops when asked to."""

    def __init__(self, stop: threading.Event | None) -> None:
        self.stop = stop
        self.first_token_at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        if self.first_token_at is None:
            if input_ids.device.type != "cpu":
                torch.accelerator.synchronize(input_ids.device)
            self.first_token_at = time.perf_counter()
        is_stopped = self.stop is not None and self.stop.is_set()
        return torch.full((input_ids.shape[0],), is_stopped, dtype=torch.bool, device=input_ids.device)


class _Streamer(TextStreamer):
    """transformers' text streamer with a function at its end instead of a terminal."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._has_begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self._has_begun:
            text = text.lstrip()  # the space between the prompt's last word and the answer
            self._has_begun = bool(text)
        if text:
            self._on_text(text)


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

    def __init__(self, model: ChatModel, config: PruningConfig | None, options: GenerationOptions | None = None):
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


# --- what happened, in words ---


def describe(answer: Answer) -> str:
    """One line: what was pruned, what it saved, and how fast the answer came."""
    parts = [_pruning_in_words(answer)]
    if answer.trace is not None and answer.visual_tokens and answer.config is not None and answer.config.mode:
        saved = answer.flops_saved
        parts.append(f"FLOPs saved {saved['paper']:.1%} (paper), {saved['executed']:.1%} (executed)")
    parts.append(f"first token {_seconds(answer.time_to_first_token)}")
    if answer.tokens_per_second is not None:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    if answer.finish == "length":
        parts.append(f"cut off at {answer.new_tokens} tokens")
    elif answer.finish == "interrupted":
        parts.append("stopped")
    return " · ".join(parts)


def _pruning_in_words(answer: Answer) -> str:
    config, trace, count = answer.config, answer.trace, answer.visual_tokens
    if not count:
        return "no picture in the conversation, nothing to prune"
    if config is None or trace is None or not config.mode:
        return f"dense: all {count} visual tokens in every layer"
    if trace.select_layer is not None:
        if trace.select_layer == answer.num_layers - 1:
            return f"selected at layer {trace.select_layer}, the last: nothing was left to prune"
        kept = len(trace.kept_positions)
        text = f"kept {kept} of {count} visual tokens, selected at layer {trace.select_layer}"
        if trace.exit_layer is not None:
            return f"{text}, exit at layer {trace.exit_layer}"
        if not kept:
            return f"{text}, no picture from layer {trace.select_layer + 1} on"
        return f"{text}, no exit" if config.deep else text
    if trace.exit_layer is not None:
        return f"kept 0 of {count} visual tokens from layer {trace.exit_layer} on"
    if not config.middle:
        return f"kept all {count} visual tokens; text reads none of them below layer {config.shallow_mid_layer}"
    reason = "no layer was probed"
    if trace.smallest_cosine:
        layer, cosine = min(trace.smallest_cosine.items(), key=lambda entry: entry[1])
        reason = f"smallest cosine {cosine:.4f} (layer {layer}), layer_threshold {config.layer_threshold}"
    return f"kept all {count} visual tokens, nothing was selected: {reason}"


def rows_in_words(rows_per_layer: Sequence[int]) -> str:
    """``651 ×10, 85 ×6``: how many layers in a row processed how many rows."""
    return ", ".join(f"{rows} ×{len(list(group))}" for rows, group in groupby(rows_per_layer))


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
