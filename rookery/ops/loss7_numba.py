"""The whole of an RWKV-7 model from tokens to loss and gradients, a few sequences at a time, compiled by Numba.

It says what `rookery.models.rwkv7` says, in fp32, with the loops of the steps that exist one by one for larger models.
For a small model this differs in three ways: between the steps there is no Python; what one step writes is still in the
caches when the next reads it; and threads share out sequences, so that none waits for another within a step.

All numbers of a part of the work lie in one array, `m`, of weights in another, `w`, of gradients in a third, `g`, which
are given by their addresses; offsets into them are in elements. `s` are the sizes of the model, `b` and `t` the places
of what each layer has and of what all layers share, `o` is where layer `l` begins; `at` and `packed` are those of
`loss7.Layout`. T tokens are read together, those of one sequence or of several short ones; `bounds` and `chunks` say
where each of these begins. L layers, C width, H heads of N channels, F width of the feed-forward half, V vocabulary.
"""

from __future__ import annotations

import platform
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.arrayobj import populate_array

from rookery.ops.head_loss_numba import MANY, loss_of_row
from rookery.ops.jit import inner, intrinsic, outer, part
from rookery.ops.linear_numba import gradient, pack, packed_product
from rookery.ops.loss7 import KINDS
from rookery.ops.mix7_numba import backward_of, forward_of, scratch, scratch_back
from rookery.ops.pointwise_numba import (
    copy_row,
    gates7_back_of,
    gates7_of,
    shift,
    shift_back,
    sigmoid_back_of,
    sigmoid_of,
    square,
    square_back,
    tanh_back_of,
    tanh_of,
    value7_back_of,
    value7_of,
)

ZERO, ONE = np.float32(0), np.float32(1)

(
    LN1_WEIGHT, LN1_BIAS, LN2_WEIGHT, LN2_BIAS, MIXES, BIASES, V0, HEADS, FFN_MIX,
    LN0_WEIGHT, LN0_BIAS, OUT_WEIGHT, OUT_BIAS,
    RECEPTANCE, KEY, VALUE, OUTPUT, W1, W2, A1, A2, V1, V2, G1, G2, FFN_KEY, FFN_VALUE, HEAD, EMB,
) = range(len(KINDS))  # fmt: skip
"""Rows of the tables of offsets."""

AS_STORED, TURNED = 0, 1
"""The two packed forms of a matrix."""

MIX_R, MIX_W, MIX_K, MIX_V, MIX_A, MIX_G = range(6)

PLAIN, TANH, SIGMOID = range(3)
"""What lies between two factors of low rank."""


PRODUCTS, RECURRENCE, ELEMENTWISE, IN_HEAD, SINCE = range(5)
"""Kinds of work whose time is taken, and the time of the last look."""


class Layer(NamedTuple):
    """Where in a part's memory the values of a layer begin that its way back needs, counted from the first, and how
    many numbers all of them are. Layer l begins at l times `size`, and after the last layer comes its output."""

    x: int
    moments: int
    normal: int
    mixed: int
    r: int
    k: int
    raw: int
    """Values before those of the first layer are mixed in."""
    w: int
    a: int
    g: int
    gate: int
    v: int
    low_w: int
    low_a: int
    low_v: int
    low_g: int
    y: int
    u: int
    out: int
    starts: int
    x2: int
    moments2: int
    normal2: int
    mixed2: int
    key: int
    square: int
    size: int


class Shared(NamedTuple):
    """Where in a part's memory those values begin that all layers use one after another, or that no layer has."""

    emb: int
    moments: int
    one: int
    two: int
    dx: int
    dmixed: int
    dr: int
    dw: int
    dk: int
    dv: int
    da: int
    dg: int
    draw: int
    dgate: int
    dfirst: int
    dlow: int
    dkey: int
    dnormal: int
    state: int
    last: int
    last_moments: int
    last_normal: int
    logits: int
    dlast: int
    size: int


