"""Inference on a CPU: decoding and reading a prompt, against the `rwkv` package on the same random model.

    OMP_NUM_THREADS=1 python benchmarks/cpu_inference.py [-o benchmarks/results/DATE-cpu-inference.json]

The runners take turns, so that a machine whose speed drifts slows all alike. Each figure is a median, of CPU time on
one thread and of wall time on several. Expected, before any was measured: decoding reads every weight but the embedding
once a token, so it is bound by the memory, at 30 to 33 GB/s 53 to 58 tokens a second in fp32, 106 to 117 in bf16 and
200 to 220 in int8, and all else is little beside it; prompts are bound by oneDNN's products, 180 MFLOP a token.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}

import torch

from rookery.cli.doctor import processor
from rookery.config import rules
from rookery.formats import write_pth
from rookery.infer import CPU7Form
from rookery.models import Model, ModelShape, create

LAYERS, WIDTH, VOCABULARY = 12, 768, 65536

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}

PEERS = {"fp32": "rwkv fp32", "bf16": "rwkv bf16", "int8": "rwkv bf16"}
"""What each format is compared with."""


def random_model() -> Model:
    """An x070 of 0.1B with logits that vary."""
    ranks = rules.ranks("x070", LAYERS, WIDTH)
    model = create(ModelShape("x070", LAYERS, WIDTH, VOCABULARY, 64, WIDTH, 4 * WIDTH, ranks))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "r_k" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif "ln" in name:
                parameter.fill_(name.endswith("weight"))
            else:
                parameter.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()


class Ours:
    """Our packed form."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.form = CPU7Form(model.to(dtype) if dtype != torch.int8 else model, dtype)
        self.slots = self.form.slots(1)

    def read(self, tokens: list[int]) -> torch.Tensor:
        return self.form.head(self.form.read(self.slots, 0, tokens)[-1:])[0]

    def step(self, token: int) -> torch.Tensor:
        return self.form.step(self.slots, [0], [token])[0]


class Theirs:
    """The `rwkv` package."""

    def __init__(self, path: Path, strategy: str) -> None:
        from rwkv.model import RWKV

        self.model = RWKV(model=str(path.with_suffix("")), strategy=f"cpu {strategy}")
        self.state: Any = None

    def read(self, tokens: list[int]) -> torch.Tensor:
        logits, self.state = self.model.forward(tokens, None)
        return logits.float()

    def step(self, token: int) -> torch.Tensor:
        logits, self.state = self.model.forward([token], self.state)
        return logits.float()


def median_seconds(runners: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Each runner once a round, the first round not counted."""
    spent: dict[str, list[float]] = defaultdict(list)
    for _round in range(rounds + 1):
        for name, run in runners.items():
            begun = clock()
            run()
            spent[name].append(clock() - begun)
    return {name: statistics.median(times[1:]) for name, times in spent.items()}


def weight_bytes(dtype: str) -> int:
    """Bytes of weights that a token needs, without the embedding; low-rank layers stay bf16 in int8."""
    ranks = rules.ranks("x070", LAYERS, WIDTH)
    big = LAYERS * 12 * WIDTH**2 + WIDTH * VOCABULARY
    low = LAYERS * 2 * WIDTH * sum(ranks.values())
    size, low_size = {"fp32": (4, 4), "bf16": (2, 2), "int8": (1, 2)}[dtype]
    return big * size + low * low_size


def measure(threads: int, rounds: int, answer: int, prompt: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    tokens = torch.randint(1, VOCABULARY, (prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        write_pth(path, random_model().state_dict())
        runners: dict[str, Ours | Theirs] = {name: Ours(random_model(), dtype) for name, dtype in DTYPES.items()}
        runners |= {f"rwkv {name}": Theirs(path, name) for name in ("fp32", "bf16")}
    reference = runners["rwkv fp32"].read(tokens)
    error = {name: float((one.read(tokens) - reference).std() / reference.std()) for name, one in runners.items()}

    def decode(one: Ours | Theirs) -> Callable[[], None]:
        def run() -> None:
            for token in tokens[:answer]:
                one.step(token)

        return run

    reading = median_seconds({n: lambda one=one: one.read(tokens) for n, one in runners.items()}, rounds, clock)
    decoding = median_seconds({n: decode(one) for n, one in runners.items()}, rounds, clock)
    record: dict[str, Any] = {"clock": clock.__name__, "prompt tokens": prompt, "answer tokens": answer}
    for name in runners:
        record[name] = {
            "prompt, tokens a second": round(prompt / reading[name], 1),
            "decode, tokens a second": round(answer / decoding[name], 1),
            "error of the logits, relative to rwkv fp32": float(f"{error[name]:.2g}"),
        }
        if name in DTYPES:
            record[name] |= {
                "decode, GB of weights a second": round(weight_bytes(name) * answer / decoding[name] / 1e9, 1),
                "prompt, GFLOP a second": round(2 * LAYERS * 12 * WIDTH**2 * prompt / reading[name] / 1e9),
                f"faster than {PEERS[name]} by": {
                    "prompt": round(reading[PEERS[name]] / reading[name], 2),
                    "decode": round(decoding[PEERS[name]] / decoding[name], 2),
                },
            }
    return record


def batches(dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Tokens a second of a step of B sequences, on one thread."""
    torch.set_num_threads(1)
    ours = Ours(random_model(), dtype)
    slots = ours.form.slots(32)
    sizes = (1, 2, 4, 8, 16, 32)
    steps = {str(B): lambda B=B: ours.form.step(slots, range(B), range(1, B + 1)) for B in sizes}
    seconds = median_seconds(steps, rounds, time.process_time)
    return {name: round(int(name) / spent, 1) for name, spent in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    options = parser.parse_args()
    threads = sorted({1, torch.get_num_threads()})
    with torch.inference_mode():
        record = {
            "hardware": {
                "processor": processor(),
                "load average": os.getloadavg() if hasattr(os, "getloadavg") else None,
            },
            "versions": {name: version(name) for name in ("torch", "numba", "rwkv")}
            | {"python": platform.python_version()},
            "model": f"x070 L{LAYERS} D{WIDTH} V{VOCABULARY}, random weights",
            **{f"{n} threads": measure(n, options.rounds, options.answer, options.prompt) for n in threads},
            "batches, bf16, 1 thread, tokens a second": batches(torch.bfloat16, 3 * options.rounds),
        }
    text = json.dumps(record, indent=2) + "\n"
    sys.stdout.write(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
