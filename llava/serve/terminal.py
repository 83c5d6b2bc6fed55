"""The terminal around a conversation: one answer, or a chat with commands.

Answers, and what a command was asked for, go to standard output; everything else, such as figures, to standard error.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from llava.errors import EXIT_INTERRUPTED, UserError, clean_text, tell, to_json
from llava.examples import outside_its_world
from llava.images import is_url
from llava.inference import Answer, Checkpoint, GenerationOptions, LoadedModel, LoadOptions, Turn, open_checkpoint
from llava.model.builder import check_device, parse_dtype
from llava.options import from_arguments
from llava.pruning import Method
from llava.serve.chat import ChatSession, Comparison
from llava.serve.describe import describe
from llava.serve.line_editor import line_editor, path_completions
from llava.serve.output import (
    Stream,
    comparison_table,
    notes,
    replies,
    say_what_speed_to_expect,
    show_patches,
    show_trace,
    show_what_choosing_does,
)
from llava.utils import write_whole

# --- the program ---


def run(args: argparse.Namespace, can_prune: bool) -> int:
    """Run the program with the arguments of `llava.serve.cli_pruning`; returns its exit code.

    0, or 130 for an answer that was interrupted. What goes wrong is raised.
    """
    with _quiet(args.debug):
        # Everything that can be wrong is looked at before any weight is read.
        options = from_arguments(GenerationOptions, args)
        if args.device is not None:
            check_device(args.device)
        if args.dtype is not None:
            parse_dtype(args.dtype)
        questions = _questions(args)
        checkpoint = open_checkpoint(args.model_path, args.model_base, args.conv_mode)
        config = None if args.dense else checkpoint.pruning_config(args.pruning_config)
        pictures = [checkpoint.read_picture(source) for source in args.image_file]
        for question in questions or [""]:
            checkpoint.encode([Turn(question, pictures)])

        model = _load(checkpoint, args)

        def session() -> ChatSession:
            new = ChatSession(model, config, options)
            for picture in pictures:
                new.add_picture(picture)
            return new

        if questions is None:
            return Chat(session(), can_prune=can_prune, compare=args.compare, debug=args.debug).run()
        for question in questions:
            code = _answer_once(session(), question, args, is_one_of_many=len(questions) > 1)
            if code:
                return code
        return 0


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """One line a warning, and none of the libraries' own logging, unless it is asked for."""
    level, show = transformers.logging.get_verbosity(), warnings.showwarning

    def show_warning(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
        print(clean_text(f"warning: {message}"), file=sys.stderr)

    if not debug:
        transformers.logging.set_verbosity_error()
        warnings.showwarning = show_warning
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        warnings.showwarning = show


def _questions(args: argparse.Namespace) -> list[str] | None:
    """The questions of a run that answers and ends, each asked on its own; None for a chat."""
    if args.question is not None:
        questions = [args.question.strip()]
    elif not sys.stdin.isatty():
        questions = [line.strip() for line in _piped_text().splitlines() if line.strip()]
    elif args.once or args.json:
        raise UserError("there is no question: give --question TEXT, or questions through a pipe, one a line")
    else:
        return None
    if not any(questions):
        raise UserError("the question is empty: give --question TEXT, or questions through a pipe, one a line")
    commands = [question for question in questions if args.question is None and question.startswith("/")]
    if commands:
        raise UserError(f"{commands[0]!r} is a command of the chat: piped lines are questions, one each")
    if not args.image_file:
        raise UserError("a question needs a picture: give --image-file PATH or URL")
    for question in questions:
        _check_text(question)
    return questions


def _piped_text() -> str:
    """Standard input, which must be UTF-8 whatever the locale says."""
    try:
        buffer = getattr(sys.stdin, "buffer", None)
        return buffer.read().decode() if buffer else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"the question on standard input is not {error.encoding} text; convert it, as iconv does"
        ) from error


