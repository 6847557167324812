"""One token of each of B sequences through a whole RWKV-7 model, compiled by Numba.

At one token a step nearly all time goes into reading the weights, once each. Everything between two products is small
and stays in the caches, so one call does it all; `rookery.models.rwkv7` has the same formulas, readable.

All numbers but the weights of matrices are fp32. Every sum of a sequence is taken in the same order whatever B is, so
an answer is the same bits alone and beside others. Several threads run the same call, each a share of the rows or
heads, and wait for each other between the phases. Widths are multiples of 16.
"""

from __future__ import annotations

import numpy as np

from rookery.ops.jit import inner, outer
from rookery.ops.products_numba import ROWS, at, product
from rookery.ops.simd import exp, fma, load, positive, splat, store, total, zeros
from rookery.ops.threads_numba import wait
from rookery.ops.wkv7_native import LOG_DECAY_SCALE

RECEPTANCE, KEY, VALUE, OUTPUT, FFN_KEY, FFN_VALUE, W1, W2, A1, A2, V1, V2, G1, G2 = range(14)
"""Matrices of a layer, each (out, in)."""

X_R, X_W, X_K, X_V, X_A, X_G, W0, A0, V0, K_K, K_A, R_K = range(12)
LN_X, LN_X_BIAS, LN1, LN1_BIAS, LN2, LN2_BIAS, FFN_X = range(12, 19)
"""Vectors of a layer, each C numbers."""

SCALE = np.float32(LOG_DECAY_SCALE)
LN_EPS = np.float32(1e-5)
NORM_EPS = np.float32(1e-12)
FLOAT_ONE = np.float32(1)


@inner
def sigmoid(x):
    one = splat(FLOAT_ONE)
    return one / (one + exp(zeros() - x))


