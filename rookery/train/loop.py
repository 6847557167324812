"""The training loop: one optimiser step after another. It knows no files, ranks or display."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from rookery.train.schedule import Rates, Schedule
from rookery.train.strategies.engine import Engine


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass on one device reads."""

    tokens: Tensor
    """(B, T) int64 on the device."""
    targets: Tensor
    """(B, T) int64 on the device; -100 = not trained."""
    trained: int
    """Targets that are trained, counted before they went to the device."""
    first_sample: int
    """Index of the first sample, counted over the whole training."""
    lengths: Tensor | None = None
    """(S,) int64 on the CPU: of the sequences packed one after another into the rows; None = each row is one."""
    arrives: bool = False
    """Whether the first sequence goes on from another rank, which has the tokens before."""
    leaves: bool = False
    """Whether the last sequence goes on at another rank."""
    is_trained: Tensor | None = None
    """(B, T) bool on the CPU: which targets are trained, for whoever needs more than their number; None = not kept."""


class Part(NamedTuple):
    """A loss to backpropagate."""

    loss: Tensor
    """0-dim mean over the part's trained targets."""
    trained: int
    last: bool
    """Whether no other part of the batch follows."""


@dataclass(frozen=True, slots=True)
class Step:
    """An optimiser step that has just been made."""

    number: int
    """Steps done, this one included."""
    loss: Tensor
    """0-dim on the device: mean over all trained targets of the step."""
    grad_norm: Tensor
    """0-dim on the device: global norm before clipping."""
    rates: Rates
    batches: Sequence[Batch]


LossFunction = Callable[[nn.Module, Batch], Iterator[Part]]
"""The loss of a batch, whole or in parts, each of which is backpropagated before the next is computed."""


def fit(
    engine: Engine,
    loss_function: LossFunction,
    batches: Iterator[Batch],
    schedule: Schedule,
    steps: Iterable[int],
    *,
    accumulate: int = 1,
    after_step: Sequence[Callable[[Step], None]] = (),
) -> None:
    """Makes one optimiser step for each number in `steps`.

    Args:
        engine: holds the model and the optimiser.
        loss_function: computes the loss of one batch.
        batches: yields `accumulate` batches a step, in the order of the samples.
        schedule: gives the rates of each step.
        steps: step numbers from 0 over the whole training, e.g. `range(done, total)`.
        accumulate: forward passes whose gradients are added before an update. The step's loss is the mean over all
            its trained targets, so that k batches of B sequences train as one batch of kB does.
        after_step: called in this order after each step; any of them may raise to end the training.
    """
    for number in steps:
        rates = schedule.at(number)
        group = [next(batches) for _ in range(accumulate)]
        # Shares of all forward passes of all ranks add up to world_size, because engines average over ranks.
        share = engine.world_size / max(1, engine.total(sum(batch.trained for batch in group)))
        for i, batch in enumerate(group):
            for part in loss_function(engine.model, batch):
                last = part.last and i == accumulate - 1
                engine.backward(part.loss, weight=part.trained * share, last=last)
        loss, grad_norm = engine.step(rates)
        done = Step(number + 1, loss, grad_norm, rates, group)
        for callback in after_step:
            callback(done)
