"""Each method's knobs for one and the same *average number of visual tokens a layer*.

The convention: the visual rows that a layer processes while a prompt is read, averaged over all L layers, and over the
prompts. V rows reach the decoder, or fewer where a method chooses before it. Rows that a method merged or made count
like others, text rows never do. So a method that chooses before the decoder keeps as many as are asked for, and one
that chooses inside it keeps fewer, since its first layers held all V.

Knobs that the budget does not settle are the published ones. Layers are published for one model; a budget too small
for them takes earlier ones. Counts are written as shares of V, so that prompts of different lengths meet the budget on
average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isqrt, log
from typing import Any

from llava.inference import Answer
from llava.pruning import METHODS, Method, VisiPruner
from llava.pruning.method import method_named
from llava.pruning.methods import Chain, Pool
from llava.utils import UserError

CONVENTION = "visual rows that a layer processes in the prefill, mean over all layers and all questions with images"
FLOORS = ("random", "stride", "pool")
"""Methods that look at nothing; what looks at something has to beat them."""
PUBLISHED_LAYERS = 32
"""Of the models that PyramidDrop and SparseVLM were published for."""


@dataclass(frozen=True)
class Budget:
    """What knobs are found for.

    Attributes:
        tokens: T, visual tokens a layer that are asked for.
        visual: V, visual tokens of a prompt; of prompts that differ, their mean.
        layers: L, of the decoder.

    Raises:
        UserError: more than there are.
    """

    tokens: int
    visual: int
    layers: int

    def __post_init__(self) -> None:
        if not 0 < self.tokens < self.visual:
            raise UserError(f"{self.tokens} tokens a layer are no budget: the prompts have {self.visual} visual tokens")

    def share(self, count: float) -> float:
        """Of V, as methods take it that round."""
        return round(count / self.visual, 6)

    def mean(self, starts: Sequence[int], counts: Sequence[float]) -> float:
        """Tokens a layer where `counts[i]` rows are left from layer `starts[i]` on, and V before."""
        held = [0, *starts, self.layers]
        rows = [self.visual, *counts]
        spans = zip(rows, held, held[1:], strict=False)
        return sum(count * (stop - start) for count, start, stop in spans) / self.layers


def _before_decoder(budget: Budget) -> dict[str, Any]:
    return {"keep": budget.share(budget.tokens)}


def _after_layer(budget: Budget) -> tuple[int, int]:
    """The published layer 2, else 1, and how many stay from it on."""
    for layer in range(min(2, budget.layers - 1), 0, -1):
        keep = round((budget.tokens * budget.layers - layer * budget.visual) / (budget.layers - layer))
        if keep >= 1:
            return layer, keep
    raise UserError(
        f"{budget.tokens} tokens a layer are too few: layer 0 holds all {budget.visual}, which alone makes "
        f"{budget.visual / budget.layers:.1f} a layer"
    )


def _fastv(budget: Budget) -> dict[str, Any]:
    layer, keep = _after_layer(budget)
    return {"layer": layer, "keep": budget.share(keep)}


def _dart(budget: Budget) -> dict[str, Any]:
    layer, keep = _after_layer(budget)
    return {"layer": layer, "keep": budget.share(keep + 0.5), "exact": True}  # + 0.5: it truncates


def _stages(
    budget: Budget,
    starts: Sequence[int],
    shares: Sequence[float],
    rows: Callable[[int, Sequence[int]], Sequence[int]] = lambda visual, counts: counts,
) -> tuple[list[int], list[int]]:
    """Published stages, scaled: all layers by one factor, never to later ones, and all counts by another.

    Of the layers that meet the budget, those are taken whose counts are nearest to the published shares.

    Args:
        starts: the first layer of each stage but the one of all rows, of `PUBLISHED_LAYERS`.
        shares: of V, what stays in each of them.
        rows: given V and the counts that stay, the rows that are really there.

    Returns:
        First layers, and how many stay.
    """
    fitting = []
    for first in range(max(1, round(budget.layers * starts[0] / PUBLISHED_LAYERS)), 0, -1):
        scaled = [first]
        for start in starts[1:]:
            scaled.append(max(scaled[-1] + 1, round(first * start / starts[0])))
        if scaled[-1] >= budget.layers:
            continue
        lists = [[max(1, round(most * share / shares[0])) for share in shares] for most in range(1, budget.visual)]
        errors = [abs(budget.mean(scaled, rows(budget.visual, counts)) - budget.tokens) for counts in lists]
        nearest = errors.index(min(errors))
        if errors[nearest] <= 1:
            factor = lists[nearest][0] / (shares[0] * budget.visual)
            fitting.append((abs(log(factor)), scaled, lists[nearest]))
    if not fitting:
        raise UserError(
            f"{budget.tokens} of {budget.visual} tokens a layer cannot be had in {len(starts)} stages of a decoder of "
            f"{budget.layers} layers"
        )
    _, scaled, counts = min(fitting)
    return scaled, counts


def _pyramiddrop(budget: Budget) -> dict[str, Any]:
    starts, counts = _stages(budget, (8, 16, 24), (0.5, 0.25, 0.125))
    return {"layers": starts, "keep": [budget.share(count + 0.5) for count in counts]}  # + 0.5: it truncates


def _sparsevlm(budget: Budget) -> dict[str, Any]:
    shares = (0.521, 0.347, 0.191)  # the published 300, 200 and 110 of what they were published for
    starts, counts = _stages(budget, (3, 7, 16), shares, _with_merged)
    return {"layers": [start - 1 for start in starts], "keep": [budget.share(count) for count in counts]}


def _with_merged(visual: int, counts: Sequence[int]) -> list[int]:
    """Rows of SparseVLM: of those that do not stay, 30 % are merged, ten into one."""
    rows: list[int] = []
    there = visual
    for count in counts:
        count = min(count, there - 1)
        there = count + (int(0.3 * (there - count)) + 1) // 10 + 1
        rows.append(there)
    return rows


def _visionzip(budget: Budget) -> dict[str, Any]:
    contextual = round(budget.tokens * 10 / 64)  # published: 54 and 10
    return {"dominant": budget.tokens - contextual, "contextual": contextual}


def _pool(budget: Budget) -> dict[str, Any]:
    sizes = {factor: Pool(factor).blocks(budget.visual).max() + 1 for factor in range(2, isqrt(budget.visual) + 2)}
    return {"factor": min(sizes, key=lambda factor: abs(sizes[factor] - budget.tokens))}


def _vtw(budget: Budget) -> dict[str, Any]:
    return {"layer": min(max(round(budget.tokens * budget.layers / budget.visual), 1), budget.layers - 1)}


def _yopo(budget: Budget) -> dict[str, Any]:
    return {"last": budget.layers - _vtw(budget)["layer"]}


def _st3(budget: Budget) -> dict[str, Any]:
    """The steps nearest to the defaults, an eighth of the layers both to the first and from one to the next, with which
    some number at the end meets the budget; steps of equally many rows down to the last layer make half of V at best,
    so that a smaller budget takes fewer."""
    eighth = max(budget.layers // 8, 1)
    fitting = []
    for layer in range(1, eighth + 1):
        for stride in range(1, budget.layers):
            starts = range(layer, budget.layers, stride)
            gone = [step / len(starts) for step in range(1, len(starts) + 1)]
            # The mean falls with what leaves: V - mean of `gone` over all layers × (V - keep).
            share = budget.mean(starts, [budget.visual * (1 - part) for part in gone]) / budget.visual
            keep = round(budget.visual - (budget.visual - budget.tokens) / (1 - share))
            if 1 <= keep < budget.visual:
                fitting.append((eighth - layer + abs(stride - eighth), layer, stride, keep))
    if not fitting:
        raise UserError(
            f"{budget.tokens} tokens a layer are too few: layer 0 holds all {budget.visual}, which alone makes "
            f"{budget.visual / budget.layers:.1f} a layer"
        )
    _, layer, stride, keep = min(fitting)
    return {"layer": layer, "stride": stride, "keep": budget.share(keep)}


RULES: dict[str, Callable[[Budget], dict[str, Any]]] = {
    "fastv": _fastv,
    "pyramiddrop": _pyramiddrop,
    "sparsevlm": _sparsevlm,
    "dart": _dart,
    "visionzip": _visionzip,
    **dict.fromkeys(("vispruner", "scope", "holov", "cdpruner", "divprune", "random", "stride"), _before_decoder),
    "pool": _pool,
    "vtw": _vtw,
    "yopo": _yopo,
    "st3": _st3,
}
"""Methods whose knobs follow from the budget. `pool`, `vtw` and `yopo` come as near as a whole factor, a whole layer
allows."""


def check_methods(names: Sequence[str]) -> None:
    """Refuse names that `--method` does not take, before anything is read.

    Raises:
        PruningConfigError: no such method; the nearest name is suggested.
        UserError: a method that no number of tokens a layer settles, or a chain that does not end in VisiPruner.
    """
    for name in names:
        first, *behind = name.split("+")
        if behind not in ([], [VisiPruner.name]) or (behind and first == VisiPruner.name):
            raise UserError(
                f"--method {name}: a chain is one method and VisiPruner behind it, like divprune+{VisiPruner.name}; "
                "give others by --config"
            )
        if first not in RULES and first != VisiPruner.name:
            method_named(first)
            raise UserError(
                f"--method {name}: no number of tokens a layer settles its knobs; give them by --config. "
                f"--method takes {', '.join(sorted({*RULES, VisiPruner.name} & METHODS.keys()))}"
            )


def method_for(name: str, budget: Budget) -> Method:
    """The method of that name in `RULES` with knobs that meet the budget.

    Raises:
        UserError: it cannot be met.
    """
    return Method.from_any({"method": name, **RULES[name](budget)})


def tokens_a_layer(answer: Answer) -> float:
    """Visual rows a layer that this answer's prefill processed."""
    text = answer.prompt_rows - answer.visual_tokens
    return sum(rows - text for rows in answer.rows_per_layer) / len(answer.rows_per_layer)


