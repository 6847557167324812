"""The estimate of a training's memory against what its tensors really take, and what is advised when it is too much."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rookery.adapters import AdapterConfig, attach
from rookery.bench.live_bytes import LiveBytes
from rookery.config import TrainConfig, machine, resolve, rules
from rookery.config.memory import SAFE, Parameters, Plan, estimate, fits, largest_micro_bsz, summary
from rookery.config.remedies import advice, remedies
from rookery.errors import UserError
from rookery.models import Model, ModelShape, create, initialise
from rookery.quant import quantise
from rookery.train import memory
from rookery.train.memory import check_memory, free_memory
from rookery.train.optim import build_optimizer, parameter_groups
from rookery.train.precision import DTYPES
from rookery.train.schedule import Rates
from rookery.train.strategies import SingleDevice

RANKS = {"x070": {"w": 24, "a": 24, "v": 24, "g": 24}, "x060": {"mix": 16, "decay": 24}, "x052": {}}


def small_plan(version: str, **changes: object) -> Plan:
    plan = Plan(
        version, 8, 128, 128, 512, 1000, 64, RANKS[version],
        ctx_len=192, micro_bsz=2, precision="fp32", head_chunk=64, lora_r=8, accelerator="cpu",
    )  # fmt: skip
    return replace(plan, **changes)  # type: ignore[arg-type]


def build(plan: Plan) -> Model:
    model = create(
        ModelShape(
            plan.version, plan.n_layer, plan.n_embd, plan.vocab_size, plan.head_size, plan.dim_att, plan.dim_ffn,
            plan.ranks,
        ),
        kernel=plan.kernel,
    )  # fmt: skip
    initialise(model, 0)
    model.grad_cp = plan.grad_cp
    if plan.peft == "state":
        model.requires_grad_(False)
        for block in model.blocks:
            block.att.time_state = nn.Parameter(torch.zeros(plan.dim_att // plan.head_size, *2 * [plan.head_size]))
    elif plan.peft != "none":
        targets, parts = plan.target_modules, plan.train_parts
        dropout = plan.lora_dropout
        config = AdapterConfig(
            plan.peft, plan.lora_r, dropout=dropout, targets=targets, train_parts=parts, miss_mode=plan.miss_mode
        )  # type: ignore[arg-type]
        attach(model, config)
    if plan.quant != "none":
        quantise(model, plan.quant)  # type: ignore[arg-type]
    return model.train()


def measured(plan: Plan, steps: int = 2) -> tuple[int, int, int]:
    """Bytes of weights, of the optimiser's tensors, and the most that a step takes beside them, with the engine that
    trains."""
    model = build(plan)
    groups = parameter_groups(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], plan.version, weight_decay=False
    )
    engine = SingleDevice(
        model,
        lambda tensors: build_optimizer(
            tensors, groups, betas=(0.9, 0.99), eps=1e-8, eight_bit=plan.optimizer == "adamw8bit"
        ),
        dtype=DTYPES[plan.precision],
        grad_clip=1.0,
        masters=plan.master_weights,
    )
    tokens = torch.randint(plan.vocab_size, (plan.micro_bsz, plan.ctx_len))
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    trained = [p for group in engine.optimizer.param_groups for p in group["params"]]
    masters = sum(4 * p.numel() for p in trained) if plan.has_masters else 0
    with LiveBytes([*tensors, *trained, tokens]) as live:
        for _ in range(steps):
            for i in range(plan.accumulate_grad_batches):
                loss, _state = model.loss(tokens, tokens, chunk=plan.head_chunk)
                del _state
                engine.backward(loss, weight=1.0, last=i == plan.accumulate_grad_batches - 1)
                del loss
            engine.step(Rates(1e-3, 0.0, 0.0))
    moments = sum(moment.nbytes for p in trained for moment in engine.optimizer.state[p].values())
    return weights, masters + moments, live.peak - moments


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_cp": True},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16"},
        {"optimizer": "adamw8bit"},
        {"optimizer": "adamw8bit", "precision": "bf16", "accumulate_grad_batches": 2},
        {"precision": "bf16", "master_weights": False, "grad_cp": True},
        {"optimizer": "adamw8bit", "precision": "bf16", "master_weights": False, "accumulate_grad_batches": 2},
        {"optimizer": "adamw8bit", "peft": "lora", "train_parts": ("time", "ln")},
        {"precision": "bf16", "grad_cp": True, "accumulate_grad_batches": 2},
        {"kernel": "chunked"},
        {"peft": "state"},
        {"peft": "lora"},
        {"peft": "lora", "quant": "nf4", "precision": "bf16"},
        {"peft": "lora", "quant": "int8", "grad_cp": True},
        {"peft": "lora", "lora_dropout": 0.01, "precision": "bf16"},
        {"peft": "lora", "train_parts": ("time", "ln")},
        {"peft": "dora"},
        {"peft": "pissa", "precision": "bf16"},
        {"peft": "miss"},
        {"peft": "miss", "miss_mode": "bat", "precision": "bf16"},
    ],
    ids=str,
)
def test_estimate_is_within_a_fifth_of_what_is_counted(version: str, changes: dict) -> None:
    plan = small_plan(version, **changes)
    weights, optimiser, beside = measured(plan)
    need = estimate(plan)
    assert need.weights == pytest.approx(weights, rel=0.01)
    assert need.optimiser == pytest.approx(optimiser, rel=0.03)
    assert need.total - need.weights - need.optimiser == pytest.approx(beside, rel=0.2)


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
@pytest.mark.parametrize(
    ("peft", "parts"), [("none", ()), ("state", ()), ("lora", ()), ("dora", ("time",)), ("miss", ("ln", "emb", "head"))]
)
def test_parameters_are_counted_exactly(version: str, peft: str, parts: tuple[str, ...]) -> None:
    plan = small_plan(version, peft=peft, train_parts=parts, n_layer=2)
    model = build(plan)
    found = Parameters.of(plan)
    assert found.matrices + found.others + found.added == sum(p.numel() for p in model.parameters())
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_target_modules_are_counted() -> None:
    plan = small_plan("x060", peft="lora", target_modules=("att.key", "ffn"), n_layer=2)
    assert Parameters.of(plan).added == sum(p.numel() for p in build(plan).parameters() if p.requires_grad)


def test_activations_grow_with_tokens_and_not_with_infctx_samples() -> None:
    plan = released("1.5B", peft="lora", ctx_len=2048)
    once, twice = (estimate(replace(plan, ctx_len=n)).activations for n in (2048, 4096))
    assert twice == pytest.approx(2 * once, rel=0.05)
    assert estimate(replace(plan, micro_bsz=2)).activations == pytest.approx(
        estimate(replace(plan, ctx_len=2 * plan.ctx_len)).activations, rel=0.05
    )
    chunked = [estimate(replace(plan, ctx_len=n, chunk_ctx=512)).total for n in (2048, 65536)]
    assert chunked[0] == chunked[1]


def released(size: str, **changes: object) -> Plan:
    layers, width = {"0.1B": (12, 768), "1.5B": (24, 2048), "2.9B": (32, 2560)}[size]
    ranks = rules.ranks("x070", layers, width, "g1")
    plan = Plan("x070", layers, width, width, 4 * width, 65536, 64, ranks)
    return replace(plan, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("gibibytes", [6, 12, 24])
@pytest.mark.parametrize("peft", ["none", "lora", "state"])
def test_remedies_fit(peft: str, gibibytes: int) -> None:
    plan = released("2.9B", peft=peft, ctx_len=4096, micro_bsz=8)
    free = gibibytes << 30
    assert not fits(plan, free)
    found = remedies(plan, free)
    assert 2 <= len({remedy.flags for remedy in found}) <= 3
    for remedy in found:
        words = remedy.flags.split()
        values = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
        values.pop("train_type", None)
        change = {k: type(getattr(plan, k))(int(v) if v.isdecimal() else v) for k, v in values.items()}
        changed = replace(plan, **change)
        assert estimate(changed).total == remedy.total <= SAFE * free
        assert changed.micro_bsz * changed.accumulate_grad_batches == 8
    assert all(f"{remedy.flags}: " in advice(plan, free) for remedy in found)


def test_several_devices_may_share_each_sample() -> None:
    plan = released("0.1B", ctx_len=65536, micro_bsz=1, devices=6, strategy="ddp")
    shared = replace(plan, context_parallel=3, accumulate_grad_batches=3)
    free = int(estimate(shared).total / SAFE) + 1
    assert not fits(plan, free)
    assert remedies(plan, free)[0].flags == "--context_parallel 3 --accumulate_grad_batches 3"
    more = int(estimate(replace(shared, context_parallel=6, accumulate_grad_batches=6)).total / SAFE) + 1
    assert remedies(shared, more)[0].flags == "--context_parallel 6 --accumulate_grad_batches 6"
    infctx = replace(plan, chunk_ctx=32768)
    assert all("context_parallel" not in remedy.flags for remedy in remedies(infctx, free // 4))


def test_nothing_helps_where_not_even_the_weights_fit() -> None:
    plan = released("2.9B")
    assert remedies(plan, 1 << 30) == []
    assert "smaller model" in advice(plan, 1 << 30)


def test_largest_micro_bsz() -> None:
    plan = released("0.1B", ctx_len=512, peft="lora")
    free = 8 << 30
    best = largest_micro_bsz(plan, free)
    assert fits(replace(plan, micro_bsz=best), free)
    assert not fits(replace(plan, micro_bsz=best + 1), free)
    whole = largest_micro_bsz(plan, free, whole_epochs=True)
    assert whole <= best
    assert rules.MINI_EPOCH % whole == 0
    assert largest_micro_bsz(replace(plan, grad_cp=True), free) > best
    assert largest_micro_bsz(plan, 1 << 28) == 0
    assert largest_micro_bsz(plan, 1 << 50) == (1 << 17) // 512
    assert largest_micro_bsz(replace(plan, accelerator="cpu"), 1 << 50) == (1 << 13) // 512


class Copies(TorchDispatchMode):
    """Notes the sizes in bytes of what is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.copy_.default:
            self.sizes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_block_inputs_wait_on_the_host(version: str) -> None:
    """On a CPU the host's memory is the same: what is seen is that the input of each block is copied there, of the
    bytes that the plan of a GPU then lacks, and that nothing changes."""
    plan = small_plan(version, grad_cp=True)
    model, tokens = build(plan), torch.randint(plan.vocab_size, (plan.micro_bsz, plan.ctx_len))
    found = []
    for offload in (False, True):
        model.offload_activations = offload
        with Copies() as copies:
            loss, _state = model.loss(tokens, tokens)
        loss.backward()
        found.append((copies.sizes, loss.item(), [p.grad for p in model.parameters()]))
        model.zero_grad(set_to_none=True)
    (plainly, loss, gradients), (offloaded, same_loss, same_gradients) = found
    moved = sum(offloaded) - sum(plainly)
    assert same_loss == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True) if a is not None)
    on_gpu = [estimate(replace(plan, accelerator="cuda", offload_activations=o)).activations for o in (False, True)]
    one = plan.tokens * plan.element * plan.n_embd
    assert moved == plan.n_layer * one == on_gpu[0] - on_gpu[1] + one


