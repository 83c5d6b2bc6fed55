"""Pruning methods: their JSON, their registry, what a method may do, and that every family carries it out."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from family_models import FAMILIES, LAYERS, SIGLIP, family_model
from family_reference import GREEDY, Hidden, masks_hide, states_restored
from golden_runs import GoldenCase, golden_model
from test_engine import make_model, make_prompt
from test_families import copies_get_their_images
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionModel, SiglipVisionModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.pruning import (
    LEAVE,
    METHODS,
    Keep,
    Method,
    PruningConfig,
    PruningConfigError,
    UnsupportedCallError,
    UnsupportedModelError,
    keep_best,
    methods,
    prune,
    register,
    tower,
)
from llava.pruning.methods import cdpruner
from llava.pruning.tower import Picture

KNOBS = {
    "fastv": {"layer": 2, "keep": 2},
    "dart": {"layer": 2, "keep": 5, "image_pivots": 1, "text_pivots": 2},
    "sparsevlm": {"variant": "v2", "layers": [1, 2], "keep": [0.5, 0.2], "heads": 2},
    "vtw": {"layer": 3},
    "yopo": {"last": 5},
    "st3": {"layer": 2, "stride": 2, "keep": 0.2},
    "shortv": {"frozen_layers": [0, 2, 3]},
    "vica": {"layers": [0, 1, 2, 4]},
    "vica without a list": {"method": "vica"},
    "random": {"keep": 5, "layer": 2},
    "random before the decoder": {"method": "random", "keep": 0.5},
    "pyramiddrop": {"layers": [1, 3], "keep": [0.5, 0.2], "positions": "keep"},
    "divprune": {"keep": 3, "positions": "keep"},
    "cdpruner": {"keep": 3, "relevance": "embeddings", "positions": "keep"},
    "cdpruner without a question": {"method": "cdpruner", "keep": 3, "positions": "keep"},
    "stride": {"keep": 3, "layer": 0},
    "stride in the decoder": {"method": "stride", "keep": 0.4, "layer": 2},
    "chain": {
        "steps": [
            {"method": "divprune", "keep": 5, "positions": "keep", "newlines": "pool"},
            {"method": "random", "keep": 3, "layer": 2, "seed": 0},
            {"method": "fastv", "layer": 4, "keep": 1},
        ]
    },
}
BEFORE_THE_DECODER = {"divprune", "cdpruner", "cdpruner without a question", "stride", "chain"}
CONFIGS = {name: {"method": name, **knobs} for name, knobs in KNOBS.items()}
# They look at what a CLIP tower made of the image, and number the rows of the shorter prompt anew.
TOWER_KNOBS = {
    "vispruner": {"keep": 6, "important": 0.4},
    "scope": {"keep": 6, "alpha": 0.5},
    "holov": {"keep": 6, "crops": 3},
    "visionzip": {"dominant": 4, "contextual": 3},
}
TOWER_CONFIGS = {name: {"method": name, **knobs} for name, knobs in TOWER_KNOBS.items()}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def registry():
    """Methods that a test registers are gone behind it."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


# -- JSON and registry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*CONFIGS.values(), *TOWER_CONFIGS.values()])
def test_json_reads_and_writes_back(config) -> None:
    method = PruningConfig.from_any(json.dumps(config))
    assert isinstance(method, METHODS[config["method"]])
    assert {key: method.to_dict()[key] for key in config} == config
    assert Method.from_any(json.dumps(method.to_dict())) == method