def _view(typing, ndim):
    """An array of fp32 numbers, C-contiguous, that begins at an element of one whose address is given."""
    made = types.Array(types.float32, ndim, "C")

    def code(context, builder, signature, args):
        address, at, *shape = args
        word = ir.IntType(64)
        begin = builder.add(address, builder.mul(at, word(4)))
        array = context.make_array(made)(context, builder)
        strides = [word(4)]
        for length in reversed(shape[1:]):
            strides.insert(0, builder.mul(strides[0], length))
        data = builder.inttoptr(begin, ir.FloatType().as_pointer())
        populate_array(array, data, shape, strides, itemsize=word(4), meminfo=None)
        return array._getvalue()

    return made(*(types.int64,) * (2 + ndim)), code


@intrinsic
def flat(typing, m, at, count):
    return _view(typing, 1)


@intrinsic
def rows(typing, m, at, count, width):
    return _view(typing, 2)


@intrinsic
def heads(typing, m, at, T, H, N):
    return _view(typing, 3)


@intrinsic
def states(typing, m, at, count, H, N, also_N):
    return _view(typing, 4)


@part
def address(x):
    return np.int64(x.ctypes.data)


@intrinsic
def cycles(typing):
    """A clock of the processor, on x86; 0 elsewhere."""

    def code(context, builder, signature, args):
        word = ir.IntType(64)
        if platform.machine() not in ("x86_64", "AMD64"):
            return word(0)
        clock = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, []), "llvm.readcyclecounter")
        return builder.call(clock, [])

    return types.int64(), code


@part
def lap(spent, kind):
    """Adds the time since the last call to that of a kind of work."""
    now = cycles()
    spent[kind] += now - spent[SINCE]
    spent[SINCE] = now


@inner
def normalise(x, weight, bias, eps, moments, out):
    """Layer normalisation of rows; `moments` (T, 2) get their means and 1 / standard deviations."""
    T, C = x.shape
    share = ONE / np.float32(C)
    for t in range(T):
        sum = squares = ZERO
        for j in range(C):
            sum += x[t, j]
        mean = sum * share
        for j in range(C):
            centred = x[t, j] - mean
            squares += centred * centred
        scale = ONE / np.sqrt(squares * share + eps)
        moments[t, 0], moments[t, 1] = mean, scale
        for j in range(C):
            out[t, j] = (x[t, j] - mean) * scale * weight[j] + bias[j]


@inner
def normalise_back(x, weight, moments, dout, dx, dweight, dbias):
    """What it adds to the gradients of the rows and of the parameters."""
    T, C = x.shape
    share = ONE / np.float32(C)
    for t in range(T):
        mean, scale = moments[t, 0], moments[t, 1]
        sum = along = ZERO
        for j in range(C):
            dnormal = dout[t, j] * weight[j]
            sum += dnormal
            along += dnormal * ((x[t, j] - mean) * scale)
        sum, along = sum * share, along * share
        for j in range(C):
            normal, of_out = (x[t, j] - mean) * scale, dout[t, j]
            dx[t, j] += scale * (of_out * weight[j] - sum - normal * along)
            dweight[j] += of_out * normal
            dbias[j] += of_out


@inner
def add(x, y):
    for j in range(len(x)):
        x[j] += y[j]


@inner
def clear(x):
    for j in range(len(x)):
        x[j] = 0


@part
def times(M, N, K, spent, m, a, panels, begin, out):
    """m[out] (M, N) = m[begin] + m[a] (M, K) @ a packed matrix (K, N), given by its address; begin < 0: zeros."""
    lap(spent, ELEMENTWISE)
    packed_product(M, N, K, m + 4 * a, panels, m + 4 * begin if begin >= 0 else 0, m + 4 * out)
    lap(spent, PRODUCTS)


@part
def learn(M, N, T, spent, m, a, b, g, out):
    """g[out] (M, N) += the transposed m[a] (T, M) @ m[b] (T, N)."""
    lap(spent, ELEMENTWISE)
    gradient(M, N, T, m + 4 * a, m + 4 * b, g + 4 * out)
    lap(spent, PRODUCTS)


