"""How Numba compiles the CPU loops, and how they run on several threads. Importing this imports Numba."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numba.extending
import numpy as np
import torch
from numba import njit
from numba.core.compiler import Compiler

FAST = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be reassociated and contracted, which lets them use vector registers; NaN and Inf stay what they are."""


class NoAlias(Compiler):
    """Compiles functions whose array arguments never overlap.

    Otherwise LLVM must check at run time, and where a loop has many arrays it gives up vector registers: the backward
    step of wkv7 takes three times as long.
    """

    def define_pipelines(self):
        self.state.flags.noalias = True
        return super().define_pipelines()


def _digest() -> str:
    """Of all sources that compiled code is made of."""
    folder = Path(__file__).parent
    names = [folder / name for name in ("jit.py", "simd.py", "wkv7_native.py", "loss7.py")] + sorted(
        folder.glob("*_numba.py")
    )
    return hashlib.sha256(b"".join(name.read_bytes() for name in names)).hexdigest()


SOURCES = _digest()


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Numba's decorator `njit`, with a cache.

    Numba takes a function from its cache until the file of that function changes, though it holds the code of those of
    other files which it calls. Here any change of a source makes all that is in the caches stale.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(cache=True, **options)(function)
        dispatcher._cache._cache_file._source_stamp = SOURCES
        return dispatcher

    return decorate


inner = _compiled(fastmath=FAST, error_model="numpy", pipeline_class=NoAlias, forceinline=True)
"""Decorator of an inner loop, whose array arguments must not overlap.

It must be inlined: a process that has just compiled a loop would otherwise call that one, and a process that loads its
caller from the cache another copy, optimised with the caller, whose sums round differently. A run that is interrupted
and goes on would then not end with the same bits.
"""

part = _compiled(inline="always")
"""Decorator of a part of a longer function, which becomes one with it before anything is compiled; what is inlined
later is compiled once more at every level. Its arrays may overlap, so loops belong into `inner` functions."""

function = _compiled(fastmath=FAST, nogil=True)
"""Decorator of a function that compiled code calls, for one that would take long to compile at every place. It must not
depend on how the compiler orders sums (see `inner`)."""

intrinsic: Any = numba.extending.intrinsic
"""Numba's decorator of functions that give LLVM code; what it makes is called without the first argument."""

outer = _compiled(fastmath=FAST, nogil=True)
"""Decorator of a function `f(first, last, ...)` that does the pieces of work first..last-1 for `share_out`."""


def share_out(function: Callable[..., None], work: int | np.ndarray, *args: Any) -> None:
    """Call `function(first, last, *args)` over all pieces of work, shared among as many threads as PyTorch uses.

    `work` is the number of equal pieces, or how much work each of them is. The threads are plain ones rather than
    Numba's: its OpenMP pool is another one than PyTorch's, and each spins on the processor while the other works.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        function(0, work if isinstance(work, int) else len(work), *args)
        return
    done = np.arange(1, work + 1) if isinstance(work, int) else work.cumsum()
    threads = min(threads, len(done))
    bounds = done.searchsorted([done[-1] * i // threads for i in range(threads + 1)], "right").tolist()
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    for number, (first, last) in enumerate(pairwise(bounds[1:])):
        _ready(number)
        _tasks.put((ended, function, first, last, *args))
    function(0, bounds[1], *args)
    for _helper in range(threads - 1):
        if error := ended.get():
            raise error


def static(n: int) -> tuple[None, ...]:
    """`n` as an argument of compiled code that knows it: the length of a tuple is part of its type, and loops of known
    length are unrolled."""
    return (None,) * n


_tasks: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
"""What helping threads are to do: a queue for the result, a function, its arguments.

Not an executor of the standard library: an exception that a signal handler raises there, such as KeyboardInterrupt, can
leave a lock locked for good."""


@cache
def _ready(number: int) -> None:
    """Have so many helping threads, and one more."""
    Thread(target=_help, name=f"rookery-ops-{number}", daemon=True).start()


def _help() -> None:
    while True:
        _do(*_tasks.get())


def _do(ended: SimpleQueue[BaseException | None], function: Callable[..., None], *args: Any) -> None:
    try:
        function(*args)
    except BaseException as error:
        ended.put(error)
    else:
        ended.put(None)
