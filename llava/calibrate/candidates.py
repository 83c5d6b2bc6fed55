"""Configs worth trying, with what the measures say of them before any of them is run.

VisiPruner's thresholds are swept on the recorded shares: its own `decide` is shown them layer by layer, as the engine
would. Up to the first selection nothing was pruned, so what it says of the selecting layer and the kept tokens is what
a real run does. Cosines behind a drop were measured with all tokens there; a real run, which has fewer, may leave
(`deep`) earlier or later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llava.calibrate.measure import Measures, contribution_order
from llava.eval.budgets import RULES, Budget, method_for
from llava.pruning import Method, PruningTrace, VisiPruner
from llava.pruning.decisions import Cause
from llava.pruning.flops import DecoderShape, dense_trace, executed_flops
from llava.pruning.methods import VTW, ShortV
from llava.pruning.trace import Decision
from llava.utils import UserError

METHODS = (VisiPruner.name, "shortv", *sorted(RULES))
"""Methods that can be calibrated."""

# Of VisiPruner's grid.
_QUANTILES = (0.02, 0.25, 0.5)
_KEPT_SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7)
_EXITS = (0.999, 0.9999)
# Of the visual tokens, for methods that a number of tokens a layer settles.
_TOKEN_SHARES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Candidate:
    """A config and what is expected of it.

    Attributes:
        method: the config.
        saving: executed prefill FLOPs that it saves, 0 … 1, as predicted.
        unread: of all that the last row reads of the image in the dense run (lengths of shares, summed over layers),
            what it could not read under this config; None: not predicted.
    """

    method: Method
    saving: float
    unread: float | None = None


def key_of(method: Method) -> str:
    """A config as one line of JSON, to tell configs apart by."""
    return json.dumps(method.to_dict(), sort_keys=True)


@dataclass(frozen=True)
class Recording:
    """What was measured on the prompts to choose on.

    Attributes:
        measures: of each prompt.
        boundaries: the second and further entries of their shares.
        shape: of the decoder.
        first_layer: the first at whose input rows may be missing.
    """

    measures: Sequence[Measures]
    boundaries: Sequence[int]
    shape: DecoderShape
    first_layer: int = 0


# --- offline ---


def replay(method: VisiPruner, measures: Measures, boundaries: Sequence[int]) -> PruningTrace:
    """What `method` does to a prompt, by its measures: rows per layer, kept tokens, exit.

    Exact up to the first decision, and for `rows_per_layer` behind it where `deep` is off.

    Args:
        method: the config; with the shallow stage, `shallow_mid_layer` is one of `boundaries`.
    """
    trace = measures.trace()
    run = [None, *boundaries].index(method.shallow_mid_layer) if method.shallow else 0
    num_layers = measures.cosine.shape[1]
    looks, decides = method.looks_behind(num_layers), method.decides_behind(num_layers)
    text = trace.num_rows - trace.num_visual
    alive = np.arange(trace.num_visual)
    for layer in range(num_layers):
        trace.rows_per_layer.append(text + len(alive))
        if layer not in decides or not len(alive):
            continue
        measured = None
        if layer in looks and (method.deep or not trace.decisions):
            measured = {"cosine": measures.cosine[run, layer, alive], "norm": measures.norm[run, layer, alive]}
            trace.smallest_cosine[layer] = float(measured["cosine"].min())
        keep = method.decide(layer, measured, trace)
        if keep is None or (layer + 1 == num_layers and keep.cause is Cause.EXIT):
            continue
        before = measures.visual[alive]
        trace.decisions.append(Decision(layer, keep.cause, keep.positions(before), {}, measured or {}, before))
        alive = alive[keep.rows]
    return trace


def unread_share(method: VisiPruner, trace: PruningTrace, measures: Measures) -> float:
    """Of what the dense run's last row reads of the image, what `method` keeps it from; see `Candidate.unread`."""
    lengths = measures.norm[0].astype(np.float64)
    hidden = np.zeros_like(lengths, dtype=bool)
    if method.shallow and method.shallow_mid_layer is not None:
        hidden[: method.shallow_mid_layer] = True
    for decision in trace.decisions:
        gone = np.isin(measures.visual, decision.positions, invert=True)
        hidden[decision.layer + 1 :, gone] = True
    return float(lengths[hidden].sum() / lengths.sum())


