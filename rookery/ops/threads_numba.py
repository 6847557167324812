"""Threads that work through the same compiled function and wait for each other in it."""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types

from rookery.ops.jit import inner, intrinsic

PATIENCE = 2000
"""Looks at the counter before a waiting thread lets others have its core."""

LEFT = 1 << 62
"""Of a counter: nobody is waited for any more, for one of the threads will not come."""

WORD = ir.IntType(64)


def _counter(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@intrinsic
def _increase(typing, counters, index):
    """Add 1 to a counter; returns what it was."""

    def code(context, builder, signature, args):
        place = _counter(context, builder, signature.args[0], *args)
        return builder.atomic_rmw("add", place, WORD(1), "seq_cst")

    return types.int64(counters, types.int64), code


@intrinsic
def _look(typing, counters, index):
    """The value of a counter."""

    def code(context, builder, signature, args):
        place = _counter(context, builder, signature.args[0], *args)
        return builder.load_atomic(place, "seq_cst", align=8)

    return types.int64(counters, types.int64), code


_let_others = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())


@inner
def wait(counters, parts):
    """Return when all `parts` threads have called this as often, or when the counter is LEFT; `counters` is (1) int64,
    0 at first."""
    if parts > 1:
        goal = (_increase(counters, 0) // parts + 1) * parts
        looks = 0
        while _look(counters, 0) < goal < LEFT:
            looks += 1
            if looks > PATIENCE:
                _let_others()
