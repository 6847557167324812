"""Loops of `wkv7_native`, compiled by Numba.

Arrays of tokens are C-contiguous (T, H, N) in fp64, fp32 or bf16; all others are in the precision of the arithmetic.
States are (B, H, N, N). Sequence i of B is made of the tokens bounds[i] to bounds[i + 1] - 1 of T, and of the chunks
from chunks[i] on. A piece of work is one head of one sequence.

The forward pass keeps a state as [key, value], where both its sums go down the columns. The rows of [value, key], which
the backward pass uses, do not depend on each other: four of them at a time go through a chunk, and what belongs to them
stays in the fastest cache. What comes next is called for from memory while a chunk is computed.

A chunk is one array `x` of CHUNK times ROWS rows of N numbers; `at` is where a token begins in it. Its gradients `dx`
have the same form.
"""

from __future__ import annotations

from rookery.ops.jit import inner, outer
from rookery.ops.rows_numba import (
    absolute,
    call_for,
    copy,
    each,
    every,
    lanes,
    read,
    room,
    spread,
    stream,
    totals,
    transpose,
    where_positive,
    wide_lanes,
    write,
)
from rookery.ops.simd import exp, fma, total
from rookery.ops.wkv7_native import LOG_DECAY_SCALE

CHUNK = 16

R, D, K, V, A, B, U, Y = range(8)
"""Rows of a token: what `wkv7` reads, with the decays; u = S a; the output, or its gradient."""
ROWS = 8

SLOPE, D_R, D_K, D_B = range(4)
"""Rows of what `prepare_back` makes for a token: the derivatives of its decays by w, and its decays times r, and times
k and b of the token before."""
PRODUCTS = 4

R_K, R_B, A_K, A_B, DR_K, DR_B = range(6)
"""Products of rows of a token: r . k, r . b, and a and d r with k and b of the token before."""
SUMS = 6

ZEROTH, FIRST, SECOND, THIRD, FOUR = (), (None,), (None,) * 2, (None,) * 3, (None,) * 4


@inner
def decay(size, w, x, d, z, slope):
    """A row of decays exp(-exp(-1/2) sigmoid(w)), to d in `x`, and of their derivatives by w, to `slope` in `z`."""
    n = lanes(size)
    zeros, one, scale = every(n, x.dtype.type(0)), every(n, x.dtype.type(1)), every(n, x.dtype.type(LOG_DECAY_SCALE))
    for j in range(0, len(size), len(n)):
        of_w = read(n, w, j)
        e = exp(zeros - absolute(of_w))
        more = one / (one + e)
        less = e * more
        value = exp(scale * where_positive(of_w, more, less))
        write(n, x, d + j, value)
        # sigmoid (1 - sigmoid) as a product that keeps its digits where the sigmoid is all but 1.
        write(n, z, slope + j, scale * value * (more * less))


@inner
def weighted_rows(size, S, x, at):
    """u = S^T a of a token, the state being [key, value]."""
    n, N = wide_lanes(size), len(size)
    for j in range(0, N, len(n)):
        sum = every(n, x.dtype.type(0))
        for i in range(N):
            sum = fma(each(n, x, at + A * N + i), read(n, S, N * i + j), sum)
        write(n, x, at + U * N + j, sum)


@inner
def step(size, S, x, at):
    """Advance the state, [key, value], by one token in place and read it: y = S^T r, and u of the next token."""
    n, N = wide_lanes(size), len(size)
    for j in range(0, N, len(n)):
        u, v = read(n, x, at + U * N + j), read(n, x, at + V * N + j)
        of_r = of_a = every(n, x.dtype.type(0))
        for i in range(N):
            b, k, d = each(n, x, at + B * N + i), each(n, x, at + K * N + i), each(n, x, at + D * N + i)
            s = fma(u, b, fma(v, k, read(n, S, N * i + j) * d))
            write(n, S, N * i + j, s)
            of_r = fma(s, each(n, x, at + R * N + i), of_r)
            of_a = fma(s, each(n, x, at + (ROWS + A) * N + i), of_a)
        write(n, x, at + Y * N + j, of_r)
        write(n, x, at + (ROWS + U) * N + j, of_a)


