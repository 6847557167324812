"""What keeping less of the optimiser costs: losses of the demo's model, trained alike but for that.

    python benchmarks/optimizer_loss.py [--steps 500] [--out benchmarks/results]

RWKV-7, 3 layers of 96 channels, on the demo's arithmetic dialogues (level "scripts"), 8 x 128 tokens a step: from
nothing with learning rate 4e-3 to 1e-5, as `rookery demo` trains it, and then on from there with 1e-4. Every variant
sees the same batches and begins with the same weights. The loss is the mean of the last tenth of the steps; `seeds`
says how far fp32 runs lie apart that differ in their initial weights alone. Runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rookery.bench.machine import record
from rookery.config.tree import DataSection
from rookery.data import Dataset, arithmetic, make, open_dataset
from rookery.models import Model, ModelShape, create, initialise
from rookery.train.batches import batches
from rookery.train.lean_adamw import BLOCK, LeanAdamW, Moment8
from rookery.train.loop import fit
from rookery.train.optim import Group, build_optimizer, parameter_groups
from rookery.train.run import language_loss
from rookery.train.schedule import Schedule
from rookery.train.strategies import SingleDevice

MICRO_BSZ, CTX_LEN, LAYERS, WIDTH, HEAD = 8, 128, 3, 96, 48


class Nearest(Moment8):
    """Codes rounded to the nearest."""

    def write(self, elements: Tensor, noise: Any, start: int = 0, leave: Tensor | None = None) -> None:
        super().write(elements, 0.5, start, leave)


class Dynamic(Moment8):
    """bitsandbytes' codes (`create_dynamic_map`): seven decades, the more codes the higher; to the nearest."""

    def __init__(self, shape: torch.Size, device: torch.device, *, signed: bool) -> None:
        super().__init__(shape, device, signed=signed)
        values = [0.0, 1.0]
        for decade in range(7):
            bounds = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
            means = [10.0 ** (decade - 6) * float(mean) for mean in (bounds[:-1] + bounds[1:]) / 2]
            values += [*means, *(-mean for mean in means)] if signed else means
        self.values = torch.tensor(sorted(values))

    def write(self, elements: Tensor, noise: Any, start: int = 0, leave: Tensor | None = None) -> None:
        blocks = F.pad(elements, (0, -len(elements) % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1, keepdim=True)
        rows = slice(start // BLOCK, start // BLOCK + len(blocks))
        middles = (self.values[1:] + self.values[:-1]) / 2
        self.codes[rows] = torch.bucketize(blocks / torch.where(scales == 0, 1, scales), middles).to(torch.uint8)
        self.scales[rows] = scales


class CodesAdamW(LeanAdamW):
    """With moments in other codes."""

    kind: type[Moment8]

    def new_moment(self, p: Tensor, key: str) -> Tensor | Moment8:
        moment = super().new_moment(p, key)
        if not isinstance(moment, Moment8):
            return moment
        return self.kind(p.shape, p.device, signed=moment.signed)


class NearestAdamW(CodesAdamW):
    kind = Nearest


class DynamicAdamW(CodesAdamW):
    kind = Dynamic


def plain_bf16(tensors: dict[str, Tensor], groups: list[Group], **settings: Any) -> torch.optim.Optimizer:
    """PyTorch's AdamW on bf16 weights: moments in bf16 as well, everything rounded to the nearest."""
    made = [
        {"params": [tensors[n] for n in g.names], "names": g.names, "lr_scale": g.lr_scale, "decays": g.decays}
        for g in groups
        if g.names
    ]
    return torch.optim.AdamW(made, lr=0.0, weight_decay=0.0, fused=True, **settings)


def codes_of(kind: type[LeanAdamW], tensors: dict[str, Tensor], groups: list[Group], **settings: Any) -> LeanAdamW:
    made = plain_bf16(tensors, groups, **settings).param_groups
    wanted = ("params", "names", "lr_scale", "decays")
    return kind([{key: group[key] for key in wanted} for group in made], eight_bit=True, **settings)


EIGHT_BIT = partial(build_optimizer, eight_bit=True)
VARIANTS: dict[str, tuple[torch.dtype, bool, Any]] = {
    "fp32": (torch.float32, True, build_optimizer),
    "bf16, fp32 masters": (torch.bfloat16, True, build_optimizer),
    "bf16, rounded by chance": (torch.bfloat16, False, build_optimizer),
    "bf16, rounded to the nearest": (torch.bfloat16, False, plain_bf16),
    "fp32, 8 bits": (torch.float32, True, EIGHT_BIT),
    "fp32, 8 bits to the nearest": (torch.float32, True, partial(codes_of, NearestAdamW)),
    "fp32, 8 bits of bitsandbytes": (torch.float32, True, partial(codes_of, DynamicAdamW)),
    "bf16, rounded by chance, 8 bits": (torch.bfloat16, False, EIGHT_BIT),
}
"""Name -> dtype of the model, whether it has masters, what builds its optimiser."""


def train(
    dataset: Dataset, start: dict[str, Tensor] | int, rates: tuple[float, float], steps: int, variant: str, eps: float
) -> tuple[list[float], Model]:
    """Losses of all steps, and the model. `start`: weights, or the seed of initial ones."""
    dtype, masters, build = VARIANTS[variant]
    sizes = dict.fromkeys("wavg", 32)
    model = create(ModelShape("x070", LAYERS, WIDTH, dataset.facts.vocab_size, HEAD, WIDTH, 4 * WIDTH, sizes))
    if isinstance(start, int):
        initialise(model, start)
    else:
        model.load_state_dict(start)
    groups = parameter_groups(model.named_parameters(), "x070", weight_decay=False)
    engine = SingleDevice(
        model.train(),
        lambda tensors: build(tensors, groups, betas=(0.9, 0.99), eps=eps),
        dtype=dtype,
        grad_clip=1.0,
        masters=masters,
    )
    schedule = Schedule(*rates, 20, MICRO_BSZ * CTX_LEN, steps * MICRO_BSZ * CTX_LEN, steps, 1)
    seen: list[Tensor] = []
    data = batches(lambda: dataset, 0, MICRO_BSZ, torch.device("cpu"))
    fit(engine, language_loss, data, schedule, range(steps), after_step=[lambda step: seen.append(step.loss)])
    return [float(loss) for loss in seen], model


def end(losses: list[float]) -> float | None:
    """Of the last tenth of the steps; None when it diverged."""
    last = losses[-len(losses) // 10 :]
    mean = sum(last) / len(last)
    return round(mean, 4) if math.isfinite(mean) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--eps", type=float, default=1e-18)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[str, dict[str, float | None]] = {"from nothing": {}, "continued": {}, "seeds": {}}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dialogues.jsonl"
        arithmetic.write(source, arithmetic.find_level("scripts"), 4000, seed=0)
        make(source, 1, source.with_suffix(""), tokenizer="compact", seed=0)
        section = DataSection(data_file=str(source.with_suffix("")), ctx_len=CTX_LEN, loss_mask="answer")
        dataset = open_dataset(section, vocab_size=None, seed=0, random_places=False)
        losses, first = train(dataset, 0, (4e-3, 1e-5), given.steps, "fp32", given.eps)
        begun = {name: tensor.clone() for name, tensor in first.state_dict().items()}
        found["seeds"] = {"0": end(losses)}
        if given.out:
            for seed in (1, 2):
                found["seeds"][str(seed)] = end(train(dataset, seed, (4e-3, 1e-5), given.steps, "fp32", given.eps)[0])
        for variant in given.only:
            new = train(dataset, 0, (4e-3, 1e-5), given.steps, variant, given.eps)[0]
            more = train(dataset, begun, (1e-4, 1e-4), given.steps, variant, given.eps)[0]
            found["from nothing"][variant], found["continued"][variant] = end(new), end(more)
            print(f"{variant:34}", end(new), end(more), flush=True)
    if given.out:
        content = {
            "what": "loss at the end: mean of the last tenth of the steps",
            "settings": {"steps": given.steps, "eps": given.eps, "tokens a step": MICRO_BSZ * CTX_LEN},
            "losses": found,
        }
        file = given.out / f"{date.today()}-optimizer-loss.json"
        file.write_text(json.dumps(record("optimizer-loss", content), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
