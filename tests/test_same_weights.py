"""The same weights as an original LLaVA-1.5 checkpoint and as transformers' own class: one method, one result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_reference import GREEDY, thresholds_for
from tiny_checkpoints import VISION, tiny_config, tiny_model, write_hf, write_original
from transformers import LlavaForConditionalGeneration

from llava.constants import IMAGE_TOKEN_INDEX, SHIPPED_MODEL_PATH
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig, prune
from llava.pruning.flops import savings

NEW = 6
SHALLOW_MID_LAYER = 2
MODES = {
    "dense": [],
    "middle and deep": ["middle", "deep"],
    "all": ["shallow", "middle", "deep"],
}


@pytest.fixture(scope="module", params=["llama", "mistral", "shipped"])
def models(request, tmp_path_factory):
    """The checkpoint through `load_pretrained_model`, and its weights through transformers alone."""
    folder = tmp_path_factory.mktemp("same")
    if request.param == "shipped":
        original = SHIPPED_MODEL_PATH
    else:
        tower = {**VISION, "image_size": 56}
        config = tiny_config(request.param == "mistral", num_hidden_layers=8, vision_config=tower)
        original = write_original(
            folder / "llava-original", tiny_model(config, seed=5), vision_config=tower, sliding_window=None
        )
    _, own, _, _ = load_pretrained_model(original, None, f"llava-{request.param}", device="cpu", dtype="float32")
    # One row more in the vocabulary: transformers' class looks its image placeholder up before it is replaced.
    hf = write_hf(folder / "hf", own, extra_vocab=1)
    stock = LlavaForConditionalGeneration.from_pretrained(hf, dtype=torch.float32).eval()
    return own, stock


@pytest.fixture(scope="module")
def prompts(models):
    """Both models' inputs for a left-padded batch: two pictures with text between, one picture, none."""
    own, stock = models
    tower = own.get_vision_tower()
    rows, side = tower.num_patches_per_side**2, tower.image_size
    generator = torch.Generator().manual_seed(3)

    def words(count):
        return torch.randint(5, own.config.vocab_size, (count,), generator=generator).tolist()

    picture = [IMAGE_TOKEN_INDEX]
    texts = [words(5) + picture + words(3) + picture + words(6), words(4) + picture + words(5), words(9)]
    pixels = torch.randn(3, 3, side, side, generator=generator)

    def padded(texts):
        width = max(map(len, texts))
        ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
        return ids, (torch.arange(width) >= width - torch.tensor([[len(text)] for text in texts])).long()

    short, short_mask = padded(texts)
    placeholder = [stock.config.image_token_id] * rows
    long, long_mask = padded([[t for w in text for t in (placeholder if w < 0 else [w])] for text in texts])
    return (
        {"input_ids": short, "attention_mask": short_mask, "images": pixels},
        {"input_ids": long, "attention_mask": long_mask, "pixel_values": pixels},
    )


@pytest.fixture(scope="module")
def config_of(models, prompts):
    """A config for a mode under which the first prompt selects, keeps a part and loses it."""
    _, stock = models
    ids, mask = (prompts[1][key][:1] for key in ("input_ids", "attention_mask"))
    first = {"input_ids": ids, "attention_mask": mask, "pixel_values": prompts[1]["pixel_values"][:2]}

    def config(mode):
        sink = "first" if "shallow" in mode else None
        found = thresholds_for(stock, first, SHALLOW_MID_LAYER, sink) if mode else {}
        return PruningConfig(mode=tuple(mode), shallow_mid_layer=SHALLOW_MID_LAYER, shallow_sink=sink, **found)

    return config


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_both_classes_decide_and_answer_alike(models, prompts, config_of, mode) -> None:
    (own, stock), (own_inputs, stock_inputs) = models, prompts
    config = config_of(mode)
    options = {**GREEDY, "max_new_tokens": NEW, "min_new_tokens": NEW}
    ours = own.generate(**own_inputs, pruning_config=config, **options)
    own_traces = own.last_pruning_traces
    image_id = stock.config.image_token_id
    with prune(stock, config) as run:
        # The placeholder's own row of the vocabulary is no word; the original has none.
        theirs = stock.generate(**stock_inputs, suppress_tokens=[image_id], pad_token_id=0, **options)

    assert ours.sequences.tolist() == theirs.sequences[:, -NEW:].tolist()
    theirs_logits = torch.stack(theirs.logits, dim=1)[..., :image_id]
    torch.testing.assert_close(torch.stack(ours.logits, dim=1), theirs_logits, atol=1e-4, rtol=1e-4)

    assert len(own_traces) == len(run.traces) == 3
    for one, other in zip(own_traces, run.traces, strict=True):
        same, its = one.to_dict(), other.to_dict()
        for key in ("smallest_cosine", "selection_cosine", "selection_norm"):
            left, right = same.pop(key), its.pop(key)
            if isinstance(left, dict):
                assert left.keys() == right.keys()
                left, right = list(left.values()), list(right.values())
            assert (left is None) == (right is None)
            if left is not None:
                np.testing.assert_allclose(left, right, atol=1e-4, rtol=1e-4)
        assert same == its
        assert savings(one, own)["paper"] == savings(other, stock)["paper"]

    first = run.traces[0]
    if "middle" in mode:
        assert 0 < len(first.kept_positions) < first.num_visual
        assert first.exit_layer is not None
    assert len(first.image_spans) == 2 and run.traces[2].num_visual == 0
