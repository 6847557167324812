"""Triton kernels of `wkv7_triton`: the recurrence of RWKV-7 as matrix products over chunks of tokens.

For one head and one chunk of C tokens, with the state S of shape (value, key) at its start, d_t the decays and P_t
their product from the chunk's start through token t, the recurrence of `rookery.ops.wkv7` unrolls to::

    u_t = S_{t-1} a_t = S (P_{t-1} a_t) + sum_{s<t}  u_s (b_s . P_{t-1}/P_s a_t) + v_s (k_s . P_{t-1}/P_s a_t)
    y_t = S_t r_t     = S (P_t r_t)     + sum_{s<=t} u_s (b_s . P_t/P_s r_t)     + v_s (k_s . P_t/P_s r_t)

The decays are split over both factors of each product and centred: with h = sqrt(P_C) (elementwise), ::

    r_in = r_t P_t/h    a_in = a_t P_{t-1}/h    k_out = k_s h/P_s    b_out = b_s h/P_s

span half a chunk of decay each way, at most 2^(0.44 C), which neither bf16 nor fp32 overflows. Rows being tokens,
``tril`` keeping s <= t and ``strict`` keeping s < t, the chunk is::

    a_b, a_k = strict(a_in b_out^T), strict(a_in k_out^T)         r_b, r_k = tril(r_in b_out^T), tril(r_in k_out^T)
    u  = (I - a_b)^-1 (a_in (S h)^T + a_k v)                       y = r_in (S h)^T + r_k v + r_b u
    S' = S h^2 + (u^T b_out + v^T k_out) h

the WY form of the delta rule (Yang et al., arXiv:2406.06484) with the decay of RWKV-7 (arXiv:2503.14456). Seen as a map
of S it is affine, S' = S (diag(h^2) + M) + Q, and so is the way back of its gradient, which is what lets the chunks be
worked on in parallel after a short scan over their maps.

Gradients follow by differentiating these lines. Those of the log decays are sums over all products that a decay takes
part in: what r_in and a_in receive from token t on, less what b_out and k_out gave from token t on. Products wholly
after t appear in both and must cancel, so both sides use the same rounded factors and fp32 sums; with those the error
of the decay's gradient stays that of the products which really cross t.

Numbers: decays, states carried from chunk to chunk and all sums are fp32; factors of products are rounded to DOT.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_DECAY_SCALE = tl.constexpr(-math.exp(-0.5) * math.log2(math.e))


@triton.jit
def _dot(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def _sequence(s, bounds, firsts, T, NT, PACKED: tl.constexpr):
    """Of sequence s: its first token, its first chunk (both counted through the sequences before it), its tokens and
    its chunks. PACKED: as `bounds` and `firsts` (S + 1) say; else each has T tokens in NT chunks."""
    if PACKED:
        first = tl.load(bounds + s)
        chunk = tl.load(firsts + s)
        tokens = (tl.load(bounds + s + 1) - first).to(tl.int32)
        count = (tl.load(firsts + s + 1) - chunk).to(tl.int32)
    else:
        first = s.to(tl.int64) * T
        chunk = s.to(tl.int64) * NT
        tokens = s * 0 + T
        count = s * 0 + NT
    return first, chunk, tokens, count


@triton.jit
def _tokens(h, c, first, tokens, H, N: tl.constexpr, C: tl.constexpr):
    """Where chunk `c` of head `h` of a sequence lies in a (.., H, N) array: offset of its first token, of its (C, N)
    elements from there, and which of its tokens exist."""
    rows = tl.arange(0, C)[:, None]
    base = ((first + c * C) * H + h) * N
    return base, rows * (H * N) + tl.arange(0, N)[None, :], c * C + rows < tokens


@triton.jit
def _tokens_of(program, bounds, firsts, owners, T, H, NT, N: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr):
    """The same for the chunk whose number a program has. The chunks of a sequence follow each other, head by head;
    `owners` has the sequence of each chunk of one head."""
    if PACKED:  # noqa: SIM108 - a condition of compilation
        s = tl.load(owners + program // H)
    else:
        s = program // (NT * H)
    first, chunk, tokens, count = _sequence(s, bounds, firsts, T, NT, PACKED)
    within = program - (chunk * H).to(tl.int32)
    return _tokens(within // count, within % count, first, tokens, H, N, C)


@triton.jit
def _load(x, tile, exists):
    return tl.load(x + tile, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _square(N: tl.constexpr):
    """Offsets of an (N, N) matrix."""
    return tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def _decays(w, exists):
    """log2 of d_t, of P_t/h, and h. Tokens past the end do not decay."""
    log_d = tl.where(exists, LOG2_DECAY_SCALE * tl.sigmoid(w), 0.0)
    log_h = 0.5 * tl.sum(log_d, axis=0)
    return log_d, tl.cumsum(log_d, axis=0) - log_h[None, :], tl.exp2(log_h)


@triton.jit
def _inverse(A, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I - A)^-1 of a strictly lower triangular (C, C) matrix, by joining inverted diagonal blocks pairwise.

    From blocks X and Y with A' between them, the inverse of the pair has Y^-1 A' X^-1 in its corner. Unlike the product
    (I + A)(I + A^2)(I + A^4).. this never forms powers of A, whose entries reach 10^6 where a key repeats."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    inverse = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, A, 0.0))
    for level in tl.static_range(1, 6):
        if 2**level < C:
            between = (i // 2 ** (level + 1) == j // 2 ** (level + 1)) & (i // 2**level != j // 2**level)
            corner = _dot(tl.where(between, A, 0.0), inverse, PRECISION)
            inverse += _dot(inverse, corner, PRECISION)
    return inverse


@triton.jit
def prepare_forward(
    w, k, v, a, b, maps, offsets, decays, inverses,
    bounds, firsts, owners, T, H, NT,
    N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """For every chunk: M (N, N), Q (N, N), h^2 (N) of S' = S (diag(h^2) + M) + Q, and (I - a_b)^-1 (C, C)."""
    program = tl.program_id(0)
    chunk = program.to(tl.int64)
    base, tile, exists = _tokens_of(program, bounds, firsts, owners, T, H, NT, N, C, PACKED)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    log_d, log_p, h = _decays(_load(w + base, tile, exists), exists)
    a_in = (_load(a + base, tile, exists) * tl.exp2(log_p - log_d)).to(DOT)
    grow = tl.exp2(-log_p)
    b_out = (_load(b + base, tile, exists) * grow).to(DOT)
    k_out = (_load(k + base, tile, exists) * grow).to(DOT)
    value = _load(v + base, tile, exists).to(DOT)

    a_b = tl.where(i > j, _dot(a_in, tl.trans(b_out), PRECISION), 0.0)
    a_k = tl.where(i > j, _dot(a_in, tl.trans(k_out), PRECISION), 0.0).to(DOT)
    inverse = _inverse(a_b, C, PRECISION)
    tl.store(inverses + chunk * (C * C) + _square(C), inverse)
    inverse = inverse.to(DOT)

    u_of_state = _dot(inverse, a_in, PRECISION).to(DOT)
    M = _dot(tl.trans(u_of_state), b_out, PRECISION) * h[:, None] * h[None, :]
    tl.store(maps + chunk * (N * N) + _square(N), M)
    a_k_v = _dot(a_k, value, PRECISION).to(DOT)
    u_of_values = _dot(inverse, a_k_v, PRECISION).to(DOT)
    Q = _dot(tl.trans(u_of_values), b_out, PRECISION) + _dot(tl.trans(value), k_out, PRECISION)
    tl.store(offsets + chunk * (N * N) + _square(N), Q * h[None, :])
    tl.store(decays + chunk * N + tl.arange(0, N), h * h)


