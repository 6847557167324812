"""metrics.jsonl as columns, read on as it grows, and thinned out for a chart."""

from __future__ import annotations

import json
import math
import threading
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Any

COLUMNS = ("step", "loss", "lr", "grad_norm", "tok_s", "memory", "time")
"""What a line of a step may hold; NaN where it does not."""

POINTS = 2000
"""More steps than this are drawn as groups: mean, least and greatest loss."""


class Metrics:
    """The steps and validations of one run."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.generation = 0
        """Grows when the file was cut, as a run that goes on from a checkpoint does: what was read before is void."""
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self.columns = {name: array("d") for name in COLUMNS}
        self.validations: list[tuple[float, float]] = []
        """(step, loss)."""
        self._offset = 0
        self._last = b""

    def __len__(self) -> int:
        return len(self.columns["step"])

    def refresh(self) -> None:
        """Read what was added to the file since the last time. Each page asks in a thread of its own."""
        try:
            with self._lock, self.file.open("rb") as stream:
                if not self._continues(stream):
                    self.generation += 1
                    self._forget()
                stream.seek(self._offset)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self._last = line
                    self._add(line)
        except OSError:
            return

    def _continues(self, stream: Any) -> bool:
        """Whether the last line read still stands where it was."""
        stream.seek(self._offset - len(self._last))
        return bool(stream.read(len(self._last)) == self._last)

    def _add(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            step = float(values["step"])
        except (ValueError, TypeError, KeyError):
            return
        if "val_loss" in values:
            self.validations.append((step, _number(values["val_loss"])))
        if "loss" in values:
            for name, column in self.columns.items():
                column.append(_number(values.get(name)))

    def series(self, first: float = -math.inf, last: float = math.inf, points: int = POINTS) -> dict[str, Any]:
        """The steps from `first` to `last`, as lists of equal length, in at most about `points` groups of equal size.

        Returns:
            ``step`` (last of the group), ``loss``, ``lr`` … (means), ``low`` and ``high`` (of the loss; equal to it
            with a group of one), ``group`` (steps in one), ``validations`` (all), ``generation`` and ``count`` (steps
            in the file, to go on from).
        """
        steps = self.columns["step"]
        begin = _first_at_least(steps, first)
        end = _first_at_least(steps, math.nextafter(last, math.inf)) if last < math.inf else len(steps)
        group = max(1, math.ceil((end - begin) / max(1, points)))
        result: dict[str, Any] = {
            "group": group,
            "generation": self.generation,
            "count": len(self),
            "validations": self._validated(),
        }
        bounds = [(at, min(at + group, end)) for at in range(begin, end, group)]
        result["step"] = [steps[stop - 1] for _at, stop in bounds]
        for name in COLUMNS[1:]:
            column = self.columns[name]
            result[name] = [_mean(column, at, stop) for at, stop in bounds]
        loss = self.columns["loss"]
        result["low"] = [finite(min(loss[at:stop])) for at, stop in bounds] if group > 1 else result["loss"]
        result["high"] = [finite(max(loss[at:stop])) for at, stop in bounds] if group > 1 else result["loss"]
        return result

    def after(self, count: int) -> dict[str, Any]:
        """The steps that were read after the first `count`."""
        return {
            "generation": self.generation,
            "count": len(self),
            "validations": self._validated(),
            **{name: [finite(value) for value in column[count:]] for name, column in self.columns.items()},
        }

    def _validated(self) -> list[tuple[float, float | None]]:
        return [(step, finite(loss)) for step, loss in self.validations]

    def sparkline(self, points: int = 60) -> list[float | None]:
        """The course of the loss in a few numbers, for a small picture: medians of equal parts."""
        loss = self.columns["loss"]
        if not loss:
            return []
        group = max(1, math.ceil(len(loss) / points))
        parts = [sorted(loss[at : at + group]) for at in range(0, len(loss), group)]
        return [finite(round(part[len(part) // 2], 4)) for part in parts]

    def seconds(self) -> float:
        """Time that went by while steps were made; pauses between two sessions do not count."""
        times = self.columns["time"]
        if len(times) < 2:
            return 0.0
        # Only a pause lies longer than a minute and ten times longer than what is usual between two lines.
        usual = sorted(b - a for a, b in pairwise(times[-200:]))
        longest = max(60.0, 10 * usual[len(usual) // 2])
        return math.fsum(d for a, b in pairwise(times) if 0 <= (d := b - a) < longest)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _mean(column: array[float], begin: int, end: int) -> float | None:
    if end - begin == 1:
        return finite(column[begin])
    return finite(math.fsum(column[begin:end]) / (end - begin))


def _first_at_least(steps: array[float], value: float) -> int:
    """Index of the first step >= `value`; steps only grow."""
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        if steps[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low
