"""Layers after the selection, with few rows: what `torch.compile` and, on a GPU, a captured graph would save there.

Few rows leave the arithmetic small beside what the host spends on launching it. Each table is one row count: the rows
that a selection keeps, those left behind the exit, and the one row of a decoding step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from .report import Report, Setting, parser, timing_rows
from .shapes import build_decoder, twin
from .timing import interleave

EAGER, COMPILED, GRAPH = "as they are", "torch.compile", "CUDA graph"
LAYERS = 4  # enough that their weights do not stay in the processor's cache


class Layers(nn.Module):
    """A decoder's layers without a cache, on rows `[1, rows, hidden]`."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.layers = decoder.layers

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
        return hidden


def captured(layers: nn.Module, given: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    """The same work as a CUDA graph over fixed memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layers(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers(*given)
    return graph.replay


@torch.no_grad()
def run(setting: Setting) -> Report:
    report = Report("layers", setting)
    shape = replace(setting.shape, layers=LAYERS)
    model = build_decoder(shape, setting.device, setting.dtype)
    plain = Layers(model.model)
    compiled = Layers(twin(model).model)
    for layer in compiled.layers:
        layer.compile(dynamic=False)  # alike, so compiled once for each row count
    prefix, _, text = setting.part
    for rows in (prefix + text + setting.schedule.kept, prefix + text, 1):
        hidden = torch.randn(1, rows, shape.hidden, device=setting.device).to(setting.dtype)
        positions = torch.arange(rows, device=setting.device)[None]
        given = (hidden, *model.model.rotary_emb(hidden, position_ids=positions))
        runs: dict[str, Callable[[], object]] = {
            EAGER: lambda given=given: plain(*given),
            COMPILED: lambda given=given: compiled(*given),
        }
        if setting.device.type == "cuda":
            runs[GRAPH] = captured(plain, given)
        title = f"{LAYERS} layers, {rows} rows"
        timings = interleave(runs, setting.device, setting.arguments.repetitions, setting.arguments.warmup)
        report.timings[title] = timings
        report.tables[title] = timing_rows(timings, setting.clocks, over=EAGER)
    return report


def main(argv: list[str] | None = None) -> None:
    run(Setting(parser(__doc__).parse_args(argv))).finish()


if __name__ == "__main__":
    main()
