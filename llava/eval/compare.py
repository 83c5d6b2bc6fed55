"""Dense and pruned on the same questions: scores, agreement, what was kept, FLOPs, memory and the clock.

``python -m llava.eval.compare --benchmark gqa --benchmark textvqa -o comparison`` compares the shipped model dense and
with its own pruning config. ``--method fastv,divprune --tokens 64,32`` compares methods at the same number of visual
tokens a layer, for which `llava.eval.budgets` finds their knobs. Every batch is asked under every config in turn, so
that all meet the same machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from llava.errors import missing_extra
from llava.eval.benchmarks import BENCHMARKS, published
from llava.eval.budgets import (
    FLOORS,
    Budget,
    chain_for,
    check_methods,
    method_for,
    tokens_a_layer,
    visipruner_for,
)
from llava.eval.compare_page import DENSE, brief, markdown, page, plot
from llava.eval.files import move_aside, sha256_of, to_json, to_jsonl
from llava.eval.prompts import PromptBatch, prompt_batches
from llava.eval.questions import Question, read_questions
from llava.eval.run_files import answer_record
from llava.eval.scoring import Scores, mean, show
from llava.eval.traces import PruningSummary, trace_record
from llava.eval.verdicts import Verdicts, difference_interval, interval_of
from llava.inference import (
    Answer,
    Checkpoint,
    Clock,
    GenerationOptions,
    LoadedModel,
    LoadOptions,
    Prompt,
    Responder,
    open_checkpoint,
)
from llava.options import Parser, add_model_options, from_arguments
from llava.pruning import Method, PruningTrace, VisiPruner
from llava.pruning.flops import CONVENTIONS, DecoderShape, dense_trace, flops
from llava.utils import UserError, processor_name, run_main, write_whole

# Prompts that a budget is found on: enough to see how long they are, few enough to be asked several times.
_SAMPLE = 24


@dataclass
class Contender:
    """One way to run the model, and what it was asked and answered so far.

    Attributes:
        tokens: visual tokens a layer that its knobs were found for; None: the knobs were given.
    """

    name: str
    responder: Responder
    tokens: int | None = None
    questions: list[Question] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def config(self) -> Method | None:
        """None: dense."""
        return self.responder.config

    def ask(self, batch: PromptBatch, seed: int) -> None:
        """Answer a batch and keep the answers."""
        self.questions += batch.questions
        self.answers += self.responder.answer(batch.prompts, [seed + question.line for question in batch.questions])


# --- measuring ---


def kv_bytes(rows_per_layer: Sequence[int], decoder_config: Any, dtype: torch.dtype) -> int:
    """Bytes of the KV cache right after a prefill that left these rows in each layer."""
    config = decoder_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_row = 2 * config.num_key_value_heads * head_dim * dtype.itemsize
    return sum(rows_per_layer) * bytes_per_row


def as_trace(answer: Answer, shape: DecoderShape) -> PruningTrace:
    """The answer's trace; that of a dense prefill where nothing was pruned."""
    if answer.trace is not None:
        return answer.trace
    prompt = PruningTrace(num_rows=answer.prompt_rows, visual_positions=list(range(answer.visual_tokens)))
    return dense_trace(prompt, shape)


def measure(contender: Contender, dense: Contender, loaded: LoadedModel) -> dict[str, Any]:
    """All figures of one contender but its score."""
    answers, model = contender.answers, loaded.model
    spent = [flops(as_trace(answer, loaded.shape), loaded.shape) for answer in answers]
    same = [a.text == b.text for a, b in zip(answers, dense.answers, strict=True)]
    nothing = dict.fromkeys(CONVENTIONS, 0.0)
    saved = [answer.flops_saved or nothing for answer in answers if answer.visual_tokens]
    pruning = None
    if contender.config is not None:
        pruning = vars(PruningSummary.of(map(trace_record, contender.questions, answers)))
    clocks = clocks_of(contender)
    rates = [clock.tokens_per_second for clock in clocks]
    seconds = sum(clock.seconds for clock in clocks)
    decoder_config = model.config.get_text_config(decoder=True)
    return {
        "config": contender.config.to_dict() if contender.config else None,
        "questions": len(answers),
        "agreement_with_dense": mean(same),
        "agreement_interval": interval_of(same),
        "tokens_a_layer": {
            "asked": contender.tokens,
            "measured": mean(tokens_a_layer(answer) for answer in answers if answer.visual_tokens),
        },
        "pruning": pruning,
        "prefill_flops": {name: mean(count[name] for count in spent) for name in CONVENTIONS},
        "flops_saved": {name: mean(each[name] for each in saved) for name in CONVENTIONS},
        "kv_bytes_after_prefill": mean(
            kv_bytes(answer.rows_per_layer, decoder_config, model.dtype) for answer in answers
        ),
        "time_to_first_token_s": spread([clock.first_token for clock in clocks]),
        "first_token_processor_s": spread([clock.first_token_processor for clock in clocks]),
        "first_token_over_dense": first_token_over_dense(contender, dense, clock_of(model.device)),
        "decode_tokens_per_s": spread([rate for rate in rates if rate is not None]),
        "questions_per_s": len(answers) / seconds if seconds else None,
    }


