"""Peak memory of trainings on a GPU beside the figures published for other trainers.

    python benchmarks/gpu_memory.py [--out benchmarks/results] [--only REGEX] [--count-below GB]

The rows are those of RWKV's tutorials and of RWKV-PEFT's README: pretraining RWKV-7 with ctx 4096, state tuning of
RWKV-6 and LoRA (r 64) of RWKV-7 with ctx 1024; micro_bsz 1, bf16 (states: fp16), grad_cp 1, as their scripts have it.
"lean" is the same with --optimizer adamw8bit --master_weights 0. Every row runs in a process of its own, with random
weights made on the device.

On a GPU: `measured` is torch.cuda.max_memory_allocated over three steps, `reserved` what the allocator took for it, and
tokens/s those of the last two. Without one: the planner's ESTIMATE, and for rows whose estimate for a CPU is below
--count-below, how many bytes of tensors a step on the CPU has alive at most, COUNTED one by one (its kernels keep other
tensors than a GPU's), beside the estimate for that. Neither is a measurement of a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rookery.adapters import AdapterConfig, attach
from rookery.bench.live_bytes import LiveBytes
from rookery.bench.machine import record
from rookery.config import rules
from rookery.config.memory import Plan, estimate
from rookery.models import Model, ModelShape, create
from rookery.quant import quantise
from rookery.train.optim import build_optimizer, parameter_groups
from rookery.train.precision import DTYPES
from rookery.train.schedule import Rates
from rookery.train.strategies import SingleDevice

X070 = {"0.1B": (12, 768), "0.4B": (24, 1024), "1.5B": (24, 2048), "2.9B": (32, 2560)}
X060 = {"1.6B": (24, 2048), "3B": (32, 2560), "7B": (32, 4096)}
VOCABULARY = 65536
WARM, TIMED = 1, 2


@dataclass(frozen=True)
class Row:
    name: str
    plan: Plan
    published: float | None
    """MB, as published (GB times 1000); None: nobody has published it."""


def rows() -> list[Row]:
    found = []

    def add(name: str, version: str, size: tuple[int, int], published: float, **changes: Any) -> None:
        layers, width = size
        ranks = rules.ranks(version, layers, width, "g1")
        ffn = rules.dim_ffn(version, width)
        plan = Plan(version, layers, width, width, ffn, VOCABULARY, 64, ranks, grad_cp=True, **changes)
        found.append(Row(name, plan, published))
        if changes.get("peft") != "state":
            lean = replace(plan, optimizer="adamw8bit", master_weights=False)
            found.append(Row(f"{name}, lean", lean, published))

    for (size, shape), published in zip(X070.items(), (6540, 12414, 42104, 91354), strict=True):
        add(f"x070 {size} pretraining", "x070", shape, published, ctx_len=4096)
    of_states = ((5800, 4500, 3900), (8700, 6200, 4900), (17800, 11900, 8500))
    for (size, shape), by_kind in zip(X060.items(), of_states, strict=True):
        for quant, published in zip(("none", "int8", "nf4"), by_kind, strict=True):
            name = f"x060 {size} state tuning, {'fp16' if quant == 'none' else quant}"
            add(name, "x060", shape, published, ctx_len=1024, peft="state", quant=quant, precision="fp16")
    for (size, shape), published in zip(X070.items(), (2700, 3400, 5600, 8800), strict=True):
        add(f"x070 {size} LoRA", "x070", shape, published, ctx_len=1024, peft="lora", lora_r=64)
    return found


def build(plan: Plan, device: torch.device) -> Model:
    """With random weights: fp32 where they train, else in the precision of the training, or quantised."""
    shape = ModelShape(
        plan.version, plan.n_layer, plan.n_embd, plan.vocab_size, plan.head_size, plan.dim_att, plan.dim_ffn, plan.ranks
    )
    with torch.device("meta"):
        model = create(shape)
    dtype = torch.float32 if plan.peft == "none" else DTYPES[plan.precision]
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".ln" in name or name.startswith("ln_out"):
                p.fill_(float(name.endswith("weight")))
            else:
                p.normal_(0, 0.02)
    model.grad_cp = plan.grad_cp
    if plan.peft == "state":
        model.requires_grad_(False)
        for block in model.blocks:
            states = torch.zeros(plan.dim_att // plan.head_size, plan.head_size, plan.head_size, device=device)
            block.att.time_state = nn.Parameter(states)
    elif plan.peft != "none":
        attach(model, AdapterConfig(plan.peft, plan.lora_r, dropout=0.0))  # type: ignore[arg-type]
    if plan.quant != "none":
        quantise(model, plan.quant)  # type: ignore[arg-type]
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model.train()


def engine_of(plan: Plan, device: torch.device) -> SingleDevice:
    model = build(plan, device)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = parameter_groups(trained, plan.version, weight_decay=False)

    def optimizer(tensors: dict[str, Tensor]) -> torch.optim.Optimizer:
        eight_bit = plan.optimizer == "adamw8bit"
        return build_optimizer(tensors, groups, betas=(0.9, 0.99), eps=1e-8, eight_bit=eight_bit)

    dtype, masters = DTYPES[plan.precision], plan.master_weights
    return SingleDevice(model, optimizer, dtype=dtype, grad_clip=1.0, masters=masters)


def step(engine: SingleDevice, plan: Plan) -> None:
    tokens = torch.randint(plan.vocab_size, (plan.micro_bsz, plan.ctx_len), device=engine.device)
    loss, _state = engine.model.loss(tokens, tokens)  # type: ignore[operator]
    del _state
    engine.backward(loss, weight=1.0, last=True)
    del loss
    engine.step(Rates(1e-5, 0.0, 0.0))


def on_gpu(plan: Plan) -> dict[str, Any]:
    engine = engine_of(plan, torch.device("cuda"))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM):
        step(engine, plan)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(TIMED):
        step(engine, plan)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / TIMED
    return {
        "measured": megabytes(torch.cuda.max_memory_allocated()),
        "reserved": megabytes(torch.cuda.max_memory_reserved()),
        "tokens/s": round(plan.micro_bsz * plan.ctx_len / seconds),
    }


def on_cpu(plan: Plan) -> dict[str, Any]:
    engine = engine_of(plan, torch.device("cpu"))
    trained = [p for group in engine.optimizer.param_groups for p in group["params"]]
    known = {t.data_ptr(): t for t in [*engine.model.parameters(), *engine.model.buffers(), *trained]}
    with LiveBytes(known.values()) as live:
        step(engine, plan)
    return {"counted on the CPU": megabytes(sum(t.nbytes for t in known.values()) + live.peak)}


def megabytes(size: float) -> int:
    return round(size / 1e6)


def describe(row: Row, count_below: float) -> dict[str, Any]:
    found: dict[str, Any] = {"published": row.published, "estimate": megabytes(estimate(row.plan).total)}
    on_this = replace(row.plan, accelerator="cpu")
    # A CPU computes in fp16 a hundred times slower.
    small = estimate(on_this).total < count_below * 1e9 and row.plan.precision != "fp16"
    if not torch.cuda.is_available() and not small:
        return found
    words = [sys.executable, __file__, "--row", row.name]
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        return found | {"failed": result.stderr.strip().splitlines()[-1]}
    found |= json.loads(result.stdout)
    if "counted on the CPU" in found:
        found["estimate for the CPU"] = megabytes(estimate(on_this).total)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the dated JSON")
    parser.add_argument("--only", default="", help="rows whose name has this in it (a regular expression)")
    parser.add_argument("--count-below", type=float, default=1.7, metavar="GB", help="rows that the CPU really runs")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        plan = next(row.plan for row in rows() if row.name == given.row)
        print(json.dumps(on_gpu(plan) if torch.cuda.is_available() else on_cpu(plan)))
        return
    found = {}
    for row in rows():
        if re.search(given.only, row.name):
            found[row.name] = describe(row, given.count_below)
            print(f"{row.name:32}", json.dumps(found[row.name]), flush=True)
    if given.out:
        what = "MB of a GPU" if torch.cuda.is_available() else "MB: ESTIMATED for a GPU, nothing here measured on one"
        file = given.out / f"{time.strftime('%Y-%m-%d')}-gpu-memory.json"
        content = {"what": what, "rows": found}
        file.write_text(json.dumps(record("gpu-memory", content), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
