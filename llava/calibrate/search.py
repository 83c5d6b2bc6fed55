"""Measure, sweep, run, choose: from prompts and a goal to a config that was checked on prompts it was not chosen on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llava.calibrate.candidates import (
    METHODS,
    Candidate,
    Recording,
    front,
    frozen_candidates,
    key_of,
    near,
    spread,
    token_candidates,
    visipruner_candidates,
    withdrawal_candidates,
)
from llava.calibrate.goal import Goal, Result
from llava.calibrate.measure import Measures, Wanted, measure
from llava.calibrate.runs import Runs
from llava.eval import budgets
from llava.inference import LoadedModel, Prompt
from llava.pruning import VisiPruner
from llava.pruning.families import adapter_for
from llava.utils import UserError

FLOOR = "random"
"""Looks at nothing; run beside every method."""
_BOUNDARIES = 8
_NEAR, _ALONG, _REFINED = 6, 4, 4
_LOOKS = 3
_MEASURED = 96  # prompts, evenly among those to choose on; all of these are run


@dataclass
class Family:
    """What came of one method.

    Attributes:
        name: the method's.
        candidates: all that were thought of; those that were run are in `results`.
        results: on the prompts to choose on.
        held_out: of the config that was taken, on the others; the nearest one where none meets the goal.
        meets: whether it meets the goal on both halves.
        looks: configs that were tried on the held-out half until one met the goal.
        why_not: why the method could not be tried.
    """

    name: str
    candidates: list[Candidate] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    held_out: Result | None = None
    meets: bool = False
    looks: int = 0
    why_not: str = ""


def wanted_for(methods: Sequence[str], loaded: LoadedModel) -> Wanted:
    """What must be measured for these methods."""
    adapter = adapter_for(loaded.model)
    layers, first = len(adapter.layers), adapter.first_layer
    visipruner = VisiPruner.name in methods
    last = min(max(1, layers // 2), layers - 3)
    earliest = max(1, first - 2)
    boundaries = sorted({round(each) for each in np.linspace(earliest, last, _BOUNDARIES)}) if visipruner else []
    return Wanted(
        withdrawals=range(max(1, first), layers) if visipruner or "vtw" in methods else (),
        frozen=range(first, layers) if "shortv" in methods else (),
        boundaries=[each for each in boundaries if max(1, first) <= each < layers - 2],
        sink=VisiPruner(()).sink_for(str(loaded.checkpoint.model_path), layers),
        shares=visipruner,
    )


def measure_all(
    loaded: LoadedModel, prompts: Sequence[Prompt], numbers: Sequence[int], wanted: Wanted, folder: Path
) -> list[Measures]:
    """The measures of some prompts; those that lie in `folder` already are read."""
    measured = []
    model = loaded.model
    for number in tqdm(numbers, desc="measuring", unit="prompt", dynamic_ncols=True):
        file = folder / f"measures-{number}.npz"
        measures = Measures.load(file)
        if measures is None:
            given = loaded.inputs_for([prompts[number]] * (2 if wanted.boundaries else 1))
            measures = measure(model, wanted, given)
            measures.save(file)
        measured.append(measures)
    return measured


def families_of(methods: Sequence[str], recording: Recording, runs: Runs, sink: str) -> list[Family]:
    """Candidates of every method, and of the floor."""
    families = []
    for name in dict.fromkeys([*methods, FLOOR]):
        family = Family(name)
        try:
            if name == VisiPruner.name:
                family.candidates = visipruner_candidates(recording, sink)
            elif name == "vtw":
                family.candidates = withdrawal_candidates(recording)
            elif name == "shortv":
                family.candidates = frozen_candidates(recording)
            else:
                family.candidates = token_candidates(name, recording, runs.saving)
        except UserError as error:
            family.why_not = str(error)
        if not family.candidates and not family.why_not:
            family.why_not = "none of its knobs saves anything on these prompts"
            if name == VisiPruner.name and recording.shape.num_layers < 4:
                family.why_not = (
                    f"it needs 4 layers to see, select and leave in; there are {recording.shape.num_layers}"
                )
        families.append(family)
    return families


def run_candidates(families: Sequence[Family], goal: Goal, runs: Runs, half: Sequence[int]) -> None:
    """Run about ten candidates of each method, first along all savings and near the goal, then where it is decided."""
    wanted = goal.expected_saving()
    first: list[tuple[Family, list[Candidate]]] = []
    for family in families:
        best = front(family.candidates)
        if family.name == FLOOR or wanted is None:
            chosen = spread(best, _NEAR)
        else:
            chosen = near(family.candidates, wanted, _NEAR) + spread(best, _ALONG)
        first.append((family, list({id(each): each for each in chosen}.values())))
    total = sum(len(chosen) for _, chosen in first)
    with tqdm(total=total, desc="running", unit="config", dynamic_ncols=True) as bar:
        for family, chosen in first:
            try:
                family.results = _run(chosen, goal, runs, half, bar)
                again = _between(family, goal) if family.name != FLOOR else []
                bar.total += len(again)
                family.results += _run(again, goal, runs, half, bar)
            except UserError as error:  # a prompt that this method refuses; the others go on
                family.results, family.why_not = [], str(error)


def _run(chosen: Sequence[Candidate], goal: Goal, runs: Runs, half: Sequence[int], bar: tqdm) -> list[Result]:
    results = []
    for candidate in chosen:
        results.append(runs.result(candidate.method, half))
        bar.update()
    return runs.timed(results, half) if goal.needs_time and results else results


def _between(family: Family, goal: Goal) -> list[Candidate]:
    """Candidates that save more than the best that meets the goal and less than the next that does not, or the other
    way round; where the goal is met everywhere or nowhere, beyond the last one run."""
    run = {key_of(result.method) for result in family.results}
    results = sorted(family.results, key=lambda result: result.saved.mean)
    if not results:
        return []
    meets = [goal.shortfall(result) <= 0 for result in results]
    falls = goal.min_agreement is not None  # more saving meets it less
    order = list(zip(results, meets, strict=True))
    if falls:
        low = max((result.saved.mean for result, met in order if met), default=0.0)
        high = min((result.saved.mean for result, met in order if not met and result.saved.mean > low), default=1.0)
    else:
        high = min((result.saved.mean for result, met in order if met), default=1.0)
        low = max((result.saved.mean for result, met in order if not met and result.saved.mean < high), default=0.0)
    left = [each for each in front(family.candidates) if low < each.saving < high and key_of(each.method) not in run]
    return spread(left, _REFINED)


def check_held_out(families: Sequence[Family], goal: Goal, runs: Runs, half: Sequence[int]) -> None:
    """Look at the config that each method's results speak for on the other half; the next one where it fails there."""
    for family in families:
        if not family.results:
            continue
        ranked = goal.ranked(family.results)
        nearest = min(family.results, key=goal.shortfall)
        for method in [result.method for result in ranked[:_LOOKS]] or [nearest.method]:
            family.looks += 1
            result = runs.result(method, half)
            (result,) = runs.timed([result], half) if goal.needs_time else (result,)
            if family.held_out is None or goal.shortfall(result) < goal.shortfall(family.held_out):
                family.held_out = result
            if ranked and goal.shortfall(result) <= 0:
                family.held_out, family.meets = result, True
                break