def saving_of(trace: PruningTrace, shape: DecoderShape, updated: Sequence[int] = ()) -> float:
    """Executed prefill FLOPs that rows per layer save, without what choosing costs.

    Args:
        updated: rows that each layer updates; none: all.
    """
    trace.updated_rows_per_layer = list(updated) or trace.rows_per_layer
    asked = zip(trace.updated_rows_per_layer, trace.rows_per_layer, strict=True)
    trace.score_pairs = trace.value_pairs = [shape.num_heads * asking * there for asking, there in asked]
    return 1 - executed_flops(trace, shape) / executed_flops(dense_trace(trace, shape), shape)


# --- families of configs ---


def visipruner_candidates(recording: Recording, sink: str | None = None) -> list[Candidate]:
    """A grid over boundaries and thresholds, the latter at what was measured; one config for each outcome."""
    measures = recording.measures
    found: dict[tuple, Candidate] = {}
    for method in _grid(recording, sink):
        traces = [replay(method, each, recording.boundaries) for each in measures]
        saving = float(np.mean([saving_of(trace, recording.shape) for trace in traces]))
        unread = float(np.mean([unread_share(method, *each) for each in zip(traces, measures, strict=True)]))
        if saving > 0.01:
            found.setdefault((round(saving, 4), round(unread, 6)), Candidate(method, saving, unread))
    return list(found.values())


