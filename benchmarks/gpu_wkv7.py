"""wkv7 on a GPU in all its schedules: the Triton back-end, the chunked PyTorch form and, where installed, fla's.

bf16, head size 64, forward and forward + backward, each from the raw decay pre-activation. Shapes: many heads (8
sequences, 64 heads, 4096 tokens), and few heads, where a kernel that walks the sequence is slow. Every schedule of the
Triton back-end is timed, so that the table in `Schedule.of` can be checked; "triton" is the one it chooses. Times are
medians of `triton.testing.do_bench`, which empties the L2 cache before each repetition. Before a contestant is timed,
its outputs and gradients for the first sequence are compared with the chunked form on the same inputs in fp32.

    python benchmarks/gpu_wkv7.py [-o benchmarks/results/DATE-gpu-wkv7.json]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rookery.bench.machine import record
from rookery.ops.fla import wkv7_fla
from rookery.ops.wkv7 import wkv7_chunked
from rookery.ops.wkv7_triton import Schedule, wkv7_triton

Contestant = Callable[..., Any]

HEAD_SIZE = 64
SHAPES = {
    "many heads: B 8, H 64, T 4096": (8, 4096, 64),
    "few heads: B 1, H 12, T 4096": (1, 4096, 12),
    "few heads: B 1, H 40, T 4096": (1, 4096, 40),
    "one long sequence: B 1, H 12, T 16384": (1, 16384, 12),
    "the same tokens: B 4, H 12, T 4096": (4, 4096, 12),
    "MiniPile recipe: B 16, H 12, T 512": (16, 512, 12),
}
SCHEDULES = [Schedule(chunk, sequential) for chunk in (16, 32, 64) for sequential in (True, False)]


def contestants() -> dict[str, Contestant]:
    """Name -> function of (r, w, k, v, a, b, state)."""
    found: dict[str, Contestant] = {"triton": wkv7_triton, "chunked PyTorch": wkv7_chunked}
    for schedule in SCHEDULES:
        name = f"triton, chunk {schedule.chunk}, {'sequential' if schedule.sequential else 'parallel'}"
        found[name] = partial(wkv7_triton, schedule=schedule)
    return found | ({"fla chunk_rwkv7": wkv7_fla} if importlib.util.find_spec("fla") else {})


def inputs(B: int, T: int, H: int, device: str) -> tuple[list[Tensor], Tensor]:
    """r, w, k, v, a, b and the initial state, as leaves, and a gradient of y."""
    generator = torch.Generator(device).manual_seed(0)

    def random() -> Tensor:
        return torch.randn(B, T, H, HEAD_SIZE, generator=generator, device=device)

    key = torch.nn.functional.normalize(random(), dim=-1)
    tensors = [random(), 2 * random(), random() / 2, random(), -key, key * torch.sigmoid(random())]
    state = torch.zeros(B, H, HEAD_SIZE, HEAD_SIZE, device=device)
    return [x.bfloat16().requires_grad_() for x in tensors] + [state.requires_grad_()], random().bfloat16()


def outputs_and_gradients(run: Contestant, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    y, final = run(*leaves)
    return [y.detach(), final.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def measure(run: Contestant, leaves: list[Tensor], dy: Tensor, exact: list[Tensor]) -> dict[str, Any]:
    """Errors, milliseconds and bytes of one contestant."""
    from triton.testing import do_bench

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = outputs_and_gradients(run, leaves, dy)
    peak = torch.cuda.max_memory_allocated() - before
    names = ("y", "final", "dr", "dw", "dk", "dv", "da", "db", "dstate")
    errors = {
        name: float(f"{float((x[:1].float() - want).norm() / want.norm()):.1e}")
        for name, x, want in zip(names, got, exact, strict=True)
    }
    del got
    with torch.no_grad():
        forward = do_bench(lambda: run(*leaves), quantiles=[0.5, 0.2, 0.8])
    both = do_bench(lambda: outputs_and_gradients(run, leaves, dy), quantiles=[0.5, 0.2, 0.8])
    return {
        "forward_ms": [round(t, 4) for t in forward],
        "forward_and_backward_ms": [round(t, 4) for t in both],
        "peak_bytes": peak,
        "relative_errors": errors,
    }


def report() -> dict[str, Any]:
    runs = contestants()
    results: dict[str, dict[str, Any]] = {}
    for shape, (B, T, H) in SHAPES.items():
        leaves, dy = inputs(B, T, H, "cuda")
        exact = outputs_and_gradients(wkv7_chunked, [x.detach()[:1].float().requires_grad_() for x in leaves], dy[:1])
        rows: dict[str, Any] = {}
        for name, run in runs.items():
            try:
                rows[name] = measure(run, leaves, dy, exact)
            except Exception as error:  # a contestant that cannot run this shape must not cost the others' figures
                rows[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            torch.cuda.empty_cache()
            print(f"{shape} | {name}: {rows[name]}", file=sys.stderr, flush=True)
        results[shape] = {"triton chooses": vars(Schedule.of(leaves[0])), **rows}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="write the JSON here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark times GPU kernels, and PyTorch sees no GPU here.", file=sys.stderr)
        return 2
    content = record(
        "wkv7 on a GPU",
        {
            "clock": "triton.testing.do_bench, cold L2; median, 20 % and 80 % quantile in milliseconds",
            "results": report(),
        },
    )
    text = json.dumps(content, indent=2) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
