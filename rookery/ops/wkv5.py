"""The recurrence of RWKV-5 (x052): that of RWKV-6 with a decay that is the same for every token.

Source: "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (arXiv:2404.05892).
"""

from __future__ import annotations

from torch import Tensor

from rookery.ops.packed import Packing
from rookery.ops.wkv6 import wkv6


def wkv5(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None, *, backend: str = "auto",
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the recurrence over a sequence.

    Args:
        w: raw `time_decay`, (H, N); the decay is exp(-exp(w)).

    The other arguments, the results and the errors are those of `wkv6`.
    """
    return wkv6(r, w[None, None], k, v, u, state, backend=backend, packing=packing)
