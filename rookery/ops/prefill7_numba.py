"""Many tokens of one sequence through the parts of an RWKV-7 model between its matrix products, compiled by Numba.

The pieces of `decode7_numba` over T tokens. What goes into a product or comes out of it is fp32 (kind `static(0)`) or
bf16 (`static(1)`), as the product wants it; all else is fp32.
"""

from __future__ import annotations

import numpy as np

from rookery.ops.decode7_numba import finish, layer_norm, prepare, squashed, take_value
from rookery.ops.jit import inner, outer
from rookery.ops.products_numba import at
from rookery.ops.rows_numba import each, every, room, wide_lanes, write
from rookery.ops.rows_numba import read as vector
from rookery.ops.simd import BYTES, fma, load, load_as, positive, store, store_as

CHUNK = 16
"""Tokens whose rows there is room for."""

R, D, K, V, A, B, U, Y = range(8)
"""Rows of a token: what the recurrence reads, with its decays; u = S a; the output."""
ROWS = 8


@inner
def weighted_rows(size, S, x, at):
    """u = S^T a of a token, the state being [key, value]."""
    n, N = wide_lanes(size), len(size)
    for j in range(0, N, len(n)):
        sum = every(n, x.dtype.type(0))
        for i in range(N):
            sum = fma(each(n, x, at + A * N + i), vector(n, S, N * i + j), sum)
        write(n, x, at + U * N + j, sum)


@inner
def step(size, S, x, at):
    """Advance the state, [key, value], by one token in place and read it: y = S^T r, and u of the next token."""
    n, N = wide_lanes(size), len(size)
    for j in range(0, N, len(n)):
        u, v = vector(n, x, at + U * N + j), vector(n, x, at + V * N + j)
        of_r = of_a = every(n, x.dtype.type(0))
        for i in range(N):
            b, k, d = each(n, x, at + B * N + i), each(n, x, at + K * N + i), each(n, x, at + D * N + i)
            s = fma(u, b, fma(v, k, vector(n, S, N * i + j) * d))
            write(n, S, N * i + j, s)
            of_r = fma(s, each(n, x, at + R * N + i), of_r)
            of_a = fma(s, each(n, x, at + (ROWS + A) * N + i), of_a)
        write(n, x, at + Y * N + j, of_r)
        write(n, x, at + (ROWS + U) * N + j, of_a)


@inner
def add_as(kind, x, y):
    """x += y, y being an address of numbers of a kind."""
    for j in range(0, len(x), 16):
        store(at(x) + 4 * j, load(at(x) + 4 * j) + load_as(kind, y + BYTES[len(kind)] * j))


@inner
def lerp_as(kind, x, previous, mix, out):
    """out = x + (previous - x) * mix; `out` is an address."""
    for j in range(0, len(x), 16):
        value = load(at(x) + 4 * j)
        mixed = fma(load(at(previous) + 4 * j) - value, load(at(mix) + 4 * j), value)
        store_as(kind, out + BYTES[len(kind)] * j, mixed)


@outer
def normalise(first, last, kind, x, added, norm, normal):
    """x += added; normal = layer_norm(x). A piece of work is a token.

    Args:
        x, normal: (T, C). added: (T, C) of the kind, or (0, C) for nothing. norm: (2, C), weight and bias.
    """
    for t in range(first, last):
        if len(added):
            add_as(kind, x[t], at(added[t]))
        layer_norm(x[t], norm[0], norm[1], normal[t])


@outer
def mix(first, last, kind, normal, before, mixes, out):
    """out[n] = mix n of each row of `normal` and the row above it. A piece of work is a token.

    Args:
        normal: (T, C). before: (C), the row above the first. mixes: (n, C). out: (n, T, C) of the kind.
    """
    for t in range(first, last):
        above = normal[t - 1] if t else before
        for n in range(len(mixes)):
            lerp_as(kind, normal[t], above, mixes[n], at(out[n, t]))


