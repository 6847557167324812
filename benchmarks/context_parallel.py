"""What it costs to share samples among processes (`--context_parallel`), on a CPU, over gloo.

    python benchmarks/context_parallel.py [--ranks 2] [--ctx_len 1024 4096 16384] [--rounds 5] [-o FILE.json]

Recorded for each length, of RWKV-7 with 6 layers and 256 channels in fp32, one thread a process: CPU seconds of a
forward and backward pass, and of a whole optimiser step with strategy ddp, which exchanges gradients and has an
optimiser in each process; of all processes together, median of the rounds; the shortest time of a pass by the wall
clock, which says little where other programs run; the largest allocation of tensors in a forward and backward pass of
any process; the bytes that go through each border between two parts for each layer, there and back. Beside them CPU
seconds of the recurrences alone, with the steps that are fused into them: what every layer would need once more if
ranks exchanged transitions of states in place of states.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rookery.bench.live_bytes import LiveBytes
from rookery.bench.machine import record
from rookery.config import rules
from rookery.config.launcher import find_place
from rookery.config.tree import DeviceSection
from rookery.models import ModelShape, create, initialise
from rookery.ops import mix7
from rookery.train.batches import to_device
from rookery.train.context import Context
from rookery.train.device import keep_freed_memory
from rookery.train.loop import Batch, Step, fit
from rookery.train.optim import build_optimizer, parameter_groups
from rookery.train.ranks import joined
from rookery.train.run import language_loss
from rookery.train.schedule import Schedule
from rookery.train.strategies import create_engine

LAYERS, WIDTH, HEAD, VOCABULARY = 6, 256, 64, 256
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ctx_len", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", dest="output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        measure_as_rank(arguments)
        return
    results = {
        "processes 1": started(1, arguments),
        f"processes {arguments.ranks}": started(arguments.ranks, arguments),
        "recurrences": {f"ctx_len {length}": recurrences(length, arguments.rounds) for length in arguments.ctx_len},
    }
    text = json.dumps(record("context parallelism", {"results": results}), indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


def started(ranks: int, arguments: argparse.Namespace) -> Any:
    """Figures of processes that share samples; they come from rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    words = ["--ctx_len", *map(str, arguments.ctx_len), "--rounds", str(arguments.rounds), "--ranks", str(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *words],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed")
    return json.loads(outputs[0].splitlines()[-1])


def measure_as_rank(arguments: argparse.Namespace) -> None:
    keep_freed_memory()
    with joined(find_place(), "cpu") as ranks:
        context = Context.of(ranks, arguments.ranks)
        found = {f"ctx_len {length}": measure(length, arguments.rounds, context) for length in arguments.ctx_len}
        if ranks.main:
            print(json.dumps(found))
        del context


def measure(length: int, rounds: int, context: Context) -> dict[str, Any]:
    model: Any = create(
        ModelShape("x070", LAYERS, WIDTH, VOCABULARY, HEAD, WIDTH, 4 * WIDTH, rules.ranks("x070", LAYERS, WIDTH))
    )
    initialise(model, 0)
    model.train()
    loss_function = language_loss if context.size == 1 else context.loss
    batch = next(samples(length, context))

    def one_pass() -> None:
        for part in loss_function(model, batch):
            part.loss.backward()

    sent: list[int] = []
    with LiveBytes(but=(batch.tokens, batch.targets)) as allocated, counted(sent):
        one_pass()
    passes, walls = [], []
    for _ in range(rounds + 1):
        context.ranks.barrier()
        start = time.perf_counter()
        passes.append(timed(one_pass))
        context.ranks.barrier()
        walls.append(time.perf_counter() - start)
    model.zero_grad()

    groups = parameter_groups(model.named_parameters(), model.version, weight_decay=True)
    build = partial(build_optimizer, groups=groups, betas=(0.9, 0.99), eps=1e-18)
    engine = create_engine(
        model,
        build,
        dtype=torch.float32,
        grad_clip=1.0,
        settings=DeviceSection(strategy="ddp", devices=context.ranks.world_size, accelerator="cpu"),
        ranks=context.ranks,
    )
    clock = [time.process_time()]

    def stop(step: Step) -> None:
        step.loss.item()
        clock.append(time.process_time())

    schedule = Schedule(1e-4, 1e-4, 0, length, length * 1000, 100, 1)
    fit(engine, loss_function, samples(length, context), schedule, range(rounds + 1), after_step=[stop])
    steps = [after - before for before, after in pairwise(clock[1:])]

    def of_all(seconds: list[float]) -> float:
        """Median over the rounds of what all processes took together."""
        return round(median(context.ranks.sums(*seconds)), 3)

    return {
        "CPU seconds of a pass": of_all(passes[1:]),
        "wall seconds of a pass, the shortest": round(min(walls), 3),
        "CPU seconds of a step": of_all(steps),
        "peak bytes of a process": max(context.ranks.gather(allocated.peak)),
        "bytes of a layer over a border": context.ranks.total(sum(sent)) // LAYERS // max(1, context.size - 1),
    }


def samples(length: int, context: Context) -> Iterator[Batch]:
    tokens = torch.randint(VOCABULARY, (1, length + 1), generator=torch.Generator().manual_seed(0)).numpy()
    while True:
        yield to_device((tokens[:, :-1], tokens[:, 1:], None), 0, CPU, context)


class counted:
    """Notes the bytes of every tensor that is sent to a single rank."""

    def __init__(self, sent: list[int]) -> None:
        self._sent, self._isend = sent, dist.isend

    def __enter__(self) -> None:
        def isend(tensor: Tensor, **options: Any) -> Any:
            self._sent.append(tensor.nbytes)
            return self._isend(tensor, **options)

        dist.isend = isend

    def __exit__(self, *error: object) -> None:
        dist.isend = self._isend


def recurrences(length: int, rounds: int) -> dict[str, float]:
    """CPU seconds of all layers' recurrences, forward and backward."""
    heads = (WIDTH // HEAD, HEAD)
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).requires_grad_()

    inputs = [random(1, length, WIDTH) for _ in range(6)]
    parameters = [random(WIDTH), random(WIDTH), random(*heads), random(WIDTH), random(WIDTH)]
    state = random(1, *heads, HEAD)

    def once() -> None:
        y, _state = mix7(*inputs, *parameters, state)
        y.sum().backward()

    once()
    return {"CPU seconds": round(LAYERS * median(timed(once) for _ in range(rounds)), 3)}


def timed(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
