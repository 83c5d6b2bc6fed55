"""Seeing what a model does with a picture: recorded runs, lenses on them, drawings, and a report page.

`observe` asks a question and records the rows of interest; the lenses (`logit_lens`, `value_output_lens`,
`attention_to_image`, …) turn the record into arrays; `llava.visualize.draw` (extra `viz`) draws arrays.
"""

from .lenses import (
    Shares,
    TopTokens,
    attention_shares,
    attention_to_image,
    logit_lens,
    project,
    readable,
    smallest_cosines,
    through_output_projection,
    token_probabilities,
    top_tokens,
    value_norms,
    value_output_lens,
)
from .observe import Observation, observe
from .patches import PatchMap, Stay, patch_map, patch_maps, stay_of
from .record import Recording, RowRecord, record

__all__ = [
    "Observation",
    "PatchMap",
    "Recording",
    "RowRecord",
    "Shares",
    "Stay",
    "TopTokens",
    "attention_shares",
    "attention_to_image",
    "logit_lens",
    "observe",
    "patch_map",
    "patch_maps",
    "project",
    "readable",
    "record",
    "smallest_cosines",
    "stay_of",
    "through_output_projection",
    "token_probabilities",
    "top_tokens",
    "value_norms",
    "value_output_lens",
]