def test_a_config_without_a_method_is_visipruner_as_published() -> None:
    published = {"mode": ["deep"], "mid_deep_layer": 4}
    assert Method.from_any(published) == Method.from_any({"method": "visipruner", **published})
    assert "method" not in Method.from_any(published).to_dict()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"method": "fastvv"}, ["'fastvv'", "did you mean 'fastv'?", "known are"]),
        ({"method": "FastV"}, ["'FastV'", "did you mean 'fastv'?"]),
        ({"method": 3}, ["unknown method 3", "known are"]),
        ({"method": None}, ["unknown method None"]),
        ({"method": "fastv", "layers": 2}, ["of 'fastv'", "'layers'", "known keys are layer, keep"]),
        ({"method": "vtw", "mode": ["deep"]}, ["'mode'"]),
        ({"method": "shortv"}, ["'frozen_layers' missing"]),
        ({"method": "schedule", "select_layer": 3}, ["'shallow_mid_layer', 'keep' missing"]),
        ({"method": "fastv", "layer": 0}, ["'layer' is 0", "from 1 to L-1"]),
        ({"method": "fastv", "layer": True}, ["'layer' is True"]),
        ({"method": "fastv", "keep": -1}, ["'keep' is -1"]),
        ({"method": "fastv", "keep": 1.5}, ["'keep' is 1.5", "between 0 and 1"]),
        ({"method": "random", "seed": "x"}, ["'seed' is 'x'"]),
        ({"method": "vtw", "layer": 2.0}, ["'layer' is 2.0"]),
        ({"method": "yopo", "last": -1}, ["'last' is -1", "from 0 to L-1"]),
        ({"method": "st3", "stride": 0}, ["'stride' is 0", "at least 1"]),
        ({"method": "vica", "layers": [1, 1]}, ["'layers' is [1, 1]", "different"]),
        ({"method": "shortv", "frozen_layers": [1, 1]}, ["'frozen_layers' is [1, 1]", "different"]),
        ({"method": "shortv", "frozen_layers": 3}, ["'frozen_layers' is 3"]),
        ({"method": "pyramiddrop", "layers": [3, 2], "keep": [0.5, 0.2]}, ["'layers' is [3, 2]", "ascending"]),
        ({"method": "pyramiddrop", "layers": [2, 3], "keep": [0.5]}, ["'keep' is [0.5]", "for each"]),
        ({"method": "dart", "layer": 0}, ["'layer' is 0", "from 1 to L-1"]),
        ({"method": "dart", "image_pivots": 0}, ["'image_pivots' is 0", "at least 1"]),
        ({"method": "dart", "text_pivots": 0.5}, ["'text_pivots' is 0.5"]),
        ({"method": "dart", "exact": "yes"}, ["'exact' is 'yes'", "one of [False, True]"]),
        ({"method": "sparsevlm", "variant": "v3"}, ["'variant' is 'v3'", "v1_5"]),
        ({"method": "sparsevlm", "layers": [2, 6]}, ["'keep' is [300, 200, 110]", "for each of 'layers'"]),
        ({"method": "sparsevlm", "layers": [6, 2, 8]}, ["'layers' is [6, 2, 8]", "ascending"]),
        ({"method": "sparsevlm", "keep": [1.5, 2, 3]}, ["'keep' is [1.5, 2, 3]"]),
        ({"method": "sparsevlm", "positions": "renumbered"}, ["'positions' is 'renumbered'"]),
        ({"method": "pyramiddrop", "positions": "new"}, ["'positions' is 'new'", "renumber"]),
        ({"method": "divprune", "keep": "64"}, ["'keep' is '64'", "a share between 0 and 1"]),
        ({"method": "divprune", "subset_ratio": 0.1}, ["of 'divprune'", "'subset_ratio'", "known keys are keep"]),
        ({"method": "cdpruner", "relevance": "question"}, ["'relevance' is 'question'", "embeddings"]),
        ({"method": "cdpruner", "relevance": "clip"}, ["'relevance' is 'clip'", "use 'embeddings' or 'none'"]),
        ({"method": "cdpruner", "relevance": "clip", "clip": "here", "question": 3}, ["and 'question'"]),
        ({"method": "cdpruner", "question": "What is it?"}, ["go with 'relevance' 'clip', not 'none'"]),
        ({"method": "stride", "layer": -1}, ["'layer' is -1"]),
        ({"method": "pool", "factor": 0}, ["'factor' is 0", "at least 1"]),
        ({"method": "chain"}, ["'steps' missing"]),
        ({"method": "chain", "steps": [{"method": "fastv"}]}, ["two or more methods"]),
        ({"method": "chain", "steps": {"method": "fastv"}}, ["two or more methods"]),
        ({"method": "chain", "steps": [{"method": "fast"}, {"method": "vtw"}]}, ["did you mean 'fastv'?"]),
        ({"method": "vispruner", "important": 1.1}, ["'important' is 1.1", "from 0 to 1"]),
        ({"method": "scope", "alpha": -0.1}, ["'alpha' is -0.1", "a number from 0"]),
        ({"method": "scope", "alpha": float("nan")}, ["'alpha' is nan"]),
        ({"method": "holov", "crops": 0}, ["'crops' is 0", "at least 1"]),
        (
            {"method": "holov", "order": "published", "positions": "keep"},
            ["'positions' is 'keep'", "'order' 'published'"],
        ),
        ({"method": "divprune", "newlines": "drop"}, ["'newlines' is 'drop'", "stay"]),
        ({"method": "cdpruner", "spread": "call"}, ["'spread' is 'call'", "prompt"]),
        ({"method": "sparsevlm", "variant": ["v1"]}, ["'variant' is ['v1']"]),
        ({"method": "holov", "overflow": "drop"}, ["'overflow' is 'drop'", "redistribute"]),
        ({"method": "visionzip", "dominant": 0}, ["'dominant' is 0", "at least 1"]),
        ({"method": "visionzip", "contextual": -1}, ["'contextual' is -1"]),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(config, words) -> None:
    with pytest.raises(PruningConfigError) as caught:
        Method.from_any(config)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"method": "fastv", "layer": 12}, "'layer' is 12; it must be an integer from 1 to 11"),
        ({"method": "vtw", "layer": 13}, "from 1 to 12 for this model of 12 layers"),
        (
            {"method": "shortv", "frozen_layers": [3, 12]},
            r"'frozen_layers' is \[3, 12\]; it must be a list of different layers from 0 to 11",
        ),
        ({"method": "random", "layer": 12}, "'layer' is 12"),
        ({"method": "yopo", "last": 12}, "'last' is 12; it must be an integer from 0 to 11"),
        ({"method": "st3", "layer": 12}, "'layer' is 12"),
        ({"method": "vica", "layers": [12]}, r"'layers' is \[12\]"),
        (
            {"method": "chain", "steps": [{"method": "vica", "layers": [0, 3]}, {"method": "fastv", "layer": 3}]},
            r"'chain': visual rows sit out layers \[2\], so a method cannot look at",
        ),
        (
            {
                "method": "chain",
                "steps": [{"mode": ["shallow"], "shallow_mid_layer": 2}, {"method": "vica", "layers": [0]}],
            },
            "two steps differ in what text reads",
        ),
        ({"method": "pyramiddrop"}, r"'layers' is \[8, 16, 24\]"),
        ({"method": "sparsevlm"}, r"'layers' is \[2, 6, 15\]"),
        ({"method": "schedule", "shallow_mid_layer": 2, "select_layer": 12, "keep": 3}, "'select_layer' is 12"),
        ({"method": "stride", "layer": 12}, "'layer' is 12"),
        ({"method": "cdpruner", "relevance": "clip", "clip": "nowhere", "question": "?"}, "'clip' is 'nowhere'"),
        ({"method": "chain", "steps": [{"method": "divprune"}, {"method": "fastv", "layer": 12}]}, "'layer' is 12"),
        (
            {"method": "chain", "steps": [{"method": "fastv", "layer": 3}, {"method": "vtw", "layer": 3}]},
            "'vtw' may decide behind layer 2, but 'fastv' before it up to layer 2",
        ),
        (
            {"method": "chain", "steps": [{"mode": ["deep"], "mid_deep_layer": 5}, {"method": "divprune"}]},
            "'divprune' may decide behind layer -1, but 'visipruner' before it up to layer 4",
        ),
        (
            {
                "method": "chain",
                "steps": [
                    {"mode": ["shallow"], "shallow_mid_layer": 2, "shallow_sink": sink} for sink in ("first", "half")
                ],
            },
            "two steps differ in what text reads",
        ),
    ],
)
def test_layers_that_the_model_has_not_are_refused_before_work(config, words) -> None:
    with pytest.raises(PruningConfigError, match=words), prune(golden_model("mha_a"), config):
        pass


def test_rows_that_a_model_still_needs_may_not_leave() -> None:
    # Qwen3-VL's image features join up to layer 2.
    in_the_decoder = {"fastv", "dart", "sparsevlm", "random", "random before the decoder", "pyramiddrop"}
    configs = [CONFIGS[name] for name in (*in_the_decoder, "stride in the decoder", *BEFORE_THE_DECODER)]
    for config in [*configs, {"method": "pool"}]:
        least = 2 if config.get("method") == "sparsevlm" else 3  # behind layer 2
        with (
            pytest.raises(PruningConfigError, match=f"at least {least} for this model"),
            prune(family_model("qwen3-vl"), config),
        ):
            pass


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"method": "yopo", "last": 6}, "'last' is 6; it must be at most 5 for this model"),
        ({"method": "st3", "stride": 2}, "'layer' is 1; it must be at least 3 for this model"),
        ({"method": "vica", "layers": [0, 2]}, r"may not sit out layers \[1\] of this model"),
    ],
)
def test_layers_that_image_features_join_need_their_rows(config, words) -> None:
    with pytest.raises(PruningConfigError, match=words), prune(family_model("qwen3-vl"), config):
        pass


