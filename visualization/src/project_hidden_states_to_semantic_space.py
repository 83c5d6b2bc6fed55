# %% [markdown]
# # Hidden states as words: the logit lens
#
# After every layer, the hidden state of one row goes through the final norm and `lm_head`, as if that layer were the
# last. What comes out is a distribution over words.
#
# **What the paper says** (*VisiPruner: Decoding Discontinuous Cross-Modal Dynamics for Efficient Multimodal LLMs*
# (arXiv 2510.17205)): shallow layers recognise the task, so words of the *kind* of answer appear first; the image's
# own answer appears abruptly in a few middle layers; deep layers polish.
#
# **What to look for**: the layer at which the answer overtakes its rivals, and whether pruning changes it.
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
# ## The last row of the prompt
#
# The answer's first token is read from this row. Its last line is the model's own next-token distribution.
# (transformers' `hidden_states` hold L + 1 entries and the last one is normed already; norming it again, or taking
# entry L − 1 for the last, shows another distribution. The recorder takes every state before the norm.)

# %%
lens = logit_lens(chat.model, chat.tokenizer, dense.last)
draw_top_tokens(lens, f"Logit lens, last row of “{QUESTION}”")

# %%
rivals = lens.ids[-1, :4]
draw_token_probabilities(
    token_probabilities(chat.model, dense.last, rivals), lens.texts[-1, :4], "When the answer appears (dense run)"
)

# %% [markdown]
# ## The same with visual tokens pruned
#
# If only the tokens that matter were kept, the curves end where they did before.

# %%
pruned = observe(chat, PICTURE, QUESTION, config)
print(pruned.answer, "| selected at layer", pruned.trace.select_layer, "| kept", int(pruned.kept.sum()))
draw_token_probabilities(
    token_probabilities(chat.model, pruned.last, rivals), lens.texts[-1, :4], "When the answer appears (pruned run)"
)

# %% [markdown]
# ## A visual row
#
# The patch whose share in the last row's output is longest at the selecting layer. Visual rows are trained to be
# read, not to speak; words that fit the picture are a sign of what they carry.

# %%
layer = pruned.trace.select_layer or int(np.nanargmin(smallest_cosines(dense.last)))
patch = int(np.nanargmax(dense.last.norm[layer]))
position = int(dense.recording.visual_positions[patch])
seen = observe(chat, PICTURE, QUESTION, rows=[position])
draw_top_tokens(
    logit_lens(chat.model, chat.tokenizer, seen.recording.row(position)), f"Logit lens, visual row of patch {patch}"
)
