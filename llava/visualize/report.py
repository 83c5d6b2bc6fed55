"""One HTML file that shows how a model answered questions about pictures, to look at and to send around.

``visipruner report --image photo.jpg --question "What is this?" -o report.html``

The page needs no network and loads nothing. Every string in it (question, answers, tokens, file names) is escaped by
the template engine, data goes in as JSON in which ``<``, ``>`` and ``&`` are escaped, and the page's content security
policy runs its own script and no other.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from tqdm import tqdm

from llava.constants import SMALL_MODEL
from llava.eval.files import read_jsonl
from llava.eval.questions import read_questions
from llava.inference import Checkpoint, LoadedModel, LoadOptions, Picture, Turn, open_checkpoint
from llava.options import Parser, add_model_options, add_pruning_option, from_arguments
from llava.pruning.flops import CONVENTIONS
from llava.utils import UserError, run_main, write_whole

from .findings import Asked, Rows, findings, question_findings

PICTURE_SIDE = 768


def page(found: dict[str, Any], pictures: Sequence[Image.Image]) -> str:
    """The page, self-contained HTML.

    Args:
        found: of `llava.visualize.findings.findings`.
        pictures: one for each question.
    """
    environment = Environment(
        loader=PackageLoader("llava.visualize", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["lines"] = lambda value: json.dumps(value, ensure_ascii=False)
    loader = environment.loader
    assert loader is not None

    def ours(name: str) -> str:
        return loader.get_source(environment, name)[0]

    script = ours("report.js")
    uris: dict[int, str] = {}  # questions about one picture share its object
    for image in pictures:
        uris.setdefault(id(image), _data_uri(image))
    return environment.get_template("report.html.j2").render(
        found=found,
        pictures=[uris[id(image)] for image in pictures],
        script=Markup(script),  # ours, from the package
        style=Markup(ours("report.css")),
        # Within a page SVG needs no namespace, whose name would look like an address.
        scheme=Markup(ours("report.stages.svg").replace(' xmlns="http://www.w3.org/2000/svg"', "")),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        conventions=CONVENTIONS,
        is_small=found["facts"]["parameters"] < SMALL_MODEL,
    )


def _data_uri(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffers = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffers[kind] = io.BytesIO()
        image.save(buffers[kind], kind, **options)  # type: ignore[arg-type]
    kind, buffer = min(buffers.items(), key=lambda entry: len(entry[1].getvalue()))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- the program -----------------------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Write one HTML file that shows how questions about pictures were answered, dense beside pruned."
    )
    parser.add_argument("--image", metavar="PATH|URL", help="the picture")
    parser.add_argument("--question", metavar="TEXT", help="what to ask about it")
    parser.add_argument(
        "--questions", type=Path, metavar="FILE", help="or many: LLaVA's question lines, with a table of all"
    )
    parser.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="pictures of --questions (default: the file's own folder)"
    )
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="the HTML file to write")
    parser.add_argument("--json-output", type=Path, metavar="FILE", help="everything in the page, as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    add_pruning_option(parser)
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run without pruning too, and show both (default: yes)",
    )
    parser.add_argument(
        "--rows",
        choices=("last", "text", "all"),
        help="whose attention to record beside the answer's: the prompt's last row (default with --questions), "
        "all text behind the picture's first row (default with --question), visual rows too",
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer in tokens (default: 32)")
    add_model_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Raises `UserError` on bad input, before weights are read where possible."""
    args = _arguments(argv)
    warnings.filterwarnings("ignore", module="transformers")
    outputs = {"--output": args.output.expanduser()}
    if args.json_output:
        outputs["--json-output"] = args.json_output.expanduser()
        if len({path.resolve() for path in outputs.values()}) == 1:
            raise UserError(f"--output and --json-output are the same file, {str(args.output)!r}; name two")
    for option, path in outputs.items():
        _check_output(option, path, args.overwrite)
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1")
    if args.questions is not None and (args.image is not None or args.question is not None):
        raise UserError("--questions brings its own pictures and questions; leave out --image and --question")
    if args.questions is None and (args.image is None or args.question is None):
        raise UserError("nothing to ask: give --image and --question, or --questions")
    if args.questions is None and args.image_folder is not None:
        raise UserError("--image-folder is for the pictures of --questions; give that too, or leave it out")
    if args.question is not None and not args.question.strip():
        raise UserError("--question is empty; ask something about the picture")
    checkpoint = open_checkpoint(args.model_path, args.model_base, args.conv_mode)
    config = checkpoint.pruning_config(args.pruning_config)
    asked = (
        _of_file(checkpoint, args.questions.expanduser(), args.image_folder)
        if args.questions
        else [Asked(None, args.question, checkpoint.read_picture(args.image))]
    )
    for number, each in enumerate(asked, 1):
        try:
            checkpoint.encode([Turn(each.text, [each.picture])])
        except UserError as error:
            raise UserError(
                f"{args.questions}, question {number}: {error}" if args.questions else str(error)
            ) from error

    chat = LoadedModel(checkpoint, from_arguments(LoadOptions, args))
    rows: Rows = args.rows or ("last" if args.questions else "text")
    answered = [
        question_findings(chat, each, config, rows=rows, compare=args.compare, max_new_tokens=args.max_new_tokens)
        for each in tqdm(asked, desc="questions", file=sys.stderr, disable=True if len(asked) == 1 else None)
    ]
    found = findings(chat, config, answered)
    texts = {"--output": page(found, [each.picture.image for each in asked])}
    if args.json_output:
        texts["--json-output"] = json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n"
    for option, path in outputs.items():
        write_whole(path, texts[option])
        print(f"wrote {path} ({path.stat().st_size / 1024:,.0f} KiB)")
    return 0


def _check_output(option: str, path: Path, may_replace: bool) -> None:
    if path.is_dir():
        raise UserError(f"{option} {str(path)!r} is a folder; name the file to write")
    if not path.parent.is_dir():
        raise UserError(f"{option} {str(path)!r}: folder {str(path.parent)!r} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {str(path)!r}: folder {str(path.parent)!r} cannot be written to")
    if path.exists() and not may_replace:
        raise UserError(f"{option} {str(path)!r} exists; name another file, or give --overwrite to replace it")


def _of_file(checkpoint: Checkpoint, path: Path, folder: Path | None) -> list[Asked]:
    """Questions of a file with their pictures, each picture read once."""
    pictures: dict[Path, Picture] = {}
    asked = []
    expected = [record.get("answer") for record in read_jsonl(path)]
    for question in read_questions(path, folder.expanduser() if folder else path.parent):
        place = f"{path}, question {question.line + 1}"
        if question.image is None:
            raise UserError(f'{place} has no "image"; a report shows pictures')
        if not question.text.strip():
            raise UserError(f'{place}: "text" is empty; ask something about the picture')
        if question.image not in pictures:
            pictures[question.image] = checkpoint.read_picture(question.image)
        answer = expected[question.line]
        named = answer if isinstance(answer, str) else None
        asked.append(Asked(question.question_id, question.text, pictures[question.image], named))
    return asked


if __name__ == "__main__":
    run_main(main)
