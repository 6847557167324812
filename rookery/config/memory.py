"""How much memory a training takes, from numbers alone: before anything is loaded, and without torch.

What a step needs at most is that of its worst moment: in the head, when everything is kept that the backward pass will
read; in the last block's backward pass; in the first block's, when nearly all gradients exist; or after it, when they
are gathered.

Weights, gradients and optimiser are counted as `rookery.train.strategies.single` allocates them. What a block keeps
for each token was counted on the real models by watching every tensor's memory (`tests/train/test_memory.py` repeats
it); for Triton's kernels, with what they allocate and no GPU. On a GPU nothing of this has been measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from rookery.config import rules
from rookery.config.tree import TrainConfig
from rookery.i18n import _

Trained = Literal["all", "adapter", "state"]

KEPT_BY_BLOCK: dict[tuple[str, Trained], dict[str, float]] = {
    ("x070", "all"): {"loops": 108, "half": 89, "fp32": 137, "half loops": 68,
                          "half chunked": 198, "fp32 chunked": 222},
    ("x070", "adapter"): {"loops": 108, "half": 71, "fp32": 129, "half loops": 68,
                          "half chunked": 180, "fp32 chunked": 214},
    ("x070", "state"): {"loops": 76, "half": 61, "fp32": 97, "half loops": 52,
                          "half chunked": 171, "fp32 chunked": 183},
    ("x060", "all"): {"loops": 132, "half": 58, "fp32": 114, "half loops": 84,
                          "half chunked": 165, "fp32 chunked": 213},
    ("x060", "adapter"): {"loops": 124, "half": 52, "fp32": 106, "half loops": 78,
                          "half chunked": 155, "fp32 chunked": 201},
    ("x060", "state"): {"loops": 96, "half": 38, "fp32": 78, "half loops": 64,
                          "half chunked": 141, "fp32 chunked": 173},
    ("x052", "all"): {"loops": 104, "half": 42, "fp32": 82, "half loops": 70,
                          "half chunked": 139, "fp32 chunked": 173},
    ("x052", "adapter"): {"loops": 104, "half": 38, "fp32": 82, "half loops": 66,
                          "half chunked": 117, "fp32 chunked": 155},
    ("x052", "state"): {"loops": 76, "half": 24, "fp32": 54, "half loops": 52,
                          "half chunked": 103, "fp32 chunked": 127},
}  # fmt: skip
"""Bytes that a block keeps for each token and channel, with head size 64, without its channel mixing's inner width:
on a CPU in fp32 (loops) or half precision (half loops), on a GPU with Triton in half precision or fp32, and where
neither Numba nor Triton serves (chunked)."""

CUDA_OVERHEAD = 600 << 20
"""Workspaces of cuBLAS, compiled kernels and what the allocator cannot use: an assumption."""

SAFE = 0.9
"""Part of the free memory that is planned for."""

MOST_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 17}
"""Tokens of a forward pass beyond which a device gets no faster, and `micro_bsz 0` no larger."""

HEAD_CHUNK_BYTES, NATIVE_HEAD_CHUNK_BYTES, LARGE_HEAD_CHUNK_BYTES = 64 << 20, 128 << 20, 512 << 20
"""As in `rookery.ops.head_loss`."""

SMALLEST_IN_8_BITS, TWO_MOMENTS, AT_A_TIME = 4096, 2 * (1 + 4 / 256), {"cpu": 1 << 18, "cuda": 1 << 22}
"""As in `rookery.train.lean_adamw`: elements of a matrix with moments in 8 bits, their bytes for each element, and the
elements that are updated together."""

UPDATE = 40
"""Bytes that such an update makes for each element of it."""


@dataclass(frozen=True)
class Plan:
    """Everything of a training that decides its memory. Names and meaning are those of the configuration."""

    version: str
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    vocab_size: int
    head_size: int = 64
    ranks: Mapping[str, int] = field(default_factory=dict)
    ctx_len: int = 1024
    micro_bsz: int = 1
    accumulate_grad_batches: int = 1
    precision: str = "bf16"
    optimizer: str = "adamw"
    master_weights: bool = True
    grad_cp: bool = False
    offload_activations: bool = False
    head_chunk: int = 0
    chunk_ctx: int = 0
    """Tokens of a chunk with train_type infctx; 0 = samples are read whole."""
    infctx_grad: str = "truncated"
    peft: str = "none"
    lora_r: int = 64
    lora_dropout: float = 0.0
    miss_mode: str = "bone"
    target_modules: tuple[str, ...] | None = None
    train_parts: tuple[str, ...] = ()
    quant: str = "none"
    accelerator: str = "cuda"
    kernel: str = "auto"
    devices: int = 1
    """Of all machines together."""
    strategy: str = "single"
    context_parallel: int = 1
    """Devices that share each sample."""

    @classmethod
    def of(cls, config: TrainConfig) -> Plan:
        """The plan of a resolved configuration. Ranks without a leaf follow the rule."""
        model, data, run, adapter = config.model, config.data, config.run, config.adapter
        version, layers, width = str(model.version), int(model.n_layer or 0), int(model.n_embd or 0)
        return cls(
            version=version,
            n_layer=layers,
            n_embd=width,
            dim_att=int(model.dim_att or 0),
            dim_ffn=int(model.dim_ffn or 0),
            vocab_size=int(model.vocab_size or 0),
            head_size=model.head_size,
            ranks=rules.ranks(version, layers, width, model.rank_rule),
            ctx_len=data.ctx_len,
            micro_bsz=run.micro_bsz,
            accumulate_grad_batches=run.accumulate_grad_batches,
            precision=str(run.precision),
            optimizer=config.optim.optimizer,
            master_weights=bool(config.optim.master_weights),
            grad_cp=bool(run.grad_cp),
            offload_activations=bool(run.offload_activations),
            head_chunk=run.head_chunk,
            chunk_ctx=min(run.chunk_ctx, data.ctx_len) if run.train_type == "infctx" else 0,
            infctx_grad=run.infctx_grad,
            peft=adapter.peft,
            lora_r=adapter.lora_r,
            lora_dropout=adapter.lora_dropout if adapter.peft in ("lora", "dora") else 0.0,
            miss_mode=adapter.miss_mode,
            target_modules=None if adapter.target_modules is None else tuple(adapter.target_modules),
            train_parts=tuple(adapter.train_parts),
            quant=adapter.quant,
            accelerator="cpu" if config.device.accelerator == "cpu" else "cuda",
            kernel=run.kernel,
            devices=config.device.devices * config.device.num_nodes,
            strategy=config.device.strategy,
            context_parallel=config.device.context_parallel,
        )

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.precision in ("bf16", "fp16") else 4

    @property
    def has_masters(self) -> bool:
        """Whether the optimiser keeps fp32 copies of what trains."""
        return self.element == 2 and self.master_weights

    @property
    def tokens(self) -> int:
        """Tokens whose activations are in memory together."""
        return -(-self.micro_bsz * (self.chunk_ctx or self.ctx_len) // self.context_parallel)

    def sharing(self, what: Literal["weights", "gradients", "optimiser"]) -> int:
        """Devices that share it out among them; of an adapter's training, only the frozen weights."""
        shared: tuple[str, ...]
        if self.strategy == "fsdp":
            shared = ("weights", "gradients", "optimiser") if self.peft == "none" else ("weights",)
        else:
            stage = self.strategy.removeprefix("deepspeed_stage_")[:1]
            order = ("optimiser", "gradients", "weights")
            shared = order[: int(stage)] if stage.isdigit() else ()
        return self.devices if what in shared else 1

    @property
    def trained(self) -> Trained:
        return "all" if self.peft == "none" else "state" if self.peft == "state" else "adapter"

    def trains(self, part: str) -> bool:
        """Whether base parameters of `part` (time, ln, emb, head) train."""
        return self.peft == "none" or (self.peft != "state" and part in self.train_parts)

    def matrices(self) -> list[tuple[str, int, int]]:
        """(name, out, in) of the large matrices of a block."""
        C, A, F = self.n_embd, self.dim_att, self.dim_ffn
        names = ("receptance", "key", "value") if self.version == "x070" else ("receptance", "key", "value", "gate")
        matrices = [*((f"att.{name}", A, C) for name in names), ("att.output", C, A)]
        matrices += [("ffn.key", F, C), ("ffn.value", C, F)]
        return matrices if self.version == "x070" else [*matrices, ("ffn.receptance", C, C)]

    def targets(self) -> list[tuple[int, int]]:
        """(out, in) of the matrices of a block that get an adapter."""
        if self.trained != "adapter":
            return []
        wanted = None if self.target_modules is None else set(self.target_modules)
        return [
            (rows, columns)
            for name, rows, columns in self.matrices()
            if wanted is None or wanted & {name, *name.split(".")}
        ]


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    matrices: int
    """In the large matrices of all blocks."""
    others: int
    """In everything else of the model."""
    added: int
    """In adapters or states."""
    trained: int

    @classmethod
    def of(cls, plan: Plan) -> Parameters:
        C, A, V, L = plan.n_embd, plan.dim_att, plan.vocab_size, plan.n_layer
        matrices = L * sum(rows * columns for _name, rows, columns in plan.matrices())
        norms = L * (4 * C + 2 * A) + 4 * C
        time = L * _time_mixing(plan)
        if plan.trained == "state":
            added = L * A * plan.head_size
        else:
            added = L * sum(_adapter_size(plan, rows, columns) for rows, columns in plan.targets())
        sizes = {"emb": V * C, "head": V * C, "ln": norms, "time": time}
        trained = added + sum(size for part, size in sizes.items() if plan.trains(part))
        return cls(matrices, sum(sizes.values()), added, trained + (matrices if plan.trained == "all" else 0))


