"""What to change of a training so that it fits into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from rookery.config.memory import Plan, estimate, fits, gib
from rookery.i18n import _


@dataclass(frozen=True)
class Remedy:
    """A change with which a training fits."""

    flags: str
    total: int
    """Bytes that it then takes."""


def remedies(plan: Plan, free: int, most: int = 3) -> list[Remedy]:
    """Up to `most` changes with which `plan` fits into `free` bytes, those that cost least first: single ones, else two
    or more together. Empty when nothing helps."""
    families = list(_families(plan))
    found: list[Remedy] = []
    used: list[set[int]] = []
    for count in range(1, len(families) + 1):
        for chosen in combinations(range(len(families)), count):
            if len(found) == most:
                return found
            if any(smaller <= set(chosen) for smaller in used):
                continue
            for options in product(*(families[i] for i in chosen)):
                changed = plan
                for _flags, change in options:
                    changed = replace(changed, **change)
                if fits(changed, free):
                    found.append(Remedy(" ".join(flags for flags, _change in options), estimate(changed).total))
                    used.append(set(chosen))
                    break
    return found


def _families(plan: Plan) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Kinds of changes, each with its options from the mildest: flags, and what they change of the plan."""
    if plan.micro_bsz > 1:
        options: list[tuple[str, dict[str, Any]]] = []
        for micro_bsz in range(plan.micro_bsz - 1, 0, -1):
            if plan.micro_bsz % micro_bsz == 0:
                # The same batch in several passes.
                passes = plan.accumulate_grad_batches * (plan.micro_bsz // micro_bsz)
                change = {"micro_bsz": micro_bsz, "accumulate_grad_batches": passes}
                options.append((_as_flags(change), change))
        yield options
    if plan.devices > plan.context_parallel and not plan.chunk_ctx:
        options = []
        for times in range(2, plan.devices // plan.context_parallel + 1):
            size = times * plan.context_parallel
            if plan.devices % size == 0:
                # Fewer groups of devices read samples: the same batch takes more passes.
                change = {"context_parallel": size, "accumulate_grad_batches": plan.accumulate_grad_batches * times}
                options.append((_as_flags(change), change))
        yield options
    if not plan.grad_cp:
        yield [("--grad_cp 1", {"grad_cp": True})]
    if plan.accelerator == "cuda" and plan.element == 4:
        yield [("--precision bf16", {"precision": "bf16"})]
    if plan.trained == "all" and not plan.strategy.startswith("deepspeed"):
        lean: list[tuple[str, dict[str, Any]]] = []
        if plan.optimizer == "adamw":
            lean.append(("--optimizer adamw8bit", {"optimizer": "adamw8bit"}))
        if plan.precision == "bf16" and plan.master_weights:
            without = {"optimizer": "adamw8bit", "master_weights": False}
            lean.append(("--optimizer adamw8bit --master_weights 0", without))
        if lean:
            yield lean
    if plan.trained != "all" and plan.quant == "none":
        yield [(f"--quant {kind}", {"quant": kind}) for kind in ("int8", "nf4")]
    if plan.trained == "all":
        yield [
            ("--peft lora", {"peft": "lora"}),
            ("--peft lora --quant int8", {"peft": "lora", "quant": "int8"}),
            ("--peft lora --quant nf4", {"peft": "lora", "quant": "nf4"}),
        ]
    elif plan.trained == "adapter":
        yield [("--peft state", {"peft": "state"})]
    if plan.trained != "state":
        now = plan.chunk_ctx or plan.ctx_len
        chunks = [now >> halvings for halvings in range(1, 5) if now >> halvings >= 128]
        yield [(f"--train_type infctx --chunk_ctx {size}", {"chunk_ctx": size}) for size in chunks]
    lengths = [plan.ctx_len >> halvings for halvings in range(1, 6) if plan.ctx_len >> halvings >= 64]
    yield [(f"--ctx_len {length}", {"ctx_len": length}) for length in lengths]


def _as_flags(change: Mapping[str, Any]) -> str:
    return " ".join(f"--{leaf} {value}" for leaf, value in change.items())


def advice(plan: Plan, free: int) -> str:
    """What to change so that `plan` fits into `free` bytes, for people."""
    found = remedies(plan, free)
    if not found:
        return _("It needs a device with more memory, or a smaller model.")
    lines = [_("  {flags}: {total}", flags=remedy.flags, total=gib(remedy.total)) for remedy in found]
    return "\n".join([_("It fits with one of these:"), *lines])
