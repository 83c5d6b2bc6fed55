"""One picture, one question, dense and pruned: what is said, what is kept, what is saved.

python examples/one_picture.py
"""

from llava.constants import SHIPPED_MODEL_PATH
from llava.inference import LoadedModel, Turn, open_checkpoint

checkpoint = open_checkpoint(SHIPPED_MODEL_PATH)  # or a folder or hub id, such as "liuhaotian/llava-v1.5-7b"
picture = checkpoint.read_picture(SHIPPED_MODEL_PATH.parent / "images" / "scene_2.png")
prompt = checkpoint.encode([Turn("What does the text in the image say?", [picture])])
model = LoadedModel(checkpoint)

dense = model.answer(prompt)
pruned = model.answer(prompt, checkpoint.pruning_config())
print(f"dense:  {dense.text}")
print(f"pruned: {pruned.text}, from {pruned.kept} of {pruned.visual_tokens} visual tokens behind layer "
      f"{pruned.trace.select_layer}; {pruned.flops_saved['executed']:.0%} of the prefill's FLOPs saved")  # fmt: skip
