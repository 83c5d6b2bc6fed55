"""How long a training step takes, dense and pruned: forward, backward and AdamW over every weight of a decoder.

python -m benchmarks.train                 # 8 layers of 512, 576 visual and 64 text rows, on the CPU
python -m benchmarks.train --layers 32 --hidden 4096 --mlp 11008 --heads 32 --device cuda --dtype bfloat16

Weights are random and rows are noise: what is measured is work, in turns within one run.
"""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks.timing import interleave
from llava.constants import IGNORE_INDEX
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--mlp", type=int, default=1408)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--visual", type=int, default=576, help="visual rows of a sample")
    parser.add_argument("--text", type=int, default=64, help="text rows of a sample; the last half is learnt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--keep", type=int, default=64, help="visual rows that stay")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    torch.manual_seed(0)
    config = LlavaConfig(
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.mlp,
        num_attention_heads=arguments.heads,
        vocab_size=32000,
        use_cache=False,
    )
    with device:
        model = LlavaLlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    shape = arguments.batch, arguments.visual + arguments.text
    rows = torch.randn(*shape, arguments.hidden, device=device, dtype=model.dtype)
    visual = torch.zeros(shape, dtype=torch.bool, device=device)
    visual[:, 1 : 1 + arguments.visual] = True
    labels = torch.full(shape, IGNORE_INDEX, device=device)
    labels[:, -arguments.text // 2 :] = 7

    boundary = max(arguments.layers * 6 // 32, 1)
    configs = {
        "dense": None,
        "random before the decoder": {"method": "random", "keep": arguments.keep, "layer": 0},
        "fastv at layer 2": {"method": "fastv", "keep": arguments.keep, "layer": 2},
        "visipruner deep at the middle": {"mode": ["deep"], "mid_deep_layer": arguments.layers // 2},
        "visipruner shallow and deep": {
            "mode": ["shallow", "deep"],
            "shallow_mid_layer": boundary,
            "mid_deep_layer": arguments.layers // 2,
            "shallow_sink": "first",
        },
    }

    def step(config: dict | None) -> None:
        loss = model(inputs_embeds=rows, visual_mask=visual, labels=labels, pruning_config=config).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    timings = interleave(
        {name: lambda config=config: step(config) for name, config in configs.items()}, device, arguments.repetitions
    )
    clock = "cpu" if device.type == "cpu" else "wall"
    print(json.dumps({**vars(arguments), "clock": clock, "threads": torch.get_num_threads()}))
    for name in configs:
        milliseconds = timings.summary(name, clock)["median_ms"]
        ratio = timings.ratio("dense", name, clock)
        print(f"{name:32} {milliseconds:9.0f} ms a step  {1e3 / milliseconds:6.2f} steps/s  {ratio:5.2f} x dense")


if __name__ == "__main__":
    main()
