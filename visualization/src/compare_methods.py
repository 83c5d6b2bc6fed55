# %% [markdown]
# # One question under twelve methods
#
# Every method keeps other patches, and for another part of the decoder. Here all have the same budget: the average
# number of visual tokens that a layer processes. `llava.eval.budgets` finds the knobs for it; pooling has whole factors
# only, and comes as near as they allow.
#
# **How to read a panel**: a patch in an orange frame stays, a token of its own. Patches merged or averaged into one
# token share a colour and a frame (colours repeat where there are many). The paler a patch, the sooner it left; those
# that never reached the decoder are nearly white. A method that chooses inside the decoder has every patch for some
# layers, and pays with fewer frames. ✓: the answer is that of the unpruned model.
#
# **What to look for**: whose frames lie on the text, and who can read it. Frames on the text are not enough.
#
# One question is an example and no benchmark. This one was taken because choosing matters here: neither random patches
# nor pooled ones can answer it. On `scene_2.png`, random patches are enough.
# [docs/methods.md](../docs/methods.md#on-the-shipped-model) has the same methods on 1,090 questions.
#
# The figures below come from the small model that ships with this project. Change the parameter cell to look at another
# on a GPU.

# %% tags=["parameters"]
from llava.constants import SHIPPED_MODEL_PATH

MODEL = SHIPPED_MODEL_PATH  # or a folder or hub id, such as "liuhaotian/llava-v1.5-7b"
PICTURE = SHIPPED_MODEL_PATH.parent / "images" / "scene_0.png"  # or your own path or URL
QUESTION = "What does the text in the image say?"
ANOTHER_QUESTION = "What is the color of the cross?"
CONFIG = None  # VisiPruner's config, whose tokens_threshold is found anew; None: the one recommended for the model
TOKENS = 64  # visual tokens a layer
METHODS = ["fastv", "dart", "pyramiddrop", "sparsevlm", "visionzip", "scope"]  # beside VisiPruner
METHODS += ["holov", "cdpruner", "divprune", "pool", "random"]

# %%
# %matplotlib inline
import warnings

warnings.filterwarnings("ignore", message="IProgress")  # a progress bar's, where Jupyter's widgets are not installed

from llava.eval.budgets import Budget, method_for, tokens_a_layer, visipruner_for
from llava.inference import GenerationOptions, LoadedModel, Turn, open_checkpoint
from llava.visualize import *
from llava.visualize.draw import *

chat = LoadedModel(open_checkpoint(MODEL))
picture = chat.checkpoint.read_picture(PICTURE)

options = GenerationOptions(max_new_tokens=32)


# %%
def compare(question):
    prompt = chat.checkpoint.encode([Turn(question, [picture])])
    budget = Budget(TOKENS, prompt.num_visual, chat.checkpoint.num_layers)
    own = chat.checkpoint.pruning_config(CONFIG)
    configs = {"visipruner": visipruner_for(TOKENS, own, lambda config: [chat.answer(prompt, config, options)])}
    configs |= {name: method_for(name, budget) for name in METHODS}

    dense, stays = chat.answer(prompt, None, options).text, {}
    for name, config in configs.items():
        answer = chat.answer(prompt, config, options)
        mark, tokens = "✓" if answer.text == dense else "✗", tokens_a_layer(answer)
        stays[f"{name} {mark}\n“{answer.text}”\n{tokens:.0f} tokens a layer"] = stay_of(answer.trace)
    (patches,) = patch_maps(chat.checkpoint, prompt)
    title = f"{question}  Without pruning: “{dense}”, {prompt.num_visual} tokens a layer"
    return draw_stays(picture.image, patches, stays, title)


compare(QUESTION)

# %% [markdown]
# ## Another question about the same picture
#
# Methods that choose before the decoder keep the very same patches, whatever is asked (CDPruner too: with its published
# relevance, from CLIP's text tower, it would not). Those inside the decoder follow the question.

# %%
compare(ANOTHER_QUESTION)