@triton.jit
def prepare_backward(
    r, w, a, b, dy, inverses, maps, offsets, decays,
    bounds, firsts, owners, T, H, NT,
    N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """For every chunk: M^T, D and h^2 of G = G' (diag(h^2) + M^T) + D, where G' and G are the gradients of the states
    after and before the chunk."""
    program = tl.program_id(0)
    chunk = program.to(tl.int64)
    base, tile, exists = _tokens_of(program, bounds, firsts, owners, T, H, NT, N, C, PACKED)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    log_d, log_p, h = _decays(_load(w + base, tile, exists), exists)
    a_in = (_load(a + base, tile, exists) * tl.exp2(log_p - log_d)).to(DOT)
    r_in = _load(r + base, tile, exists) * tl.exp2(log_p)
    b_out = (_load(b + base, tile, exists) * tl.exp2(-log_p)).to(DOT)
    dout = _load(dy + base, tile, exists).to(DOT)
    inverse = tl.load(inverses + chunk * (C * C) + _square(C)).to(DOT)

    u_of_state = _dot(inverse, a_in, PRECISION).to(DOT)
    M = _dot(tl.trans(b_out), u_of_state, PRECISION) * h[:, None] * h[None, :]
    tl.store(maps + chunk * (N * N) + _square(N), M)
    r_b = _dot(r_in.to(DOT), tl.trans(b_out), PRECISION)
    r_b = tl.where(i >= j, r_b, 0.0).to(DOT)
    y_of_state = (r_in + _dot(r_b, u_of_state, PRECISION)).to(DOT)
    D = _dot(tl.trans(dout), y_of_state, PRECISION) * h[None, :]
    tl.store(offsets + chunk * (N * N) + _square(N), D)
    tl.store(decays + chunk * N + tl.arange(0, N), h * h)


@triton.jit
def scan(
    first, maps, offsets, decays, before, last, bounds, firsts, owners, T, H, NT,
    N: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """X <- X (diag(decays) + maps) + offsets over the chunks of each head, from `first` to `last`; `before` gets the X
    that each chunk starts from. The rows of X are independent: each program carries ROWS of them."""
    program = tl.program_id(0)
    bh = (program // (N // ROWS)).to(tl.int64)
    rows = (program % (N // ROWS)) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, N)
    part = rows[:, None] * N + columns[None, :]
    X = tl.load(first + bh * (N * N) + part)
    _, of_sequence, _, count = _sequence(bh // H, bounds, firsts, T, NT, PACKED)
    begin = of_sequence * H + bh % H * count
    for step in range(0, count):
        chunk = begin + (count - 1 - step if REVERSE else step)
        tl.store(before + chunk * (N * N) + part, X)
        M = tl.load(maps + chunk * (N * N) + _square(N)).to(DOT)
        Q = tl.load(offsets + chunk * (N * N) + part)
        decay = tl.load(decays + chunk * N + columns)
        X = X * decay[None, :] + Q + _dot(X.to(DOT), M, PRECISION)
    tl.store(last + bh * (N * N) + part, X)


@triton.jit
def _forward_chunk(
    S, r, w, k, v, a, b, states, inverses, y, chunk, base, tile, exists,
    N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    SEQUENTIAL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Write y of one chunk that starts from S; return the state after it."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    log_d, log_p, h = _decays(_load(w + base, tile, exists), exists)
    r_in = (_load(r + base, tile, exists) * tl.exp2(log_p)).to(DOT)
    a_in = (_load(a + base, tile, exists) * tl.exp2(log_p - log_d)).to(DOT)
    grow = tl.exp2(-log_p)
    b_out = (_load(b + base, tile, exists) * grow).to(DOT)
    k_out = (_load(k + base, tile, exists) * grow).to(DOT)
    value = _load(v + base, tile, exists).to(DOT)

    if SEQUENTIAL:
        inverse = _inverse(tl.where(i > j, _dot(a_in, tl.trans(b_out), PRECISION), 0.0), C, PRECISION)
        if KEEP:
            tl.store(inverses + chunk * (C * C) + _square(C), inverse)
            tl.store(states + chunk * (N * N) + _square(N), S)
        inverse = inverse.to(DOT)
    else:
        inverse = tl.load(inverses + chunk * (C * C) + _square(C)).to(DOT)

    S_h = tl.trans((S * h[None, :]).to(DOT))
    a_k = tl.where(i > j, _dot(a_in, tl.trans(k_out), PRECISION), 0.0).to(DOT)
    u = (_dot(a_in, S_h, PRECISION) + _dot(a_k, value, PRECISION)).to(DOT)
    u = _dot(inverse, u, PRECISION).to(DOT)
    r_b = tl.where(i >= j, _dot(r_in, tl.trans(b_out), PRECISION), 0.0).to(DOT)
    r_k = tl.where(i >= j, _dot(r_in, tl.trans(k_out), PRECISION), 0.0).to(DOT)
    out = _dot(r_in, S_h, PRECISION) + _dot(r_k, value, PRECISION) + _dot(r_b, u, PRECISION)
    tl.store(y + base + tile, out, mask=exists)

    added = _dot(tl.trans(u), b_out, PRECISION) + _dot(tl.trans(value), k_out, PRECISION)
    return S * (h * h)[None, :] + added * h[None, :]


@triton.jit
def forward(
    r, w, k, v, a, b, initial, states, inverses, y, final, bounds, firsts, owners, T, H, NT,
    N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
    SEQUENTIAL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Outputs. SEQUENTIAL: one program a head walks its chunks from `initial` to `final` and, with KEEP, writes
    `states` (S before each chunk) and `inverses`. Otherwise one program a chunk, reading both."""
    program = tl.program_id(0)
    if SEQUENTIAL:
        S = tl.load(initial + program.to(tl.int64) * (N * N) + _square(N))
        h = program % H
        first, chunk, tokens, count = _sequence(program // H, bounds, firsts, T, NT, PACKED)
        for c in range(0, count):
            base, tile, exists = _tokens(h, c, first, tokens, H, N, C)
            S = _forward_chunk(
                S, r, w, k, v, a, b, states, inverses, y, chunk * H + h * count + c, base, tile, exists,
                N, C, DOT, PRECISION, SEQUENTIAL, KEEP,
            )  # fmt: skip
        tl.store(final + program.to(tl.int64) * (N * N) + _square(N), S)
    else:
        S = tl.load(states + program.to(tl.int64) * (N * N) + _square(N)).to(tl.float32)
        base, tile, exists = _tokens_of(program, bounds, firsts, owners, T, H, NT, N, C, PACKED)
        _forward_chunk(
            S, r, w, k, v, a, b, states, inverses, y, program.to(tl.int64), base, tile, exists,
            N, C, DOT, PRECISION, SEQUENTIAL, KEEP,
        )  # fmt: skip


@triton.jit
def _backward_chunk(
    G, r, w, k, v, a, b, states, inverses, dy, dr, dw, dk, dv, da, db, chunk, base, tile, exists,
    N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one chunk, G being that of the state after it; return that of the state before it."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    raw = _load(w + base, tile, exists)
    log_d, log_p, h = _decays(raw, exists)
    shrink = tl.exp2(log_p)
    shrink_before = tl.exp2(log_p - log_d)
    grow = tl.exp2(-log_p)
    r_in = (_load(r + base, tile, exists) * shrink).to(DOT)
    a_in = (_load(a + base, tile, exists) * shrink_before).to(DOT)
    b_out = (_load(b + base, tile, exists) * grow).to(DOT)
    k_out = (_load(k + base, tile, exists) * grow).to(DOT)
    value = _load(v + base, tile, exists).to(DOT)
    dout = _load(dy + base, tile, exists).to(DOT)
    inverse = tl.load(inverses + chunk * (C * C) + _square(C)).to(DOT)
    S = tl.load(states + chunk * (N * N) + _square(N)).to(tl.float32)
    dlog_of_state = tl.sum(G * S, axis=0) * h * h
    S_h = (S * h[None, :]).to(DOT)
    G_h = (G * h[None, :]).to(DOT)

    a_k = tl.where(i > j, _dot(a_in, tl.trans(k_out), PRECISION), 0.0).to(DOT)
    z = (_dot(a_in, tl.trans(S_h), PRECISION) + _dot(a_k, value, PRECISION)).to(DOT)
    u = _dot(inverse, z, PRECISION).to(DOT)
    r_b = tl.where(i >= j, _dot(r_in, tl.trans(b_out), PRECISION), 0.0).to(DOT)
    du = (_dot(tl.trans(r_b), dout, PRECISION) + _dot(b_out, tl.trans(G_h), PRECISION)).to(DOT)
    dz = _dot(tl.trans(inverse), du, PRECISION).to(DOT)
    r_k = tl.where(i >= j, _dot(r_in, tl.trans(k_out), PRECISION), 0.0).to(DOT)
    dvalue = _dot(tl.trans(r_k), dout, PRECISION) + _dot(k_out, tl.trans(G_h), PRECISION)
    dvalue += _dot(tl.trans(a_k), dz, PRECISION)
    tl.store(dv + base + tile, dvalue, mask=exists)

    dr_b = tl.where(i >= j, _dot(dout, tl.trans(u), PRECISION), 0.0).to(DOT)
    dr_k = tl.where(i >= j, _dot(dout, tl.trans(value), PRECISION), 0.0).to(DOT)
    da_b = tl.where(i > j, _dot(dz, tl.trans(u), PRECISION), 0.0).to(DOT)
    da_k = tl.where(i > j, _dot(dz, tl.trans(value), PRECISION), 0.0).to(DOT)

    dr_in = _dot(dout, S_h, PRECISION) + _dot(dr_k, k_out, PRECISION) + _dot(dr_b, b_out, PRECISION)
    tl.store(dr + base + tile, dr_in * shrink, mask=exists)
    dlog = r_in.to(tl.float32) * dr_in
    da_in = _dot(dz, S_h, PRECISION) + _dot(da_k, k_out, PRECISION) + _dot(da_b, b_out, PRECISION)
    tl.store(da + base + tile, da_in * shrink_before, mask=exists)
    dlog_before = a_in.to(tl.float32) * da_in
    db_out = _dot(tl.trans(da_b), a_in, PRECISION) + _dot(tl.trans(dr_b), r_in, PRECISION)
    db_end = _dot(u, G_h, PRECISION)
    tl.store(db + base + tile, (db_out + db_end) * grow, mask=exists)
    dlog -= b_out.to(tl.float32) * db_out
    dlog_end = b_out.to(tl.float32) * db_end
    dk_out = _dot(tl.trans(da_k), a_in, PRECISION) + _dot(tl.trans(dr_k), r_in, PRECISION)
    dk_end = _dot(value, G_h, PRECISION)
    tl.store(dk + base + tile, (dk_out + dk_end) * grow, mask=exists)
    dlog -= k_out.to(tl.float32) * dk_out
    dlog_end += k_out.to(tl.float32) * dk_end

    # A decay at t reaches r from t on and a after t; the state's end receives b and k from before t, and S.
    dlog = tl.cumsum(dlog + dlog_before - dlog_end, axis=0, reverse=True) - dlog_before
    dlog += (tl.sum(dlog_end, axis=0) + dlog_of_state)[None, :]
    scale: tl.constexpr = LOG2_DECAY_SCALE * 0.6931471805599453
    tl.store(dw + base + tile, dlog * scale * tl.sigmoid(raw) * tl.sigmoid(-raw), mask=exists)

    added = _dot(tl.trans(dout), r_in, PRECISION) + _dot(tl.trans(dz), a_in, PRECISION)
    return G * (h * h)[None, :] + added * h[None, :]


@triton.jit
def backward(
    r, w, k, v, a, b, states, inverses, dy, dfinal, dstates, dr, dw, dk, dv, da, db, dinitial,
    bounds, firsts, owners, T, H, NT,
    N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
    SEQUENTIAL: tl.constexpr,
):  # fmt: skip
    """Gradients. SEQUENTIAL: one program a head walks its chunks back from `dfinal` to `dinitial`. Otherwise one
    program a chunk, reading the gradient of the state after it from `dstates`."""
    program = tl.program_id(0)
    if SEQUENTIAL:
        G = tl.load(dfinal + program.to(tl.int64) * (N * N) + _square(N))
        h = program % H
        first, chunk, tokens, count = _sequence(program // H, bounds, firsts, T, NT, PACKED)
        for step in range(0, count):
            c = count - 1 - step
            base, tile, exists = _tokens(h, c, first, tokens, H, N, C)
            G = _backward_chunk(
                G, r, w, k, v, a, b, states, inverses, dy, dr, dw, dk, dv, da, db,
                chunk * H + h * count + c, base, tile, exists,
                N, C, DOT, PRECISION,
            )  # fmt: skip
        tl.store(dinitial + program.to(tl.int64) * (N * N) + _square(N), G)
    else:
        G = tl.load(dstates + program.to(tl.int64) * (N * N) + _square(N)).to(tl.float32)
        base, tile, exists = _tokens_of(program, bounds, firsts, owners, T, H, NT, N, C, PACKED)
        _backward_chunk(
            G, r, w, k, v, a, b, states, inverses, dy, dr, dw, dk, dv, da, db,
            program.to(tl.int64), base, tile, exists,
            N, C, DOT, PRECISION,
        )  # fmt: skip
