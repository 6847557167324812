"""States kept after token sequences that were read, so that a prompt that begins with one is not read again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from rookery.infer.forms import bytes_of
from rookery.models import State


@dataclass(frozen=True)
class _Entry:
    tokens: np.ndarray
    state: State
    size: int


class PrefixCache:
    """The most recently used states, within a number of bytes.

    A state belongs to its tokens and to a `context`: whatever else it depends on, such as the mounted tuned state and
    the adapter.

    Args:
        capacity: bytes; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._entries: OrderedDict[tuple[Hashable, bytes], _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, context: Hashable, tokens: Sequence[int], state: State) -> None:
        """Keep `state` (not copied: the caller gives it away), the state after `tokens`."""
        array = np.asarray(tokens, np.int32)
        size = bytes_of(state) + array.nbytes
        key = (context, array.tobytes())
        if size > self.capacity or key in self._entries:
            return
        self._entries[key] = _Entry(array, state, size)
        self.bytes += size
        while self.bytes > self.capacity:
            self._remove(next(iter(self._entries)))

    def find(self, context: Hashable, tokens: Sequence[int]) -> tuple[int, State | None]:
        """The longest kept beginning of `tokens` that leaves at least one to read.

        Returns:
            How many tokens it covers, and the state after them, which belongs to the cache: copy it. (0, None) when
            there is none.
        """
        array = np.asarray(tokens, np.int32)
        data = array.tobytes()
        lengths = {len(entry.tokens) for (owner, _data), entry in self._entries.items() if owner == context}
        for length in sorted(lengths, reverse=True):
            key = (context, data[: 4 * length])
            if length < len(array) and key in self._entries:
                self._entries.move_to_end(key)
                return length, self._entries[key].state
        return 0, None

    def shared(self, context: Hashable, tokens: Sequence[int]) -> int:
        """How many tokens at the beginning of `tokens` were also at the beginning of some sequence that is kept."""
        array = np.asarray(tokens, np.int32)
        longest = 0
        for (owner, _data), entry in self._entries.items():
            if owner == context:
                n = min(len(array), len(entry.tokens))
                different = array[:n] != entry.tokens[:n]
                longest = max(longest, int(different.argmax()) if different.any() else n)
        return longest

    def _remove(self, key: tuple[Hashable, bytes]) -> None:
        self.bytes -= self._entries.pop(key).size