def _grid(recording: Recording, sink: str | None) -> Iterator[VisiPruner]:
    layers = recording.shape.num_layers
    earliest = max(1, recording.first_layer - 2)
    ways: list[tuple[tuple[str, ...], int, int]]
    ways = [(("middle", "deep"), boundary, 0) for boundary in range(earliest, max(earliest, layers // 2) + 1)]
    ways += [(("shallow", "middle", "deep"), boundary, run + 1) for run, boundary in enumerate(recording.boundaries)]
    for mode, boundary, run in ways:
        if not earliest <= boundary < layers - 2:
            continue
        # The smallest cosine of each prompt in the first layer that may select, and over all that may.
        cosines = np.stack([each.cosine[run, boundary + 1 :].min(-1) for each in recording.measures])
        thresholds = {_above(cosines[:, 0].max())}
        thresholds |= {_above(float(value)) for value in np.quantile(cosines.min(1), _QUANTILES)}
        for threshold in sorted(thresholds):
            norms = _norms_at_selection(recording, run, boundary, threshold)
            if not len(norms):
                continue
            for keep, exit_threshold in ((keep, leave) for keep in _KEPT_SHARES for leave in _EXITS):
                cut = _significant(float(np.quantile(norms, 1 - keep)))
                if cut > 0:
                    yield VisiPruner(
                        mode,
                        shallow_mid_layer=boundary,
                        layer_threshold=threshold,
                        tokens_threshold=cut,
                        exit_threshold=exit_threshold,
                        shallow_sink=sink if "shallow" in mode else None,
                    )


def _norms_at_selection(recording: Recording, run: int, boundary: int, threshold: float) -> np.ndarray:
    """The lengths of all prompts' shares, each in the layer that selects; empty where few prompts select."""
    norms = []
    for each in recording.measures:
        selects = np.flatnonzero(each.cosine[run, boundary + 1 :].min(-1) < threshold)
        if len(selects):
            norms.append(each.norm[run, boundary + 1 + selects[0]])
    return np.concatenate(norms) if 2 * len(norms) > len(recording.measures) else np.empty(0)


def _above(cosine: float) -> float:
    """A threshold that this cosine falls below, in few digits."""
    gap = max(1 - cosine, 1e-6)
    return round(max(1 - _significant(gap * 0.9), 1e-6), 9)


def _significant(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits - 1}e}")


def withdrawal_candidates(recording: Recording) -> list[Candidate]:
    """VTW at every layer."""
    shape = recording.shape
    candidates = []
    for layer in range(max(1, recording.first_layer), shape.num_layers):
        savings = []
        for each in recording.measures:
            trace = each.trace()
            text = trace.num_rows - trace.num_visual
            trace.rows_per_layer = [trace.num_rows] * layer + [text] * (shape.num_layers - layer)
            savings.append(saving_of(trace, shape))
        candidates.append(Candidate(VTW(layer), float(np.mean(savings))))
    return candidates


def frozen_candidates(recording: Recording) -> list[Candidate]:
    """ShortV with the first 1, 2, … layers of its order."""
    shape = recording.shape
    order = contribution_order(np.stack([each.frozen for each in recording.measures]))
    candidates = []
    for count in range(1, len(order) + 1):
        frozen = sorted(recording.first_layer + layer for layer in order[:count])
        savings = []
        for each in recording.measures:
            trace = each.trace()
            trace.rows_per_layer = [trace.num_rows] * shape.num_layers
            updated = [trace.num_rows - trace.num_visual * (layer in frozen) for layer in range(shape.num_layers)]
            savings.append(saving_of(trace, shape, updated))
        candidates.append(Candidate(ShortV(tuple(frozen)), float(np.mean(savings))))
    return candidates


def token_candidates(name: str, recording: Recording, saving: Callable[[Method], float]) -> list[Candidate]:
    """A method at several numbers of tokens a layer.

    Args:
        saving: what a config saves, from running it on a prompt.

    Raises:
        UserError: the method does not fit the model at all; why.
    """
    visual = round(float(np.mean([len(each.visual) for each in recording.measures])))
    found: dict[str, Candidate] = {}
    why: UserError | None = None
    for share in _TOKEN_SHARES:
        try:
            method = method_for(name, Budget(max(1, round(share * visual)), visual, recording.shape.num_layers))
            if key_of(method) not in found:
                found[key_of(method)] = Candidate(method, saving(method))
        except UserError as error:
            why = error
    if not found and why is not None:
        raise why
    return list(found.values())


# --- which of them to run ---


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """By ascending saving, those that no other beats in saving and in what stays unread."""
    best: list[Candidate] = []
    least = float("inf")
    for each in sorted(candidates, key=lambda one: (-one.saving, one.unread or 0)):
        if each.unread is None or each.unread < least:
            best.append(each)
            least = least if each.unread is None else each.unread
    return best[::-1]


def spread(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """At most `count` of them, at even distances of saving."""
    if len(candidates) <= count:
        return list(candidates)
    wanted = np.linspace(candidates[0].saving, candidates[-1].saving, count)
    savings = np.asarray([each.saving for each in candidates])
    return [candidates[place] for place in dict.fromkeys(int(np.abs(savings - each).argmin()) for each in wanted)]


def near(candidates: Sequence[Candidate], saving: float, count: int) -> list[Candidate]:
    """At most `count` that save at least `saving` as predicted, the most promising first.

    Of one boundary of VisiPruner no more than two, since what stays unread is a guess.
    """
    enough = [each for each in candidates if each.saving >= saving]
    enough.sort(key=lambda each: (each.unread if each.unread is not None else each.saving, each.saving))
    taken: list[Candidate] = []
    of_boundary: dict[tuple, int] = {}
    for each in enough:
        method = each.method
        key = (method.shallow, method.shallow_mid_layer) if isinstance(method, VisiPruner) else (len(taken),)
        of_boundary[key] = of_boundary.get(key, 0) + 1
        if of_boundary[key] <= 2:
            taken.append(each)
        if len(taken) == count:
            break
    return taken
