# %% [markdown]
# # Sinks: the L1 norm of the value vectors
#
# A row can draw much attention and give nothing: if its value vectors are short, what is moved is short too.
#
# **What the paper says** (*VisiPruner: Decoding Discontinuous Cross-Modal Dynamics for Efficient Multimodal LLMs*
# (arXiv 2510.17205)): in shallow layers visual tokens serve as passive attention sinks: much attention, small values.
#
# **What to look for**: an orange line below the blue band in the first figure (most attended, shortest values), and
# points far to the right and low in the second. Whether the shipped model has sinks is for the figures to say.
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
norms = value_norms(dense.recording)
attention = attention_to_image(dense.recording, dense.last)
dense.answer

# %%
draw_norms_per_layer(norms, attention, "L1 norm of visual rows' values, layer by layer")

# %% [markdown]
# ## One layer, row by row
#
# A shallow layer, and the layer where one visual token matters most.

# %%
shallow, layer = 1, int(np.nanargmin(smallest_cosines(dense.last)))
draw_sinks(norms[shallow], attention[shallow], shallow, f"Attention and value norm, layer {shallow}")

# %%
draw_sinks(norms[layer], attention[layer], layer, f"Attention and value norm, layer {layer}")

# %% [markdown]
# ## On the picture
#
# Attention, value norm, and the probe's measure that multiplies the two: the length of each row's share in the last
# row's output, which is what `tokens_threshold` is held against.

# %%
maps = np.stack([attention[layer], norms[layer], dense.last.norm[layer]])
draw_on_picture(
    dense.picture.image,
    dense.patches,
    maps,
    ["attention", "L1 norm of values", "share's length"],
    f"Looked at, and giving something, layer {layer}",
    "value",
    columns=3,
)
