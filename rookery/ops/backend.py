"""Choosing a back-end for one call of an op.

An op has several back-ends in order of preference. Each says of a call why it cannot serve it (device, dtype, head
size, a missing package), or that it can. The first that can is taken; the choice and its reason are logged once. It is
looked up after that: on a GPU, a step of a small model is bound by what Python does between its kernels.
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


def under_autocast(x: torch.Tensor) -> bool:
    """Whether PyTorch chooses the precision of operations on the device of `x`."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@dataclass(frozen=True)
class Call:
    """The facts of a call that decide which back-end may serve it."""

    device: str
    dtype: torch.dtype
    """Of what the op reads first."""
    head_size: int = 0
    """0 for an op that knows no heads."""
    dtypes: frozenset[torch.dtype] = frozenset()
    """Of all that the op reads."""
    autocast: bool = False
    """Whether PyTorch chooses the precision of each operation."""

    @classmethod
    def of(cls, *tensors: torch.Tensor | None, head_size: int = 0) -> Call:
        """Facts of a call with `tensors`, the first of which is not None."""
        first = tensors[0]
        assert first is not None
        dtypes = frozenset(x.dtype for x in tensors if x is not None)
        return cls(first.device.type, first.dtype, head_size, dtypes, under_autocast(first))


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
    _chosen: dict[tuple[Call, str, str], Backend] = field(default_factory=dict)
    _reported: set[tuple[str, str]] = field(default_factory=set)

    def choose(self, call: Call, wanted: str = "auto", instead: str = "") -> Backend:
        """The back-end that serves `call`.

        Args:
            wanted: its name, or "auto" for the most preferred that can.
            instead: name of the back-end to take where `wanted` is unknown or cannot serve the call.

        Raises:
            ValueError: `wanted` is unknown, or cannot serve the call (the reason is in the message), and nothing is
                named to take `instead`.
        """
        found = self._chosen.get((call, wanted, instead))
        if found is None:
            found = self._chosen[call, wanted, instead] = self._choose(call, wanted, instead)
        return found

    def _choose(self, call: Call, wanted: str, instead: str) -> Backend:
        rejected: list[str] = []
        for backend in self.backends:
            if wanted not in ("auto", backend.name):
                continue
            reason = backend.refuses(call)
            if reason is None:
                self._report(backend.name, rejected)
                return backend
            if wanted == backend.name and not instead:
                raise ValueError(f"{self.name}: back-end {wanted!r} cannot serve this call: {reason}")
            rejected.append(f"{backend.name}: {reason}")
        for backend in self.backends:
            if backend.name == instead:
                self._report(backend.name, rejected)
                return backend
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


def beside(kernel: str) -> str:
    """The back-end of a step beside the recurrence, `kernel` being what was asked for the recurrence: those that are
    plain PyTorch there are so here, and fla has the recurrence only."""
    return {"chunked": "plain", "reference": "plain", "fla": "triton"}.get(kernel, kernel)