@inner
def keep(size, S, start):
    """Copy a state that is not needed again soon."""
    n = lanes(size)
    for o in range(0, len(size) * len(size), len(n)):
        stream(n, start, o, read(n, S, o))


@inner
def four(n, x, j):
    """A vector of each of four numbers."""
    return each(n, x, j), each(n, x, j + 1), each(n, x, j + 2), each(n, x, j + 3)


@inner
def dot(size, x, i, j):
    n = lanes(size)
    sum = every(n, x.dtype.type(0))
    for o in range(0, len(size), len(n)):
        sum = fma(read(n, x, i + o), read(n, x, j + o), sum)
    return total(sum)


@inner
def prepare_back(size, x, z, sums, n):
    """What is needed of token n of a chunk for each four rows."""
    w, N = lanes(size), len(size)
    at, p = ROWS * N * n, PRODUCTS * N * n
    before = max(at - ROWS * N, 0)
    r_k = r_b = a_k = a_b = dr_k = dr_b = every(w, x.dtype.type(0))
    for i in range(0, N, len(w)):
        d, r, a = read(w, x, at + D * N + i), read(w, x, at + R * N + i), read(w, x, at + A * N + i)
        k, b = read(w, x, before + K * N + i), read(w, x, before + B * N + i)
        dr = d * r
        write(w, z, p + D_R * N + i, dr)
        write(w, z, p + D_K * N + i, d * k)
        write(w, z, p + D_B * N + i, d * b)
        r_k, r_b = fma(r, read(w, x, at + K * N + i), r_k), fma(r, read(w, x, at + B * N + i), r_b)
        a_k, a_b, dr_k, dr_b = fma(a, k, a_k), fma(a, b, a_b), fma(dr, k, dr_k), fma(dr, b, dr_b)
    write(FOUR, sums, SUMS * n, totals(r_k, r_b, a_k, a_b))
    sums[SUMS * n + DR_K], sums[SUMS * n + DR_B] = total(dr_k), total(dr_b)


@inner
def replay(size, states, before, x, at, j):
    """Four rows, from j on, of the state after a token: from `before` in `states` to behind it."""
    n, N = lanes(size), len(size)
    after = before + 4 * N
    u0, u1, u2, u3 = four(n, x, at + U * N + j)
    v0, v1, v2, v3 = four(n, x, at + V * N + j)
    for i in range(0, N, len(n)):
        d, k, b = read(n, x, at + D * N + i), read(n, x, at + K * N + i), read(n, x, at + B * N + i)
        write(n, states, after + i, fma(u0, b, fma(v0, k, read(n, states, before + i) * d)))
        write(n, states, after + N + i, fma(u1, b, fma(v1, k, read(n, states, before + N + i) * d)))
        write(n, states, after + 2 * N + i, fma(u2, b, fma(v2, k, read(n, states, before + 2 * N + i) * d)))
        write(n, states, after + 3 * N + i, fma(u3, b, fma(v3, k, read(n, states, before + 3 * N + i) * d)))


@inner
def products(size, G, g, x, at):
    """G x for the four rows of G from g on."""
    n, N = lanes(size), len(size)
    sum0 = sum1 = sum2 = sum3 = every(n, x.dtype.type(0))
    for i in range(0, N, len(n)):
        of_x = read(n, x, at + i)
        sum0, sum1 = fma(read(n, G, g + i), of_x, sum0), fma(read(n, G, g + N + i), of_x, sum1)
        sum2, sum3 = fma(read(n, G, g + 2 * N + i), of_x, sum2), fma(read(n, G, g + 3 * N + i), of_x, sum3)
    return totals(sum0, sum1, sum2, sum3)


