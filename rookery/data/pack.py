"""Whole documents packed into samples of the same length."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

from rookery.data.sampler import shuffled
from rookery.data.samples import Sample

Read = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""Input and targets of a document, by its number."""


class Packs:
    """Samples of `ctx_len` tokens, each of several whole documents; every document once in each pass.

    Which lengths share a sample is decided once, by first-fit-decreasing; so all passes have the same number of
    samples. Which of the documents of a length takes which place, and the order of the samples, is new in each pass.

    Args:
        read: gives the documents.
        sizes: int64 (documents), inputs of each, from 1 to `ctx_len`.
        ctx_len: tokens of a sample.
        seed: of the orders; None packs the documents in their order, in each pass alike.
    """

    name = "pack"

    def __init__(self, read: Read, sizes: np.ndarray, ctx_len: int, seed: int | None) -> None:
        self._read = read
        self._sizes = sizes
        self._ctx_len = ctx_len
        self._seed = seed
        order = np.arange(len(sizes)) if seed is None else np.argsort(-sizes, kind="stable")
        bins, self.period = (_in_order if seed is None else _first_fit)(sizes[order], ctx_len)
        self._members = np.argsort(bins, kind="stable")
        self._ends = np.cumsum(np.bincount(bins, minlength=self.period))
        self._order = order
        self._bins = np.arange(self.period)
        self._turn = -1

    def sample(self, index: int) -> Sample:
        turn, place = divmod(index, self.period)
        if turn != self._turn and self._seed is not None:
            # Documents of one length change places, the longest first as the samples were laid out.
            ties = shuffled(len(self._sizes), self._seed, turn)
            self._order = np.lexsort((ties, -self._sizes))
            self._bins = shuffled(self.period, self._seed + 1, turn)
            self._turn = turn
        number = int(self._bins[place])
        end = int(self._ends[number])
        start = int(self._ends[number - 1]) if number else 0
        documents = self._order[self._members[start:end]].tolist()
        x = np.zeros(self._ctx_len, np.int64)
        y = np.full(self._ctx_len, -100, np.int64)
        lengths = self._sizes[documents]
        filled = 0
        for document, length in zip(documents, lengths.tolist(), strict=True):
            x[filled : filled + length], y[filled : filled + length] = self._read(document)
            filled += length
        if filled < self._ctx_len:
            lengths = np.append(lengths, self._ctx_len - filled)
        return Sample(x, y, lengths)


@njit(cache=True)
def _first_fit(sizes, room):
    """The bin of each of `sizes`, int64 (n), in falling order: the first with room for it; and how many there are.

    The bins are the leaves of a tree whose nodes know the most room below them, so that each takes log n steps.
    """
    leaves = 1
    while leaves < sizes.size:
        leaves *= 2
    most = np.full(2 * leaves, room, np.int64)
    bins = np.empty(sizes.size, np.int64)
    used = 0
    for i in range(sizes.size):
        node = 1
        while node < leaves:
            node = 2 * node if most[2 * node] >= sizes[i] else 2 * node + 1
        bins[i] = node - leaves
        used = max(used, node - leaves + 1)
        most[node] -= sizes[i]
        node //= 2
        while node:
            most[node] = max(most[2 * node], most[2 * node + 1])
            node //= 2
    return bins, used


@njit(cache=True)
def _in_order(sizes, room):
    """As `_first_fit`, with every bin filled before the next one is begun, in the order of `sizes`."""
    bins = np.empty(sizes.size, np.int64)
    used, left = 0, 0
    for i in range(sizes.size):
        if sizes[i] > left:
            used, left = used + 1, room
        bins[i] = used - 1
        left -= sizes[i]
    return bins, used
