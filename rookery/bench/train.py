"""Training steps: speed, share of the machine's peak, memory, and where the time goes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from rookery.bench import plain7
from rookery.bench.live_bytes import LiveBytes
from rookery.bench.setting import Setting, random_model
from rookery.bench.timing import alternate, faster, rounded, wait
from rookery.bench.work import FORMULAS, fastest, peak, products_of
from rookery.formats import write_pth
from rookery.formats.convert import convert
from rookery.models import RWKV7
from rookery.models.rwkv7 import WIRED
from rookery.train.device import keep_freed_memory
from rookery.train.loop import Batch
from rookery.train.optim import build_optimizer, parameter_groups
from rookery.train.precision import set_matmul_precision
from rookery.train.run import language_loss
from rookery.train.schedule import Rates
from rookery.train.strategies import SingleDevice

RATE, EPS, BETAS = 1e-4, 1e-18, (0.9, 0.99)

PROGRAM = ("matrix products", "recurrence", "elementwise", "head")
"""What `rookery.ops.loss7` takes the time of, in its order."""

PRODUCTS_ALONE = "matrix products alone"

PARTS = {
    "program": ("_Loss7",),
    "matrix products": ("_Product", "_LowRank", "aten::mm", "aten::addmm", "aten::linear", "aten::matmul"),
    "recurrence": ("_Mix7", "_WKV", "aten::bmm", "aten::linalg_solve_triangular", "aten::cumsum"),
    "head": ("_HeadLoss",),
    "elementwise": (
        "_TokenShift",
        "_ReluSquare",
        "_Gates7",
        "_Value7",
        "_BeforeWKV7",
        "_AfterWKV7",
        "aten::native_layer_norm",
    ),
    "optimiser": ("Optimizer.step", "aten::_fused_adamw_", "aten::_foreach", "aten::linalg_vector_norm"),
}
"""Part of a step -> beginnings of the names of the operations that are it, with all that they call."""

Step = Callable[[], Tensor]
"""Makes one optimiser step, and gives its loss, 0-dim."""


def measure(
    setting: Setting, against: Sequence[str] = (), given_peak: float = 0.0, trained: float = 1.0
) -> dict[str, Any]:
    """Steps of the engine that trains, on random tokens, and those of peers from the same weights.

    Args:
        setting: sizes; `precision` of the peers too, which compute in bf16 by autocast.
        against: peers that can run here.
        given_peak: FLOP a second of the device; 0 measures it.
        trained: share of the targets that are; the others are masked, as the questions of conversations are.
    """
    keep_freed_memory()
    set_matmul_precision(setting.precision)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(setting.vocab_size, (setting.micro_bsz, setting.ctx_len + 1), generator=generator)
    masked = torch.rand(setting.micro_bsz, setting.ctx_len, generator=generator) >= trained
    targets = text[:, 1:].masked_fill(masked, -100)
    tokens, targets = text[:, :-1].contiguous().to(setting.device), targets.to(setting.device)
    batch = Batch(tokens, targets, trained=int((targets != -100).sum()), first_sample=0)

    steps: dict[str, Step] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in ("rookery", *against):
        results[name], steps[name] = _first_step(partial(BUILDERS[name], setting, batch), setting.device)
    top = peak(setting.device, setting.dtype, given_peak)
    matrices = products_of(random_model(setting.shape))
    alone = partial(_products, _factors(matrices, setting, batch))
    times = alternate(steps | {PRODUCTS_ALONE: alone}, setting.rounds, setting.device)
    products = times.pop(PRODUCTS_ALONE)
    multiplied = sum(out * into for _name, out, into in matrices)
    for name, spent in times.items():
        speed = spent.rate(setting.tokens, setting.device)
        results[name] |= {
            "tokens a second": speed,
            "mfu": {clock: rounded(6 * multiplied * rate / top[clock]) for clock, rate in speed.items()},
            "seconds a step": spent.report(setting.device),
        }
    results["rookery"]["split"] = split(steps["rookery"], setting.device)
    return {
        "setting": setting.report() | {"trained": trained},
        "formulas": FORMULAS,
        "training FLOP a token": 6 * multiplied,
        "peak FLOP a second": {clock: rounded(value) for clock, value in top.items()},
        PRODUCTS_ALONE: products.report(setting.device),
        "times its products": faster(times["rookery"], products, setting.device),
        "results": results,
        "rookery is faster by": {name: faster(times[name], times["rookery"], setting.device) for name in against},
    }


def _factors(
    matrices: Sequence[tuple[str, int, int]], setting: Setting, batch: Batch
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each matrix of `products_of` a weight (out, in), inputs (n, in) and gradients of outputs (n, out), random."""

    @cache
    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=setting.device).to(setting.dtype)

    factors = []
    for name, out, into in matrices:
        n = batch.trained if name == "head" else setting.tokens
        factors.append((random(out, into), random(n, into), random(n, out)))
    return factors


