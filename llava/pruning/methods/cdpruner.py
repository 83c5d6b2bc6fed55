"""CDPruner: rows that differ from each other and matter to the question stay (arXiv 2506.10967)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import normalize

from ..clip import joint_space
from ..decisions import BEFORE_DECODER, Keep
from ..errors import PruningConfigError, UnsupportedCallError
from ..knobs import Choice, Count, knob
from ..method import Method, number_of, register
from ..varlen import to_device
from ..view import View

# In units of the first gain: below it, gains are rounding, and what is left is filled up by relevance.
LEAST_GAIN = 1e-6


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(Method):
    """Before the decoder, of each image's projected rows those that greedy inference in a determinantal point process
    takes, whose kernel is cosine similarity weighted by both rows' relevance to the question.

    Where the crops of an image in tiles are known, each is chosen from by itself, and rows that end a line stay; else
    all rows of an image are one pool. Otherwise than published: tiles keep their layout, relevance is spread over each
    image, and no row is chosen twice.

    Attributes:
        keep: tokens an image, of one in known tiles: of each of its crops; or a share of the rows, rounded half to
            even.
        relevance: from 0 to 1. `"none"`: every row matters alike (the paper's ablation).
            `"embeddings"`: a row's mean cosine with the input embeddings of the text behind the first image. `"clip"`
            (published): of its patch and the question in CLIP's joint space, which no LLaVA checkpoint holds.
        clip: for `"clip"`, the folder of the CLIP checkpoint that the vision tower came from.
        question: for `"clip"`, the bare question, without the prompt around it. None: that of each prompt, which the
            programs fill in; a call of `generate` or `prune` needs it.
        spread: over what relevance goes from 0 to 1: `"image"`, or `"prompt"`, all its images, which is as published.
        positions: `"renumber"` (published): the decoder counts the rows that are left from 0. `"keep"`: survivors keep
            their positions.
    """

    keep: int | float = knob(Count(), 64)
    relevance: str = knob(Choice(("none", "embeddings", "clip")), "none")
    clip: str | None = None
    question: str | None = None
    positions: str = knob(Choice(("renumber", "keep")), "renumber")
    spread: str = knob(Choice(("image", "prompt")), "image")

    def __post_init__(self):
        super().__post_init__()
        has_folder = isinstance(self.clip, str) and self.clip != ""
        if self.needs_tower and not (has_folder and (self.question is None or isinstance(self.question, str))):
            raise PruningConfigError(
                "pruning config: 'relevance' is 'clip', which needs 'clip', the folder of the CLIP checkpoint that the "
                "vision tower came from, and 'question', a text where a program does not fill it in; give both, or use "
                "'embeddings' or 'none'"
            )
        if not self.needs_tower and (self.clip, self.question) != (None, None):
            raise PruningConfigError(
                f"pruning config: 'clip' and 'question' go with 'relevance' 'clip', not {self.relevance!r}"
            )

    @property
    def needs_tower(self):  # type: ignore[override]
        return self.relevance == "clip"

    def bind(self, num_layers, model_path):
        if self.needs_tower:
            if not self.question:
                raise PruningConfigError(
                    "pruning config: 'relevance' is 'clip' and 'question' is missing; give the bare question with each "
                    "call (a list of configs, one a prompt), or use 'embeddings' or 'none'"
                )
            joint_space(self.clip)  # refused before work, if at all
        return self

    def for_question(self, question):
        return replace(self, question=question) if self.needs_tower and self.question is None else self

    def looks_behind(self, num_layers):
        return {BEFORE_DECODER}

    def measure(self, view):
        """`relevance`: a row's. `order`: when it was chosen of its crop, from 0; infinity: never. `picture`: the number
        of its crop; -1 on rows that end a line of tiles."""
        rows = view.hidden[view.visual]
        relevance, order, picture = rows.new_ones(3, len(rows), dtype=torch.float32)
        order.fill_(-1), picture.fill_(-1)
        crops = [to_device(torch.from_numpy(crop.rows), torch.int64, rows.device) for crop in view.crops]
        for number, own in enumerate(crops):
            relevance[own] = self.relevance_of(number, rows[own], view)
        images: dict[int, list[torch.Tensor]] = {}
        for crop, own in zip(view.crops, crops, strict=True):
            images.setdefault(crop.image * (self.spread == "image"), []).append(own)
        relevance = self.spread_over(relevance, [torch.cat(own) for own in images.values()])
        for number, own in enumerate(crops):
            order[own] = greedy_map(rows[own], relevance[own], number_of(self.keep, len(own)))
            picture[own] = number
            view.trace.projection_flops += 2 * len(own) ** 2 * rows.shape[1]
        return {"relevance": relevance, "order": order, "picture": picture}

    def decide(self, layer, measured, trace):
        return Keep(measured["order"] < torch.inf) if measured else None

    def spread_over(self, relevance: torch.Tensor, images: list[torch.Tensor]) -> torch.Tensor:
        """Relevance from 0 to 1 over each of `images`, indices of its rows."""
        for own in images if self.relevance != "none" else []:
            relevance[own] = spread(relevance[own])
        return relevance

    def relevance_of(self, number: int, rows: torch.Tensor, view: View) -> torch.Tensor | float:
        """How much each of crop `number`'s `rows` `[n, hidden]` matters to the question, float32 `[n]`."""
        if self.relevance == "none":
            return 1.0
        if self.clip is not None and self.question is not None:
            picture = view.pictures[number]
            if not picture.has_class:
                raise UnsupportedCallError(
                    "relevance 'clip' needs the CLIP tower of its checkpoint; this model's tower is a SigLIP, without "
                    "class token: use relevance 'embeddings' or 'none'"
                )
            space = joint_space(self.clip).to(rows.device)
            question = space.text(self.question)
            view.trace.projection_flops += space.flops(len(rows), len(question))
            return space.relevance(picture.states, question)
        text = view.hidden[view.text[view.rows.visual[0] :]]  # every row before the first visual one is text
        return normalize(rows.float(), dim=1) @ normalize(text.float(), dim=1).mean(0)


def spread(relevance: torch.Tensor) -> torch.Tensor:
    """From about 0 to about 1, as published; 1 for all where all are equal."""
    least, most = relevance.aminmax()
    return torch.where(most > least, (relevance - least + 1e-6) / (most - least), 1.0)


@torch.no_grad()
def greedy_map(rows: torch.Tensor, relevance: torch.Tensor, count: int) -> torch.Tensor:
    """When each of `rows` `[n, hidden]` is chosen by greedy MAP inference (Chen et al. 2018), float32 `[n]`: from 0 on
    for `count` of them, infinity for the others. `relevance` `[n]` is at most about 1. Ties go to the lower row.

    Rows that add nothing any more (their gain is rounding) follow by relevance, so that none is chosen twice.
    """
    unit = normalize(rows.float(), dim=1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    gain = kernel.diagonal().clone()
    enough = LEAST_GAIN * gain.max()
    rest = relevance * enough  # what rows count that have no gain left
    order = torch.full_like(gain, torch.inf)
    explained = gain.new_zeros(count, len(gain))  # what each choice says of every row
    for step in range(count):
        chosen = torch.where(gain > enough, gain, rest).argmax(keepdim=True)
        known = explained.index_select(1, chosen)[:, 0] @ explained
        gained = gain.index_select(0, chosen).clamp_min(enough).sqrt()
        new = torch.div(kernel.index_select(0, chosen)[0] - known, gained, out=explained[step])
        gain = torch.addcmul(gain, new, new, value=-1)
        for spent, value in ((order, step), (gain, -torch.inf), (rest, -torch.inf)):
            spent.index_fill_(0, chosen, value)
    return order
