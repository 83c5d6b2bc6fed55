"""From a checkpoint, questions and pictures to answers: what every program of the project does it through.

`open_checkpoint` (everything but weights) → `Checkpoint.encode` (a `Prompt`) → `LoadedModel.answer` or `answer_batch`
(an `Answer` with text, tokens, trace and clock).
"""

from .answer import Answer, Clock, GenerationOptions
from .checkpoint import (
    Checkpoint,
    LlavaCheckpoint,
    LoadOptions,
    Picture,
    Prompt,
    StockCheckpoint,
    Turn,
    open_checkpoint,
)
from .model import LoadedModel, Responder

__all__ = [
    "Answer",
    "Checkpoint",
    "Clock",
    "GenerationOptions",
    "LlavaCheckpoint",
    "LoadOptions",
    "LoadedModel",
    "Picture",
    "Prompt",
    "Responder",
    "StockCheckpoint",
    "Turn",
    "open_checkpoint",
]
