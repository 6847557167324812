"""Training on a CPU: tokens per second of the demo's model, where a step's time goes, and wkv7 against its peers.

The recurrences run in turn in one process, so that a machine whose speed drifts slows all alike; each figure is the
median. The split of a step counts CPU time on one thread, by operation.

    GOMP_SPINCOUNT=1000 python benchmarks/cpu_training.py [-o benchmarks/results/DATE-cpu-training.json]

(the `rookery` command sets GOMP_SPINCOUNT itself.)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rookery.cli.demo import DEFAULT_LEVEL, RECIPES
from rookery.cli.doctor import processor
from rookery.config import rules
from rookery.models import ModelShape, create, initialise
from rookery.ops import head_loss, wkv7
from rookery.train.device import keep_freed_memory
from rookery.train.optim import build_optimizer, parameter_groups

VOCAB_SIZE = 320
"""About what the demo's data give."""

TRAINED_SHARE = 0.25

PARTS = {
    "recurrence and its head's steps": ("_Mix7",),
    "matrix products": ("_OneDNN",),
    "loss head": ("_HeadLoss",),
    "token shift, squared ReLU": ("_TokenShift", "_ReluSquare"),
    "optimiser": ("Optimizer.step", "aten::_foreach", "aten::linalg_vector_norm"),
}
"""Part of a step -> beginnings of the names of the operations that are it, with all they call."""


def demo_step() -> tuple[Callable[[], None], int]:
    """One optimiser step of the demo's recipe on random tokens, and how many tokens it reads."""
    recipe = RECIPES[DEFAULT_LEVEL].train
    width, head = recipe["n_embd"], recipe["head_size"]
    ranks = rules.ranks("x070", recipe["n_layer"], width)
    model = create(ModelShape("x070", recipe["n_layer"], width, VOCAB_SIZE, head, width, 4 * width, ranks))
    initialise(model, 0)
    model.train()
    parameters = dict(model.named_parameters())
    groups = parameter_groups(parameters.items(), "x070", weight_decay=False)
    optimizer = build_optimizer(parameters, groups, betas=(0.9, 0.99), eps=1e-18)
    batch, length = recipe["micro_bsz"], recipe["ctx_len"]
    tokens = torch.randint(VOCAB_SIZE, (batch, length))
    targets = torch.where(torch.rand(batch, length) < TRAINED_SHARE, tokens.roll(-1, 1), -100)

    def step() -> None:
        hidden, _ = model.hidden(tokens)
        head_loss(hidden, model.head.weight, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, batch * length


def tokens_per_second(threads: int, seconds: float) -> float:
    """Wall time."""
    torch.set_num_threads(threads)
    step, tokens = demo_step()
    for _ in range(3):
        step()
    times = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return tokens / statistics.median(times)


def split_of_a_step(steps: int = 10) -> dict[str, float]:
    """Share of CPU time of each part, on one thread. What is in no part is elementwise or overhead."""
    torch.set_num_threads(1)
    step, _ = demo_step()
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    spent: dict[str, float] = defaultdict(float)
    total = 0.0
    for event in recorded.events():
        total += event.self_cpu_time_total
        part = next((part for part, names in PARTS.items() if event.name.startswith(names)), None)
        if part is not None:
            spent[part] += event.cpu_time_total
    spent["everything else"] = total - sum(spent.values())
    return {part: round(time / total, 3) for part, time in spent.items()}


def wkv7_inputs(B: int, T: int, H: int, N: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    r, w, k, v, a = (torch.randn(B, T, H, N, generator=generator) for _ in range(5))
    kappa = torch.nn.functional.normalize(a, dim=-1)
    return [x.requires_grad_() for x in (r, w, k, v, -kappa, kappa * torch.sigmoid(w))]


def compare_wkv7(B: int, T: int, H: int, N: int, rounds: int, backends: tuple[str, ...]) -> dict[str, Any]:
    """Microseconds of CPU time for a head and token, forward and backward, on one thread."""
    torch.set_num_threads(1)
    inputs = wkv7_inputs(B, T, H, N)
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in backends}
    for _ in range(rounds + 1):
        for name in backends:
            begun = time.process_time()
            y, _state = wkv7(*inputs, backend=name)
            middle = time.process_time()
            torch.autograd.grad(y.sum(), inputs)
            times[name]["forward"].append(middle - begun)
            times[name]["backward"].append(time.process_time() - middle)
    unit = 1e6 / (B * T * H)
    result: dict[str, Any] = {"shape": {"B": B, "T": T, "H": H, "N": N}}
    for name, passes in times.items():
        result[name] = {which: round(statistics.median(spent[1:]) * unit, 3) for which, spent in passes.items()}
    both = {name: sum(result[name].values()) for name in backends}
    result["native is faster by"] = {name: round(both[name] / both["native"], 1) for name in backends[1:]}
    return result


def wkv7_share(tokens_per_second: float, rounds: int) -> float:
    """Time of the demo's recurrences as a share of its step's, which has them within `mix7`."""
    recipe = RECIPES[DEFAULT_LEVEL].train
    heads = recipe["n_embd"] // recipe["head_size"]
    spent = compare_wkv7(recipe["micro_bsz"], recipe["ctx_len"], heads, recipe["head_size"], rounds, ("native",))
    return sum(spent["native"].values()) * 1e-6 * heads * recipe["n_layer"] * tokens_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--seconds", type=float, default=20, help="of training for each tokens-per-second figure")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    keep_freed_memory()
    threads = torch.get_num_threads()
    speeds = {n: tokens_per_second(n, options.seconds) for n in sorted({1, threads})}
    record = {
        "hardware": {
            "processor": processor(),
            "threads": threads,
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
            "load average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "versions": {name: version(name) for name in ("torch", "numba", "numpy")}
        | {"python": platform.python_version()},
        "demo recipe": RECIPES[DEFAULT_LEVEL].train,
        "demo tokens per second": {f"{n} threads": round(speed) for n, speed in speeds.items()},
        "wkv7 alone, share of a step on one thread": round(wkv7_share(speeds[1], options.rounds), 3),
        "split of a step, CPU time": split_of_a_step(),
        "wkv7, us of CPU time for a head and token": [
            compare_wkv7(2, 512, 12, 64, options.rounds, ("native", "chunked")),
            compare_wkv7(16, 64, 4, 32, options.rounds, ("native", "chunked", "reference")),
        ],
    }
    text = json.dumps(record, indent=2) + "\n"
    sys.stdout.write(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
