"""The shipped model keeps what its card promises, on a sample of its held-out questions, through the public path."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from tiny_llava.measure import Shipped, easy_samples, pruned_figures, rendered_samples

from llava.constants import SHIPPED_MODEL_PATH
from llava.pruning.methods import Random

FOLDER = Path(SHIPPED_MODEL_PATH)
TARGETS = {
    "easy-VQA": 99,
    "attribute": 97,
    "existence": 95,
    "color": 95,
    "count": 92,
    "position": 85,
    "relation": 85,
    "text": 88,
}


@pytest.fixture(scope="module")
def shipped() -> Shipped:
    return Shipped()


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((FOLDER / "pruning_config.json").read_text())


def test_pruning_as_recommended_costs_little_and_saves_much(shipped: Shipped, config: dict) -> None:
    samples = rendered_samples("test", 14) + easy_samples(3)
    dense, pruned = (pruned_figures(shipped, samples, config=way)["accuracy"]["overall"] for way in (None, config))
    assert len(samples) > 120
    assert dense["accuracy"] > 92
    assert pruned["correct"] >= dense["correct"] - 4
    assert pruned_figures(shipped, samples[:20], config=config)["saved"]["executed"] >= 0.3


def test_texts_need_the_tokens_that_the_method_chooses(shipped: Shipped, config: dict) -> None:
    samples = [sample for sample in rendered_samples("test", 40) if sample.task == "text"]
    pruned = pruned_figures(shipped, samples, config=config)
    layer, kept = round(pruned["mean_select_layer"]), round(pruned["mean_kept"])
    random = pruned_figures(shipped, samples, config=Random(kept, layer + 1))
    assert len(samples) >= 30
    assert pruned["accuracy"]["text"]["accuracy"] >= random["accuracy"]["text"]["accuracy"] + 30


def test_the_card_states_what_was_measured() -> None:
    report = json.loads((FOLDER / "accuracy.json").read_text())
    card = (FOLDER / "README.md").read_text()
    for task, least in TARGETS.items():
        figure = report["dense"][task]
        assert figure["accuracy"] >= least
        assert figure["interval95"][0] <= figure["accuracy"] <= figure["interval95"][1]
        assert round(100 * figure["correct"] / figure["n"], 2) == figure["accuracy"]
        assert f"| {task} | {figure['n']} | {figure['accuracy']:.1f} " in card
    assert report["pruning_config"] == json.loads((FOLDER / "pruning_config.json").read_text())
    assert report["cost"]["points_lost"] <= 1
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 10_000_000
