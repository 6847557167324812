"""What a data file holds, before it is decided in which order it is read."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rookery.data.parts import Joined
from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer import Tokenizer

_SPLIT = re.compile(r"\w+(?:\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Content:
    """Tokens, and the documents they belong to.

    Attributes:
        name: of the file, for messages.
        stream: (tokens), integers.
        sizes: int64 (documents), tokens of each, back to back in the stream; empty when there are no documents.
        said: bool (tokens), which of them the assistant generates; None: the data do not say.
        tokenizer: of the tokens.
        data_format: of the rows they were made from; "text" for everything else.
        thoughts_lost: conversations whose thoughts the template left out.
    """

    name: str
    stream: np.ndarray | Joined
    sizes: np.ndarray
    tokenizer: Tokenizer
    said: np.ndarray | Joined | None = None
    data_format: str = "text"
    thoughts_lost: int = 0

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 (documents), first token of each."""
        return np.cumsum(self.sizes, dtype=np.int64) - self.sizes

    def part(self, first: int, last: int) -> Content:
        """The documents from number `first` up to but without `last`. Nothing is copied."""
        start, stop = int(self.starts[first]), int(self.starts[last - 1] + self.sizes[last - 1])
        said = None if self.said is None else self.said[start:stop]
        return replace(self, stream=self.stream[start:stop], sizes=self.sizes[first:last], said=said)

    def take(self, chosen: np.ndarray) -> Content:
        """Some of the documents; `chosen` is bool (documents). Nothing is copied."""
        if chosen.all():
            return self
        edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
        ends = np.append(self.starts, len(self.stream))
        runs = [(int(ends[first]), int(ends[last])) for first, last in edges.reshape(-1, 2)]
        stream = Joined([self.stream[first:last] for first, last in runs])
        said = None if self.said is None else Joined([self.said[first:last] for first, last in runs])
        return replace(self, stream=stream, sizes=self.sizes[chosen], said=said)


def rows_of_split(split: str, rows: int) -> np.ndarray:
    """The rows that `sft_split` names, such as ``train``, ``train[:1000]`` or ``train[10%:20%]``, as bool (rows).

    Raises:
        UserError: it is none of these, or names no row.
    """
    found = _SPLIT.fullmatch(split)
    if found is None:
        raise UserError(_("sft_split {split}: expected train, train[:1000] or train[10%:20%]", split=split))

    def place(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) / 100 * rows) if text.endswith("%") else int(text)

    chosen = np.zeros(rows, bool)
    chosen[place(found["first"]) : place(found["last"])] = True
    if rows and not chosen.any():
        raise UserError(_("sft_split {split} names none of the {rows} rows", split=split, rows=rows))
    return chosen


def held_out(content: Content, share: float, seed: int) -> np.ndarray:
    """Documents for the validation loss: a `share` of the different ones, chosen by `seed`, as bool (documents).

    Equal documents (data made for several epochs have each of them several times) stay together, so that none that is
    held out is trained.

    Raises:
        UserError: there are too few documents to hold some out and keep some.
    """
    digests = np.empty(len(content.sizes), np.uint64)
    for number, (start, size) in enumerate(zip(content.starts.tolist(), content.sizes.tolist(), strict=True)):
        text = content.stream[start : start + size].tobytes()
        digests[number] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    different, first, which = np.unique(digests, return_index=True, return_inverse=True)
    count = round(share * len(different))
    if not 0 < count < len(different):
        message = _(
            "val_split {share} of {documents} documents that differ holds out {count}: give another val_split, or "
            "validation data of their own as val_file",
            share=share,
            documents=len(different),
            count=count,
        )
        raise UserError(message)
    # In the order of the file: that of the digests would change with the smallest change of any document's text.
    order = np.argsort(first)
    taken = np.zeros(len(different), bool)
    taken[order[np.random.RandomState([seed, 1]).permutation(len(different))[:count]]] = True
    return taken[which]
