"""Loss and gradients of a small RWKV-7 model on a CPU by one compiled program, `loss7_numba`.

In a small model each step of the ordinary way takes about as long as Python and autograd need to begin it, its numbers
go to memory and come back, and it is too short to be shared out among threads. Here one call does it all, a few
sequences at a time; threads share out the sequences. Importing this does not import Numba.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache, cached_property
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from rookery.ops import native
from rookery.ops.backend import Call, tracked
from rookery.ops.native import array_of, chunks_of

logger = logging.getLogger("rookery.ops")

LARGEST = 8 << 20
"""Parameters up to which a model is small. From twice as many on, the ordinary way is as fast."""

MOST_GRADIENTS = 1 << 27
"""Numbers of the gradients of all threads, each of which has its own."""

MOST_LOGITS = 1 << 24
"""Numbers of the logits of a group of sequences."""

SHARED_WIDTH = 128
"""Width from which on the ordinary way shares out a single sequence among threads with some gain."""

TOGETHER = 128
"""Tokens up to which short sequences are read together: products of fewer rows are slower, and what more of them make
no longer stays in the caches."""

ALIGNED = 16
"""Numbers of a line of the cache."""

VECTORS = {
    "ln1.weight": ("ln1.weight",), "ln1.bias": ("ln1.bias",), "ln2.weight": ("ln2.weight",), "ln2.bias": ("ln2.bias",),
    "mixes": ("att.x_r", "att.x_w", "att.x_k", "att.x_v", "att.x_a", "att.x_g"),
    "biases": ("att.w0", "att.a0"), "v0": ("att.v0",),
    "heads": ("att.k_k", "att.k_a", "att.r_k", "att.ln_x.weight", "att.ln_x.bias"), "ffn_mix": ("ffn.x_k",),
    "ln0.weight": ("blocks.0.ln0.weight",), "ln0.bias": ("blocks.0.ln0.bias",),
    "ln_out.weight": ("ln_out.weight",), "ln_out.bias": ("ln_out.bias",),
}  # fmt: skip
"""Kinds of parameters, as the program knows them, that are one or several vectors, and their names in each layer."""

MATRICES = {
    "receptance": "att.receptance.weight", "key": "att.key.weight", "value": "att.value.weight",
    "output": "att.output.weight", "w1": "att.w1", "w2": "att.w2", "a1": "att.a1", "a2": "att.a2",
    "v1": "att.v1", "v2": "att.v2", "g1": "att.g1", "g2": "att.g2",
    "ffn_key": "ffn.key.weight", "ffn_value": "ffn.value.weight", "head": "head.weight", "emb": "emb.weight",
}  # fmt: skip
"""Kinds that are matrices, as they are stored, and their names."""

KINDS = (*VECTORS, *MATRICES)
ONCE = ("ln0.weight", "ln0.bias", "ln_out.weight", "ln_out.bias", "head", "emb")
"""Kinds of which the model has one, whose names are whole."""

UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
"""What a model has and does not use."""


class Sizes(NamedTuple):
    """Of an RWKV-7 model: layers, width, heads, width of the feed-forward half, vocabulary, ranks of w, a, v and g, and
    epsilon of the layer normalisations and of the normalisation of each head."""

    L: int
    C: int
    H: int
    F: int
    V: int
    rank_w: int
    rank_a: int
    rank_v: int
    rank_g: int
    eps: float
    eps_heads: float


def names_of(layers: int) -> list[str]:
    """The parameters in the program's order, that of their gradients in memory: by kind, then by layer."""
    names: list[str] = []
    for kind in KINDS:
        of_kind = VECTORS[kind] if kind in VECTORS else (MATRICES[kind],)
        if kind in ONCE:
            names += of_kind
        else:
            names += [f"blocks.{layer}.{name}" for layer in range(layers) for name in of_kind]
    return names


