"""What is asked for, and which of the configs that were run meets it best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from llava.eval.verdicts import DRAWS, interval_of
from llava.pruning import Method
from llava.utils import UserError


@dataclass(frozen=True)
class Figure:
    """A mean over prompts and its 95 % bootstrap interval, pictures resampled whole."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], groups: Sequence[int], seed: int) -> Figure:
        """`groups`: of each value, the number of its picture."""
        sums, counts = np.bincount(groups, values), np.bincount(groups)
        sums, counts = sums[counts > 0], counts[counts > 0]
        drawn = np.random.default_rng(seed).integers(len(sums), size=(DRAWS, len(sums)))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
        low, high = np.quantile(means, (0.025, 0.975))
        return cls(float(np.mean(values)), float(low), float(high))

    @classmethod
    def of_shares(cls, values: Sequence[float], groups: Sequence[int], seed: int) -> Figure:
        """The same of values 0 and 1. Where all are equal no resampling differs; the other end is Wilson's, one trial
        a picture."""
        if 0 < sum(values) < len(values):
            return cls.of(values, groups, seed)
        return cls(float(values[0]), *interval_of([bool(values[0])] * len(set(groups))))

    @property
    def error(self) -> float:
        """About one standard error."""
        return (self.high - self.low) / 4


@dataclass(frozen=True)
class Result:
    """How a config did on one half of the prompts.

    Attributes:
        method: the config.
        n: prompts.
        agreement: greedy answers equal to the dense ones, token by token, 0 … 1.
        divergence: `KL(dense || pruned)` of the first answer token, natural logarithm.
        saved: executed prefill FLOPs, 0 … 1.
        tokens: visual tokens a layer.
        milliseconds: to the first token, median over some prompts; None: not measured.
        time_ratio: to that of the dense run on the same prompts, taken in turns; None: not measured.
    """

    method: Method
    n: int
    agreement: Figure
    divergence: Figure
    saved: Figure
    tokens: Figure
    milliseconds: float | None = None
    time_ratio: float | None = None


@dataclass(frozen=True)
class Goal:
    """One of the three budgets.

    Attributes:
        save_flops: executed prefill FLOPs to be saved at least, share of dense.
        max_ms: milliseconds to the first token at most; `relative`: times the dense run's.
        min_agreement: answers that must be as dense at least, share.

    Raises:
        UserError: none of them, several, or a value that nothing can meet.
    """

    save_flops: float | None = None
    max_ms: float | None = None
    relative: bool = False
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.save_flops, self.max_ms, self.min_agreement) if value is not None]
        if len(given) != 1:
            raise UserError("one budget is needed: --save-flops 0.4, --max-ms 0.6x or --min-agreement 0.98")
        if self.save_flops is not None and not 0 < self.save_flops < 1:
            raise UserError(f"--save-flops {self.save_flops}: a share of the dense run's is needed, between 0 and 1")
        if self.min_agreement is not None and not 0 < self.min_agreement <= 1:
            raise UserError(f"--min-agreement {self.min_agreement}: a share is needed, above 0 and at most 1")
        if self.max_ms is not None and not 0 < self.max_ms < (1 if self.relative else inf):
            raise UserError("--max-ms: milliseconds above 0 are needed, or a share of the dense run's like 0.6x")

    @classmethod
    def parse(cls, save_flops: float | None, max_ms: str | None, min_agreement: float | None) -> Goal:
        """From the command line."""
        if max_ms is None:
            return cls(save_flops, None, False, min_agreement)
        relative = max_ms.lower().endswith("x")
        try:
            value = float(max_ms[:-1] if relative else max_ms.removesuffix("ms"))
        except ValueError:
            raise UserError(f"--max-ms {max_ms!r}: milliseconds are needed, or a share like 0.6x") from None
        return cls(save_flops, value, relative, min_agreement)

    @property
    def needs_time(self) -> bool:
        return self.max_ms is not None

    def __str__(self) -> str:
        if self.save_flops is not None:
            return f"at least {self.save_flops:.1%} of executed prefill FLOPs saved"
        if self.min_agreement is not None:
            return f"at least {self.min_agreement:.1%} of greedy answers as dense"
        return f"first token in at most {self.max_ms:g}{' times the dense time' if self.relative else ' ms'}"

    def to_dict(self) -> dict[str, float | str]:
        """Plain values."""
        if self.max_ms is not None:
            return {"max_ms": f"{self.max_ms:g}x" if self.relative else self.max_ms}
        given = {"save_flops": self.save_flops, "min_agreement": self.min_agreement}
        return {name: value for name, value in given.items() if value is not None}

    def expected_saving(self) -> float | None:
        """FLOPs to be saved so that the budget may be met; None: only running tells."""
        if self.save_flops is not None:
            return self.save_flops
        return 1 - self.max_ms if self.max_ms is not None and self.relative else None

    def shortfall(self, result: Result) -> float:
        """By how much a result misses the budget; 0 or less: it meets it."""
        if self.save_flops is not None:
            return self.save_flops - result.saved.mean
        if self.min_agreement is not None:
            return self.min_agreement - result.agreement.mean
        took = result.time_ratio if self.relative else result.milliseconds
        assert took is not None and self.max_ms is not None
        return took / self.max_ms - 1

    def ranked(self, results: Sequence[Result]) -> list[Result]:
        """Those that meet the budget, the one to take first.

        With a bound on agreement: the most FLOPs saved. Else the least divergence among those whose agreement is
        within one standard error of the best, since divergence tells near configs apart where agreement cannot; then
        the others by agreement. A bound on FLOPs must be met by the lower end of the interval where anything does, so
        that other prompts meet it too.
        """
        meeting = [each for each in results if self.shortfall(each) <= 0]
        if self.min_agreement is not None:
            return sorted(meeting, key=lambda each: (-each.saved.mean, each.divergence.mean))
        if self.save_flops is not None:
            safe = [each for each in meeting if each.saved.low >= self.save_flops]
            meeting = safe or meeting
        if not meeting:
            return []
        best = max(meeting, key=lambda each: (each.agreement.mean, -each.agreement.error)).agreement
        return sorted(
            meeting,
            key=lambda each: (
                max(0.0, best.mean - best.error - each.agreement.mean),
                each.divergence.mean,
            ),
        )
