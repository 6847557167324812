"""Triton kernels of `wkv6_triton`: the recurrence of RWKV-6 over chunks of C tokens.

For one head and one chunk, with the state S of shape (value, key) at its start and d_t the decays, let (all per key)::

    pre_t = prod of d_i over i < t      post_s = prod of d_i over i > s      D_ts = prod of d_i over s < i < t

Then, A being strictly lower triangular and b diagonal, ::

    A_ts = sum_n r_t k_s D_ts    b_t = sum_n u r_t k_t
    y    = (r pre) S^T + (A + b) v                       S' = S prod(d) + v^T (k post)

Decays may vanish, so they are only ever multiplied. D does not split into a factor of t and one of s that both stay in
range; it is built column by column, from the last token of the chunk to the first: D_ts = D_t(s+1) d_(s+1).

Gradients follow by differentiating these lines, with G that of S'::

    dA_ts = dy_t v_s    db_t = dy_t v_t    dv = (A + b)^T dy + (k post) G^T
    dr_t  = pre_t (dy S)_t + sum_{s<t} dA_ts k_s D_ts + db_t u k_t
    dk_s  = post_s (v G)_s + sum_{t>s} dA_ts r_t D_ts + db_s u r_s
    dS    = G prod(d) + dy^T (r pre)

and that of log d_i is the sum of all products that d_i takes part in: with the first parts of dr and dk,
sum_{t>i} r_t dr_t + sum_{s<i} k_s dk_s + prod(d) sum_values(S G), and, of the second parts, the terms
dA_ts r_t k_s D_ts with s < i < t. Each sum runs over its own terms only, by a product with a triangular matrix of ones:
as a difference of two longer sums it would be lost in their rounding where the decay is strong, the more so as it is
then multiplied by exp(w).

A sequence may be cut into segments of chunks, worked on in parallel after a scan over what each does to the state.

Numbers: decays, states and all sums are fp32; factors of matrix products are rounded to DOT.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_W = tl.constexpr(10.0)
"""Beyond it exp(-exp(w)) stays 0, and exp(w) would overflow."""


@triton.jit
def _dot(x, y, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(x.to(DOT), y.to(DOT), input_precision=PRECISION)


@triton.jit
def _square(N: tl.constexpr):
    """Offsets of an (N, N) matrix."""
    return tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def _tokens(bh, c, T, H, N: tl.constexpr, C: tl.constexpr):
    """Where chunk `c` of head `bh` lies in a (B, T, H, N) array: offset of its first token, offsets of its (C, N)
    elements from there, and how many tokens there are from its first on."""
    token = (bh // H).to(tl.int64) * T + c * C
    tile = tl.arange(0, C)[:, None] * (H * N) + tl.arange(0, N)[None, :]
    return (token * H + bh % H) * N, tile, T - c * C


@triton.jit
def _load(x, tile, exists):
    return tl.load(x + tile, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _row_exists(s, count, N: tl.constexpr):
    """Mask (N) of token `s` of a chunk."""
    return tl.arange(0, N) < (count - s) * N


@triton.jit
def _rate(w, tile, exists, head, N: tl.constexpr, PER_TOKEN: tl.constexpr):
    """exp(w), the negative logarithm of the decay; 0 for tokens that do not exist. Without PER_TOKEN, `w` is (H, N)."""
    raw = _load(w, tile, exists) if PER_TOKEN else tl.load(w + head * N + tl.arange(0, N)).to(tl.float32)
    return tl.where(exists, tl.exp(tl.minimum(raw, LARGEST_W)), 0.0)


@triton.jit
def _pre(w, base, tile, count, head, H, N: tl.constexpr, C: tl.constexpr, PER_TOKEN: tl.constexpr):
    """`pre` (C, N), from the decays of the tokens before each."""
    i = tl.arange(0, C)[:, None]
    before = _rate(w, base - H * N + tile, (i > 0) & (i < count), head, N, PER_TOKEN)
    return tl.cumprod(tl.exp(-before), axis=0)


@triton.jit
def _post(w, base, tile, count, head, H, N: tl.constexpr, C: tl.constexpr, PER_TOKEN: tl.constexpr):
    """`post` (C, N), from the decays of the tokens after each, and prod(d) (N)."""
    i = tl.arange(0, C)[:, None]
    after = _rate(w, base + H * N + tile, (i < C - 1) & (i + 1 < count), head, N, PER_TOKEN)
    post = tl.cumprod(tl.exp(-after), axis=0, reverse=True)
    own = tl.exp(-_rate(w, base + tile, i < count, head, N, PER_TOKEN))
    return post, tl.sum(tl.where(i == 0, own * post, 0.0), axis=0)


@triton.jit
def _column(D, s, w, base, count, head, H, N: tl.constexpr, C: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Column `s` of D from column s + 1: (C, N), 1 where t is not after s."""
    n = tl.arange(0, N)
    decay = tl.exp(-_rate(w, base + (s + 1) * (H * N) + n, _row_exists(s + 1, count, N), head, N, PER_TOKEN))
    return tl.where(tl.arange(0, C)[:, None] > s + 1, D * decay[None, :], 1.0)