def refuses(
    sizes: Sizes, parameters: Sequence[Tensor], tokens: Tensor, targets: Tensor, lengths: Tensor, kernel: str
) -> str | None:
    """Why the program cannot serve this call, or is not the fastest way, or None.

    Args:
        parameters: those of `names_of`.
        tokens, targets, lengths: as of `Program.loss`, unchecked.
        kernel: back-end that was asked for.
    """
    call = Call.of(*parameters, head_size=sizes.C // sizes.H)
    if kernel not in ("auto", "native"):
        return f"the kernel is {kernel}"
    reason = native.refuses(call) or native.refuses_precision(call)
    if reason or call.dtype != torch.float32:
        return reason or "it computes in fp32"
    if sum(p.numel() for p in parameters) > LARGEST:
        return "the model is large"
    if not all(type(p) is Parameter and p.is_contiguous() for p in parameters):
        return "parameters are not plain"
    if torch.is_grad_enabled() and not all(p.requires_grad for p in parameters):
        return "some parameters do not train"
    if tokens.shape != targets.shape or lengths.sum() != tokens.numel() or lengths.min() < 1:
        return "the sequences are not those of the tokens"
    if tokens.min() < 0 or max(tokens.max(), targets.max()) >= sizes.V:
        return "some tokens are not in the vocabulary"
    longest = max(int(lengths.max()), TOGETHER)
    if longest * sizes.V > MOST_LOGITS:
        return "a sequence has too many logits"
    if sizes.C >= SHARED_WIDTH and longest * torch.get_num_threads() > 2 * tokens.numel():
        return "one sequence would keep most threads waiting"
    return None


@cache
def report(reason: str | None) -> None:
    """Log, once, how the loss is computed."""
    logger.info("loss %s", "by the program for small models" if reason is None else f"by modules ({reason})")


class _Loss7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, program: Program, tokens: Tensor, targets: Tensor, bounds: np.ndarray, trained: int, l2wrap: float,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        losses, gradients = program.run(parameters, tokens, targets, bounds, l2wrap, any(ctx.needs_input_grad))
        ctx.save_for_backward(gradients)
        ctx.program, ctx.trained, ctx.parameters = program, max(trained, 1), parameters
        return losses.sum() / ctx.trained

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (gradients,) = ctx.saved_tensors
        total = gradients[0] if len(gradients) == 1 else gradients.sum(dim=0)
        return (None,) * 6 + ctx.program.apart(total * (upstream / ctx.trained), ctx.parameters)


class Program:
    """The program for models of some sizes, and the memory that it works in and keeps. One call at a time.

    Attributes:
        memory: what is kept, by what it is for.
        spent: seconds of all runs by kind of work (`loss7_numba.PRODUCTS` and those after it); 0 where the processor
            has no clock that could tell.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.memory: dict[str, Tensor] = {}
        self.spent = np.zeros(4)
        self._used = [name not in UNUSED for name in names_of(sizes.L)]

    def loss(
        self,
        parameters: Sequence[Tensor],
        tokens: Tensor,
        targets: Tensor,
        lengths: Tensor,
        *,
        trained: int,
        l2wrap: float,
    ) -> Tensor:
        """Mean cross-entropy over the trained targets, as `rookery.ops.head_loss` gives it, from a zero state.

        Args:
            parameters: those of `names_of`, contiguous fp32.
            tokens, targets: int64, ids below the size of the vocabulary; -100 = not trained.
            lengths: (S,) int64 on the CPU: of the sequences, which lie one after another in the flattened rows.
            trained: number of trained targets.
            l2wrap: factor of the L2 term on the largest logit.

        Returns:
            Scalar, fp32. The gradients of all parameters are computed in the forward pass, where gradients are
            recorded; a second derivative does not exist.
        """
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths.numpy())])
        return _Loss7.apply(self, tokens, targets, bounds, trained, l2wrap, *tracked(*parameters))

    def run(
        self, parameters: Sequence[Tensor], tokens: Tensor, targets: Tensor, bounds: np.ndarray, l2wrap: float,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The losses of all tokens (0 where nothing is trained), and, if `learns`, a row of gradients of their sum for
        each part of the sequences."""
        from rookery.ops import loss7_numba as program
        from rookery.ops.jit import share_out, static
        from rookery.ops.mix7_numba import CHUNK

        (L, C, H, *_rest), layout = self.sizes, self._layout
        table = layout.table.copy()
        table[:, 0] = [p.data_ptr() for p in parameters]
        weights = self._room("weights", layout.weights).numpy()
        share_out(program.pack_weights, layout.work, table, weights)

        threads, lengths = min(torch.get_num_threads(), max(1, MOST_GRADIENTS // layout.gradients)), np.diff(bounds)
        groups = _groups(lengths, min(TOGETHER, -(-int(bounds[-1]) // threads)))
        parts = _parts(bounds[groups], threads)
        count, longest = len(parts) - 1, np.diff(bounds[groups]).max()
        chunks = chunks_of(bounds, CHUNK)
        most_chunks = np.diff(chunks[groups]).max()
        of_layer, shared = _places(self.sizes, _aligned(int(longest)), _aligned(int(most_chunks)))
        memory = self._room("memory", count * shared.size).view(count, shared.size)
        gradients = torch.zeros(count, layout.gradients if learns else 0, dtype=torch.float32, device="cpu")
        losses = torch.zeros(tokens.numel(), dtype=torch.float32, device="cpu")
        spent, began = np.zeros((count, 8), np.int64), perf_counter()
        share_out(
            program.losses_and_gradients, count,
            static(C // H), self.sizes, of_layer, shared, layout.at, layout.packed, bounds, chunks, groups, parts,
            *(ids.reshape(-1).to(torch.int64).numpy() for ids in (tokens, targets)), array_of(parameters[-1]), weights,
            memory.numpy(), gradients.numpy(), losses.numpy(), spent, learns, l2wrap,
        )  # fmt: skip
        cycles = spent.sum(axis=0)[: program.SINCE]
        self.spent += (perf_counter() - began) * cycles / max(1, cycles.sum())
        if learns:  # the program has the vectors of a head together, parameters are of all heads
            begin = layout.at[program.HEADS, 0]
            of_heads = gradients[:, begin : begin + 5 * L * C]
            turned = of_heads.view(count, L, H, 5, C // H).transpose(2, 3)
            of_heads.copy_(turned.clone(memory_format=torch.contiguous_format).view(count, -1))
        return losses, gradients

    @cached_property
    def _layout(self) -> Layout:
        return Layout(self.sizes)

    def _room(self, name: str, numbers: int) -> Tensor:
        """Memory that is kept: what is asked of the system anew costs as much as filling it. NumPy asks for large
        pages."""
        if name not in self.memory or len(self.memory[name]) < numbers:
            self.memory.pop(name, None)
            room = torch.from_numpy(np.empty(numbers + ALIGNED, np.float32))
            begin = -room.data_ptr() % (4 * ALIGNED) // 4
            self.memory[name] = room[begin : begin + numbers]
        return self.memory[name][:numbers]

    def apart(self, gradients: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """A row of gradients as those of the parameters, None of one that is not used."""
        parts = _unflatten_dense_tensors(gradients, parameters)
        return tuple(part if used else None for part, used in zip(parts, self._used, strict=True))


class Layout:
    """Where the numbers of a model lie.

    Attributes:
        at: (kinds, L): where parameters begin among all, and gradients; vectors are there in the packed weights too.
        packed: (kinds, L, 2): where the two packed forms of a matrix begin.
        gradients, weights: numbers of all gradients, and of the packed weights.
        table, work: what `loss7_numba.pack_weights` is told, addresses aside, and how much work each row of it is.
    """

    def __init__(self, sizes: Sizes) -> None:
        from rookery.ops.linear_numba import packed_size

        L, C, H, F, V, w, a, v, g, *_eps = sizes
        shapes = {
            **dict.fromkeys(("receptance", "key", "value", "output"), (C, C)),
            "w1": (C, w), "w2": (w, C), "a1": (C, a), "a2": (a, C), "v1": (C, v), "v2": (v, C),
            "g1": (C, g), "g2": (g, C), "ffn_key": (F, C), "ffn_value": (C, F), "head": (V, C), "emb": (V, C),
        }  # fmt: skip
        self.at, self.packed = np.zeros((len(KINDS), L), np.int64), np.zeros((len(KINDS), L, 2), np.int64)
        self.gradients = 0
        for kind, name in enumerate(KINDS):
            numbers = shapes[name][0] * shapes[name][1] if name in shapes else C * len(VECTORS[name])
            self.at[kind] = self.gradients + numbers * np.arange(L)
            self.gradients += numbers * (1 if name in ONCE else L)
        self.weights = _aligned(int(self.at[len(VECTORS), 0]))
        table: list[tuple[int, ...]] = []
        for kind, name in enumerate(KINDS):
            for layer in range(1 if name in ONCE else L):
                at = int(self.at[kind, layer])
                if name == "emb":  # which is read where it is
                    table.append((0, 0, 0, 0, 0, 0))
                elif name in shapes:
                    rows, columns = shapes[name]
                    for form, size in enumerate((packed_size(rows, columns), packed_size(columns, rows))):
                        self.packed[kind, layer, form] = self.weights
                        self.weights += size
                    table.append((0, rows, columns, 1, *self.packed[kind, layer].tolist()))
                elif name == "heads":
                    table += [(0, H, C // H, 0, at + i * C // H, 5 * C // H) for i in range(5)]
                else:
                    table += [(0, 1, C, 0, at + i * C, 0) for i in range(len(VECTORS[name]))]
        self.table = np.array(table)
        self.work = self.table[:, 1] * self.table[:, 2]


def _groups(lengths: np.ndarray, most: int) -> np.ndarray:
    """Neighbouring sequences put together up to `most` tokens: group i is made of sequences groups[i] to
    groups[i + 1] - 1."""
    groups, tokens = [0], 0
    for i, length in enumerate(lengths.tolist()):
        if tokens and tokens + length > most:
            groups.append(i)
            tokens = 0
        tokens += length
    return np.array([*groups, len(lengths)])


def _parts(bounds: np.ndarray, parts: int) -> np.ndarray:
    """Groups cut into at most so many parts of about as many tokens: part i is made of groups parts[i] to
    parts[i + 1] - 1."""
    ends = bounds[-1] * np.arange(1, parts + 1) // parts
    return np.unique(np.concatenate([[0], bounds.searchsorted(ends)])).astype(np.int64)


@cache
def _places(sizes: Sizes, T: int, chunks: int) -> Any:
    """`Layer` and `Shared` of a part's memory, for groups of up to `T` tokens in so many chunks."""
    from rookery.ops import loss7_numba as program

    L, C, H, F, V, w, a, v, g, *_eps = sizes
    N = C // H
    numbers = dict.fromkeys(program.Layer._fields, T * C) | {
        "moments": 2 * T, "moments2": 2 * T, "mixed": 6 * T * C, "low_w": T * w, "low_a": T * a, "low_v": T * v,
        "low_g": T * g, "starts": chunks * H * N * N, "key": T * F, "square": T * F,
    }  # fmt: skip
    layer = program.Layer(**_one_after_another(numbers, 0))
    numbers = dict.fromkeys(program.Shared._fields, T * C) | {
        "moments": 2 * T, "dmixed": 6 * T * C, "dlow": T * max(w, a, v, g), "dkey": T * F, "state": N * N,
        "last_moments": 2 * T, "logits": T * V,
    }  # fmt: skip
    return layer, program.Shared(**_one_after_another(numbers, L * layer.size + _aligned(T * C)))


def _one_after_another(numbers: dict[str, int], begin: int) -> dict[str, int]:
    """Where each begins; `size` is where the last ends."""
    found = {}
    for name, count in numbers.items():
        found[name] = begin
        begin += _aligned(count)
    return found


def _aligned(numbers: int) -> int:
    """Rounded up to whole lines of the cache."""
    return -(-numbers // ALIGNED) * ALIGNED
