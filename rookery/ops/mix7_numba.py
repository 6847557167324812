"""Loops of `mix7`, compiled by Numba: the recurrence of `wkv7_numba` with the steps of its head around it.

Arrays of tokens are C-contiguous (T, H, N) in fp32 or bf16; all others are fp32: `parameters` (H, 5, N), y and u of the
recurrence (T, H, N), and the states (B, H, N, N). Sequences, chunks and pieces of work are those of `wkv7_numba`.
"""

from __future__ import annotations

import numpy as np

from rookery.ops.jit import inner, outer
from rookery.ops.rows_numba import call_for, copy, every, lanes, put, read, room, write
from rookery.ops.simd import fma, total
from rookery.ops.wkv7_numba import (
    CHUNK,
    MORE,
    ROWS,
    SPAN,
    SUMS,
    A,
    B,
    K,
    P,
    R,
    U,
    V,
    Y,
    begin_back,
    complete,
    copy_state,
    decay,
    enter,
    flow_of,
    keep,
    prepare_back,
    step,
    step_again,
    step_back,
    weighted_rows,
    with_decay,
    without_decay,
)

ZERO, ONE = np.float32(0), np.float32(1)  # an integer would turn the arithmetic into double precision
SMALLEST = np.float32(1e-12)

K_K, K_A, R_K, LN_WEIGHT, LN_BIAS = range(5)
"""Rows of the parameters of a head."""

ADD_R, ADD_K, ADD_V, OF_G = range(4)
"""Rows of what the steps behind the recurrence add to the gradients of a token, and the gradient of its gate."""
ADDED = 4


@inner
def removal(size, k, a, p, x, at):
    """Rows A, B and K of a token: -kappa, kappa * a and the modified key. Returns 1 / |k * k_k|."""
    n, N = lanes(size), len(size)
    squares = every(n, ZERO)
    for j in range(0, N, len(n)):
        scaled = read(n, k, j) * read(n, p, K_K * N + j)
        squares = fma(scaled, scaled, squares)
    inverse = ONE / max(np.sqrt(total(squares)), SMALLEST)
    one, scale, zero = every(n, ONE), every(n, inverse), every(n, ZERO)
    for j in range(0, N, len(n)):
        key, rate = read(n, k, j), read(n, a, j)
        kappa = key * read(n, p, K_K * N + j) * scale
        write(n, x, at + A * N + j, zero - kappa)
        write(n, x, at + B * N + j, kappa * rate)
        write(n, x, at + K * N + j, key * fma(rate - one, read(n, p, K_A * N + j), one))
    return inverse


@inner
def removal_back(size, k, a, p, inverse, dx, at, added, dp):
    """Rows K and A of the gradients become those of k and a; and what this token adds to those of the parameters."""
    n, N = lanes(size), len(size)
    one, scale = every(n, ONE), every(n, inverse)
    sum = every(n, ZERO)
    for j in range(0, N, len(n)):
        kappa = read(n, k, j) * read(n, p, K_K * N + j) * scale
        sum = fma(kappa, read(n, dx, at + B * N + j) * read(n, a, j) - read(n, dx, at + A * N + j), sum)
    along = every(n, total(sum))
    for j in range(0, N, len(n)):
        key, rate, k_k, k_a = read(n, k, j), read(n, a, j), read(n, p, K_K * N + j), read(n, p, K_A * N + j)
        db, dkey = read(n, dx, at + B * N + j), read(n, dx, at + K * N + j) + read(n, added, ADD_K * N + j)
        kappa = key * k_k * scale
        dscaled = (db * rate - read(n, dx, at + A * N + j) - kappa * along) * scale
        write(n, dx, at + A * N + j, fma(db, kappa, dkey * key * k_a))
        write(n, dx, at + K * N + j, fma(dkey, fma(rate - one, k_a, one), dscaled * k_k))
        write(n, dp, K_K * N + j, fma(dscaled, key, read(n, dp, K_K * N + j)))
        write(n, dp, K_A * N + j, fma(dkey * key, rate - one, read(n, dp, K_A * N + j)))


@inner
def moments(size, y, o, eps):
    """Mean, and 1 / standard deviation, of a row of `y` from o on."""
    n, N = lanes(size), len(size)
    sum = squares = every(n, ZERO)
    for j in range(0, N, len(n)):
        sum = sum + read(n, y, o + j)
    mean = total(sum) / np.float32(N)
    for j in range(0, N, len(n)):
        centred = read(n, y, o + j) - every(n, mean)
        squares = fma(centred, centred, squares)
    return mean, ONE / np.sqrt(total(squares) / np.float32(N) + eps)


@inner
def finish(size, x, at, g, p, eps, out):
    """out = (group_norm(y) + bonus) * g."""
    n, N = lanes(size), len(size)
    mean, deviation = moments(size, x, at + Y * N, eps)
    sum = every(n, ZERO)
    for j in range(0, N, len(n)):
        sum = fma(read(n, x, at + R * N + j) * read(n, x, at + K * N + j), read(n, p, R_K * N + j), sum)
    bonus, middle, scale = every(n, total(sum)), every(n, mean), every(n, deviation)
    for j in range(0, N, len(n)):
        normal = (read(n, x, at + Y * N + j) - middle) * scale
        value = fma(normal, read(n, p, LN_WEIGHT * N + j), read(n, p, LN_BIAS * N + j))
        write(n, out, j, fma(bonus, read(n, x, at + V * N + j), value) * read(n, g, j))