@part
def low_rank(T, C, rank, between, spent, m, x, low, down, up, out):
    """m[low] = between(m[x] @ down), m[out] = m[low] @ up; the factors are packed as they are stored."""
    times(T, rank, C, spent, m, x, down, -1, low)
    if between == TANH:
        tanh_of(0, T * rank, flat(m, low, T * rank))
    elif between == SIGMOID:
        sigmoid_of(0, T * rank, flat(m, low, T * rank))
    times(T, C, rank, spent, m, low, up, -1, out)


@part
def low_rank_back(T, C, rank, between, spent, m, x, low, dout, dlow, down, up, begin, dx, g, ddown, dup):
    """m[dx] = m[begin] + the gradient of m[x], and both factors learn; those come packed, turned."""
    learn(rank, C, T, spent, m, low, dout, g, dup)
    times(T, rank, C, spent, m, dout, up, -1, dlow)
    if between == TANH:
        tanh_back_of(0, T * rank, flat(m, low, T * rank), flat(m, dlow, T * rank))
    elif between == SIGMOID:
        sigmoid_back_of(0, T * rank, flat(m, low, T * rank), flat(m, dlow, T * rank))
    learn(C, rank, T, spent, m, x, dlow, g, ddown)
    times(T, C, rank, spent, m, dlow, down, begin, dx)


@inner
def shift_all(bounds, normal, nothing, mixes, out):
    for i in range(len(bounds) - 1):
        shift(bounds[i], bounds[i + 1], normal, nothing, mixes, out)


@inner
def shift_all_back(bounds, normal, nothing, mixes, grads, dnormal, carried, dmixes):
    for i in range(len(bounds) - 1):
        clear(carried)
        shift_back(bounds[i], bounds[i + 1], normal, nothing, mixes, grads, dnormal, carried, dmixes)


@part
def time_mix(size, T, bounds, chunks, l, o, s, b, t, at, packed, eps, eps_heads, nothing, rooms, spent, w, m):
    """From the residual stream of layer l, at m[o + b.x], to that after its time mixing, at m[o + b.x2]."""
    C, H, N, v = s.C, s.H, len(size), o + b.v
    x, normal, mixed = rows(m, o + b.x, T, C), rows(m, o + b.normal, T, C), o + b.mixed
    normalise(x, flat(w, at[LN1_WEIGHT, l], C), flat(w, at[LN1_BIAS, l], C), eps,
              rows(m, o + b.moments, T, 2), normal)  # fmt: skip
    shift_all(bounds, normal, nothing, rows(w, at[MIXES, l], 6, C), heads(m, mixed, 6, T, C))
    row = T * C
    times(T, C, C, spent, m, mixed + MIX_R * row, w + 4 * packed[RECEPTANCE, l, TURNED], -1, o + b.r)
    times(T, C, C, spent, m, mixed + MIX_K * row, w + 4 * packed[KEY, l, TURNED], -1, o + b.k)
    times(T, C, C, spent, m, mixed + MIX_V * row, w + 4 * packed[VALUE, l, TURNED], -1, o + b.raw)
    low_rank(T, C, s.rank_w, TANH, spent, m, mixed + MIX_W * row, o + b.low_w,
             w + 4 * packed[W1, l, AS_STORED], w + 4 * packed[W2, l, AS_STORED], t.one)  # fmt: skip
    low_rank(T, C, s.rank_a, PLAIN, spent, m, mixed + MIX_A * row, o + b.low_a,
             w + 4 * packed[A1, l, AS_STORED], w + 4 * packed[A2, l, AS_STORED], t.two)  # fmt: skip
    low_rank(T, C, s.rank_g, SIGMOID, spent, m, mixed + MIX_G * row, o + b.low_g,
             w + 4 * packed[G1, l, AS_STORED], w + 4 * packed[G2, l, AS_STORED], o + b.g)  # fmt: skip
    gates7_of(rows(m, t.one, T, C), rows(m, t.two, T, C), rows(w, at[BIASES, l], 2, C),
              rows(m, o + b.w, T, C), rows(m, o + b.a, T, C))  # fmt: skip
    if l:
        low_rank(T, C, s.rank_v, PLAIN, spent, m, mixed + MIX_V * row, o + b.low_v,
                 w + 4 * packed[V1, l, AS_STORED], w + 4 * packed[V2, l, AS_STORED], o + b.gate)  # fmt: skip
        value7_of(rows(m, o + b.raw, T, C), rows(m, o + b.gate, T, C), rows(m, b.raw, T, C),
                  flat(w, at[V0, l], C), rows(m, v, T, C))  # fmt: skip
    else:
        v = o + b.raw
    state = flat(m, t.state, N * N)
    lap(spent, ELEMENTWISE)
    starts = states(m, o + b.starts, chunks[-1], H, N, N)
    for piece in range(H * (len(bounds) - 1)):
        i, h = piece // H, piece % H
        clear(state)
        forward_of(
            size, bounds[i], bounds[i + 1], h, rooms[0], rooms[1],
            heads(m, o + b.r, T, H, N), heads(m, o + b.w, T, H, N), heads(m, o + b.k, T, H, N), heads(m, v, T, H, N),
            heads(m, o + b.a, T, H, N), heads(m, o + b.g, T, H, N), rows(w, at[HEADS, l], H, 5 * N)[h], state,
            heads(m, o + b.y, T, H, N), heads(m, o + b.u, T, H, N), starts[chunks[i] : chunks[i + 1]],
            heads(m, o + b.out, T, H, N), eps_heads,
        )  # fmt: skip
    lap(spent, RECURRENCE)
    times(T, C, C, spent, m, o + b.out, w + 4 * packed[OUTPUT, l, TURNED], o + b.x, o + b.x2)