@outer
def relu_square(first, last, kind, x):
    """max(x, 0)², in place. A piece of work is a row of x (T, F), of the kind."""
    for t in range(first, last):
        for j in range(0, x.shape[1], 16):
            o = at(x[t]) + BYTES[len(kind)] * j
            value = positive(load_as(kind, o))
            store_as(kind, o, value * value)


@outer
def squash(first, last, kind, x, is_tanh):
    """tanh, or else sigmoid, in place: PyTorch's own differ in their last bits with an element's place in the tensor. A
    piece of work is a row of x (T, rank), of the kind."""
    for t in range(first, last):
        for j in range(0, x.shape[1], 16):
            o = at(x[t]) + BYTES[len(kind)] * j
            store_as(kind, o, squashed(load_as(kind, o), is_tanh))


@inner
def enter(kind, size, is_first, t, begin, sources, p, x, token, local):
    """What the recurrence takes of a token, into its rows of a chunk."""
    N = 16 * len(size)
    number = BYTES[len(kind)]
    base = at(x) + 4 * token
    places = (
        base + 4 * R * N,
        base + 4 * K * N,
        base + 4 * V * N,
        base + 4 * D * N,
        local,
        local + 4 * N,
        local + 8 * N,
    )
    for n in range(len(places)):
        if is_first and n > 4:
            continue
        source = at(sources[n][t]) + number * begin
        for j in range(0, N, 16):
            store(places[n] + 4 * j, load_as(kind, source + number * j))
    if not is_first:
        take_value(places[2], places[5], places[6], p, size)
    prepare(places[3], places[4], places[1], p, base + 4 * A * N, base + 4 * B * N, size)


@outer
def read(first, last, kind, size, head_size, is_first, r, k, v, w, a, gate, v_first, g, vectors, S, out, eps64):
    """The recurrence with all around it that stays inside a head. A piece of work is a head.

    Args:
        size, head_size: `static(N // 16)` and `static(N)`.
        is_first: whether this is the first layer, which gives its values to the others.
        r, k, v, w, a, gate, v_first, g: (T, C) of the kind; gate and v_first are not read in the first layer.
        vectors: (19, C), as in `decode7_numba`.
        S: (H, N, N), [value, key]; advanced. out: (T, C) of the kind.
    """
    N, T = 16 * len(size), len(r)
    number = BYTES[len(kind)]
    eps = np.float32(eps64)
    token = ROWS * N
    # A chunk of tokens and the one after it: a step takes what the next one multiplies the state with.
    x = room(S[0, 0], (CHUNK + 1) * token)
    state, local = room(S[0, 0], N * N), room(S[0, 0], 3 * N)
    p = np.empty(len(vectors), np.int64)
    sources = (r, k, v, w, a, gate, v_first)
    for head in range(first, last):
        begin = N * head
        for n in range(len(p)):
            p[n] = at(vectors[n]) + 4 * begin
        for i in range(N):
            for j in range(N):
                state[N * i + j] = S[head, j, i]
        for t in range(-1, T):
            here = t % CHUNK * token
            if here == 0:
                x[:token] = x[CHUNK * token :]
            if t + 1 < T:
                enter(kind, size, is_first, t + 1, begin, sources, p, x, here + token, at(local))
            if t < 0:
                weighted_rows(head_size, state, x, CHUNK * token)
                continue
            step(head_size, state, x, here)
            base = at(x) + 4 * here
            for j in range(0, N, 16):
                store(at(local) + 4 * j, load_as(kind, at(g[t]) + number * (begin + j)))
            y = base + 4 * Y * N
            finish(y, base + 4 * R * N, base + 4 * K * N, base + 4 * V * N, at(local), p, eps, size)
            for j in range(0, N, 16):
                store_as(kind, at(out[t]) + number * (begin + j), load(y + 4 * j))
        for i in range(N):
            for j in range(N):
                S[head, i, j] = state[N * j + i]
