"""Loops of `wkv7_native`, compiled by Numba.

Arrays of tokens are C-contiguous (T, H, N) in fp64, fp32 or bf16; all others are in the precision of the arithmetic.
States are (B, H, N, N), [key, value], and so are their gradients. Sequence i of B is made of the tokens bounds[i] to
bounds[i + 1] - 1 of T, and of the chunks from chunks[i] on. A piece of work is one head of one sequence.

Inside a chunk a state is kept without its decay: with P the product of the decays since the chunk began, the state is
S diag(P), and S takes part in nothing but sums of products with r P, a P of the token before, k / P and b / P. That is
two multiply-adds an element of the state and token less, forwards and backwards. P is never below 1 / 16000.

The backward pass takes the gradient of the state back through a chunk first, which gives du, dv, dk and db without any
state; then the state forward again, which gives dr and da of the dy and du. No state or gradient between tokens is kept
for the other pass. What a decay does to the loss follows from both, see `complete`.

A chunk is one array `x` of ROWS rows of N numbers, all tokens' r, then all tokens' a, and so on; `at` is where a token
begins in the first of them. The first place is that of the token before the chunk, with P = 1. Gradients `dx` have the
same form. What comes next is called for from memory while a chunk is computed.
"""

from __future__ import annotations

from rookery.ops.jit import inner, outer
from rookery.ops.rows_numba import (
    absolute,
    along,
    call_for,
    copy,
    each,
    every,
    fma_row,
    lanes,
    no_row,
    past,
    portion,
    put,
    read,
    read_row,
    room,
    totals,
    where_positive,
    write,
    write_row,
)
from rookery.ops.simd import exp, fma
from rookery.ops.wkv7_native import LOG_DECAY_SCALE

CHUNK = 16
SPAN = 8
"""Tokens of a chunk, and those after which `complete` begins anew."""

PLACES = CHUNK + 2
"""Of tokens in a row of rows: those of a chunk, the one before and the one after."""
R, A, K, B, V, U, Y, P = range(0, 8 * PLACES, PLACES)
"""Where rows of tokens begin: what `wkv7` reads, with P the product of the decays; u = S a; the output, or its
gradient."""
ROWS = 8 * PLACES

SLOPE, INVERSE = range(2)
"""Rows of what else `decay` makes of a token: the derivative of the logarithm of its decay by w, and 1 / P."""
MORE = 2

R_K, R_B, A_K, A_B = range(4)
"""Products of rows of a token: r . k, r . b, and a with k and b of the token before."""
SUMS = 4

FOUR = (None,) * 4


@inner
def enter(size, x):
    """An empty chunk."""
    x[:] = 0
    x[P * len(size) : (P + 1) * len(size)] = 1


@inner
def decay(size, w, x, at, z, o):
    """Row P of a token, and its rows from o on of `z`."""
    n, N = lanes(size), len(size)
    zeros, one, scale = every(n, x.dtype.type(0)), every(n, x.dtype.type(1)), every(n, x.dtype.type(LOG_DECAY_SCALE))
    for j in range(0, N, len(n)):
        of_w = read(n, w, j)
        e = exp(zeros - absolute(of_w))
        more = one / (one + e)
        less = e * more
        product = exp(scale * where_positive(of_w, more, less)) * read(n, x, at + (P - 1) * N + j)
        write(n, x, at + P * N + j, product)
        write(n, z, o + INVERSE * N + j, one / product)
        # sigmoid (1 - sigmoid) as a product that keeps its digits where the sigmoid is all but 1.
        write(n, z, o + SLOPE * N + j, scale * (more * less))


@inner
def without_decay(size, x, at, z, o):
    """Rows r, a, k and b of a token, times or divided by P."""
    n, N = lanes(size), len(size)
    for j in range(at, at + N, len(n)):
        product, inverse = read(n, x, j + P * N), read(n, z, o - at + INVERSE * N + j)
        write(n, x, j + R * N, read(n, x, j + R * N) * product)
        write(n, x, j + A * N, read(n, x, j + A * N) * read(n, x, j + (P - 1) * N))
        write(n, x, j + K * N, read(n, x, j + K * N) * inverse)
        write(n, x, j + B * N, read(n, x, j + B * N) * inverse)


@inner
def weighted_rows(size, S, x, at):
    """u = S^T a of a token."""
    n, N = lanes(size), len(size)
    sum = no_row(size, x)
    for i in range(N):
        sum = fma_row(read_row(size, S, N * i), each(n, x, at + A * N + i), sum)
    write_row(size, x, at + U * N, sum)


