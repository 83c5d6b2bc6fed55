"""`PruningConfig`: what a user writes in JSON, checked before any work is done."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llava.utils import UserError

STAGES = ("shallow", "middle", "deep")
SINKS = ("first", "half")

# The shallow stage of LLaVA-1.5-7B (arXiv 2510.17205).
PUBLISHED_BOUNDARY, PUBLISHED_LAYERS = 6, 32


class PruningConfigError(UserError):
    """A pruning configuration that cannot be used. Names the key, the value and the allowed range."""


def _is_number(value: Any) -> bool:
    # False for NaN, infinities, and integers that no float can hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(key: str, value: Any, ok: bool, allowed: str) -> None:
    if not ok:
        raise PruningConfigError(f"pruning config: {key!r} is {value!r}; it must be {allowed}")


@dataclass(frozen=True)
class PruningConfig:
    """The knobs of VisiPruner (arXiv 2510.17205), one call's worth.

    Attributes:
        mode: any subset of `("shallow", "middle", "deep")`; empty is dense.
        shallow_mid_layer: first layer after the shallow stage, 1 … L-1. Text rows read no image in layers
            below it; a selection may happen in layers strictly above it. Needed with shallow or middle.
        layer_threshold: cosine in (0, 1). The first layer where leaving out one visual token turns the last
            row's attention output to a cosine below it is the selecting layer. Needed with middle.
        tokens_threshold: norm > 0. A visual token whose share of that output is longer is kept.
            Needed with middle.
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

    def __post_init__(self) -> None:
        mode = self.mode
        listed = isinstance(mode, list | tuple)
        _check("mode", mode, listed, f"a list with any of {list(STAGES)}")
        for stage in mode:
            _check("mode", mode, stage in STAGES, f"a list with any of {list(STAGES)}; {stage!r} is none of them")
        object.__setattr__(self, "mode", tuple(stage for stage in STAGES if stage in mode))

        for key in ("shallow_mid_layer", "mid_deep_layer"):
            value = getattr(self, key)
            _check(
                key,
                value,
                value is None or (_is_int(value) and value >= 1),
                "an integer from 1 to L-1 (L layers)",
            )
        for key in ("layer_threshold", "exit_threshold"):
            value = getattr(self, key)
            absent = value is None and key == "layer_threshold"
            _check(
                key,
                value,
                absent or (_is_number(value) and 0 < value < 1),
                "a number between 0 and 1, both excluded",
            )
        norm = self.tokens_threshold
        _check(
            "tokens_threshold",
            norm,
            norm is None or (_is_number(norm) and norm > 0),
            "a number greater than 0",
        )
        patience = self.exit_patience
        _check("exit_patience", patience, _is_int(patience) and patience >= 1, "an integer of at least 1")
        _check(
            "shallow_sink",
            self.shallow_sink,
            self.shallow_sink is None or self.shallow_sink in SINKS,
            f"one of {list(SINKS)}",
        )

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
            _check(
                "mid_deep_layer",
                self.mid_deep_layer,
                self.mid_deep_layer >= self.shallow_mid_layer,  # type: ignore[operator]
                f"at least 'shallow_mid_layer' ({self.shallow_mid_layer}), or the stages overlap",
            )
        if self.middle and self.mid_deep_layer is not None:
            warnings.warn(
                f"pruning config: 'mid_deep_layer' ({self.mid_deep_layer}) is ignored with stage 'middle': "
                "the exit layer is found from the data",
                stacklevel=3,
            )

    @property
    def shallow(self) -> bool:
        return "shallow" in self.mode

    @property
    def middle(self) -> bool:
        return "middle" in self.mode

    @property
    def deep(self) -> bool:
        return "deep" in self.mode

    @classmethod
    def from_any(cls, source: PruningConfig | Mapping[str, Any] | str | None) -> PruningConfig | None:
        """Read a config from any form users have it in.

        Args:
            source: a `PruningConfig`, a mapping, a JSON string, `"@path"` of a JSON file, or None.

        Returns:
            The config; None for None (dense).

        Raises:
            PruningConfigError: malformed JSON, an unreadable file, or anything `PruningConfig` refuses.
        """
        if source is None or isinstance(source, cls):
            return source
        if isinstance(source, str):
            source = cls._read_json(source)
        if not isinstance(source, Mapping):
            raise PruningConfigError(f"pruning config: a JSON object is needed, not {source!r}")
        known = [field.name for field in fields(cls)]
        unknown = [key for key in source if key not in known]
        if unknown:
            raise PruningConfigError(
                f"pruning config: unknown key {', '.join(map(repr, unknown))}; known keys are {', '.join(known)}"
            )
        if "mode" not in source:
            raise PruningConfigError(f"pruning config: 'mode' missing; it must be a list with any of {list(STAGES)}")
        return cls(**source)

    @classmethod
    def for_model(cls, model: Any) -> PruningConfig:
        """A starting point for any supported model: all three stages, the published boundary scaled to its depth.

        The thresholds are the published ones for LLaVA-1.5-7B, whose shallow stage is 6 of 32 layers. They were
        never fitted to another family: measure on your own questions before you rely on them.

        Raises:
            UnsupportedModelError: a model that `prune` refuses.
            PruningConfigError: a model of one layer, which has no room for stages.
        """
        from .adapters import adapter_for

        adapter = adapter_for(model)
        num_layers = len(adapter.layers)
        if num_layers < 2:
            raise PruningConfigError(f"pruning needs at least 2 decoder layers; this model has {num_layers} layer")
        scaled = round(PUBLISHED_BOUNDARY * num_layers / PUBLISHED_LAYERS)
        # A selection behind layer boundary + 1 drops rows at the input of boundary + 2.
        boundary = min(max(scaled, adapter.first_layer - 2, 1), num_layers - 1)
        return cls(mode=STAGES, shallow_mid_layer=boundary, layer_threshold=0.995, tokens_threshold=0.2)

    @staticmethod
    def _read_json(text: str) -> Any:
        origin = "pruning config"
        if text.startswith("@"):
            path = Path(text[1:]).expanduser()
            origin = f"pruning config file {path}"
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or error
                raise PruningConfigError(f"{origin}: cannot be read ({reason})") from error
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:  # not only JSONDecodeError: numbers too long, nesting too deep
            raise PruningConfigError(f"{origin}: not valid JSON ({error}): {text[:80]!r}") from error

    def validate_for(self, num_layers: int) -> PruningConfig:
        """Check the ranges that depend on the model. Returns self.

        Raises:
            PruningConfigError: `shallow_mid_layer` or `mid_deep_layer` outside 1 … num_layers - 1.
        """
        for key in ("shallow_mid_layer", "mid_deep_layer"):
            value = getattr(self, key)
            _check(
                key,
                value,
                value is None or value < num_layers,
                f"an integer from 1 to {num_layers - 1} for this model of {num_layers} layers",
            )
        return self

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

    def to_dict(self) -> dict[str, Any]:
        """The config as it would be written in JSON: keys that are None are left out."""
        return {
            key: list(value) if key == "mode" else value for key, value in asdict(self).items() if value is not None
        }
