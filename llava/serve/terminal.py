"""The terminal around a conversation: one answer, or a chat with commands."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava.inference import Answer, Checkpoint, GenerationOptions, LoadedModel, LoadOptions, Turn, open_checkpoint
from llava.model.builder import check_device, parse_dtype
from llava.options import from_arguments
from llava.pruning import Method
from llava.serve.chat import ChatSession, Comparison
from llava.serve.describe import describe, rows_in_words
from llava.utils import UserError, clean_text, write_whole

EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130


# --- the program ---


def run(args: argparse.Namespace, can_prune: bool) -> int:
    """Run the program with the arguments of `llava.serve.cli_pruning`; returns its exit code.

    0; 1 failed; 2 bad input; 130 interrupted. A KeyboardInterrupt outside of an answer is the caller's.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    with _quiet(args.debug):
        try:
            return _run(args, can_prune)
        except BrokenPipeError:
            # Who read our output has gone; let the interpreter's last flush go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_FAILED
        except Exception as error:
            return _report(error, args.debug)


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


def _report(error: Exception, debug: bool) -> int:
    """Print an error as one line and return the exit code for it."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, torch.OutOfMemoryError):
        message = "not enough GPU memory; try a shorter conversation, --load-4bit, a smaller model or --device cpu"
    elif isinstance(error, UserError):
        message = str(error)
    else:
        hint = "" if debug else " (--debug shows where)"
        message = f"{type(error).__name__}: {error}{hint}"
    print("error: " + " ".join(clean_text(message).split()), file=sys.stderr)
    return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILED


def _run(args: argparse.Namespace, can_prune: bool) -> int:
    # Everything that can be wrong is looked at before any weight is read.
    options = from_arguments(GenerationOptions, args)
    if args.device is not None:
        check_device(args.device)
    if args.dtype is not None:
        parse_dtype(args.dtype)
    question = _one_shot_question(args)
    checkpoint = open_checkpoint(args.model_path, args.model_base, args.conv_mode)
    config = None if args.dense else checkpoint.pruning_config(args.pruning_config)
    pictures = [checkpoint.read_picture(source) for source in args.image_file]
    checkpoint.encode([Turn(question or "", pictures)])

    model = _load(checkpoint, args)
    session = ChatSession(model, config, options)
    for picture in pictures:
        session.add_picture(picture)
    if question is None:
        return Chat(session, can_prune=can_prune, compare=args.compare, debug=args.debug).run()
    return _answer_once(session, question, args)


def _one_shot_question(args: argparse.Namespace) -> str | None:
    """The question of a one-shot run; None for a chat."""
    question = args.question
    if question is None and not sys.stdin.isatty():
        try:
            question = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"the question on standard input is not {error.encoding} text") from error
    if question is None:
        if args.json:
            raise UserError("--json prints one answer: give --question TEXT, or a question through a pipe")
        return None
    if not question.strip():
        raise UserError("the question is empty: give --question TEXT, or a question through a pipe")
    if not args.image_file:
        raise UserError("a question needs a picture: give --image-file PATH or URL")
    return question.strip()


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


def _write(text: str) -> None:
    print(clean_text(text), end="", flush=True)


def _answer_once(session: ChatSession, question: str, args: argparse.Namespace) -> int:
    result: Answer | Comparison
    with _stop_on_interrupt() as stop:
        if args.compare:
            result = session.compare(question, stop)
            last = result.pruned
        else:
            result = last = session.ask(question, None if args.json else _write, stop)
    if args.json:
        checkpoint = session.model.checkpoint
        about = {
            "model": str(checkpoint.model_path),
            "conv_mode": checkpoint.conv_mode,
            "images": args.image_file,
            "question": question,
        }
        print(json.dumps({**about, **result.to_dict()}, indent=2))
    else:
        _show(result, args.debug)
    return EXIT_INTERRUPTED if last.finish == "interrupted" else 0


# --- what is shown ---


def _show(result: Answer | Comparison, debug: bool) -> None:
    """What follows an answer: its line, or the table of a comparison; with ``debug`` the trace."""
    if isinstance(result, Comparison):
        Console(highlight=False).print(comparison_table(result))
        last = result.pruned
    else:
        print(f"\n[{describe(result)}]")
        last = result
    if debug:
        show_trace(last)


def comparison_table(both: Comparison) -> Table:
    """Dense and pruned beside each other."""
    dense, pruned = both.dense, both.pruned
    table = Table("", "dense", "pruned", show_lines=False)

    def row(name: str, value: Callable[[Answer], str]) -> None:
        table.add_row(name, Text(value(dense)), Text(value(pruned)))

    def saved(convention: str) -> Callable[[Answer], str]:
        return lambda answer: f"{answer.flops_saved[convention]:.1%}" if answer.flops_saved else "–"

    row("answer", lambda answer: clean_text(answer.text))
    row("visual tokens kept", lambda answer: f"{answer.kept} of {answer.visual_tokens}")
    row("selecting layer", lambda answer: _layer(answer.trace.select_layer if answer.trace else None))
    row("exit layer", lambda answer: _layer(answer.trace.exit_layer if answer.trace else None))
    row("rows per layer", lambda answer: rows_in_words(answer.rows_per_layer))
    row("FLOPs saved (paper)", saved("paper"))
    row("FLOPs saved (executed)", saved("executed"))
    row("time to first token", lambda answer: f"{answer.clock.first_token * 1000:.1f} ms")
    row("tokens/s", lambda answer: f"{answer.clock.tokens_per_second:.1f}" if answer.clock.tokens_per_second else "–")
    ratio = dense.clock.first_token / pruned.clock.first_token
    table.caption = Text(
        f"answers {'agree' if both.agree else 'differ'} · first token ×{ratio:.2f} as fast, measured once"
    )
    return table


def _layer(layer: int | None) -> str:
    return "–" if layer is None else str(layer)


def show_trace(answer: Answer) -> None:
    """What the engine decided for an answer, layer by layer."""
    trace = answer.trace
    if trace is None:
        print(f"dense: {rows_in_words(answer.rows_per_layer)} rows a layer")
        return
    table = Table("layer", "rows", "smallest cosine", "", title="prefill")
    for layer, rows in enumerate(trace.rows_per_layer):
        cosine = trace.smallest_cosine.get(layer)
        event = {trace.select_layer: "selected here", trace.exit_layer: "kept tokens gone"}.get(layer, "")
        table.add_row(str(layer), str(rows), "" if cosine is None else f"{cosine:.5f}", event)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"kept positions: {trace.kept_positions}", markup=False)
    for convention, fraction in answer.flops_saved.items():
        console.print(f"FLOPs saved ({convention}): {fraction:.2%}")


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
        self._last: Answer | None = None
        self._is_over = False
        # name → what is written after it, what it does, how
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/image": ("PATH|URL", "add a picture to the next question", self._image),
        }
        if can_prune:
            self.commands |= {
                "/config": ("[JSON|@FILE]", "show the pruning config, or prune with this one", self._config),
                "/dense": ("", "stop pruning; again: prune as before", self._dense),
                "/trace": ("", "what was pruned for the last answer, layer by layer", self._trace),
            }
        self.commands |= {
            "/save": ("FILE", "write the conversation as JSON; /save! replaces a file", self._save),
            "/reset": ("", "forget the conversation and its pictures", self._reset),
            "/help": ("", "this list", self._help),
            "/quit": ("", "leave (so does Ctrl-D)", self._quit),
        }

    def run(self) -> int:
        """Read lines until the end; returns the exit code."""
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and a history
        self._greet()
        while not self._is_over:
            try:
                line = input("\n> ").strip()
            except KeyboardInterrupt:
                print("  (Ctrl-D or /quit leaves)", end="")
                continue
            except UnicodeDecodeError as error:
                _report(UserError(f"this line is not {error.encoding} text"), self.debug)
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
            if line.startswith("/"):
                self._command(line)
            else:
                self._ask(line)
        except KeyboardInterrupt:
            print("\n[broken off; the question is forgotten]")
        except BrokenPipeError:
            raise
        except Exception as error:
            _report(error, self.debug)

    def _greet(self) -> None:
        checkpoint = self.session.model.checkpoint
        print(
            clean_text(
                f"{checkpoint.name} ({checkpoint.num_layers} layers, {self.session.model.placement}, "
                f"template {checkpoint.conv_mode})"
            )
        )
        if "/config" in self.commands:
            print("pruning:", self._config_in_words())
        pictures = [picture.source for picture in self.session.waiting]
        print(clean_text("pictures: " + ", ".join(pictures)) if pictures else "no picture yet: /image PATH adds one")
        print("Ask away. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")

    def _config_in_words(self) -> str:
        return json.dumps(self.session.config.to_dict()) if self.session.config else "off (dense)"

    def _ask(self, question: str) -> None:
        result: Answer | Comparison
        with _stop_on_interrupt() as stop:
            if self.compare and self.session.config is not None:
                result = self.session.compare(question, stop)
                self._last = result.pruned
            else:
                result = self._last = self.session.ask(question, _write, stop)
        _show(result, self.debug)

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name == "/save!":
            self._save(argument.strip(), replace=True)
        elif name in self.commands:
            self.commands[name][2](argument.strip())
        else:
            raise UserError(f"there is no command {name!r}; /help lists them")

    def _image(self, argument: str) -> None:
        source = _unquoted(argument)
        if not source:
            raise UserError("/image needs a path or a URL")
        picture = self.session.add_picture(source)
        width, height = picture.image.size
        place = f"picture {len(self.session.waiting)} of the next question"
        print(clean_text(f"{picture.source} ({width} × {height}): {place}"))

    def _config(self, argument: str) -> None:
        if argument:
            self.session.set_config(argument)
        print("pruning:", self._config_in_words())

    def _dense(self, argument: str) -> None:
        if self.session.config is not None:
            self._set_aside, self.session.config = self.session.config, None
        elif self._set_aside is not None:
            self.session.config = self._set_aside
        else:
            self.session.set_config(None)
        print("pruning:", self._config_in_words())

    def _trace(self, argument: str) -> None:
        if self._last is None:
            raise UserError("no answer yet: ask something first")
        show_trace(self._last)

    def _save(self, argument: str, replace: bool = False) -> None:
        if not argument:
            raise UserError("/save needs a file name")
        path = Path(_unquoted(argument)).expanduser()
        if path.is_dir():
            raise UserError(f"{path} is a folder")
        if path.exists() and not replace:
            raise UserError(f"{path} exists; /save! {argument} replaces it")
        write_whole(path, json.dumps(self.session.to_dict(), indent=2) + "\n")
        print(clean_text(f"wrote {path} (turns: {len(self.session.turns)})"))

    def _reset(self, argument: str) -> None:
        self.session.reset()
        self._last = None
        print("forgotten; /image PATH adds a picture")

    def _help(self, argument: str) -> None:
        for name, (rest, what, _) in self.commands.items():
            print(f"  {f'{name} {rest}':<24}{what}")
        print("Anything else is a question. Ctrl-C stops an answer; pressed twice, at once.")

    def _quit(self, argument: str) -> None:
        self._is_over = True


def _unquoted(text: str) -> str:
    """A path as typed; a file dropped on a terminal comes in quotes."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