@triton.jit
def gather(
    values, keys, w, totals, decays, T, H, NC, NS,
    N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PER_TOKEN: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """What each segment of NC chunks does to the state, S' = S diag(decays) + totals (`values` v, `keys` k), or, in
    REVERSE, to its gradient (`values` dy, `keys` r)."""
    program = tl.program_id(0)
    bh = program // NS
    total = tl.zeros((N, N), tl.float32)
    decay = tl.full((N,), 1.0, tl.float32)
    for step in range(0, NC):
        c = program % NS * NC + (NC - 1 - step if REVERSE else step)
        base, tile, count = _tokens(bh, c, T, H, N, C)
        exists = tl.arange(0, C)[:, None] < count
        post, whole = _post(w, base, tile, count, bh % H, H, N, C, PER_TOKEN)
        weight = _pre(w, base, tile, count, bh % H, H, N, C, PER_TOKEN) if REVERSE else post
        key = _load(keys + base, tile, exists) * weight
        value = _load(values + base, tile, exists)
        total = total * whole[None, :] + _dot(tl.trans(value), key, DOT, PRECISION)
        decay *= whole
    tl.store(totals + program.to(tl.int64) * (N * N) + _square(N), total)
    tl.store(decays + program * N + tl.arange(0, N), decay)


@triton.jit
def scan(first, totals, decays, before, NS, N: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr):
    """X <- X diag(decays) + totals over the segments of each head, starting from `first`; `before` gets the X that each
    segment starts from. Each program carries ROWS rows of X."""
    program = tl.program_id(0)
    bh = (program // (N // ROWS)).to(tl.int64)
    columns = tl.arange(0, N)
    part = (program % (N // ROWS) * ROWS + tl.arange(0, ROWS))[:, None] * N + columns[None, :]
    X = tl.load(first + bh * (N * N) + part)
    for step in range(0, NS):
        segment = bh * NS + (NS - 1 - step if REVERSE else step)
        tl.store(before + segment * (N * N) + part, X)
        decay = tl.load(decays + segment * N + columns)
        X = X * decay[None, :] + tl.load(totals + segment * (N * N) + part)


@triton.jit
def forward(
    r, w, k, v, u, starts, states, y, final, T, H, NC, NS,
    N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PER_TOKEN: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of each segment from its state in `starts`. Writes `y` and `final`, or, with KEEP, instead the
    state before each chunk into `states`."""
    program = tl.program_id(0)
    bh = program // NS
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    n = tl.arange(0, N)
    bonus = tl.load(u + bh % H * N + n).to(tl.float32)[None, :]
    S = tl.load(starts + program.to(tl.int64) * (N * N) + _square(N))
    for step in range(0, NC):
        c = program % NS * NC + step
        base, tile, count = _tokens(bh, c, T, H, N, C)
        key = _load(k + base, tile, i < count)
        value = _load(v + base, tile, i < count)
        post, whole = _post(w, base, tile, count, bh % H, H, N, C, PER_TOKEN)
        if KEEP:
            chunk = program.to(tl.int64) * NC + step
            tl.store(states + chunk * (N * N) + _square(N), S)
        else:
            read = _load(r + base, tile, i < count)
            pre = _pre(w, base, tile, count, bh % H, H, N, C, PER_TOKEN)
            A = tl.where(i == j, tl.sum(read * key * bonus, axis=1)[:, None], 0.0)
            D = tl.full((C, N), 1.0, tl.float32)
            for back in range(2, C + 1):
                s = C - back
                D = _column(D, s, w, base, count, bh % H, H, N, C, PER_TOKEN)
                key_s = _load(k + base, s * (H * N) + n, _row_exists(s, count, N))
                A = tl.where((j == s) & (i > s), tl.sum(read * D * key_s[None, :], axis=1)[:, None], A)
            out = _dot(read * pre, tl.trans(S), DOT, PRECISION) + _dot(A, value, DOT, PRECISION)
            tl.store(y + base + tile, out, mask=i < count)
        S = S * whole[None, :] + _dot(tl.trans(value), key * post, DOT, PRECISION)
    if not KEEP:  # noqa: SIM102 - one condition of compilation, one of execution
        if program % NS == NS - 1:
            tl.store(final + bh.to(tl.int64) * (N * N) + _square(N), S)


@triton.jit
def backward(
    r, w, k, v, u, states, dy, ends, dr, dw, dk, dv, du, dinitial, T, H, NC, NS,
    N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of each segment back from the gradient of the state after it in `ends`. `du` and, without
    PER_TOKEN, `dw` get one row (N) for each segment."""
    program = tl.program_id(0)
    bh = program // NS
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    n = tl.arange(0, N)
    bonus = tl.load(u + bh % H * N + n).to(tl.float32)[None, :]
    dbonus = tl.zeros((N,), tl.float32)
    dw_sum = tl.zeros((N,), tl.float32)
    G = tl.load(ends + program.to(tl.int64) * (N * N) + _square(N))
    for step in range(0, NC):
        c = program % NS * NC + NC - 1 - step
        base, tile, count = _tokens(bh, c, T, H, N, C)
        read = _load(r + base, tile, i < count)
        key = _load(k + base, tile, i < count)
        value = _load(v + base, tile, i < count)
        dout = _load(dy + base, tile, i < count)
        pre = _pre(w, base, tile, count, bh % H, H, N, C, PER_TOKEN)
        post, whole = _post(w, base, tile, count, bh % H, H, N, C, PER_TOKEN)
        chunk = program.to(tl.int64) * NC + NC - 1 - step
        S = tl.load(states + chunk * (N * N) + _square(N)).to(tl.float32)

        dA = _dot(dout, tl.trans(value), DOT, PRECISION)
        db = tl.sum(tl.where(i == j, dA, 0.0), axis=1)[:, None]
        dA = tl.where(i > j, dA, 0.0)
        dread_state = pre * _dot(dout, S, DOT, PRECISION)
        dkey_state = post * _dot(value, G, DOT, PRECISION)

        dlog = _dot(tl.where(j > i, 1.0, 0.0), read * dread_state, DOT, PRECISION)
        dlog += _dot(tl.where(j < i, 1.0, 0.0), key * dkey_state, DOT, PRECISION)
        dlog += (whole * tl.sum(S * G, axis=0))[None, :]
        A = tl.where(i == j, tl.sum(read * key * bonus, axis=1)[:, None], 0.0)
        dread = tl.zeros((C, N), tl.float32)
        dkey = tl.zeros((C, N), tl.float32)
        D = tl.full((C, N), 1.0, tl.float32)
        for back in range(2, C + 1):
            s = C - back
            D = _column(D, s, w, base, count, bh % H, H, N, C, PER_TOKEN)
            key_s = _load(k + base, s * (H * N) + n, _row_exists(s, count, N))[None, :]
            A = tl.where((j == s) & (i > s), tl.sum(read * D * key_s, axis=1)[:, None], A)
            weight = tl.sum(tl.where(j == s, dA, 0.0), axis=1)[:, None] * D
            dread += weight * key_s
            weight *= read
            dkey = tl.where(i == s, tl.sum(weight, axis=0)[None, :], dkey)
            dlog += _dot(tl.where((j > i) & (i > s), 1.0, 0.0), weight * key_s, DOT, PRECISION)

        dvalue = _dot(tl.trans(A), dout, DOT, PRECISION) + _dot(key * post, tl.trans(G), DOT, PRECISION)
        tl.store(dv + base + tile, dvalue, mask=i < count)
        tl.store(dr + base + tile, dread_state + dread + db * bonus * key, mask=i < count)
        tl.store(dk + base + tile, dkey_state + dkey + db * bonus * read, mask=i < count)
        dbonus += tl.sum(db * read * key, axis=0)

        dw_tile = -dlog * _rate(w, base + tile, i < count, bh % H, N, PER_TOKEN)
        if PER_TOKEN:
            tl.store(dw + base + tile, dw_tile, mask=i < count)
        else:
            dw_sum += tl.sum(dw_tile, axis=0)

        G = G * whole[None, :] + _dot(tl.trans(dout), read * pre, DOT, PRECISION)
    tl.store(du + program * N + n, dbonus)
    if not PER_TOKEN:
        tl.store(dw + program * N + n, dw_sum)
    if program % NS == 0:
        tl.store(dinitial + bh.to(tl.int64) * (N * N) + _square(N), G)
