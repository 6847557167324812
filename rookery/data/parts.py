"""Several token streams as one: the binidx lists of RWKV-LM (`my_pile_version` 2)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from rookery.data.binidx import BinIdx
from rookery.data.sampler import Part
from rookery.errors import UserError
from rookery.i18n import _


class Joined:
    """Streams one after the other, none of them copied. Takes slices and single places."""

    def __init__(self, streams: Sequence[np.ndarray]) -> None:
        self.dtype = np.result_type(*{stream.dtype for stream in streams})
        self._streams = streams
        self._ends = list(accumulate(map(len, streams)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: slice | int) -> np.ndarray:
        if not isinstance(place, slice):
            return self[place : place + 1][0]
        start, stop, _step = place.indices(len(self))
        pieces = []
        for number in range(bisect_right(self._ends, start), len(self._streams)):
            first = self._ends[number] - len(self._streams[number])
            if stop <= first:
                break
            pieces.append(self._streams[number][max(0, start - first) : stop - first])
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)


def read_list(path: str | Path, ctx_len: int) -> tuple[list[BinIdx], list[Part]]:
    """The data that a list names, and where windows of `ctx_len` + 1 tokens may begin in their joined stream.

    A line is ``PREFIX [PLACES … CUT_OFF]``: the reference writes the number of places at which a window may begin,
    tokens - ctx_len, and last the running sum of the weights. Without numbers the weight is that of the places.

    Raises:
        UserError: naming the line that is wrong.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(_("cannot read {path}: {reason}", path=path, reason=error)) from error
    data: list[BinIdx] = []
    parts: list[Part] = []
    first = cut_off = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *figures = line.split()
        data.append(BinIdx(name))
        places = data[-1].tokens - ctx_len
        weight = places
        if figures:
            try:
                written, end = int(figures[0]), int(figures[-1])
            except ValueError:
                message = _("{path}, line {line}: after the prefix come whole numbers", path=path, line=number)
                raise UserError(message) from None
            if len(figures) == 1:
                end = cut_off + written
            if written != places:
                message = _(
                    "{path}, line {line}: {name} has {places} places for ctx_len {ctx_len} (tokens - ctx_len), not "
                    "{written}",
                    path=path,
                    line=number,
                    name=name,
                    places=places,
                    ctx_len=ctx_len,
                    written=written,
                )
                raise UserError(message)
            weight = end - cut_off
        if places < 1 or weight < 1:
            message = _(
                "{path}, line {line}: nothing can be drawn from {name}: {places} places, weight {weight}",
                path=path,
                line=number,
                name=name,
                places=places,
                weight=weight,
            )
            raise UserError(message)
        parts.append(Part(first, places, weight))
        first += data[-1].tokens
        cut_off += weight
    if not data:
        raise UserError(_("{path} names no binidx data", path=path))
    return data, parts