@inner
def read_gradient(size, G, g, x, at, z, p, dx, j):
    """What four rows from j on of the gradient of the state after a token, from g in `G` on, add to the token's dk and
    db; and their products with D_K and D_B."""
    n, N = lanes(size), len(size)
    u0, u1, u2, u3 = four(n, x, at + U * N + j)
    v0, v1, v2, v3 = four(n, x, at + V * N + j)
    k0 = k1 = k2 = k3 = b0 = b1 = b2 = b3 = every(n, x.dtype.type(0))
    for i in range(0, N, len(n)):
        g0, g1 = read(n, G, g + i), read(n, G, g + N + i)
        g2, g3 = read(n, G, g + 2 * N + i), read(n, G, g + 3 * N + i)
        k, b, o = read(n, z, p + D_K * N + i), read(n, z, p + D_B * N + i), at + i
        k0, k1, k2, k3 = fma(g0, k, k0), fma(g1, k, k1), fma(g2, k, k2), fma(g3, k, k3)
        b0, b1, b2, b3 = fma(g0, b, b0), fma(g1, b, b1), fma(g2, b, b2), fma(g3, b, b3)
        write(n, dx, o + K * N, fma(v3, g3, fma(v2, g2, fma(v1, g1, fma(v0, g0, read(n, dx, o + K * N))))))
        write(n, dx, o + B * N, fma(u3, g3, fma(u2, g2, fma(u1, g1, fma(u0, g0, read(n, dx, o + B * N))))))
    return totals(k0, k1, k2, k3), totals(b0, b1, b2, b3)


@inner
def step_back(size, S, s, G, g, x, at, z, p, e, dx, j):
    """What four rows from j on of the state before a token, from s in `S` on, and of the gradient after it add to the
    token's dr, dd and da; then the gradient before the token. e: the gradient of four of the token's u."""
    n, N = lanes(size), len(size)
    y0, y1, y2, y3 = four(n, x, at + Y * N + j)
    e0, e1, e2, e3 = spread(n, e, ZEROTH), spread(n, e, FIRST), spread(n, e, SECOND), spread(n, e, THIRD)
    for i in range(0, N, len(n)):
        s0, s1 = read(n, S, s + i), read(n, S, s + N + i)
        s2, s3 = read(n, S, s + 2 * N + i), read(n, S, s + 3 * N + i)
        g0, g1 = read(n, G, g + i), read(n, G, g + N + i)
        g2, g3 = read(n, G, g + 2 * N + i), read(n, G, g + 3 * N + i)
        o = at + i
        write(n, dx, o + R * N, fma(s3, y3, fma(s2, y2, fma(s1, y1, fma(s0, y0, read(n, dx, o + R * N))))))
        write(n, dx, o + D * N, fma(s3, g3, fma(s2, g2, fma(s1, g1, fma(s0, g0, read(n, dx, o + D * N))))))
        write(n, dx, o + A * N, fma(s3, e3, fma(s2, e2, fma(s1, e1, fma(s0, e0, read(n, dx, o + A * N))))))
        d, a, dr = read(n, x, o + D * N), read(n, x, o + A * N), read(n, z, p + D_R * N + i)
        write(n, G, g + i, fma(e0, a, fma(y0, dr, g0 * d)))
        write(n, G, g + N + i, fma(e1, a, fma(y1, dr, g1 * d)))
        write(n, G, g + 2 * N + i, fma(e2, a, fma(y2, dr, g2 * d)))
        write(n, G, g + 3 * N + i, fma(e3, a, fma(y3, dr, g3 * d)))


