"""What makes pruning fast, checked without a clock: operators, tensor sizes, transfers to the host, rows, memory."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory import peak_bytes
from benchmarks.shapes import Prompts, Schedule
from benchmarks.variants import DENSE, EAGER, OURS_DENSE, PRUNED, SHALLOW, cache_bytes, make_variants
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.pruning import prune

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
SCHEDULE = Schedule(2, 4, 5, 6)
CPU = torch.device("cpu")


def decoder(**changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()


def prompts(*parts: tuple[int, int, int], hidden: int = 32) -> Prompts:
    return Prompts.make(list(parts), hidden, CPU, torch.float32)


class Operators(TorchDispatchMode):
    """Names of the operators that run, and the size of the largest tensor that one of them makes."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for output in result if isinstance(result, tuple | list) else [result]:
            # Views and what is changed in place occupy no memory of their own.
            if isinstance(output, torch.Tensor) and not func.is_view and not func._schema.is_mutable:
                self.largest = max(self.largest, output.numel())
        return result


class Transfers(TorchFunctionMode):
    """Counts the calls that would make the host wait for an accelerator, by the layer that runs."""

    WAITING = ("cpu", "numpy", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self, layers):
        super().__init__()
        self.layer, self.by_layer = -1, Counter()
        self.waiting = {getattr(torch.Tensor, name) for name in self.WAITING} | {torch.nonzero}
        self.handles = [
            layer.register_forward_pre_hook(lambda module, args, number=number: self.enter(number))
            for number, layer in enumerate(layers)
        ]

    def enter(self, layer: int) -> None:
        self.layer = layer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # What is on the host already is not transferred by looking at it.
        on_host = args and getattr(args[0], "_on_host", False)
        result = func(*args, **(kwargs or {}))
        if func in self.waiting and not on_host:
            self.by_layer[self.layer] += 1
            if isinstance(result, torch.Tensor):
                result._on_host = True
        return result

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*exception)


@contextmanager
def recorded(mode):
    with torch.no_grad(), mode:
        yield mode


def test_without_a_config_no_hook_is_installed_and_the_same_kernels_run():
    plain = decoder()
    ours = LlavaLlamaForCausalLM(LlavaConfig(**SIZES)).eval()
    ours.load_state_dict(plain.state_dict())
    prompt = prompts((3, 20, 5))
    hooked = []
    kept = ours.model.layers[3].mlp.forward

    def look(*args):
        hooked.extend(name for name, part in ours.named_modules() if part._forward_pre_hooks or part._forward_hooks)
        return kept(*args)

    ours.model.layers[3].mlp.forward = look
    kernels = []
    for model, extra in ((plain, {}), (ours, {"visual_mask": prompt.visual, "pruning_config": None})):
        with recorded(Operators()) as operators:
            logits = model(inputs_embeds=prompt.embeds, use_cache=True, **extra).logits
        kernels.append((operators.names, logits))
    assert hooked == []
    assert kernels[0][0] == kernels[1][0]
    assert torch.equal(kernels[0][1], kernels[1][1])


def test_a_dense_block_runs_the_same_kernels():
    variants = make_variants(decoder(), [SCHEDULE])
    prompt = prompts((3, 20, 5))
    names = {}
    for name in (DENSE, OURS_DENSE):
        with recorded(Operators()) as operators:
            variants[name].prefill(prompt)
        names[name] = operators.names
    assert names[OURS_DENSE].pop(0) == "aten::detach"  # looking at the visual mask on the host
    assert names[DENSE] == names[OURS_DENSE]


@pytest.mark.parametrize("batch", [1, 3])
def test_no_tensor_of_rows_times_rows(batch):
    rows = 8 + 300 + 12
    variants = make_variants(decoder(), [SCHEDULE, Schedule(2, 3, 0, 7)])
    prompt = prompts(*[(8, 300, 12)] * batch)
    for name in (DENSE, OURS_DENSE, SHALLOW, PRUNED):
        with recorded(Operators()) as operators:
            variants[name].prefill(prompt)
        assert operators.largest < rows**2, name
    if batch == 1:  # and the check can see one
        with recorded(Operators()) as operators:
            variants[EAGER].prefill(prompt)
        assert operators.largest >= SIZES["num_attention_heads"] * rows**2


@pytest.mark.parametrize(
    "parts", [[(3, 20, 5)], [(3, 20, 5), (4, 30, 6), (3, 10, 9)]], ids=["one prompt", "ragged batch"]
)
def test_one_transfer_a_layer_until_the_last_decision_and_none_while_decoding(parts):
    model = make_variants(decoder(), [SCHEDULE, Schedule(2, 3, 4, 5), Schedule(2, 4, 0, 5)])[PRUNED]
    prompt = prompts(*parts)
    with model.block(prompt):
        with recorded(Transfers(model.model.model.layers)) as prefill:
            output = model.forward(prompt)
        # Layers 3, 4 and 5 are probed (strictly above mid-layer 2, up to the exit at 6). A layer's measures are
        # fetched at the next one's input, before this counter's own hook there says that it began.
        assert {layer for layer in prefill.by_layer if layer >= 0} <= {3, 4, 5}
        assert all(count <= 1 for layer, count in prefill.by_layer.items() if layer >= 0)
        assert prefill.by_layer[3] == 1
        token = torch.ones(len(parts), 1, dtype=torch.long)
        with recorded(Transfers(model.model.model.layers)) as decoding:
            for _ in range(3):
                model.model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        assert decoding.by_layer == {}


