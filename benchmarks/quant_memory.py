"""Quantised bases: bytes of the model by kind, their rounding error, what a product costs, and whole trainings by the
planner's estimate.

* *bytes*: counted for the shapes of the RWKV-7 releases; for 0.1B the model is also really built from a memory-mapped
  bf16 checkpoint, and the memory that the process takes (RssAnon) is sampled while it is.
* *error*: |W' - W| / |W| on weights with several distributions, and on those of a trained checkpoint if one is given.
* *time*: CPU time on one thread of one layer, forward and backward, in turns; the median.
* *trainings*: `rookery.config.memory.estimate` beside the figures published for other trainers (RWKV's tutorials and
  RWKV-PEFT's README). The estimate has not been checked on a GPU, and what the others counted is not always known.

    python benchmarks/quant_memory.py [-o benchmarks/results/DATE-quant-memory.json] [--checkpoint rwkv-final.pth]

bitsandbytes is compared where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rookery.bench.machine import anonymous_memory
from rookery.cli.doctor import processor
from rookery.config import rules
from rookery.config.memory import Plan, estimate
from rookery.formats import read_weights
from rookery.models import Model, ModelShape, create, initialise
from rookery.ops.linear import Linear
from rookery.quant import KINDS, Kind, QuantLinear, quantise
from rookery.quant.codes import dequantise, quantise_weight
from rookery.quant.model import QUANTISED

SIZES = {"0.1B": (12, 768), "0.4B": (24, 1024), "1.5B": (24, 2048), "2.9B": (32, 2560)}
"""Layers and width of the released RWKV-7 models."""

VOCABULARY = 65536


def released(name: str) -> ModelShape:
    layers, width = SIZES[name]
    ranks = rules.ranks("x070", layers, width, "g1")
    return ModelShape("x070", layers, width, VOCABULARY, 64, width, 4 * width, ranks)


def counted(shape: ModelShape) -> dict[str, Any]:
    """Bytes of parameters and buffers: bf16, and with the matrices of the blocks quantised."""
    with torch.device("meta"):
        model = create(shape)
        sizes = {"bf16": _bytes(model)}
        for kind in KINDS:
            model = create(shape)
            for name, layer in list(model.named_modules()):
                if isinstance(layer, Linear) and QUANTISED.fullmatch(name):
                    parent, _, own = name.rpartition(".")
                    quantised = QuantLinear(layer.in_features, layer.out_features, kind)
                    setattr(model.get_submodule(parent), own, quantised)
            sizes[kind] = _bytes(model)
    return {kind: {"bytes": size, "of bf16": round(size / sizes["bf16"], 3)} for kind, size in sizes.items()}


def _bytes(model: Model) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in tensors)


class Watch(threading.Thread):
    """Samples the memory of this process that is not a mapped file."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.before = self.peak = anonymous_memory()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.peak = max(self.peak, anonymous_memory())

    def stop(self) -> dict[str, int]:
        self.ended.set()
        self.join()
        return {"after": anonymous_memory() - self.before, "peak": self.peak - self.before}


def build(kind: Kind | None, file: Path, pipe: Any) -> None:
    """In a process of its own: the model from the checkpoint, quantised as it is read, or whole in bf16."""
    torch.set_num_threads(1)
    weights = read_weights(file)
    watch = Watch()
    watch.start()
    begun = time.process_time()
    model = create(released("0.1B"))
    gone = [] if kind is None else quantise(model, kind, weights=weights)
    for name, p in model.named_parameters():
        assert name not in gone
        p.data = weights[name].clone()
    pipe.send(watch.stop() | {"seconds": round(time.process_time() - begun, 2), "counted": _bytes(model)})


def really_built() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pth"
        model = create(released("0.1B"))
        initialise(model, 0)
        torch.save(model.to(torch.bfloat16).state_dict(), file)
        del model
        results = {}
        for kind in (None, *KINDS):
            context = multiprocessing.get_context("spawn")
            mine, theirs = context.Pipe()
            process = context.Process(target=build, args=(kind, file, theirs))
            process.start()
            theirs.close()
            results[kind or "bf16"] = mine.recv()
            process.join()
    return results


