"""`prune` through what models are wrapped in, and what it refuses: PEFT, torch.compile, accelerate, bitsandbytes."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from family_models import FAMILIES, PAD, TEXT, family_model
from family_reference import GREEDY, Hidden, thresholds_for
from test_families import (
    NEW,
    ONE_IMAGE,
    SHALLOW_MID_LAYER,
    TWO_IMAGES,
    assert_same_tokens_and_logits,
    config_for,
    hidden_rows,
    inputs_for,
    reference_run,
    state_of,
)
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, MistralConfig

from llava.pruning import PruningConfig, PruningConfigError, UnsupportedCallError, UnsupportedModelError, prune
from llava.pruning.flops import savings

MODE = ["middle", "deep"]


def assert_prunes_like_the_unpatched_model(wrapped: nn.Module, inner: nn.Module, name: str) -> None:
    """`wrapped` pruned against `inner` at full length with the pruned rows hidden."""
    inputs = inputs_for(name, "one image")
    # From this model's own probe: quantisation moves the values.
    found = thresholds_for(inner, inputs, SHALLOW_MID_LAYER, None)
    config = PruningConfig(mode=tuple(MODE), shallow_mid_layer=SHALLOW_MID_LAYER, **found)
    with torch.no_grad():
        wrapped(**inputs)  # transformers installs hooks of its own at the first call
    before = state_of(inner)
    with prune(wrapped, config) as run, torch.no_grad():
        pruned = wrapped.generate(**inputs, max_new_tokens=NEW, **GREEDY)
        prefill = wrapped(**inputs, logits_to_keep=1)
    assert state_of(inner) == before
    (trace,) = run.traces
    assert 0 < len(trace.kept_positions) < trace.num_visual
    assert trace.exit_layer is not None
    assert 0 < savings(trace, wrapped)["paper"] < 1
    hidden: list[Hidden] = hidden_rows(run.traces, inputs)
    with reference_run(inner, config, hidden):
        reference = wrapped.generate(**inputs, max_new_tokens=NEW, **GREEDY)
    assert_same_tokens_and_logits(pruned, reference)
    torch.testing.assert_close(prefill.logits[:, -1], reference.logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_peft(name) -> None:
    peft = pytest.importorskip("peft")
    inner = FAMILIES[name].build()
    decoder_only = r".*(language_model|text_model)\.layers\.\d+\.self_attn\.(q|v)_proj"
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=decoder_only, init_lora_weights=True))
    assert_prunes_like_the_unpatched_model(wrapped.eval(), inner, name)


@pytest.mark.parametrize(
    "name, form", [("llava", "wrapper"), ("llava", "in place"), ("llava", "decoder"), ("qwen3-vl", "layers")]
)
def test_torch_compile(name, form) -> None:
    """The `eager` backend traces as the others do, and needs no compiler."""
    torch._dynamo.reset()
    inner = FAMILIES[name].build()
    wrapped = inner
    if form == "wrapper":
        wrapped = torch.compile(inner, backend="eager")
    elif form == "in place":
        inner.compile(backend="eager")
    elif form == "decoder":
        inner.model.language_model = torch.compile(inner.model.language_model, backend="eager")
    else:
        for layer in inner.model.language_model.layers:
            layer.compile(backend="eager")
    assert_prunes_like_the_unpatched_model(wrapped, inner, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_accelerate_offload(name) -> None:
    from accelerate import cpu_offload

    inner = FAMILIES[name].build()
    # The decoder alone: some families read parameters of the outer model in helpers that accelerate does not hook.
    cpu_offload(inner.get_decoder(), execution_device=torch.device("cpu"))
    assert next(inner.get_decoder().layers[0].parameters()).device.type == "meta"
    assert_prunes_like_the_unpatched_model(inner, inner, name)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_bitsandbytes(name, bits) -> None:
    """Decoder and its layers quantised on the CPU; decisions are the quantised model's own."""
    bnb = pytest.importorskip("bitsandbytes")
    inner = FAMILIES[name].build()
    for layer in inner.get_decoder().layers:
        for path, linear in [(p, m) for p, m in layer.named_modules() if type(m) is nn.Linear]:
            size, bias = (linear.in_features, linear.out_features), linear.bias is not None
            if bits == 4:
                quantised = bnb.nn.Linear4bit(*size, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
                quantised.weight = bnb.nn.Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4", module=quantised
                )
            else:
                quantised = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
                quantised.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            quantised.bias = linear.bias
            parent, _, child = path.rpartition(".")
            setattr(layer.get_submodule(parent), child, quantised.to("cpu"))
    inputs = inputs_for(name, "one image")
    if bits == 8:
        # Activations are rounded by the row's largest entry, so a row's result does not depend on its neighbours;
        # but rounding turns a difference of 1e-7 into one step of 1/127, so decisions and lengths are compared.
        with prune(inner, {"mode": ["deep"], "mid_deep_layer": 4}) as run, torch.no_grad():
            output = inner.generate(**inputs, max_new_tokens=NEW, **GREEDY)
        (trace,) = run.traces
        text = trace.num_rows - trace.num_visual
        assert trace.rows_per_layer == [trace.num_rows] * 4 + [text] * 4
        held = [layer.get_seq_length() for layer in output.past_key_values.layers]
        assert held == [rows + NEW - 1 for rows in trace.rows_per_layer]
        return
    assert_prunes_like_the_unpatched_model(inner, inner, name)


