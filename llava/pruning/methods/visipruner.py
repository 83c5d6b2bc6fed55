"""VisiPruner: three stages found while a prompt is read (arXiv 2510.17205)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..method import (
    LEAVE,
    Keep,
    Method,
    PruningConfigError,
    Read,
    Treatment,
    check,
    check_first_layer,
    check_layer,
    is_int,
    is_number,
    register,
)

if TYPE_CHECKING:
    import torch

    from ..trace import PruningTrace
    from ..view import View

STAGES = ("shallow", "middle", "deep")
SINKS = {"first": Read.FIRST_SINK, "half": Read.HALF_SINK}

# The shallow stage of LLaVA-1.5-7B (arXiv 2510.17205).
PUBLISHED_BOUNDARY, PUBLISHED_LAYERS = 6, 32


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
        tokens_threshold: norm > 0. Needed with middle.
        mid_deep_layer: layer 1 … L-1 at whose input all visual rows leave. Needed with deep and no middle;
            with middle the exit is found from the data and this key is ignored (published configs carry it).
        exit_threshold: cosine in (0, 1). A layer where no kept token reaches below it is quiet.
        exit_patience: after this many quiet layers (counted cumulatively) the kept rows leave.
        shallow_sink: what layer 0 does with the text rows' image attention: `"first"` gives all of it to the
            first visual token, `"half"` drops the first half of the visual tokens. None: see `sink_for`.

    Raises:
        PruningConfigError: a missing, unknown or out-of-range key. Ranges that depend on the number of layers
            are checked by `validate_for`.
    """

    mode: tuple[str, ...]
    shallow_mid_layer: int | None = None
    layer_threshold: float | None = None
    tokens_threshold: float | None = None
    mid_deep_layer: int | None = None
    exit_threshold: float = 0.999
    exit_patience: int = 2
    shallow_sink: str | None = None

    # -- the method ----------------------------------------------------------------------------------------------

    def treatment(self, layer: int) -> Treatment:
        if not self.shallow or layer >= self.shallow_mid_layer:  # type: ignore[operator]
            return Treatment()
        return Treatment(SINKS[self.shallow_sink or "first"] if layer == 0 else Read.NO_IMAGE)

    def looks(self, layer: int) -> bool:
        return self.middle and layer > self.shallow_mid_layer  # type: ignore[operator]

    def measure(self, view: View) -> Mapping[str, torch.Tensor] | None:
        selected = view.trace.select_layer is not None
        return view.shares() if self.deep or not selected else None

    def decide(self, layer: int, measured: Mapping[str, np.ndarray] | None, trace: PruningTrace) -> Keep | None:
        if self.deep and not self.middle:
            return LEAVE if layer + 1 == self.mid_deep_layer else None
        if measured is None:
            return None
        if trace.select_layer is None:
            if (measured["cosine"] < self.layer_threshold).any():
                return Keep(measured["norm"] > self.tokens_threshold)
            return None
        behind = [smallest for at, smallest in trace.smallest_cosine.items() if at > trace.select_layer]
        quiet_layers = sum(not smallest < self.exit_threshold for smallest in behind)
        return LEAVE if quiet_layers >= self.exit_patience else None

    # -- its knobs -----------------------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        mode = self.mode
        check("mode", mode, isinstance(mode, list | tuple), f"a list with any of {list(STAGES)}")
        for stage in mode:
            check("mode", mode, stage in STAGES, f"a list with any of {list(STAGES)}; {stage!r} is none of them")
        object.__setattr__(self, "mode", tuple(stage for stage in STAGES if stage in mode))

        for key in ("shallow_mid_layer", "mid_deep_layer"):
            value = getattr(self, key)
            check(key, value, value is None or is_int(value, 1), "an integer from 1 to L-1 (L layers)")
        for key in ("layer_threshold", "exit_threshold"):
            value = getattr(self, key)
            absent = value is None and key == "layer_threshold"
            check(
                key,
                value,
                absent or (is_number(value) and 0 < value < 1),
                "a number between 0 and 1, both excluded",
            )
        norm, patience, sink = self.tokens_threshold, self.exit_patience, self.shallow_sink
        check("tokens_threshold", norm, norm is None or (is_number(norm) and norm > 0), "a number greater than 0")
        check("exit_patience", patience, is_int(patience, 1), "an integer of at least 1")
        check("shallow_sink", sink, sink is None or sink in SINKS, f"one of {list(SINKS)}")
        self._check_needed()
        if self.middle and self.mid_deep_layer is not None:
            warnings.warn(
                f"pruning config: 'mid_deep_layer' ({self.mid_deep_layer}) is ignored with stage 'middle': "
                "the exit layer is found from the data",
                stacklevel=3,
            )

    def _check_needed(self) -> None:
        """Every key that the stages need is there, and the stages do not overlap."""
        needed = []
        if self.shallow or self.middle:
            needed.append("shallow_mid_layer")
        if self.middle:
            needed += ["layer_threshold", "tokens_threshold"]
        if self.deep and not self.middle:
            needed.append("mid_deep_layer")
        missing = [key for key in needed if getattr(self, key) is None]
        if missing:
            raise PruningConfigError(
                f"pruning config: {', '.join(map(repr, missing))} missing; mode {list(self.mode)} needs it"
            )
        if self.deep and not self.middle and self.shallow:
            check(
                "mid_deep_layer",
                self.mid_deep_layer,
                self.mid_deep_layer >= self.shallow_mid_layer,  # type: ignore[operator]
                f"at least 'shallow_mid_layer' ({self.shallow_mid_layer}), or the stages overlap",
            )

    @classmethod
    def hint_for(cls, key: str) -> str:
        return f"it must be a list with any of {list(STAGES)}"

    @property
    def shallow(self) -> bool:
        return "shallow" in self.mode

    @property
    def middle(self) -> bool:
        return "middle" in self.mode

    @property
    def deep(self) -> bool:
        return "deep" in self.mode

    @property
    def is_dense(self) -> bool:
        return not self.mode

    def validate_for(self, num_layers: int, first_layer: int = 0) -> VisiPruner:
        for key in ("shallow_mid_layer", "mid_deep_layer"):
            check_layer(key, getattr(self, key), num_layers)
        if self.middle:
            # A selection happens behind layer shallow_mid_layer + 1 at the earliest.
            check_first_layer("shallow_mid_layer", self.shallow_mid_layer or 0, 2, first_layer)
        elif self.deep:
            check_first_layer("mid_deep_layer", self.mid_deep_layer or 0, 0, first_layer)
        return self

    def bind(self, num_layers: int, model_path: str | None) -> VisiPruner:
        return self._with(shallow_sink=self.sink_for(model_path, num_layers))

    def _with(self, **knobs: Any) -> VisiPruner:
        with warnings.catch_warnings():  # said when the config was read
            warnings.simplefilter("ignore")
            return replace(self, **knobs)

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
        never fitted to another family: measure on your own questions before you rely on them.

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
        return cls(mode=STAGES, shallow_mid_layer=boundary, layer_threshold=0.995, tokens_threshold=0.2)

    def describe(self, trace: PruningTrace) -> str:
        text = super().describe(trace)
        if trace.decisions:
            return f"{text}, no exit" if self.deep and self.middle and trace.num_kept and not trace.exit_layer else text
        if not self.middle:
            return f"{text}; text reads none of them below layer {self.shallow_mid_layer}"
        reason = "no layer was probed"
        if trace.smallest_cosine:
            layer, cosine = min(trace.smallest_cosine.items(), key=lambda entry: entry[1])
            reason = f"smallest cosine {cosine:.4f} (layer {layer}), layer_threshold {self.layer_threshold}"
        return f"{text}, nothing was selected: {reason}"