@inner
def step(size, S, x, at):
    """Advance the state by one token in place and read it: y = S^T r, and u of the next token."""
    n, part, N = lanes(size), portion(size), len(size)
    for j in range(0, N, len(part)):
        u, v = read_row(part, x, at + U * N + j), read_row(part, x, at + V * N + j)
        of_r = of_a = no_row(part, x)
        for i in range(N):
            s = fma_row(v, each(n, x, at + K * N + i), read_row(part, S, N * i + j))
            s = fma_row(u, each(n, x, at + B * N + i), s)
            write_row(part, S, N * i + j, s)
            of_r = fma_row(s, each(n, x, at + R * N + i), of_r)
            of_a = fma_row(s, each(n, x, at + (A + 1) * N + i), of_a)
        write_row(part, x, at + Y * N + j, of_r)
        write_row(part, x, at + (U + 1) * N + j, of_a)


@inner
def keep(size, S, start):
    """Copy a state that is not needed again soon."""
    for o in range(0, len(size) * len(size), len(size)):
        past(size, S, o, start, o)


@inner
def with_decay(size, x, at, S, i, o):
    """A state, or the gradient of one, times P of a token, from i on to o on in S."""
    n, N = lanes(size), len(size)
    none = no_row(size, x)
    for key in range(N):
        product = each(n, x, at + P * N + key)
        write_row(size, S, o + N * key, fma_row(read_row(size, S, i + N * key), product, none))


@inner
def prepare_back(size, x, sums, n):
    """Sums of token n of a chunk."""
    w, N = lanes(size), len(size)
    at = N * (n + 1)
    r_k = r_b = a_k = a_b = every(w, x.dtype.type(0))
    for j in range(at, at + N, len(w)):
        r, a = read(w, x, j + R * N), read(w, x, j + A * N)
        r_k, r_b = fma(r, read(w, x, j + K * N), r_k), fma(r, read(w, x, j + B * N), r_b)
        a_k, a_b = fma(a, read(w, x, j + (K - 1) * N), a_k), fma(a, read(w, x, j + (B - 1) * N), a_b)
    write(FOUR, sums, SUMS * n, totals(r_k, r_b, a_k, a_b))