@part
def channel_mix(T, bounds, l, o, s, b, at, packed, eps, nothing, spent, w, m):
    """On to the residual stream of the next layer."""
    C, F = s.C, s.F
    normal = rows(m, o + b.normal2, T, C)
    normalise(rows(m, o + b.x2, T, C), flat(w, at[LN2_WEIGHT, l], C), flat(w, at[LN2_BIAS, l], C), eps,
              rows(m, o + b.moments2, T, 2), normal)  # fmt: skip
    shift_all(bounds, normal, nothing, rows(w, at[FFN_MIX, l], 1, C), heads(m, o + b.mixed2, 1, T, C))
    times(T, F, C, spent, m, o + b.mixed2, w + 4 * packed[FFN_KEY, l, TURNED], -1, o + b.key)
    square(0, T * F, flat(m, o + b.key, T * F), flat(m, o + b.square, T * F))
    times(T, C, F, spent, m, o + b.square, w + 4 * packed[FFN_VALUE, l, TURNED], o + b.x2, o + b.size + b.x)


@part
def channel_mix_back(T, bounds, l, o, s, b, t, at, packed, nothing, carried, spent, w, m, g):
    """`m[t.dx]` goes from the gradient of the residual stream behind the layer to that before its channel mixing."""
    C, F = s.C, s.F
    learn(C, F, T, spent, m, t.dx, o + b.square, g, at[FFN_VALUE, l])
    times(T, F, C, spent, m, t.dx, w + 4 * packed[FFN_VALUE, l, AS_STORED], -1, t.dkey)
    dkey = o + b.square  # which nobody needs any more
    square_back(0, T * F, flat(m, o + b.key, T * F), flat(m, t.dkey, T * F), flat(m, dkey, T * F))
    learn(F, C, T, spent, m, dkey, o + b.mixed2, g, at[FFN_KEY, l])
    times(T, C, F, spent, m, dkey, w + 4 * packed[FFN_KEY, l, AS_STORED], -1, t.one)
    grads = np.array([m + 4 * t.one])
    shift_all_back(bounds, rows(m, o + b.normal2, T, C), nothing, rows(w, at[FFN_MIX, l], 1, C), grads,
                   rows(m, t.dnormal, T, C), carried, rows(g, at[FFN_MIX, l], 1, C))  # fmt: skip
    normalise_back(rows(m, o + b.x2, T, C), flat(w, at[LN2_WEIGHT, l], C), rows(m, o + b.moments2, T, 2),
                   rows(m, t.dnormal, T, C), rows(m, t.dx, T, C),
                   flat(g, at[LN2_WEIGHT, l], C), flat(g, at[LN2_BIAS, l], C))  # fmt: skip


