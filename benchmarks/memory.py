"""Peak of what a prefill allocates, and what its KV cache holds on to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from .report import Report, Setting, parser
from .shapes import Prompts, build_decoder
from .variants import DENSE, PRUNED, cache_bytes, make_variants


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that `run` has allocated at one time, beyond what was there before."""
    run()  # lazily made buffers are not the run's own
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def run(setting: Setting) -> Report:
    arguments, shape = setting.arguments, setting.shape
    report = Report("memory", setting)
    model = build_decoder(shape, setting.device, setting.dtype)
    prompts = Prompts.make([setting.part] * arguments.batch, shape.hidden, setting.device, setting.dtype)
    variants = make_variants(model, [setting.schedule], arguments.variants, arguments.batch)
    rows = report.tables["one prefill"] = []
    for name, variant in variants.items():
        kv = cache_bytes(variant.prefill(prompts).past_key_values)
        rows.append(
            {
                "variant": name,
                "peak_MB": peak_bytes(lambda variant=variant: variant.prefill(prompts), setting.device) / 1e6,
                "KV_MB_after_prefill": kv / 1e6,
            }
        )
    by_name = {row["variant"]: row for row in rows}
    if DENSE in by_name and PRUNED in by_name:
        for key in ("peak_MB", "KV_MB_after_prefill"):
            report.facts[f"{key}, pruned / dense"] = by_name[PRUNED][key] / by_name[DENSE][key]
    return report


def main(argv: list[str] | None = None) -> None:
    run(Setting(parser(__doc__).parse_args(argv))).finish()


if __name__ == "__main__":
    main()
