"""Times of things that are done in turns, by two clocks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

CLOCKS = {
    "wall": "seconds that pass: to be trusted on a machine with nothing else to do",
    "cpu": "processor seconds of this process, all its threads together: to be trusted on a shared machine, best with "
    "one thread, as waiting threads count too",
}
"""What the two clocks are, for records."""

ENOUGH = 0.05
"""Seconds that one measurement should take at least; shorter things are done several times in a row."""


@dataclass
class Times:
    """Seconds that one run took, each time it was measured."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def of(self, clock: str) -> list[float]:
        return self.wall if clock == "wall" else self.cpu

    def median(self, clock: str) -> float:
        return statistics.median(self.of(clock))

    def report(self, device: str) -> dict[str, Any]:
        """Median, shortest and longest by each clock; on a GPU only wall time, as the processor waits."""
        return {
            clock: {"median": rounded(self.median(clock)), "least": rounded(min(self.of(clock))),
                    "most": rounded(max(self.of(clock)))}
            for clock in clocks_of(device)
        }  # fmt: skip

    def rate(self, amount: float, device: str) -> dict[str, float]:
        """`amount` a second, by each clock."""
        return {clock: rounded(amount / times["median"]) for clock, times in self.report(device).items()}


def alternate(runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, Times]:
    """Measure each run once a round, in turns, so that a machine whose speed drifts slows all alike.

    Every run is done once before, which is not counted: it compiles, and fills caches. The order is reversed in every
    other round.
    """
    repeats = {}
    for name, run in runs.items():
        run()
        begun = time.perf_counter()
        run()
        wait(device)
        repeats[name] = max(1, round(ENOUGH / (time.perf_counter() - begun)))
    times = {name: Times() for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            wall, cpu = time.perf_counter(), time.process_time()
            for _again in range(repeats[name]):
                runs[name]()
            wait(device)
            times[name].cpu.append((time.process_time() - cpu) / repeats[name])
            times[name].wall.append((time.perf_counter() - wall) / repeats[name])
    return times


def clocks_of(device: str) -> tuple[str, ...]:
    """Those that say something of work on `device`."""
    return ("wall",) if device == "cuda" else ("wall", "cpu")


def faster(slow: Times, fast: Times, device: str) -> dict[str, float]:
    """How many times as fast, by each clock: the ratio of the medians."""
    return {clock: rounded(slow.median(clock) / fast.median(clock)) for clock in clocks_of(device)}


def wait(device: str) -> None:
    """Until a GPU has done all that it was asked to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def rounded(value: float) -> float:
    """With four digits that count."""
    return float(f"{value:.4g}")