@inner
def finish_back(size, dout, y, x, at, g, p, eps, added, dp):
    """Row Y of a token, now the gradient of y; `added`; and what it adds to those of the parameters."""
    n, N = lanes(size), len(size)
    mean, deviation = moments(size, y, 0, eps)
    middle, scale, part = every(n, mean), every(n, deviation), every(n, ONE / np.float32(N))
    bonuses = dbonuses = sum = sum_y = every(n, ZERO)
    for j in range(0, N, len(n)):
        dz = read(n, dout, j) * read(n, g, j)
        normal = (read(n, y, j) - middle) * scale
        bonuses = fma(read(n, x, at + R * N + j) * read(n, x, at + K * N + j), read(n, p, R_K * N + j), bonuses)
        dbonuses = fma(dz, read(n, x, at + V * N + j), dbonuses)
        dnormal = dz * read(n, p, LN_WEIGHT * N + j)
        sum, sum_y = sum + dnormal, fma(dnormal, normal, sum_y)
    bonus, dbonus = every(n, total(bonuses)), every(n, total(dbonuses))
    mean_d, mean_dy = every(n, total(sum)) * part, every(n, total(sum_y)) * part
    for j in range(0, N, len(n)):
        r, key, v = read(n, x, at + R * N + j), read(n, x, at + K * N + j), read(n, x, at + V * N + j)
        weight, r_k, of_dout = read(n, p, LN_WEIGHT * N + j), read(n, p, R_K * N + j), read(n, dout, j)
        normal = (read(n, y, j) - middle) * scale
        dz = of_dout * read(n, g, j)
        write(n, x, at + Y * N + j, scale * (dz * weight - mean_d - normal * mean_dy))
        write(n, added, OF_G * N + j, of_dout * fma(normal, weight, fma(bonus, v, read(n, p, LN_BIAS * N + j))))
        write(n, added, ADD_V * N + j, dz * bonus)
        write(n, added, ADD_R * N + j, dbonus * key * r_k)
        write(n, added, ADD_K * N + j, dbonus * r * r_k)
        write(n, dp, R_K * N + j, fma(dbonus * r, key, read(n, dp, R_K * N + j)))
        write(n, dp, LN_WEIGHT * N + j, fma(dz, normal, read(n, dp, LN_WEIGHT * N + j)))
        write(n, dp, LN_BIAS * N + j, read(n, dp, LN_BIAS * N + j) + dz)


@inner
def add(size, x, i, y, j):
    """A row of `x` from i on += one of `y` from j on."""
    n = lanes(size)
    for o in range(0, len(size), len(n)):
        write(n, x, i + o, read(n, x, i + o) + read(n, y, j + o))


@inner
def scratch(size, like):
    """What `forward_of` computes in."""
    N = len(size)
    x, z = room(like, ROWS * N), room(like, MORE * N)
    enter(size, x)
    return x, z


