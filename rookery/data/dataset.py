"""The samples of a run: a stream of tokens, a sampler that chooses windows of it, and a mask of what counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rookery import tokenizer as tokenizers
from rookery.data.binidx import BinIdx, prefix_of
from rookery.data.sampler import CoverSampler, CubicSampler, Sampler, magic_prime, prime_fits
from rookery.data.sources import Unit, find_units, read_text
from rookery.data.tokenise import build_vocabulary, tokenise
from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer import Character, Tokenizer

if TYPE_CHECKING:
    from rookery.config.tree import DataSection
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
        sampler: "cubic" or "cover".
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
        stream: np.ndarray,
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
        offset = self.sampler.offset(index)
        window = np.zeros(self.ctx_len + 1, np.int64)
        tokens = self.stream[offset : offset + self.ctx_len + 1]
        real = len(tokens)
        window[:real] = tokens
        if self._mask is None and real == len(window):
            return window[:-1], window[1:]
        counts = np.arange(1, len(window)) < real if self._mask is None else self._mask(window, real)
        return window[:-1], np.where(counts, window[1:], -100)

    def batch(self, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """Samples stacked: x and y, both int64 (samples, ctx_len)."""
        samples = [self.sample(index) for index in indices]
        return np.stack([x for x, _y in samples]), np.stack([y for _x, y in samples])

    def save_vocabulary(self, directory: str | Path) -> None:
        """Keep the tokenizer in a run directory, for whoever reads its weights."""
        tokenizers.save_beside(self.tokenizer, Path(directory) / "vocab")

    def check_ids(self, vocab_size: int) -> None:
        """Make sure that every id is one of `vocab_size`.

        Raises:
            UserError: naming the first that is not, and its place.
        """
        if self.stream.dtype.kind == "u" and np.iinfo(self.stream.dtype).max < vocab_size:
            return
        for start in range(0, len(self.stream), SCAN):
            part = self.stream[start : start + SCAN]
            if int(part.max()) < vocab_size and int(part.min()) >= 0:
                continue
            wrong = start + int(((part >= vocab_size) | (part < 0)).argmax())
            message = _(
                "{file}: token {place} is id {id}, but the vocabulary has {size} ids (0 to {last}). "
                "The data were made with another tokenizer.",
                file=self.facts.file,
                place=wrong,
                id=int(self.stream[wrong]),
                size=vocab_size,
                last=vocab_size - 1,
            )
            raise UserError(message)


def open_dataset(
    data: DataSection,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    data_file: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """Open what `data_file` names, whatever its format.

    Args:
        data: the section of the configuration.
        vocab_size: ids the model has: all tokens are checked against it before anything is trained. 0 builds a
            character vocabulary of a text; None takes the tokenizer's size.
        seed: of the sampler for small data.
        data_file: read this instead of ``data.data_file`` (the validation data, for one).
        tokenizer: take this one, whatever the section and the data say: validation data need that of the training
            data, whose character vocabulary they would not give again.

    Raises:
        UserError: no such data, damaged or foreign files, ids beyond the vocabulary, a magic_prime that does not fit.
    """
    name = data.data_file if data_file is None else data_file
    data_type = _detect(name, data.data_type)
    stream, documents, tokenizer = _read(name, data_type, data.tokenizer, vocab_size, tokenizer)
    if len(stream) < 2:
        raise UserError(_("{file} has fewer than two tokens: there is nothing to predict", file=name))
    sampler, prime, notes = _sampler(len(stream), data, seed)
    facts = Facts(
        file=name,
        data_type=data_type,
        tokens=len(stream),
        documents=documents,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        prime=prime,
        exit_tokens=data.my_exit_tokens or len(stream),
        sampler=sampler.name,
        samples=sampler.period,
    )
    mask = None
    if data.loss_mask != "none":
        # Only here, because it is the only part of reading data that needs Numba.
        from rookery.data.mask import make_mask

        mask = make_mask(data.loss_mask, tokenizer, data.mask_id)
    dataset = Dataset(stream, sampler, mask, data.ctx_len, tokenizer, facts, notes)
    dataset.check_ids(vocab_size or tokenizer.vocab_size)
    return dataset


def _sampler(tokens: int, data: DataSection, seed: int) -> tuple[Sampler, int, list[str]]:
    """The sampler, its prime (0 = none), and what to tell the user."""
    found = magic_prime(tokens, data.ctx_len)
    prime = data.magic_prime or found
    if prime_fits(prime, tokens, data.ctx_len):
        return CubicSampler(prime, data.ctx_len), prime, []
    if prime != found:
        message = _(
            "magic_prime {prime} does not fit {tokens} tokens at ctx_len {ctx_len}; leave it out and it is found",
            prime=prime,
            tokens=tokens,
            ctx_len=data.ctx_len,
        )
        raise UserError(message)
    cover = CoverSampler(tokens, data.ctx_len, seed)
    note = _(
        "{tokens} tokens are too few for the prime rule at ctx_len {ctx_len}: the {windows} windows are shuffled "
        "instead, and each pass covers every token",
        tokens=tokens,
        ctx_len=data.ctx_len,
        windows=cover.period,
    )
    return cover, 0, [note]


def _detect(name: str, data_type: str) -> str:
    """The data type of a file, from its name and from what lies there."""
    if data_type != "auto":
        return data_type
    path = Path(name)
    if not name:
        raise UserError(_("no training data: give data_file"))
    if path.is_dir() or path.suffix.lower() == ".txt":
        return "utf-8"
    if path.suffix.lower() in (".jsonl", ".json"):
        return "jsonl"
    if path.suffix.lower() == ".npy":
        return "numpy"
    prefix = prefix_of(name)
    if Path(prefix + ".idx").exists() or Path(prefix + ".bin").exists():
        return "binidx"
    message = _(
        "data_file {name}: there is no {prefix}.bin and {prefix}.idx, and it is no .jsonl, .txt or .npy file "
        "and no folder",
        name=name,
        prefix=prefix,
    )
    raise UserError(message)


def _read(
    name: str, data_type: str, wanted: str, vocab_size: int | None, tokenizer: Tokenizer | None
) -> tuple[np.ndarray, int, Tokenizer]:
    """The tokens, the number of documents (0 = unknown), and the tokenizer.

    Args:
        wanted: the tokenizer's name, or "" to find it.
        tokenizer: the one to take, if that is known.
    """
    if data_type == "binidx":
        binidx = BinIdx(name)
        return binidx.stream, len(binidx), tokenizer or _known_tokenizer(binidx.prefix, wanted)
    if data_type in ("numpy", "uint16"):
        return _read_array(name, data_type), 0, tokenizer or _known_tokenizer(name, wanted)
    if data_type == "dummy":
        text = _dummy_text()
        tokenizer = tokenizer or Character.build(text)
        return tokenizer.encode_array(text), 0, tokenizer

    path = Path(name)
    if tokenizer is None and not (wanted == "char" or (not wanted and vocab_size == 0)):
        tokenizer = tokenizers.load(wanted or "world")
    if data_type == "jsonl" or path.is_dir():
        units = find_units(path)
        return _tokenised(units, tokenizer or build_vocabulary(units))
    if not path.is_file():
        raise UserError(_("{path} does not exist", path=path))
    encoding = "utf-16-le" if data_type == "utf-16le" else "utf-8-sig"
    try:
        tokenizer = tokenizer or Character.build(read_text(path, encoding))
        pieces = list(tokenizer.encode_stream(read_text(path, encoding)))
    except UnicodeError as error:
        raise UserError(_("{path} is not {encoding} text", path=path, encoding=encoding)) from error
    return _joined(pieces, tokenizer), 1, tokenizer


def _known_tokenizer(prefix: str, wanted: str) -> Tokenizer:
    """The tokenizer of data that are tokens already."""
    kept = tokenizers.load_beside(prefix + ".vocab")
    if wanted == "char" and kept is None:
        message = _("{prefix} has no {prefix}.vocab.json; give the path of its vocabulary as tokenizer", prefix=prefix)
        raise UserError(message)
    if wanted and wanted != "char":
        return tokenizers.load(wanted)
    return kept or tokenizers.load("world")


def _tokenised(units: list[Unit], tokenizer: Tokenizer) -> tuple[np.ndarray, int, Tokenizer]:
    pieces = []
    documents = lines = 0
    for piece in tokenise(units, tokenizer):
        for fault in piece.faults:
            raise UserError(str(fault.later(lines)))
        lines += piece.lines
        documents += len(piece.sizes)
        pieces.append(piece.tokens)
    return _joined(pieces, tokenizer), documents, tokenizer


def _joined(pieces: list[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    return np.concatenate(pieces) if pieces else np.empty(0, tokenizer.dtype)


def _read_array(name: str, data_type: str) -> np.ndarray:
    try:
        stream = np.memmap(name, "<u2", "r") if data_type == "uint16" else np.load(name, "r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(_("cannot read {path}: {reason}", path=name, reason=error)) from error
    if stream.ndim != 1 or stream.dtype.kind not in "iu":
        message = _(
            "{path} holds {dtype} of shape {shape}; token ids are one row of integers",
            path=name,
            dtype=stream.dtype,
            shape=stream.shape,
        )
        raise UserError(message)
    return stream


def _dummy_text() -> str:
    """The reference's dummy data: ``.a+b=c.`` for i < 100000 with a = i mod 10000, b = i**2 mod 10000, c = a + b."""

    def sums() -> Iterator[str]:
        for i in range(100_000):
            a, b = i % 10_000, i * i % 10_000
            yield f".{a}+{b}={a + b}."

    return "".join(sums())
