"""Kinds of knobs that methods have: what a value may be, said once and checked the same way everywhere.

A method declares `layer: int = knob(Layer(), 2)`; `Method` then refuses what does not fit, with one clear error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, NoReturn

from .errors import PruningConfigError


def knob(kind: Kind, default: Any = MISSING) -> Any:
    """A dataclass field whose values are of `kind`; without a default it must be given."""
    return field(default=default, metadata={"kind": kind})


def refuse(key: str, value: Any, allowed: str) -> NoReturn:
    """Raise `PruningConfigError` for a knob whose value is not `allowed`."""
    value = list(value) if isinstance(value, tuple) else value  # as it stands in JSON
    raise PruningConfigError(f"pruning config: {key!r} is {value!r}; it must be {allowed}")


class Kind:
    """What values a knob may have.

    Attributes:
        is_layer: whether that depends on the model's number of layers.
        drops: whether rows leave at the input of the layer that it names, or so many layers `behind` it.
    """

    is_layer: ClassVar[bool] = False
    drops = False
    behind = 0

    def fits(self, value: Any, num_layers: int | None) -> bool:
        """Whether `value` is one; with `num_layers`, in a model of so many."""
        raise NotImplementedError

    def allowed(self, num_layers: int | None) -> str:
        """What a value must be, in words."""
        raise NotImplementedError


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Integer(Kind):
    """An integer of at least `least`; `None` where it is `optional`."""

    least: int = 0
    optional: bool = False

    def fits(self, value: Any, num_layers: int | None) -> bool:
        return self.optional if value is None else _is_int(value, self.least)

    def allowed(self, num_layers: int | None) -> str:
        return f"an integer of at least {self.least}"


@dataclass(frozen=True)
class Number(Kind):
    """A finite number above `above` and, where there is one, below `below`; `None` where it is `optional`."""

    above: float = 0
    below: float | None = None
    optional: bool = False

    def fits(self, value: Any, num_layers: int | None) -> bool:
        if value is None:
            return self.optional
        # False for NaN, infinities, and integers that no float can hold.
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        return is_number and self.above < value and (self.below is None or value < self.below)

    def allowed(self, num_layers: int | None) -> str:
        if self.below is None:
            return f"a number greater than {self.above}"
        return f"a number between {self.above} and {self.below}, both excluded"


@dataclass(frozen=True)
class Between(Kind):
    """A finite number from `least` to `most`, both allowed."""

    least: float = 0
    most: float = sys.float_info.max

    def fits(self, value: Any, num_layers: int | None) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.least <= value <= self.most

    def allowed(self, num_layers: int | None) -> str:
        return f"a number from {self.least}" + (f" to {self.most}" if self.most < sys.float_info.max else "")


@dataclass(frozen=True)
class Choice(Kind):
    """One of `names`; `None` where it is `optional`."""

    names: Sequence[Any]
    optional: bool = False

    def fits(self, value: Any, num_layers: int | None) -> bool:
        return self.optional if value is None else value in self.names

    def allowed(self, num_layers: int | None) -> str:
        return f"one of {list(self.names)}"


@dataclass(frozen=True)
class Subset(Kind):
    """A list with any of `names`."""

    names: Sequence[str]

    def fits(self, value: Any, num_layers: int | None) -> bool:
        return isinstance(value, list | tuple) and all(one in self.names for one in value)

    def allowed(self, num_layers: int | None) -> str:
        return f"a list with any of {list(self.names)}"


@dataclass(frozen=True)
class Count(Kind):
    """How many tokens stay: an integer, so many an image, or a share of all in (0, 1)."""

    def fits(self, value: Any, num_layers: int | None) -> bool:
        return _is_int(value, 0) or (isinstance(value, float) and 0 < value < 1)

    def allowed(self, num_layers: int | None) -> str:
        return "a number of tokens an image (an integer from 0) or a share between 0 and 1"


@dataclass(frozen=True)
class Layer(Kind):
    """A layer of the decoder, from `least` to L-1, or to L where `may_be_end`; `None` where it is `optional`.

    `drops`: rows leave at its input.
    """

    is_layer = True
    least: int = 1
    may_be_end: bool = False
    optional: bool = False
    drops: bool = False

    def fits(self, value: Any, num_layers: int | None) -> bool:
        if value is None:
            return self.optional
        return _is_int(value, self.least) and (num_layers is None or value < num_layers + self.may_be_end)

    def allowed(self, num_layers: int | None) -> str:
        if num_layers is None:
            return f"an integer from {self.least} to {'L' if self.may_be_end else 'L-1'} (L layers)"
        most = num_layers - 1 + self.may_be_end
        return f"an integer from {self.least} to {most} for this model of {num_layers} layers"


@dataclass(frozen=True)
class Layers(Kind):
    """A list of different layers from `least` to L-1, ascending where rows leave at their inputs (`drops`), or at
    those of the layers so many `behind`; `None` where it is `optional`."""

    is_layer = True
    least: int = 1
    drops: bool = False
    behind: int = 0
    optional: bool = False

    def fits(self, value: Any, num_layers: int | None) -> bool:
        if value is None:
            return self.optional
        if not isinstance(value, list | tuple) or not all(_is_int(layer, self.least) for layer in value):
            return False
        in_order = list(value) == sorted(value) or not self.drops
        return len(set(value)) == len(value) and in_order and (num_layers is None or max(value, default=0) < num_layers)

    def allowed(self, num_layers: int | None) -> str:
        order = "ascending" if self.drops else "different"
        if num_layers is None:
            return f"a list of {order} layers from {self.least} to L-1 (L layers)"
        return f"a list of {order} layers from {self.least} to {num_layers - 1} for this model of {num_layers} layers"


def check_first_layer(key: str, value: int, earliest: int, first_layer: int) -> None:
    """Rows that leave at the input of layer `value + earliest` must not be missed below `first_layer`."""
    if value + earliest < first_layer:
        least = first_layer - earliest
        refuse(key, value, f"at least {least} for this model, whose image features join up to layer {first_layer - 1}")