@inner
def begin_back(size, G, x, dx, count):
    """The gradient of the state behind a chunk of `count` tokens, where `step_back` takes it up, and what it gives to
    dv and du of the last token. G: room for CHUNK / SPAN + 1 states; the gradient comes and goes in the first."""
    n, N = lanes(size), len(size)
    at, last = N * count, N * N * (count // SPAN)
    with_decay(size, x, at, G, 0, last)
    of_k = of_b = no_row(size, x)
    for i in range(N):
        g = read_row(size, G, last + N * i)
        of_k, of_b = fma_row(g, each(n, x, at + K * N + i), of_k), fma_row(g, each(n, x, at + B * N + i), of_b)
    write_row(size, dx, at + V * N, of_k)
    write_row(size, dx, at + U * N, of_b)


@inner
def key_back(size, G, after, before, x, at, y, e, v, u, of_k, of_b):
    """`step_back` for one key, whose row of the gradient goes from `after` to `before` in G; `at` is its place in the
    rows of the token. Returns parts of its dk and db, and `of_k` and `of_b` with what it adds to them."""
    n, N = lanes(size), len(size)
    g = fma_row(y, each(n, x, at + R * N), read_row(size, G, after))
    of_k = fma_row(g, each(n, x, at + (K - 1) * N), of_k)
    of_b = fma_row(g, each(n, x, at + (B - 1) * N), of_b)
    write_row(size, G, before, fma_row(e, each(n, x, at + A * N), g))
    return along(g, v), along(g, u), of_k, of_b


@inner
def step_back(size, G, x, dx, sums, n):
    """The gradient of the state back over token n: du, dv, dk and db.

    With g = G + r dy^T behind the token's output, the gradients of v and u are g^T k and g^T b. Before the token G is
    g + a du^T, so that those of the token before begin with sums of products with this g, taken in the same pass.
    """
    w, N = lanes(size), len(size)
    at, sum, after, before = N * (n + 1), SUMS * n, N * N * ((n + 1) // SPAN), N * N * (n // SPAN)
    y, u, v = read_row(size, x, at + Y * N), read_row(size, x, at + U * N), read_row(size, x, at + V * N)
    e = fma_row(y, each(w, sums, sum + R_B), read_row(size, dx, at + U * N))
    write_row(size, dx, at + U * N, e)
    write_row(size, dx, at + V * N, fma_row(y, each(w, sums, sum + R_K), read_row(size, dx, at + V * N)))
    of_k = fma_row(e, each(w, sums, sum + A_K), no_row(size, x))
    of_b = fma_row(e, each(w, sums, sum + A_B), no_row(size, x))
    for i in range(0, N, 4):
        o, g, f = at + i, after + N * i, before + N * i
        k0, b0, of_k, of_b = key_back(size, G, g, f, x, o, y, e, v, u, of_k, of_b)
        k1, b1, of_k, of_b = key_back(size, G, g + N, f + N, x, o + 1, y, e, v, u, of_k, of_b)
        k2, b2, of_k, of_b = key_back(size, G, g + 2 * N, f + 2 * N, x, o + 2, y, e, v, u, of_k, of_b)
        k3, b3, of_k, of_b = key_back(size, G, g + 3 * N, f + 3 * N, x, o + 3, y, e, v, u, of_k, of_b)
        write(FOUR, dx, o + K * N, totals(k0, k1, k2, k3))
        write(FOUR, dx, o + B * N, totals(b0, b1, b2, b3))
    write_row(size, dx, at + (V - 1) * N, of_k)
    write_row(size, dx, at + (U - 1) * N, of_b)


@inner
def key_again(size, S, o, x, at, y, e, v, u):
    """`step_again` for one key, whose row is at o in the state. Returns parts of its da and dr."""
    n, N = lanes(size), len(size)
    before = read_row(size, S, o)
    after = fma_row(u, each(n, x, at + B * N), fma_row(v, each(n, x, at + K * N), before))
    write_row(size, S, o, after)
    return along(before, e), along(after, y)


@inner
def step_again(size, S, x, dx, n):
    """The state over token n in place: da = S du of the one before, dr = S dy of the one after."""
    N = len(size)
    at = N * (n + 1)
    y, u, v = read_row(size, x, at + Y * N), read_row(size, x, at + U * N), read_row(size, x, at + V * N)
    e = read_row(size, dx, at + U * N)
    for i in range(0, N, 4):
        o, s = at + i, N * i
        a0, r0 = key_again(size, S, s, x, o, y, e, v, u)
        a1, r1 = key_again(size, S, s + N, x, o + 1, y, e, v, u)
        a2, r2 = key_again(size, S, s + 2 * N, x, o + 2, y, e, v, u)
        a3, r3 = key_again(size, S, s + 3 * N, x, o + 3, y, e, v, u)
        write(FOUR, dx, o + A * N, totals(a0, a1, a2, a3))
        write(FOUR, dx, o + R * N, totals(r0, r1, r2, r3))


@inner
def flow_of(size, S, G, g, flow):
    """What `complete` begins with: for each key the sum of the products of state and gradient, the latter from g on."""
    N = len(size)
    for i in range(0, N, 4):
        s = N * i
        f0 = along(read_row(size, S, s), read_row(size, G, g + s))
        f1 = along(read_row(size, S, s + N), read_row(size, G, g + s + N))
        f2 = along(read_row(size, S, s + 2 * N), read_row(size, G, g + s + 2 * N))
        f3 = along(read_row(size, S, s + 3 * N), read_row(size, G, g + s + 3 * N))
        write(FOUR, flow, i, totals(f0, f1, f2, f3))


@inner
def complete(size, x, z, dx, flow, n):
    """Gradients of r, w, k, a and b of token n.

    That of a decay's logarithm is the sum of the products of the state before the token and the gradient behind its
    output. `flow` is such a sum between tokens. It changes by products that are there already: what the token reads
    (a . da, r . dr) leaves it, what the token writes (k . dk, b . db) enters. As their errors add up, it begins anew
    every SPAN tokens.
    """
    w, N = lanes(size), len(size)
    at, more = N * (n + 1), MORE * N * n
    for i in range(0, N, len(w)):
        o = at + i
        inverse, before = read(w, z, more + INVERSE * N + i), read(w, x, o + (P - 1) * N)
        dr, da, dk, db = read(w, dx, o + R * N), read(w, dx, o + A * N), read(w, dx, o + K * N), read(w, dx, o + B * N)
        dlog = read(w, flow, i) - read(w, x, o + A * N) * da
        after = fma(read(w, x, o + B * N), db, fma(read(w, x, o + K * N), dk, dlog)) - read(w, x, o + R * N) * dr
        write(w, flow, i, after)
        write(w, dx, o + P * N, dlog * read(w, z, more + SLOPE * N + i))
        write(w, dx, o + R * N, dr * read(w, x, o + P * N))
        write(w, dx, o + A * N, da * before)
        write(w, dx, o + K * N, dk * inverse)
        write(w, dx, o + B * N, db * inverse)


@inner
def copy_state(size, S, out):
    for o in range(0, len(size) * len(size), len(size)):
        copy(size, S, o, out, o)


@outer
def forward(first, last, size, bounds, chunks, r, w, k, v, a, b, S, y, u, starts):
    """`S` goes from the initial to the final state; `starts` (chunks, H, N, N) may have no chunks."""
    (T, H, _), N = r.shape, len(size)
    x, z = room(S, ROWS * N), room(S, MORE * N)
    enter(size, x)
    for piece in range(first, last):
        i, h = piece // H, piece % H
        state = S[i, h].reshape(N * N)
        for c in range(chunks[i], chunks[i + 1]):
            begin = bounds[i] + (c - chunks[i]) * CHUNK
            count = min(CHUNK, bounds[i + 1] - begin)
            if len(starts):
                keep(size, state, starts[c, h].reshape(N * N))
            for n in range(count):
                t, at = begin + n, N * (n + 1)
                decay(size, w[t, h], x, at, z, 0)
                copy(size, r[t, h], 0, x, at + R * N)
                copy(size, a[t, h], 0, x, at + A * N)
                copy(size, k[t, h], 0, x, at + K * N)
                copy(size, b[t, h], 0, x, at + B * N)
                copy(size, v[t, h], 0, x, at + V * N)
                without_decay(size, x, at, z, 0)
            weighted_rows(size, state, x, N)
            for n in range(count):
                t, at = begin + n, N * (n + 1)
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
            with_decay(size, x, N * count, state, 0, 0)


@outer
def backward(first, last, size, bounds, chunks, r, w, k, v, a, b, u, starts, dy, G, far, dr, dw, dk, dv, da, db):
    """`G` goes from the gradient of the final to that of the initial state. far: whether the gradients of tokens are
    more than the caches can hold."""
    H, N = r.shape[1], len(size)
    x, dx, flow = room(G, ROWS * N), room(G, ROWS * N), room(G, N)
    z, sums = room(G, CHUNK * MORE * N), room(G, CHUNK * SUMS)
    gradient, state = room(G, (CHUNK // SPAN + 1) * N * N), room(G, N * N)
    enter(size, x)
    for piece in range(first, last):
        i, h = piece // H, piece % H
        copy_state(size, G[i, h].reshape(N * N), gradient)
        for c in range(chunks[i + 1] - 1, chunks[i] - 1, -1):
            begin = bounds[i] + (c - chunks[i]) * CHUNK
            count = min(CHUNK, bounds[i + 1] - begin)
            for n in range(count):
                t, at = begin + n, N * (n + 1)
                decay(size, w[t, h], x, at, z, MORE * N * n)
                copy(size, r[t, h], 0, x, at + R * N)
                copy(size, a[t, h], 0, x, at + A * N)
                copy(size, k[t, h], 0, x, at + K * N)
                copy(size, b[t, h], 0, x, at + B * N)
                copy(size, v[t, h], 0, x, at + V * N)
                copy(size, u[t, h], 0, x, at + U * N)
                copy(size, dy[t, h], 0, x, at + Y * N)
                without_decay(size, x, at, z, MORE * N * n)
                prepare_back(size, x, sums, n)
            begin_back(size, gradient, x, dx, count)
            for n in range(count - 1, -1, -1):
                earlier = max(begin + n - CHUNK, 0)
                call_for(size, r[earlier, h])
                call_for(size, w[earlier, h])
                call_for(size, k[earlier, h])
                call_for(size, v[earlier, h])
                call_for(size, a[earlier, h])
                step_back(size, gradient, x, dx, sums, n)
            copy_state(size, starts[c, h].reshape(N * N), state)
            for span in range(0, count, SPAN):
                flow_of(size, state, gradient, N * N * (span // SPAN), flow)
                for n in range(span, min(span + SPAN, count)):
                    t, at = begin + n, N * (n + 1)
                    earlier = max(t - CHUNK, 0)
                    call_for(size, b[earlier, h])
                    call_for(size, u[earlier, h])
                    call_for(size, dy[earlier, h])
                    for row in range(N * n // CHUNK, N * (n + 1) // CHUNK):
                        call_for(size, starts[max(c - 1, 0), h, row])
                    step_again(size, state, x, dx, n)
                    complete(size, x, z, dx, flow, n)
            for n in range(count):
                t, at = begin + n, N * (n + 1)
                put(size, far, dx, at + R * N, dr[t, h])
                put(size, far, dx, at + P * N, dw[t, h])
                put(size, far, dx, at + K * N, dk[t, h])
                put(size, far, dx, at + V * N, dv[t, h])
                put(size, far, dx, at + A * N, da[t, h])
                put(size, far, dx, at + B * N, db[t, h])
        copy_state(size, gradient, G[i, h].reshape(N * N))
