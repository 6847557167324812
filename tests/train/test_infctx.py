"""Samples read in chunks: the loss of the whole, gradients truncated or whole, memory for one chunk."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model_pieces import VERSIONS, assert_equal, batch_of, gradients, model_of
from safetensors.torch import load_file
from torch import Tensor

import rookery.train
from rookery.bench.live_bytes import LiveBytes
from rookery.formats import load
from rookery.models import Model
from rookery.train.infctx import chunk_losses
from rookery.train.loop import Batch, LossFunction, fit
from rookery.train.optim import build_optimizer, parameter_groups
from rookery.train.run import language_loss
from rookery.train.schedule import Schedule
from rookery.train.strategies import SingleDevice

GOLDEN = Path(__file__).parents[1] / "golden"
CONSTANT = Schedule(1e-3, 1e-3, 0, 32, 3200, 100, 1, weight_decay=0.1)

versions = pytest.mark.parametrize("version", VERSIONS)


def computed(model: Model, loss_function: LossFunction, batch: Batch) -> dict[str, Tensor]:
    """Loss and gradients, put together as the training loop does."""
    total = torch.zeros((), dtype=torch.float64)
    lasts = []
    for part in loss_function(model, batch):
        loss = part.loss * (part.trained / batch.trained)
        if loss.requires_grad:
            loss.backward()
        total += loss.detach()
        lasts.append(part.last)
    assert lasts == [False] * (len(lasts) - 1) + [True]
    return {"loss": total} | gradients(model)


# The published numbers


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_truncated_gradients_are_the_published_ones(version: str) -> None:
    """The golden files have no L2Wrap: its part of the gradient is below their tolerance here."""
    wanted = json.loads((GOLDEN / f"{version}_infctx.json").read_text(encoding="utf-8"))
    dix = load_file(GOLDEN / f"{version}_state_io.safetensors")["dix"][:, : wanted["tokens_used"] + 1]
    model = load(GOLDEN / f"{version}_ckpt.safetensors", device="cpu", dtype=torch.float64)
    batch = Batch(dix[:, :-1], dix[:, 1:], dix[:, 1:].numel(), 0)
    parts = list(chunk_losses(model, batch, chunk_ctx=wanted["chunk_ctx"]))
    assert [part.loss.item() for part in parts] == pytest.approx(wanted["chunk_losses"], abs=1e-10)
    got = computed(model, partial(chunk_losses, chunk_ctx=wanted["chunk_ctx"]), batch)
    assert got["loss"].item() == pytest.approx(wanted["loss"], abs=1e-10)
    for name, norm in wanted["grad_l2_norms_truncated"].items():
        assert got[name].norm().item() == pytest.approx(norm, rel=1e-3), name


# What is computed


@pytest.mark.parametrize("lengths", [None, [5, 1, 17, 30, 1, 2, 24, 16]], ids=["rows", "packed"])
@pytest.mark.parametrize("chunk_ctx", [8, 13, 48, 100])
@versions
def test_full_gradients_are_those_of_the_whole_sample(version: str, chunk_ctx: int, lengths: list[int] | None) -> None:
    model = model_of(version, tuned=True)
    batch = batch_of(2, 48, lengths=lengths)
    got = computed(model, partial(chunk_losses, chunk_ctx=chunk_ctx, full=True), batch)
    assert_equal(got, computed(model, language_loss, batch), 1e-12)


def reference_truncated(model: Model, batch: Batch, chunk_ctx: int) -> dict[str, Tensor]:
    """Chunk by chunk with the model alone: one sum of losses, the state detached in between."""
    state, total = None, torch.zeros((), dtype=torch.float64)
    for x, y in zip(batch.tokens.split(chunk_ctx, dim=1), batch.targets.split(chunk_ctx, dim=1), strict=True):
        loss, after = model.loss(x, y, state)
        total = total + loss * ((y != -100).sum() / batch.trained)
        state = after.detach()
    total.backward()
    return {"loss": total.detach()} | gradients(model)


@pytest.mark.parametrize("chunk_ctx", [8, 13, 100])
@versions
def test_truncated_gradients_end_at_each_chunk(version: str, chunk_ctx: int) -> None:
    model = model_of(version, tuned=True)
    batch = batch_of(2, 48)
    truncated = partial(chunk_losses, chunk_ctx=chunk_ctx)
    got = computed(model, truncated, batch)
    assert_equal(got, reference_truncated(model, batch, chunk_ctx), 1e-12)
    whole = computed(model, language_loss, batch)
    torch.testing.assert_close(got["loss"], whole["loss"], rtol=1e-12, atol=0)
    cut = float((got["blocks.0.att.key.weight"] - whole["blocks.0.att.key.weight"]).norm())
    assert (cut > 1e-3) == (chunk_ctx < 48)


@versions
def test_packed_sequences_are_cut_only_where_a_chunk_ends(version: str) -> None:
    """Chunks of 2 rows * 8 tokens: no border lies inside one of these sequences, so nothing is truncated."""
    model = model_of(version, tuned=True)
    batch = batch_of(2, 16, lengths=[5, 11, 9, 7])
    got = computed(model, partial(chunk_losses, chunk_ctx=8), batch)
    assert_equal(got, computed(model, language_loss, batch), 1e-12)
    batch = batch_of(2, 16, lengths=[5, 13, 7, 7])
    got = computed(model, partial(chunk_losses, chunk_ctx=8), batch)
    want = computed(model, language_loss, batch)
    torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-12, atol=0)
    assert float((got["blocks.0.att.key.weight"] - want["blocks.0.att.key.weight"]).norm()) > 1e-4


@pytest.mark.parametrize("full", [False, True], ids=["truncated", "full"])
@versions
def test_fp32_loss_is_that_of_the_whole_sample(version: str, full: bool) -> None:
    model, batch = model_of(version, torch.float32, kernel="auto"), batch_of(2, 60, masked=0)
    got = computed(model, partial(chunk_losses, chunk_ctx=16, full=full), batch)
    assert got["loss"].item() == pytest.approx(computed(model, language_loss, batch)["loss"].item(), rel=1e-6)


@pytest.mark.parametrize("full", [False, True], ids=["truncated", "full"])
def test_the_state_between_chunks_is_fp32_in_a_bf16_model(full: bool) -> None:
    """With a bf16 state, as the references have it, the loss would be off by 6e-5 of itself."""
    model, batch = model_of("x070", torch.bfloat16), batch_of(2, 64)
    with torch.no_grad():
        (whole,) = language_loss(model, batch)
    total = sum(
        part.loss.item() * part.trained / batch.trained
        for part in chunk_losses(model, batch, chunk_ctx=8, full=full)
        if part.loss.backward() is None
    )
    assert total == pytest.approx(whole.loss.item(), rel=1e-6)


@pytest.mark.parametrize("full", [False, True], ids=["truncated", "full"])
@pytest.mark.parametrize("trained", [slice(0, 0), slice(40, 48)], ids=["nothing trained", "the last chunk trained"])
def test_masked_samples(trained: slice, full: bool) -> None:
    model, batch = model_of("x070"), batch_of(2, 48, masked=0)
    targets = torch.full_like(batch.targets, -100)
    targets[:, trained] = batch.targets[:, trained]
    batch = Batch(batch.tokens, targets, int((targets != -100).sum()), 0)
    got = [(part.trained, part.last) for part in chunk_losses(model, batch, chunk_ctx=8)]
    assert got == [(batch.trained, True)], "chunks that train nothing should only pass the state on"
    if batch.trained:
        got_full = computed(model, partial(chunk_losses, chunk_ctx=8, full=True), batch)
        assert_equal(got_full, computed(model, language_loss, batch), 1e-12)


def test_dropout_is_the_same_in_both_passes() -> None:
    """The same random numbers are drawn for a chunk without gradients and with them, and afterwards the generator is
    where a single pass leaves it. Loss and gradients are then those of chunks in one graph."""
    model, batch = model_of("x060", dropout=0.3, tuned=True).train(), batch_of(2, 48)
    torch.manual_seed(3)
    got = computed(model, partial(chunk_losses, chunk_ctx=16, full=True), batch)
    after = torch.rand(1)

    torch.manual_seed(3)
    state, total = None, torch.zeros((), dtype=torch.float64)
    for x, y in zip(batch.tokens.split(16, dim=1), batch.targets.split(16, dim=1), strict=True):
        loss, state = model.loss(x, y, state)
        total = total + loss * ((y != -100).sum() / batch.trained)
    total.backward()
    assert_equal(got, {"loss": total.detach()} | gradients(model), 1e-12)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("full", [False, True], ids=["truncated", "full"])
def test_without_gradients_the_loss_is_the_same(full: bool) -> None:
    model, batch = model_of("x070"), batch_of(2, 48)
    with torch.no_grad():
        parts = list(chunk_losses(model, batch, chunk_ctx=10, full=full))
        (whole,) = language_loss(model, batch)
    mean = sum(part.loss * part.trained for part in parts) / batch.trained
    torch.testing.assert_close(mean, whole.loss, rtol=1e-12, atol=0)


# How much memory it takes


def peak_bytes(loss_function: LossFunction, length: int) -> int:
    """Largest allocation of a forward and backward pass over samples of `length` tokens, gradients included and the
    samples themselves left out."""
    model, batch = model_of("x070", torch.float32), batch_of(2, length)
    with LiveBytes(but=(batch.tokens, batch.targets)) as allocated:
        for part in loss_function(model, batch):
            part.loss.backward()
    return allocated.peak


def test_memory_of_truncated_chunks_does_not_grow_with_the_sample() -> None:
    truncated = partial(chunk_losses, chunk_ctx=32)
    short, long = peak_bytes(truncated, 64), peak_bytes(truncated, 1024)
    assert abs(long - short) < 8192, (short, long)
    assert peak_bytes(language_loss, 1024) > 5 * long


def test_memory_of_full_gradients_grows_by_the_states_alone() -> None:
    full = partial(chunk_losses, chunk_ctx=32, full=True)
    short, long = peak_bytes(full, 64), peak_bytes(full, 1024)
    layers, sequences, channels, heads, head_size = 2, 2, 32, 2, 16
    state = 4 * layers * sequences * (2 * channels + heads * head_size**2)
    random_state = torch.get_rng_state().numel()
    more_chunks = (1024 - 64) // 32
    assert long - short < more_chunks * (state + random_state) * 1.1, (short, long)
    assert long - short > more_chunks * state * 0.9


# Training with it


def train(model: Model, loss_function: LossFunction, rows: list[Batch], **settings: Any) -> list[float]:
    """Losses and gradient norms of the steps."""
    groups = parameter_groups(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad], model.version, weight_decay=True
    )
    build = partial(build_optimizer, groups=groups, betas=(0.9, 0.99), eps=1e-8)
    engine = SingleDevice(model, build, dtype=settings.pop("dtype", torch.float64), grad_clip=1.0)
    seen: list[float] = []
    steps = range(len(rows) // settings.get("accumulate", 1))
    fit(
        engine, loss_function, iter(rows), CONSTANT, steps,
        after_step=[lambda step: seen.extend([step.loss.item(), step.grad_norm.item()])], **settings,
    )  # fmt: skip
    return seen


ROWS = [batch_of(2, 48, seed=seed) for seed in range(6)]


@versions
def test_full_chunks_train_as_whole_samples_do(version: str) -> None:
    got = train(model_of(version), partial(chunk_losses, chunk_ctx=16, full=True), ROWS, accumulate=2)
    assert got == pytest.approx(train(model_of(version), language_loss, ROWS, accumulate=2), rel=1e-9)


def test_fp16_losses_are_scaled_once() -> None:
    """The gradient that passes between chunks already holds the scale."""
    full = partial(chunk_losses, chunk_ctx=16, full=True)
    got = train(model_of("x070"), full, ROWS, dtype=torch.float16)
    assert got == pytest.approx(train(model_of("x070"), language_loss, ROWS), rel=0.01)


@pytest.mark.parametrize("full", [False, True], ids=["truncated", "full"])
def test_a_tuned_state_trains(full: bool) -> None:
    """Truncated, only the first chunk reaches it: the other losses depend on nothing that trains."""
    model = model_of("x070", tuned=True)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("time_state"))
    before = [block.att.time_state.detach().clone() for block in model.blocks if block.att.time_state is not None]
    losses = train(model, partial(chunk_losses, chunk_ctx=16, full=full), ROWS[:1] * 5)
    after = [block.att.time_state for block in model.blocks]
    assert all(tensor is not None and (tensor != start).any() for tensor, start in zip(after, before, strict=True))
    assert losses[-2] < losses[0]


def test_a_run_reads_its_samples_and_its_validation_in_chunks(
    config: Callable[..., Any], data_file: Path, tmp_path: Path
) -> None:
    """Full gradients train as whole samples do; truncated ones begin with the same loss and go another way."""
    losses, validation = {}, {}
    for name, flags in {
        "whole": {},
        "full": {"train_type": "infctx", "chunk_ctx": 6, "infctx_grad": "full"},
        "truncated": {"train_type": "infctx", "chunk_ctx": 6},
    }.items():
        folder = tmp_path / name
        result = rookery.train.run(config(proj_dir=str(folder), val_file=str(data_file), **flags))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[name] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
        validation[name] = result.val_loss
    assert losses["full"] == pytest.approx(losses["whole"], rel=1e-3)
    assert validation["full"] == pytest.approx(validation["whole"], rel=1e-3)
    assert losses["truncated"][0] == pytest.approx(losses["whole"][0], rel=1e-6)
    assert losses["truncated"][10:] != pytest.approx(losses["whole"][10:], rel=1e-4)
