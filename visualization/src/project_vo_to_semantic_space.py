# %% [markdown]
# # Value vectors as words: the value–output lens
#
# What attention moves from one row to another are value vectors, sent through the output projection. Projected to the
# vocabulary (output projection → final norm → `lm_head`) they show *what* is moved, head by head.
#
# **What the paper says** (*VisiPruner: Decoding Discontinuous Cross-Modal Dynamics for Efficient Multimodal LLMs*
# (arXiv 2510.17205)): a handful of visual tokens carry the answer, and they are read in a few middle layers.
#
# **What to look for**: the layers in which what the last row reads from the image spells the answer.
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
dense = observe(chat, PICTURE, QUESTION)
dense.answer

# %% [markdown]
# ## What the last row reads from the image
#
# The weighted values of all visual rows, summed over heads.

# %%
from_image = value_output_lens(chat.model, chat.tokenizer, dense.last.image_output)
layers = [f"layer {n}" for n in range(dense.recording.num_layers)]
draw_top_tokens(from_image, "Value–output lens, what the last row reads from the image", layers)

# %% [markdown]
# ## Head by head
#
# In the layer where one visual token matters most (the smallest cosine of the probe).

# %%
layer = int(np.nanargmin(smallest_cosines(dense.last)))
heads = value_output_lens(chat.model, chat.tokenizer, dense.last.image_output, per_head=True)
names = [f"head {n}" for n in range(heads.ids.shape[1])]
draw_top_tokens(
    TopTokens(*(part[layer] for part in heads)), f"What each head reads from the image, layer {layer}", names
)

# %% [markdown]
# ## What one visual row offers
#
# Its value vectors by themselves, whoever reads them.

# %%
patch = int(np.nanargmax(dense.last.norm[layer]))
position = int(dense.recording.visual_positions[patch])
seen = observe(chat, PICTURE, QUESTION, rows=[position])
offered = value_output_lens(chat.model, chat.tokenizer, seen.recording.row(position).values)
draw_top_tokens(offered, f"Value–output lens, visual row of patch {patch}", layers)