Ask = Callable[[Method], Sequence[Answer]]
"""Answers to some prompts under a method."""


def visipruner_for(tokens: int, config: Method, ask: Ask) -> Method:
    """VisiPruner with the `tokens_threshold` that comes nearest to a budget on some prompts.

    Args:
        tokens: visual tokens a layer that are asked for.
        config: the other knobs, the model's own.
        ask: answers to these prompts.

    Raises:
        UserError: no middle stage, or no threshold comes near.
    """
    if not isinstance(config, VisiPruner) or not config.middle:
        raise UserError("the model's own config is none of VisiPruner with a middle stage; give its knobs by --config")
    # Any threshold does to see the lengths that it will be held against.
    config = replace(config, keep=None, tokens_threshold=config.tokens_threshold or 1.0)
    norms = sorted(
        float(norm)
        for answer in ask(config)
        if answer.trace is not None and (lengths := answer.trace.selection_measure(config.length)) is not None
        for norm in lengths
        if norm > 0
    )
    method, got = _nearest(tokens, len(norms), lambda place: replace(config, tokens_threshold=norms[place]), ask)
    if method is None or _is_far(got, tokens):
        reached = "it selects nothing" if method is None else f"the nearest that it gives is {got:.1f}"
        raise UserError(
            f"no 'tokens_threshold' gives {tokens} tokens a layer with the model's other thresholds ({reached}); "
            "give its knobs by --config"
        )
    return method