@part
def time_mix_back(
    size, T, bounds, chunks, l, o, s, b, t, at, packed, eps_heads, nothing, carried, rooms, spent, w, m, g
):  # fmt: skip
    """On to that before the layer."""
    C, H, N = s.C, s.H, len(size)
    v, row = o + b.v if l else o + b.raw, T * C
    mixed, dmixed = o + b.mixed, t.dmixed
    learn(C, C, T, spent, m, t.dx, o + b.out, g, at[OUTPUT, l])
    times(T, C, C, spent, m, t.dx, w + 4 * packed[OUTPUT, l, AS_STORED], -1, t.one)
    state = flat(m, t.state, N * N)
    lap(spent, ELEMENTWISE)
    starts = states(m, o + b.starts, chunks[-1], H, N, N)
    for piece in range(H * (len(bounds) - 1)):
        i, h = piece // H, piece % H
        clear(state)
        backward_of(
            size, bounds[i], bounds[i + 1], h, rooms,
            heads(m, o + b.r, T, H, N), heads(m, o + b.w, T, H, N), heads(m, o + b.k, T, H, N), heads(m, v, T, H, N),
            heads(m, o + b.a, T, H, N), heads(m, o + b.g, T, H, N), rows(w, at[HEADS, l], H, 5 * N)[h],
            heads(m, o + b.y, T, H, N), heads(m, o + b.u, T, H, N), starts[chunks[i] : chunks[i + 1]],
            heads(m, t.one, T, H, N), state, False,
            heads(m, t.dr, T, H, N), heads(m, t.dw, T, H, N), heads(m, t.dk, T, H, N), heads(m, t.dv, T, H, N),
            heads(m, t.da, T, H, N), heads(m, t.dg, T, H, N), rows(g, at[HEADS, l], H, 5 * N)[h], eps_heads,
        )  # fmt: skip
    lap(spent, RECURRENCE)
    gates7_back_of(rows(m, o + b.a, T, C), rows(m, t.dw, T, C), rows(m, t.da, T, C), rows(m, t.two, T, C),
                   rows(g, at[BIASES, l], 2, C))  # fmt: skip
    if l:
        value7_back_of(rows(m, o + b.raw, T, C), rows(m, o + b.gate, T, C), rows(m, b.raw, T, C),
                       flat(w, at[V0, l], C), rows(m, t.dv, T, C), rows(m, t.draw, T, C),
                       rows(m, t.dgate, T, C), rows(m, t.one, T, C), flat(g, at[V0, l], C))  # fmt: skip
        add(flat(m, t.dfirst, row), flat(m, t.one, row))
    else:
        draw = flat(m, t.draw, row)
        copy_row(flat(m, t.dv, row), draw)
        add(draw, flat(m, t.dfirst, row))
    for mix, weight, grad in ((MIX_R, RECEPTANCE, t.dr), (MIX_K, KEY, t.dk), (MIX_V, VALUE, t.draw)):
        learn(C, C, T, spent, m, grad, mixed + mix * row, g, at[weight, l])
        times(T, C, C, spent, m, grad, w + 4 * packed[weight, l, AS_STORED], -1, dmixed + mix * row)
    low_rank_back(T, C, s.rank_w, TANH, spent, m, mixed + MIX_W * row, o + b.low_w, t.dw, t.dlow,
                  w + 4 * packed[W1, l, TURNED], w + 4 * packed[W2, l, TURNED],
                  -1, dmixed + MIX_W * row, g, at[W1, l], at[W2, l])  # fmt: skip
    low_rank_back(T, C, s.rank_a, PLAIN, spent, m, mixed + MIX_A * row, o + b.low_a, t.two, t.dlow,
                  w + 4 * packed[A1, l, TURNED], w + 4 * packed[A2, l, TURNED],
                  -1, dmixed + MIX_A * row, g, at[A1, l], at[A2, l])  # fmt: skip
    low_rank_back(T, C, s.rank_g, SIGMOID, spent, m, mixed + MIX_G * row, o + b.low_g, t.dg, t.dlow,
                  w + 4 * packed[G1, l, TURNED], w + 4 * packed[G2, l, TURNED],
                  -1, dmixed + MIX_G * row, g, at[G1, l], at[G2, l])  # fmt: skip
    if l:
        low_rank_back(T, C, s.rank_v, PLAIN, spent, m, mixed + MIX_V * row, o + b.low_v, t.dgate, t.dlow,
                      w + 4 * packed[V1, l, TURNED], w + 4 * packed[V2, l, TURNED],
                      dmixed + MIX_V * row, dmixed + MIX_V * row, g, at[V1, l], at[V2, l])  # fmt: skip
    grads = m + 4 * (dmixed + row * np.arange(6))
    shift_all_back(bounds, rows(m, o + b.normal, T, C), nothing, rows(w, at[MIXES, l], 6, C), grads,
                   rows(m, t.dnormal, T, C), carried, rows(g, at[MIXES, l], 6, C))  # fmt: skip
    normalise_back(rows(m, o + b.x, T, C), flat(w, at[LN1_WEIGHT, l], C), rows(m, o + b.moments, T, 2),
                   rows(m, t.dnormal, T, C), rows(m, t.dx, T, C),
                   flat(g, at[LN1_WEIGHT, l], C), flat(g, at[LN1_BIAS, l], C))  # fmt: skip