@inner
def forward_of(size, begin, end, h, x, z, r, w, k, v, a, g, p, state, y, u, starts, out, eps):
    """One head of one sequence, tokens `begin` to end - 1; `starts` are those of its chunks."""
    T, N = len(r), len(size)
    for c in range(-(-(end - begin) // CHUNK)):
        first = begin + c * CHUNK
        count = min(CHUNK, end - first)
        if len(starts):
            keep(size, state, starts[c, h].reshape(N * N))
        for n in range(count):
            t, at = first + n, N * (n + 1)
            decay(size, w[t, h], x, at, z, 0)
            removal(size, k[t, h], a[t, h], p, x, at)
            copy(size, r[t, h], 0, x, at + R * N)
            copy(size, v[t, h], 0, x, at + V * N)
            without_decay(size, x, at, z, 0)
        weighted_rows(size, state, x, N)
        for n in range(count):
            t, at = first + n, N * (n + 1)
            later = min(t + CHUNK, T - 1)
            call_for(size, r[later, h])
            call_for(size, w[later, h])
            call_for(size, k[later, h])
            call_for(size, v[later, h])
            call_for(size, a[later, h])
            call_for(size, g[t, h])
            call_for(size, out[t, h])
            if len(y):
                call_for(size, y[t, h])
                call_for(size, u[t, h])
            step(size, state, x, at)
        for n in range(count):
            t, at = first + n, N * (n + 1)
            finish(size, x, at, g[t, h], p, eps, out[t, h])
            if len(y):
                copy(size, x, at + U * N, u[t, h], 0)
                copy(size, x, at + Y * N, y[t, h], 0)
        with_decay(size, x, N * count, state, 0, 0)


@outer
def forward(first, last, size, bounds, chunks, r, w, k, v, a, g, parameters, S, y, u, starts, out, eps64):
    """As in `wkv7_numba`; `starts` may have no chunks, and y and u no tokens."""
    H, N = r.shape[1], len(size)
    x, z = scratch(size, S)
    eps = np.float32(eps64)
    for piece in range(first, last):
        i, h = piece // H, piece % H
        p, state = parameters[h].reshape(5 * N), S[i, h].reshape(N * N)
        own = starts[chunks[i] : chunks[i + 1]]
        forward_of(size, bounds[i], bounds[i + 1], h, x, z, r, w, k, v, a, g, p, state, y, u, own, out, eps)


@inner
def scratch_back(size, like):
    """What `backward_of` computes in."""
    N = len(size)
    x, dx, flow = room(like, ROWS * N), room(like, ROWS * N), room(like, N)
    z, sums, inverses = room(like, CHUNK * MORE * N), room(like, CHUNK * SUMS), room(like, CHUNK)
    gradient, state = room(like, (CHUNK // SPAN + 1) * N * N), room(like, N * N)
    added = room(like, CHUNK * ADDED * N).reshape((CHUNK, ADDED * N))
    enter(size, x)
    return x, dx, flow, z, sums, inverses, gradient, state, added


@inner
def backward_of(
    size, begin, end, h, rooms, r, w, k, v, a, g, p, y, u, starts, dout, G, far, dr, dw, dk, dv, da, dg, dp, eps
):  # fmt: skip
    """One head of one sequence, tokens `begin` to end - 1; `starts` are those of its chunks. `G` (N * N) goes from the
    gradient of the final to that of the initial state."""
    x, dx, flow, z, sums, inverses, gradient, state, added = rooms
    N = len(size)
    copy_state(size, G, gradient)
    for c in range((end - begin - 1) // CHUNK, -1, -1):
        first = begin + c * CHUNK
        count = min(CHUNK, end - first)
        for n in range(count):
            t, at = first + n, N * (n + 1)
            decay(size, w[t, h], x, at, z, MORE * N * n)
            inverses[n] = removal(size, k[t, h], a[t, h], p, x, at)
            copy(size, r[t, h], 0, x, at + R * N)
            copy(size, v[t, h], 0, x, at + V * N)
            copy(size, u[t, h], 0, x, at + U * N)
            finish_back(size, dout[t, h], y[t, h], x, at, g[t, h], p, eps, added[n], dp)
            without_decay(size, x, at, z, MORE * N * n)
            prepare_back(size, x, sums, n)
        begin_back(size, gradient, x, dx, count)
        for n in range(count - 1, -1, -1):
            earlier = max(first + n - CHUNK, 0)
            call_for(size, r[earlier, h])
            call_for(size, w[earlier, h])
            call_for(size, k[earlier, h])
            call_for(size, v[earlier, h])
            call_for(size, a[earlier, h])
            call_for(size, g[earlier, h])
            step_back(size, gradient, x, dx, sums, n)
        copy_state(size, starts[c, h].reshape(N * N), state)
        for span in range(0, count, SPAN):
            flow_of(size, state, gradient, N * N * (span // SPAN), flow)
            for n in range(span, min(span + SPAN, count)):
                t, at = first + n, N * (n + 1)
                earlier = max(t - CHUNK, 0)
                call_for(size, y[earlier, h])
                call_for(size, u[earlier, h])
                call_for(size, dout[earlier, h])
                for row in range(N * n // CHUNK, N * (n + 1) // CHUNK):
                    call_for(size, starts[max(c - 1, 0), h, row])
                step_again(size, state, x, dx, n)
                complete(size, x, z, dx, flow, n)
                removal_back(size, k[t, h], a[t, h], p, inverses[n], dx, at, added[n], dp)
                add(size, dx, at + R * N, added[n], ADD_R * N)
                add(size, dx, at + V * N, added[n], ADD_V * N)
        for n in range(count):
            t, at = first + n, N * (n + 1)
            put(size, far, dx, at + R * N, dr[t, h])
            put(size, far, dx, at + P * N, dw[t, h])
            put(size, far, dx, at + K * N, dk[t, h])
            put(size, far, dx, at + V * N, dv[t, h])
            put(size, far, dx, at + A * N, da[t, h])
            put(size, far, added[n], OF_G * N, dg[t, h])
    copy_state(size, gradient, G)


@outer
def backward(
    first, last, size, bounds, chunks,
    r, w, k, v, a, g, parameters, y, u, starts, dout, G, far, dr, dw, dk, dv, da, dg, dparameters, eps64,
):  # fmt: skip
    """As in `wkv7_numba`; `dparameters` (B, H, 5, N) are added to."""
    H, N = r.shape[1], len(size)
    rooms = scratch_back(size, G)
    for piece in range(first, last):
        i, h = piece // H, piece % H
        p, dp, gradient = parameters[h].reshape(5 * N), dparameters[i, h].reshape(5 * N), G[i, h].reshape(N * N)
        own = starts[chunks[i] : chunks[i + 1]]
        backward_of(
            size, bounds[i], bounds[i + 1], h, rooms, r, w, k, v, a, g, p, y, u, own, dout, gradient, far,
            dr, dw, dk, dv, da, dg, dp, np.float32(eps64),
        )  # fmt: skip
