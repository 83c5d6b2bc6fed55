"""Every method at the same average number of visual tokens a layer: its prefill, and what its choice costs.

Beside each method stand dense SDPA and the kernel ceiling at its own row counts, all in one run, in turns. Weights are
random, so what is kept says nothing, and VisiPruner's decisions are forced; the work of each choice is really done.
The vision tower runs once, before the clock; a method that looks at its last layer finds that layer's states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, wraps
from itertools import pairwise
from math import isqrt
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from llava.eval.budgets import RULES, Budget, method_for
from llava.pruning import METHODS, Method, PruningTrace, methods, prune
from llava.pruning.flops import DecoderShape, dense_trace, executed_flops
from llava.pruning.tower import Picture
from llava.utils import UserError

from .report import Report, Setting, parser
from .shapes import Prompts, Schedule, Shape, build
from .timing import interleave
from .variants import CEILING, DENSE, run_layers

MEASURE, TOWER, DECIDE, MERGE = "measure", "tower signals", "decide", "merge"
CHOOSING = (MEASURE, TOWER, DECIDE)
SECTIONS = (*CHOOSING, MERGE)
FORCED, CHAINED = "visipruner (forced)", "divprune+visipruner (forced)"
_TOWER_LAYER = "the tower's last layer"  # run for its states alone; no part of a prefill


class Sections:
    """How long one run spent where: the time of nested sections counts for the inner one.

    On a GPU a section begins and ends with an event on the stream, so that nothing waits for it.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._open: list[str] = []
        self._marks: list[tuple[Any, str | None]] = []  # when, and the section that began

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def timed(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                return function(*args, **kwargs)

        return run

    def take(self) -> list[tuple[Any, str | None]]:
        """What was noted since the last call, for `seconds`."""
        marks, self._marks = self._marks, []
        return marks

    def seconds(self, marks: list[tuple[Any, str | None]], clock: str) -> dict[str, float]:
        """By section. On a GPU, after it has been waited for."""
        spent = dict.fromkeys((*SECTIONS, _TOWER_LAYER), 0.0)
        for ((wall, cpu), name), ((next_wall, next_cpu), _) in pairwise(marks):
            if name is not None and clock == "cpu":
                spent[name] += next_cpu - cpu
            elif name is not None:
                spent[name] += wall.elapsed_time(next_wall) / 1e3 if self._on_gpu else next_wall - wall
        return spent

    def _mark(self) -> None:
        if self._on_gpu:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append(((now, time.process_time()), self._open[-1] if self._open else None))


@contextmanager
def watched(method: Method, sections: Sections) -> Iterator[None]:
    """Enter into `sections` what the method asks of rows and of the tower, decides, and makes of rows."""
    kind = type(method)

    def decide(self: Method, *args: Any) -> Any:
        with sections.section(DECIDE):
            keep = plain_decide(self, *args)
        makers = ("merge", "from_tower")
        made = {name: getattr(keep, name) for name in makers if getattr(keep, name, None) is not None}
        return replace(keep, **{name: sections.timed(MERGE, make) for name, make in made.items()}) if made else keep

    plain_decide = kind.decide
    with ExitStack() as stack:
        stack.enter_context(patch.object(kind, "measure", sections.timed(MEASURE, kind.measure)))
        stack.enter_context(patch.object(kind, "decide", decide))
        for part in vars(Picture).values():
            if isinstance(part, cached_property):
                stack.enter_context(patch.object(part, "func", sections.timed(TOWER, part.func)))
        stack.enter_context(patch.object(Picture, "similarity", sections.timed(TOWER, Picture.similarity)))
        yield


@dataclass
class Subject:
    """A LLaVA with random weights and one batch of prompts with a picture each.

    Attributes:
        entering: `[batch, 1 + N, width]`, what the tower's layer that the projector reads got.
        marks: of every pruned run, by name, for `Sections.seconds`.
    """

    model: Any
    prompts: Prompts
    entering: torch.Tensor
    sections: Sections
    marks: dict[str, list] = field(default_factory=dict)

    @classmethod
    def make(cls, setting: Setting) -> Subject:
        shape, (prefix, visual, _) = setting.shape, setting.part
        side = isqrt(visual)
        if side**2 != visual:
            raise SystemExit(f"error: --visual {visual}: one square picture is needed, like 576")
        model = build(lambda: LlavaForConditionalGeneration(_config(shape, side)), setting.device, setting.dtype)
        prompts = Prompts.make([setting.part] * setting.arguments.batch, shape.hidden, setting.device, setting.dtype)
        size = model.config.vision_config.image_size
        pixels = torch.randn(len(prompts.embeds), 3, size, size, generator=torch.Generator().manual_seed(0))
        seen: list[torch.Tensor] = []
        hook = cls._layer_of(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            features = model.get_image_features(pixels.to(setting.device, setting.dtype)).pooler_output
        hook.remove()
        prompts.embeds[:, prefix : prefix + visual] = torch.stack(tuple(features))
        return cls(model, prompts, seen[0], Sections(setting.device))

    @staticmethod
    def _layer_of(model: Any) -> Any:
        return model.model.vision_tower.encoder.layers[-1]

    @torch.no_grad()
    def dense(self) -> Any:
        return self._forward()

    @torch.no_grad()
    def pruned(self, name: str, method: Method) -> list[PruningTrace]:
        """One prefill, the block's opening and closing included."""
        with watched(method, self.sections), prune(self.model, method) as run:
            if method.needs_tower:
                with self.sections.section(_TOWER_LAYER):
                    self._layer_of(self.model)(self.entering, attention_mask=None)
            self._forward(visual_mask=self.prompts.visual)
        self.marks.setdefault(name, []).append(self.sections.take())
        return run.traces

    def ceiling(self, rows: list[int]) -> Any:
        decoder = SimpleNamespace(model=self.model.model.language_model, lm_head=self.model.lm_head)
        return run_layers(decoder, self.prompts, rows)  # type: ignore[arg-type]

    def _forward(self, **mask: Any) -> Any:
        hidden = self.model.model.language_model(
            inputs_embeds=self.prompts.embeds, attention_mask=self.prompts.attention_mask, use_cache=True, **mask
        ).last_hidden_state
        return self.model.lm_head(hidden[:, -1:])


def _config(shape: Shape, side: int) -> LlavaConfig:
    tower = {**shape.tower, "image_size": side * shape.tower["patch_size"]}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=shape.decoder_config(),
        image_token_index=shape.vocab - 1,
        vision_feature_layer=-1,  # of `shape.tower`, which ends at the layer that LLaVA reads
        vision_feature_select_strategy="default",
    )


def contenders(budget: Budget, schedule: Schedule) -> tuple[dict[str, Method], dict[str, str]]:
    """Every registered method at the budget, by name; by name, why the others are not here."""
    found: dict[str, Method] = {}
    left_out = dict.fromkeys(METHODS.keys() - RULES.keys(), "its knobs are given, by no budget")
    for name in RULES:
        try:
            found[name] = method_for(name, budget)
        except UserError as error:
            left_out[name] = str(error)
    del left_out["visipruner"]
    for name, make in ((FORCED, forced), (CHAINED, chained)):
        try:
            found[name] = make(budget, schedule)
        except UserError as error:
            left_out[name] = str(error)
    return found, left_out


def forced(budget: Budget, schedule: Schedule) -> Method:
    """VisiPruner's work with the number that it keeps, and if need be its selecting layer, forced to the budget."""
    full = min(schedule.select + 1, budget.tokens * budget.layers // budget.visual)  # layers that hold all
    if full < 2:
        raise UserError(f"layers 0 and 1 hold all {budget.visual}, which is more than {budget.tokens} tokens a layer")
    keep = round((budget.tokens * budget.layers - full * budget.visual) / (budget.layers - full))
    return methods.Schedule(0 if full <= schedule.shallow + 1 else schedule.shallow, full - 1, keep)


def chained(budget: Budget, schedule: Schedule) -> Method:
    """DivPrune before the decoder, then VisiPruner's work under the shape's own schedule."""
    behind = schedule.kept * (schedule.leave - schedule.select - 1)
    keep = round((budget.tokens * budget.layers - behind) / (schedule.select + 1))
    if not schedule.kept < keep <= budget.visual:
        raise UserError(f"before this schedule, no number of tokens gives {budget.tokens} a layer")
    return methods.Chain((methods.DivPrune(keep), schedule.method()))


def run(setting: Setting, budgets: list[int], names: list[str] | None = None) -> Report:
    report, subject = Report("methods", setting), Subject.make(setting)
    report.facts["weights"] = "random; VisiPruner's decisions are forced"
    for tokens in budgets:
        _compare(report, subject, tokens, names)
    return report


def _compare(report: Report, subject: Subject, tokens: int, names: list[str] | None) -> None:
    """All methods at one budget, in turns, into the report."""
    setting, arguments = report.setting, report.setting.arguments
    shape, title = DecoderShape.of(subject.model), f"{tokens} visual tokens a layer"
    found, left_out = contenders(Budget(tokens, arguments.visual, shape.num_layers), setting.schedule)
    found = {name: method for name, method in found.items() if names is None or name in names}

    traces: dict[str, list[PruningTrace]] = {}
    ceilings: dict[tuple[int, ...], str] = {}
    runs: dict[str, Callable[[], object]] = {DENSE: subject.dense}
    for name, method in found.items():
        try:
            traces[name] = subject.pruned(name, method)
        except UserError as error:
            left_out[name] = str(error)
            continue
        runs[name] = partial(subject.pruned, name, method)
        rows = tuple(traces[name][0].rows_per_layer)
        if rows not in ceilings:
            ceilings[rows] = f"{CEILING} ({name})"
            runs[ceilings[rows]] = partial(subject.ceiling, list(rows))
    subject.marks.clear()
    timings = report.timings[title] = interleave(runs, setting.device, arguments.repetitions, arguments.warmup)

    # Without the tower's layer, which ran only so that its states were there; and where the rest of the time went.
    spent: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in traces:
        marks = subject.marks[name][arguments.warmup :]
        spent[name] = {clock: [subject.sections.seconds(each, clock) for each in marks] for clock in setting.clocks}
        for clock in setting.clocks:
            times = timings.clock(clock)
            times[name] = [
                whole - own.pop(_TOWER_LAYER) for whole, own in zip(times[name], spent[name][clock], strict=True)
            ]

    clock = setting.clocks[-1]  # processor time on a CPU
    milliseconds = {name: timings.summary(name, clock)["median_ms"] for name in timings.wall}
    rows_of_table = [{"method": DENSE, "ms": milliseconds[DENSE], "dense / this": 1.0}]
    for name in traces:
        trace = traces[name][0]
        text = trace.num_rows - trace.num_visual
        own = {part: float(np.median([each[part] for each in spent[name][clock]])) * 1e3 for part in SECTIONS}
        choosing, this = sum(own[part] for part in CHOOSING), milliseconds[name]
        costs = [executed_flops(each, shape) for each in (dense_trace(trace, shape), trace)]
        rows_of_table.append(
            {
                "method": name,
                "tokens a layer": sum(trace.rows_per_layer) / len(trace.rows_per_layer) - text,
                "ms": this,
                "dense / this": timings.ratio(DENSE, name, clock),
                "by FLOPs": costs[0] / costs[1],
                "ceiling / this": timings.ratio(ceilings[tuple(trace.rows_per_layer)], name, clock),
                **{f"{part}, ms": own[part] for part in SECTIONS},
                "choosing, % of this": 100 * choosing / this,
                "of what it saves, %": 100 * choosing / (milliseconds[DENSE] - this + choosing),
            }
        )
    report.tables[f"prefill at {title}, {clock} clock, medians"] = rows_of_table
    report.facts |= {
        f"knobs ({title})": {name: method.to_dict() for name, method in found.items() if name in traces},
        f"left out ({title})": left_out,
        f"slower than dense ({title})": [row["method"] for row in rows_of_table if row["dense / this"] < 1],
    }


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, nargs="+", default=[64], help="visual tokens a layer, on average")
    arguments.add_argument("--methods", nargs="+", default=None, metavar="NAME", help="these alone")
    parsed = arguments.parse_args(argv)
    run(Setting(parsed), parsed.tokens, parsed.methods).finish()


if __name__ == "__main__":
    main()
