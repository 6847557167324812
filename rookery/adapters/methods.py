"""The methods: what each adds to the product of a frozen matrix W (out, in), and W with it merged in.

Names and shapes of the tensors are RWKV-PEFT's. Every adapter begins as exactly nothing, in each precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rookery.adapters.config import AdapterConfig
from rookery.adapters.svd import low_rank
from rookery.errors import UserError
from rookery.i18n import _
from rookery.ops import linear as product
from rookery.ops.backend import exact_dtype
from rookery.ops.linear import Adapter, Linear


class Method(Adapter):
    """An adapter of one matrix. Made without memory; `initialise` or `assign` sets it.

    Its parameters follow the dtype of the model, its buffers keep theirs: they say what the parameters began with, and
    rounding that would change what a file of them means.
    """

    def __init__(self, config: AdapterConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = config

    def initialise(self, weight: Tensor, generator: torch.Generator) -> None:
        """Set the values that training begins with beside `weight` (out, in); on the CPU, or where the weight is."""
        raise NotImplementedError

    def merged(self, weight: Tensor) -> Tensor:
        """`weight` (out, in) with the adapter in it, in the weight's dtype; computed as RWKV-PEFT's merge scripts do,
        in the wider of the weight's and the adapter's dtype."""
        raise NotImplementedError

    def bind(self, weight: Tensor) -> None:
        """Take down what is needed of the matrix (out, in) that the adapter is added to."""

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Set all parameters and buffers; shapes are the caller's to check."""
        for name, tensor in tensors.items():
            if name in self._buffers:
                self._buffers[name] = tensor
            else:
                self.register_parameter(name, nn.Parameter(tensor))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape, of what a file holds."""
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


class LoRA(Method):
    """W x + s B A x (arXiv:2106.09685), s = alpha / r, or alpha / sqrt(r) as rsLoRA (arXiv:2312.03732)."""

    def __init__(self, config: AdapterConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.lora_A = nn.Parameter(torch.empty(config.r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, config.r))

    @torch.no_grad()
    def initialise(self, weight: Tensor, generator: torch.Generator) -> None:
        # Kaiming-uniform with a = sqrt(5).
        bound = weight.shape[1] ** -0.5
        self.lora_A.uniform_(-bound, bound, generator=generator)
        self.lora_B.zero_()

    def forward(self, x: Tensor, moved: Tensor | None, y: Tensor | None, linear: Linear) -> Tensor:
        return self.low_rank(self.dropped(x))

    def dropped(self, x: Tensor) -> Tensor:
        """The input as the adapter sees it."""
        return F.dropout(x, self.config.dropout) if self.training and self.config.dropout else x

    def low_rank(self, x: Tensor) -> Tensor:
        """s B A x."""
        low = product(x, self.lora_A.to(x.dtype)) * self.config.scale
        return product(low, self.lora_B.to(x.dtype))

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        return _sum((self.lora_B @ self.lora_A).mul_(self.config.scale), weight).to(weight.dtype)


class DoRA(LoRA):
    """m / |W + s B A| (W + s B A) x (arXiv:2402.09353): the length of every row of the matrix is a parameter. The norm
    counts as a constant in the gradient, and dropout concerns both terms, as in Hugging Face peft.

    The norm takes products of W with A only, so W may be quantised.
    """

    base_norm: Tensor
    """|W| of every row, (out,), fp32 or fp64."""

    def __init__(self, config: AdapterConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(out_features))
        self.register_buffer("base_norm", torch.empty(out_features), persistent=False)
        self._factor: tuple[tuple[Any, ...], Tensor] | None = None

    @torch.no_grad()
    def initialise(self, weight: Tensor, generator: torch.Generator) -> None:
        super().initialise(weight, generator)
        self.assign({"lora_magnitude_vector": _row_norms(weight)})

    def bind(self, weight: Tensor) -> None:
        self.base_norm = _row_norms(weight)

    def forward(self, x: Tensor, moved: Tensor | None, y: Tensor | None, linear: Linear) -> Tensor:
        seen = self.dropped(x)
        if y is None or seen is not x:
            y = linear.product(seen)
        factor = self.factor(linear, y.dtype)
        return torch.addcmul(factor * self.low_rank(seen), factor - 1, y)

    def factor(self, linear: Linear, dtype: torch.dtype) -> Tensor:
        """m / |W + s B A| of every row, (out,), of activations of `dtype`; kept while nothing changes, since at
        inference it would cost more than the products."""
        if self.training or torch.is_grad_enabled():
            self._factor = None
            return self._new_factor(linear, dtype)
        m, A, B = self.lora_magnitude_vector, self.lora_A, self.lora_B
        state = (m._version, A._version, B._version, m.data_ptr(), A.data_ptr(), B.data_ptr(), dtype)
        if self._factor is None or self._factor[0] != state:
            self._factor = state, self._new_factor(linear, dtype)
        return self._factor[1]

    def _new_factor(self, linear: Linear, dtype: torch.dtype) -> Tensor:
        m = self.lora_magnitude_vector
        with torch.no_grad():
            exact = exact_dtype(m.dtype)
            s, A, B = self.config.scale, self.lora_A.to(exact), self.lora_B.to(exact)
            WA = linear.product(self.lora_A.to(dtype)).to(exact).T
            square = self.base_norm.to(exact).square()
            # One sum that is exactly zero while B is, so that the square root gives back base_norm to the bit.
            square = square + s * (B * (2 * WA + s * (B @ (A @ A.T)))).sum(1)
            # Rounded as m is, so that the factor of a new adapter is exactly 1.
            norm = _not_zero(square.clamp_min(0).sqrt().to(m.dtype))
        return (m / norm).to(dtype)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        m = self.lora_magnitude_vector
        whole = _sum((self.lora_B @ self.lora_A).mul_(self.config.scale), weight)
        factor = m / _not_zero(_row_norms(whole).to(m.dtype))
        return whole.mul_(factor[:, None]).to(weight.dtype)


class PiSSA(Method):
    """W x + (B A - B0 A0) x, where B0 A0 is the dominant part of W (arXiv:2404.02948), with which B and A begin.

    The published form takes B0 A0 out of W; here W stays as it is, and the same function is computed.
    """

    init_lora_A: Tensor
    init_lora_B: Tensor

    def __init__(self, config: AdapterConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.lora_A = nn.Parameter(torch.empty(config.r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, config.r))
        self.register_buffer("init_lora_A", torch.empty(config.r, in_features))
        self.register_buffer("init_lora_B", torch.empty(out_features, config.r))
        if config.r > min(in_features, out_features):
            raise UserError(
                _(
                    "pissa of rank {r} is not possible for a matrix of {rows} x {columns}; give a smaller lora_r",
                    r=config.r,
                    rows=out_features,
                    columns=in_features,
                )
            )

    @torch.no_grad()
    def initialise(self, weight: Tensor, generator: torch.Generator) -> None:
        A, B = low_rank(weight, self.config.r, self.config.svd_niter, generator)
        self.assign({"lora_A": A.clone(), "lora_B": B.clone(), "init_lora_A": A, "init_lora_B": B})

    def forward(self, x: Tensor, moved: Tensor | None, y: Tensor | None, linear: Linear) -> Tensor:
        # B A - B0 A0 = B (A - A0) + (B - B0) A0: differences of parameters lose nothing, differences of products would.
        A, A0 = self.lora_A, self.init_lora_A.to(self.lora_A.dtype)
        B, B0 = self.lora_B, self.init_lora_B.to(self.lora_B.dtype)
        down, up = torch.cat([A - A0, A0]), torch.cat([B, B - B0], dim=1)
        return product(product(x, down.to(x.dtype)), up.to(x.dtype))

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        residual = _sum(-(self.init_lora_B @ self.init_lora_A), weight)
        return _sum(residual, self.lora_B @ self.lora_A).to(weight.dtype)


class Bone(Method):
    """MiSS (arXiv:2409.15371): W x + Dᵀ (sum of the blocks of x), x cut into blocks of r, the last padded by zeros."""

    def __init__(self, config: AdapterConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        if config.r > in_features:
            raise UserError(
                _(
                    "miss of rank {r} is not possible for a matrix with {columns} inputs; give a smaller lora_r",
                    r=config.r,
                    columns=in_features,
                )
            )
        self.disha = nn.Parameter(torch.empty(config.r, out_features))

    @torch.no_grad()
    def initialise(self, weight: Tensor, generator: torch.Generator) -> None:
        self.disha.zero_()

    def forward(self, x: Tensor, moved: Tensor | None, y: Tensor | None, linear: Linear) -> Tensor:
        r = self.config.r
        blocks = F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r))
        return product(blocks.sum(-2), self.disha.to(x.dtype).T)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        out, width = weight.shape
        r = self.config.r
        whole = weight.to(torch.promote_types(weight.dtype, self.disha.dtype), copy=True)
        even = width - width % r
        whole[:, :even].view(out, -1, r).add_(self.disha.T[:, None])
        whole[:, even:].add_(self.disha.T[:, : width - even])
        return whole.to(weight.dtype)


class Bat(Method):
    """The bat form of MiSS by columns of blocks: W_ab + W_ab D_b + D_b, with W cut into blocks of r x r.

    W (x + x') + (sum of the blocks of x', repeated), where x'_b = D_b x_b: one product with W, which may be quantised.
    """

    blocks_of = "in"

    def __init__(self, config: AdapterConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        r = config.r
        if in_features % r or out_features % r:
            raise UserError(
                _(
                    "miss_mode bat cuts a matrix into blocks of r x r; {rows} x {columns} is not divisible by lora_r "
                    "{r}",
                    rows=out_features,
                    columns=in_features,
                    r=r,
                )
            )
        blocks = (in_features if self.blocks_of == "in" else out_features) // r
        self.disha = nn.Parameter(torch.empty(blocks, r, r))

    @torch.no_grad()
    def initialise(self, weight: Tensor, generator: torch.Generator) -> None:
        self.disha.zero_()

    def input_delta(self, x: Tensor) -> Tensor | None:
        blocks = x.unflatten(-1, (-1, self.config.r))
        return torch.einsum("...bj,bij->...bi", blocks, self.disha.to(x.dtype)).flatten(-2)

    def forward(self, x: Tensor, moved: Tensor | None, y: Tensor | None, linear: Linear) -> Tensor:
        assert moved is not None
        shared = moved.unflatten(-1, (-1, self.config.r)).sum(-2)
        return shared.repeat(*[1] * (x.dim() - 1), linear.out_features // self.config.r)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        return _sum(self._dense_delta(weight), weight).to(weight.dtype)

    def _dense_delta(self, weight: Tensor) -> Tensor:
        """What is added to `weight`, (out, in)."""
        r = self.config.r
        D = self.disha[None] if self.blocks_of == "in" else self.disha[:, None]
        cut = weight.to(D.dtype).unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)
        return (cut @ D + D).transpose(1, 2).reshape(weight.shape)


class BatRows(Bat):
    """The bat form of MiSS by rows of blocks: W_ab + W_ab D_a + D_a, of Hugging Face peft. It takes the whole matrix to
    compute."""

    blocks_of = "out"

    def input_delta(self, x: Tensor) -> Tensor | None:
        return None

    def forward(self, x: Tensor, moved: Tensor | None, y: Tensor | None, linear: Linear) -> Tensor:
        return product(x, self._dense_delta(linear.dense()).to(x.dtype))


_METHODS: dict[str, type[Method]] = {"lora": LoRA, "dora": DoRA, "pissa": PiSSA}
_MISS_MODES: dict[str, type[Method]] = {"bone": Bone, "bat": Bat, "bat_rows": BatRows}


def create(config: AdapterConfig, in_features: int, out_features: int) -> Method:
    """The adapter of a matrix, without memory.

    Raises:
        UserError: the method does not fit a matrix of that size.
    """
    method = _MISS_MODES[config.miss_mode] if config.method == "miss" else _METHODS[config.method]
    with torch.device("meta"):
        return method(config, in_features, out_features)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """a + b in the wider of their dtypes, in the memory of `a` if it is that one."""
    wide = torch.promote_types(a.dtype, b.dtype)
    return a.add_(b) if a.dtype == wide else a.to(wide).add_(b)


def _row_norms(weight: Tensor) -> Tensor:
    """Length of every row, (out,), fp32 or fp64."""
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=exact_dtype(weight.dtype))


def _not_zero(norm: Tensor) -> Tensor:
    """A row of zeros has no direction to scale: zeros they stay."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)
