"""Names and ids that LLaVA checkpoints, prompts and scripts agree on."""

from pathlib import Path

IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200
"""The id that stands for one image in tokenised prompts; it is no row of any embedding table."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"

ANSWER_INSTRUCTION = "Answer the question using a single word or phrase."
"""What LLaVA's question files put behind a question that wants a short answer."""

SHIPPED_MODEL_PATH = Path(__file__).parent / "assets" / "tiny_llava"
"""The small model that comes with the package, in the original LLaVA layout."""

SMALL_MODEL = 100_000_000
"""Parameters below which a prefill's time goes into starting each operation: the clock tells little there."""

API_KEY_VARIABLE = "VISIPRUNER_API_KEY"
"""Environment variable with the key that the web chat sends to a server (`llava.serve.gradio_pruning --server`)."""

SHIPPED_MODELS = {"smollm2": SHIPPED_MODEL_PATH.parent / "llava-smollm2-135m"}
"""Models that come with the package under a name that every ``--model-path`` takes (``docs/smollm2.md``)."""