def test_fastv_is_one_short_file_that_an_empty_registry_needs(registry) -> None:
    assert len(inspect.getsource(inspect.getmodule(methods.FastV)).splitlines()) <= 40
    registry.clear()
    register("fastv")(methods.FastV)
    assert Method.from_any({"method": "fastv"}) == methods.FastV()
    with pytest.raises(PruningConfigError, match="known are fastv"):
        Method.from_any({"mode": []})


def test_another_package_brings_methods_by_an_entry_point(registry, tmp_path, monkeypatch) -> None:
    # A package as pip would have installed it.
    (tmp_path / "elsewhere.py").write_text(
        "from dataclasses import dataclass\n"
        "from llava.pruning import LEAVE, Method, register\n"
        "@register('gone')\n"
        "@dataclass(frozen=True)\n"
        "class Gone(Method):\n"
        "    layer: int = 1\n"
        "    def decide(self, layer, measured, trace):\n"
        "        return LEAVE if layer + 1 == self.layer else None\n"
    )
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llava_visipruner.methods]\ngone = elsewhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    model, (rows, visual) = make_model(8), make_prompt("image first")
    with prune(model, '{"method": "gone", "layer": 3}', visual_mask=visual[None]) as run:
        model(inputs_embeds=rows[None])
    assert run.traces[0].exit_layer == 3


def test_a_name_is_given_once(registry) -> None:
    class Other(Method):
        pass

    with pytest.raises(ValueError, match="'fastv' is registered already"):
        register("fastv")(Other)
    register("mine")(Other)
    register("mine")(Other)  # a notebook's cell, run again


# -- what a view shows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look(Method):
    """Calls `at` with every view, and drops nothing."""

    at: object

    def looks_behind(self, num_layers):
        return range(-1, num_layers)

    def measure(self, view):
        self.at(view)


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("layout", ["image in the middle", "three images with text between"])
def test_views_show_what_a_layer_saw_and_what_the_next_would(layout, kv_heads) -> None:
    model = make_model(kv_heads)
    rows, visual = make_prompt(layout)
    asked = [int(visual.nonzero()[-1]), 3, len(rows) - 2]
    seen = {}

    def at(view):
        seen[view.layer] = (
            view.hidden,
            None if view.layer < 0 else (view.attention(), view.attention(asked), view.keys),
            None if view.layer == 7 else (view.next_attention(), view.next_attention(asked)),
        )
        assert torch.equal(torch.arange(len(rows))[view.visual], visual.nonzero()[:, 0])
        assert torch.equal(view.text, (~visual).nonzero()[:, 0])

    with prune(model, Look(at), visual_mask=visual[None]):
        model(inputs_embeds=rows[None])
    eager = make_model(kv_heads)
    eager.set_attn_implementation("eager")
    whole = eager(inputs_embeds=rows[None], output_attentions=True, output_hidden_states=True, use_cache=True)
    for layer in range(-1, 8):
        hidden, here, coming = seen[layer]
        if layer < 7:  # transformers norms the last state
            torch.testing.assert_close(hidden, whole.hidden_states[layer + 1][0], atol=1e-4, rtol=1e-3)
        for weights, number in ((here, layer), (coming, layer + 1)):
            if weights is not None:
                expected = whole.attentions[number][0][:, :, visual]
                torch.testing.assert_close(weights[0], expected[:, -1:], atol=1e-4, rtol=0)
                torch.testing.assert_close(weights[1], expected[:, asked], atol=1e-4, rtol=0)
        if here is not None:
            torch.testing.assert_close(here[2], whole.past_key_values.layers[layer].keys[0], atol=1e-4, rtol=1e-3)


# -- what a decision may do ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeBehind(Method):
    """Behind `layer` the first, last and third visual rows stay, in this order; the last becomes the mean of all."""

    layer: int
    renumber: bool = False

    @property
    def renumbers(self):
        return self.renumber

    def decide(self, layer, measured, trace):
        if layer != self.layer:
            return None
        count = len(trace.alive)
        merge = lambda states: torch.stack([states[0], states.mean(0), states[2]])  # noqa: E731
        return Keep(np.array([0, count - 1, 2]), merge, groups={count - 1: np.arange(count)})


def by_hand(model, hidden, positions, layers, past):
    """Decoder layers over `hidden` `[rows, size]` at `positions`, rows before it in `past` (keys, values a layer)."""
    decoder = model.get_decoder()
    for number in layers:
        layer = decoder.layers[number]
        attention, normed = layer.self_attn, layer.input_layernorm(hidden[None])
        cos, sin = decoder.rotary_emb(hidden[None], torch.as_tensor(positions[number])[None])
        shape = (1, len(hidden), -1, attention.head_dim)
        query, key = (getattr(attention, f"{name}_proj")(normed).view(shape).transpose(1, 2) for name in "qk")
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        value = attention.v_proj(normed).view(shape).transpose(1, 2)
        if number in past:
            key, value = torch.cat([past[number][0], key], 2), torch.cat([past[number][1], value], 2)
        past[number] = key, value
        groups = attention.num_key_value_groups
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * attention.scaling
        rows, keys = scores.shape[2:]
        scores = scores.masked_fill(torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1), -torch.inf)
        heads = scores.softmax(-1) @ value.repeat_interleave(groups, 1)
        hidden = hidden + attention.o_proj(heads.transpose(1, 2).flatten(2))[0]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden


