"""Pruning under accelerate's dispatch and offload, with assistants, and in half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from naive import naive_generate
from test_engine import (
    GREEDY,
    MODES,
    NEW,
    assert_equal_runs,
    left_padded,
    make_config,
    make_model,
    make_prompt,
    run_engine,
)

from llava.pruning import prune


@pytest.fixture
def ready():
    model = make_model(2)
    rows, visual = make_prompt("three images with text between")
    config = make_config(model, rows, visual, MODES["all"])
    naive = naive_generate(model, rows, visual, config, "first", NEW)
    return model, rows, visual, config, naive


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_weights_offloaded_to_the_cpu_or_to_disk_give_the_same(ready, tmp_path) -> None:
    model, rows, visual, config, naive = ready
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert_equal_runs(*run_engine(offloaded, rows, visual, config), naive, 1e-4)
    on_disk = disk_offload(copy.deepcopy(model), tmp_path, execution_device=torch.device("cpu"))
    assert_equal_runs(*run_engine(on_disk, rows, visual, config), naive, 1e-4)


def test_a_device_map_gives_the_same(ready, tmp_path) -> None:
    model, rows, visual, config, naive = ready
    decoder = "model.language_model"
    places = {f"{decoder}.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")} | {"lm_head": "cpu"}
    places |= {f"{decoder}.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(len(model.model.layers))}
    spread = dispatch_model(copy.deepcopy(model), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert_equal_runs(*run_engine(spread, rows, visual, config), naive, 1e-4)


def test_an_assistant_changes_the_speed_and_not_the_answer(ready) -> None:
    model, rows, visual, config, _ = ready
    plain, _ = run_engine(model, rows, visual, config, max_new_tokens=20)
    for assistant in (copy.deepcopy(model), make_model(2, seed=3)):
        output, trace = run_engine(model, rows, visual, config, max_new_tokens=20, assistant_model=assistant)
        assert output.sequences.tolist() == plain.sequences.tolist()
        assert trace.num_rows == len(rows)
        assert trace.select_layer == 3


def test_hidden_states_of_a_batch_are_left_padded_like_the_logits(ready) -> None:
    model, rows, visual, config, _ = ready
    prompts = [(rows, visual), make_prompt("image in the middle", seed=4)]
    together = model(**left_padded(prompts), pruning_config=config, output_hidden_states=True)
    for number, (own_rows, own_visual) in enumerate(prompts):
        alone = model(
            inputs_embeds=own_rows[None],
            visual_mask=own_visual[None],
            pruning_config=config,
            output_hidden_states=True,
        )
        for mine, its in zip(together.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(mine[number, -its.shape[1] :], its[0], atol=1e-3, rtol=1e-3)
        kept = alone.logits.shape[1]
        torch.testing.assert_close(together.logits[number, -kept:], alone.logits[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decides_in_float32(ready, dtype) -> None:
    model, rows, visual, config, _ = ready
    model = copy.deepcopy(model).to(dtype)
    # A threshold between two cosines of float32 that are one and the same number in half precision.
    rows = rows.to(dtype)
    with prune(model, config | {"layer_threshold": 0.9999}) as run:
        model(inputs_embeds=rows[None], visual_mask=visual[None])
    smallest = run.traces[0].smallest_cosine[3]
    above, below = smallest + 2e-5, smallest - 2e-5
    assert torch.tensor(above, dtype=dtype) == torch.tensor(below, dtype=dtype)
    for threshold, selects in ((above, True), (below, False)):
        _, trace = run_engine(model, rows, visual, config | {"layer_threshold": threshold})
        assert (trace.select_layer == 3) == selects


def test_return_dict_off_gives_new_ids_alone(ready) -> None:
    model, rows, visual, config, naive = ready
    ids = model.generate(
        inputs_embeds=rows[None],
        visual_mask=visual[None],
        pruning_config=config,
        **(GREEDY | {"return_dict_in_generate": False, "output_logits": False}),
    )
    assert ids.tolist() == [naive.tokens]


def test_gradients_do_not_stand_in_the_way(ready) -> None:
    model, rows, visual, config, naive = ready
    with torch.enable_grad():
        logits = model(inputs_embeds=rows[None], visual_mask=visual[None], pruning_config=config).logits
    torch.testing.assert_close(logits[0, -1].detach(), naive.logits[0], atol=1e-4, rtol=0)
