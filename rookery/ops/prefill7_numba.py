"""Many tokens of one sequence through the parts of an RWKV-7 model between its matrix products, compiled by Numba.

The pieces of `decode7_numba` over T tokens. What goes into a product or comes out of it is fp32 (kind `static(0)`) or
bf16 (`static(1)`), as the product wants it; all else is fp32.
"""

from __future__ import annotations

import numpy as np

from rookery.ops.decode7_numba import advance, finish, layer_norm, prepare, squashed, take_value
from rookery.ops.jit import inner, outer
from rookery.ops.products_numba import at
from rookery.ops.simd import BYTES, fma, load, load_as, positive, store, store_as


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


@outer
def read(first, last, kind, size, is_first, r, k, v, w, a, gate, g, v_first, vectors, S, out, eps64):
    """The recurrence with all around it that stays inside a head. A piece of work is a head.

    Args:
        is_first: whether this is the first layer, which gives its values to the others.
        r, k, v, w, a, gate, g, v_first: (T, C) of the kind; gate and v_first are not read in the first layer.
        vectors: (19, C), as in `decode7_numba`.
        S: (H, N, N), [value, key]; advanced. out: (T, C) of the kind.
    """
    N = 16 * len(size)
    number = BYTES[len(kind)]
    eps = np.float32(eps64)
    local = np.empty((11, N), np.float32)
    places = at(local) + 4 * N * np.arange(11)
    lr, lk, lv, lw, la, lgate, lg, lfirst, removal, addition, ly = places
    p = np.empty(len(vectors), np.int64)
    for head in range(first, last):
        for n in range(len(p)):
            p[n] = at(vectors[n]) + 4 * N * head
        for t in range(len(r)):
            begin = number * N * head
            for n, source in enumerate((r, k, v, w, a, gate, g, v_first)):
                if is_first and (n == 5 or n == 7):
                    continue
                for j in range(0, N, 16):
                    store(places[n] + 4 * j, load_as(kind, at(source[t]) + begin + number * j))
            if not is_first:
                take_value(lv, lgate, lfirst, p, size)
            prepare(lw, la, lk, p, removal, addition, size)
            advance(at(S[head]), lr, lw, lk, local[2], removal, addition, local[10], size)
            finish(ly, lr, lk, lv, lg, p, eps, size)
            for j in range(0, N, 16):
                store_as(kind, at(out[t]) + begin + number * j, load(ly + 4 * j))
