"""One rank of the pair that `test_strategies.py` starts: trains under each strategy, and writes down what came out.

The same functions train on a single device in the test itself, with the batches of both ranks as one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from train_pieces import random_tokens, tiny_model, tiny_shape

from rookery.adapters import AdapterConfig, attach
from rookery.bench.live_bytes import LiveBytes
from rookery.config.launcher import find_place
from rookery.config.tree import DeviceSection
from rookery.formats import assign, read_weights, write_initial, write_weights
from rookery.models import create
from rookery.quant import quantise
from rookery.train.loop import Batch, fit
from rookery.train.optim import build_optimizer, parameter_groups
from rookery.train.precision import DTYPES
from rookery.train.ranks import Ranks, joined
from rookery.train.run import language_loss
from rookery.train.schedule import Schedule
from rookery.train.strategies import Engine, create_engine

STEPS, SAVED, ACCUMULATE, PER_RANK = 20, 10, 2, 2
SCHEDULE = Schedule(1e-3, 1e-4, 3, 32, 640, 100, 1, weight_decay=0.1)
LEAN = ("ddp", "fsdp")
"""DeepSpeed's optimiser is its own."""

FINE_TUNINGS = ("lora", "state", "int8", "bf16 lora")


def saved_by(strategy: str, strategies: Sequence[str]) -> list[str]:
    """Whose checkpoints it goes on from. All read the same files: DeepSpeed, slow to begin, reads one of its own, one
    of another cut and a whole one, and is read by FSDP2."""
    if strategy.startswith("deepspeed"):
        return [strategy, "fsdp"] if strategy == "deepspeed_stage_1" else ["single"]
    return ["single", *strategies]


def precisions(strategy: str) -> tuple[str, ...]:
    """Those beside fp64. DeepSpeed has no fp16 on a CPU, and fp32 everywhere else."""
    if strategy.startswith("deepspeed"):
        return ("bf16",) if strategy in ("deepspeed_stage_2", "deepspeed_stage_3") else ()
    return ("fp32", "bf16", "fp16")


def fine_tunings(strategy: str) -> tuple[str, ...]:
    if strategy.startswith("deepspeed"):
        return ("lora", "bf16 lora") if strategy == "deepspeed_stage_2" else ()
    return FINE_TUNINGS


def engine_of(model, dtype, strategy: str, ranks: Ranks, *, lean: bool = False):
    """`lean`: moments in 8 bits, and no master weights."""
    groups = parameter_groups(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], model.version, weight_decay=True
    )
    build = partial(build_optimizer, groups=groups, betas=(0.9, 0.99), eps=1e-8, eight_bit=lean)
    settings = DeviceSection(strategy=strategy, devices=ranks.world_size, accelerator="cpu")
    return create_engine(model, build, dtype=dtype, grad_clip=0.3, masters=not lean, settings=settings, ranks=ranks)


def batches(ranks: Ranks, first_step: int, parts: int = 2):
    """The forward passes of one rank. Those of both ranks together are a single device's; different numbers of targets
    are trained in each."""
    for step in range(first_step, STEPS):
        for i in range(ACCUMULATE):
            tokens = random_tokens(2 * PER_RANK, seed=step * ACCUMULATE + i)
            targets = tokens[:, 1:].clone()
            targets[0, : 4 + step % 5] = -100
            targets[3, i:] = -100
            x, y = tokens[:, :-1], targets
            if ranks.world_size > 1:
                x, y = x[ranks.rank :: 2], y[ranks.rank :: 2]
            yield Batch(x, y, int((y != -100).sum()), 0)


def train(engine, ranks: Ranks, steps: range) -> list[list[float]]:
    """Loss and gradient norm of each step."""
    seen = []
    fit(
        engine,
        language_loss,
        batches(ranks, steps.start),
        SCHEDULE,
        steps,
        accumulate=ACCUMULATE,
        after_step=[lambda step: seen.append([step.loss.item(), step.grad_norm.item()])],
    )
    return seen


def exact_dtype(strategy: str) -> torch.dtype:
    """DeepSpeed knows no fp64."""
    return torch.float32 if strategy.startswith("deepspeed") else torch.float64


def save(engine: Engine, folder: Path, ranks: Ranks) -> None:
    """A checkpoint in a new folder."""
    if ranks.main:
        folder.mkdir()
    ranks.barrier()
    engine.save(folder)
    ranks.barrier()