@pytest.mark.parametrize("renumber", [False, True], ids=["positions kept", "renumbered"])
@pytest.mark.parametrize("behind", [-1, 3])
@pytest.mark.parametrize("layout", ["image in the middle", "three images with text between"])
def test_merged_rows_equal_the_decoder_run_by_hand(layout, behind, renumber) -> None:
    model, (rows, visual) = make_model(2), make_prompt(layout)
    count, where = len(rows), visual.nonzero()[:, 0]
    output = model.generate(
        inputs_embeds=rows[None],
        visual_mask=visual[None],
        pruning_config=MergeBehind(behind, renumber),
        max_new_tokens=3,
        **GREEDY,
    )
    (trace,) = model.last_pruning_traces

    every = {layer: torch.arange(count) for layer in range(8)}
    past: dict = {}
    hidden = by_hand(model, rows, every, range(behind + 1), past)
    states = hidden[where]
    going = torch.cat([(~visual).nonzero()[:, 0], where[[0, 2, -1]]]).sort().values
    left, positions = hidden[going].clone(), going.clone()
    places = torch.isin(going, where).nonzero()[:, 0]
    left[places] = torch.stack([states[0], states.mean(0), states[2]])
    positions[places] = where[[0, -1, 2]]
    if renumber:
        positions = torch.arange(len(going))
    behind_it = range(behind + 1, 8)
    hidden = by_hand(model, left, dict.fromkeys(behind_it, positions), behind_it, past)
    logits = []
    for step in range(3):
        logits.append(model.lm_head(model.get_decoder().norm(hidden[-1])))
        token = logits[-1].argmax()
        following = {layer: [(len(going) if renumber and layer > behind else count) + step] for layer in range(8)}
        hidden = by_hand(model, model.get_input_embeddings()(token[None]), following, range(8), past)
    torch.testing.assert_close(torch.stack(output.logits, dim=1)[0], torch.stack(logits), atol=1e-4, rtol=0)
    (decision,) = trace.decisions
    assert decision.positions.tolist() == where[[0, -1, 2]].tolist()
    assert decision.groups == {int(where[-1]): where.tolist()}
    assert trace.rows_per_layer == [count] * (behind + 1) + [len(going)] * (7 - behind)
    assert trace.select_layer == behind and trace.kept_positions == sorted(where[[0, -1, 2]].tolist())