def chain_for(first: str, budget: Budget, last: Method, ask: Ask) -> Method:
    """`first`, and behind it `last` with its knobs as they are: the number that `first` keeps is found on some prompts.

    Args:
        first: a method in `RULES` that decides before `last` does.
        last: VisiPruner with the model's own knobs.
        ask: answers to these prompts.

    Raises:
        UserError: no number comes near the budget, or both decide behind the same layers.
    """

    def chain(left_out: int) -> Method:
        step = method_for(first, replace(budget, tokens=budget.visual - 1 - left_out))
        return Chain((step, last)).validate_for(budget.layers)

    method, got = _nearest(budget.tokens, budget.visual - 1, chain, ask)
    if method is None or _is_far(got, budget.tokens):
        raise UserError(
            f"no number of tokens that {first!r} keeps gives {budget.tokens} tokens a layer with the model's own "
            f"{last.name!r} behind it (the nearest is {got:.1f}); give its knobs by --config"
        )
    return method


def _nearest(tokens: int, count: int, method_at: Callable[[int], Method], ask: Ask) -> tuple[Method | None, float]:
    """Of `count` methods that leave fewer tokens from one to the next, that nearest to `tokens` a layer, by bisection,
    and what it leaves; None where there are none.

    Raises:
        UserError: what the first of them says, where none can be had.
    """
    tried: dict[float, Method] = {}
    refused: UserError | None = None
    low, high = 0, count - 1
    while low <= high and len(tried) < 10:
        middle = (low + high) // 2
        try:
            method = method_at(middle)
        except UserError as error:  # so few cannot be had
            refused, high = refused or error, middle - 1
            continue
        answers = ask(method)
        got = sum(map(tokens_a_layer, answers)) / len(answers)
        tried[got] = method
        if got > tokens:
            low = middle + 1
        else:
            high = middle - 1
    if refused is not None and not tried:
        raise refused
    if not tried:
        return None, 0.0
    nearest = min(tried, key=lambda got: abs(got - tokens))
    return tried[nearest], nearest


def _is_far(got: float, tokens: int) -> bool:
    return abs(got - tokens) > max(1, 0.05 * tokens)
