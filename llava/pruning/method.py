"""What a pruning method is: knobs that JSON can name, what it looks at, and what it decides.

A method is a frozen dataclass whose fields are its knobs; `methods/` has one a file. The engine (`prefill.py`) asks
it, in this order, and owns everything that no method may get wrong: text rows never leave, every prompt of a batch
decides alone, nothing is decided while decoding.

1. `treatments(num_layers)` and `looks_behind(num_layers)`: what happens to the image inside each layer, and behind
   which of them the method looks. Known before any prompt is.
2. `measure(view)`: between two layers, what of the rows it wants to know. Stays on the device.
3. `decide(layer, measured, trace)`: with those numbers on the host, which visual rows go on. What was measured and
   decided before is in the trace, so that a method needs no memory of its own.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from .decisions import BEFORE_DECODER, Cause, Keep, Treatment
from .errors import PruningConfigError
from .knobs import check_first_layer, refuse
from .trace import PruningTrace
from .view import View

if TYPE_CHECKING:
    from typing_extensions import Self


def number_of(keep: int | float, there: int) -> int:
    """Rows that a `Count` means for one image of which `there` rows are there: capped at these, a share of them
    rounded half to even."""
    return round(there * keep) if isinstance(keep, float) else min(keep, there)


def number_to_keep(keep: int | float, trace: PruningTrace) -> int:
    """Rows that a `Count` means for one prompt: a number an image, capped at what there is, or a share of all, rounded
    half to even."""
    images = 1 if isinstance(keep, float) else max(len(trace.image_spans), 1)
    return number_of(keep * images, trace.num_visual)


@dataclass(frozen=True)
class Method:
    """A pruning method and its knobs. Subclasses are frozen dataclasses, registered under a name.

    Attributes:
        name: what JSON calls it, set by `register`.
        needs_tower: whether it looks at what the vision tower made of the images (`View.pictures`).
        renumbers: whether rows are numbered anew after each decision, so that every layer counts the rows that it
            holds and decoded tokens follow them (what some published codes do). False: survivors keep their
            positions, and decoding goes on at the length that rows were last numbered for. A knob `positions` says it.
        is_dense: whether nothing is ever pruned, so that the model's own kernels may run untouched.

    Raises:
        PruningConfigError: a value out of range.
    """

    # Not annotated, so that they are no knobs; a subclass may make the last one a property.
    name = ""
    needs_tower = False
    is_dense = False

    @property
    def renumbers(self) -> bool:
        return getattr(self, "positions", None) == "renumber"

    def __post_init__(self) -> None:
        self._check(None)
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list) and "kind" in field.metadata:
                object.__setattr__(self, field.name, tuple(value))

    def _check(self, num_layers: int | None, first_layer: int = 0) -> None:
        """Refuse knobs that are not of their kind; with `num_layers`, those that the model has no layers for."""
        for field in fields(self):
            kind, value = field.metadata.get("kind"), getattr(self, field.name)
            if kind is None or (value is field.default if num_layers is None else not kind.is_layer):
                continue
            if not kind.fits(value, num_layers):
                refuse(field.name, value, kind.allowed(num_layers))
            if num_layers is not None and kind.drops and value not in (None, ()):
                earliest = min(value) if isinstance(value, tuple) else value
                check_first_layer(field.name, earliest, kind.behind, first_layer)

    # -- what a method answers -----------------------------------------------------------------------------------

    def treatments(self, num_layers: int) -> Sequence[Treatment]:
        """What each layer does with the image during prefill, [num_layers]."""
        return [Treatment()] * num_layers

    def looks_behind(self, num_layers: int) -> Collection[int]:
        """The layers behind which `measure` is to be asked (`BEFORE_DECODER`: at the decoder's input)."""
        return ()

    def decides_behind(self, num_layers: int) -> Collection[int]:
        """The layers behind which rows may leave: those that are looked behind, and those that the knobs name."""
        named: set[int] = set()
        for field in fields(self):
            kind, value = field.metadata.get("kind"), getattr(self, field.name)
            if kind is not None and kind.drops and value is not None:
                layers = value if isinstance(value, tuple) else (value,)
                named.update(layer + kind.behind - 1 for layer in layers)
        return {*self.looks_behind(num_layers), *named}

    def renumbers_behind(self, layer: int, num_layers: int) -> bool:
        """Whether a decision behind `layer` numbers rows anew."""
        return self.renumbers

    def measure(self, view: View) -> Mapping[str, torch.Tensor] | None:
        """Named measures of the rows behind `view.layer`, float32 on the host, mostly `[visual rows still there]`;
        None: nothing."""
        return None

    def decide(self, layer: int, measured: Mapping[str, np.ndarray] | None, trace: PruningTrace) -> Keep | None:
        """Which visual rows go on behind `layer`; None: all of them.

        Args:
            layer: the layer that has run; `BEFORE_DECODER` at the decoder's input.
            measured: what `measure` gave, on the host.
            trace: the prompt's trace so far; `trace.alive` are the positions of the visual rows still there.
        """
        return None

    def validate_for(self, num_layers: int, first_layer: int = 0) -> Self:
        """Check what depends on the model. Returns self.

        Args:
            num_layers: L, the decoder's layers.
            first_layer: the first layer at whose input rows may be missing.

        Raises:
            PruningConfigError: with the key, the value and the allowed range.
        """
        self._check(num_layers, first_layer)
        self._check_absence(num_layers, first_layer)
        if first_layer and BEFORE_DECODER in self.decides_behind(num_layers):
            raise PruningConfigError(
                f"pruning config: {self.name!r} lets rows leave before the decoder, but this model's image features "
                f"join up to layer {first_layer - 1}; take a method with 'layer' at least {first_layer} for this model"
            )
        return self

    def _check_absence(self, num_layers: int, first_layer: int) -> None:
        """Refuse visual rows that sit out a layer that joins image features, or that the method looks behind."""
        absent = {layer for layer, one in enumerate(self.treatments(num_layers)) if not one.present}
        if early := [layer for layer in sorted(absent) if layer < first_layer]:
            raise PruningConfigError(
                f"pruning config of {self.name!r}: visual rows may not sit out layers {early} of this model, whose "
                f"image features join up to layer {first_layer - 1}; name these among the layers that read the image"
            )
        if unseen := sorted(absent & set(self.looks_behind(num_layers))):
            raise PruningConfigError(
                f"pruning config of {self.name!r}: visual rows sit out layers {unseen}, so a method cannot look at "
                "what happened to them there; look behind another layer"
            )

    def bind(self, num_layers: int, model_path: str | None) -> Method:
        """The method for one model, with every knob settled that depends on it."""
        return self

    def for_question(self, question: str) -> Method:
        """The method for one prompt, whose bare question this is. Programs that know the question ask for it."""
        return self

    def describe(self, trace: PruningTrace) -> str:
        """What was done to one prompt that has visual rows, in words."""
        kept, count, num_layers = trace.num_kept, trace.num_visual, len(trace.rows_per_layer)
        selections = [decision for decision in trace.decisions if decision.cause is Cause.SELECTION]
        if not trace.decisions:
            return f"kept all {count} visual tokens"
        if not selections:
            return f"kept 0 of {count} visual tokens from layer {trace.exit_layer} on"
        if trace.select_layer == num_layers - 1:
            return f"selected at layer {trace.select_layer}, the last: nothing was left to prune"
        layers = [decision.layer for decision in selections]
        if layers == [BEFORE_DECODER]:
            text = f"kept {kept} of {count} visual tokens, selected before the decoder"
        else:
            several = "layers" if len(layers) > 1 else "layer"
            text = f"kept {kept} of {count} visual tokens, selected at {several} {', '.join(map(str, layers))}"
        if trace.exit_layer is not None:
            return f"{text}, exit at layer {trace.exit_layer}"
        return text if kept else f"{text}, no picture from layer {layers[-1] + 1} on"

    # -- JSON ----------------------------------------------------------------------------------------------------

    @staticmethod
    def from_any(source: Method | Mapping[str, Any] | str | None) -> Any:
        """Read a method and its knobs from any form users have it in.

        Args:
            source: a method, a mapping, a JSON string, `"@path"` of a JSON file, or None. The key `"method"` names
                the method; without it, the config is VisiPruner's, as published.

        Returns:
            The method; None for None (dense).

        Raises:
            PruningConfigError: malformed JSON, an unreadable file, an unknown method, an unknown, missing or
                out-of-range knob.
        """
        if source is None or isinstance(source, Method):
            return source
        if isinstance(source, str):
            source = read_config(source)
        if not isinstance(source, Mapping):
            raise PruningConfigError(f"pruning config: a JSON object is needed, not {source!r}")
        knobs = dict(source)
        return method_named(knobs.pop("method", "visipruner"))._of_knobs(knobs)

    @classmethod
    def _of_knobs(cls, knobs: dict[str, Any]) -> Self:
        known = {field.name: field for field in fields(cls)}
        origin = "pruning config" if cls.name == "visipruner" else f"pruning config of {cls.name!r}"
        unknown = [key for key in knobs if key not in known]
        if unknown:
            raise PruningConfigError(
                f"{origin}: unknown key {', '.join(map(repr, unknown))}; known keys are {', '.join(known) or 'none'}"
            )
        missing = [
            key
            for key, field in known.items()
            if key not in knobs and field.default is MISSING and field.default_factory is MISSING
        ]
        if missing:
            kind = known[missing[0]].metadata.get("kind")
            hint = f"; it must be {kind.allowed(None)}" if kind else ""
            raise PruningConfigError(f"{origin}: {', '.join(map(repr, missing))} missing{hint}")
        return cls(**knobs)

    def to_dict(self) -> dict[str, Any]:
        """The config as it would be written in JSON: keys that are None are left out."""
        knobs = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        named = {} if self.name == "visipruner" else {"method": self.name}
        return {**named, **{key: value for key, value in knobs.items() if value is not None}}


# -- registry --------------------------------------------------------------------------------------------------------

METHODS: dict[str, type[Method]] = {}
"""Every registered method by the name that JSON uses."""

ENTRY_POINTS = "llava_visipruner.methods"
"""Entry-point group through which other installed packages bring methods: name = the module that registers it."""

M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Make a method known under `name`, to JSON and to every program: `@register("mine")` above its dataclass.

    Raises:
        ValueError: another class has that name already.
    """

    def enter(method: M) -> M:
        # A class defined anew under the same name (a notebook's cell, run again) takes the old one's place.
        known = METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
            raise ValueError(f"a pruning method named {name!r} is registered already: {known.__module__}")
        method.name = name
        METHODS[name] = method
        return method

    return enter


def method_named(name: Any) -> type[Method]:
    """The registered method of that name.

    Raises:
        PruningConfigError: there is none; the nearest name is suggested.
    """
    if isinstance(name, str) and name not in METHODS:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            entry.load()  # registers itself
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(name.lower(), METHODS, n=1) if isinstance(name, str) else []
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    raise PruningConfigError(
        f"pruning config: unknown method {name!r}; {suggestion}known are {', '.join(sorted(METHODS))}"
    )


def read_config(text: str) -> Any:
    """The JSON of a config, or of the file that it names as ``@FILE``. Raises `PruningConfigError`."""
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
