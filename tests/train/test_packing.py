"""Packed rows: losses, logits, states and gradients are those of the sequences alone, and training takes them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_pieces import VERSIONS, VOCAB, assert_equal, batch_of, gradients, model_of
from torch import Tensor
from train_pieces import CTX

import rookery.train
from rookery.config import parse
from rookery.data import open_dataset
from rookery.errors import UserError
from rookery.formats import load
from rookery.models import Model, Parts, State
from rookery.train.batches import batches, to_device
from rookery.train.loop import Batch, fit
from rookery.train.optim import build_optimizer, parameter_groups
from rookery.train.run import language_loss
from rookery.train.schedule import Schedule
from rookery.train.strategies import SingleDevice

LENGTHS = [5, 1, 17, 30, 3, 2, 12]

versions = pytest.mark.parametrize("version", VERSIONS)


def alone(batch: Batch) -> list[Batch]:
    """The packed sequences of a batch, each in a batch of its own."""
    assert batch.lengths is not None
    lengths = batch.lengths.tolist()
    rows = zip(batch.tokens.flatten().split(lengths), batch.targets.flatten().split(lengths), strict=True)
    return [Batch(x[None], y[None], int((y != -100).sum()), 0) for x, y in rows]


def everything(model: Model, batch: Batch) -> dict[str, Tensor]:
    """Loss, logits, final states, and gradients of the loss."""
    loss, state = model.loss(batch.tokens, batch.targets, lengths=batch.lengths, trained=batch.trained)
    loss.backward()
    with torch.no_grad():
        logits, _ = model(batch.tokens, lengths=batch.lengths)
    assert logits.shape == (*batch.tokens.shape, VOCAB)
    return together(loss, logits.flatten(0, 1), state, model)


def everything_alone(model: Model, batch: Batch) -> dict[str, Tensor]:
    """The same, each sequence in a call of its own."""
    total, logits, states = torch.zeros(()), [], []
    for row in alone(batch):
        loss, state = model.loss(row.tokens, row.targets)
        (loss * row.trained / batch.trained).backward()
        total = total + loss.detach() * row.trained / batch.trained
        logits.append(model(row.tokens)[0][0].detach())
        states.append(state)
    joined = State(*(torch.cat(parts, dim=1) for parts in zip(*(state.tensors for state in states), strict=True)))
    return together(total, torch.cat(logits), joined, model)


def together(loss: Tensor, logits: Tensor, state: State, model: Model) -> dict[str, Tensor]:
    names = ("att_shift", "wkv", "ffn_shift")
    states = {name: x.detach() for name, x in zip(names, state.tensors, strict=True)}
    return {"loss": loss.detach().to(logits.dtype), "logits": logits} | states | gradients(model)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kernel", ["reference", "chunked", "native"])
@versions
def test_packed_rows_equal_the_sequences_alone(version: str, kernel: str, dtype: torch.dtype, tolerance: float) -> None:
    model = model_of(version, dtype, kernel=kernel, tuned=True)
    batch = batch_of(2, sum(LENGTHS) // 2, lengths=LENGTHS)
    got = everything(model, batch)
    assert_equal(got, everything_alone(model, batch), tolerance)
    for layer in range(2):
        assert got[f"blocks.{layer}.att.time_state"].any()


@versions
def test_bf16_is_as_near_as_bf16_can_be(version: str) -> None:
    model = model_of(version, torch.bfloat16)
    batch = batch_of(2, sum(LENGTHS) // 2, lengths=LENGTHS)
    got, want = everything(model, batch), everything_alone(model, batch)
    assert float(got["loss"]) == pytest.approx(float(want["loss"]), rel=0.01)
    assert float((got["logits"] - want["logits"]).float().std() / want["logits"].float().std()) < 0.02


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7))
@versions
def test_any_lengths(version: str, lengths: list[int]) -> None:
    model = model_of(version, tuned=True)
    batch = batch_of(1, sum(lengths), masked=0, lengths=lengths)
    assert_equal(everything(model, batch), everything_alone(model, batch), 1e-12)


@versions
def test_lengths_of_whole_rows_change_no_bit(version: str) -> None:
    model = model_of(version, torch.float32, kernel="auto")
    plain, packed = batch_of(3, 20), batch_of(3, 20, lengths=[20, 20, 20])
    got, want = everything(model, packed), everything(model, plain)
    assert all(torch.equal(got[name], want[name]) for name in want)


@versions
def test_gradient_checkpointing_changes_nothing(version: str) -> None:
    model = model_of(version, tuned=True).train()
    batch = batch_of(2, sum(LENGTHS) // 2, lengths=LENGTHS)
    want = everything(model, batch)
    model.grad_cp = True
    assert_equal(everything(model, batch), want, 1e-14)


@versions
def test_packed_sequences_go_on_from_their_states(version: str) -> None:
    model = model_of(version)
    first, second = [5, 1, 9], [3, 8, 2]
    tokens = [torch.randint(0, VOCAB, (1, sum(lengths))) for lengths in (first, second)]
    _, state = model(tokens[0], lengths=torch.tensor(first))
    logits, after = model(tokens[1], state, lengths=torch.tensor(second))
    starts, rests = tokens[0].split(first, dim=1), tokens[1].split(second, dim=1)
    for i, (start, rest, got) in enumerate(zip(starts, rests, logits.split(second, dim=1), strict=True)):
        whole, whole_state = model(torch.cat([start, rest], dim=1))
        torch.testing.assert_close(got, whole[:, start.shape[1] :])
        torch.testing.assert_close(after.wkv[:, i], whole_state.wkv[:, 0])


@pytest.mark.parametrize("parts", [Parts(head_qk=8), Parts(tiny_att_dim=16), Parts(my_pos_emb=9)])
def test_what_looks_at_a_whole_sample_cannot_be_packed(parts: Parts) -> None:
    batch = batch_of(2, sum(LENGTHS) // 2, lengths=LENGTHS)
    with pytest.raises(UserError, match=r"several documents cannot be packed\. Use --dataload get, pad or only"):
        model_of("x060", parts=parts).loss(batch.tokens, batch.targets, lengths=batch.lengths)


def test_pre_ffn_can_be_packed() -> None:
    model = model_of("x052", parts=Parts(pre_ffn=True))
    batch = batch_of(2, sum(LENGTHS) // 2, lengths=LENGTHS)
    assert_equal(everything(model, batch), everything_alone(model, batch), 1e-12)


def train(model: Model, rows: list[Batch], accumulate: int) -> list[float]:
    """Losses of three steps."""
    groups = parameter_groups(model.named_parameters(), model.version, weight_decay=True)
    build = partial(build_optimizer, groups=groups, betas=(0.9, 0.99), eps=1e-8)
    engine = SingleDevice(model, build, dtype=torch.float64, grad_clip=1.0)
    schedule = Schedule(1e-3, 1e-3, 0, 32, 3200, 100, 1, weight_decay=0.1)
    losses: list[float] = []
    fit(
        engine, language_loss, iter(rows * 3), schedule, range(3), accumulate=accumulate,
        after_step=[lambda step: losses.append(step.loss.item())],
    )  # fmt: skip
    return losses


def test_training_on_packed_rows_equals_training_on_the_sequences() -> None:
    batch = batch_of(2, sum(LENGTHS) // 2, lengths=LENGTHS)
    packed = train(model_of("x070"), [batch], 1)
    separate = train(model_of("x070"), alone(batch), len(LENGTHS))
    assert packed == pytest.approx(separate, rel=1e-9)
    assert packed[-1] < packed[0]


class PackedSamples:
    """Two sequences in each row, the border depending on its number."""

    def batch(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x = np.array([[i] * CTX for i in indices], np.int64)
        return x, x, np.array([n for i in indices for n in (1 + i, CTX - 1 - i)], np.int64)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_bring_the_lengths(num_workers: int) -> None:
    read = batches(PackedSamples, 2, 3, torch.device("cpu"), num_workers=num_workers)
    for first in (2, 5):
        batch = next(read)
        assert batch.lengths is not None
        assert batch.lengths.tolist() == [n for i in range(first, first + 3) for n in (1 + i, CTX - 1 - i)]
        assert batch.tokens[:, 0].tolist() == [first, first + 1, first + 2]


def test_a_run_packs_documents(config: Callable[..., Any], tmp_path: Path) -> None:
    """Its first loss is the mean over the targets of all documents of the step, each read alone; read in chunks, with
    full gradients, it trains alike."""
    generator = random.Random(0)
    texts = ["".join(generator.choices("ABCDEFGH", k=generator.randint(3, 30))) + "." for _ in range(60)]
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    flags = {"data_file": str(data), "vocab_size": 0, "dataload": "pack", "ctx_len": 32, "my_exit_tokens": 10 * 64}
    rookery.train.run(config(**flags, train_stage=1))
    losses = {}
    for name, chunked in {
        "whole": {},
        "chunks": {"train_type": "infctx", "chunk_ctx": 7, "infctx_grad": "full"},
    }.items():
        folder = tmp_path / name
        rookery.train.run(
            config(**flags, **chunked, proj_dir=str(folder), load_model=str(tmp_path / "run/rwkv-init.pth"))
        )
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[name] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses["whole"]) == 10
    assert losses["chunks"] == pytest.approx(losses["whole"], rel=1e-4)

    resolved = parse([], tmp_path / "whole" / "config.toml").config
    dataset = open_dataset(resolved.data, vocab_size=resolved.model.vocab_size, seed=0)
    first = to_device(dataset.batch(range(2)), 0, torch.device("cpu"))
    assert first.lengths is not None
    assert len(first.lengths) > 4
    model = load(tmp_path / "run" / "rwkv-init.pth", device="cpu", dtype=torch.float64)
    with torch.no_grad():
        total = sum(model.loss(row.tokens, row.targets)[0].item() * row.trained for row in alone(first))
    assert losses["whole"][0] == pytest.approx(total / first.trained, rel=1e-5)
