"""Other ways to choose visual tokens, to hold VisiPruner against. Each is a `Policy` of a few lines.

They share the engine, so a comparison differs in the choice of tokens alone.
"""

from __future__ import annotations

import numpy as np

from .config import PruningConfig
from .policy import Cause, Decision, Policy, PolicyFactory, Prompt, VisiPruner
from .probe import Probe


class KeepAtLayer(Policy):
    """Keep `num_kept` visual tokens after `layer`, by a score; drop the rest; all leave before `exit_layer`.

    The score is one of the probe's measures: `"attention"` (FastV, arXiv 2403.06764: what the last row attends
    to), `"norm"` (VisiPruner's share) or `"random"` (needs `seed`).
    """

    def __init__(
        self,
        prompt: Prompt,
        layer: int,
        num_kept: int,
        score: str,
        exit_layer: int | None = None,
        seed: int = 0,
    ):
        if score not in ("attention", "norm", "random"):
            raise ValueError(f"score is {score!r}; it must be 'attention', 'norm' or 'random'")
        if not 0 <= layer < prompt.num_layers:
            raise ValueError(f"layer is {layer}; it must be from 0 to {prompt.num_layers - 1}")
        if exit_layer is not None and exit_layer <= layer:
            raise ValueError(f"exit_layer is {exit_layer}; it must be greater than layer ({layer})")
        self.layer, self.num_kept, self.score, self.exit_layer = layer, num_kept, score, exit_layer
        self.random = np.random.default_rng(seed)

    def needs_probe(self, layer: int) -> bool:
        return layer == self.layer and self.score != "random"

    def decide(self, layer: int, num_visual: int, probe: Probe | None) -> Decision | None:
        if layer == self.layer:
            scores = self.random.random(num_visual) if self.score == "random" else getattr(probe, self.score)
            keep = np.zeros(num_visual, dtype=bool)
            keep[np.argsort(-scores, kind="stable")[: self.num_kept]] = True
            return Decision(keep, Cause.SELECTION)
        if self.exit_layer is not None and layer == self.exit_layer - 1:
            return Decision(np.zeros(num_visual, dtype=bool), Cause.EXIT)
        return None


def keep_at_layer(
    layer: int, num_kept: int, score: str = "attention", exit_layer: int | None = None, seed: int = 0
) -> PolicyFactory:
    """A factory of `KeepAtLayer`; `prune(model, policy=keep_at_layer(2, 64))`."""
    return lambda prompt: KeepAtLayer(prompt, layer, num_kept, score, exit_layer, seed)


class ForcedSchedule(VisiPruner):
    """VisiPruner with its decisions given instead of found, so that a benchmark on random weights has a real schedule.

    Everything is computed that `VisiPruner` with all three stages computes: the shallow stage below
    `shallow_mid_layer`, and the probe in every layer where the method would look at it. The `num_kept` visual
    tokens with the longest shares survive `select_layer`; they leave at the input of `exit_layer` (None: never).

    Raises:
        ValueError: layers out of order, 0 < shallow_mid_layer < select_layer < exit_layer <= number of layers.
    """

    def __init__(
        self,
        prompt: Prompt,
        shallow_mid_layer: int,
        select_layer: int,
        num_kept: int,
        exit_layer: int | None,
        sink: str = "first",
    ):
        last = prompt.num_layers if exit_layer is None else exit_layer
        if not 0 < shallow_mid_layer < select_layer < last <= prompt.num_layers:
            raise ValueError(
                f"forced schedule: layers {shallow_mid_layer} < {select_layer} < {exit_layer} must ascend "
                f"within 1 … {prompt.num_layers}"
            )
        stages = PruningConfig(
            ("shallow", "middle", "deep"),
            shallow_mid_layer=shallow_mid_layer,
            layer_threshold=0.5,  # never compared
            tokens_threshold=1.0,  # never compared
        )
        super().__init__(stages, sink)
        self.select_layer, self.num_kept, self.exit_layer = select_layer, num_kept, exit_layer

    def decide(self, layer: int, num_visual: int, probe: Probe | None) -> Decision | None:
        if layer == self.select_layer and probe is not None:
            self.selected = True
            keep = np.zeros(num_visual, dtype=bool)
            keep[np.argsort(-probe.norm, kind="stable")[: self.num_kept]] = True
            return Decision(keep, Cause.SELECTION)
        if self.exit_layer is not None and layer == self.exit_layer - 1:
            return Decision(np.zeros(num_visual, dtype=bool), Cause.EXIT)
        return None


def forced_schedule(
    shallow_mid_layer: int, select_layer: int, num_kept: int, exit_layer: int | None, sink: str = "first"
) -> PolicyFactory:
    """A factory of `ForcedSchedule`; `prune(model, policy=forced_schedule(6, 9, 10, 16))`."""
    return lambda prompt: ForcedSchedule(prompt, shallow_mid_layer, select_layer, num_kept, exit_layer, sink)
