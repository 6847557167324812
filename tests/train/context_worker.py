"""One rank of the pair that `test_context_parallel.py` starts, which share every sample; writes down what came out.

The same functions compute on a single device in the test itself.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model_pieces import batch_of, gradients, model_of
from safetensors.torch import save_file
from strategy_worker import ACCUMULATE, SCHEDULE, STEPS, engine_of
from torch import Tensor

from rookery.bench.live_bytes import LiveBytes
from rookery.config.launcher import find_place
from rookery.models import Model
from rookery.train.batches import to_device
from rookery.train.context import Context
from rookery.train.loop import Batch, LossFunction, fit
from rookery.train.ranks import joined
from rookery.train.run import language_loss

PACKED = [5, 1, 17, 30, 1, 2, 24, 16]
CASES: dict[str, dict[str, Any]] = {
    **{version: {"version": version} for version in ("x070", "x060", "x052")},
    **{f"{version} packed": {"version": version, "rows": 2, "lengths": PACKED} for version in ("x070", "x060", "x052")},
    **{f"{version} fp32": {"version": version, "dtype": torch.float32} for version in ("x070", "x060", "x052")},
    "packed fp32": {"rows": 2, "lengths": PACKED, "dtype": torch.float32},
    "packed, cut between two sequences": {"rows": 2, "lengths": [30, 18, 24, 24]},
    "two rows": {"rows": 2},
    "three rows": {"rows": 3},
    "odd length": {"length": 47},
    "three tokens": {"length": 3},
    "grad_cp": {"grad_cp": True},
    "grad_cp packed": {"grad_cp": True, "rows": 2, "lengths": PACKED},
    "offloaded": {"grad_cp": True, "offload": True},
    "second part not trained": {"trained": slice(0, 20)},
    "first part not trained": {"trained": slice(30, 48)},
    "tuned states": {"tuned": True},
    "tuned states packed": {"tuned": True, "rows": 2, "lengths": PACKED},
    "only tuned states train": {"tuned": True, "frozen": "time_state"},
    "only the last layer trains": {"frozen": "blocks.1.ffn.value.weight"},
    # Parts of whole chunks: elsewhere sums of the recurrence are taken in another order, which bf16 shows at once.
    "bf16": {"dtype": torch.bfloat16, "length": 64},
}  # fmt: skip


def case_of(name: str) -> tuple[Model, Batch]:
    case = {"version": "x070", "dtype": torch.float64, "rows": 1, "length": 48, "tuned": False} | CASES[name]
    kernel = "chunked" if case["dtype"] == torch.float64 else "auto"
    model = model_of(case["version"], case["dtype"], kernel=kernel, tuned=case["tuned"])
    model.grad_cp, model.offload_activations = case.get("grad_cp", False), case.get("offload", False)
    model.train()
    for parameter_name, p in model.named_parameters():
        p.requires_grad_(case.get("frozen", "") in parameter_name)
    batch = batch_of(case["rows"], case["length"], lengths=case.get("lengths"))
    if "trained" in case:
        targets = torch.full_like(batch.targets, -100)
        targets[:, case["trained"]] = batch.targets[:, case["trained"]]
        batch = Batch(batch.tokens, targets, int((targets != -100).sum()), 0)
    return model, batch


def own_part(batch: Batch, context: Context) -> Batch:
    """What this rank reads of a batch, the way it comes from data."""
    lengths = None if batch.lengths is None else batch.lengths.numpy()
    return to_device((batch.tokens.numpy(), batch.targets.numpy(), lengths), 0, torch.device("cpu"), context)


def computed(name: str, context: Context) -> dict[str, Tensor]:
    """Loss and gradients, put together as the training loop does."""
    model, batch = case_of(name)
    own, loss_function = own_part(batch, context), loss_of(context)
    total = torch.zeros((), dtype=torch.float64)
    for part in loss_function(model, own):
        loss = part.loss * (part.trained / batch.trained)
        loss.backward()
        total += loss.detach()
    found = {"loss": total} | gradients(model)
    if context.size > 1:
        for tensor in found.values():
            dist.all_reduce(tensor)
    return found


def loss_of(context: Context) -> LossFunction:
    return language_loss if context.size == 1 else context.loss


def validated(context: Context) -> float:
    """The loss without gradients, in several passes one after another."""
    model, batch = case_of("packed fp32")
    own, loss_function, total = own_part(batch, context), loss_of(context), 0.0
    with torch.no_grad():
        for _ in range(5):
            total += sum(part.loss.item() * part.trained for part in loss_function(model, own))
    return context.ranks.sums(total)[0] / batch.trained


def peak_bytes(length: int, context: Context) -> int:
    """Largest allocation of a forward and backward pass over a sample of `length` tokens."""
    model = model_of("x070", torch.float32)
    batch = own_part(batch_of(1, length), context)
    with LiveBytes(but=(batch.tokens, batch.targets)) as allocated:
        for part in loss_of(context)(model, batch):
            part.loss.backward()
    return allocated.peak


def sent_bytes(length: int, context: Context) -> int:
    """What both ranks together send in a forward and backward pass."""
    sent = [0]
    isend = dist.isend

    def counting(tensor: Tensor, **options: Any) -> Any:
        sent[0] += tensor.nbytes
        return isend(tensor, **options)

    dist.isend = counting
    try:
        peak_bytes(length, context)
    finally:
        dist.isend = isend
    return context.ranks.total(sent[0])


PAUSE = 0.5


def seconds_of_pass(context: Context) -> float:
    """Of a forward and backward pass in which each of the two layers rests, in both directions, in the projection
    before its recurrence."""
    model = model_of("x070", torch.float32)
    for block in model.blocks:
        block.att.receptance.register_forward_pre_hook(lambda *_: time.sleep(PAUSE))
        block.att.receptance.register_full_backward_hook(lambda *_: time.sleep(PAUSE))
    batch = own_part(batch_of(1, 48), context)
    context.ranks.barrier()
    start = time.perf_counter()
    for part in loss_of(context)(model, batch):
        part.loss.backward()
    context.ranks.barrier()
    return time.perf_counter() - start


def trained(strategy: str, context: Context) -> list[list[float]]:
    """Loss and gradient norm of each step, clipped and with accumulation."""
    dtype = torch.float32 if strategy.startswith("deepspeed") else torch.float64
    engine = engine_of(model_of("x070", dtype), dtype, strategy, context.ranks)
    seen: list[list[float]] = []
    fit(
        engine,
        loss_of(context),
        rows(context),
        replace(SCHEDULE, lr_init=3e-4),
        range(STEPS),
        accumulate=ACCUMULATE,
        after_step=[lambda step: seen.append([step.loss.item(), step.grad_norm.item()])],
    )
    return seen


def rows(context: Context) -> Iterator[Batch]:
    """Every other one has packed sequences."""
    for i in range(STEPS * ACCUMULATE):
        batch = batch_of(1, 48, seed=i % 2, masked=0.2 + i % 3 / 5, lengths=[11, 30, 7] if i % 2 else None)
        yield own_part(batch, context)


def main(folder: Path, strategies: list[str]) -> None:
    with joined(find_place(), "cpu") as ranks:
        context = Context.of(ranks, 2)
        tensors = {f"{name}/{key}": x for name in CASES for key, x in computed(name, context).items()}
        found = {
            "validated": validated(context),
            "peak": [ranks.gather(peak_bytes(length, context)) for length in (64, 512)],
            "seconds": seconds_of_pass(context),
            "sent": [sent_bytes(length, context) for length in (64, 512)],
            **{strategy: trained(strategy, context) for strategy in strategies},
        }
        if ranks.main:
            save_file(tensors, folder / "cases.safetensors")
            (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
        del context


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
