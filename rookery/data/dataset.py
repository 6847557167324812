"""Opening training data: what lies at a path, which tokens it holds, and in which order they are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rookery import tokenizer as tokenizers
from rookery.data.binidx import BinIdx, prefix_of
from rookery.data.mixture import Mixture
from rookery.data.parts import Joined, read_list
from rookery.data.sampler import (
    CoverSampler,
    CubicSampler,
    DocumentSampler,
    Part,
    RandomFirst,
    RandomSampler,
    Sampler,
    magic_prime,
    prime_fits,
)
from rookery.data.samples import Dataset, Facts, check_ids
from rookery.data.sources import Unit, find_units, read_text
from rookery.data.tokenise import find_characters, tokenise
from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer import Character, Tokenizer

if TYPE_CHECKING:
    from rookery.config.tree import DataSection
    from rookery.data.mask import Mask

WORLD_SIZE = 65530
"""A model with fewer token ids cannot have the World vocabulary."""


def open_dataset(
    data: DataSection,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    random_places: bool = False,
    data_file: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """Open what `data_file` names, whatever its format.

    Args:
        data: the section of the configuration.
        vocab_size: ids the model has: all tokens are checked against it before anything is trained. 0 builds a
            character vocabulary of a text; None takes the tokenizer's size.
        seed: of what is shuffled or random.
        random_places: take windows at random places (`train_stage` 4).
        data_file: read this instead of ``data.data_file`` (the validation data, for one).
        tokenizer: take this one, whatever the section and the data say: validation data need that of the training
            data, whose character vocabulary they would not give again.

    Raises:
        UserError: no such data, damaged or foreign files, ids beyond the vocabulary, a magic_prime that does not fit.
    """
    name = data.data_file if data_file is None else data_file
    if data.my_pile_version == 2 and data_file is None:
        return _open_list(data, vocab_size, seed, tokenizer)
    data_type = _detect(name, data.data_type)
    stream, sizes, tokenizer = _read(name, data_type, data, vocab_size, tokenizer)
    if len(stream) < 2:
        raise UserError(_("{file} has fewer than two tokens: there is nothing to predict", file=name))
    check_ids(stream, vocab_size or tokenizer.vocab_size, name)
    sampler, prime, notes = _sampler(len(stream), sizes, data, seed, random_places)
    exit_tokens = len(stream)
    if sampler.name == "documents":
        exit_tokens = sampler.period * data.ctx_len
    # With other data mixed in, our own take twice as many samples; and random ones come on top.
    exit_tokens = exit_tokens * (2 if data.my_qa_mask else 1) + data.my_random_steps * data.ctx_len
    facts = Facts(
        file=name,
        data_type=data_type,
        tokens=len(stream),
        documents=len(sizes),
        tokenizer=tokenizer.name,
        vocab_size=_vocabulary(data_type, data, vocab_size, tokenizer),
        prime=prime,
        exit_tokens=data.my_exit_tokens or exit_tokens,
        sampler=sampler.name,
        samples=sampler.period,
    )
    content = (stream, sampler, _mask(data, tokenizer), data.ctx_len, tokenizer, facts, notes)
    if data.my_qa_mask:
        return _mixture(content, data, vocab_size or tokenizer.vocab_size, seed)
    return Dataset(*content)


def _vocabulary(data_type: str, data: DataSection, vocab_size: int | None, tokenizer: Tokenizer) -> int:
    """Size of the vocabulary: of ids that came without a tokenizer, that of the model they fit."""
    guessed = data_type in ("binidx", "numpy", "uint16") and tokenizer.name == "world" and not data.tokenizer
    return vocab_size if guessed and vocab_size else tokenizer.vocab_size


def _mask(data: DataSection, tokenizer: Tokenizer) -> Mask | None:
    if data.loss_mask in ("auto", "none"):
        return None
    # Only here, because it is the only part of reading data that needs Numba.
    from rookery.data.mask import make_mask

    return make_mask(data.loss_mask, tokenizer, data.mask_id)


def _open_list(data: DataSection, vocab_size: int | None, seed: int, tokenizer: Tokenizer | None) -> Dataset:
    """Data of `my_pile_version` 2: many binidx files with weights, read at random places."""
    parts, places = read_list(data.data_file, data.ctx_len)
    stream = Joined([part.stream for part in parts])
    sampler = RandomSampler(places, data.ctx_len, seed)
    tokenizer = tokenizer or _known_tokenizer(parts[0].prefix, data.tokenizer)
    for part in parts:
        check_ids(part.stream, vocab_size or tokenizer.vocab_size, part.prefix)
    facts = Facts(
        file=data.data_file,
        data_type="binidx",
        tokens=len(stream),
        documents=sum(map(len, parts)),
        tokenizer=tokenizer.name,
        vocab_size=_vocabulary("binidx", data, vocab_size, tokenizer),
        prime=0,
        exit_tokens=data.my_exit_tokens or len(stream),
        sampler=sampler.name,
        samples=sampler.period,
    )
    return Dataset(stream, sampler, _mask(data, tokenizer), data.ctx_len, tokenizer, facts, [])


def _mixture(content: tuple[Any, ...], data: DataSection, vocab_size: int, seed: int) -> Mixture:
    if not data.qa_mix_file:
        raise UserError(
            _("my_qa_mask mixes in other data, in the reference the Pile: give their prefix as qa_mix_file")
        )
    mixed = BinIdx(data.qa_mix_file).stream
    check_ids(mixed, vocab_size, data.qa_mix_file)
    place = RandomSampler([_whole(len(mixed), data.ctx_len, data.qa_mix_file)], data.ctx_len, seed)
    return Mixture(*content, mixed=mixed, place=place, answers_only=data.my_qa_mask == 1)


def _whole(tokens: int, ctx_len: int, name: str) -> Part:
    """All of a stream, for random windows."""
    places = tokens - ctx_len
    if places < 1:
        message = _(
            "{file} has {tokens} tokens, too few for ctx_len {ctx_len}", file=name, tokens=tokens, ctx_len=ctx_len
        )
        raise UserError(message)
    return Part(0, places, places)


def _sampler(
    tokens: int, sizes: np.ndarray, data: DataSection, seed: int, random_places: bool
) -> tuple[Sampler, int, list[str]]:
    """The sampler, its prime (0 = none), and what to tell the user.

    Args:
        sizes: tokens of each document.
        random_places: whether all windows lie at random places.
    """
    if data.my_sample_len:
        sizes = _rows(tokens, data)
    if data.my_sample_len or data.dataload == "pad":
        if not len(sizes):
            raise UserError(_("dataload pad takes documents, of which {file} has none", file=data.data_file))
        starts = np.cumsum(sizes, dtype=np.int64) - sizes
        return DocumentSampler(starts, sizes, seed if data.data_shuffle else None), 0, []
    if random_places:
        return RandomSampler([_whole(tokens, data.ctx_len, data.data_file)], data.ctx_len, seed), 0, []
    order, prime, notes = _order(tokens, data, seed)
    if data.my_random_steps:
        random = RandomSampler([_whole(tokens, data.ctx_len, data.data_file)], data.ctx_len, seed)
        return RandomFirst(order, random, data.my_random_steps), prime, notes
    return order, prime, notes


def _rows(tokens: int, data: DataSection) -> np.ndarray:
    """Sizes of the rows that `my_sample_len` makes of a stream."""
    length = data.my_sample_len
    if tokens % length or length < 2:
        raise UserError(
            _(
                "{file} has {tokens} tokens, which are no rows of my_sample_len {length}",
                file=data.data_file,
                tokens=tokens,
                length=length,
            )
        )
    if length > data.ctx_len + 1:
        raise UserError(_("rows of {length} tokens need ctx_len {ctx_len}", length=length, ctx_len=length - 1))
    return np.full(tokens // length, length)


def _order(tokens: int, data: DataSection, seed: int) -> tuple[Sampler, int, list[str]]:
    """The order that meets all of the data, its prime, and what to tell the user."""
    found = magic_prime(tokens, data.ctx_len)
    prime = data.magic_prime or found
    if prime_fits(prime, tokens, data.ctx_len):
        shift = max(0, data.my_pile_shift)
        room = tokens - prime * data.ctx_len - 1
        if shift > room:
            raise UserError(
                _("my_pile_shift {shift} goes beyond the data: the largest that fits is {room}", shift=shift, room=room)
            )
        return CubicSampler(prime, data.ctx_len, shift), prime, []
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
    name: str, data_type: str, data: DataSection, vocab_size: int | None, tokenizer: Tokenizer | None
) -> tuple[np.ndarray, np.ndarray, Tokenizer]:
    """The tokens, the sizes of the documents (none: unknown), and the tokenizer.

    Args:
        tokenizer: the one to take, if that is known.
    """
    unknown = np.empty(0, np.int64)
    wanted = data.tokenizer
    if data_type == "binidx":
        binidx = BinIdx(name)
        return binidx.stream, binidx.sizes, tokenizer or _known_tokenizer(binidx.prefix, wanted)
    if data_type in ("numpy", "uint16"):
        return _read_array(name, data_type), unknown, tokenizer or _known_tokenizer(name, wanted)
    if data_type == "dummy":
        text = _dummy_text()
        tokenizer = tokenizer or Character.build(text)
        return tokenizer.encode_array(text), unknown, tokenizer

    path = Path(name)
    # To the reference, these types are characters, whatever the size of the vocabulary.
    characters = data.data_type in ("utf-8", "utf-16le") and (vocab_size or 0) < WORLD_SIZE
    if tokenizer is None and not (wanted == "char" or (not wanted and (vocab_size == 0 or characters))):
        tokenizer = tokenizers.load(wanted or "world")
    if data_type == "jsonl" or path.is_dir():
        units = find_units(path)
        return _tokenised(units, tokenizer or Character.build(find_characters(units), documents=True))
    if not path.is_file():
        raise UserError(_("{path} does not exist", path=path))
    encoding = "utf-16-le" if data_type == "utf-16le" else "utf-8-sig"
    try:
        tokenizer = tokenizer or Character.build(read_text(path, encoding))
        pieces = list(tokenizer.encode_stream(read_text(path, encoding)))
    except UnicodeError as error:
        raise UserError(_("{path} is not {encoding} text", path=path, encoding=encoding)) from error
    stream = _joined(pieces, tokenizer)
    return stream, np.array([len(stream)]), tokenizer


def _known_tokenizer(prefix: str, wanted: str) -> Tokenizer:
    """The tokenizer of data that are tokens already."""
    kept = tokenizers.load_beside(prefix + ".vocab")
    if wanted == "char" and kept is None:
        message = _("{prefix} has no {prefix}.vocab.json; give the path of its vocabulary as tokenizer", prefix=prefix)
        raise UserError(message)
    if wanted and wanted != "char":
        return tokenizers.load(wanted)
    return kept or tokenizers.load("world")


def _tokenised(units: list[Unit], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, Tokenizer]:
    pieces = []
    sizes = [np.empty(0, np.int64)]
    lines = 0
    for piece in tokenise(units, tokenizer):
        for fault in piece.faults:
            raise UserError(str(fault.later(lines)))
        lines += piece.lines
        sizes.append(piece.sizes)
        pieces.append(piece.tokens)
    return _joined(pieces, tokenizer), np.concatenate(sizes), tokenizer


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
    start = stream[: 1 << 20]
    if data_type == "uint16" and len(start) >= 64 and start[::2].any() and not start[1::2].any():
        message = _(
            "{path}: every second uint16 is 0, so these are int32 ids; save them as .npy and they are read as they are",
            path=name,
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
