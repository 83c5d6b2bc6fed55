# %% [markdown]
# # One question under twelve methods
#
# Every method keeps other patches, and keeps them for another part of the decoder. Here all have the same budget: the
# average number of visual tokens that a layer processes (pooling has whole factors only and comes as near as it can).
# `llava.eval.budgets` finds each method's knobs for it.
#
# **How to read a panel**: an orange frame is a patch that stays, a token of its own. Patches in one colour are one token
# together (merged or averaged). The paler a patch, the sooner it left; white ones never reached the decoder. So a
# method that chooses inside the decoder sees all patches for some layers and pays with fewer frames.
#
# **What to look for**: who still has the text, and who can still read it. Having the patches is not enough: the text may
# be read in layers that come before, or a patch may be left out that told where the letter ends.
#
# One question is an example and no benchmark: [docs/methods.md](../docs/methods.md#on-the-shipped-model) has the same
# methods on 1,090 questions. The figures come from the small model that ships with this project; change the parameter
# cell to look at another on a GPU.

# %% tags=["parameters"]
from llava.constants import SHIPPED_MODEL_PATH

MODEL = SHIPPED_MODEL_PATH  # or a folder or hub id, such as "liuhaotian/llava-v1.5-7b"
PICTURE = SHIPPED_MODEL_PATH.parent / "images" / "scene_0.png"  # or your own path or URL
QUESTION = "What does the text in the image say?"
ANOTHER_QUESTION = "What is the color of the cross?"
CONFIG = None  # VisiPruner's config, whose tokens_threshold is found anew; None: the one recommended for the model
TOKENS = 64  # visual tokens a layer
METHODS = ["fastv", "dart", "pyramiddrop", "sparsevlm", "visionzip", "scope", "holov", "cdpruner", "divprune", "pool", "random"]

# %%
# %matplotlib inline
import warnings

warnings.filterwarnings("ignore", message="IProgress")  # a progress bar's, where Jupyter's widgets are not installed

from llava.eval.budgets import Budget, method_for, tokens_a_layer, visipruner_for
from llava.inference import LoadedModel, Turn, open_checkpoint
from llava.visualize import *
from llava.visualize.draw import *

chat = LoadedModel(open_checkpoint(MODEL))
picture = chat.checkpoint.read_picture(PICTURE)

# %%
def compare(question):
    prompt = chat.checkpoint.encode([Turn(question, [picture])])
    budget = Budget(TOKENS, prompt.num_visual, chat.checkpoint.num_layers)
    own = chat.checkpoint.pruning_config(CONFIG)
    configs = {"visipruner": visipruner_for(TOKENS, own, lambda config: [chat.answer(prompt, config)])}
    configs |= {name: method_for(name, budget) for name in METHODS}

    answers = {name: chat.answer(prompt, config) for name, config in configs.items()}
    names = [f"{name}\n“{answer.text}”\n{tokens_a_layer(answer):.0f} tokens a layer" for name, answer in answers.items()]
    stays = dict(zip(names, (stay_of(answer.trace) for answer in answers.values())))
    dense = chat.answer(prompt).text
    (patches,) = patch_maps(chat.checkpoint, prompt)
    return draw_stays(picture.image, patches, stays, f"{question} – without pruning: “{dense}”, {prompt.num_visual} tokens a layer")


compare(QUESTION)

# %% [markdown]
# ## Another question about the same picture
#
# Methods that choose before the decoder by what the vision tower saw keep the very same patches, whatever is asked.

# %%
compare(ANOTHER_QUESTION)