@pytest.mark.parametrize("parts", [[(8, 300, 12)], [(8, 300, 12), (4, 200, 6)]], ids=["one prompt", "ragged batch"])
def test_probing_all_text_rows_takes_one_transfer_a_layer_and_no_tensor_of_rows_times_rows(parts):
    model, prompt = decoder(), prompts(*parts)
    config = {"mode": ["middle", "deep"], "shallow_mid_layer": 2, "layer_threshold": 0.999999, "keep": 4}
    config |= {"exit_threshold": 1e-6, "probe_rows": "text"}
    inputs = {"inputs_embeds": prompt.embeds, "attention_mask": prompt.attention_mask, "use_cache": True}
    with prune(model, config, visual_mask=prompt.visual) as run:
        with recorded(Transfers(model.model.layers)) as transfers:
            model(**inputs)
        with recorded(Operators()) as operators:
            model(**inputs, logits_to_keep=1)
    assert {(trace.select_layer, trace.exit_layer) for trace in run.traces} == {(3, 6)}
    assert {layer: count for layer, count in transfers.by_layer.items() if layer >= 0} == {3: 1, 4: 1, 5: 1}
    assert operators.largest < 320**2


def test_the_transfer_counter_sees_the_published_way():
    model = make_variants(decoder(), [SCHEDULE])[EAGER]
    with recorded(Transfers(model.model.model.layers)) as transfers:
        model.prefill(prompts((3, 20, 5)))
    assert sum(count for layer, count in transfers.by_layer.items() if layer >= 0) >= 3


def test_linear_layers_see_the_rows_of_all_samples_packed():
    schedules = [SCHEDULE, Schedule(2, 3, 0, 7), Schedule(2, 5, 9, 8)]
    parts = [(3, 20, 5), (4, 31, 16), (1, 10, 9)]
    prompt = prompts(*parts)
    rows = Counter()

    def seen(variant, prompt) -> list[int]:
        counts = []
        handles = [
            layer.mlp.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[:-1].numel()))
            for layer in variant.model.model.layers
        ]
        variant.prefill(prompt)
        for handle in handles:
            handle.remove()
        return counts

    model = decoder()
    together = seen(make_variants(model, schedules)[PRUNED], prompt)
    for number, schedule in enumerate(schedules):
        alone = seen(make_variants(model, [schedule])[PRUNED], prompt.alone(number))
        assert alone == schedule.rows_per_layer(sum(parts[number]), parts[number][1], 8)
        rows.update(dict(enumerate(alone)))
    assert together == [rows[layer] for layer in range(8)]


def test_peak_allocation_of_a_pruned_prefill_is_no_higher_than_dense():
    variants = make_variants(decoder(hidden_size=64, intermediate_size=128), [SCHEDULE])
    prompt = prompts((35, 576, 40), hidden=64)
    peaks = {
        name: peak_bytes(lambda name=name: variants[name].prefill(prompt), CPU)
        for name in (DENSE, SHALLOW, PRUNED, EAGER)
    }
    assert peaks[PRUNED] <= 1.01 * peaks[DENSE]
    assert peaks[SHALLOW] <= 1.01 * peaks[DENSE]
    assert peaks[EAGER] > 3 * peaks[DENSE]  # or the measure sees nothing


def test_kv_memory_of_four_images_is_less_than_half():
    variants = make_variants(decoder(num_hidden_layers=22), [Schedule(6, 9, 10, 16)])
    prompt = prompts((35, 4 * 576, 40))
    sizes = {name: cache_bytes(variants[name].prefill(prompt).past_key_values) for name in (DENSE, PRUNED)}
    rows = [2379] * 10 + [85] * 6 + [75] * 6
    assert sizes[PRUNED] * 22 * 2379 == sizes[DENSE] * sum(rows)
    assert sizes[PRUNED] <= 0.5 * sizes[DENSE]


@pytest.mark.parametrize("parts", [[(3, 200, 5)], [(3, 200, 5), (4, 90, 6)]], ids=["one prompt", "ragged batch"])
def test_a_decoding_step_copies_nothing_that_grows_with_the_prompt(parts):
    variant = make_variants(decoder(), [SCHEDULE])[PRUNED]
    prompt = prompts(*parts)
    token = torch.ones(len(parts), 1, dtype=torch.long)
    with variant.block(prompt), torch.no_grad():
        cache = variant.forward(prompt).past_key_values
        largest, buffers = [], set()
        for _ in range(60):
            with Operators() as operators:
                variant.model(input_ids=token, past_key_values=cache, use_cache=True)
            largest.append(operators.largest)
            buffers.add(cache.layers[0].keys.data_ptr())
    one_layer = 208 * SIZES["num_key_value_heads"] * 8
    assert largest[0] >= one_layer  # the prompt moves into a buffer with spare rows, once
    assert max(largest[1:]) < one_layer
    assert len(buffers) == 1


def test_only_the_needed_row_gets_logits():
    variants = make_variants(decoder(), [SCHEDULE])
    counts = []
    head = variants[PRUNED].model.lm_head
    with (
        variants[PRUNED].block(prompt := prompts((3, 20, 5), (3, 20, 5))) as run,
        torch.no_grad(),
        handle_of(head.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))),
    ):
        variants[PRUNED].model.generate(inputs_embeds=prompt.embeds, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert counts == [1, 1]
    assert [trace.lm_head_rows for trace in run.traces] == [1, 1]


@contextmanager
def handle_of(handle):
    with nullcontext():
        yield handle
    handle.remove()
