"""`PruningConfig`: one clear error that names key, value and range, before any work."""

from __future__ import annotations

import json

import pytest

from llava.pruning import PruningConfig, PruningConfigError

PUBLISHED = {
    "mode": ["shallow", "middle", "deep"],
    "shallow_mid_layer": 6,
    "layer_threshold": 0.995,
    "tokens_threshold": 0.2,
}


def test_the_published_config_reads_and_writes_back() -> None:
    config = PruningConfig.from_any(json.dumps(PUBLISHED))
    assert config.to_dict() == PUBLISHED | {"exit_threshold": 0.999, "exit_patience": 2}
    assert PruningConfig.from_any(config.to_dict()) == config
    assert PruningConfig.from_any(None) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "middle"}, ["mode", "'middle'"]),
        ({"mode": ["middel"]}, ["mode", "middel"]),
        ({"mode": None}, ["mode"]),
        ({"mode": [["deep"]]}, ["mode"]),
        ({"shallow_mid_layer": 0}, ["shallow_mid_layer", "0"]),
        ({"shallow_mid_layer": 6.0}, ["shallow_mid_layer", "6.0"]),
        ({"shallow_mid_layer": True}, ["shallow_mid_layer", "True"]),
        ({"shallow_mid_layer": None}, ["shallow_mid_layer", "missing"]),
        ({"layer_threshold": 1.0}, ["layer_threshold", "1.0", "between 0 and 1"]),
        ({"layer_threshold": 0}, ["layer_threshold", "0"]),
        ({"layer_threshold": "0.9"}, ["layer_threshold", "'0.9'"]),
        ({"layer_threshold": float("nan")}, ["layer_threshold", "nan"]),
        ({"probe_rows": "all"}, ["probe_rows", "'all'", "last", "text"]),
        ({"relative": "yes"}, ["relative", "'yes'"]),
        ({"keep": 10}, ["'keep' (10) and 'tokens_threshold' (0.2)", "leave one out"]),
        ({"keep": 1.5, "tokens_threshold": None}, ["'keep' is 1.5", "between 0 and 1"]),
        ({"tokens_threshold": 0}, ["tokens_threshold", "0"]),
        ({"tokens_threshold": -0.2}, ["tokens_threshold", "-0.2"]),
        ({"tokens_threshold": float("inf")}, ["tokens_threshold", "inf"]),
        ({"tokens_threshold": 10**400}, ["tokens_threshold", "1000"]),
        ({"exit_threshold": 1.5}, ["exit_threshold", "1.5"]),
        ({"exit_threshold": None}, ["exit_threshold", "None"]),
        ({"exit_patience": 0}, ["exit_patience", "0"]),
        ({"exit_patience": 1.0}, ["exit_patience", "1.0"]),
        ({"shallow_sink": "last"}, ["shallow_sink", "last", "half"]),
        ({"mid_deep_layer": 0}, ["mid_deep_layer", "0"]),
        ({"layer_treshold": 0.9}, ["layer_treshold", "layer_threshold"]),
    ],
)
def test_a_wrong_key_is_named_with_its_value(change, words) -> None:
    with pytest.raises(PruningConfigError) as caught:
        PruningConfig.from_any(PUBLISHED | change)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"mode": ["shallow"]}, "shallow_mid_layer"),
        ({"mode": ["middle"], "shallow_mid_layer": 2, "layer_threshold": 0.9}, "tokens_threshold"),
        ({"mode": ["middle"], "shallow_mid_layer": 2, "tokens_threshold": 1}, "layer_threshold"),
        ({"mode": ["deep"]}, "mid_deep_layer"),
        ({}, "mode"),
    ],
)
def test_a_missing_key_is_named(config, missing) -> None:
    with pytest.raises(PruningConfigError, match=f"'{missing}'.*missing|'{missing}' missing"):
        PruningConfig.from_any(config)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "3", "null", '"mode"', "{'mode': []}", "[" * 100_000, '{"exit_patience": %s}' % ("1" * 5000)],
    ids=lambda text: text[:12],
)
def test_malformed_json_is_one_error(text) -> None:
    with pytest.raises(PruningConfigError, match="pruning config") as caught:
        PruningConfig.from_any(text)
    assert len(str(caught.value)) < 300


def test_files_are_read_and_named_in_errors(tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLISHED))
    assert PruningConfig.from_any(f"@{file}") == PruningConfig.from_any(PUBLISHED)
    file.write_text("{")
    with pytest.raises(PruningConfigError, match=r"config\.json"):
        PruningConfig.from_any(f"@{file}")
    with pytest.raises(PruningConfigError, match=r"absent\.json"):
        PruningConfig.from_any(f"@{tmp_path / 'absent.json'}")
    with pytest.raises(PruningConfigError):
        PruningConfig.from_any(f"@{tmp_path}")


@pytest.mark.parametrize("key", ["shallow_mid_layer", "mid_deep_layer"])
def test_layers_are_checked_against_the_model(key) -> None:
    config = {"mode": ["shallow", "deep"], "shallow_mid_layer": 2, "mid_deep_layer": 5} | {key: 12}
    if key == "shallow_mid_layer":
        config["mid_deep_layer"] = 13
    checked = PruningConfig.from_any(config)
    assert checked.validate_for(14) is checked
    with pytest.raises(PruningConfigError, match=f"{key}.*12.*1 to 11"):
        checked.validate_for(12)


def test_stages_may_not_overlap() -> None:
    with pytest.raises(PruningConfigError, match="mid_deep_layer"):
        PruningConfig.from_any({"mode": ["shallow", "deep"], "shallow_mid_layer": 6, "mid_deep_layer": 5})


def test_the_published_key_without_effect_is_accepted_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="mid_deep_layer") as caught:
        PruningConfig.from_any(PUBLISHED | {"mid_deep_layer": 24})
    assert len(caught) == 1


def test_knobs_beyond_the_paper_are_written_where_they_are_set() -> None:
    ours = {"probe_rows": "text", "relative": True, "keep": 10}
    config = PruningConfig.from_any({key: PUBLISHED[key] for key in PUBLISHED if key != "tokens_threshold"} | ours)
    assert ours.items() <= config.to_dict().items() and "tokens_threshold" not in config.to_dict()
    assert PruningConfig.from_any(json.dumps(config.to_dict())) == config
    assert not ours.keys() & PruningConfig.from_any(PUBLISHED | {"probe_rows": "last"}).to_dict().keys()


def test_whole_numbers_are_numbers() -> None:
    assert PruningConfig.from_any(PUBLISHED | {"tokens_threshold": 1}).tokens_threshold == 1


@pytest.mark.parametrize(
    ("path", "layers", "sink"),
    [
        ("liuhaotian/llava-v1.5-7b", 32, "first"),
        ("liuhaotian/llava-v1.5-13b", 40, "half"),
        ("models/13b/llava-7b-13b/", 32, "first"),
        ("models/7b/llava-13b", 32, "half"),
        ("checkpoints\\LLaVA-13B", 32, "half"),
        ("models-7b/tiny", 12, "first"),
        ("models-7b/tiny", 40, "half"),
        (None, 32, "first"),
        ("", 48, "half"),
    ],
)
def test_the_rule_for_layer_0_follows_the_published_names_then_the_depth(path, layers, sink) -> None:
    assert PruningConfig.from_any(PUBLISHED).sink_for(path, layers) == sink
    for asked in ("first", "half"):
        assert PruningConfig.from_any(PUBLISHED | {"shallow_sink": asked}).sink_for(path, layers) == asked
