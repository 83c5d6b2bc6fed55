# %% [markdown]
# # Write your own method
#
# The engine keeps text rows, positions, masks and the cache right; a method only says which visual rows go on, and
# behind which layer. Here is one, in a cell, run against VisiPruner (*VisiPruner: Decoding Discontinuous Cross-Modal
# Dynamics for Efficient Multimodal LLMs* (arXiv 2510.17205)) and against FastV's rule (arXiv 2403.06764).
#
# **The idea tried here**: like VisiPruner, wait for the layer at which the image is read; then keep the rows that
# together hold a given part of all shares' length, instead of those above a fixed norm.
#
# **What to look for**: whether it answers as the dense model does, and what it saves. A handful of questions is an
# example and no benchmark: `llava/eval` has those.
#
# The figures below come from the small model that ships with this project. It shows the tools at work; the paper's
# claims are about LLaVA-1.5. Change the parameter cell to look at that model on a GPU.

# %% tags=["parameters"]
from llava.constants import SHIPPED_MODEL_PATH

MODEL = SHIPPED_MODEL_PATH  # or a folder or hub id, such as "liuhaotian/llava-v1.5-7b"
PICTURE = SHIPPED_MODEL_PATH.parent / "images" / "easy_blue_circle.png"  # or your own path or URL
QUESTION = "What color is the shape?"
CONFIG = None  # a pruning config; None: the one recommended for the model

# %%
# %matplotlib inline
import warnings

import numpy as np

warnings.filterwarnings("ignore", message="IProgress")  # a progress bar's, where Jupyter's widgets are not installed

from llava.inference import LoadedModel, open_checkpoint
from llava.visualize import *
from llava.visualize.draw import *

chat = LoadedModel(open_checkpoint(MODEL))
config = chat.checkpoint.pruning_config(CONFIG)

# %%
from dataclasses import dataclass

from llava.pruning import Keep, Method, methods, register


@register("share_of_shares")  # now JSON can name it: {"method": "share_of_shares", "part": 0.5}
@dataclass(frozen=True)
class ShareOfShares(Method):
    """Keep the visual rows with the longest shares until they hold `part` of the length of all shares."""

    first_layer: int = 4
    threshold: float = 0.995
    part: float = 0.5

    def looks_behind(self, num_layers):
        return range(self.first_layer + 1, num_layers)

    def measure(self, view):
        return None if view.trace.decisions else view.shares()

    def decide(self, layer, measured, trace):
        if measured is None or measured["cosine"].min() >= self.threshold:
            return None
        order = np.argsort(-measured["norm"])
        held = np.cumsum(measured["norm"][order]) / measured["norm"].sum()
        return Keep(np.sort(order[: int(np.searchsorted(held, self.part)) + 1]))


# %%
configs = {
    "VisiPruner": config,
    "share of shares": {"method": "share_of_shares"},
    "FastV, 16 kept": methods.FastV(layer=3, keep=16),
}
dense = observe(chat, PICTURE, QUESTION)
runs = {name: observe(chat, PICTURE, QUESTION, how) for name, how in configs.items()}
print("dense:", dense.answer)
for name, run in runs.items():
    print(f"{name}: {run.answer} | selected at layer {run.trace.select_layer}, kept {int(run.kept.sum())}")

# %%
draw_savings({name: run.savings for name, run in runs.items()}, "FLOPs saved, by every convention")

# %%
maps = np.stack([run.kept.astype(float) for run in runs.values()])
draw_on_picture(
    dense.picture.image, dense.patches, maps, list(runs), "Visual tokens kept", "kept", columns=3, shared_scale=True
)

# %% [markdown]
# ## More than one question
#
# Does each method answer as the dense model does? The pictures and questions that come with the model.

# %%
import json

folder = SHIPPED_MODEL_PATH.parent / "images"
questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()][::3][:8]
agree = dict.fromkeys(configs, 0)
kept = {name: [] for name in configs}
for each in questions:
    answer = observe(chat, folder / each["image"], each["text"]).answer
    for name, how in configs.items():
        run = observe(chat, folder / each["image"], each["text"], how)
        agree[name] += run.answer == answer
        kept[name].append(int(run.kept.sum()))
for name in configs:
    share = f"{agree[name]} of {len(questions)} answers as dense"
    print(f"{name}: {share}, {np.mean(kept[name]):.1f} visual tokens kept on average")