@part
def head(T, s, b, t, at, packed, eps, targets, losses, l2wrap, learns, room, spent, w, m, g):
    """Losses of the trained targets (-100 marks the others), and m[t.dx], the gradient of the last residual stream."""
    lap(spent, ELEMENTWISE)
    products, elementwise = spent[PRODUCTS], spent[ELEMENTWISE]
    C, V = s.C, s.V
    x, dx = rows(m, s.L * b.size + b.x, T, C), rows(m, t.dx, T, C)
    last, n = rows(m, t.last, T, C), 0
    for i in range(T):
        if targets[i] >= 0:
            copy_row(x[i], last[n])
            n += 1
    last = last[:n]
    weight = flat(w, at[OUT_WEIGHT, 0], C)
    normalise(last, weight, flat(w, at[OUT_BIAS, 0], C), eps, rows(m, t.last_moments, n, 2),
              rows(m, t.last_normal, n, C))  # fmt: skip
    times(n, V, C, spent, m, t.last_normal, w + 4 * packed[HEAD, 0, TURNED], -1, t.logits)
    logits, n = rows(m, t.logits, n, V), 0
    for i in range(T):
        if targets[i] >= 0:
            losses[i] = loss_of_row(logits[n], targets[i], room, l2wrap, learns)
            n += 1
    if learns:
        learn(V, C, n, spent, m, t.logits, t.last_normal, g, at[HEAD, 0])
        times(n, C, V, spent, m, t.logits, w + 4 * packed[HEAD, 0, AS_STORED], -1, t.one)
        dlast = rows(m, t.dlast, n, C)
        clear(flat(m, t.dlast, n * C))
        normalise_back(last, weight, rows(m, t.last_moments, n, 2), rows(m, t.one, n, C), dlast,
                       flat(g, at[OUT_WEIGHT, 0], C), flat(g, at[OUT_BIAS, 0], C))  # fmt: skip
        n = 0
        for i in range(T):
            if targets[i] >= 0:
                copy_row(dlast[n], dx[i])
                n += 1
            else:
                clear(dx[i])
    lap(spent, ELEMENTWISE)
    spent[IN_HEAD] += spent[PRODUCTS] - products + spent[ELEMENTWISE] - elementwise
    spent[PRODUCTS], spent[ELEMENTWISE] = products, elementwise


