"""Tokens seen as numbered samples: input and targets, with a mask of what counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from rookery import tokenizer as tokenizers
from rookery.data.content import Content
from rookery.data.parts import Joined
from rookery.data.sampler import DocumentSampler, Sampler
from rookery.errors import UserError
from rookery.i18n import _

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
        data_format: of the rows, as found; "text" when they are no conversations.
        dataload: as found, if it was left open.
        loss_mask: the same.
        tokens: length of the stream.
        documents: in the stream (the rows of a .jsonl file); 0 when it does not say.
        cut: documents longer than a sample, of which the rest is not trained; 0 for windows of the stream.
        left_out: documents in which nothing would be trained.
        trained: targets that count in one pass; None when only a mask that looks at each sample could tell.
        tokenizer: name, as `rookery.tokenizer.load` takes it, or "char".
        vocab_size: of the tokenizer.
        prime: of the cubic sampler; 0 when the data are too small for it.
        exit_tokens: tokens to train on, samples of `ctx_len` for all epochs.
        sampler: "cubic", "cover", "random", "documents", "only" or "pack".
        samples: that cover the data once, those of mixed-in data included.
    """

    file: str
    data_type: str
    data_format: str
    dataload: str
    loss_mask: str
    tokens: int
    documents: int
    cut: int
    left_out: int
    trained: int | None
    tokenizer: str
    vocab_size: int
    prime: int
    exit_tokens: int
    sampler: str
    samples: int


class Sample(NamedTuple):
    """One sample.

    Attributes:
        x: int64 (T), input.
        y: int64 (T), the token after each of x; -100 where it is not trained.
        lengths: int64, of the sequences that lie back to back in x, each with a state of its own; None: x is one.
    """

    x: np.ndarray
    y: np.ndarray
    lengths: np.ndarray | None = None


