"""`prune` on every supported family of transformers' own models, against full-length runs of the unpatched model."""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from family_models import FAMILIES, LAYERS, family_model
from family_reference import (
    GREEDY,
    Hidden,
    Recorder,
    attention_noted,
    between,
    masks_hide,
    shallow_zeroed,
    thresholds_for,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationMixin

from llava.pruning import (
    LEAVE,
    Method,
    PruningConfig,
    PruningConfigError,
    UnsupportedCallError,
    prune,
    supported_models,
)
from llava.pruning.flops import DecoderShape, counter_mapping, executed_flops

NEW = 5
SHALLOW_MID_LAYER = 2
ONE_IMAGE = (5, "image", 6)
TWO_IMAGES = (4, "image", 3, "image", 5)
NO_IMAGE = (9,)

PROMPTS = {
    "one image": [ONE_IMAGE],
    "two images": [TWO_IMAGES],
    "padded batch of three": [TWO_IMAGES, ONE_IMAGE, NO_IMAGE],
}
MODES = {
    "middle": (["middle"], None),
    "deep": (["deep"], None),
    "middle and deep": (["middle", "deep"], None),
    "shallow, first": (["shallow"], "first"),
    "shallow, half": (["shallow"], "half"),
    "all, first": (["shallow", "middle", "deep"], "first"),
    "all, half": (["shallow", "middle", "deep"], "half"),
}
CASES = [(name, prompts) for name in FAMILIES for prompts in PROMPTS] + [
    (name, "video") for name, family in FAMILIES.items() if family.has_video
]


def inputs_for(name: str, prompts: str) -> dict[str, torch.Tensor]:
    family = FAMILIES[name]
    return family.inputs(*([(5, "video", 6)] if prompts == "video" else PROMPTS[prompts]))


@cache
def thresholds(name: str, kind: str, sink: str | None) -> dict[str, float]:
    prompt = {"one image": ONE_IMAGE, "two images": TWO_IMAGES, "video": (5, "video", 6)}[kind]
    return thresholds_for(family_model(name), FAMILIES[name].inputs(prompt), SHALLOW_MID_LAYER, sink)


def config_for(name: str, prompts: str, mode: list[str], sink: str | None = None) -> PruningConfig:
    """A config under which the family's first prompt selects, keeps some rows and loses them again."""
    kind = "two images" if prompts == "padded batch of three" else prompts
    settings: dict = {"mode": mode, "shallow_mid_layer": SHALLOW_MID_LAYER, "shallow_sink": sink}
    if "middle" in mode:
        settings |= thresholds(name, kind, sink)
    elif "deep" in mode:
        settings["mid_deep_layer"] = 4
    return PruningConfig(**settings)


def assert_same_tokens_and_logits(pruned, reference) -> None:
    assert pruned.sequences.tolist() == reference.sequences.tolist()
    torch.testing.assert_close(
        torch.stack(pruned.logits, dim=1), torch.stack(reference.logits, dim=1), atol=1e-4, rtol=0
    )


def hidden_rows(traces, inputs) -> list[Hidden]:
    return [Hidden.from_trace(trace, inputs["input_ids"].shape[1], LAYERS) for trace in traces]


@contextmanager
def reference_run(model, config, hidden, copies=1):
    """The unpatched model, full length: pruned rows hidden, shallow weights zeroed."""
    with masks_hide(model, hidden, copies):
        if config.shallow:
            with shallow_zeroed(model, config, hidden, copies):
                yield
        else:
            yield


@pytest.mark.parametrize("mode, sink", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("name, prompts", CASES)
def test_pruned_generation_equals_a_full_length_run_that_hides_the_pruned_rows(name, prompts, mode, sink) -> None:
    model, inputs = family_model(name), inputs_for(name, prompts)
    config = config_for(name, prompts, mode, sink)
    with prune(model, config) as run:
        pruned = model.generate(**inputs, max_new_tokens=NEW, **GREEDY)

    trace = run.traces[0]
    if "middle" in mode:
        assert 0 < len(trace.kept_positions) < trace.num_visual
    if "deep" in mode:
        assert trace.exit_layer is not None and trace.exit_layer < LAYERS

    hidden = hidden_rows(run.traces, inputs)
    with reference_run(model, config, hidden):
        reference = model.generate(**inputs, max_new_tokens=NEW, **GREEDY)
    assert_same_tokens_and_logits(pruned, reference)

    dense = model.generate(**inputs, max_new_tokens=1, **GREEDY)
    change = (pruned.logits[0] - dense.logits[0]).abs().amax(dim=1)
    decided = torch.tensor([trace.num_visual > 0 for trace in run.traces])
    if "shallow" in mode or "deep" in mode:
        assert change[0] > 1e-3, "pruning does not show: the comparison says nothing"
    assert (change[~decided] < 1e-4).all()

    # The cache really is shorter, and so was the work.
    held = [layer.get_seq_length() for layer in pruned.past_key_values.layers]
    longest = [max(counts) for counts in zip(*(trace.rows_per_layer for trace in run.traces), strict=True)]
    assert held == [rows + NEW - 1 for rows in longest]
    for each, prompt in zip(run.traces, hidden, strict=True):
        assert each.rows_per_layer == (prompt.num_rows - prompt.gone.sum(1)).tolist()
        assert each.visual_positions == prompt.visual.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("knobs", [{}, {"relative": True}, {"relative": True, "keep": 3}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_probing_all_text_rows_equals_shares_formed_in_a_full_length_run(name, knobs) -> None:
    """Two prompts, one padded: every share of every text row behind an image, from eager weights of the whole run."""
    model, inputs = family_model(name), FAMILIES[name].inputs(TWO_IMAGES, ONE_IMAGE)
    recorder = Recorder({}, SHALLOW_MID_LAYER + 1, probe_rows="text")
    with prune(model, recorder), torch.no_grad():
        model(**FAMILIES[name].inputs(TWO_IMAGES))
    shares = recorder.shares[SHALLOW_MID_LAYER + 1]
    config = {"mode": ["middle", "deep"], "shallow_mid_layer": SHALLOW_MID_LAYER, "probe_rows": "text", **knobs}
    config["layer_threshold"] = (float(shares["cosine"].min()) + 1) / 2
    config["exit_threshold"], config["exit_patience"] = 1e-6, 1
    if "keep" not in knobs:
        config["tokens_threshold"] = between(shares["part" if "relative" in knobs else "norm"])
    with prune(model, config) as run:
        pruned = model.generate(**inputs, max_new_tokens=NEW, **GREEDY)
    assert run.traces[0].select_layer == SHALLOW_MID_LAYER + 1
    assert 0 < run.traces[0].num_kept < run.traces[0].num_visual and run.traces[0].exit_layer is not None

    hidden = hidden_rows(run.traces, inputs)
    with masks_hide(model, hidden), attention_noted(model) as noted:
        reference = model.generate(**inputs, max_new_tokens=NEW, **GREEDY)
        assert_same_tokens_and_logits(pruned, reference)
        for number, (prompt, trace) in enumerate(zip(hidden, run.traces, strict=True)):
            for decision in trace.decisions:
                weights, values = (part[number, :, prompt.padding :] for part in noted[decision.layer])
                weights, there = weights[..., prompt.padding :], torch.as_tensor(decision.before)
                formed = []
                for row in range(trace.visual_positions[0], trace.num_rows):
                    if not prompt.visual[row]:
                        output = torch.einsum("hk,hkd->hd", weights[:, row], values).flatten()
                        own = (weights[:, row, there, None] * values[:, there]).transpose(0, 1).flatten(1)
                        cosine = torch.cosine_similarity(output - own, output[None], dim=-1)
                        formed.append(torch.stack([1 - cosine, own.norm(dim=-1), own.norm(dim=-1) / output.norm()]))
                turn, norm, part = torch.stack(formed).amax(0)
                measured = decision.measured
                torch.testing.assert_close(1 - torch.as_tensor(measured["cosine"]), turn, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(torch.as_tensor(measured["norm"]), norm, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(torch.as_tensor(measured["part"]), part, atol=1e-5, rtol=1e-4)
                if decision.layer == trace.select_layer:
                    lengths = part if "relative" in knobs else norm
                    kept = lengths > config.get("tokens_threshold", 0)
                    if "keep" in knobs:
                        kept = lengths >= lengths.sort().values[-min(3 * len(trace.image_spans), len(lengths))]
                    assert there[kept].tolist() == trace.kept_positions


BEAMS = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": NEW, "do_sample": False}
BEAM_BATCHES = {
    "one image a prompt": ("one image", [ONE_IMAGE, (3, "image", 8), NO_IMAGE]),
    "two images in a prompt": ("two images", [TWO_IMAGES, ONE_IMAGE, NO_IMAGE]),
}


def copies_get_their_images(name: str, batch: str) -> bool:
    """Whether this transformers gives every beam the images of its own prompt."""
    if hasattr(GenerationMixin, "_expand_multimodal_outputs"):
        return True
    # InternVL's second image has two tiles.
    return not (name.startswith(("llava", "internvl")) and (batch == "two images in a prompt" or name == "internvl"))


@pytest.mark.parametrize("mode", [["middle", "deep"], ["shallow", "middle", "deep"]], ids=["middle and deep", "all"])
@pytest.mark.parametrize("batch", BEAM_BATCHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_three_beams_of_a_padded_batch(name, batch, mode) -> None:
    kind, prompts = BEAM_BATCHES[batch]
    model, inputs = family_model(name), FAMILIES[name].inputs(*prompts)
    config = config_for(name, kind, mode, "first" if "shallow" in mode else None)
    if not copies_get_their_images(name, batch):
        with prune(model, config), pytest.raises(UnsupportedCallError, match="use a newer transformers"):
            model.generate(**inputs, **BEAMS)
        return
    with prune(model, config) as run:
        pruned = model.generate(**inputs, **BEAMS)
    assert len(run.traces) == 3
    assert 0 < len(run.traces[0].kept_positions) < run.traces[0].num_visual
    hidden = hidden_rows(run.traces, inputs)
    with reference_run(model, config, hidden, copies=3):
        reference = model.generate(**inputs, **BEAMS)
    assert pruned.tolist() == reference.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_beam_sees_the_images_of_its_own_prompt(name) -> None:
    """What the refusal above is about: rows that enter the decoder are those of the prompt alone."""
    model, family = family_model(name), FAMILIES[name]
    seen: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].detach().clone()), with_kwargs=True
    )
    try:
        for inputs, copies in ((family.inputs(TWO_IMAGES), {}), (family.inputs(TWO_IMAGES), BEAMS)):
            model.generate(**inputs, **{**BEAMS, "num_beams": 1, "num_return_sequences": 1, **copies})
    finally:
        hook.remove()
    alone, *_ = seen
    together = next(rows for rows in seen if rows.shape[:2] == (3, alone.shape[1]))
    same = torch.allclose(together, alone.expand_as(together), atol=1e-5)
    assert same == copies_get_their_images(name, "two images in a prompt")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_in_a_batch_decides_and_answers_as_it_does_alone(name) -> None:
    model, family = family_model(name), FAMILIES[name]
    config = config_for(name, "two images", ["shallow", "middle", "deep"], "half")
    # More padding than the longest needs, so that every sample has some.
    together_inputs = family.inputs(TWO_IMAGES, NO_IMAGE, extra_padding=3)
    with prune(model, config) as run:
        together = model.generate(**together_inputs, max_new_tokens=NEW, **GREEDY)
    traces = run.traces
    with prune(model, config) as run:
        alone = model.generate(**family.inputs(TWO_IMAGES), max_new_tokens=NEW, **GREEDY)
    assert together.sequences[0, -NEW:].tolist() == alone.sequences[0, -NEW:].tolist()
    for key in ("num_rows", "visual_positions", "select_layer", "kept_positions", "exit_layer", "rows_per_layer"):
        assert getattr(traces[0], key) == getattr(run.traces[0], key), key
    logits = [torch.stack(output.logits, dim=1)[0] for output in (together, alone)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_image_of_a_prompt_is_told_apart(name) -> None:
    model, family = family_model(name), FAMILIES[name]
    inputs = family.inputs(TWO_IMAGES, ONE_IMAGE)
    config = config_for(name, "two images", ["middle", "deep"])
    with prune(model, config) as run, torch.no_grad():
        model(**inputs)
    # Tiles of SmolVLM and Idefics3 are spans of their own: text stands between them.
    spans_per_image = 2 if name in ("smolvlm", "idefics3") else 1
    for trace, images in zip(run.traces, (2, 1), strict=True):
        assert len(trace.image_spans) == images * spans_per_image
        rows = [row for first, stop in trace.image_spans for row in range(first, stop)]
        assert rows == trace.visual_positions
        assert sum(trace.kept_per_image) == len(trace.kept_positions)
        assert trace.to_dict()["kept_per_image"] == trace.kept_per_image


def test_adjacent_images_of_equal_size_are_told_apart() -> None:
    model, family = family_model("llava"), FAMILIES["llava"]
    with prune(model) as run, torch.no_grad():
        model(**family.inputs((4, "image", "image", 5), (3, "image", 2)))
    assert [trace.image_spans for trace in run.traces] == [[(4, 20), (20, 36)], [(3, 19)]]


@pytest.mark.parametrize("dense", [None, {"mode": []}], ids=["no config", "empty mode"])
@pytest.mark.parametrize("name", FAMILIES)
def test_dense_calls_are_bit_equal_and_nothing_is_left(name, dense) -> None:
    model = FAMILIES[name].build()  # its own: another test's leftovers must not be taken for the normal state
    inputs = inputs_for(name, "padded batch of three")
    expected = model.generate(**inputs, max_new_tokens=NEW, **GREEDY)
    before = state_of(model)
    config = config_for(name, "two images", ["shallow", "middle", "deep"], "first")

    with prune(model, dense):
        inside = model.generate(**inputs, max_new_tokens=NEW, **GREEDY)
    with prune(model, config):
        model.generate(**inputs, max_new_tokens=NEW, **GREEDY)
    with pytest.raises(ZeroDivisionError), prune(model, config):
        1 / 0  # noqa: B018
    with pytest.raises(RuntimeError, match="in the last layer"), prune(model, config):
        broken = model.get_decoder().layers[-1].mlp.register_forward_pre_hook(_raise)
        try:
            model.generate(**inputs, max_new_tokens=NEW, **GREEDY)
        finally:
            broken.remove()
    assert state_of(model) == before
    after = model.generate(**inputs, max_new_tokens=NEW, **GREEDY)

    for output in (inside, after):
        assert torch.equal(output.sequences, expected.sequences)
        for logits, its in zip(output.logits, expected.logits, strict=True):
            assert torch.equal(logits, its)


def _raise(*args) -> None:
    raise RuntimeError("in the last layer")


def state_of(model) -> dict:
    """All that a block could leave: attributes, hooks, wrapped methods, settings."""
    state: dict = {}
    for name, module in model.named_modules():
        state[name, "attributes"] = sorted(vars(module))
        for kind, value in vars(module).items():
            if "hooks" in kind:
                state[name, kind] = list(value) if isinstance(value, dict) else value
        state[name, "call"] = (module._compiled_call_impl, vars(module).get("forward"), vars(module).get("generate"))
        config = getattr(module, "config", None)
        if config is not None:
            state[name, "config"] = {key: repr(value) for key, value in vars(config).items()}
    return state


@pytest.mark.parametrize("mode, sink", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("name", FAMILIES)
def test_executed_flops_agree_with_torchs_counter(name, mode, sink) -> None:
    model, inputs = family_model(name), inputs_for(name, "one image")
    config = config_for(name, "one image", mode, sink)
    shape = DecoderShape.of(model)
    counted = []
    for setting in (None, config):
        with (
            prune(model, setting) as run,
            torch.no_grad(),
            FlopCounterMode(display=False, custom_mapping=counter_mapping()) as counter,
        ):
            model(**inputs, logits_to_keep=1)
        # Layers and head; some versions of transformers compute the rotary angles by a matrix product of their own.
        decoder = sum(
            sum(operations.values())
            for path, operations in counter.get_flop_counts().items()
            if re.search(r"(language_model|text_model)\.layers\.\d+$|\.lm_head$", path)
        )
        (trace,) = run.traces
        assert executed_flops(trace, shape) == decoder
        counted.append(decoder)
    if sink is None:  # on models this small, the shallow stage's extra calls cost more than pruning saves
        assert counted[1] < counted[0]


@pytest.mark.parametrize("name", ["qwen3-vl"])
def test_rows_stay_until_the_last_image_features_have_joined(name) -> None:
    model, inputs = family_model(name), inputs_for(name, "one image")
    with (
        pytest.raises(PruningConfigError, match="'mid_deep_layer' is 2; it must be at least 3"),
        prune(model, {"mode": ["deep"], "mid_deep_layer": 2}),
    ):
        pass
    with prune(model, {"mode": ["deep"], "mid_deep_layer": 3}) as run:
        model.generate(**inputs, max_new_tokens=1)
    assert run.traces[0].exit_layer == FAMILIES[name].first_layer == 3

    class Early(Method):
        def decide(self, layer, measured, trace):
            return LEAVE

    with pytest.raises(UnsupportedCallError, match="needs every row up to layer 2"), prune(model, Early()):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_of_a_pruned_prompt_is_not_continued_behind_its_back(name) -> None:
    model, inputs = family_model(name), inputs_for(name, "one image")
    config = config_for(name, "one image", ["middle", "deep"])
    more = torch.randint(10, 90, (1, 4))

    def second_turn(output):
        ids = torch.cat([output.sequences, more], dim=1)
        model.generate(ids, past_key_values=output.past_key_values, max_new_tokens=2)

    with prune(model, config):
        output = model.generate(**inputs, max_new_tokens=3, **GREEDY)
        with pytest.raises(UnsupportedCallError, match="pass the whole conversation again"):
            second_turn(output)
    with pytest.raises(RuntimeError, match="prefill the prompt anew"):
        second_turn(output)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_fed_behind_a_pruned_prompt_by_hand(name) -> None:
    """A loop of its own may go on with the cache inside the block: several rows at once, as the reference has it."""
    model, inputs = family_model(name), inputs_for(name, "padded batch of three")
    config = config_for(name, "padded batch of three", ["middle", "deep"])
    more = torch.randint(10, 90, (3, 4), generator=torch.Generator().manual_seed(9))
    longer_mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)

    def two_calls():
        with torch.no_grad():
            first = model(**inputs, use_cache=True)
            positions = {}
            if "qwen" in name:  # it counts a picture's rows otherwise, and has to be told where text goes on
                behind = (longer_mask.cumsum(-1) - 1)[:, -more.shape[1] :] + model.model.rope_deltas
                positions["position_ids"] = behind.expand(3, -1, -1)
            cache = first.past_key_values
            return model(input_ids=more, attention_mask=longer_mask, past_key_values=cache, **positions).logits

    with prune(model, config) as run:
        pruned = two_calls()
    assert run.traces[0].exit_layer is not None
    with reference_run(model, config, hidden_rows(run.traces, inputs)):
        reference = two_calls()
    torch.testing.assert_close(pruned, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_later_turn_is_decided_anew(name) -> None:
    """Two turns in one block, the second with the first in its prompt, as each alone."""
    model, family = family_model(name), FAMILIES[name]
    config = config_for(name, "one image", ["shallow", "middle", "deep"], "first")
    turns = [family.inputs(ONE_IMAGE), family.inputs((*ONE_IMAGE, 5, "image", 4))]

    def ask(inputs):
        output = model.generate(**inputs, max_new_tokens=3, **GREEDY)
        return output.sequences[:, -3:].tolist(), run.traces[0].to_dict()

    with prune(model, config) as run:
        together = [ask(inputs) for inputs in turns]
    for inputs, (tokens, trace) in zip(turns, together, strict=True):
        with prune(model, config) as run:
            assert ask(inputs) == (tokens, trace)
    assert together[0][1]["kept_positions"] and together[1][1]["num_rows"] > together[0][1]["num_rows"]


def test_every_family_is_listed_and_every_cell_names_a_test() -> None:
    folder = Path(__file__).parent
    page = (folder.parent / "docs" / "models.md").read_text(encoding="utf-8")
    for family in FAMILIES.values():
        assert f"(`{family.settings['model_type']}`)" in page
    code = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("test_*.py"))
    named = re.findall(r"`(?:tests/\w+\.py::)?(test_\w+)`", page)
    assert len(named) > 8 and all(f"def {name}(" in code for name in named)
    assert {settings.settings["model_type"] for settings in FAMILIES.values()} <= set(supported_models())
