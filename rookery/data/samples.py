"""A token stream seen as numbered samples: input and targets, with a mask of what counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rookery import tokenizer as tokenizers
from rookery.data.parts import Joined
from rookery.data.sampler import Sampler
from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rookery.data.mask import Mask

SCAN = 1 << 24
"""Tokens looked at in one go when ids are checked."""


@dataclass(frozen=True)
class Facts:
    """What a run needs to know about its data.

    Attributes:
        file: as given.
        data_type: as found.
        tokens: length of the stream.
        documents: in the stream; 0 when it does not say.
        tokenizer: name, as `rookery.tokenizer.load` takes it, or "char".
        vocab_size: of the tokenizer.
        prime: of the cubic sampler; 0 when the data are too small for it.
        exit_tokens: tokens to train on.
        sampler: "cubic", "cover", "random" or "documents".
        samples: that cover the data once.
    """

    file: str
    data_type: str
    tokens: int
    documents: int
    tokenizer: str
    vocab_size: int
    prime: int
    exit_tokens: int
    sampler: str
    samples: int


class Dataset:
    """Samples by number; any order, any process, always the same.

    Args:
        stream: (tokens), integers, usually memory-mapped.
        sampler: sample number to offset.
        mask: which targets count.
        ctx_len: tokens of a sample.
        tokenizer: of the ids.
        facts: about all this.
        notes: what the user is told about it.
    """

    def __init__(
        self,
        stream: np.ndarray | Joined,
        sampler: Sampler,
        mask: Mask | None,
        ctx_len: int,
        tokenizer: Tokenizer,
        facts: Facts,
        notes: Sequence[str],
    ) -> None:
        self.stream = stream
        self.sampler = sampler
        self.ctx_len = ctx_len
        self.tokenizer = tokenizer
        self.facts = facts
        self.notes = list(notes)
        self._mask = mask

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Input and targets of sample `index` (counted over the whole run and all devices).

        Returns:
            x: int64 (ctx_len).
            y: int64 (ctx_len), the token after each of x; -100 where it is not trained.
        """
        window, real = self._window(index)
        if self._mask is None and real == len(window):
            return window[:-1], window[1:]
        counts = np.arange(1, len(window)) < real if self._mask is None else self._mask(window, real)
        return window[:-1], np.where(counts, window[1:], -100)

    def _window(self, index: int) -> tuple[np.ndarray, int]:
        """Ids, int64 (ctx_len + 1), and how many of them belong to the sample."""
        offset, size = self.sampler.offset(index), self.sampler.size(index)
        window = np.zeros(self.ctx_len + 1, np.int64)
        tokens = self.stream[offset : offset + self.ctx_len + 1]
        window[: len(tokens)] = tokens
        if size is None:
            return window, len(tokens)
        # As in the reference, what follows a document fills the window, after the last one what the file begins with.
        rest = self.stream[: len(window) - len(tokens)]
        window[len(tokens) : len(tokens) + len(rest)] = rest
        return window, min(size, len(window))

    def batch(self, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Samples stacked.

        Returns:
            x, y: int64 (samples, ctx_len).
            lengths: of the sequences in the flattened x, int64, adding up to its size; None: each row is one.
        """
        samples = [self.sample(index) for index in indices]
        return np.stack([x for x, _y in samples]), np.stack([y for _x, y in samples]), None

    def save_vocabulary(self, directory: str | Path) -> None:
        """Keep the tokenizer in a run directory, for whoever reads its weights."""
        tokenizers.save_beside(self.tokenizer, Path(directory) / "vocab")


def check_ids(stream: np.ndarray | Joined, vocab_size: int, name: str) -> None:
    """Make sure that every id of a stream is one of `vocab_size`; `name` is what to call its file.

    Raises:
        UserError: naming the first that is not, and its place.
    """
    if stream.dtype.kind == "u" and np.iinfo(stream.dtype).max < vocab_size:
        return
    for start in range(0, len(stream), SCAN):
        part = stream[start : start + SCAN]
        if int(part.max()) < vocab_size and int(part.min()) >= 0:
            continue
        wrong = int(((part >= vocab_size) | (part < 0)).argmax())
        message = _(
            "{file}: token {place} is id {id}, but the vocabulary has {size} ids (0 to {last}). "
            "The data were made with another tokenizer.",
            file=name,
            place=start + wrong,
            id=int(part[wrong]),
            size=vocab_size,
            last=vocab_size - 1,
        )
        raise UserError(message)
