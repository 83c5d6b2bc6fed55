"""A vision-language model of transformers, as it is, inside a `prune` block.

    python examples/transformers_model.py

So that nothing is downloaded, the model is tiny and random, and so are its ids. With a real one, `model` comes from
`AutoModelForImageTextToText.from_pretrained(name)` and `inputs` from its processor; the last lines stay the same.
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava.pruning import PruningConfig, prune

torch.manual_seed(0)
IMAGE = 99  # the id of a visual placeholder
tower = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56
)
decoder = LlamaConfig(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, pad_token_id=0
)
model = LlavaForConditionalGeneration(
    LlavaConfig(vision_config=tower, text_config=decoder, image_token_id=IMAGE)
).eval()
patches = (56 // tower.patch_size) ** 2
ids = torch.tensor([[1, *[IMAGE] * patches, 5, 6, 7]])
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.rand(1, 3, 56, 56)}

# Random weights turn no attention output by a threshold's measure, so here a method with a given number of tokens.
# For a trained model: PruningConfig.for_model(model).
config = PruningConfig.from_any({"method": "fastv", "layer": 2, "keep": 4})
with prune(model, config) as run:
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
trace = run.traces[0]
print("rows in each layer:", trace.rows_per_layer)
print("kept:", trace.kept_positions)
print("new tokens:", output[0, ids.shape[1] :].tolist())