@outer
def losses_and_gradients(
    first, last, size, s, b, t, at, packed, bounds, chunks, groups, parts, tokens, targets, emb, weights, memory,
    gradients, losses, times_spent, learns, l2wrap64,
):  # fmt: skip
    """A piece of work is a part of the groups of sequences, parts[i] to parts[i + 1] - 1. Those of a group are read
    together, each from its own beginning.

    Args:
        size: `static(N)`.
        s, b, t: sizes of the model, places in a part's memory.
        at, packed: as of `loss7.Layout`.
        bounds: sequence i is made of the tokens bounds[i] to bounds[i + 1] - 1.
        chunks: and of the chunks of the recurrence chunks[i] to chunks[i + 1] - 1.
        groups: group i is made of the sequences groups[i] to groups[i + 1] - 1.
        tokens, targets: of all sequences, one after another; -100 marks a target that is not trained.
        emb: (V, C).
        memory, gradients: a row for each part; gradients are added to.
        losses: of each token that has a trained target.
        times_spent: (parts, 8), cycles by kind of work are added to.
        learns: whether gradients are wanted.
    """
    C, nothing = s.C, np.zeros(s.C, np.float32)
    eps, eps_heads, l2wrap = np.float32(s.eps), np.float32(s.eps_heads), np.float32(l2wrap64)
    carried, room = np.empty(C, np.float32), np.empty(len(MANY), np.float32)
    ahead, back = scratch(size, weights), scratch_back(size, weights)
    w = address(weights)
    ln0, ln0_bias = flat(w, at[LN0_WEIGHT, 0], C), flat(w, at[LN0_BIAS, 0], C)
    for own in range(first, last):
        m, g, spent = address(memory[own]), address(gradients[own]), times_spent[own]
        spent[SINCE] = cycles()
        for i in range(parts[own], parts[own + 1]):
            begin = bounds[groups[i]]
            own_bounds = bounds[groups[i] : groups[i + 1] + 1] - begin
            own_chunks = chunks[groups[i] : groups[i + 1] + 1] - chunks[groups[i]]
            T = own_bounds[-1]
            own_tokens = tokens[begin : begin + T]
            rows_of_emb, moments = rows(m, t.emb, T, C), rows(m, t.moments, T, 2)
            for n in range(T):
                copy_row(emb[own_tokens[n]], rows_of_emb[n])
            normalise(rows_of_emb, ln0, ln0_bias, eps, moments, rows(m, b.x, T, C))
            for l in range(s.L):
                o = l * b.size
                time_mix(
                    size,
                    T,
                    own_bounds,
                    own_chunks,
                    l,
                    o,
                    s,
                    b,
                    t,
                    at,
                    packed,
                    eps,
                    eps_heads,
                    nothing,
                    ahead,
                    spent,
                    w,
                    m,
                )
                channel_mix(T, own_bounds, l, o, s, b, at, packed, eps, nothing, spent, w, m)
            head(T, s, b, t, at, packed, eps, targets[begin : begin + T], losses[begin : begin + T], l2wrap, learns,
                 room, spent, w, m, g)  # fmt: skip
            if not learns:
                continue
            clear(flat(m, t.dfirst, T * C))
            for l in range(s.L - 1, -1, -1):
                o = l * b.size
                channel_mix_back(T, own_bounds, l, o, s, b, t, at, packed, nothing, carried, spent, w, m, g)
                time_mix_back(size, T, own_bounds, own_chunks, l, o, s, b, t, at, packed, eps_heads, nothing, carried,
                              back, spent, w, m, g)  # fmt: skip
            demb = rows(m, t.dnormal, T, C)
            clear(flat(m, t.dnormal, T * C))
            normalise_back(rows_of_emb, ln0, moments, rows(m, t.dx, T, C), demb,
                           flat(g, at[LN0_WEIGHT, 0], C), flat(g, at[LN0_BIAS, 0], C))  # fmt: skip
            for n in range(T):
                add(flat(g, at[EMB, 0] + own_tokens[n] * C, C), demb[n])
        lap(spent, ELEMENTWISE)


@outer
def pack_weights(first, last, table, weights):
    """Copies parameters into `w`. A piece of work is a row of `table` (n, 6): address, rows, columns, whether it is a
    matrix, where it begins in w; and for a matrix where its turned form begins, else the distance of its rows there."""
    w = address(weights)
    for i in range(first, last):
        source, count, width, matrix, to, more = table[i]
        if matrix:
            pack(count, width, source, 4 * width, 4, w + 4 * to)
            pack(width, count, source, 4, 4 * width, w + 4 * more)
        else:
            for n in range(count):
                copy_row(flat(source, n * width, width), flat(w, to + n * more, width))
