"""Which window of the token stream a sample is: pure functions of the sample's number.

So a run can begin anywhere, and every device finds its own samples without talking to the others.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np

MINI_EPOCH = 40320
"""Samples of a mini-epoch in the reference: the unit of its log, its checkpoints and its sample numbers."""


def is_prime(n: int) -> bool:
    """Whether `n` is prime: Miller-Rabin with the first 12 primes as bases, which is exact below 3.3e24."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n < 2:
        return False
    for base in bases:
        if n % base == 0:
            return n == base
    odd, halvings = n - 1, 0
    while odd % 2 == 0:
        odd //= 2
        halvings += 1
    for base in bases:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(halvings - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def magic_prime(tokens: int, ctx_len: int) -> int:
    """The largest prime p <= tokens // ctx_len - 1 with p % 3 == 2; 0 for fewer than 3 ctx_len tokens, which have none.

    With p % 3 == 2 the map i -> i**3 mod p is a permutation: the cubic sampler meets every window once in p samples.
    """
    for n in range(tokens // ctx_len - 1, 1, -1):
        if n % 3 == 2 and is_prime(n):
            return n
    return 0


def prime_fits(prime: int, tokens: int, ctx_len: int) -> bool:
    """Whether the reference trainers accept `prime` p for the data: p % 3 == 2, 0.9 < p / (tokens // ctx_len) <= 1."""
    windows = tokens // ctx_len
    return is_prime(prime) and prime % 3 == 2 and windows * 0.9 < prime <= windows


def sample_offset(index: int, *, rank: int, world_size: int, epoch: int, ctx_len: int, prime: int) -> int:
    """First token of a sample, as the reference's dataset computes it.

    Args:
        index: number of the sample among those of this rank in this mini-epoch, from 0.
        rank, world_size: this device among all devices.
        epoch: number of the mini-epoch (the reference's epoch_begin included).
        ctx_len: tokens of a sample.
        prime: from `magic_prime`.

    Returns:
        The offset in tokens; ctx_len + 1 tokens from there are input and targets.
    """
    return CubicSampler(prime, ctx_len).offset(epoch * MINI_EPOCH + index * world_size + rank)


class Sampler(Protocol):
    """Gives sample number `index` (0, 1, 2, … over the whole run and all devices) its first token.

    `period` samples cover the data once; `name` is what a run reports.
    """

    name: str
    period: int

    def offset(self, index: int) -> int: ...

    def size(self, index: int) -> int | None:
        """Tokens from the offset on that belong to the sample; None: as many as a window has."""


class WindowSampler:
    """Of samples that are whole windows."""

    def size(self, index: int) -> int | None:
        return None


class CubicSampler(WindowSampler):
    """The prime-cubic order of RWKV-LM: window (factor * i**3) mod prime, i = index + 1, in exact integers.

    Args:
        shift: tokens by which every window is moved on (`my_pile_shift`).
    """

    name = "cubic"

    def __init__(self, prime: int, ctx_len: int, shift: int = 0) -> None:
        self.period = prime
        self._ctx_len = ctx_len
        self._shift = shift
        self._factor = int(prime * ((math.sqrt(5) - 1) / 2))

    def offset(self, index: int) -> int:
        return self._factor * (index + 1) ** 3 % self.period * self._ctx_len + self._shift


class CoverSampler(WindowSampler):
    """For data too small for the prime rule: every `period` samples have each token as a target, in a new order.

    The windows tile the data; the last one is moved back to end with it. Data shorter than a window is one window.

    Args:
        tokens: length of the data.
        ctx_len: tokens of a sample.
        seed: of the order.
    """

    name = "cover"

    def __init__(self, tokens: int, ctx_len: int, seed: int) -> None:
        self.period = max(1, -(-(tokens - 1) // ctx_len))
        self._last = max(0, tokens - 1 - ctx_len)
        self._ctx_len = ctx_len
        self._seed = seed
        self._order = (-1, np.empty(0, np.int64))

    def offset(self, index: int) -> int:
        turn, place = divmod(index, self.period)
        if self._order[0] != turn:
            self._order = (turn, shuffled(self.period, self._seed, turn))
        return min(int(self._order[1][place]) * self._ctx_len, self._last)


class Part(NamedTuple):
    """A piece of a token stream in which windows may begin."""

    first: int
    """Its first token."""
    places: int
    """Windows that begin and end in it."""
    weight: int
    """Share of all samples."""


class RandomSampler(WindowSampler):
    """Windows at random places: a part by its weight, then any place in it with the same probability.

    Args:
        parts: of the stream, each with at least one place.
        ctx_len: tokens of a sample.
        seed: of the numbers; sample i is always the same.
    """

    name = "random"

    def __init__(self, parts: Sequence[Part], ctx_len: int, seed: int) -> None:
        self.period = max(1, sum(part.places for part in parts) // ctx_len)
        self._parts = parts
        self._ends = list(accumulate(part.weight for part in parts))
        self._seed = seed

    def offset(self, index: int) -> int:
        number = int(_generator(self._seed, index).randint(self._ends[-1], dtype=np.int64))
        place = bisect_right(self._ends, number)
        part = self._parts[place]
        return part.first + (number - self._ends[place] + part.weight) % part.places


class RandomFirst(WindowSampler):
    """`my_random_steps`: the samples below that number, counted from 1, are random windows; then the order begins."""

    def __init__(self, order: Sampler, random: RandomSampler, samples: int) -> None:
        self.name = order.name
        self.period = order.period
        self._order = order
        self._random = random
        self._samples = samples

    def offset(self, index: int) -> int:
        if index + 1 < self._samples:
            return self._random.offset(index)
        return self._order.offset(index - self._samples)


class DocumentSampler:
    """One document a sample, all of them in each pass.

    Args:
        starts: int64 (documents), first token of each.
        sizes: (documents), tokens of each.
        seed: of the order, which is new in each pass; None: the order of the file.
    """

    name = "documents"

    def __init__(self, starts: np.ndarray, sizes: np.ndarray, seed: int | None) -> None:
        self.period = len(sizes)
        self._starts = starts
        self._sizes = sizes
        self._seed = seed
        self._order = (-1, np.empty(0, np.int64))

    def offset(self, index: int) -> int:
        return int(self._starts[self.document(index)])

    def size(self, index: int) -> int:
        return int(self._sizes[self.document(index)])

    def document(self, index: int) -> int:
        """Number of the document that sample `index` is."""
        turn, place = divmod(index, self.period)
        if self._seed is None:
            return place
        if self._order[0] != turn:
            self._order = (turn, shuffled(self.period, self._seed, turn))
        return int(self._order[1][place])


def shuffled(n: int, seed: int, turn: int) -> np.ndarray:
    """The order of `n` things in pass number `turn`: int64 (n)."""
    return _generator(seed, turn).permutation(n)


def _generator(seed: int, number: int) -> np.random.RandomState:
    """RandomState, because numpy promises that its numbers never change: a resumed run keeps its order."""
    # The number before the first is -1 in a few orders of the reference.
    return np.random.RandomState([seed, number % 2**32])
