"""Pictures of a run."""

from __future__ import annotations

import json
import os
from itertools import accumulate
from pathlib import Path
from typing import Any


def draw_loss(metrics: str | Path, picture: str | Path, title: str) -> None:
    """Draw the loss of every step in metrics.jsonl, faint, and smoothed, on a logarithmic scale, over the tokens read.

    The learning rate is drawn behind it on a scale of its own. `picture` is a PNG and is replaced as a whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    lines = [json.loads(line) for line in Path(metrics).read_text(encoding="utf-8").splitlines()]
    steps: list[dict[str, Any]] = [line for line in lines if "loss" in line]
    tokens = [line["tokens"] / 1e6 for line in steps]
    losses = [line["loss"] for line in steps]

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(tokens, smoothed(losses), color="tab:blue", linewidth=1.8, label="smoothed")
    axes.set_yscale("log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    rate = axes.twinx()
    rate.plot(tokens, [line["lr"] for line in steps], color="tab:gray", linewidth=0.8, linestyle=":")
    rate.set_ylabel("learning rate", color="tab:gray")
    rate.set_ylim(bottom=0)
    axes.legend(loc="upper right")

    partial = Path(f"{picture}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, picture)
    finally:
        partial.unlink(missing_ok=True)


def smoothed(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours, as many to the left as to the right: about a fiftieth of all."""
    reach = len(values) // 100
    sums = [0.0, *accumulate(values)]
    means = []
    for i in range(len(values)):
        around = min(reach, i, len(values) - 1 - i)
        means.append((sums[i + around + 1] - sums[i - around]) / (2 * around + 1))
    return means