# --- refused ---


def tiny(model_type: str, **settings):
    config = AutoConfig.for_model(model_type, **settings)
    return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize(
    "model_type, settings, reason",
    [
        (
            "gemma3",
            {
                "text_config": {**TEXT, "head_dim": 16, "model_type": "gemma3_text"},
                "vision_config": {
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 28,
                    "patch_size": 14,
                },
            },
            "image rows attend both ways",
        ),
        (
            "mllama",
            {
                "text_config": {
                    **TEXT,
                    "cross_attention_layers": [1],
                    "model_type": "mllama_text_model",
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                },
                "vision_config": {
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_global_layers": 1,
                    "attention_heads": 2,
                    "image_size": 28,
                    "patch_size": 14,
                    "vision_output_dim": 32,
                    "intermediate_layers_indices": [0],
                },
            },
            "cross-attention",
        ),
    ],
)
def test_other_architectures_are_refused_with_reason_and_alternative(model_type, settings, reason) -> None:
    model = tiny(model_type, **settings)
    with (
        pytest.raises(UnsupportedModelError, match=rf"(?s)'{model_type}'.*{reason}.*instead.*qwen2_5_vl"),
        prune(model),
    ):
        pass


def test_an_unknown_architecture_is_refused() -> None:
    with (
        pytest.raises(UnsupportedModelError, match=r"'Linear' models cannot be pruned.*instead"),
        prune(nn.Linear(2, 2)),
    ):
        pass


def test_a_sliding_window_is_refused() -> None:
    settings = copy.deepcopy(FAMILIES["llava-mistral"].settings)
    settings["text_config"]["sliding_window"] = 16
    model = tiny(settings.pop("model_type"), **settings)
    with pytest.raises(UnsupportedModelError, match=r"window 16.*full attention"), prune(model):
        pass
    assert MistralConfig().sliding_window == 4096  # what a config that says nothing means


@pytest.mark.parametrize(
    "option, name",
    [
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"use_cache": False}, "use_cache"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused_by_name(option, name) -> None:
    model, inputs = family_model("qwen2.5-vl"), inputs_for("qwen2.5-vl", "one image")
    config = config_for("qwen2.5-vl", "one image", MODE)
    with prune(model, config), pytest.raises(UnsupportedCallError, match=name):
        model.generate(**inputs, max_new_tokens=2, **option)


def test_right_padding_is_refused() -> None:
    model, inputs = family_model("internvl"), dict(inputs_for("internvl", "one image"))
    for key in ("input_ids", "attention_mask"):
        filler = torch.full((1, 2), PAD if key == "input_ids" else 0)
        inputs[key] = torch.cat([inputs[key], filler], dim=1)
    config = config_for("internvl", "one image", MODE)
    with prune(model, config), pytest.raises(UnsupportedCallError, match="left padding"):
        model.generate(**inputs, max_new_tokens=2)


# --- defaults ---


@contextmanager
def depth(layers: int):
    yield LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": layers}))


@pytest.mark.parametrize(
    "layers, boundary",
    [(32, 6), (40, 8), (28, 5), (24, 4), (8, 2), (4, 1), (2, 1)],  # 6 of 32, rounded
)
def test_default_boundary_is_the_published_one_scaled(layers, boundary) -> None:
    with depth(layers) as model, pytest.warns(UserWarning, match="uncalibrated.*python -m llava.calibrate"):
        config = PruningConfig.for_model(model)
    assert config.mode == ("shallow", "middle", "deep")
    assert config.shallow_mid_layer == boundary
    assert (config.layer_threshold, config.tokens_threshold) == (0.995, 0.2)
    config.validate_for(layers)


@pytest.mark.filterwarnings("ignore:uncalibrated")
@pytest.mark.parametrize("name", FAMILIES)
def test_default_config_runs_on_every_family(name) -> None:
    model = family_model(name)
    config = PruningConfig.for_model(model)
    with prune(model, config) as run:
        model.generate(**FAMILIES[name].inputs(TWO_IMAGES, ONE_IMAGE), max_new_tokens=2, do_sample=False)
    assert len(run.traces) == 2


def test_a_model_too_shallow_for_a_default_says_so() -> None:
    with depth(1) as model, pytest.raises(PruningConfigError, match="1 layer"):
        PruningConfig.for_model(model)
