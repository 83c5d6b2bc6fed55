"""The load test asks what it says it asks."""

from __future__ import annotations

import json

import pytest

from benchmarks import serving
from benchmarks.shapes import CLIP_TINY, SHAPES
from llava.inference import GenerationOptions, LoadedModel, LoadOptions, Turn

TINY = SHAPES["tiny"]


def test_its_model_sees_a_picture_in_full_and_answers_as_long_as_it_is_asked_to(tmp_path):
    serving.write_checkpoint(tmp_path, TINY, {**CLIP_TINY, "projection_dim": 32})
    checkpoint = serving.RandomCheckpoint(tmp_path)
    model = LoadedModel(checkpoint, LoadOptions("cpu", "float32"))
    from PIL import Image

    prompt = checkpoint.encode([Turn("w100 w101", [checkpoint.read_picture(Image.new("RGB", (40, 30)))])])
    assert prompt.num_visual == (CLIP_TINY["image_size"] // CLIP_TINY["patch_size"]) ** 2
    config = checkpoint.pruning_config(TINY.schedule.method().to_dict())
    answer = model.answer(prompt, config, GenerationOptions(7))
    assert answer.new_tokens == 7 and answer.text.count("w") == 7
    assert answer.kept == TINY.schedule.kept


@pytest.mark.slow
def test_all_variants_in_closed_and_open_loop(tmp_path):
    options = "--shape tiny --device cpu --threads 1 --tiny-tower --tokens 4 --requests 2 --repetitions 1"
    serving.main([*options.split(), "--concurrency", "2", "--rates", "5", "--output", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert set(result["tables"]) == {"closed loop, 2 at a time", "open loop, 5 requests/s"}
    for rows in result["tables"].values():
        assert [row["variant"] for row in rows] == list(serving.variants([2048]))
        assert all(row["requests_per_cpu_s"] > 0 and row["kv_peak_MB"] >= 0 for row in rows)