def winner(families: Sequence[Family], goal: Goal) -> Family | None:
    """The method to take, by the prompts that were chosen on; None: none meets the goal."""
    of = {key_of(family.held_out.method): family for family in families if family.meets and family.held_out is not None}
    results = [result for family in of.values() for result in family.results if key_of(result.method) in of]
    ranked = goal.ranked(results)
    return of[key_of(ranked[0].method)] if ranked else None


@dataclass
class Calibration:
    """What was found.

    Attributes:
        goal: what was asked for.
        families: of every method, and of the floor.
        best: the one to take; None: none meets the goal.
        recording: what was measured.
        wanted: where it was measured.
    """

    goal: Goal
    families: list[Family]
    best: Family | None
    recording: Recording
    wanted: Wanted


def calibrate(
    goal: Goal, methods: Sequence[str], runs: Runs, choosing: Sequence[int], held_out: Sequence[int], folder: Path
) -> Calibration:
    """The whole way.

    Args:
        choosing, held_out: numbers of the prompts of `runs`.
        folder: for measures, so that a killed run goes on.
    """
    loaded = runs.loaded
    wanted = wanted_for(methods, loaded)
    measured = [choosing[round(place)] for place in np.linspace(0, len(choosing) - 1, min(_MEASURED, len(choosing)))]
    measures = measure_all(loaded, runs.prompts, measured, wanted, folder)
    first_layer = adapter_for(loaded.model).first_layer
    recording = Recording(measures, wanted.boundaries, loaded.shape, first_layer)
    families = families_of(methods, recording, runs, wanted.sink)
    run_candidates(families, goal, runs, choosing)
    check_held_out(families, goal, runs, held_out)
    asked = [family for family in families if family.name in methods]
    return Calibration(goal, families, winner(asked, goal), recording, wanted)


def check_methods(text: str) -> list[str]:
    """`--method`: names, or `all`.

    Raises:
        UserError: one that cannot be calibrated.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return list(METHODS)
    if not names:
        raise UserError(f"--method {text!r}: names of methods are needed, like visipruner,fastv, or all")
    budgets.check_methods([name for name in names if name not in METHODS])
    return list(dict.fromkeys(names))