@inner
def rows_back(size, start, G, x, z, sums, states, dx, count, j):
    """Four rows, from j on, of state and gradient back through the `count` tokens of a chunk.

    The parts of dr, dd, dk and db in which neither state nor gradient occurs are left to `complete`.

    With g = G + dy r^T behind the token's output, the gradients of v and u are g k and g b. Between the tokens G
    becomes g d + du a^T, so that the next one's are a sum of products with this G: they need not wait for it.

    Args:
        start: state before the chunk, [key, value]. G: gradient of that behind it, [value, key], then of that before.
        x, z, sums: of the tokens, as `prepare_back` left them. dx: added to. states: room for (CHUNK, 4, N) numbers.
    """
    n, N = lanes(size), len(size)
    for i in range(0, N, len(n)):
        transpose(n, start, N * i + j, N, states, i, N)
    for m in range(count - 1):
        replay(size, states, 4 * N * m, x, ROWS * N * m, j)
    m, g = count - 1, N * j
    at = ROWS * N * m
    y = read(FOUR, x, at + Y * N + j)
    dv = fma(y, each(FOUR, sums, SUMS * m + R_K), products(size, G, g, x, at + K * N))
    du = fma(y, each(FOUR, sums, SUMS * m + R_B), products(size, G, g, x, at + B * N))
    while True:
        write(FOUR, dx, at + V * N + j, dv)
        of_k, of_b = read_gradient(size, G, g, x, at, z, PRODUCTS * N * m, dx, j)
        step_back(size, states, 4 * N * m, G, g, x, at, z, PRODUCTS * N * m, du, dx, j)
        if m == 0:
            break
        dv = fma(du, each(FOUR, sums, SUMS * m + A_K), fma(y, each(FOUR, sums, SUMS * m + DR_K), of_k))
        du = fma(du, each(FOUR, sums, SUMS * m + A_B), fma(y, each(FOUR, sums, SUMS * m + DR_B), of_b))
        m -= 1
        at -= ROWS * N
        y = read(FOUR, x, at + Y * N + j)
        dv = fma(y, each(FOUR, sums, SUMS * m + R_K), dv)
        du = fma(y, each(FOUR, sums, SUMS * m + R_B), du)


@inner
def complete(size, x, z, dx, n):
    """With q = S dy: dr = q d + b (u . dy) + k (v . dy); and dd, dk and db are of g = G + dy r^T."""
    w, N = lanes(size), len(size)
    at = ROWS * N * n
    of_u = every(w, dot(size, x, at + U * N, at + Y * N))
    of_v = every(w, dot(size, x, at + V * N, at + Y * N))
    for i in range(0, N, len(w)):
        o = at + i
        r, q, slope = read(w, x, o + R * N), read(w, dx, o + R * N), read(w, z, PRODUCTS * N * n + SLOPE * N + i)
        d, k, b = read(w, x, o + D * N), read(w, x, o + K * N), read(w, x, o + B * N)
        write(w, dx, o + D * N, fma(q, r, read(w, dx, o + D * N)) * slope)
        write(w, dx, o + K * N, fma(r, of_v, read(w, dx, o + K * N)))
        write(w, dx, o + B * N, fma(r, of_u, read(w, dx, o + B * N)))
        write(w, dx, o + R * N, fma(q, d, fma(b, of_u, k * of_v)))


@outer
def forward(first, last, size, bounds, chunks, r, w, k, v, a, b, S, y, u, starts):
    """`S`, [key, value], goes from the initial to the final state; `starts` (chunks, H, N, N) may have no chunks."""
    (T, H, _), N = r.shape, len(size)
    x, slopes = room(S, (CHUNK + 1) * ROWS * N), room(S, N)
    x[:] = 0
    for piece in range(first, last):
        i, h = piece // H, piece % H
        state = S[i, h].reshape(N * N)
        for c in range(chunks[i], chunks[i + 1]):
            begin = bounds[i] + (c - chunks[i]) * CHUNK
            count = min(CHUNK, bounds[i + 1] - begin)
            if len(starts):
                keep(size, state, starts[c, h].reshape(N * N))
            for n in range(count):
                t, at = begin + n, ROWS * N * n
                decay(size, w[t, h], x, at + D * N, slopes, 0)
                copy(size, r[t, h], 0, x, at + R * N)
                copy(size, k[t, h], 0, x, at + K * N)
                copy(size, v[t, h], 0, x, at + V * N)
                copy(size, a[t, h], 0, x, at + A * N)
                copy(size, b[t, h], 0, x, at + B * N)
            weighted_rows(size, state, x, 0)
            for n in range(count):
                t, at = begin + n, ROWS * N * n
                later = min(t + CHUNK, T - 1)
                call_for(size, r[later, h])
                call_for(size, w[later, h])
                call_for(size, k[later, h])
                call_for(size, v[later, h])
                call_for(size, a[later, h])
                call_for(size, b[later, h])
                call_for(size, y[t, h])
                call_for(size, u[t, h])
                step(size, state, x, at)
                copy(size, x, at + U * N, u[t, h], 0)
                copy(size, x, at + Y * N, y[t, h], 0)


