"""Several questions about several pictures in one padded batch: each prompt decides on its own.

python examples/batch.py
"""

from llava.constants import SHIPPED_MODEL_PATH
from llava.inference import GenerationOptions, LoadedModel, Turn, open_checkpoint

IMAGES = SHIPPED_MODEL_PATH.parent / "images"
ASKED = [
    ("scene_0.png", "Is the cross left or right of the circle?"),
    ("scene_1.png", "Is the gray shape small or large?"),
    ("scene_2.png", "How many shapes are there?"),
    ("easy_red_triangle.png", "What is the color of the triangle?"),
]

checkpoint = open_checkpoint(SHIPPED_MODEL_PATH)
prompts = [checkpoint.encode([Turn(text, [checkpoint.read_picture(IMAGES / name)])]) for name, text in ASKED]
model = LoadedModel(checkpoint)
answers = model.answer_batch(prompts, checkpoint.pruning_config(), GenerationOptions(max_new_tokens=16))
for (name, text), answer in zip(ASKED, answers, strict=True):
    print(f"{name}: {text} {answer.text} ({answer.kept} of {answer.visual_tokens} visual tokens kept)")
