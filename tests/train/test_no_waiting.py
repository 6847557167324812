"""A training step never waits for its device.

On the meta device tensors have shapes but no values: whatever asks for one (a number, a condition, where something is
not zero) raises. A GPU would be waited for at the same places.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from rookery.config import rules
from rookery.models import Model, ModelShape, create
from rookery.train.batches import to_device
from rookery.train.infctx import chunk_losses
from rookery.train.loop import Batch, LossFunction, Step, fit
from rookery.train.monitor import Monitor
from rookery.train.optim import parameter_groups
from rookery.train.run import language_loss
from rookery.train.schedule import Rates
from rookery.train.strategies import SingleDevice

META = torch.device("meta")
ROWS, CTX, VOCAB = 2, 12, 64

LOSSES: dict[str, LossFunction] = {
    "whole": language_loss,
    "chunks": partial(chunk_losses, chunk_ctx=5),
    "chunks with gradients of the whole": partial(chunk_losses, chunk_ctx=5, full=True),
}
LENGTHS = {"rows": None, "packed": np.array([5, 4, 15])}


class Fused(torch.optim.SGD):
    """An optimiser that is told of scale and overflow by tensors, as PyTorch's fused ones are."""

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.addcmul_(p.grad, (1 - self.found_inf) / self.grad_scale, value=-group["lr"])


def build(tensors: dict[str, Tensor]) -> Fused:
    groups = parameter_groups(tensors.items(), "x070", weight_decay=True)
    return Fused([asdict(group) | {"params": [tensors[name] for name in group.names]} for group in groups], lr=0.1)


def meta_model(version: str) -> Model:
    shape = ModelShape(version, 2, 32, VOCAB, 16, 32, rules.dim_ffn(version, 32), rules.ranks(version, 2, 32))
    with META:
        return create(shape, kernel="chunked").train()


def batch(masked: bool, lengths: np.ndarray | None) -> Batch:
    targets = np.arange(ROWS * CTX, dtype=np.int64).reshape(ROWS, CTX)
    targets[:, ::3] = -100 if masked else 0
    return to_device((targets.clip(0), targets, lengths), 0, META)


@pytest.fixture(autouse=True)
def monitor_that_never_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does by the clock, every half second."""
    monkeypatch.setattr("rookery.train.monitor.LONGEST_WAIT", np.inf)


class Constant:
    def at(self, step: int) -> Rates:
        return Rates(1e-3, 0.1, 0.0)


def steps(model: Model, loss_function: LossFunction, batches: list[Batch], dtype: torch.dtype) -> list[Step]:
    done: list[Step] = []
    engine = SingleDevice(model, build, dtype=dtype, grad_clip=1.0)
    monitor = Monitor(engine, lambda record: None, tokens_per_step=1, total_steps=2)
    fit(engine, loss_function, iter(batches), Constant(), range(2), accumulate=2, after_step=[monitor, done.append])
    return done


@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_step_waits_for_nothing(loss: str, masked: bool, lengths: str) -> None:
    done = steps(meta_model("x070"), LOSSES[loss], [batch(masked, LENGTHS[lengths])] * 4, torch.bfloat16)
    assert len(done) == 2
    assert done[0].loss.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
def test_nor_in_other_precisions_and_generations(version: str, dtype: torch.dtype) -> None:
    assert len(steps(meta_model(version), language_loss, [batch(True, None)] * 4, dtype)) == 2


def test_a_wait_would_be_seen() -> None:
    """Without the number of trained targets, the loss has to look for them."""

    def without_number(model: Model, batch: Batch):
        yield from language_loss(model, Batch(batch.tokens, batch.targets, None, 0))

    with pytest.raises(Exception, match="meta"):
        steps(meta_model("x070"), without_number, [batch(True, None)] * 4, torch.float32)
