"""Context parallelism in training: which tokens a rank reads of a sample that several ranks share, and their loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from rookery.ops.context import Neighbours
from rookery.train.infctx import cut_lengths
from rookery.train.loop import Batch, Part
from rookery.train.ranks import ALONE, LONGEST_WAIT, Ranks


class PartOfBatch(NamedTuple):
    """What one rank reads of a batch."""

    tokens: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray | None
    arrives: bool = False
    """Whether the first sequence goes on from the rank before."""
    leaves: bool = False
    """Whether the last one goes on at the rank after."""


@dataclass(frozen=True)
class Context:
    """This rank's place among those that share samples: groups of `size` ranks, one after another."""

    ranks: Ranks = ALONE
    group: int = 0
    groups: int = 1
    """Each reads samples of its own."""
    place: int = 0
    """In the group."""
    size: int = 1
    neighbours: Neighbours | None = None

    @classmethod
    def of(cls, ranks: Ranks, size: int) -> Context:
        """Called by all ranks together; their number is a multiple of `size`."""
        group, place = divmod(ranks.rank, size)
        neighbours = None
        if size > 1:
            own, _all = dist.new_subgroups(group_size=size, timeout=LONGEST_WAIT)
            before, after = place - 1 if place else None, place + 1 if place + 1 < size else None
            neighbours = Neighbours(own, before, after)
        return cls(ranks, group, ranks.world_size // size, place, size, neighbours)

    def part(self, tokens: np.ndarray, targets: np.ndarray, lengths: np.ndarray | None) -> PartOfBatch:
        """This rank's of a batch whose tokens, of all rows one after another, are cut into equal parts.

        Args:
            tokens, targets, lengths: as in a `Batch`, of all ranks of the group.
        """
        if self.size == 1:
            return PartOfBatch(tokens, targets, lengths)
        rows, row = tokens.shape
        of_all = torch.full((rows,), row) if lengths is None else torch.from_numpy(lengths)
        tokens, targets = tokens.reshape(1, -1), targets.reshape(1, -1)
        missing = -tokens.size % self.size
        if missing:  # a sequence that nothing learns from
            of_all = torch.cat([of_all, torch.tensor([missing])])
            tokens = np.pad(tokens, ((0, 0), (0, missing)))
            targets = np.pad(targets, ((0, 0), (0, missing)), constant_values=-100)
        size = tokens.size // self.size
        own, (pieces, continues) = slice(self.place * size, (self.place + 1) * size), cut_lengths(of_all, size)
        leaves = (*continues, False)[self.place + 1]
        return PartOfBatch(tokens[:, own], targets[:, own], pieces[self.place].numpy(), continues[self.place], leaves)

    def loss(self, model: nn.Module, batch: Batch, *, head_chunk: int = 0) -> Iterator[Part]:
        """The loss of this rank's part of a batch. A `LossFunction` of the loop.

        Args:
            model: any generation.
            head_chunk: tokens whose logits exist at one time; 0 chooses.
        """
        assert self.neighbours is not None
        passage = self.neighbours.passage(arrives=batch.arrives, leaves=batch.leaves)
        loss, _state = model.loss(  # type: ignore[operator]
            batch.tokens, batch.targets, passage, lengths=batch.lengths, trained=batch.trained, chunk=head_chunk
        )
        yield Part(passage.end(loss), batch.trained, last=True)


WHOLE = Context()
"""Every rank reads whole samples."""