def _time_mixing(plan: Plan) -> int:
    """Parameters of a block beside its matrices and normalisations."""
    C, A, ranks = plan.n_embd, plan.dim_att, plan.ranks
    if plan.version == "x070":
        return 13 * C + 2 * C * sum(ranks.values())
    if plan.version == "x060":
        return 8 * C + 2 * A + 10 * C * ranks["mix"] + (C + A) * ranks["decay"]
    return 6 * C + 2 * A


def _adapter_size(plan: Plan, rows: int, columns: int) -> int:
    r = plan.lora_r
    if plan.peft == "miss":
        return r * (columns if plan.miss_mode == "bat" else rows)
    return r * (rows + columns) + (rows if plan.peft == "dora" else 0)


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device."""

    weights: int
    optimiser: int
    """Master weights in fp32, if there are any, and the two moments."""
    gradients: int
    """At the end of the backward pass."""
    activations: int
    """What is kept for the backward pass, and what that or the head needs beside it."""
    overhead: int
    total: int
    """The most at one time: gradients and activations are not at their largest together."""


def estimate(plan: Plan) -> Estimate:
    """The memory that `plan` takes."""
    parameters, size = Parameters.of(plan), plan.element
    kept, head = _after_forward(plan), _head(plan)
    passing = plan.tokens * size * ((8 if plan.trained == "all" else 4) * plan.n_embd + 2 * plan.dim_ffn)
    in_first_block = _block(plan) + passing + size * parameters.trained
    in_last_block = kept + passing + (_block(plan) if plan.grad_cp else 0)
    if plan.trains("head"):
        in_last_block += size * plan.vocab_size * plan.n_embd
    activations = max(kept + head, in_last_block)
    several = plan.accumulate_grad_batches > 1 or 0 < plan.chunk_ctx < plan.ctx_len
    if plan.has_masters or size == 4:
        # Gradients of a half-precision model are gathered in fp32 after each backward pass.
        gradients = 4 * parameters.trained // plan.sharing("gradients")
        during = max(activations, in_first_block) + (gradients if several else 0)
        after = gradients + (size * parameters.trained if several and plan.has_masters else 0)
    else:
        gradients = size * parameters.trained // plan.sharing("gradients")
        during = max(activations + (gradients if several else 0), in_first_block)
        after = gradients
    large = list(_large(plan))
    if plan.optimizer == "adamw8bit" or (size == 2 and not plan.has_masters):
        after += UPDATE * min(AT_A_TIME[plan.accelerator], max(large, default=0))
    weights = _weights(plan, parameters)
    if plan.sharing("weights") > 1:
        # Gathered when they are used: embedding and head for the whole step, and two blocks.
        used = size * (2 * plan.vocab_size * plan.n_embd + 2 * parameters.matrices // plan.n_layer)
        weights = weights // plan.sharing("weights") + min(used, weights)
    optimiser = (12 if plan.has_masters else 8) * parameters.trained
    if plan.optimizer == "adamw8bit":
        optimiser -= int((8 - TWO_MOMENTS) * sum(large))
    optimiser //= plan.sharing("optimiser")
    overhead = CUDA_OVERHEAD if plan.accelerator == "cuda" else 0
    total = weights + optimiser + max(during, after) + overhead
    return Estimate(weights, optimiser, gradients, activations, overhead, total)


def _large(plan: Plan) -> Iterator[int]:
    """Numbers of elements of the matrices that train and are large enough for moments in 8 bits."""
    C, A, ranks = plan.n_embd, plan.dim_att, plan.ranks
    matrices = [plan.vocab_size * C for part in ("emb", "head") if plan.trains(part)]
    block: list[int] = []
    if plan.trained == "all":
        block += [rows * columns for _name, rows, columns in plan.matrices()]
    if plan.trains("time") and plan.version == "x070":
        block += [C * rank for rank in ranks.values()] * 2
    elif plan.trains("time") and plan.version == "x060":
        block += [5 * C * ranks["mix"]] * 2 + [C * ranks["decay"], A * ranks["decay"]]
    if plan.trained == "state":
        block.append(A * plan.head_size)
    for rows, columns in plan.targets():
        if plan.peft == "miss":
            block.append(_adapter_size(plan, rows, columns))
        else:
            block += [plan.lora_r * rows, plan.lora_r * columns]
    return (size for size in [*matrices, *block * plan.n_layer] if size >= SMALLEST_IN_8_BITS)


def _weights(plan: Plan, parameters: Parameters) -> int:
    size = plan.element
    bits = {"none": 8 * size, "int8": 8.5, "nf4": 4.5}[plan.quant]
    initial = 0
    if plan.peft == "pissa":
        # What it begins with is kept in fp32, and beside a quantised residual once more.
        initial = parameters.added * (4 + (size if plan.quant != "none" else 0))
    return int(parameters.matrices * bits / 8) + size * (parameters.others + parameters.added) + initial


def _after_forward(plan: Plan) -> int:
    """What the forward pass leaves for the backward pass."""
    size, C = plan.element, plan.n_embd
    # The embedding's and the head's side of the blocks.
    streams = 2
    if plan.grad_cp:
        # Each block's input, and the first values, which all blocks of x070 share.
        streams += plan.version == "x070"
        streams += 1 if plan.offload_activations and plan.accelerator == "cuda" else plan.n_layer
    states = 2 + (plan.ctx_len // plan.chunk_ctx if plan.chunk_ctx and plan.infctx_grad == "full" else 0)
    if plan.context_parallel > 1:
        states += 4  # from and to other devices, and their gradients
    state = 4 * plan.n_layer * plan.micro_bsz * plan.dim_att * plan.head_size
    blocks = 0 if plan.grad_cp else plan.n_layer * _block(plan)
    return plan.tokens * size * C * streams + states * state + blocks


def _block(plan: Plan) -> int:
    """What one block keeps."""
    kept = plan.tokens * _kept_by_block(plan)
    if plan.peft == "pissa":
        kept += 2 * plan.lora_r * plan.element * sum(rows + columns for rows, columns in plan.targets())
    return int(kept)


def _kept_by_block(plan: Plan) -> float:
    """Bytes for each token."""
    size, path = plan.element, _path(plan)
    like_state = plan.trained == "state" or plan.peft == "miss"
    row: Trained = "all" if plan.trains("time") or plan.trains("ln") else "state" if like_state else "adapter"
    channels = KEPT_BY_BLOCK[plan.version, row][path] + _of_head_size(plan, path)
    inner = size * plan.dim_ffn * (1 if row == "state" else 2)
    ranks = sum(rank * (5 if name == "mix" else 1) for name, rank in plan.ranks.items())
    outputs, inputs = (sum(sizes) for sizes in zip((0, 0), *plan.targets(), strict=True))
    low = plan.lora_r * len(plan.targets()) * (2 if plan.peft == "pissa" else 1)
    kept = channels * plan.n_embd + inner + size * (ranks + low)
    if plan.peft == "dora":
        kept += 2 * size * outputs
    if plan.miss_mode == "bat" and plan.peft == "miss":
        kept += size * inputs
    if plan.lora_dropout:
        kept += inputs * (1 if plan.accelerator == "cuda" else size)
    return kept


def _path(plan: Plan) -> str:
    half = plan.element == 2
    if plan.kernel in ("chunked", "reference"):
        return "half chunked" if half else "fp32 chunked"
    if plan.accelerator == "cpu":
        return "half loops" if half else "loops"
    return "half" if half else "fp32"


def _of_head_size(plan: Plan, path: str) -> float:
    """The states that recurrences keep grow with the size of a head: bytes for each token and channel, beside those of
    size 64."""
    more = plan.head_size - 64
    if path in ("loops", "half loops"):
        return more / 4
    if plan.version == "x070" and path in ("half", "fp32"):
        return more / (16 if path == "half" else 4)
    return 0.0


def _head(plan: Plan) -> int:
    """Logits of a chunk, and the gradient of the head where it trains."""
    half, V, trains = plan.element == 2, plan.vocab_size, plan.trains("head")
    if plan.kernel not in ("chunked", "reference"):
        # They become their gradients in place.
        size = NATIVE_HEAD_CHUNK_BYTES
        if plan.accelerator == "cuda":
            size = LARGE_HEAD_CHUNK_BYTES if trains else HEAD_CHUNK_BYTES
        rows = min(plan.tokens, plan.head_chunk or max(1, size // (plan.element * V)))
        logits = rows * V * plan.element
        matrix = V * plan.n_embd if trains else 0
        return max(logits + (4 + plan.element) * matrix, matrix * (10 if half else 8))
    rows = min(plan.tokens, plan.head_chunk or max(1, HEAD_CHUNK_BYTES // (4 * V)))
    logits = rows * V * (12 if half else 8)
    if not trains:
        return logits
    matrix = V * plan.n_embd
    one_chunk = max(logits + 4 * matrix, rows * V * (6 if half else 4) + (4 + plan.element) * matrix)
    return max(one_chunk, matrix * (10 if half else 8))


def largest_micro_bsz(plan: Plan, free: int, *, whole_epochs: bool = False, groups: int = 1) -> int:
    """The largest `micro_bsz` that fits into `free` bytes; 0 if not even 1 does.

    Args:
        whole_epochs: only sizes with which a number of optimiser steps makes up the 40320 samples of a mini-epoch, as
            they must when `epoch_steps` is not given.
        groups: devices of all machines, or groups of them that share samples.
    """
    per_sample = plan.accumulate_grad_batches * groups
    most = max(1, MOST_TOKENS[plan.accelerator] * plan.context_parallel // (plan.chunk_ctx or plan.ctx_len))
    for micro_bsz in range(most, 0, -1):
        if whole_epochs and rules.MINI_EPOCH % (micro_bsz * per_sample):
            continue
        if fits(replace(plan, micro_bsz=micro_bsz), free):
            return micro_bsz
    return 0


def fits(plan: Plan, free: int) -> bool:
    return estimate(plan).total <= SAFE * free


def summary(need: Estimate, free: int | None) -> str:
    """One line for people."""
    parts = {
        "weights": gib(need.weights),
        "optimiser": gib(need.optimiser),
        "gradients": gib(need.gradients),
        "activations": gib(need.activations),
        "total": gib(need.total),
    }
    if free is None:
        return _(
            "memory (estimate): weights {weights}, optimiser {optimiser}, gradients {gradients}, activations "
            "{activations}; at most {total} at one time",
            **parts,
        )
    return _(
        "memory (estimate): weights {weights}, optimiser {optimiser}, gradients {gradients}, activations "
        "{activations}; at most {total} at one time, of {free} free",
        **parts,
        free=gib(free),
    )


def gib(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
