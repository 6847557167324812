"""Figures for Prometheus, in its text format."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the classes of a histogram."""


class Histogram:
    """How many durations fell into each class."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    @property
    def mean(self) -> float:
        """0 before the first."""
        return self.total / max(1, sum(self.counts))

    def lines(self, name: str) -> list[str]:
        below, lines = 0, []
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {below}"]


class Metrics:
    """What one server has counted since its start.

    Attributes:
        requests: (route, status) -> HTTP requests answered.
        refused: requests turned away because the server was full or ending.
        abandoned: requests whose client went away before the end.
        waited, first, whole: seconds until an answer got a slot, until its first token, until its end, all since it
            was asked for.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.refused = 0
        self.abandoned = 0
        self.waited, self.first, self.whole = Histogram(), Histogram(), Histogram()

    def text(self, gauges: Mapping[str, tuple[str, float]], counters: Mapping[str, tuple[str, float]]) -> str:
        """The page; `gauges` and `counters` are further figures, name -> (help, value)."""
        lines = ["# HELP rookery_requests_total HTTP requests answered", "# TYPE rookery_requests_total counter"]
        lines += [
            f'rookery_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        counters = {
            "rookery_refused_total": ("Requests turned away: queue full, or server ending", self.refused),
            "rookery_abandoned_total": ("Requests whose client went away", self.abandoned),
            **counters,
        }
        for kind, figures in (("counter", counters), ("gauge", gauges)):
            for name, (about, value) in figures.items():
                lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", f"{name} {value}"]
        histograms = {
            "rookery_queue_seconds": ("Until an answer got a slot", self.waited),
            "rookery_first_token_seconds": ("Until the first token", self.first),
            "rookery_answer_seconds": ("Until the end of the answer", self.whole),
        }
        for name, (about, histogram) in histograms.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(lines) + "\n"