def clocks_of(contender: Contender) -> list[Clock]:
    """One clock a batch, in order."""
    return list({id(answer.clock): answer.clock for answer in contender.answers}.values())


def clock_of(device: torch.device) -> str:
    """The field of `Clock` that times to the first token are compared by: one busy thread's processor time repeats on
    a machine that others use; several threads' and a GPU's is not in it."""
    return "first_token_processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "first_token"


def first_token_over_dense(contender: Contender, dense: Contender, clock: str) -> float | None:
    """Median over the batches of the time to the first token, divided by dense's on the same batch; None where batches
    were halved for want of memory."""
    own, other = clocks_of(contender), clocks_of(dense)
    if [each.answers for each in own] != [each.answers for each in other]:
        return None
    ratios = [getattr(a, clock) / getattr(b, clock) for a, b in zip(own, other, strict=True) if getattr(b, clock)]
    return statistics.median(ratios) if ratios else None


def score_difference(scores: Scores, verdicts: Verdicts, dense: Verdicts) -> dict[str, Any] | None:
    """A run's score minus dense's, and its 95 % interval; None where there is no score."""
    if scores["score"] is None:
        return None
    return {"value": scores["score"] - dense.total(), "interval": difference_interval(verdicts, dense)}


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Median and 90th percentile; None of nothing."""
    if len(values) < 2:
        value = values[0] if values else None
        return {"median": value, "p90": value}
    return {"median": statistics.median(values), "p90": statistics.quantiles(values, n=10, method="inclusive")[-1]}


def ask_all(
    contenders: Sequence[Contender], batches: Iterable[PromptBatch], total: int, seed: int
) -> list[tuple[Question, str]]:
    """Ask every batch of every contender, the order turned from batch to batch. Returns what could not be asked."""
    failures = []
    is_warm = False
    interval = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=total, unit="q", mininterval=interval, dynamic_ncols=True) as bar:
        for index, batch in enumerate(batches):
            failures += batch.failures
            if batch.prompts and not is_warm:
                for contender in contenders:
                    contender.responder.answer(batch.prompts)  # first use is charged to no one
                is_warm = True
            turn = index % len(contenders)
            for contender in (*contenders[turn:], *contenders[:turn]):
                contender.ask(batch, seed)
            bar.update(batch.size)
    return failures


# --- what to compare ---


def read_methods(args: argparse.Namespace) -> dict[str, tuple[str, int]]:
    """``--method`` and ``--tokens`` → method and visual tokens a layer, by the name of each run."""
    if bool(args.method) != bool(args.tokens):
        raise UserError("--method and --tokens go together: --method fastv,divprune --tokens 64,32")
    methods = [name.strip() for name in (args.method or "").split(",") if name.strip()]
    if args.method and not methods:
        raise UserError(f"--method {args.method}: names of methods are needed, like fastv,divprune")
    check_methods(methods)
    try:
        budgets = [int(text) for text in (args.tokens or "").split(",") if text.strip()]
    except ValueError:
        budgets = [0]
    if any(tokens < 1 for tokens in budgets):
        raise UserError(f"--tokens {args.tokens}: visual tokens a layer are needed, integers from 1 like 64,32,16")
    if methods and not args.no_floors:
        methods += FLOORS
    return {f"{name}-{tokens}": (name, tokens) for tokens in budgets for name in methods}


def find_configs(
    asked: dict[str, tuple[str, int]], prompts: Sequence[Prompt], loaded: LoadedModel, batch_size: int
) -> tuple[dict[str, Method], dict[str, str]]:
    """Knobs for budgets, tried on a few of the questions.

    Args:
        asked: method and visual tokens a layer, by the name of the run.
        prompts: some of those that will be asked, with pictures.

    Returns:
        Configs by name; by name, why the others cannot be run.
    """

    def ask(config: Method, count: int | None = None) -> list[Answer]:
        return Responder(loaded, config, GenerationOptions(1), batch_size).answer(prompts[:count])

    configs: dict[str, Method] = {}
    left_out = {}
    for run, (name, tokens) in asked.items():
        try:
            if not prompts:
                raise UserError("none of the questions that were looked at has a picture")
            visual = round(statistics.mean(prompt.num_visual for prompt in prompts))
            budget = Budget(tokens, visual, loaded.checkpoint.num_layers)
            first, _, behind = name.partition("+")
            if name == VisiPruner.name:
                config = visipruner_for(tokens, loaded.checkpoint.pruning_config(), ask)
            elif behind:
                config = chain_for(first, budget, loaded.checkpoint.pruning_config(), ask)
            else:
                config = method_for(name, budget)
                ask(config, 1)
            configs[run] = config
        except UserError as error:
            left_out[run] = str(error)
    return configs, left_out


def read_configs(given: Sequence[str], checkpoint: Checkpoint, asked: Collection[str] = ()) -> dict[str, Method]:
    """``NAME=JSON`` or ``NAME=@file`` → configs by name; none given and no run ``asked`` for otherwise, the one
    recommended for the model."""
    if not given and asked:
        return {}
    if not given:
        return {"pruned": checkpoint.pruning_config()}
    configs: dict[str, Method] = {}
    for text in given:
        name, equals, written = text.partition("=")
        if not equals or not name or name in (DENSE, *configs, *asked):
            raise UserError(f"--config {text!r}: NAME=JSON or NAME=@file is needed, each name once and none {DENSE!r}")
        configs[name] = checkpoint.pruning_config(written)
    return configs


def about(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Everything that a figure depends on and that is not the figure."""
    is_cuda = model.device.type == "cuda"
    return {
        "model": str(args.model_path),
        "model_base": args.model_base,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantised_to": "8 bit" if args.load_8bit else "4 bit" if args.load_4bit else None,
        "hardware": torch.cuda.get_device_name(model.device) if is_cuda else processor_name(),
        "threads": torch.get_num_threads(),
        "first_token_compared_by": clock_of(model.device),
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "decoding": "greedy",
        "seed": args.seed,
        "llava-visipruner": version("llava-visipruner"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": ["python", "-m", "llava.eval.compare", *args.argv],
    }


def compare(
    args: argparse.Namespace,
    name: str,
    loaded: LoadedModel,
    configs: dict[str, Method],
    asked: dict[str, tuple[str, int]],
    out: Path,
) -> dict[str, Any]:
    """Run one benchmark under all configs, given or found for ``asked``.

    Returns its part of the report; the answers go to ``out``.
    """
    checkpoint = loaded.checkpoint
    benchmark = BENCHMARKS.get(name)
    if benchmark is not None:
        files = benchmark.files(args.data)
        question_file, image_folder, kind = files.questions, files.images, files.kind
    else:
        question_file, image_folder, kind = Path(args.question_file), Path(args.image_folder), "own"
    questions = read_questions(question_file, image_folder)[: args.limit]
    options = GenerationOptions(args.max_new_tokens)
    left_out: dict[str, str] = {}
    if asked:
        sample = [question for question in questions if question.image is not None][:_SAMPLE]
        batches = prompt_batches(sample, checkpoint, args.batch_size, args.num_workers)
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        found, left_out = find_configs(asked, prompts, loaded, args.batch_size)
        configs = {**configs, **found}
    for way, why in left_out.items():
        print(f"{way} is left out: {why}", file=sys.stderr)
    contenders = [
        Contender(way, Responder(loaded, config, options, args.batch_size), asked.get(way, (way, None))[1])
        for way, config in {DENSE: None, **configs}.items()
    ]
    print(f"{name} ({kind} data): {len(questions)} questions, {len(contenders)} ways", flush=True)
    batches = prompt_batches(questions, checkpoint, args.batch_size, args.num_workers)
    failures = ask_all(contenders, batches, len(questions), args.seed)
    if not contenders[0].answers:
        raise UserError(f"none of the questions could be asked; the first: {failures[0][1]}")
    result: dict[str, Any] = {
        "data": kind,
        "question_file": str(question_file),
        "question_file_sha256": sha256_of(question_file),
        "not_asked": [{"line": question.line + 1, "error": error} for question, error in failures],
        "left_out": left_out,
        "published": published(args.model_path, name, kind),
        "runs": {},
    }
    dense_verdicts: Verdicts | None = None
    for contender in contenders:
        answers = out / name / contender.name / "answers.jsonl"
        replies = zip(contender.questions, contender.answers, strict=True)
        records = [answer_record(question, answer.text, checkpoint.name) for question, answer in replies]
        write_whole(answers, to_jsonl(records))
        figures = measure(contender, contenders[0], loaded)
        if benchmark is not None:
            is_partial = len(contender.answers) < len(read_questions(question_file, image_folder))
            scores, verdicts = (
                benchmark.score(files, answers, allow_partial=is_partial),
                benchmark.judge(files, answers),
            )
            dense_verdicts = dense_verdicts or verdicts  # the first
            difference = score_difference(scores, verdicts, dense_verdicts)
            figures = {"scores": scores, "score_difference": difference, **figures}
        result["runs"][contender.name] = figures
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = Parser(description="Compare a model dense and under pruning configs.")
    add_model_options(parser)
    parser.add_argument(
        "--benchmark", action="append", choices=BENCHMARKS, default=[], help="may be given several times"
    )
    parser.add_argument("--data", help="folder with the benchmarks' files (default: the user's, else mini)")
    parser.add_argument("--question-file", help="instead of a benchmark: questions of your own (no score)")
    parser.add_argument("--image-folder", help="and the folder of their images")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME=JSON|NAME=@FILE",
        help="a pruning config; may be given several times (default: the model's own)",
    )
    parser.add_argument("--method", metavar="NAME,NAME", help="methods whose knobs are found for each of --tokens")
    parser.add_argument("--tokens", metavar="N,N", help="visual tokens a layer, on average, for each --method")
    parser.add_argument("--no-floors", action="store_true", help=f"do not add {', '.join(FLOORS)} to --method")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-workers", type=int)
    parser.add_argument("--limit", type=int, help="only the first so many questions of each benchmark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for report and answers")
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if bool(args.benchmark) == bool(args.question_file):
        raise UserError("either --benchmark or --question-file (with --image-folder) is needed")
    if args.question_file and not args.image_folder:
        raise UserError("--question-file needs --image-folder")
    for flag in ("batch_size", "limit"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be at least 1")
    names = list(dict.fromkeys(args.benchmark)) or [Path(args.question_file).stem]
    asked = read_methods(args)
    for name in args.benchmark:
        BENCHMARKS[name].files(args.data)
    checkpoint = open_checkpoint(args.model_path, args.model_base, args.conv_mode)
    configs = read_configs(args.config, checkpoint, asked)
    out = Path(args.output)
    for old in ("report.json", "report.md", "report.png", "report.html"):
        moved = move_aside(out / old)
        if moved:
            print(f"Moved aside: {moved}")
    torch.manual_seed(args.seed)
    loaded = LoadedModel(checkpoint, from_arguments(LoadOptions, args))
    report: dict[str, Any] = {"about": about(args, loaded.model), "benchmarks": {}}
    for name in names:
        report["benchmarks"][name] = compare(args, name, loaded, configs, asked, out)
        write_whole(out / "report.json", to_json(report))
        write_whole(out / "report.md", markdown(report))
        show(name, *brief(report["benchmarks"][name]))
    try:
        figure = plot(report)
        write_whole(out / "report.html", page(report, figure))
        (out / "report.png").write_bytes(figure)
    except ImportError as error:
        print(f"No figure and no page: {missing_extra('viz', 'they', error)}", file=sys.stderr)
    print(f"Report: {out / 'report.html'}, report.md, report.json, report.png")
    not_asked = sum(len(result["not_asked"]) for result in report["benchmarks"].values())
    if not_asked:
        print(f"{not_asked} questions could not be asked; they are listed in report.json", file=sys.stderr)
    return 1 if not_asked else 0


if __name__ == "__main__":
    run_main(main)