def test_free_memory_of_this_machine() -> None:
    assert 1 << 26 < free_memory("cpu") < psutil.virtual_memory().total


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n", encoding="utf-8")
    (tmp_path / "memory.current").write_text("1000000\n", encoding="utf-8")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000\n", encoding="utf-8")
    assert free_memory("cpu") == 2500000
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert free_memory("cpu") > 2500000


def test_what_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(TrainConfig(n_layer=12, n_embd=768, micro_bsz=48, ctx_len=1024, precision="fp32")).config
    said: list[str] = []
    check_memory(
        resolve(TrainConfig(n_layer=2, n_embd=64, vocab_size=100, micro_bsz=1, ctx_len=64)).config, said.append
    )
    (line,) = said
    assert line.startswith("memory (estimate): weights ")
    monkeypatch.setattr(memory, "free_memory", lambda accelerator: 16 << 30)
    with pytest.raises(UserError, match="does not fit") as error:
        check_memory(config, said.append)
    lines = str(error.value).splitlines()
    assert "of 16.0 GiB free" in lines[1]
    assert [line.split()[0] for line in lines[3:]] == ["--micro_bsz", "--grad_cp", "--train_type"]
    need = estimate(Plan.of(config)).total
    monkeypatch.setattr(memory, "free_memory", lambda accelerator: need)
    said.clear()
    check_memory(config, said.append)
    assert "may run out" in said[1]
    assert summary(estimate(Plan.of(config)), None).endswith("at one time")


def test_planning_needs_no_torch() -> None:
    code = "import sys, rookery.config.memory; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