@torch.no_grad()
def _products(factors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """All matrix products of a step, forwards and backwards, as PyTorch does them at its fastest."""
    for weight, x, dy in factors:
        fastest(x, weight)
        fastest(dy, weight.T)
        out = fastest(dy.T, x.T)
    return out


def _first_step(build: Callable[[], Step], device: str) -> tuple[dict[str, Any], Step]:
    """Builds something that trains, and watches its first two steps: the loss of the first, and the memory of both."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        step = build()
        torch.cuda.reset_peak_memory_stats()
        first = float(step())
        step()
        wait(device)
        return {"first loss": rounded(first), "peak bytes": torch.cuda.max_memory_allocated() - before}, step
    with LiveBytes([]) as live:
        step = build()
        live.peak = 0  # what building took is not asked
        first = float(step())
        step()
    return {"first loss": rounded(first), "peak bytes": live.peak}, step


def _rookery(setting: Setting, batch: Batch) -> Step:
    model = random_model(setting.shape, kernel=setting.kernel).train()
    model.grad_cp = setting.grad_cp
    groups = parameter_groups(model.named_parameters(), setting.version, weight_decay=False)
    engine = SingleDevice(
        model.to(setting.device),
        partial(build_optimizer, groups=groups, betas=BETAS, eps=EPS),
        dtype=setting.dtype,
        grad_clip=1.0,
    )

    def step() -> Tensor:
        for part in language_loss(engine.model, batch):
            engine.backward(part.loss, weight=1.0, last=part.last)
        loss, _norm = engine.step(Rates(RATE, 0.0, 0.0))
        return loss

    return step


def _plain(setting: Setting, batch: Batch) -> Step:
    model = random_model(setting.shape).train().to(setting.device)
    assert isinstance(model, RWKV7)
    return _usual_step(model, setting, lambda: plain7.loss(model, batch.tokens, batch.targets))


def _fla(setting: Setting, batch: Batch) -> Step:
    """flash-linear-attention's own model, with the same weights, through the files that it reads."""
    import fla  # noqa: F401 - makes its models known to transformers
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM  # whose types are wrong
    with tempfile.TemporaryDirectory() as folder:
        write_pth(Path(folder) / "model.pth", random_model(setting.shape).state_dict())
        convert(Path(folder) / "model.pth", Path(folder) / "hf")
        model = loader.from_pretrained(Path(folder) / "hf", dtype=torch.float32).to(setting.device)
    if setting.grad_cp:
        model.gradient_checkpointing_enable()
    model.train()
    # It shifts the labels itself, so that the last token of a sample has none.
    labels = torch.cat([batch.tokens[:, :1], batch.targets[:, :-1]], dim=1)
    return _usual_step(model, setting, lambda: model(input_ids=batch.tokens, labels=labels, use_cache=False).loss)


def _usual_step(model: nn.Module, setting: Setting, loss_of: Callable[[], Tensor]) -> Step:
    """As people train with PyTorch: fp32 weights, autocast, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    half = setting.dtype in (torch.bfloat16, torch.float16)

    def step() -> Tensor:
        with torch.autocast(setting.device, setting.dtype if half else torch.bfloat16, enabled=half):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


BUILDERS: dict[str, Callable[[Setting, Batch], Step]] = {
    "rookery": _rookery,
    "torch": _plain,
    "fla": _fla,
}


def split(step: Callable[[], object], device: str, steps: int = 7) -> dict[str, float]:
    """Share of each part in the time of a step, the shortest of several, as other programs disturbed it least: on a GPU
    its time, else that of one thread."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step()
        found = [_times_of_parts(step, device, activities) for _step in range(steps)]
    finally:
        torch.set_num_threads(threads)
    shortest = min(found, key=lambda parts: sum(parts.values()))
    total = sum(shortest.values())
    return {part: round(time / total, 3) for part, time in shortest.items()}


def _times_of_parts(
    step: Callable[[], object], device: str, activities: Sequence[ProfilerActivity]
) -> dict[str, float]:
    before = _in_programs()
    with profile(activities=activities) as recorded:
        step()
        wait(device)
    spent: dict[str, float] = dict.fromkeys([*PARTS, "rest"], 0.0)
    for event in recorded.events() or ():
        spent[_part(event)] += event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
    spent["rest"] += spent.pop("program")
    for part, seconds in zip(PROGRAM, _in_programs() - before, strict=True):
        spent[part] += 1e6 * seconds
        spent["rest"] -= 1e6 * seconds
    return spent


def _in_programs() -> Any:
    """Seconds by part in the programs of small models."""
    return sum((wired.program.spent for wired in WIRED.values()), np.zeros(len(PROGRAM)))


def _part(event: Any) -> str:
    """The part that the outermost operation around `event` belongs to."""
    around = _part(event.cpu_parent) if event.cpu_parent is not None else "rest"
    if around != "rest":
        return around
    return next((part for part, names in PARTS.items() if event.name.startswith(names)), "rest")
