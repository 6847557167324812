"""Counts the bytes of all tensors that are alive while something runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Sees every tensor that an operation makes, forward and backward, until its memory is freed."""

    def __init__(self, but: Iterable[Tensor]) -> None:
        """Tensors in the memory of `but` are not counted."""
        super().__init__()
        self._others = {tensor.untyped_storage()._cdata for tensor in but}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # A meta tensor has no memory, and a DTensor that of another tensor.
            if isinstance(tensor, Tensor) and not tensor.is_meta and not is_traceable_wrapper_subclass(tensor):
                self._see(tensor.untyped_storage())
        if self._total > self.peak:  # by what was seen; some of it may be gone
            self._seen = {key: entry for key, entry in self._seen.items() if not entry[0].expired()}
            self._total = sum(size for _, size in self._seen.values())
            self.peak = max(self.peak, self._total)
        return out

    def _see(self, storage: UntypedStorage) -> None:
        key = storage._cdata
        if key in self._others:
            return
        reference, size = self._seen.get(key, (None, 0))
        if reference is None or reference.expired():
            self._seen[key] = StorageWeakRef(storage), storage.nbytes()
            self._total += storage.nbytes() - size