def _check_text(text: str) -> None:
    """Refuse what stood for bytes that were no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{text!a} is not {error.encoding} text") from error


def _load(checkpoint: Checkpoint, args: argparse.Namespace) -> LoadedModel:
    if sys.stderr.isatty():
        print(f"Loading {clean_text(checkpoint.name)} …", file=sys.stderr)  # the loader draws a bar for large ones
    return LoadedModel(checkpoint, from_arguments(LoadOptions, args))


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C asks the answer to end after its next token; pressed again it breaks off at once."""
    stop = threading.Event()

    def handler(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _answer_once(session: ChatSession, question: str, args: argparse.Namespace, *, is_one_of_many: bool) -> int:
    """One question and its answer; as JSON, an object, or one a line where there are many."""
    if not args.json:
        _hint(session, question)
    if args.show:
        print(clean_text(f"{', '.join(args.image_file)}: {question}"), file=sys.stderr, flush=True)
    result, last = _ask(session, question, args.compare, streams=not args.json)
    if args.json:
        checkpoint = session.model.checkpoint
        about = {
            "model": str(checkpoint.model_path),
            "conv_mode": checkpoint.conv_mode,
            "images": args.image_file,
            "question": question,
        }
        written = {**about, **result.to_dict()}
        print(json.dumps(written, ensure_ascii=False) if is_one_of_many else to_json(written).rstrip())
    elif args.show and last.finish != "interrupted":
        show_what_choosing_does(session, last, notes())
    else:
        _show(session, result, args.debug)
    return EXIT_INTERRUPTED if last.finish == "interrupted" else 0


def _hint(session: ChatSession, question: str) -> None:
    """What to know before an answer that can only be a guess."""
    images = [picture.image for picture in session.pictures]
    if why := outside_its_world(session.model.checkpoint, question, images):
        notes().print(clean_text(f"hint: {why}"))


def _ask(session: ChatSession, question: str, compare: bool, *, streams: bool) -> tuple[Answer | Comparison, Answer]:
    """The answer, or both; and the one that the conversation goes on with. Streamed to standard output if asked for."""
    stream = Stream() if streams else None
    with _stop_on_interrupt() as stop:
        if compare:
            both = session.compare(question, stop)
            return both, both.pruned
        answer = session.ask(question, stream, stop)
    if stream is not None:
        stream.end()
    return answer, answer


def _show(session: ChatSession, result: Answer | Comparison, debug: bool) -> None:
    """What follows an answer: its figures, or the table of a comparison; with ``debug`` the trace."""
    console = notes()
    if isinstance(result, Comparison):
        replies().print(comparison_table(result))
        say_what_speed_to_expect(session, console)
        last = result.pruned
    else:
        if not result.text:
            console.print("(the answer is empty: the model ended it at once)")
        console.print(f"[{describe(result)}]")
        last = result
    if debug:
        show_trace(last, console)


# --- the chat ---


class Chat:
    """The terminal around a `ChatSession`: lines in, commands, answers out.

    Args:
        session: the conversation.
        can_prune: whether the commands about pruning are there.
        compare: answer every question dense and pruned.
        debug: tracebacks of errors, and the trace after every answer.
    """

    def __init__(self, session: ChatSession, *, can_prune: bool, compare: bool = False, debug: bool = False) -> None:
        self.session = session
        self.compare = compare
        self.debug = debug
        self._set_aside: Method | None = None
        self._is_over = False
        # name → what is written after it, what it does, how
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/image": ("PATH|URL", "add a picture to the next question", self._image),
            "/drop": ("[N]", "take the last picture back, or the N-th of the conversation", self._drop),
            "/retry": ("", "ask the last question again", self._retry),
        }
        if can_prune:
            self.commands |= {
                "/config": ("[KEY=VALUE …|JSON|@FILE]", "show the pruning config, or change it", self._config),
                "/dense": ("", "stop pruning; again: prune as before", self._dense),
                "/patches": ("", "the pictures, and the patches kept for the last answer", self._patches),
                "/trace": ("", "what was pruned for the last answer, layer by layer", self._trace),
            }
        self.commands |= {
            "/save": ("FILE", "write the conversation as JSON; /save! replaces a file", self._save),
            "/load": ("FILE", "go on with a conversation that was saved", self._load),
            "/reset": ("", "forget the conversation and its pictures", self._reset),
            "/help": ("", "this list", self._help),
            "/quit": ("", "leave (so does Ctrl-D)", self._quit),
        }

    def run(self) -> int:
        """Read lines until the end; returns the exit code."""
        self._greet()
        with line_editor(self.completions):
            while not self._is_over:
                try:
                    line = input("\n> ").strip()
                except KeyboardInterrupt:
                    print("  (Ctrl-D or /quit leaves)", end="")
                    continue
                except UnicodeDecodeError as error:
                    tell(UserError(f"this line is not {error.encoding} text"), debug=self.debug)
                    continue
                except EOFError:
                    print()
                    break
                if line:
                    self.handle(line)
        return 0

    def handle(self, line: str) -> None:
        """Obey a command or answer a question; what goes wrong is said, and the chat goes on."""
        try:
            if line.startswith("//"):
                self._ask(line[1:])
            elif line.startswith("/"):
                self._command(line)
            else:
                self._ask(line)
        except KeyboardInterrupt:
            print("\n(broken off; the question is forgotten)", file=sys.stderr)
        except BrokenPipeError:
            raise
        except Exception as error:
            tell(error, debug=self.debug)

    def completions(self, line: str) -> list[str]:
        """What the last word of a line may become: a command, or a path behind one that takes it."""
        name, space, rest = line.partition(" ")
        word = line.split(" ")[-1]
        if not space:
            return [f"{each} " for each in self.commands if line and each.startswith(name)]
        if name in ("/image", "/save", "/save!", "/load"):
            return path_completions(word)
        if name == "/config" and rest.startswith("@"):
            return [f"@{path}" for path in path_completions(word.removeprefix("@"))]
        return []

    def _greet(self) -> None:
        checkpoint = self.session.model.checkpoint
        lines = [
            f"{checkpoint.name} ({checkpoint.num_layers} layers, {self.session.model.placement}, "
            f"template {checkpoint.conv_mode})"
        ]
        if "/config" in self.commands:
            lines.append(f"pruning: {self._config_in_words()}")
        pictures = [picture.source for picture in self.session.waiting]
        lines.append("pictures: " + ", ".join(pictures) if pictures else "no picture yet: /image PATH adds one")
        lines.append("Ask away. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        notes().print(clean_text("\n".join(lines)))

    def _config_in_words(self) -> str:
        config = self.session.config
        return json.dumps(config.to_dict(), ensure_ascii=False) if config else "off (dense)"

    def _ask(self, question: str) -> None:
        _check_text(question)
        _hint(self.session, question)
        compare = self.compare and self.session.config is not None
        result, _ = _ask(self.session, question, compare, streams=True)
        _show(self.session, result, self.debug)

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/save!":
            self._save(argument, replace=True)
            return
        if name not in self.commands:
            known = [each for each in self.commands if each.startswith(name)] if len(name) > 1 else []
            close = known or difflib.get_close_matches(name, self.commands, n=1, cutoff=0.5)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"there is no command {name!r}; {meant}/help lists them, //… asks what begins with a slash")
        takes, _, obey = self.commands[name]
        if argument and not takes:
            raise UserError(f"{name} takes nothing, and {argument!r} follows it; //… asks what begins with a slash")
        obey(argument)

    def _image(self, argument: str) -> None:
        source = _unquoted(argument)
        if not source:
            raise UserError("/image needs a path or a URL")
        picture = self.session.add_picture(source if is_url(source) else Path(source).expanduser())
        width, height = picture.image.size
        place = f"picture {len(self.session.pictures)} of the conversation, for the next question"
        replies().print(clean_text(f"{picture.source} ({width} × {height}): {place}"))

    def _drop(self, argument: str) -> None:
        if argument and not argument.isdecimal():
            raise UserError(f"/drop takes a picture's number, not {argument!r}")
        dropped = self.session.drop_picture(int(argument) if argument else None)
        left = [picture.source for picture in self.session.pictures]
        replies().print(clean_text(f"dropped {dropped.source}; pictures: {', '.join(left) or 'none'}"))

    def _retry(self, argument: str) -> None:
        with self.session.asking_again() as question:
            notes().print(clean_text(f"> {question}"))
            self._ask(question)

    def _config(self, argument: str) -> None:
        if argument:
            given = changed_config(self.session.config, argument) if _CHANGE.match(argument) else argument
            self.session.set_config(given)
        replies().print("pruning:", self._config_in_words())

    def _dense(self, argument: str) -> None:
        if self.session.config is not None:
            self._set_aside, self.session.config = self.session.config, None
        elif self._set_aside is not None:
            self.session.config = self._set_aside
        else:
            self.session.set_config(None)
        replies().print("pruning:", self._config_in_words())

    def _last(self) -> Answer:
        if (answer := self.session.last_answer) is None:
            raise UserError("no answer yet: ask something first")
        return answer

    def _patches(self, argument: str) -> None:
        show_patches(self.session, self._last(), replies())

    def _trace(self, argument: str) -> None:
        show_trace(self._last(), replies())

    def _save(self, argument: str, replace: bool = False) -> None:
        path = _file_named("/save", argument)
        if path.exists() and not replace:
            raise UserError(f"{path} exists; /save! {argument} replaces it")
        write_whole(path, to_json(self.session.to_dict()))
        replies().print(clean_text(f"wrote {path} (turns: {len(self.session.turns)})"))

    def _load(self, argument: str) -> None:
        path = _file_named("/load", argument)
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is no conversation: not JSON") from error
        self.session.load(saved)
        count = len(self.session.turns)
        replies().print(
            clean_text(f"{path}: {count} turns, {len(self.session.pictures)} pictures; the next question goes on")
        )
        if saved.get("model") != str(self.session.model.checkpoint.model_path):
            notes().print(clean_text(f"warning: these answers are of {saved.get('model')}"))

    def _reset(self, argument: str) -> None:
        self.session.reset()
        print("forgotten; /image PATH adds a picture")

    def _help(self, argument: str) -> None:
        for name, (rest, what, _) in self.commands.items():
            print(f"  {f'{name} {rest}':<34}{what}")
        print("Anything else is a question, and so is //…, with one slash less.")
        print("Ctrl-C stops an answer; pressed twice, at once. Tab completes commands and paths.")

    def _quit(self, argument: str) -> None:
        self._is_over = True


