"""Time to the first token: every variant in turns, the FLOPs ratio as the ideal, and the share of it reached."""

from __future__ import annotations

import torch

from llava.pruning.flops import DecoderShape, dense_trace, executed_flops, prompt_flops

from .hardware import Machine, prefill_roofline
from .report import Report, Setting, parser, timing_rows
from .shapes import Prompts, build_decoder, build_tower
from .timing import interleave
from .variants import CEILING, DENSE, PRUNED, make_variants, run_layers


def run(setting: Setting, tower: bool = True) -> Report:
    arguments, shape = setting.arguments, setting.shape
    report = Report("prefill", setting)
    model = build_decoder(shape, setting.device, setting.dtype)
    prompts = Prompts.make([setting.part] * arguments.batch, shape.hidden, setting.device, setting.dtype)
    variants = make_variants(model, [setting.schedule], arguments.variants, arguments.batch)

    with variants[PRUNED].block(prompts) as pruning:
        variants[PRUNED].forward(prompts)
    traces = pruning.traces
    rows = traces[0].rows_per_layer

    runs = {name: lambda variant=variant: variant.prefill(prompts) for name, variant in variants.items()}
    runs[CEILING] = lambda: run_layers(model, prompts, rows)
    timings = report.timings["prefill"] = interleave(runs, setting.device, arguments.repetitions, arguments.warmup)
    report.tables["prefill"] = timing_rows(timings, setting.clocks)

    flops_shape = DecoderShape.of(model)
    dense_traces = [dense_trace(trace, flops_shape) for trace in traces]
    spent = sum(executed_flops(trace, flops_shape) for trace in traces)
    dense = sum(executed_flops(trace, flops_shape) for trace in dense_traces)
    machine = Machine.measure(setting.device, setting.dtype)
    predicted = [prefill_roofline(part, flops_shape, setting.dtype, machine) for part in (dense_traces, traces)]
    report.facts |= {
        "rows per layer": rows,
        "TFLOP dense": dense / 1e12,
        "TFLOP pruned": spent / 1e12,
        "ideal speed-up (executed FLOPs)": dense / spent,
        "TFLOP dense, prompt convention": prompt_flops(dense_traces[0].rows_per_layer, flops_shape) / 1e12,
        "measured matrix TFLOP/s": machine.flops / 1e12,
        "measured bandwidth GB/s": machine.bandwidth / 1e9,
        "roofline dense ms": predicted[0] * 1e3,
        "roofline pruned ms": predicted[1] * 1e3,
        "roofline speed-up": predicted[0] / predicted[1],
    }
    for clock in setting.clocks:
        speedup = timings.ratio(DENSE, PRUNED, clock) if DENSE in timings.wall else None
        if speedup is not None:
            report.facts |= {
                f"speed-up over dense ({clock})": speedup,
                f"share of the FLOPs ratio ({clock})": speedup * spent / dense,
                f"share of the roofline ({clock})": speedup * predicted[1] / predicted[0],
            }
        report.facts[f"share of the kernel ceiling ({clock})"] = timings.ratio(CEILING, PRUNED, clock)

    if tower:
        images = max(1, arguments.visual // 576) * arguments.batch
        vision = build_tower(shape, setting.device, setting.dtype)
        size = vision.config.image_size
        pixels = torch.randn(images, 3, size, size, device=setting.device).to(setting.dtype)
        with torch.no_grad():
            timings = report.timings["vision tower"] = interleave(
                {f"vision tower and projector, {images} image(s)": lambda: vision(pixels)},
                setting.device,
                max(3, arguments.repetitions // 3),
            )
        report.tables["vision tower"] = timing_rows(timings, setting.clocks)
    return report


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--no-tower", action="store_true", help="leave the vision tower out")
    parsed = arguments.parse_args(argv)
    run(Setting(parsed), tower=not parsed.no_tower).finish()


if __name__ == "__main__":
    main()