@pytest.mark.parametrize("layout", ["image in the middle", "three images with text between"])
def test_sparsevlms_merged_rows_are_the_means_of_their_groups(layout) -> None:
    model, (rows, visual) = make_model(2), make_prompt(layout)
    config = {"method": "sparsevlm", "layers": [3], "keep": [2], "positions": "keep"}
    seen = []
    layers = model.get_decoder().layers
    with prune(model, config, visual_mask=visual[None]) as run:
        hooks = [
            layers[3].register_forward_hook(lambda module, args, output: seen.append(output[0])),
            layers[4].register_forward_pre_hook(lambda module, args: seen.append(args[0][0])),
        ]
        model(inputs_embeds=rows[None])
        for hook in hooks:
            hook.remove()
    before, after = seen
    (decision,) = run.traces[0].decisions
    merged = list(decision.groups)
    best = decision.positions[: len(decision.positions) - len(merged)]
    dropped = visual.sum() - len(best)
    recycled = [member for members in decision.groups.values() for member in members]
    assert len(recycled) == len(set(recycled)) == int(0.3 * dropped) + 1 and not set(recycled) & set(best)
    assert decision.positions[len(best) :].tolist() == merged and len(merged) == len(recycled) // 10 + 1
    # In the places of those that stay: the kept rows, then a mean for each group.
    going = torch.zeros(len(rows), dtype=torch.bool)
    going[decision.positions] = True
    expected = torch.cat([before[best], torch.stack([before[own].mean(0) for own in decision.groups.values()])])
    torch.testing.assert_close(after[going[going | ~visual]], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(after[~going[going | ~visual]], before[~visual])


@pytest.mark.parametrize("rows", [[3, 3], [24], [-1]])
def test_rows_that_are_not_there_cannot_be_kept(rows) -> None:
    class Wrong(Method):
        def decide(self, layer, measured, trace):
            return Keep(np.array(rows))

    model, (embeds, visual) = make_model(8), make_prompt("image in the middle")
    with pytest.raises(ValueError, match="one of the 24 visual rows"), prune(model, Wrong(), visual_mask=visual[None]):
        model(inputs_embeds=embeds[None])


def test_renumbered_and_other_prompts_share_a_batch() -> None:
    model, config = make_model(2), {"method": "pyramiddrop", "layers": [2, 4], "keep": [0.5, 0.25]}
    made = [make_prompt(layout, seed=seed) for seed, layout in enumerate(("image in the middle", "image first"))]
    made.append((made[0][0][:9], torch.zeros(9, dtype=torch.bool)))
    longest = max(len(rows) for rows, _ in made)
    embeds, mask = torch.zeros(3, longest, 64), torch.zeros(3, longest, dtype=torch.bool)
    attention = torch.zeros(3, longest, dtype=torch.long)
    for number, (rows, visual) in enumerate(made):
        embeds[number, -len(rows) :], mask[number, -len(rows) :], attention[number, -len(rows) :] = rows, visual, 1
    configs = [config, {"method": "fastv", "layer": 2, "keep": 4}, config]
    with prune(model, configs, visual_mask=mask):
        together = model.generate(inputs_embeds=embeds, attention_mask=attention, max_new_tokens=6, **GREEDY)
    for number, ((rows, visual), own) in enumerate(zip(made, configs, strict=True)):
        with prune(model, own, visual_mask=visual[None]):
            alone = model.generate(inputs_embeds=rows[None], max_new_tokens=6, **GREEDY)
        assert together.sequences[number].tolist() == alone.sequences[0].tolist()
        logits = [torch.stack(output.logits, dim=1) for output in (together, alone)]
        torch.testing.assert_close(logits[0][number], logits[1][0], atol=1e-4, rtol=0)


def test_three_halvings_are_three_decisions() -> None:
    model, (rows, visual) = make_model(8), make_prompt("image in the middle")
    config = {"method": "pyramiddrop", "layers": [2, 4, 6], "keep": [12, 6, 3]}
    model(inputs_embeds=rows[None], visual_mask=visual[None], pruning_config=config)
    (trace,) = model.last_pruning_traces
    assert [(one.layer, len(one.before), len(one.positions)) for one in trace.decisions] == [
        (1, 24, 12),
        (3, 12, 6),
        (5, 6, 3),
    ]
    assert [set(trace.decisions[n + 1].positions) < set(trace.decisions[n].positions) for n in (0, 1)] == [True, True]
    measured = trace.selection_measure("attention")
    assert len(measured) == 24 and np.isnan(measured).sum() == 18
    assert trace.selection_cosine is None and trace.select_layer == 5 and len(trace.kept_positions) == 3
    json.dumps(trace.to_dict())


# -- every family ----------------------------------------------------------------------------------------------------

BATCH = [(4, "image", 3, "image", 5), (5, "image", 6), (9,)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_a_full_length_run_of_the_unpatched_model(name, config) -> None:
    model, inputs, knobs = family_model(name), FAMILIES[name].inputs(*BATCH), CONFIGS[config]
    if FAMILIES[name].first_layer > 1 and config in BEFORE_THE_DECODER:
        pytest.skip("refused, see test_rows_that_a_model_still_needs_may_not_leave")
    if FAMILIES[name].first_layer > 1 and not config.startswith(("shortv", "vtw", "yopo", "vica")):
        knobs = {**knobs, **({"layers": [3, 4]} if "layers" in knobs else {"layer": 3})}
    with prune(model, knobs) as run:
        pruned = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    hidden = [Hidden.from_trace(trace, inputs["input_ids"].shape[1], LAYERS) for trace in run.traces]
    treatments = Method.from_any(knobs).treatments(LAYERS)
    frozen = [layer for layer, one in enumerate(treatments) if not (one.update and one.present)]
    for prompt in hidden:  # rows that sit a layer out are hidden in it
        prompt.gone[[layer for layer, one in enumerate(treatments) if not one.present]] |= prompt.visual
    with masks_hide(model, hidden), states_restored(model, hidden, frozen):
        reference = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    assert pruned.sequences.tolist() == reference.sequences.tolist()
    torch.testing.assert_close(
        torch.stack(pruned.logits, dim=1), torch.stack(reference.logits, dim=1), atol=1e-4, rtol=0
    )
    dense = model.generate(**inputs, max_new_tokens=1, **GREEDY)
    change = (pruned.logits[0] - dense.logits[0]).abs().amax(dim=1)
    assert (change[:2] > 1e-4).all() and change[2] < 1e-4
    for trace, prompt in zip(run.traces, hidden, strict=True):
        assert trace.rows_per_layer == (prompt.num_rows - prompt.gone.sum(1)).tolist()
        there = (prompt.visual & ~prompt.gone).sum(1)
        updated = [rows - there[layer] * (layer in frozen) for layer, rows in enumerate(trace.rows_per_layer)]
        assert trace.updated_rows_per_layer == updated


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_may_leave_before_the_decoder_where_every_layer_can_do_without(name) -> None:
    model, inputs = family_model(name), FAMILIES[name].inputs(*BATCH)
    if FAMILIES[name].first_layer > 1:
        pytest.skip("refused, see test_rows_that_a_model_still_needs_may_not_leave")
    beams = 2 if copies_get_their_images(name, "two images in a prompt") else 1
    with prune(model, {"method": "random", "keep": 3}) as run:
        pruned = model.generate(**inputs, max_new_tokens=2, num_beams=beams, do_sample=False)
    hidden = [Hidden.from_trace(trace, inputs["input_ids"].shape[1], LAYERS) for trace in run.traces]
    assert [len(set(trace.rows_per_layer)) for trace in run.traces] == [1, 1, 1]
    with masks_hide(model, hidden, copies=beams):
        reference = model.generate(**inputs, max_new_tokens=2, num_beams=beams, do_sample=False)
    assert pruned.tolist() == reference.tolist()


# -- the vision tower ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByClassToken(Method):
    """Keep the patches that the class token attends to most, before the decoder."""

    needs_tower = True
    name = "class token"
    keep: int = 40

    def looks_behind(self, num_layers):
        return {-1}

    def measure(self, view):
        return {"attention": torch.cat([picture.attention.mean(0) for picture in view.pictures])}

    def decide(self, layer, measured, trace):
        return keep_best(measured["attention"], self.keep) if measured else None


def test_a_method_may_look_at_what_the_tower_made_of_the_picture() -> None:
    case = GoldenCase.load("a_pixels_smd_7b")
    model = case.model
    output = model.generate(**case.inputs(), pruning_config=ByClassToken(), max_new_tokens=4, **GREEDY)
    (trace,) = model.last_pruning_traces
    # transformers' own weights of the layer that LLaVA reads, the last but one.
    own = next(module for module in model.modules() if isinstance(module, CLIPVisionModel))
    tower = CLIPVisionModel(own.config)
    tower.load_state_dict(own.state_dict())
    tower.set_attn_implementation("eager")
    weights = tower(case.pixels, output_attentions=True).attentions[-2][0, :, 0, 1:].mean(0)
    kept = trace.visual_positions[0] + weights.topk(40).indices.sort().values
    assert trace.kept_positions == kept.tolist()
    rows, _ = case.rows()
    hidden = Hidden.from_trace(trace, len(rows), len(trace.rows_per_layer))
    with masks_hide(model, [hidden]):
        reference = model.generate(inputs_embeds=rows[None], max_new_tokens=4, **GREEDY)
    assert output.sequences.tolist() == reference.sequences.tolist()


def rows_of_images(model, inputs) -> torch.Tensor:
    """What the decoder gets of a batch, `[batch, rows, size]`."""
    caught = {}

    def catch(module, args, kwargs):
        caught["rows"] = kwargs["inputs_embeds"]

    with model.get_decoder().register_forward_pre_hook(catch, with_kwargs=True):
        model(**inputs)
    return caught["rows"]


@pytest.mark.parametrize("config", TOWER_CONFIGS)
@pytest.mark.parametrize("name", ["llava", "llava-mistral"])
def test_choosing_before_the_decoder_equals_a_forward_over_the_shorter_prompt(name, config) -> None:
    model, inputs = family_model(name), FAMILIES[name].inputs(*BATCH)
    with prune(model, TOWER_CONFIGS[config]) as run:
        pruned = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    entering = rows_of_images(model, inputs)
    # transformers' own states of the layer that the projector reads.
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    picture = 0
    for number, trace in enumerate(run.traces):
        rows = entering[number, entering.shape[1] - trace.num_rows :].clone()
        stays = torch.ones(trace.num_rows, dtype=torch.bool)
        stays[trace.visual_positions] = False
        kept = len(trace.image_spans) and trace.decisions[0].positions.reshape(len(trace.image_spans), -1)
        for image, (start, _) in enumerate(trace.image_spans):
            own, groups = kept[image], trace.decisions[0].groups
            made = rows[own]  # the class token's is set below
            for place, position in enumerate(own.tolist()):
                if position < 0:
                    made[place] = model.model.multi_modal_projector(states[picture, 0])
                if position in groups:
                    others = [1 + one - start for one in groups[position] if one != position]
                    zipped = states[picture, 1 + position - start] + (states[picture, others].mean(0) if others else 0)
                    made[place] = model.model.multi_modal_projector(zipped)
            rows[start : start + len(own)], stays[start : start + len(own)] = made, True
            picture += 1
        shorter = model.generate(inputs_embeds=rows[stays][None], max_new_tokens=4, **GREEDY)
        assert pruned.sequences[number, inputs["input_ids"].shape[1] :].tolist() == shorter.sequences[0].tolist()
        logits = [torch.stack(output.logits, dim=1) for output in (pruned, shorter)]
        torch.testing.assert_close(logits[0][number], logits[1][0], atol=1e-4, rtol=0)
        assert trace.rows_per_layer == [int(stays.sum())] * LAYERS
    dense = rows_of_images(model, inputs)
    assert torch.equal(dense, entering) and not run.traces[2].decisions


@pytest.mark.parametrize("config", TOWER_CONFIGS)
def test_more_tokens_than_there_are(config) -> None:
    model, inputs = family_model("llava"), FAMILIES["llava"].inputs((4, "image", 3))
    for many in (16, 100):
        knobs = {"dominant": many, "contextual": 100} if config == "visionzip" else {"keep": many}
        knobs = {"method": config, **knobs}
        if config == "visionzip" and many > 16:
            with pytest.raises(PruningConfigError, match="'dominant' is 100; it must be at most 16"):
                model_with(model, inputs, knobs)
        else:
            assert model_with(model, inputs, knobs).rows_per_layer == [4 + 16 + 3] * LAYERS
    if config != "visionzip":
        assert model_with(model, inputs, {"method": config, "keep": 0}).rows_per_layer == [7] * LAYERS
        assert model_with(model, inputs, {"method": config, "keep": 0.5}).rows_per_layer == [15] * LAYERS
    else:
        assert model_with(model, inputs, {"method": config, "dominant": 1, "contextual": 0}).rows_per_layer[0] == 8


def model_with(model, inputs, config):
    with prune(model, config) as run:
        model(**inputs)
    return run.traces[0]


TILES_CONFIGS = {
    **TOWER_CONFIGS,
    "cdpruner": {"method": "cdpruner", "keep": 4, "relevance": "embeddings"},
    "divprune": {"method": "divprune", "keep": 6, "newlines": "stay"},
}


@pytest.mark.parametrize("config", TILES_CONFIGS)
@pytest.mark.parametrize("name", ["llava-next", "llava-next-mistral", "llava-onevision"])
def test_tiles_are_chosen_among_crop_by_crop_and_their_lines_keep_their_ends(name, config) -> None:
    model, inputs, knobs = family_model(name), FAMILIES[name].inputs(*BATCH), dict(TILES_CONFIGS[config])
    if config == "scope":
        knobs["keep"] = 13  # of the image, shared out among its crops
    features = []
    with model.model.multi_modal_projector.register_forward_hook(lambda *args: features.append(args[-1])):
        entering = rows_of_images(model, inputs)
    with prune(model, knobs) as run:
        pruned = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    every, newline = features[0].flatten(0, 1), model.model.image_newline  # [crops * 16, size]
    has_class = name != "llava-onevision"
    states = model.model.vision_tower(
        torch.cat([image[:count] for image, count in zip(inputs["pixel_values"], (3, 5, 3), strict=True)]),
        output_hidden_states=True,
    ).hidden_states[-2 if has_class else -1]
    first_crop, images = 0, iter((3, 5, 3))
    for number, trace in enumerate(run.traces):
        rows = entering[number, entering.shape[1] - trace.num_rows :]
        stays = torch.ones(trace.num_rows, dtype=torch.bool)
        stays[trace.visual_positions] = False
        made = rows.clone()
        for start, stop in trace.image_spans:
            (decision,) = trace.decisions
            count = next(images)
            # Which patch of which crop a row shows, by its value; none: it ends a line.
            own = every[first_crop * 16 : (first_crop + count) * 16]
            same = (rows[start:stop, None] == own).all(-1)
            ends, patch = ~same.any(1), same.int().argmax(1)
            assert torch.equal(rows[start:stop][ends], newline.expand(int(ends.sum()), -1)) and ends.any()
            crop = torch.where(ends, -1, patch // 16)
            goes_on = np.isin(np.arange(start, stop), decision.positions)
            kept = [int(goes_on[(crop == one).numpy()].sum()) for one in range(count)]
            shown = [int((crop == one).sum()) for one in range(count)]
            assert goes_on[ends.numpy()].all()
            if config in ("holov", "divprune"):  # all tiles are one pool
                assert sum(kept) == 6
            elif config != "visionzip":
                each = {"scope": 13 // count, "vispruner": 6, "cdpruner": 4}[config]
                assert kept == [min(each, many) for many in shown]
            stays[start:stop] = torch.from_numpy(goes_on)
            if config == "visionzip":
                project = model.model.multi_modal_projector
                of = {key: dict(zip(decision.before, part, strict=True)) for key, part in decision.measured.items()}
                sections: list[list[torch.Tensor]] = [[], [], [], []]
                in_place: dict[int, torch.Tensor] = {}
                for one in range(count):
                    places = [start + row for row in (crop == one).nonzero()[:, 0].tolist()]
                    state = dict(
                        zip(places, states[first_crop + one, has_class + patch[crop == one] % 16], strict=True)
                    )
                    keeping = [place for place in places if of["dominant"][place]]
                    targets, merged = [place for place in places if place in decision.groups], []
                    for target in targets:
                        others = [member for member in decision.groups[target] if member != target]
                        assert set(others) <= set(places) - set(keeping)
                        mean = torch.stack([state[member] for member in others]).mean(0) if others else 0
                        merged.append(project(state[target] + mean))
                    class_row = project(states[first_crop + one, 0])
                    assert len(keeping) == 4 - has_class and len(merged) == 3
                    kept_rows = {place: rows[place] for place in keeping}
                    if not has_class:
                        in_place |= kept_rows | dict(zip(targets, merged, strict=True))
                    elif one == 0:
                        sections[0] += [class_row, *kept_rows.values(), *merged]
                    else:
                        in_place |= kept_rows
                        sections[2].append(class_row)
                        sections[3] += merged
                in_place |= {start + row: newline for row in ends.nonzero()[:, 0].tolist()}
                sections[1] = [in_place[place] for place in sorted(in_place)]
                zipped = torch.stack([row for section in sections for row in section])
                stays[start:stop] = torch.arange(stop - start) < len(zipped)
                made[start : start + len(zipped)] = zipped
            first_crop += count
        shorter = model.generate(inputs_embeds=made[stays][None], max_new_tokens=4, **GREEDY)
        assert pruned.sequences[number, inputs["input_ids"].shape[1] :].tolist() == shorter.sequences[0].tolist()
        logits = [torch.stack(output.logits, dim=1) for output in (pruned, shorter)]
        torch.testing.assert_close(logits[0][number], logits[1][0], atol=1e-4, rtol=0)
        assert trace.rows_per_layer == [int(stays.sum())] * LAYERS


@pytest.mark.parametrize("config", ["vispruner", "scope", "holov"])
@pytest.mark.parametrize("name", ["llava", "llava-next"])
def test_what_the_tower_chose_may_keep_its_positions(name, config) -> None:
    model, inputs = family_model(name), FAMILIES[name].inputs(*BATCH)
    with prune(model, {**TOWER_CONFIGS[config], "positions": "keep"}) as run:
        pruned = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    hidden = [Hidden.from_trace(trace, inputs["input_ids"].shape[1], LAYERS) for trace in run.traces]
    with masks_hide(model, hidden):
        reference = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    assert pruned.sequences.tolist() == reference.sequences.tolist()
    torch.testing.assert_close(torch.stack(pruned.logits), torch.stack(reference.logits), atol=1e-4, rtol=0)
    assert run.traces[0].rows_per_layer[0] < run.traces[0].num_rows


def test_the_class_tokens_attention_to_a_tile_is_that_of_its_own_crop() -> None:
    model, inputs = family_model("llava-next"), FAMILIES["llava-next"].inputs((4, "image", 3, "image", 5))
    with prune(model, {"method": "holov", "keep": 6}) as run:
        model(**inputs)
    eager = CLIPVisionModel(model.config.vision_config)
    eager.load_state_dict(model.model.vision_tower.state_dict())
    eager.set_attn_implementation("eager")
    pixels = torch.cat([image[:count] for image, count in zip(inputs["pixel_values"], (3, 5), strict=True)])
    weights = eager(pixels, output_attentions=True).attentions[-2][:, :, 0, 1:].mean(1)
    packed, _ = model.model.pack_image_features(
        weights[..., None].split([3, 5]), inputs["image_sizes"], "default", torch.zeros(1)
    )
    measured = run.traces[0].decisions[0].measured["attention"]
    torch.testing.assert_close(torch.from_numpy(measured), torch.cat(packed)[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llava", "llava-onevision"])
def test_without_a_class_token_attention_is_what_a_patch_receives(name, monkeypatch) -> None:
    monkeypatch.setattr(tower, "SCORE_CHUNK", 2 * 16 * 5)  # five rows ask at a time
    if name == "llava":  # as LLaVA-Interleave has it
        settings = {**FAMILIES[name].settings, "vision_config": SIGLIP, "vision_feature_layer": -1}
        settings["vision_feature_select_strategy"] = "full"
        model = replace(FAMILIES[name], settings=settings).build()
    else:
        model = family_model(name)
    inputs = FAMILIES[name].inputs((4, "image", 3, "image", 5))
    eager = SiglipVisionModel(model.config.vision_config)
    eager.load_state_dict(model.model.vision_tower.state_dict())
    eager.set_attn_implementation("eager")
    pixels, newline = inputs["pixel_values"], torch.zeros(1)
    if name == "llava-onevision":
        pixels = torch.cat([image[:count] for image, count in zip(pixels, (3, 5), strict=True)])
    received = eager(pixels, output_attentions=True).attentions[-1].mean((1, 2))[..., None]
    if name == "llava-onevision":
        packed, _ = model.model.pack_image_features(received.split([3, 5]), inputs["image_sizes"], newline)
        received = torch.cat(packed)
    for config, factor in (("holov", 1), ("scope", 2), ("vispruner", 1), ("visionzip", 2)):  # of two heads: mean or sum
        with prune(model, TOWER_CONFIGS[config]) as run:
            model(**inputs)
        measured = torch.from_numpy(run.traces[0].decisions[0].measured["attention"])
        torch.testing.assert_close(measured, factor * received.flatten(), atol=1e-6, rtol=0)
        assert run.traces[0].rows_per_layer[0] < run.traces[0].num_rows


@pytest.mark.parametrize("config", [*TOWER_CONFIGS.values(), {"method": "cdpruner", "relevance": "clip"}])
@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("llava")])
def test_families_whose_rows_are_not_a_towers_patches_are_refused_by_name(name, config) -> None:
    model = family_model(name)
    if "relevance" in config:
        config = {**config, "clip": "nowhere", "question": "?"}
    words = f"{config['method']!r} needs .*class token.*SigLIP.*{model.config.model_type!r} model has no .*'divprune'"
    with pytest.raises(UnsupportedModelError, match=words), prune(model, config):
        pass


def test_relevance_by_clip_needs_the_tower_of_clip(monkeypatch) -> None:
    monkeypatch.setattr(cdpruner, "joint_space", lambda folder: None)
    config = {"method": "cdpruner", "relevance": "clip", "clip": "somewhere", "question": "?"}
    with pytest.raises(UnsupportedCallError, match=r"'clip' needs the CLIP tower.* use relevance 'embeddings'"):
        model_with(family_model("llava-onevision"), FAMILIES["llava-onevision"].inputs((4, "image", 3)), config)


def test_an_image_that_is_scaled_down_behind_the_tower_is_refused(monkeypatch) -> None:
    model, inputs = family_model("llava-onevision"), FAMILIES["llava-onevision"].inputs((4, "image", 3))
    monkeypatch.setattr(model.model, "pack_image_features", partial(_halved, model.model.pack_image_features))
    with pytest.raises(UnsupportedCallError, match="not scaled down"):
        model_with(model, inputs, TOWER_CONFIGS["scope"])


def _halved(pack, features, *args, **kwargs):
    packed, lengths = pack(features, *args, **kwargs)
    return [rows * 0.5 for rows in packed], lengths


def test_tiles_that_nobody_can_place_are_refused() -> None:
    model, inputs = family_model("llava-next"), FAMILIES["llava-next"].inputs((4, "image", 3))
    entering = rows_of_images(model, inputs)
    visual = inputs["input_ids"] == model.config.image_token_id
    with (
        pytest.raises(UnsupportedCallError, match=r"0 crops for 1 images.* needs pictures, not rows"),
        prune(model, TOWER_CONFIGS["scope"], visual_mask=visual),
    ):
        model(inputs_embeds=entering)


class Transfers(TorchDispatchMode):
    """Counts what makes the host wait for a device: scalars that are read, and shapes that depend on values."""

    waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in self.waits, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", TOWER_CONFIGS)
def test_nothing_is_read_back_while_choosing(config) -> None:
    layer = family_model("llava").model.vision_tower.encoder.layers[0]
    entering, states = torch.randn(2, 65, 32)
    picture = Picture(layer, torch.nn.Identity(), entering, states)
    rows = torch.randn(64, 16)
    assert picture.attention.shape == (2, 64)
    with Transfers():
        measured = Method.from_any(TOWER_CONFIGS[config]).look(picture, rows)
    assert {part.shape for part in measured.values()} == {(64,)}


def test_what_no_prefill_took_is_not_the_next_prompts_picture() -> None:
    model, inputs = family_model("llava"), FAMILIES["llava"].inputs((4, "image", 3))
    with prune(model, TOWER_CONFIGS["scope"]) as run:
        with pytest.raises(ValueError), model.get_decoder().register_forward_pre_hook(_stop, prepend=True):
            model(**inputs)
        model(**inputs)
    assert len(run.traces[0].kept_positions) == 6


def _stop(*args):
    raise ValueError


def test_overflow_of_a_run_goes_to_others_unless_rows_of_zeros_are_asked_for() -> None:
    case = GoldenCase.load("holov__t288_zero_rows")
    kept = {}
    for overflow in ("zeros", "redistribute"):
        config = {"method": "holov", "keep": 288, "overflow": overflow}
        case.model.generate(**case.inputs(), pruning_config=config, max_new_tokens=1)
        (trace,) = case.model.last_pruning_traces
        kept[overflow] = set(trace.kept_positions)
        assert trace.num_kept == 288
    assert len(kept["zeros"]) == 262 and len(kept["redistribute"]) == 288 and kept["zeros"] < kept["redistribute"]


def test_a_tower_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="'class token' needs a vision tower with a class token"):
        prune(family_model("qwen2-vl"), ByClassToken()).__enter__()
    case = GoldenCase.load("a_pixels_smd_7b")
    rows, visual = case.rows()
    with pytest.raises(UnsupportedCallError, match="0 crops for 1 images"):
        case.model.generate(
            inputs_embeds=rows[None], visual_mask=visual[None], pruning_config=ByClassToken(), max_new_tokens=1
        )


def test_what_was_done_is_said_in_words() -> None:
    model, (rows, visual) = make_model(8), make_prompt("image in the middle")
    said = {}
    for name, config in CONFIGS.items():
        config = {**config, "keep": 6} if name == "random before the decoder" else config
        model(inputs_embeds=rows[None], visual_mask=visual[None], pruning_config=config)
        said[name] = Method.from_any(config).describe(model.last_pruning_traces[0])
    assert said == {
        "fastv": "kept 2 of 24 visual tokens, selected at layer 1",
        "dart": "kept 4 of 24 visual tokens, selected at layer 1",
        "sparsevlm": "kept 5 of 24 visual tokens, selected at layers 1, 2",
        "vtw": "kept 0 of 24 visual tokens from layer 3 on",
        "yopo": "kept 0 of 24 visual tokens from layer 3 on",
        "st3": "kept 5 of 24 visual tokens, selected at layers 1, 3, 5",
        "shortv": "kept all 24 visual tokens, not updated in 3 of 8 layers",
        "vica": "updated none of 24 visual tokens, text reads them in 4 of 8 layers",
        "vica without a list": "updated none of 24 visual tokens, text reads them in 4 of 8 layers",
        "random": "kept 5 of 24 visual tokens, selected at layer 1",
        "random before the decoder": "kept 6 of 24 visual tokens, selected before the decoder",
        "pyramiddrop": "kept 4 of 24 visual tokens, selected at layers 0, 2",
        "divprune": "kept 3 of 24 visual tokens, selected before the decoder",
        "cdpruner": "kept 3 of 24 visual tokens, selected before the decoder",
        "cdpruner without a question": "kept 3 of 24 visual tokens, selected before the decoder",
        "stride": "kept 3 of 24 visual tokens, selected before the decoder",
        "stride in the decoder": "kept 10 of 24 visual tokens, selected at layer 1",
        "chain": "kept 5 of 24 visual tokens, selected before the decoder; then "
        "kept 3 of 5 visual tokens, selected at layer 1; then kept 1 of 3 visual tokens, selected at layer 3",
    }
    assert LEAVE.rows.size == 0


def test_layer_0_cannot_be_frozen_and_a_sink_at_once() -> None:
    model, (rows, visual) = make_model(8), make_prompt("image first")
    shallow = {"mode": ["shallow"], "shallow_mid_layer": 2}
    chain = {"method": "chain", "steps": [shallow, {"method": "shortv", "frozen_layers": [0]}]}
    with pytest.raises(UnsupportedCallError, match="leave layer 0 out of 'frozen_layers'"):
        model(inputs_embeds=rows[None], visual_mask=visual[None], pruning_config=chain)


def test_rows_that_sit_a_layer_out_have_no_place_in_its_cache() -> None:
    model, (rows, visual) = make_model(2), make_prompt("three images with text between")
    vica, last = {"method": "vica", "layers": [0, 1, 3, 6]}, {"method": "yopo", "last": 3}
    first = {"method": "divprune", "keep": 3}

    def run(config, rows, visual):
        options = {"pruning_config": config, "max_new_tokens": 5, **GREEDY}
        output = model.generate(inputs_embeds=rows[None], visual_mask=visual[None], **options)
        return output, model.last_pruning_traces[0]

    output, trace = run({"method": "chain", "steps": [first, vica, last]}, rows, visual)
    text, three = int((~visual).sum()), 3 * len(trace.image_spans)
    expected = [text + three * (layer in (0, 1, 3)) for layer in range(8)]
    assert trace.rows_per_layer == expected and trace.updated_rows_per_layer == [text] * 8
    assert trace.visual_rows_read == [rows - text for rows in expected]
    assert [layer.get_seq_length() for layer in output.past_key_values.layers] == [rows + 4 for rows in expected]
    # Rows were numbered anew before: decoded tokens go on where the shorter prompt's would.
    left = ~visual
    left[run(first, rows, visual)[1].kept_positions] = True
    shorter, _ = run({"method": "chain", "steps": [vica, last]}, rows[left], visual[left])
    assert output.sequences.tolist() == shorter.sequences.tolist()
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(shorter.logits), atol=1e-4, rtol=0)


def test_yopo_is_vtw_counted_from_the_end_and_st3_takes_equal_steps() -> None:
    model, (rows, visual) = make_model(8), make_prompt("image in the middle")
    logits = [
        model(inputs_embeds=rows[None], visual_mask=visual[None], pruning_config=config).logits
        for config in ({"method": "yopo"}, {"method": "yopo", "last": 2}, {"method": "vtw", "layer": 6})
    ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    model(inputs_embeds=rows[None], visual_mask=visual[None], pruning_config={"method": "st3", "keep": 3})
    assert model.last_pruning_traces[0].rows_per_layer == [len(rows) - 3 * layer for layer in range(8)]
    assert methods.ViCA().reading_layers(32) == {0, 1, 7, 8, 9, 10, 11, 14}
    assert methods.ViCA().reading_layers(12) == {0, 2, 3, 4, 5}