@outer
def backward(first, last, size, bounds, chunks, r, w, k, v, a, b, u, starts, dy, G, dr, dw, dk, dv, da, db):
    """`G`, [value, key], goes from the gradient of the final to that of the initial state."""
    H, N = r.shape[1], len(size)
    x, dx, states = room(G, CHUNK * ROWS * N), room(G, CHUNK * ROWS * N), room(G, CHUNK * 4 * N)
    z, sums = room(G, CHUNK * PRODUCTS * N), room(G, CHUNK * SUMS)
    for piece in range(first, last):
        i, h = piece // H, piece % H
        gradient = G[i, h].reshape(N * N)
        for c in range(chunks[i + 1] - 1, chunks[i] - 1, -1):
            begin = bounds[i] + (c - chunks[i]) * CHUNK
            count = min(CHUNK, bounds[i + 1] - begin)
            for n in range(count):
                t, at = begin + n, ROWS * N * n
                decay(size, w[t, h], x, at + D * N, z, PRODUCTS * N * n + SLOPE * N)
                copy(size, r[t, h], 0, x, at + R * N)
                copy(size, k[t, h], 0, x, at + K * N)
                copy(size, v[t, h], 0, x, at + V * N)
                copy(size, a[t, h], 0, x, at + A * N)
                copy(size, b[t, h], 0, x, at + B * N)
                copy(size, u[t, h], 0, x, at + U * N)
                copy(size, dy[t, h], 0, x, at + Y * N)
                prepare_back(size, x, z, sums, n)
            dx[:] = 0
            start = starts[c, h].reshape(N * N)
            for j in range(0, N, 4):
                for t in range(begin + CHUNK * j // N, min(begin + CHUNK * (j + 4) // N, bounds[i + 1])):
                    earlier = max(t - CHUNK, 0)
                    call_for(size, r[earlier, h])
                    call_for(size, w[earlier, h])
                    call_for(size, k[earlier, h])
                    call_for(size, v[earlier, h])
                    call_for(size, a[earlier, h])
                    call_for(size, b[earlier, h])
                    call_for(size, u[earlier, h])
                    call_for(size, dy[earlier, h])
                    call_for(size, dr[t, h])
                    call_for(size, dw[t, h])
                    call_for(size, dk[t, h])
                    call_for(size, dv[t, h])
                    call_for(size, da[t, h])
                    call_for(size, db[t, h])
                for row in range(j, j + 4):
                    call_for(size, starts[max(c - 1, 0), h, row])
                rows_back(size, start, gradient, x, z, sums, states, dx, count, j)
            for n in range(count):
                t, at = begin + n, ROWS * N * n
                complete(size, x, z, dx, n)
                copy(size, dx, at + R * N, dr[t, h], 0)
                copy(size, dx, at + D * N, dw[t, h], 0)
                copy(size, dx, at + K * N, dk[t, h], 0)
                copy(size, dx, at + V * N, dv[t, h], 0)
                copy(size, dx, at + A * N, da[t, h], 0)
                copy(size, dx, at + B * N, db[t, h], 0)
