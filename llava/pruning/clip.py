"""CLIP's joint space of text and patches, for methods that ask how much a patch matters to a question."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer

from .errors import PruningConfigError, UnsupportedCallError

WINDOW = 77
"""Tokens that CLIP's text tower reads at once."""


class JointSpace(nn.Module):
    """What a CLIP checkpoint has beyond the tower that LLaVA took from it: the text tower and both projections.

    Args:
        folder: a CLIP checkpoint on this machine, the one that the vision tower came from. Nothing is downloaded.

    Raises:
        PruningConfigError: there is none.
    """

    def __init__(self, folder: str):
        super().__init__()
        if not (Path(folder).expanduser() / "config.json").is_file():
            raise PruningConfigError(
                f"pruning config: 'clip' is {folder!r}; it must be the folder of the CLIP checkpoint that the vision "
                "tower came from, with its tokenizer"
            )
        path = str(Path(folder).expanduser())
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
            whole: Any = CLIPModel.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            raise PruningConfigError(f"pruning config: 'clip' is {folder!r}, which cannot be read: {error}") from error
        self.folder = folder
        self.text_model, self.text_projection = whole.text_model, whole.text_projection
        self.post_layernorm, self.visual_projection = whole.vision_model.post_layernorm, whole.visual_projection

    def text(self, question: str) -> torch.Tensor:
        """A question's embeddings, float32 `[windows, size]`, one for each window of 77 tokens.

        As published: the whole text has one begin and one end mark, and every window is pooled at its highest id. So
        the first window of a question longer than that is pooled at the begin mark and says nothing of it.
        """
        ids = self.tokenizer(question, truncation=False, verbose=False).input_ids
        windows = torch.zeros(-(-len(ids) // WINDOW), WINDOW, dtype=torch.long)
        windows.view(-1)[: len(ids)] = torch.tensor(ids)
        pooled = windows.argmax(dim=1)
        device = self.text_projection.weight.device
        states = self.text_model(windows.to(device)).last_hidden_state
        return self.text_projection(states[torch.arange(len(windows), device=device), pooled.to(device)])

    def relevance(self, states: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """How little a picture's patches look like `question` `[windows, size]`, float32 `[N]`: minus the mean cosine.

        The minus is published: in CLIP, patches of the last layer but one are less like the words for what they show.

        Args:
            states: `[N, width]`, the patches behind the tower's layer that the projector reads.

        Raises:
            UnsupportedCallError: another tower's states.
        """
        if states.shape[1] != self.visual_projection.in_features:
            raise UnsupportedCallError(
                f"the vision tower's states have {states.shape[1]} entries, those of the CLIP checkpoint {self.folder} "
                f"{self.visual_projection.in_features}; give 'clip' the checkpoint that the tower came from"
            )
        patches = self.visual_projection(self.post_layernorm(states.float()))
        return -(normalize(patches, dim=1) @ normalize(question, dim=1).mean(dim=0))

    def flops(self, patches: int, windows: int) -> int:
        """Of `relevance` of so many patches and of `text`, two a multiply-add."""
        config = self.text_model.config
        linear = sum(
            part.in_features * part.out_features for part in self.text_model.modules() if isinstance(part, nn.Linear)
        )
        attention = 2 * config.num_hidden_layers * WINDOW * config.hidden_size  # a token's
        text = windows * (WINDOW * (linear + attention) + self.text_projection.weight.numel())
        return 2 * (text + patches * self.visual_projection.weight.numel())


@lru_cache(maxsize=1)
def joint_space(folder: str) -> JointSpace:
    """The `JointSpace` of a folder; the last one stays in memory."""
    return JointSpace(folder)
