"""Interleaved timing: all variants in one run, in turns, with the device synchronised around every call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass
class Timings:
    """Seconds of every repetition, `{variant: [...]}`; entry i of all variants was taken in the same turn.

    Attributes:
        wall: by the clock on the wall.
        cpu: processor time of this process. On a CPU that other programs use too it is the steadier clock; with a
            GPU it only says what the host spends.
    """

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]

    def add(self, name: str, wall: float, cpu: float) -> None:
        self.wall[name].append(wall)
        self.cpu[name].append(cpu)

    def clock(self, name: str) -> dict[str, list[float]]:
        return {"wall": self.wall, "cpu": self.cpu}[name]

    def summary(self, variant: str, clock: str = "wall") -> dict[str, float]:
        """Median, 10th and 90th percentile in milliseconds."""
        p10, median, p90 = np.percentile(self.clock(clock)[variant], [10, 50, 90]) * 1e3
        return {"median_ms": float(median), "p10_ms": float(p10), "p90_ms": float(p90)}

    def ratio(self, over: str, under: str, clock: str = "wall") -> float:
        """Median over the turns of `over`'s time divided by `under`'s."""
        times = self.clock(clock)
        return float(np.median(np.array(times[over]) / np.array(times[under])))


def interleave(
    runs: dict[str, Callable[[], object]], device: torch.device, repetitions: int, warmup: int = 1
) -> Timings:
    """Time every run `repetitions` times, in turns whose order rotates, after `warmup` turns that do not count."""
    names = list(runs)
    timings = Timings({name: [] for name in names}, {name: [] for name in names})
    for turn in range(warmup + repetitions):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            cpu, wall = time.process_time(), time.perf_counter()
            result = runs[name]()
            synchronize(device)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            del result  # before the next one allocates
            if turn >= warmup:
                timings.add(name, wall, cpu)
    return timings