@inner
def share(part, parts, count, unit):
    """The share of `part` in `count` things, in whole units but the last: first, last + 1."""
    units = (count + unit - 1) // unit
    return min(count, units * part // parts * unit), min(count, units * (part + 1) // parts * unit)


@inner
def layer_norm(x, weight, bias, out):
    C = len(x)
    sums = zeros()
    for j in range(0, C, 16):
        sums = sums + load(at(x) + 4 * j)
    mean = splat(total(sums) / np.float32(C))
    squares = zeros()
    for j in range(0, C, 16):
        centred = load(at(x) + 4 * j) - mean
        squares = fma(centred, centred, squares)
    scale = splat(FLOAT_ONE / np.sqrt(total(squares) / np.float32(C) + LN_EPS))
    for j in range(0, C, 16):
        normal = (load(at(x) + 4 * j) - mean) * scale
        store(at(out) + 4 * j, fma(normal, load(at(weight) + 4 * j), load(at(bias) + 4 * j)))


@inner
def lerp(x, previous, mix, out):
    """out = x + (previous - x) * mix."""
    for j in range(0, len(x), 16):
        value = load(at(x) + 4 * j)
        store(at(out) + 4 * j, fma(load(at(previous) + 4 * j) - value, load(at(mix) + 4 * j), value))


@inner
def add(x, y, lo, hi):
    """x += y, for each sequence's channels lo..hi-1."""
    for b in range(len(x)):
        for o in range(4 * lo, 4 * hi, 64):
            store(at(x[b]) + o, load(at(x[b]) + o) + load(at(y[b]) + o))


@inner
def relu_square(x, lo, hi):
    for b in range(len(x)):
        for o in range(4 * lo, 4 * hi, 64):
            value = positive(load(at(x[b]) + o))
            store(at(x[b]) + o, value * value)


@inner
def squashed(value, is_tanh):
    """tanh, or else sigmoid."""
    one, two = splat(FLOAT_ONE), splat(np.float32(2))
    if is_tanh:
        return one - two / (one + exp(two * value))
    return sigmoid(value)


@inner
def squash(x, lo, hi, is_tanh):
    for b in range(len(x)):
        for o in range(4 * lo, 4 * hi, 64):
            store(at(x[b]) + o, squashed(load(at(x[b]) + o), is_tanh))


@inner
def take_value(v, gate, v_first, p, size):
    """v, moved by its gate towards the first layer's."""
    for c in range(len(size)):
        o = 64 * c
        value = load(v + o)
        share_of_first = sigmoid(load(gate + o) + load(p[V0] + o))
        store(v + o, fma(load(v_first + o) - value, share_of_first, value))


@inner
def prepare(w, a, k, p, removal, addition, size):
    """The raw decay, rate and key of a head become what the recurrence takes: w the decay, k the modified key;
    removal = -kappa, addition = kappa * rate. All are addresses."""
    one = splat(FLOAT_ONE)
    squares = zeros()
    for c in range(len(size)):
        o = 64 * c
        store(w + o, exp(splat(SCALE) * sigmoid(load(w + o) + load(p[W0] + o))))
        kappa = load(k + o) * load(p[K_K] + o)
        store(removal + o, kappa)
        squares = fma(kappa, kappa, squares)
    inverse = splat(FLOAT_ONE / max(np.sqrt(total(squares)), NORM_EPS))
    for c in range(len(size)):
        o = 64 * c
        kappa = load(removal + o) * inverse
        rate = sigmoid(load(a + o) + load(p[A0] + o))
        store(removal + o, zeros() - kappa)
        store(addition + o, kappa * rate)
        store(k + o, load(k + o) * fma(rate - one, load(p[K_A] + o), one))


@inner
def advance(S, r, d, k, v, removal, addition, y, size):
    """S = S diag(d) + (S removal) addition^T + v k^T; y = S r. S, r, ... are addresses; v and y are arrays."""
    for i in range(len(v)):
        row = S + 4 * len(v) * i
        sums = zeros()
        for c in range(len(size)):
            sums = fma(load(row + 64 * c), load(removal + 64 * c), sums)
        removed, value = splat(total(sums)), splat(v[i])
        sums = zeros()
        for c in range(len(size)):
            o = 64 * c
            s = fma(value, load(k + o), fma(removed, load(addition + o), load(row + o) * load(d + o)))
            store(row + o, s)
            sums = fma(s, load(r + o), sums)
        y[i] = total(sums)


@inner
def finish(y, r, k, v, g, p, eps, size):
    """y = (group_norm(y) + (r . k . r_k) v) * g, of a head; all are addresses."""
    N = np.float32(16 * len(size))
    sums, bonus = zeros(), zeros()
    for c in range(len(size)):
        o = 64 * c
        sums = sums + load(y + o)
        bonus = fma(load(r + o) * load(k + o), load(p[R_K] + o), bonus)
    mean, own = splat(total(sums) / N), splat(total(bonus))
    squares = zeros()
    for c in range(len(size)):
        centred = load(y + 64 * c) - mean
        squares = fma(centred, centred, squares)
    scale = splat(FLOAT_ONE / np.sqrt(total(squares) / N + eps))
    for c in range(len(size)):
        o = 64 * c
        normal = fma((load(y + o) - mean) * scale, load(p[LN_X] + o), load(p[LN_X_BIAS] + o))
        store(y + o, fma(own, load(v + o), normal) * load(g + o))


@outer
def step(
    part, _end, parts, kind, low_kind, head_kind, size, matrices, vectors, ends, head, rows,
    att_shift, wkv, ffn_shift, x, normal, mixed, rkv, low, wavg, v_first, y, hidden, logits, eps64, meeting,
):  # fmt: skip
    """Advance B sequences by a token.

    Args:
        part, parts: which share of the work this call does.
        kind, low_kind, head_kind: `static(k)`, the number format of the big matrices, the low-rank ones, the head.
        size: `static(N // 16)`.
        matrices: (L, 14, columns of a table) int64. head: (columns of a table) int64.
        vectors: (L, 19, C). ends: (2, C), weight and bias of ln_out.
        rows: (B) int64, the slots of the sequences.
        att_shift, ffn_shift: (L, S, C); wkv: (L, S, H, N, N), [value, key]; S slots.
        x: (B, C), what enters the first block; changed.
        normal, v_first, y: (B, C). mixed: (6, B, C). rkv: (3, B, C). low: (4, B, widest rank). wavg: (4, B, C).
        hidden: (B, F). All of these are room.
        logits: (B, V), the result.
        eps64: of the group norm.
        meeting: where the parts wait for each other.
    """
    B, C, N = x.shape[0], x.shape[1], 16 * len(size)
    eps = np.float32(eps64)
    first, last = share(part, parts, B, 1)
    lo, hi = share(part, parts, C, N)
    local = np.empty((2, N), np.float32)
    p = np.empty(vectors.shape[1], np.int64)
    for layer in range(len(matrices)):
        m = matrices[layer]
        for b in range(first, last):
            before = att_shift[layer, rows[b]]
            layer_norm(x[b], vectors[layer, LN1], vectors[layer, LN1_BIAS], normal[b])
            for n in range(6):
                lerp(normal[b], before, vectors[layer, X_R + n], mixed[n, b])
            before[:] = normal[b]
        wait(meeting, parts)

        product(kind, m[RECEPTANCE], lo, hi, mixed[0], rkv[0])
        product(kind, m[KEY], lo, hi, mixed[2], rkv[1])
        product(kind, m[VALUE], lo, hi, mixed[3], rkv[2])
        for n, matrix, source in ((0, W1, 1), (1, A1, 4), (2, V1, 3), (3, G1, 5)):
            begin, end = share(part, parts, m[matrix, ROWS], 16)
            product(low_kind, m[matrix], begin, end, mixed[source], low[n])
            if n == 0 or n == 3:
                squash(low[n], begin, end, n == 0)
        wait(meeting, parts)

        for n, matrix in ((0, W2), (1, A2), (2, V2), (3, G2)):
            product(low_kind, m[matrix], lo, hi, low[n], wavg[n])
        for b in range(B):
            for channel in range(lo, hi, N):
                o = 4 * channel
                for n in range(len(p)):
                    p[n] = at(vectors[layer, n]) + o
                r, k, v = at(rkv[0, b]) + o, at(rkv[1, b]) + o, at(rkv[2, b]) + o
                w, a, gate, g = at(wavg[0, b]) + o, at(wavg[1, b]) + o, at(wavg[2, b]) + o, at(wavg[3, b]) + o
                if layer == 0:
                    v_first[b, channel : channel + N] = rkv[2, b, channel : channel + N]
                else:
                    take_value(v, gate, at(v_first[b]) + o, p, size)
                prepare(w, a, k, p, at(local[0]), at(local[1]), size)
                S, values = at(wkv[layer, rows[b], channel // N]), rkv[2, b, channel : channel + N]
                out = y[b, channel : channel + N]
                advance(S, r, w, k, values, at(local[0]), at(local[1]), out, size)
                finish(at(out), r, k, v, g, p, eps, size)
        wait(meeting, parts)

        product(kind, m[OUTPUT], lo, hi, y, normal)
        add(x, normal, lo, hi)
        wait(meeting, parts)

        for b in range(first, last):
            before = ffn_shift[layer, rows[b]]
            layer_norm(x[b], vectors[layer, LN2], vectors[layer, LN2_BIAS], normal[b])
            lerp(normal[b], before, vectors[layer, FFN_X], mixed[0, b])
            before[:] = normal[b]
        wait(meeting, parts)

        begin, end = share(part, parts, m[FFN_KEY, ROWS], 16)
        product(kind, m[FFN_KEY], begin, end, mixed[0], hidden)
        relu_square(hidden, begin, end)
        wait(meeting, parts)

        product(kind, m[FFN_VALUE], lo, hi, hidden, normal)
        add(x, normal, lo, hi)
        wait(meeting, parts)

    for b in range(first, last):
        layer_norm(x[b], ends[0], ends[1], normal[b])
    wait(meeting, parts)
    begin, end = share(part, parts, head[ROWS], 4)
    product(head_kind, head, begin, end, normal, logits)
