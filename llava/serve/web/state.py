"""What one browser tab has said, asked and shown, and what its controls do to that. No gradio in here.

`WebChat` holds the model and is shared by all; everything of a user is in the `WebSession`.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.images import load_image
from llava.inference import Answer, GenerationOptions, Picture
from llava.pruning import Method
from llava.serve.chat import ChatModel, ChatSession
from llava.serve.remote import RemoteConfig, RemoteModel
from llava.serve.web.late import LateModel
from llava.serve.web.settings import Settings
from llava.utils import UserError
from llava.visualize.draw import overlay_kept
from llava.visualize.patches import kept_in_words, kept_rows, patch_maps

MAX_PIXELS = 25_000_000
MAX_PICTURES = 8  # of one conversation
MAX_QUESTION = 4_000
MAX_REMOTE_ANSWERS = 32
RUNS = {"pruned": "Pruned", "dense": "Dense", "compare": "Compare"}


@dataclass
class Said:
    """One answer as it grows. `label`: which of two it is, "" where it is alone; `answer`: absent until it is whole."""

    label: str = ""
    text: str = ""
    answer: Answer | None = None


@dataclass
class Exchange:
    """A question, the names of its pictures, and what was said to it: one answer, or a dense and a pruned one."""

    question: str
    pictures: list[str]
    said: list[Said]


@dataclass
class Shown:
    """A picture of the conversation as the page shows it.

    Attributes:
        picture: as the conversation has it, named after its file.
        image: as it was given.
        note: what became of its visual tokens in the newest answer.
        kept: it, with the patches that the newest answer kept; None: nothing is known of it.
        is_new: whether it waits for the next question.
    """

    picture: Picture
    image: Image.Image
    note: str = "goes with your next question"
    kept: Image.Image | None = None
    is_new: bool = True

    @property
    def name(self) -> str:
        """Of its file."""
        return self.picture.source


@dataclass
class WebSession:
    """One browser tab: its conversation, what it shows, and the switch that stops its answer.

    Attributes:
        exchanges: what was said, oldest first; the last one grows while an answer streams.
        shown: the conversation's pictures, oldest first.
        returned: a question that could not be answered, for its box; "" after one that was.
        turn: one question of a tab after the other.
        is_left: whether the tab has begun another conversation; nothing of this one is to be shown any more.
    """

    chat: ChatSession
    exchanges: list[Exchange] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    returned: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    turn: Any = field(default_factory=threading.Lock)
    is_left: bool = False


class WebChat:
    """What the page's controls do.

    Args:
        model: here, or a server's.
        examples: pictures by name, each with a question.
        recommended: the pruning config that the page begins with; absent, the model's own.

    Attributes:
        settings: the configs that the page offers; None with a server's model, which knows its own.
    """

    def __init__(
        self, model: ChatModel, examples: dict[str, tuple[Path, str]], recommended: Method | RemoteConfig | None = None
    ) -> None:
        self.model = model
        self.examples = examples
        config: Any = model.checkpoint.pruning_config() if recommended is None else recommended
        self.recommended = config
        is_remote = isinstance(config, RemoteConfig)
        self.settings = None if is_remote else Settings(model.checkpoint, config, model.checkpoint.num_layers)

    @property
    def answers_at_once(self) -> int:
        """A model here answers one after the other; a server has a queue of its own."""
        return MAX_REMOTE_ANSWERS if isinstance(self.model, RemoteModel) else 1

    def new_session(self) -> WebSession:
        """For every page that opens."""
        return WebSession(ChatSession(self.model, self.recommended))

    def arrival(self) -> Iterator[str]:
        """What is to be said until the model can answer, for a page that has just been opened."""
        if isinstance(self.model, LateModel) and not self.model.is_here:
            yield "Reading the model's weights. A question that is asked now waits for them."
            self.model.wait()
        yield "Ready."

    def take_pictures(self, session: WebSession, sources: Sequence[str | Path]) -> str:
        """Put pictures to the next question. Returns a status line; those that cannot be used are named in it."""
        status = "Ask something about it." if len(sources) == 1 else "Ask something about them."
        for source in sources:
            name = Path(source).name
            try:
                if len(session.shown) >= MAX_PICTURES:
                    raise UserError(f"a conversation has at most {MAX_PICTURES} pictures; begin a new one")
                image = load_image(Path(source), max_pixels=MAX_PIXELS)
                picture = replace(self.model.checkpoint.read_picture(image), source=name)
            except UserError as error:
                # The path on the server is nobody's business.
                status = f"Error: {str(error).replace(str(source), name)}"
                continue
            session.shown.append(Shown(picture, image))
        return status

    def take_back(self, session: WebSession) -> str:
        """Take back the newest picture that was not asked about yet. Returns a status line."""
        if not session.shown or not session.shown[-1].is_new:
            return "No new picture to take back; those above have been asked about."
        return f"{session.shown.pop().name} is taken back."

    def ask(
        self,
        session: WebSession,
        question: str,
        run: str = "pruned",
        pruning: str = "",
        max_new_tokens: float = 128,
        temperature: float = 0,
    ) -> Iterator[str]:
        """Answer a question into the session. Yields status lines, whenever there is something new to show.

        Args:
            session: of the tab.
            question: what was typed.
            run: a key of `RUNS`.
            pruning: config as JSON; empty: the recommended one, with a server's model the server's own.
            max_new_tokens, temperature: as in `GenerationOptions`.

        After any error the conversation is as it was, and the question is in `session.returned`.
        """
        with session.turn:
            session.returned = ""
            exchanges = list(session.exchanges)
            # A picture that is added while this answer comes goes with the question after it.
            new = [shown for shown in session.shown if shown.is_new]
            try:
                config = self._config(run, pruning)
                options = GenerationOptions(max_new_tokens=int(max_new_tokens), temperature=float(temperature))
                session.chat.waiting = [shown.picture for shown in new]
                self._prepare(session, question, config, options)
                labels = ("Dense", "Pruned") if run == "compare" else ("",)
                exchange = Exchange(question, [shown.name for shown in new], [Said(label) for label in labels])
                session.exchanges = [*exchanges, exchange]
                for shown in new:
                    shown.is_new = False
                late = isinstance(self.model, LateModel) and not self.model.is_here
                yield "Waiting for the model's weights …" if late else "Reading the picture and the question …"
                for _ in self._stream(session, exchange, run):
                    yield "Answering …"
                self._show_kept(session)
                yield "Ready."
            except UserError as error:
                self._undo(session, exchanges, question, new)
                yield f"Error: {error}"
            except Exception as error:  # the page must stay usable whatever a model or a driver does
                warnings.warn(f"an answer failed: {type(error).__name__}: {error}", stacklevel=1)
                self._undo(session, exchanges, question, new)
                failed = f"the answer failed ({type(error).__name__}); the conversation is as it was. Try again."
                yield f"Error: {failed}"

    @staticmethod
    def _undo(session: WebSession, exchanges: list[Exchange], question: str, new: Sequence[Shown]) -> None:
        session.exchanges, session.returned = exchanges, question
        for shown in new:
            shown.is_new = True

    def _config(self, run: str, pruning: str) -> Any:
        if run not in RUNS:
            raise UserError(f"{run!r} is no way to run; choose one of {', '.join(RUNS)}")
        if run == "dense":
            return None
        return self.settings.check(pruning) if self.settings else self.model.checkpoint.pruning_config(pruning)

    @staticmethod
    def _prepare(session: WebSession, question: str, config: Any, options: GenerationOptions) -> None:
        if not question.strip():
            raise UserError("the question is empty; type one")
        if len(question) > MAX_QUESTION:
            raise UserError(f"the question has {len(question):,} characters; the limit is {MAX_QUESTION:,}")
        if not session.chat.turns and not session.chat.waiting:
            raise UserError("there is no picture yet; add one, or choose one of the examples")
        session.chat.config, session.chat.options = config, options
        session.stop = threading.Event()

    @staticmethod
    def _stream(session: WebSession, exchange: Exchange, run: str) -> Iterator[None]:
        """Let the exchange's answers grow. Raises what the model raised."""
        pieces: queue.Queue[str | None] = queue.Queue()
        outcome: list[Any] = []

        def work() -> None:
            try:
                if run == "compare":
                    outcome.append(session.chat.compare(exchange.question, session.stop))
                else:
                    outcome.append(session.chat.ask(exchange.question, pieces.put, session.stop))
            except BaseException as error:
                outcome.append(error)
            finally:
                pieces.put(None)

        thread = threading.Thread(target=work, name="answer", daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                exchange.said[-1].text += piece
                yield
        finally:
            # Also when the browser went away: nobody waits for the rest.
            session.stop.set()
            thread.join()
        result = outcome[0]
        if isinstance(result, BaseException):
            raise result
        answers = [result.dense, result.pruned] if run == "compare" else [result]
        for said, answer in zip(exchange.said, answers, strict=True):
            said.text, said.answer = answer.text, answer

    def _show_kept(self, session: WebSession) -> None:
        """Give every picture of the conversation what the newest answer kept of it."""
        answer = session.chat.last_answer
        assert answer is not None  # the stream ended without an error
        asked = [shown for shown in session.shown if not shown.is_new]
        for shown in asked:
            shown.kept, shown.note = None, ""
        if not answer.visual_tokens:
            return
        if answer.trace is None:
            dense, server = "all kept for the newest answer", "where the kept patches lie, a server does not say"
            asked[-1].note = dense if answer.config is None else server
            return
        kept = kept_rows(answer.trace)
        maps = patch_maps(self.model.checkpoint, session.chat.last_prompt())
        if not all(patches.is_known for patches in maps):
            asked[-1].note = kept_in_words(kept)
            return
        # Pictures are spliced in order, and so are their rows.
        ends = np.cumsum([len(patches.boxes) for patches in maps])
        for shown, patches, own in zip(asked, maps, np.split(kept, ends[:-1]), strict=True):
            shown.kept = overlay_kept(shown.image, patches, own)
            shown.note = f"{int(own.sum())} of {len(own)} patches kept for the newest answer"
