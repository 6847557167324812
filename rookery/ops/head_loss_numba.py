"""The loop of `head_loss_native`, compiled by Numba."""

from __future__ import annotations

import numpy as np

from rookery.ops.jit import inner, outer
from rookery.ops.rows_numba import every, read, where_positive, write
from rookery.ops.simd import exp, total

MANY, ONE = (None,) * 64, (None,)
"""Loops go over a row in vectors, then over the numbers that are left."""


@inner
def _number(x, j):
    return total(read(ONE, x, j))


@inner
def _larger(a, b):
    return where_positive(a - b, a, b)


@inner
def _most(x, whole, room):
    """The largest element."""
    most = _number(x, 0)
    if whole:
        vector = read(MANY, x, 0)
        for j in range(len(MANY), whole, len(MANY)):
            vector = _larger(vector, read(MANY, x, j))
        write(MANY, room, 0, vector)
        for j in range(len(MANY)):
            most = max(most, room[j])
    for j in range(whole, len(x)):
        most = max(most, _number(x, j))
    return most


@inner
def _where(x, whole, most):
    """The first element that is `most`."""
    zero, one, vector = every(MANY, np.float32(0)), every(MANY, np.float32(1)), every(MANY, most)
    begin = 0
    while begin < whole and not total(where_positive(read(MANY, x, begin) - vector, one, zero)):
        begin += len(MANY)
    for j in range(begin, len(x)):
        if _number(x, j) == most:
            return j
    return 0  # of a row with numbers that are none


@inner
def _probability(n, x, shift, j):
    return exp(read(n, x, j) - every(n, shift))


@inner
def loss_of_row(x, target, room, l2wrap, gradient):
    """The loss of a row of logits, which becomes its gradient if `gradient`; `room` is for as many numbers as MANY."""
    V = len(x)
    whole = V // len(MANY) * len(MANY)
    most = _most(x, whole, room)
    sums = every(MANY, np.float32(0))
    for j in range(0, whole, len(MANY)):
        sums = sums + _probability(MANY, x, most, j)
    rest = every(ONE, np.float32(0))
    for j in range(whole, V):
        rest = rest + _probability(ONE, x, most, j)
    logarithm = most + np.log(total(sums) + total(rest))
    loss = logarithm - _number(x, target)
    if gradient:
        where, own = _where(x, whole, most), total(_probability(ONE, x, logarithm, target))
        of_most = total(_probability(ONE, x, logarithm, where))
        for j in range(0, whole, len(MANY)):
            write(MANY, x, j, _probability(MANY, x, logarithm, j))
        for j in range(whole, V):
            write(ONE, x, j, _probability(ONE, x, logarithm, j))
        # Before they are rounded.
        if where == target:
            of_most -= np.float32(1)
        else:
            write(ONE, x, target, every(ONE, own - np.float32(1)))
        write(ONE, x, where, every(ONE, of_most + most * l2wrap))
    return loss


@outer
def rows(first, last, logits, targets, losses, l2wrap64, gradient):
    """logits (n, V), fp32 or bf16, become their gradients if `gradient`; targets (n); losses (n). A piece of work is a
    row."""
    l2wrap, room = np.float32(l2wrap64), np.empty(len(MANY), np.float32)
    for i in range(first, last):
        losses[i] = loss_of_row(logits[i], targets[i], room, l2wrap, gradient)