class Samples(Protocol):
    """Sample number `index` (0, 1, 2, … over the whole run and all devices): a pure function of the number.

    `period` samples cover the data once; `name` is what a run reports.
    """

    @property
    def name(self) -> str: ...

    @property
    def period(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


class Dataset:
    """Samples by number; any order, any process, always the same.

    Args:
        samples: gives them.
        content: what they are made of.
        ctx_len: most tokens of a sample.
        facts: about all this.
        notes: what the user is told about it.
    """

    def __init__(self, samples: Samples, content: Content, ctx_len: int, facts: Facts, notes: Sequence[str]) -> None:
        self.samples = samples
        self.content = content
        self.ctx_len = ctx_len
        self.tokenizer = content.tokenizer
        self.facts = facts
        self.notes = list(notes)

    def sample(self, index: int) -> Sample:
        """Input and targets of sample `index`."""
        return self.samples.sample(index)

    def batch(self, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Samples as one batch.

        Returns:
            x, y: int64 (samples, ctx_len); (1, sum of tokens) when the samples are not all of one length.
            lengths: of the sequences in the flattened x, int64, adding up to its size; None: each row is one.
        """
        samples = [self.sample(index) for index in indices]
        equal = len({len(sample.x) for sample in samples}) == 1
        join = np.stack if equal else _in_one_row
        lengths = None
        if not equal or any(sample.lengths is not None for sample in samples):
            lengths = np.concatenate([np.array([len(s.x)]) if s.lengths is None else s.lengths for s in samples])
        return join([sample.x for sample in samples]), join([sample.y for sample in samples]), lengths

    def save_vocabulary(self, directory: str | Path) -> None:
        """Keep the tokenizer in a run directory, for whoever reads its weights."""
        tokenizers.save_beside(self.tokenizer, Path(directory) / "vocab")


def _in_one_row(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays)[None]


class Windows:
    """Windows of `ctx_len` tokens, anywhere in the stream (dataload get) or at each document's beginning (pad).

    Args:
        content: its `said` decides what is trained, where there is one.
        sampler: sample number to offset.
        mask: which targets count, where `content` does not say; None: all.
        ctx_len: tokens of a sample.
    """

    def __init__(self, content: Content, sampler: Sampler, mask: Mask | None, ctx_len: int) -> None:
        self._content = content
        self.sampler = sampler
        self._mask = mask
        self._ctx_len = ctx_len

    @property
    def name(self) -> str:
        return self.sampler.name

    @property
    def period(self) -> int:
        return self.sampler.period

    def sample(self, index: int) -> Sample:
        offset, size = self.sampler.offset(index), self.sampler.size(index)
        stream, said = self._content.stream, self._content.said
        window = np.zeros(self._ctx_len + 1, np.int64)
        tokens = stream[offset : offset + self._ctx_len + 1]
        window[: len(tokens)] = tokens
        real = len(tokens)
        if size is not None:
            # As in the reference, what follows a document fills the window, after the last one what the file begins
            # with.
            rest = stream[: len(window) - len(tokens)]
            window[len(tokens) : len(tokens) + len(rest)] = rest
            real = min(size, len(window))
        if said is not None:
            counts = np.zeros(self._ctx_len, bool)
            counts[: real - 1] = said[offset + 1 : offset + real]
        elif self._mask is not None:
            counts = self._mask(window, real)
        elif real == len(window):
            return Sample(window[:-1], window[1:])
        else:
            counts = np.arange(1, len(window)) < real
        return Sample(window[:-1], np.where(counts, window[1:], -100))


class CutDocuments:
    """Documents by number, cut to `ctx_len` inputs."""

    def __init__(self, content: Content, mask: Mask | None, ctx_len: int) -> None:
        self._content = content
        self._mask = mask
        self.sizes = np.minimum(content.sizes.astype(np.int64) - 1, ctx_len)
        """int64 (documents), inputs of each."""

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Input and targets, int64 (`sizes` of it)."""
        start, size = int(self._content.starts[number]), int(self.sizes[number])
        window = self._content.stream[start : start + size + 1].astype(np.int64)
        if self._content.said is not None:
            counts = self._content.said[start + 1 : start + size + 1]
        elif self._mask is not None:
            counts = self._mask(window, len(window))
        else:
            return window[:-1], window[1:]
        return window[:-1], np.where(counts, window[1:], -100)

    def trained(self) -> np.ndarray:
        """Targets that count in each: int64 (documents)."""
        if self._content.said is None and self._mask is None:
            return self.sizes
        return np.fromiter(
            (
                np.count_nonzero(self.read(number)[1] != -100) if self.sizes[number] else 0
                for number in range(len(self.sizes))
            ),
            np.int64,
            len(self.sizes),
        )


class Singles:
    """One document a sample, of its own length (dataload only)."""

    name = "only"

    def __init__(self, documents: CutDocuments, order: DocumentSampler) -> None:
        self._documents = documents
        self._order = order
        self.period = order.period

    def sample(self, index: int) -> Sample:
        return Sample(*self._documents.read(self._order.document(index)))


class Mixed:
    """Samples of two kinds, spread evenly: of the first n samples, floor(n * share) are the others.

    Args:
        own: the data that the length of a pass is about.
        others: mixed in; their samples too are read in their order, over and over.
        share: of the others in all samples, above 0 and below 1.
    """

    def __init__(self, own: Samples, others: Samples, share: Fraction) -> None:
        self._own = own
        self._others = others
        self._share = share
        self.name = own.name
        self.period = samples_with(own.period, share)

    def sample(self, index: int) -> Sample:
        before = index * self._share.numerator // self._share.denominator
        after = (index + 1) * self._share.numerator // self._share.denominator
        return self._others.sample(before) if after > before else self._own.sample(index - before)


def samples_with(own: int, share: Fraction) -> int:
    """The fewest samples of `Mixed` that have `own` (at least 1) of our own among them."""
    # Of n samples, ceil(n * (1 - share)) are our own.
    return int((own - 1) / (1 - share)) + 1


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
