"""What every single answer gives to a score, and from that the interval of a difference between two runs.

A scorer's `judge_files` gives the `Verdicts` of an answers file. Drawing questions again and again, with replacement
and the same ones for both runs (a paired bootstrap), says how far a difference of scores may be chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

DRAWS, SEED = 2000, 0
_DRAWS_AT_ONCE = 100  # bounds the memory: draws × questions numbers

Sums = Mapping[str, np.ndarray]
"""By group, sums of `Verdicts.parts` over its questions, `[draws, k]`."""


@dataclass(frozen=True)
class Verdicts:
    """The answers of one run, judged one by one, in an order that every run over the same questions has.

    Attributes:
        values: what each answer is worth by itself, from 0 to 1, float64 `[n]`.
        groups: the category of each, `[n]`; every draw has as many questions of a category as there are.
        units: what each is drawn together with (MME: the questions of a picture), `[n]`.
        parts: what the score adds up of each, float64 `[n, k]`.
        score: sums by group → scores `[draws]`, by the benchmark's rule.
    """

    values: np.ndarray
    groups: np.ndarray
    units: np.ndarray
    parts: np.ndarray
    score: Callable[[Sums], np.ndarray]

    @classmethod
    def of_mean(cls, values: Sequence[float]) -> Verdicts:
        """Where the score is the mean of the answers' values, in per cent."""
        worth = np.array(values, dtype=np.float64)
        one_group = np.zeros(len(worth), dtype=np.int64).astype(str)
        parts = np.stack([worth, np.ones_like(worth)], axis=1)
        return cls(worth, one_group, np.arange(len(worth)), parts, _percent)

    def total(self) -> float:
        """The benchmark's score."""
        (score,) = self.score(
            {group: self.parts[self.groups == group].sum(0)[None] for group in np.unique(self.groups)}
        )
        return float(score)


def _percent(sums: Sums) -> np.ndarray:
    (all_of_them,) = sums.values()
    return 100 * all_of_them[:, 0] / all_of_them[:, 1]


def difference_interval(
    run: Verdicts, other: Verdicts, draws: int = DRAWS, seed: int = SEED, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of `run`'s score minus `other`'s.

    Raises:
        ValueError: they are not verdicts on the same questions.
    """
    if not (np.array_equal(run.groups, other.groups) and np.array_equal(run.units, other.units)):
        raise ValueError("the two runs were not asked the same questions")
    generator = np.random.default_rng(seed)
    differences = []
    for begin in range(0, draws, _DRAWS_AT_ONCE):
        count = min(_DRAWS_AT_ONCE, draws - begin)
        sums: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
        for group in np.unique(run.groups):
            own = run.groups == group
            units, which = np.unique(run.units[own], return_inverse=True)
            times = generator.multinomial(len(units), np.full(len(units), 1 / len(units)), size=count)[:, which]
            for added, verdicts in zip(sums, (run, other), strict=True):
                added[group] = times @ verdicts.parts[own]
        differences.append(run.score(sums[0]) - other.score(sums[1]))
    edges = 50 * (1 - level), 50 * (1 + level)
    low, high = np.percentile(np.concatenate(differences), edges)
    return float(low), float(high)


def interval_of(same: Sequence[bool]) -> list[float]:
    """95 % interval of a share (Wilson's), which is one of positive length even where all agree."""
    z, count = NormalDist().inv_cdf(0.975), len(same)
    share, shrunk = sum(same) / count, 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / shrunk
    half = z / shrunk * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    return [max(0.0, centre - half), min(1.0, centre + half)]
