"""Chat about pictures in the terminal, with visual tokens pruned.

``python -m llava.serve.cli_pruning --image-file photo.jpg`` talks; with ``--question`` or questions on standard input
it answers and ends. `llava.serve.cli` is the same program without pruning; `llava.serve.terminal` does the work.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Sequence

from llava.errors import exit_code_of
from llava.examples import example_named, examples
from llava.options import Parser, add_generation_options, add_model_options, add_pruning_option


def main(argv: Sequence[str] | None = None, *, can_prune: bool = True, once: bool = False) -> int:
    """Run the program; returns its exit code (0; 1 failed; 2 bad input; 130 interrupted).

    Args:
        argv: the command line; None: the process's.
        can_prune: whether the options about pruning are there.
        once: never a chat: one question, one answer.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    return exit_code_of(lambda: _run(argv, can_prune, once), argv)


def ask(argv: Sequence[str] | None = None) -> int:
    """The same program, which never chats: asked nothing, it shows what pruning does to an example."""
    return main(argv, once=True)


def _run(argv: Sequence[str], can_prune: bool, once: bool) -> int:
    args = _arguments(argv, can_prune, once)
    if args.examples:
        for example in examples():
            print(f"{example.name:<12}{example.image.name:<26}{example.question}  ({example.answer})")
        return 0
    # Here, because torch and transformers take seconds to import, and --help or a wrong option should not.
    from llava.serve import terminal

    return terminal.run(args, can_prune)


def _arguments(argv: Sequence[str], can_prune: bool, once: bool) -> argparse.Namespace:
    parser = Parser(
        description=("Ask" if once else "Chat with")
        + " a vision-language model about pictures"
        + (", with visual tokens pruned (VisiPruner)." if can_prune else "."),
        epilog="Asked nothing, it shows what pruning does to an example."
        if once
        else "Without --question and with a keyboard it is a chat; /help there lists its commands.",
    )
    add_model_options(parser)

    group = parser.add_argument_group("what to ask")
    group.add_argument(
        "--image-file",
        "--image",
        action="append",
        default=[],
        metavar="PATH|URL",
        help="a picture; may be given several times",
    )
    group.add_argument(
        "--question", metavar="TEXT", help="ask once and leave; else questions are read from a pipe, one a line"
    )
    group.add_argument(
        "--example", metavar="NAME", help="a picture that ships with the model" + (", and its question" if once else "")
    )
    group.add_argument("--examples", action="store_true", help="list these, with questions that the model can answer")
    group.add_argument(
        "--json", action="store_true", help="print a JSON object; one a line for several questions from a pipe"
    )

    if can_prune:
        prune = parser.add_argument_group("pruning")
        add_pruning_option(prune)
        prune.add_argument("--dense", action="store_true", help="do not prune")
        prune.add_argument("--compare", action="store_true", help="answer dense and pruned, side by side")
        prune.add_argument(
            "--show",
            action="store_true",
            help="draw the kept patches, and say what as many patches drawn at random answer (with a question)",
        )

    answer = parser.add_argument_group("answers")
    add_generation_options(answer, max_new_tokens=512)
    parser.set_defaults(debug=False, once=once)
    args = parser.parse_args(argv)
    if not can_prune:
        args.pruning_config, args.dense, args.compare, args.show = None, True, False, False
    for one, other in (("dense", "pruning_config"), ("dense", "compare"), ("compare", "show"), ("json", "show")):
        if can_prune and getattr(args, one) and getattr(args, other) is not None and getattr(args, other) is not False:
            parser.error(f"--{one} and --{other.replace('_', '-')} exclude each other")
    asked_nothing = not args.image_file and args.question is None and args.example is None
    if once and asked_nothing and not args.json and not args.compare and _nothing_is_piped():
        args.example, args.show = examples()[0].name, True
    if args.example is not None:
        example = example_named(args.example)
        args.image_file = args.image_file or [str(example.image)]
        args.question = example.question if once and args.question is None else args.question
    return args


def _nothing_is_piped() -> bool:
    """Whether standard input is a keyboard, or /dev/null."""
    try:
        return stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):  # not a stream of the system, or a closed one
        return False


if __name__ == "__main__":
    sys.exit(main())
