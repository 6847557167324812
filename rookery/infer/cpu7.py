"""RWKV-7 on a CPU: weights packed for the loops of `rookery.ops.decode7_numba` and `prefill7_numba`.

Decoding reads the weights (fp32, bf16, or int8 with a scale for each row; see `rookery.infer.matrix`) and computes in
fp32. Reading a prompt multiplies whole pieces with oneDNN, in bf16 where weights are bf16 or int8 and the processor has
such products, else in fp32. What lies between is fp32 in both.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rookery.infer.matrix import KINDS, Matrix, Room, fast_bf16, refused, whole
from rookery.models import Model, ModelShape, State

_one_at_a_time = threading.Lock()
"""The threads of a step wait for each other: two steps sharing a pool of threads could wait forever."""


def refuses(model: Model) -> str | None:
    """Why `CPU7Form` cannot run `model`, or None."""
    return refused(model) or _shape_refused(model.shape)


def _shape_refused(shape: ModelShape) -> str | None:
    if shape.version != "x070":
        return f"only x070 is packed, not {shape.version}"
    if shape.n_embd % 16 or shape.head_size % 16 or shape.dim_ffn % 16 or shape.dim_att != shape.n_embd:
        return "widths are no multiples of 16"
    return None


class CPU7Form:
    """An RWKV-7 model packed for a CPU (see `rookery.infer.forms.Form`).

    Args:
        model: on the CPU; its weights are shared where their format and layout allow it. Adapters that are switched on
            are merged into what is packed.
        dtype: format of the weights, fp32, bf16 or int8; None for the model's.
        threads: threads of a decoding step; None for as many as PyTorch uses.

    Raises:
        ValueError: the model cannot be packed (see `refuses`).
    """

    def __init__(self, model: Model, dtype: torch.dtype | None = None, threads: int | None = None) -> None:
        reason = refuses(model)
        if reason:
            raise ValueError(reason)
        self.model, self.shape = model, model.shape
        dtype = dtype or model.emb.weight.dtype
        self.dtype, self.threads = dtype, threads
        self.name = f"cpu7 {str(dtype).removeprefix('torch.')}"
        self._compute = torch.bfloat16 if dtype != torch.float32 and fast_bf16() else torch.float32
        low = torch.bfloat16 if dtype == torch.int8 else dtype
        room = Room(model)
        self._layers = [_Layer(block, dtype, low, room) for block in model.blocks]
        self._head = Matrix.of(whole(model.head), dtype, room)
        self._emb = model.emb.weight.detach()
        self._entrance = model.blocks[0].ln0
        self._ends = _stacked(model.ln_out.weight, model.ln_out.bias)
        self._eps = model.shape.group_norm_eps
        self._time_state = model.initial_state(1, torch.empty(0)).wkv
        self._matrices = np.array([[m.entry for m in layer.matrices] for layer in self._layers])
        self._vectors = np.stack([layer.vectors for layer in self._layers])
        self._kinds = (KINDS[dtype], KINDS[low], KINDS[dtype])

    def again(self) -> CPU7Form:
        return CPU7Form(self.model, self.dtype, self.threads)

    def slots(self, count: int) -> State:
        return State.zeros(self.shape, count, "cpu", torch.float32)

    def initial(self) -> State:
        state = State.zeros(self.shape, 1, "cpu", torch.float32)
        state.wkv.copy_(self._time_state)
        return state

    def head(self, hidden: Tensor) -> Tensor:
        return self._head.few(hidden.contiguous())

    def step(self, slots: State, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        from rookery.ops import decode7_numba, products_numba, threads_numba
        from rookery.ops.jit import share_out, static

        B, C = len(rows), self.shape.n_embd
        widest = int(self._matrices[:, decode7_numba.W1 :, products_numba.ROWS].max())
        x = self._embed(tokens)
        room = [
            torch.empty(size)
            for size in (
                (B, C), (6, B, C), (3, B, C), (4, B, widest), (4, B, C), (B, C), (B, C), (B, self.shape.dim_ffn)
            )
        ]  # fmt: skip
        logits = torch.empty(B, self.shape.vocab_size)
        threads = min(self.threads or torch.get_num_threads(), torch.get_num_threads())
        meeting = np.zeros(1, np.int64)
        with _one_at_a_time:
            try:
                share_out(
                    decode7_numba.step, threads, threads, *(static(kind) for kind in self._kinds),
                    static(self.shape.head_size // 16), self._matrices, self._vectors, self._ends, self._head.entry,
                    np.array(rows, np.int64), *(part.numpy() for part in vars(slots).values()), x.numpy(),
                    *(array.numpy() for array in room), logits.numpy(), self._eps, meeting,
                )  # fmt: skip
            except BaseException:
                # A Ctrl-C between the starts of two threads: the first would wait for the second forever.
                meeting[0] = threads_numba.LEFT
                raise
        return logits

    def read(self, slots: State, slot: int, tokens: Sequence[int]) -> Tensor:
        from rookery.ops import prefill7_numba
        from rookery.ops.jit import share_out, static

        kind = static(KINDS[self._compute])
        size = static(self.shape.head_size // 16)
        x, T, C = self._embed(tokens), len(tokens), self.shape.n_embd
        rows, normal = x.numpy(), np.empty((T, C), np.float32)
        added = torch.empty(0, C, dtype=self._compute)
        v_first: Tensor | None = None

        def shifted(mixes: np.ndarray, before: np.ndarray) -> Tensor:
            out = torch.empty(len(mixes), T, C, dtype=self._compute)
            share_out(prefill7_numba.mix, T, kind, normal, before, mixes, _array(out))
            before[:] = normal[-1]
            return out

        def squashed(low: Tensor, is_tanh: bool) -> Tensor:
            share_out(prefill7_numba.squash, T, kind, _array(low), is_tanh)
            return low

        for number, layer in enumerate(self._layers):
            share_out(prefill7_numba.normalise, T, kind, rows, _array(added), layer.ln1, normal)
            xr, xw, xk, xv, xa, xg = shifted(layer.mixes, slots.att_shift[number, slot].numpy())
            r, k, v = layer.receptance.product(xr), layer.key.product(xk), layer.value.product(xv)
            w = layer.w2.product(squashed(layer.w1.product(xw), True))
            a = layer.a2.product(layer.a1.product(xa))
            g = layer.g2.product(squashed(layer.g1.product(xg), False))
            gate = v if v_first is None else layer.v2.product(layer.v1.product(xv))
            y = torch.empty_like(r)
            arrays = [_array(t) for t in (r, k, v, w, a, gate, v if v_first is None else v_first, g)]
            state = slots.wkv[number, slot].numpy()
            share_out(
                prefill7_numba.read, self.shape.n_head, kind, size, static(self.shape.head_size), v_first is None,
                *arrays, layer.vectors, state, _array(y), self._eps,
            )  # fmt: skip
            v_first = v if v_first is None else v_first
            added = layer.output.product(y)
            share_out(prefill7_numba.normalise, T, kind, rows, _array(added), layer.ln2, normal)
            (xk,) = shifted(layer.ffn_mix, slots.ffn_shift[number, slot].numpy())
            hidden = layer.ffn_key.product(xk)
            share_out(prefill7_numba.relu_square, T, kind, _array(hidden))
            added = layer.ffn_value.product(hidden)
        share_out(prefill7_numba.normalise, T, kind, rows, _array(added), self._ends, normal)
        return torch.from_numpy(normal)

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        norm = self._entrance
        embedded = self._emb[torch.tensor(tokens)].float()
        return torch.nn.functional.layer_norm(
            embedded, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
        )


class _Layer:
    """The weights of a block."""

    def __init__(self, block: Any, dtype: torch.dtype, low: torch.dtype, room: Room) -> None:
        att, ffn = block.att, block.ffn
        big = (att.receptance, att.key, att.value, att.output, ffn.key, ffn.value)
        self.matrices = [Matrix.of(whole(module), dtype, room) for module in big]
        for x in "wavg":
            down, up = att.get_parameter(f"{x}1").T, att.get_parameter(f"{x}2").T
            # The compiled code takes 16 numbers at a time; ranks are multiples of it in all models of some size.
            missing = -len(down) % 16
            down = torch.nn.functional.pad(down, (0, 0, 0, missing))
            up = torch.nn.functional.pad(up, (0, missing))
            self.matrices += [Matrix.of(down, low, room), Matrix.of(up, low, room)]
        self.receptance, self.key, self.value, self.output, self.ffn_key, self.ffn_value = self.matrices[:6]
        self.w1, self.w2, self.a1, self.a2, self.v1, self.v2, self.g1, self.g2 = self.matrices[6:]
        self.mixes = _stacked(att.x_r, att.x_w, att.x_k, att.x_v, att.x_a, att.x_g)
        self.ln1 = _stacked(block.ln1.weight, block.ln1.bias)
        self.ln2 = _stacked(block.ln2.weight, block.ln2.bias)
        self.ffn_mix = _stacked(ffn.x_k)
        own = _stacked(att.w0, att.a0, att.v0, att.k_k, att.k_a, att.r_k, att.ln_x.weight, att.ln_x.bias)
        self.vectors = np.concatenate([self.mixes, own, self.ln1, self.ln2, self.ffn_mix])


def _stacked(*vectors: Tensor) -> np.ndarray:
    return torch.stack([vector.detach().float().reshape(-1) for vector in vectors]).numpy()


def _array(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor; bf16 as uint16, for NumPy has no such type."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
