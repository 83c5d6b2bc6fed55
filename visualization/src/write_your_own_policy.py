# %% [markdown]
# # Write your own policy
#
# The engine keeps text rows, positions, masks and the cache right; a policy only says which visual rows survive, and
# after which layer. Here is one, in a cell, run against VisiPruner (*VisiPruner: Decoding Discontinuous Cross-Modal
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

from llava.serve.chat import ChatModel, Checkpoint
from llava.visualize import *
from llava.visualize.draw import *

chat = ChatModel(Checkpoint(MODEL))
config = chat.checkpoint.pruning_config(CONFIG)

# %%
from llava.pruning import Cause, Decision, Policy
from llava.pruning.baselines import keep_at_layer


class ShareOfShares(Policy):
    """Keep the visual rows with the longest shares until they hold `part` of the length of all shares."""

    def __init__(self, prompt, first_layer=4, threshold=0.995, part=0.5):
        self.first_layer, self.threshold, self.part = first_layer, threshold, part
        self.selected = False

    def needs_probe(self, layer):
        return layer > self.first_layer and not self.selected

    def decide(self, layer, num_visual, probe):
        if probe is None or probe.cosine.min() >= self.threshold:
            return None
        self.selected = True
        order = np.argsort(-probe.norm)
        held = np.cumsum(probe.norm[order]) / probe.norm.sum()
        keep = np.zeros(num_visual, dtype=bool)
        keep[order[: int(np.searchsorted(held, self.part)) + 1]] = True
        return Decision(keep, Cause.SELECTION)


# %%
methods = {
    "VisiPruner": {"config": config},
    "share of shares": {"policy": ShareOfShares},
    "FastV, 16 kept": {"policy": keep_at_layer(2, 16)},
}
dense = observe(chat, PICTURE, QUESTION)
runs = {name: observe(chat, PICTURE, QUESTION, **how) for name, how in methods.items()}
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
agree = dict.fromkeys(methods, 0)
kept = {name: [] for name in methods}
for each in questions:
    answer = observe(chat, folder / each["image"], each["text"]).answer
    for name, how in methods.items():
        run = observe(chat, folder / each["image"], each["text"], **how)
        agree[name] += run.answer == answer
        kept[name].append(int(run.kept.sum()))
for name in methods:
    share = f"{agree[name]} of {len(questions)} answers as dense"
    print(f"{name}: {share}, {np.mean(kept[name]):.1f} visual tokens kept on average")
