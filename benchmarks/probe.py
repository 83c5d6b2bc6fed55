"""What looking costs: the probe's share of a prefill's operator time, and its closed form against the naive one."""

from __future__ import annotations

from unittest import mock

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from llava.pruning import view
from llava.pruning.shares import measure_visual_shares

from .report import Report, Setting, parser, timing_rows
from .shapes import Prompts, build_decoder
from .timing import interleave
from .variants import PRUNED, Variant, make_variants

LABEL = "pruning probe"


def naive_shares(query, keys, values, output, visual, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """The probe as the method is written down: every visual row's share, formed, subtracted and compared."""
    groups = query.shape[0] // keys.shape[0]
    keys, values = (part.float().repeat_interleave(groups, dim=0) for part in (keys, values))
    weights = torch.softmax((query.float()[:, None] @ keys.transpose(1, 2))[:, 0] * scale, dim=-1)
    shares = (weights[:, visual, None] * values[:, visual]).transpose(0, 1).flatten(1)
    whole = output.float().flatten()[None]
    return F.cosine_similarity(whole - shares, whole, dim=-1), shares.norm(dim=-1)


def operator_share(variant: Variant, prompts: Prompts, device: torch.device) -> tuple[float, int]:
    """The probe's share of the operator time of one prefill, and how often it ran."""

    def labelled(*args):
        with record_function(LABEL):
            return measure_visual_shares(*args)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with mock.patch.object(view, "measure_visual_shares", labelled):
        variant.prefill(prompts)
        with profile(activities=activities) as profiler:
            variant.prefill(prompts)
    averages = profiler.key_averages()
    attribute = "device_time_total" if device.type == "cuda" else "cpu_time_total"
    own = f"self_{attribute}"
    probe = next(entry for entry in averages if entry.key == LABEL and getattr(entry, attribute) > 0)
    total = sum(getattr(entry, own) for entry in averages if entry.key != LABEL)
    return getattr(probe, attribute) / total, probe.count


def run(setting: Setting) -> Report:
    arguments, shape = setting.arguments, setting.shape
    report = Report("probe", setting)
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.hidden // shape.heads
    num_rows = sum(setting.part)
    torch.manual_seed(0)
    make = {"device": setting.device}
    query, output = (torch.randn(heads, head_dim, **make).to(setting.dtype) for _ in range(2))
    keys, values = (torch.randn(kv_heads, num_rows, head_dim, **make).to(setting.dtype) for _ in range(2))
    visual = slice(arguments.prefix, arguments.prefix + arguments.visual)
    given = (query, keys, values, output, visual, head_dim**-0.5)
    closed, naive = "closed form", "share by share"
    timings = report.timings["one probe"] = interleave(
        {closed: lambda: measure_visual_shares(*given), naive: lambda: naive_shares(*given)},
        setting.device,
        max(20, arguments.repetitions),
        warmup=5,
    )
    report.tables["one probe"] = timing_rows(timings, setting.clocks, over=naive)

    model = build_decoder(shape, setting.device, setting.dtype)
    prompts = Prompts.make([setting.part] * arguments.batch, shape.hidden, setting.device, setting.dtype)
    variant = make_variants(model, [setting.schedule], [PRUNED], arguments.batch)[PRUNED]
    share, count = operator_share(variant, prompts, setting.device)
    report.facts |= {"probes in a prefill": count, "probe's share of the prefill's operator time": share}
    return report


def main(argv: list[str] | None = None) -> None:
    run(Setting(parser(__doc__).parse_args(argv))).finish()


if __name__ == "__main__":
    main()
