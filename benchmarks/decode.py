"""Time per new token: dense and pruned take each step in turns, so that every token gives a paired ratio."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from .hardware import decode_bytes
from .report import Report, Setting, parser, timing_rows
from .shapes import Prompts, build_decoder
from .timing import interleave
from .variants import DENSE, FLASH, OURS_DENSE, PRUNED, cache_bytes, make_variants


@torch.no_grad()
def run(setting: Setting, tokens: int) -> Report:
    arguments, shape = setting.arguments, setting.shape
    report = Report("decode", setting)
    model = build_decoder(shape, setting.device, setting.dtype)
    prompts = Prompts.make([setting.part] * arguments.batch, shape.hidden, setting.device, setting.dtype)
    names = arguments.variants or [DENSE, OURS_DENSE, PRUNED, FLASH]
    variants = make_variants(model, [setting.schedule], names, arguments.batch)

    with ExitStack() as blocks:
        caches, steps, kv_bytes = {}, {}, {}
        for name, variant in variants.items():
            blocks.enter_context(variant.block(prompts))
            output = variant.forward(prompts)
            caches[name] = output.past_key_values
            kv_bytes[name] = cache_bytes(caches[name])
            newest = [output.logits[:, -1].argmax(-1, keepdim=True)]

            def step(variant=variant, cache=caches[name], newest=newest) -> None:
                logits = variant.model(input_ids=newest[0], past_key_values=cache, use_cache=True).logits
                newest[0] = logits[:, -1].argmax(-1, keepdim=True)

            steps[name] = step
        timings = report.timings["per token"] = interleave(
            steps, setting.device, tokens - arguments.warmup, arguments.warmup
        )
    report.tables["per token"] = timing_rows(timings, setting.clocks)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    weights -= model.get_input_embeddings().weight.numel() * model.get_input_embeddings().weight.element_size()
    for row in report.tables["per token"]:
        name = row["variant"]
        row["KV_MB_after_prefill"] = kv_bytes[name] / 1e6
        row["KV_MB_at_end"] = cache_bytes(caches[name]) / 1e6
    if DENSE in variants:
        ideal = decode_bytes(weights, kv_bytes[DENSE]) / decode_bytes(weights, kv_bytes[PRUNED])
        report.facts |= {"weights MB": weights / 1e6, "ideal speed-up (bytes read)": ideal}
        for clock in setting.clocks:
            speedup = timings.ratio(DENSE, PRUNED, clock)
            report.facts |= {
                f"speed-up over dense ({clock})": speedup,
                f"share of the bytes ratio ({clock})": speedup / ideal,
            }
    return report


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=128, help="new tokens, the prefill's own not counted")
    parsed = arguments.parse_args(argv)
    run(Setting(parsed), parsed.tokens).finish()


if __name__ == "__main__":
    main()
