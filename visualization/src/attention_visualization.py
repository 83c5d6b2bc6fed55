# %% [markdown]
# # Attention to the image
#
# Where the prompt's last row looks, layer by layer, over the picture.
#
# **What the paper says** (*VisiPruner: Decoding Discontinuous Cross-Modal Dynamics for Efficient Multimodal LLMs*
# (arXiv 2510.17205)): in shallow layers the image's attention is passive (sinks); then text reads the image abruptly,
# in a few middle layers; deep layers no longer need it.
#
# **What to look for**: layers whose map lies on the object that was asked about. A large share of attention on the
# image is not yet reading it: see `L1_norms_of_value_matrix.ipynb`.
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

# %%
attention = attention_to_image(dense.recording, dense.last)
layers = [f"layer {n}" for n in range(len(attention))]
draw_on_picture(
    dense.picture.image, dense.patches, attention, layers, "Attention of the last row (mean over heads)", "attention"
)

# %% [markdown]
# ## The three stages at a glance
#
# The same attention, added up over prefix (what stands before the image), image, and the text behind it.

# %%
draw_shares(attention_shares(dense.recording, dense.last), "Where the last row's attention goes (dense run)")

# %% [markdown]
# ## Single heads
#
# In the layer where one visual token matters most.

# %%
layer = int(np.nanargmin(smallest_cosines(dense.last)))
heads = range(min(8, dense.last.attention.shape[1]))
maps = np.stack([attention_to_image(dense.recording, dense.last, head)[layer] for head in heads])
draw_on_picture(
    dense.picture.image,
    dense.patches,
    maps,
    [f"head {n}" for n in heads],
    f"Attention of single heads, layer {layer}",
    "attention",
)

# %% [markdown]
# ## What pruning leaves
#
# The cosine that decides where to select, the patches that are kept, and the rows each layer processes.
#
# Kept patches are those whose token turns the last row's output, whatever they show: some lie on plain ground. On this
# picture that does no harm and little good, for the colour of a lone shape is answered from patches drawn at random
# too. Where the choice matters is a text: `visipruner ask --example sign --show` keeps its patches, and as many drawn
# at random miss it.

# %%
pruned = observe(chat, PICTURE, QUESTION, config)
trace = pruned.trace
draw_cosine_curve(
    {"dense run": smallest_cosines(dense.last), "pruned run": smallest_cosines(pruned.last)},
    "How much the visual token that matters most matters",
    {"layer_threshold": config.layer_threshold},
    trace.select_layer,
    trace.exit_layer,
)

# %%
draw_kept(
    pruned.picture.image, pruned.patches, pruned.kept, f"{pruned.kept.sum()} of {trace.num_visual} visual tokens kept"
)

# %%
draw_rows_per_layer(trace.rows_per_layer, trace.num_visual, f"Rows per layer; answer: {pruned.answer}")

# %%
draw_savings({"VisiPruner": pruned.savings}, "FLOPs saved, by every convention")
