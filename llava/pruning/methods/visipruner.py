"""VisiPruner: three stages found while a prompt is read (arXiv 2510.17205)."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..decisions import LEAVE, Keep, Read, Treatment, keep_best
from ..errors import PruningConfigError
from ..knobs import Choice, Count, Integer, Layer, Number, Subset, check_first_layer, knob, refuse
from ..method import Method, number_to_keep, register
from ..trace import PruningTrace
from ..view import View

STAGES = ("shallow", "middle", "deep")
SINKS = {"first": Read.FIRST_SINK, "half": Read.HALF_SINK}

# Knobs that the paper does not have, and the values with which they do nothing.
OURS = {"probe_rows": "last", "relative": False}

# The shallow stage of LLaVA-1.5-7B (arXiv 2510.17205).
PUBLISHED_BOUNDARY, PUBLISHED_LAYERS = 6, 32


def shallow_stage(boundary: int, num_layers: int, sink: str) -> list[Treatment]:
    """Layers below `boundary` where text reads no image, layer 0 by the rule `sink`; ordinary ones from there on."""
    below = [Treatment(SINKS[sink]), *[Treatment(Read.NO_IMAGE)] * (boundary - 1)][:boundary]
    return below + [Treatment()] * (num_layers - boundary)


@register("visipruner")
@dataclass(frozen=True)
class VisiPruner(Method):
    """VisiPruner and its knobs, the config that users of LLaVA know as `PruningConfig`.

    - Shallow (layers < `shallow_mid_layer`): text does not read the image.
    - Middle: with o the last row's attention output and c_i visual token i's share in it, the first layer behind
      `shallow_mid_layer` where `cos(o - c_i, o)` of any token falls below `layer_threshold` selects; tokens with
      `||c_i|| > tokens_threshold` stay.
    - Deep: after `exit_patience` layers in which no kept token matters any more, the kept ones leave too.

    Attributes:
        mode: any subset of `("shallow", "middle", "deep")`; empty is dense.
        shallow_mid_layer: first layer after the shallow stage, 1 … L-1. Text rows read no image in layers
            below it; a selection may happen in layers strictly above it. Needed with shallow or middle.
        layer_threshold: cosine in (0, 1). Needed with middle.
        tokens_threshold: norm > 0. Needed with middle, unless `keep` is given.
        mid_deep_layer: layer 1 … L-1 at whose input all visual rows leave. Needed with deep and no middle;
            with middle the exit is found from the data and this key is ignored (published configs carry it).
        exit_threshold: cosine in (0, 1). A layer where no kept token reaches below it is quiet.
        exit_patience: after this many quiet layers (counted cumulatively) the kept rows leave.
        shallow_sink: what layer 0 does with the text rows' image attention: `"first"` gives all of it to the
            first visual token, `"half"` drops the first half of the visual tokens. None: see `sink_for`.
        probe_rows: ours. Whose outputs the middle and deep stages look at: `"last"`, the prompt's last row, as
            published; `"text"`, all text rows behind the first image: of a token counts its largest share in any of
            them, and its smallest cosine.
        relative: ours. Whether a share's length is divided by its output's, `||c_i|| / ||o||`.
        keep: ours. At the selecting layer, so many tokens of the longest shares stay instead of those above
            `tokens_threshold`: a number an image, or a share of all.

    Raises:
        PruningConfigError: a missing, unknown or out-of-range key. Ranges that depend on the number of layers
            are checked by `validate_for`.
    """

    mode: tuple[str, ...] = knob(Subset(STAGES))
    shallow_mid_layer: int | None = knob(Layer(optional=True), None)
    layer_threshold: float | None = knob(Number(0, 1, optional=True), None)
    tokens_threshold: float | None = knob(Number(0, optional=True), None)
    mid_deep_layer: int | None = knob(Layer(optional=True), None)
    exit_threshold: float = knob(Number(0, 1), 0.999)
    exit_patience: int = knob(Integer(1), 2)
    shallow_sink: str | None = knob(Choice(tuple(SINKS), optional=True), None)
    probe_rows: str = knob(Choice(("last", "text")), "last")
    relative: bool = knob(Choice((False, True)), False)
    keep: int | float | None = knob(Count(), None)

    # Whether `mode` has the stage. Not annotated, so that they are no knobs.
    shallow = middle = deep = False

    @property
    def length(self) -> str:
        """The measure (`shares.Shares`) that tells which visual rows stay."""
        return "part" if self.relative else "norm"

    # -- the method ----------------------------------------------------------------------------------------------

    def treatments(self, num_layers: int) -> Sequence[Treatment]:
        if not self.shallow or self.shallow_mid_layer is None:
            return [Treatment()] * num_layers
        return shallow_stage(self.shallow_mid_layer, num_layers, self.shallow_sink or "first")

    def looks_behind(self, num_layers: int) -> Collection[int]:
        if not self.middle or self.shallow_mid_layer is None:
            return ()
        return range(self.shallow_mid_layer + 1, num_layers)

    def decides_behind(self, num_layers: int) -> Collection[int]:
        if self.middle or not self.deep or self.mid_deep_layer is None:
            return self.looks_behind(num_layers)
        return {self.mid_deep_layer - 1}

    def measure(self, view: View) -> Mapping[str, torch.Tensor] | None:
        if view.trace.decisions and not self.deep:
            return None
        return view.shares(view.text[view.num_prefix :] if self.probe_rows == "text" else None)

    def decide(self, layer: int, measured: Mapping[str, np.ndarray] | None, trace: PruningTrace) -> Keep | None:
        if measured is None:
            leaves = layer + 1 == self.mid_deep_layer and self.deep and not self.middle
            return LEAVE if leaves else None
        select_layer = trace.select_layer
        if select_layer is None:
            if (measured["cosine"] < self.layer_threshold).any():
                lengths = measured[self.length]
                if self.keep is not None:
                    return keep_best(lengths, number_to_keep(self.keep, trace))
                return Keep(lengths > self.tokens_threshold)
            return None
        behind = [smallest for at, smallest in trace.smallest_cosine.items() if at > select_layer]
        quiet_layers = sum(not smallest < self.exit_threshold for smallest in behind)
        return LEAVE if quiet_layers >= self.exit_patience else None

    # -- its knobs -----------------------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mode", tuple(stage for stage in STAGES if stage in self.mode))
        for stage in STAGES:
            object.__setattr__(self, stage, stage in self.mode)
        shallow, middle, deep = self.shallow, self.middle, self.deep
        needed = {
            "shallow_mid_layer": shallow or middle,
            "layer_threshold": middle,
            "tokens_threshold": middle and self.keep is None,
            "mid_deep_layer": deep and not middle,
        }
        if self.keep is not None and self.tokens_threshold is not None:
            raise PruningConfigError(
                f"pruning config: 'keep' ({self.keep}) and 'tokens_threshold' ({self.tokens_threshold}) both say which "
                "tokens stay; leave one out"
            )
        missing = [key for key, is_needed in needed.items() if is_needed and getattr(self, key) is None]
        if missing:
            raise PruningConfigError(
                f"pruning config: {', '.join(map(repr, missing))} missing; mode {list(self.mode)} needs it"
            )
        if shallow and deep and not middle and self.mid_deep_layer < self.shallow_mid_layer:  # type: ignore[operator]
            least = f"at least 'shallow_mid_layer' ({self.shallow_mid_layer}), or the stages overlap"
            refuse("mid_deep_layer", self.mid_deep_layer, least)
        if middle and self.mid_deep_layer is not None:
            warnings.warn(
                f"pruning config: 'mid_deep_layer' ({self.mid_deep_layer}) is ignored with stage 'middle': "
                "the exit layer is found from the data",
                stacklevel=4,
            )

    def to_dict(self) -> dict[str, Any]:
        """The config as it would be written in JSON, as published where no knob of ours is set."""
        return {key: value for key, value in super().to_dict().items() if OURS.get(key, ...) != value}

    @property
    def is_dense(self) -> bool:  # type: ignore[override]
        return not self.mode

    def validate_for(self, num_layers: int, first_layer: int = 0) -> VisiPruner:
        super().validate_for(num_layers, first_layer)
        if self.middle:
            # A selection happens behind layer shallow_mid_layer + 1 at the earliest.
            check_first_layer("shallow_mid_layer", self.shallow_mid_layer or 0, 2, first_layer)
        elif self.deep:
            check_first_layer("mid_deep_layer", self.mid_deep_layer or 0, 0, first_layer)
        return self

    def bind(self, num_layers: int, model_path: str | None) -> VisiPruner:
        if not self.shallow or self.shallow_sink is not None:
            return self
        with warnings.catch_warnings():  # said when the config was read
            warnings.simplefilter("ignore")
            return replace(self, shallow_sink=self.sink_for(model_path, num_layers))

    def sink_for(self, model_path: str | None, num_layers: int) -> str:
        """The rule for layer 0: as written, else as the published code guesses it, else by depth.

        The published code looks for "7b" and then "13b" in the last component of the model's path; its 13B
        models have 40 layers, which is where ours turns to `half` when the name says nothing.
        """
        if self.shallow_sink is not None:
            return self.shallow_sink
        name = (model_path or "").replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
        for size, sink in (("7b", "first"), ("13b", "half")):
            if size in name:
                return sink
        return "half" if num_layers >= 40 else "first"

    @classmethod
    def for_model(cls, model: Any) -> VisiPruner:
        """A starting point for any supported model: all three stages, the published boundary scaled to its depth.

        The thresholds are the published ones for LLaVA-1.5-7B, whose shallow stage is 6 of 32 layers. They were
        never fitted to another model, which a warning says; `python -m llava.calibrate` finds a config that holds.

        Raises:
            UnsupportedModelError: a model that `prune` refuses.
            PruningConfigError: a model of one layer, which has no room for stages.
        """
        from ..families import adapter_for

        adapter = adapter_for(model)
        num_layers = len(adapter.layers)
        if num_layers < 2:
            raise PruningConfigError(f"pruning needs at least 2 decoder layers; this model has {num_layers} layer")
        scaled = round(PUBLISHED_BOUNDARY * num_layers / PUBLISHED_LAYERS)
        # A selection behind layer boundary + 1 drops rows at the input of boundary + 2.
        boundary = min(max(scaled, adapter.first_layer - 2, 1), num_layers - 1)
        warnings.warn(
            f"uncalibrated pruning config: LLaVA-1.5-7B's published thresholds, its boundary scaled to {num_layers} "
            "layers; `python -m llava.calibrate` finds a config for this model and your pictures",
            stacklevel=2,
        )
        return cls(mode=STAGES, shallow_mid_layer=boundary, layer_threshold=0.995, tokens_threshold=0.2)

    def describe(self, trace: PruningTrace) -> str:
        text = super().describe(trace)
        if trace.decisions:
            stayed = trace.num_kept and trace.exit_layer is None and trace.select_layer != len(trace.rows_per_layer) - 1
            return f"{text}, no exit" if self.deep and stayed else text
        if not self.middle:
            return f"{text}; text reads none of them below layer {self.shallow_mid_layer}"
        reason = "no layer was probed"
        if trace.smallest_cosine:
            layer, cosine = min(trace.smallest_cosine.items(), key=lambda entry: entry[1])
            reason = f"smallest cosine {cosine:.4f} (layer {layer}), layer_threshold {self.layer_threshold}"
        return f"{text}, nothing was selected: {reason}"
