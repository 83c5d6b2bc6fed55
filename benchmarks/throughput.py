"""Whole requests in a ragged batch: prompts of different lengths, images and decisions, prefill and decode.

Transformers pads such a batch on the left; this project packs it. Both answer the same prompts.
"""

from __future__ import annotations

import numpy as np
import torch

from llava.pruning import PruningTrace
from llava.pruning.flops import DecoderShape, dense_trace, executed_flops

from .report import Report, Setting, parser, timing_rows
from .shapes import Prompts, Schedule, Shape, build_decoder
from .timing import interleave
from .variants import DENSE, PRUNED, Variant, make_variants

ALONE = "this project, pruned, one prompt after the other"


def ragged_batch(
    shape: Shape, schedule: Schedule, part: tuple[int, int, int], batch: int, uniform: bool = False
) -> tuple[list[tuple[int, int, int]], list[Schedule]]:
    """Prompts and schedules around the given ones: text of a half to one and a half its length, decisions some
    layers apart, up to twice the rows kept."""
    if uniform:
        return [part] * batch, [schedule] * batch
    random = np.random.default_rng(0)
    prefix, image, text = part
    parts, schedules = [], []
    for _ in range(batch):
        parts.append((prefix, image, int(random.integers(text // 2, text + text // 2 + 1))))
        select = int(random.integers(schedule.shallow + 1, schedule.select + 3))
        leave = int(random.integers(max(select + 1, schedule.leave - 2), min(shape.layers, schedule.leave + 2) + 1))
        schedules.append(Schedule(schedule.shallow, select, int(random.integers(0, 2 * schedule.kept + 1)), leave))
    return parts, schedules


def run(setting: Setting, tokens: int, uniform: bool = False) -> Report:
    arguments, shape = setting.arguments, setting.shape
    report = Report("throughput", setting)
    model = build_decoder(shape, setting.device, setting.dtype)
    parts, schedules = ragged_batch(shape, setting.schedule, setting.part, arguments.batch, uniform)
    prompts = Prompts.make(parts, shape.hidden, setting.device, setting.dtype)
    variants = make_variants(model, schedules, arguments.variants or [DENSE, PRUNED], arguments.batch)
    singles = [
        (make_variants(model, [schedule], [PRUNED])[PRUNED], prompts.alone(number))
        for number, schedule in enumerate(schedules)
    ]

    runs = {name: lambda variant=variant: variant.prefill(prompts) for name, variant in variants.items()}
    runs[ALONE] = lambda: [variant.prefill(prompt) for variant, prompt in singles]
    linear_rows = {name: _count_linear_rows(variants[name], prompts) for name in variants}
    alone_rows = sum(_count_linear_rows(variant, prompt) for variant, prompt in singles)
    timings = report.timings["prefill"] = interleave(runs, setting.device, arguments.repetitions, arguments.warmup)
    report.tables["prefill of the batch"] = timing_rows(timings, setting.clocks)

    with variants[PRUNED].block(prompts) as pruning:
        variants[PRUNED].forward(prompts)
    flops_shape = DecoderShape.of(model)
    spent = sum(executed_flops(trace, flops_shape) for trace in pruning.traces)
    padded = arguments.batch * executed_flops(_padded(pruning.traces, flops_shape), flops_shape)
    report.facts |= {
        "prompts (before, image, behind)": [" ".join(map(str, part)) + ";" for part in parts],
        "schedules (select, kept, exit)": [f"{s.select} {s.kept} {s.leave};" for s in schedules],
        "rows through linear layers": linear_rows[PRUNED],
        "rows, prompts alone": alone_rows,
        "rows, padded dense": linear_rows.get(DENSE),
        "ideal speed-up (executed FLOPs, dense padded)": padded / spent,
    }
    for clock in setting.clocks:
        if DENSE in timings.wall:
            speedup = timings.ratio(DENSE, PRUNED, clock)
            report.facts |= {
                f"prefill speed-up over padded dense ({clock})": speedup,
                f"time against the FLOPs ratio's prediction ({clock})": padded / spent / speedup,
            }
        report.facts[f"prefill time against prompts alone ({clock})"] = 1 / timings.ratio(ALONE, PRUNED, clock)

    if tokens:
        runs = {name: lambda variant=variant: variant.generate(prompts, tokens) for name, variant in variants.items()}
        timings = report.timings["request"] = interleave(
            runs, setting.device, max(3, arguments.repetitions // 2), warmup=1
        )
        rows = report.tables[f"whole request, {tokens} new tokens"] = timing_rows(timings, setting.clocks)
        for row in rows:
            row["requests_per_s"] = 1e3 * arguments.batch / row["median_ms"]
            row["tokens_per_s"] = tokens * row["requests_per_s"]
        together = variants[PRUNED].generate(prompts, tokens)
        alone = torch.cat([variant.generate(prompt, tokens) for variant, prompt in singles])
        report.facts["answers equal to those alone"] = f"{int((together == alone).all(1).sum())} of {arguments.batch}"
    return report


def _padded(traces: list[PruningTrace], shape: DecoderShape) -> PruningTrace:
    """What dense does with each sample of a padded batch: the longest one's work."""
    return dense_trace(max(traces, key=lambda trace: trace.num_rows), shape)


def _count_linear_rows(variant: Variant, prompts: Prompts) -> int:
    """Rows that go through the layers' MLPs in one prefill."""
    total = 0

    def count(module, args, output) -> None:
        nonlocal total
        total += output.shape[0] * output.shape[1]

    handles = [layer.mlp.register_forward_hook(count) for layer in variant.model.model.layers]
    variant.prefill(prompts)
    for handle in handles:
        handle.remove()
    return total


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(batch=8)
    arguments.add_argument("--tokens", type=int, default=32, help="new tokens of a whole request; 0: prefill alone")
    arguments.add_argument("--uniform", action="store_true", help="equal prompts and schedules instead of ragged ones")
    parsed = arguments.parse_args(argv)
    run(Setting(parsed), parsed.tokens, parsed.uniform).finish()


if __name__ == "__main__":
    main()
