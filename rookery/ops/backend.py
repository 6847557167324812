"""Choosing a back-end for one call of an op.

An op has several back-ends in order of preference. Each says of a call why it cannot serve it (device, dtype, head
size, a missing package), or that it can. The first that can is taken; the choice and its reason are logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

logger = logging.getLogger("rookery.ops")


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of states, decays and sums for tensors of `dtype`: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tracked(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`tensors` for an autograd function, which is told of a parameter that it needs a gradient even where no gradients
    are recorded, and would keep what only they need."""
    return tensors if torch.is_grad_enabled() else tuple(tensor.detach() for tensor in tensors)


@dataclass(frozen=True)
class Call:
    """The facts of a call that decide which back-end may serve it."""

    device: str
    dtype: torch.dtype
    head_size: int
    length: int
    needs_grad: bool

    @classmethod
    def of(cls, *tensors: torch.Tensor | None) -> Call:
        """Facts of a call whose first tensor is (B, T, H, N) and whose others may be None."""
        first = tensors[0]
        assert first is not None
        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return cls(first.device.type, first.dtype, first.shape[-1], first.shape[1], needs_grad)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `refuses(call)` gives the reason why it cannot serve the call, or None; `run` takes the op's tensors, and, if it
    `packs`, after them where the sequences lie in a row of tokens.
    """

    name: str
    refuses: Callable[[Call], str | None]
    run: Callable[..., Any]
    packs: bool = False


def never_refuses(call: Call) -> None:
    """For back-ends that serve every call."""


@dataclass
class Op:
    """An op and its back-ends, most preferred first."""

    name: str
    backends: Sequence[Backend]
    _reported: set[tuple[str, str]] = field(default_factory=set)

    def choose(self, call: Call, wanted: str = "auto") -> Backend:
        """The back-end that serves `call`.

        Raises:
            ValueError: `wanted` is unknown, or cannot serve the call (the reason is in the message).
        """
        rejected: list[str] = []
        for backend in self.backends:
            if wanted not in ("auto", backend.name):
                continue
            reason = backend.refuses(call)
            if reason is None:
                self._report(backend.name, rejected)
                return backend
            if wanted == backend.name:
                raise ValueError(f"{self.name}: back-end {wanted!r} cannot serve this call: {reason}")
            rejected.append(f"{backend.name}: {reason}")
        known = ", ".join(["auto", *(b.name for b in self.backends)])
        raise ValueError(f"{self.name}: no back-end {wanted!r}; choose one of {known}")

    def explain(self, call: Call) -> list[tuple[str, str | None]]:
        """Every back-end's name with the reason why it cannot serve `call` (None: it can), in order of preference."""
        return [(backend.name, backend.refuses(call)) for backend in self.backends]

    def _report(self, chosen: str, rejected: list[str]) -> None:
        why = "; ".join(rejected)
        if (chosen, why) not in self._reported:
            self._reported.add((chosen, why))
            logger.info("%s uses %s%s", self.name, chosen, f" ({why})" if why else "")