def _unquoted(text: str) -> str:
    """A path as typed; a file dropped on a terminal comes in quotes."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _file_named(command: str, argument: str) -> Path:
    if not argument:
        raise UserError(f"{command} needs a file name")
    path = Path(_unquoted(argument)).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder")
    return path


_CHANGE = re.compile(r"\w+=")


def changed_config(config: Method | None, changes: str) -> dict[str, Any]:
    """A config with some knobs changed: ``keep=64 mode=middle,deep``.

    A value is JSON, a word, or a list of either with commas; ``null`` takes the knob away. Another ``method`` begins
    without the knobs of the old one.

    Raises:
        UserError: something that is no ``KEY=VALUE``.
    """
    parts = dict(_pair(each) for each in re.split(r"\s+(?=\w+=)", changes))
    before = config.to_dict() if config is not None else {}
    if parts.get("method", before.get("method")) != before.get("method"):
        before = {}
    for key, value in parts.items():
        # A list of one has no comma.
        is_list = isinstance(before.get(key), list) or key == "mode"
        before[key] = [value] if is_list and not isinstance(value, list | None) else value
    return {key: value for key, value in before.items() if value is not None}


def _pair(written: str) -> tuple[str, Any]:
    key, _, value = written.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        words = [_json_or_word(word.strip()) for word in value.split(",")]
    if not value or any(isinstance(word, str) and re.search(r"\s", word) for word in words):
        raise UserError(f"{written!r} is not KEY=VALUE; as in /config keep=64 mode=middle,deep")
    return key, words if "," in value else words[0]


def _json_or_word(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