def train_all(strategy: str, folder: Path, ranks: Ranks) -> list[list[float]]:
    """All weights; leaves a checkpoint of the middle and the weights of the end in `folder`."""
    dtype = exact_dtype(strategy)
    engine = engine_of(tiny_model(dtype), dtype, strategy, ranks)
    seen = train(engine, ranks, range(SAVED))
    save(engine, folder, ranks)
    seen += train(engine, ranks, range(SAVED, STEPS))
    tensors = engine.trained_weights()
    if ranks.main:
        write_weights(folder / "final.pth", tensors)
    else:
        for tensor in tensors:
            tensor.produce()
    return seen


def go_on(strategy: str, folder: Path, ranks: Ranks) -> list[list[float]]:
    """From a checkpoint of whatever strategy, with weights that are not set."""
    dtype = exact_dtype(strategy)
    model = tiny_model(dtype)
    for p in model.parameters():
        p.data.fill_(7.0)
    engine = engine_of(model, dtype, strategy, ranks)
    engine.load(folder)
    return train(engine, ranks, range(SAVED, STEPS))


def fine_tune(kind: str, strategy: str, ranks: Ranks) -> list[list[float]]:
    half = kind.startswith("bf16")
    dtype = torch.bfloat16 if half else torch.float32
    model = tiny_model(torch.float32)
    model.requires_grad_(False)
    if kind == "state":
        for block in model.blocks:
            block.att.time_state = torch.nn.Parameter(torch.zeros(2, 16, 16))
    else:
        attach(model, AdapterConfig("lora", r=4, dropout=0.0), seed=0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_B"):
                    p.fill_(0.01)
    if kind == "int8":
        quantise(model, "int8")
    engine = engine_of(model, dtype, strategy, ranks)
    return train(engine, ranks, range(5))


def lower_precision(strategy: str, precision: str, ranks: Ranks) -> list[list[float]]:
    """With the back-ends that a user gets."""
    engine = engine_of(tiny_model(kernel="auto"), DTYPES[precision], strategy, ranks)
    return train(engine, ranks, range(10))


def lean(strategy: str, folder: Path, ranks: Ranks) -> dict[str, list[list[float]]]:
    """With moments in 8 bits and bf16 weights without masters: what is seen without a break, and after a checkpoint."""
    engine = engine_of(tiny_model(), torch.bfloat16, strategy, ranks, lean=True)
    seen = train(engine, ranks, range(SAVED))
    save(engine, folder, ranks)
    rest = train(engine, ranks, range(SAVED, STEPS))
    model = tiny_model()
    for p in model.parameters():
        p.data.fill_(7.0)
    again = engine_of(model, torch.bfloat16, strategy, ranks, lean=True)
    again.load(folder)
    return {"all": seen + rest, "rest": rest, "again": train(again, ranks, range(SAVED, STEPS))}


def bytes_of_building(folder: Path, ranks: Ranks) -> dict[str, int]:
    """Most bytes of tensors while rank 0 writes initial weights, and while each takes its rows of them."""
    shape = replace(tiny_shape(), n_layer=8)
    file = folder / "mapped.pth"
    with LiveBytes([]) as writing:
        if ranks.main:
            write_initial(file, shape, 0, torch.bfloat16, {}, "")
    ranks.barrier()
    with torch.device("meta"):
        model = create(shape, kernel="chunked")
    mapped = read_weights(file)
    assign(model, mapped, "", share=True)
    whole = sum(4 * p.numel() for p in model.parameters())
    with LiveBytes(mapped.values()) as taking:
        engine_of(model, torch.bfloat16, "fsdp", ranks)
    return {"whole": whole, "writing": writing.peak, "taking": taking.peak}


def main(folder: Path, strategies: list[str]) -> None:
    with joined(find_place(), "cpu") as ranks:
        found = {}
        for strategy in strategies:
            found[strategy] = {"all": train_all(strategy, folder / strategy, ranks)}
        for strategy in strategies:
            for saved in saved_by(strategy, strategies):
                found[strategy][f"from {saved}"] = go_on(strategy, folder / saved, ranks)
            for precision in precisions(strategy):
                found[strategy][precision] = lower_precision(strategy, precision, ranks)
            if strategy in LEAN:
                found[strategy]["lean"] = lean(strategy, folder / f"{strategy} lean", ranks)
            for kind in fine_tunings(strategy):
                found[strategy][kind] = fine_tune(kind, strategy, ranks)
        found["bytes"] = bytes_of_building(folder, ranks)
        if ranks.main:
            (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