def weights_of_kinds() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    uneven = normal(1024, 1024) * torch.exp(0.5 * normal(1, 1024)) * torch.exp(0.3 * normal(1024, 1))
    heavy = normal(1024, 1024) / (normal(4, 1024, 1024).square().mean(0)).sqrt()
    return {"normal": normal(1024, 1024), "uneven rows and columns": uneven, "Student t, 4 d. f.": heavy}


def dynamic_code() -> Tensor:
    """The 256 values of bitsandbytes' dynamic 8-bit code (arXiv:1511.04561)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        for value in ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist():
            values += [value, -value]
    return torch.tensor(sorted(values))


def nearest(weight: Tensor, code: Tensor) -> Tensor:
    """With one scale for the whole tensor."""
    scale = weight.abs().max()
    return code[torch.bucketize(weight / scale, (code[1:] + code[:-1]) / 2)] * scale


def one_scale_a_row(weight: Tensor) -> Tensor:
    steps = weight.abs().amax(1, keepdim=True) / 127
    return (weight / steps).round() * steps


def errors(weight: Tensor) -> dict[str, float]:
    def relative(rounded: Tensor) -> float:
        return round(float((rounded - weight).norm() / weight.norm()), 4)

    found = {
        kind: relative(dequantise(*quantise_weight(weight, kind), kind, weight.shape[1], torch.float32))
        for kind in KINDS
    }
    return found | {
        "bf16": relative(weight.bfloat16().float()),
        "int8 with one scale a row": relative(one_scale_a_row(weight)),
        "dynamic 8 bits, one scale a tensor (RWKV-PEFT)": relative(nearest(weight, dynamic_code())),
    }


def all_errors(checkpoint: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {name: errors(weight) for name, weight in weights_of_kinds().items()}
    if checkpoint is not None:
        weights = {n: w.float() for n, w in read_weights(checkpoint).items() if w.dim() == 2 and w.any()}
        of_blocks = [errors(w) for n, w in weights.items() if QUANTISED.fullmatch(n.removesuffix(".weight"))]
        found["trained checkpoint, mean over its matrices"] = {
            how: round(statistics.mean(e[how] for e in of_blocks), 4) for how in of_blocks[0]
        }
    return found


def layers(out_features: int, in_features: int) -> dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]]:
    """Name -> layer, dtype of its input."""
    dense = Linear(in_features, out_features)
    nn.init.normal_(dense.weight, std=0.02)
    dense.requires_grad_(False)
    made: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        plain = Linear(in_features, out_features).to(dtype)
        plain.weight.data = dense.weight.data.to(dtype)
        made[name] = (plain.requires_grad_(False), dtype)
        for kind in KINDS:
            made[f"{kind}, {name}"] = (QuantLinear.of(dense, kind), dtype)
    if importlib.util.find_spec("bitsandbytes"):
        logging.disable(logging.WARNING)
        import bitsandbytes as bnb

        for dtype in (torch.float32, torch.bfloat16):
            layer = bnb.nn.Linear4bit(in_features, out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(dense.weight.data.clone(), requires_grad=False, quant_type="nf4")
            layer.support_avx512bf16_for_cpu = False
            made[f"bitsandbytes nf4, {str(dtype).removeprefix('torch.')}"] = (layer.to("cpu"), dtype)
    return made


def times(out_features: int, in_features: int, rows: int, rounds: int) -> dict[str, Any]:
    made = layers(out_features, in_features)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for _ in range(rounds + 1):
        for name, (layer, dtype) in made.items():
            x = torch.randn(rows, in_features, dtype=dtype).requires_grad_()
            dy = torch.randn(rows, out_features, dtype=dtype)
            begun = time.process_time()
            y = layer(x)
            middle = time.process_time()
            y.backward(dy)
            spent[name].append((middle - begun, time.process_time() - middle))
    return {"out, in, rows": [out_features, in_features, rows]} | {
        name: {
            "forward": round(1000 * statistics.median(f for f, _ in passes[1:]), 2),
            "backward": round(1000 * statistics.median(b for _, b in passes[1:]), 2),
        }
        for name, passes in spent.items()
    }


PUBLISHED = {
    "RWKV-7 pretraining, micro_bsz 1, ctx 4096": {"0.1B": 6.4, "0.4B": 12.1, "1.5B": 41.1, "2.9B": 89.2},
    "RWKV-7 state tuning, ctx 1024, bf16 / int8 / nf4": {
        "0.1B": (2.6, 2.4, 2.5), "0.4B": (3.1, 2.9, 2.8), "1.5B": (5.3, 4.1, 3.7), "2.9B": (8.2, 5.7, 4.7),
    },
    "RWKV-7 LoRA r 64, ctx 1024, bf16 / int8 / nf4": {
        "0.1B": (2.7, 2.5, 2.4), "0.4B": (3.4, 2.9, 2.7), "1.5B": (5.6, 4.6, 3.9), "2.9B": (8.8, 6.7, 5.7),
    },
    "RWKV-6 state tuning, ctx 1024, fp16 / int8 / nf4": {
        "1.6B": (5.8, 4.5, 3.9), "3B": (8.7, 6.2, 4.9), "7B": (17.8, 11.9, 8.5),
    },
}  # fmt: skip
"""Of other trainers, GB (those in MB divided by 1024)."""

SIZES_OF_X060 = {"1.6B": (24, 2048), "3B": (32, 2560), "7B": (32, 4096)}


def trainings() -> dict[str, Any]:
    """GiB by the estimate, bf16 on CUDA, without and with grad_cp."""
    table: dict[str, Any] = {}
    for what, published in PUBLISHED.items():
        version = "x060" if "RWKV-6" in what else "x070"
        peft = "state" if "state" in what else "lora" if "LoRA" in what else "none"
        kinds = ("none",) if peft == "none" else ("none", "int8", "nf4")
        rows = {}
        for size, figures in published.items():
            layers, width = (SIZES if version == "x070" else SIZES_OF_X060)[size]
            plans = [
                Plan(
                    version, layers, width, width, rules.dim_ffn(version, width), VOCABULARY,
                    ranks=rules.ranks(version, layers, width, "g1"), ctx_len=4096 if peft == "none" else 1024,
                    peft=peft, quant=kind, grad_cp=grad_cp,
                )
                for grad_cp in (False, True)
                for kind in kinds
            ]  # fmt: skip
            totals = [round(estimate(plan).total / 2**30, 1) for plan in plans]
            rows[size] = {
                "published": figures,
                "estimate, grad_cp 0": totals[: len(kinds)],
                "estimate, grad_cp 1": totals[len(kinds) :],
            }
        table[what] = rows
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        found_errors = all_errors(options.checkpoint)
    record = {
        "hardware": {
            "processor": processor(),
            "threads": 1,
            "load average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "versions": {name: version(name) for name in ("torch", "numba", "numpy")}
        | {"python": platform.python_version()}
        | ({"bitsandbytes": version("bitsandbytes")} if importlib.util.find_spec("bitsandbytes") else {}),
        "bytes of the model, counted": {name: counted(released(name)) for name in SIZES},
        "0.1B built from a mapped bf16 checkpoint, bytes of memory": really_built(),
        "relative error of the weights": found_errors,
        "GiB of whole trainings on a GPU: ESTIMATED, not measured": trainings(),
        "ms of CPU time of a layer": [times(*size, options.rounds) for size in ((3072, 768, 512), (8192, 2048, 512))],
    }
    text = json.dumps(record, indent=2) + "\n"
    sys.stdout.write(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
