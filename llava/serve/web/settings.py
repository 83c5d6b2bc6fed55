"""The pruning configs that the page offers: of every method one that this model takes, and VisiPruner's knobs.

What counts is JSON, as in a config file. VisiPruner's controls write it and are set from it; other methods' configs are
typed, with their knobs listed beside.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from llava.model.recommended import PUBLISHED
from llava.pruning import METHODS, Method, VisiPruner
from llava.pruning.knobs import Count
from llava.pruning.methods.visipruner import PUBLISHED_BOUNDARY, PUBLISHED_LAYERS, STAGES
from llava.utils import UserError

MAX_CONFIG = 20_000  # characters

# Two sentences a method; those that are not here say it with their own docstrings.
_IN_TWO_SENTENCES = {
    "visipruner": "While the model reads your question, VisiPruner finds out which visual tokens (the pieces that a "
    "picture is cut into) the answer depends on, and drops the others. It needs no training, and every question keeps "
    "tokens of its own."
}


@dataclass(frozen=True)
class About:
    """What a method is. `words`: two sentences; `link`: of its paper, "" where it has none."""

    title: str
    words: str
    link: str


def about(name: str) -> About:
    """A registered method in two sentences."""
    method = METHODS[name]
    summary = (sys.modules[method.__module__].__doc__ or name).partition("\n\n")[0]
    paper = re.search(r"arXiv (\d{4}\.\d{5})", summary)
    own = (method.__doc__ or "").partition("\n\n")[0]
    words = _IN_TWO_SENTENCES.get(name) or f"{_one_line(summary)} {_one_line(own)}"
    words = re.sub(r"\s*\(arXiv [\d.]+\)", "", words)
    title = summary.partition(":")[0] if ":" in summary else name
    return About(method.__name__ if len(title) > 20 else title, words, _paper(paper))


def knobs_of(name: str, num_layers: int | None) -> list[tuple[str, str, str]]:
    """Name, what is allowed, and default of every knob of a method, in words. `num_layers`: of the model, if known."""
    told = []
    for each in fields(METHODS[name]):
        kind = each.metadata.get("kind")
        default = "needed" if each.default is MISSING else "none" if each.default is None else json.dumps(each.default)
        told.append((each.name, kind.allowed(num_layers) if kind else "see docs/methods.md", default))
    return told


class Settings:
    """The configs that a page offers for one model.

    Args:
        checkpoint: what checks configs (`pruning_config`).
        recommended: the config that the page begins with.
        num_layers: of the model's decoder.
    """

    def __init__(self, checkpoint: Any, recommended: Method, num_layers: int) -> None:
        self._checkpoint, self._recommended, self.num_layers = checkpoint, recommended, num_layers

    @property
    def knobs(self) -> dict[str, Any]:
        """A value for every knob of VisiPruner that fits this model in any mode: the recommended ones, else the
        published ones, layers scaled to the model's depth."""
        own = self._recommended.to_dict() if isinstance(self._recommended, VisiPruner) else {}
        first = max(1, round(PUBLISHED_BOUNDARY * self.num_layers / PUBLISHED_LAYERS))
        # The paper's exits lie at three quarters of the depth on average.
        last = max(own.get("shallow_mid_layer", first), self.num_layers * 3 // 4)
        kept = {"keep": None} if "tokens_threshold" in own else {}
        usual = {each.name: each.default for each in fields(VisiPruner) if each.default is not MISSING}
        layers = {
            "shallow_mid_layer": min(first, self.num_layers - 1),
            "mid_deep_layer": min(last, self.num_layers - 1),
        }
        return {**usual, **PUBLISHED.to_dict(), **layers, **kept, **own}

    def written(self, knobs: Mapping[str, Any]) -> str:
        """VisiPruner's config as JSON, of a value for every knob (empty: none, as None); those that its mode has no use
        for are left out."""
        knobs = {key: _given(value) for key, value in knobs.items()}
        mode = [stage for stage in STAGES if stage in knobs["mode"]]
        usual = {each.name: each.default for each in fields(VisiPruner)}
        config: dict[str, Any] = {"mode": mode}
        for key in _used(mode, knobs.get("keep")):
            value = knobs[key]
            if value is not None and (value != usual[key] or key.startswith("exit_")):
                config[key] = value
        return as_text(config)

    def read(self, text: str) -> dict[str, Any] | None:
        """The knobs of VisiPruner that its config's JSON has a use for; None: another method's, or no config at all."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                method = Method.from_any(json.loads(text))
        except (ValueError, RecursionError):
            return None
        if not isinstance(method, VisiPruner):
            return None
        used = {key: getattr(method, key) for key in _used(method.mode, method.keep)}
        return {"mode": list(method.mode), **used}

    def start_of(self, name: str) -> str:
        """A config of a method, as JSON, that this model takes: to begin with, not tuned to it."""
        if name == self._recommended.name:
            return as_text(self._recommended.to_dict())
        if name == "visipruner":
            return self.written(self.knobs)
        config = {"method": name, **self._scaled(name)}
        return as_text(config)

    def check(self, text: str) -> Method:
        """The method that a config's JSON means.

        Raises:
            UserError: it is no config, or none for this model.
        """
        if not text.strip():
            return self._recommended
        if len(text) > MAX_CONFIG:
            raise UserError(f"the pruning config has {len(text):,} characters; the limit is {MAX_CONFIG:,}")
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the pruning config is no JSON: {error}") from error
        for key, value in _leaves(given):
            if key == "clip" or (isinstance(value, str) and value.startswith("@")):
                raise UserError(
                    f"the pruning config names {value!r}, and a page opens no files where its model runs; give such a "
                    "config with --pruning-config, or import the file"
                )
        return self._checkpoint.pruning_config(text)

    def _scaled(self, name: str) -> dict[str, Any]:
        """Knobs to begin with: a method's own, its layers scaled to the model's depth, a quarter of the tokens kept."""
        at = self._layer
        needed: dict[str, dict[str, Any]] = {
            "chain": {
                "steps": [{"method": "divprune", "keep": 0.5}, {"method": "fastv", "layer": at(2), "keep": 0.5}],
            },
            "pyramiddrop": {"layers": [at(8), at(16), at(24)], "keep": [0.5, 0.25, 0.125]},
            "schedule": {"shallow_mid_layer": at(6), "select_layer": at(10), "keep": 16},
            "shortv": {"frozen_layers": list(range(at(20), self.num_layers))},
            "sparsevlm": {"layers": [at(2), at(6), at(15)], "keep": [0.5, 0.25, 0.125]},
        }
        if name in needed:
            return needed[name]
        scaled: dict[str, Any] = {}
        for each in fields(METHODS[name]):
            kind, value = each.metadata.get("kind"), each.default
            if value is None or value is MISSING:
                continue
            if isinstance(kind, Count):
                scaled[each.name] = 0.25
            elif kind is not None and kind.is_layer and value:
                scaled[each.name] = at(value)
        return scaled

    def _layer(self, of_published: int) -> int:
        return min(max(1, round(of_published * self.num_layers / PUBLISHED_LAYERS)), self.num_layers - 1)


def as_text(config: Mapping[str, Any]) -> str:
    """A config as JSON for people: a line a knob, lists in one line."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in config.items())
    return "{\n" + ",\n".join(lines) + "\n}" if config else "{}"


def _given(value: Any) -> Any:
    """What a control holds as a knob's value: nothing as None, numbers in text as numbers, whole ones as integers; else
    as it is, for the config to refuse."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _used(mode: Sequence[str], keep: float | None) -> list[str]:
    """VisiPruner's knobs that matter to a mode, without the mode itself."""
    shallow, middle, deep = (stage in mode for stage in STAGES)
    is_used = {
        "shallow_mid_layer": shallow or middle,
        "layer_threshold": middle,
        "tokens_threshold": middle and keep is None,
        "mid_deep_layer": deep and not middle,
        "exit_threshold": middle and deep,
        "exit_patience": middle and deep,
        "shallow_sink": shallow,
        "probe_rows": middle,
        "relative": middle,
        "keep": middle,
    }
    return [key for key, matters in is_used.items() if matters]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in JSON that is no container, with the nearest key above it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _paper(found: re.Match[str] | None) -> str:
    return f"https://arxiv.org/abs/{found[1]}" if found else ""
