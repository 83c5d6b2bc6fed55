"""What a pruning method decides, apart from how it is carried out.

The engine owns what no method may get wrong: text rows are never dropped, survivors keep their positions,
decoding goes on at the unpruned length, decisions fall once, during prefill. A policy answers two questions
for one prompt: what may text rows read in this layer, and which visual rows survive after it. VisiPruner is
one policy; `llava/pruning/baselines.py` has others, and another method is one more small class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from .config import PruningConfig
from .probe import Probe


class Reading(Enum):
    """What the rows of a prompt may read of the image in one layer, during prefill.

    Attention weights are set to zero after the softmax and not renormalised: the mass that went to the image
    is lost (paper, shallow stage).
    """

    ALL = "all"
    """Ordinary causal attention."""
    NO_IMAGE = "no image"
    """Text rows put weight 0 on every visual row. Visual rows and the prefix are untouched."""
    FIRST_SINK = "first sink"
    """All a text row gives to the image goes to the first visual row; visual rows read no visual row."""
    HALF_SINK = "half sink"
    """Text rows put weight 0 on the first half of the visual rows; visual rows read no visual row."""

    def visible(self, num_visual: int) -> int:
        """Of `num_visual` visual rows, how many have values that text rows read."""
        hidden = {
            Reading.ALL: 0,
            Reading.NO_IMAGE: num_visual,
            Reading.FIRST_SINK: num_visual - 1,
            Reading.HALF_SINK: num_visual // 2,
        }
        return num_visual - hidden[self]


class Cause(Enum):
    """Why visual rows leave."""

    SELECTION = "selection"
    EXIT = "exit"


@dataclass(frozen=True)
class Decision:
    """Taken after a layer, valid from the next layer's input on.

    Attributes:
        keep: bool [num_visual], one for each visual row that is still there; True survives.
        cause: `SELECTION` chose among visual rows, `EXIT` lets all that are left go.
    """

    keep: np.ndarray
    cause: Cause


class Policy:
    """The decisions for one prompt. The engine makes one instance a prompt, so it may keep state.

    The engine asks only while the prompt has visual rows, and in the order of the layers.
    """

    def reading(self, layer: int) -> Reading:
        """What may be read of the image in `layer`."""
        return Reading.ALL

    def needs_probe(self, layer: int) -> bool:
        """Whether `decide` wants the last row measured in `layer`. Only where `reading` is `ALL`."""
        return False

    def decide(self, layer: int, num_visual: int, probe: Probe | None) -> Decision | None:
        """Which of the `num_visual` rows still there survive after `layer`; None: all of them.

        `probe` is what was measured in `layer`, or None where `needs_probe` said no.
        """
        return None


@dataclass(frozen=True)
class Prompt:
    """What a policy is told of its prompt: layers of the model, rows in all, positions of the visual rows."""

    num_layers: int
    num_rows: int
    visual_positions: np.ndarray


PolicyFactory = Callable[[Prompt], Policy]
"""Makes the policy for one prompt."""


class VisiPruner(Policy):
    """The three stages of VisiPruner (arXiv 2510.17205).

    Shallow (layers < `shallow_mid_layer`): text does not read the image. Middle: the first layer after
    `shallow_mid_layer` where one visual token's absence would turn the last row's output below
    `layer_threshold` selects; tokens whose share is longer than `tokens_threshold` stay. Deep: after
    `exit_patience` layers in which no kept token matters any more, the kept ones leave too.
    """

    def __init__(self, config: PruningConfig, sink: str):
        self.config = config
        # Zero where the mode does not need them: no layer is below, none is above.
        self.shallow_mid_layer = config.shallow_mid_layer or 0
        self.mid_deep_layer = config.mid_deep_layer or 0
        self.layer_threshold = config.layer_threshold or 0.0
        self.sink = Reading.FIRST_SINK if sink == "first" else Reading.HALF_SINK
        self.selected = False
        self.quiet_layers = 0

    def reading(self, layer: int) -> Reading:
        if not self.config.shallow or layer >= self.shallow_mid_layer:
            return Reading.ALL
        return self.sink if layer == 0 else Reading.NO_IMAGE

    def needs_probe(self, layer: int) -> bool:
        if not self.config.middle or layer <= self.shallow_mid_layer:
            return False
        return self.config.deep or not self.selected

    def decide(self, layer: int, num_visual: int, probe: Probe | None) -> Decision | None:
        if not self.config.middle:
            leaves = self.config.deep and layer == self.mid_deep_layer - 1
            return Decision(np.zeros(num_visual, dtype=bool), Cause.EXIT) if leaves else None
        if probe is None:
            return None
        if not self.selected:
            if not (probe.cosine < self.layer_threshold).any():
                return None
            self.selected = True
            return Decision(probe.norm > self.config.tokens_threshold, Cause.SELECTION)
        self.quiet_layers += not (probe.cosine < self.config.exit_threshold).any()
        if self.quiet_layers < self.config.exit_patience:
            return None
        return Decision(np.zeros(num_visual, dtype=bool), Cause.EXIT)


def visipruner(config: PruningConfig, sink: str) -> PolicyFactory:
    """A factory of `VisiPruner` for every prompt of a call."""
    return lambda prompt: VisiPruner(config, sink)
