"""What every tokenizer offers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """The common interface of `World` and `Character`; see there for each method."""

    name: str
    vocab_size: int
    dtype: type[np.generic]
    file_suffix: str

    @property
    def end_of_document(self) -> int | None: ...

    def save(self, path: str | Path) -> None: ...

    def encode(self, text: str | bytes) -> list[int]: ...

    def encode_array(self, text: str | bytes) -> np.ndarray: ...

    def encode_documents(self, documents: list[bytes], *, end: bool = True) -> tuple[np.ndarray, np.ndarray]: ...

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...

    def token_bytes(self) -> tuple[np.ndarray, np.ndarray]: ...
