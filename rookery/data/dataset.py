"""Opening training data: what is trained on, and in which order it is read."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from rookery.config.tree import DataSection
from rookery.data.binidx import BinIdx
from rookery.data.content import Content, held_out, rows_of_split
from rookery.data.mixture import QuestionMixture
from rookery.data.parts import Joined, read_list
from rookery.data.reading import detect, known_tokenizer, read_content
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
from rookery.data.samples import (
    CutDocuments,
    Dataset,
    Facts,
    Mixed,
    Samples,
    Singles,
    Windows,
    check_ids,
    samples_with,
)
from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rookery.data.mask import Mask

VALIDATION_LEAVES = ("data_format", "sft_field", "loss_mask", "mask_id", "dataload")
"""What validation data share with the training data, beside what all further data do."""


def open_dataset(
    data: DataSection,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    random_places: bool = False,
    data_file: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """Open what `data_file` names, whatever its format, for training: without the documents that `val_split` holds out.

    Args:
        data: the section of the configuration.
        vocab_size: ids the model has: all tokens are checked against it before anything is trained. 0 builds a
            character vocabulary of a text; None takes the tokenizer's size.
        seed: of what is shuffled or random.
        random_places: take windows at random places (`train_stage` 4).
        data_file: read this instead of ``data.data_file``.
        tokenizer: take this one, whatever the section and the data say: further data need that of the training data,
            whose character vocabulary they would not give again.

    Raises:
        UserError: no such data, damaged or foreign files, ids beyond the vocabulary, settings that do not fit.
    """
    if data_file is not None:
        data = data.model_copy(update={"data_file": data_file})
    elif data.my_pile_version == 2:
        return _open_list(data, vocab_size, seed, tokenizer)
    data_type, content = _read(data, vocab_size, tokenizer)
    if data.val_split and not data.val_file:
        content = content.take(~held_out(content, data.val_split, seed))
    return _training(data, data_type, content, vocab_size, seed, random_places)


def open_datasets(
    data: DataSection, *, vocab_size: int | None = None, seed: int = 0, random_places: bool = False
) -> tuple[Dataset, Dataset | None]:
    """Training data, as `open_dataset` gives them, and the validation data that `val_file` or `val_split` ask for.

    Validation reads all of its data in every pass, in windows or documents as the training does.
    """
    if data.val_split and not data.val_file and data.my_pile_version == 1:
        data_type, content = _read(data, vocab_size, None)
        held = held_out(content, data.val_split, seed)
        training = _training(data, data_type, content.take(~held), vocab_size, seed, random_places)
        section = _further(data, data.data_file, *VALIDATION_LEAVES)
        return training, _Opening(section, data_type, content.take(held), vocab_size, seed, []).dataset()
    training = open_dataset(data, vocab_size=vocab_size, seed=seed, random_places=random_places)
    if not data.val_file:
        return training, None
    section = _further(data, data.val_file, *VALIDATION_LEAVES)
    return training, open_dataset(section, vocab_size=vocab_size, tokenizer=training.tokenizer)


def _training(
    data: DataSection, data_type: str, content: Content, vocab_size: int | None, seed: int, random_places: bool
) -> Dataset:
    places = [_whole(len(content.stream), data)] if random_places else []
    return _Opening(data, data_type, content, vocab_size, seed, places).dataset()


def _further(data: DataSection, file: str, *leaves: str) -> DataSection:
    """Settings for further data: these `leaves` and the template of `data`, and nothing about the order of training."""
    shared = {leaf: getattr(data, leaf) for leaf in ("ctx_len", "tokenizer", "template", *leaves)}
    return DataSection(data_file=file, **shared)


def _read(data: DataSection, vocab_size: int | None, tokenizer: Tokenizer | None) -> tuple[str, Content]:
    """Data type and content of a file, all of its ids checked."""
    data_type = detect(data.data_file, data.data_type)
    content = read_content(data.data_file, data_type, data, vocab_size, tokenizer)
    if len(content.stream) < 2:
        raise UserError(_("{file} has fewer than two tokens: there is nothing to predict", file=data.data_file))
    check_ids(content.stream, vocab_size or content.tokenizer.vocab_size, data.data_file)
    if data.sft_split != "train":
        content = content.take(rows_of_split(data.sft_split, len(content.sizes)))
    return data_type, content


class _Opening:
    """Content on its way to a `Dataset`. `places`: where random windows may begin; empty = windows in their order."""

    def __init__(
        self,
        data: DataSection,
        data_type: str,
        content: Content,
        vocab_size: int | None,
        seed: int,
        places: list[Part],
    ) -> None:
        self.data = data
        self.data_type = data_type
        self.vocab_size = vocab_size
        self.seed = seed
        self.places = places
        self.notes: list[str] = []
        self.dataload, self.loss_mask = how_to_read(data, content.said is not None)
        self.rows = len(content.sizes)
        # What an answer is, the data say best themselves.
        self.content = content if self.loss_mask == "answer" else replace(content, said=None)
        self.mask = None if self.content.said is not None else make_mask_of(self.loss_mask, data, content.tokenizer)
        self.prime = self.cut = self.left_out = 0
        self.trained: int | None = None
        if content.said is not None:
            self.notes.append(
                _(
                    "{file}: conversations (data_format {format}), written with template {template}",
                    file=data.data_file,
                    format=content.data_format,
                    template=data.template,
                )
            )
        if content.thoughts_lost:
            self.notes.append(
                _(
                    "{count} conversations have thoughts, which template world leaves out; template g1 keeps them",
                    count=content.thoughts_lost,
                )
            )

    def dataset(self) -> Dataset:
        data = self.data
        own = self._samples()
        # With other data mixed in by my_qa_mask, our own take twice as many samples; and random ones come on top.
        tokens = self._tokens_of_pass(own) * data.epochs * (2 if data.my_qa_mask else 1)
        tokens += data.my_random_steps * data.ctx_len
        samples: Samples = own
        if data.my_qa_mask:
            samples = self._question_mixture(samples)
        for others, share in self._others():
            samples = Mixed(samples, others, share)
            tokens = samples_with(-(-tokens // data.ctx_len), share) * data.ctx_len
        tokenizer = self.content.tokenizer
        facts = Facts(
            file=data.data_file,
            data_type=self.data_type,
            data_format=self.content.data_format,
            dataload=self.dataload,
            loss_mask=self.loss_mask,
            tokens=len(self.content.stream),
            documents=self.rows,
            cut=self.cut,
            left_out=self.left_out,
            trained=self.trained,
            tokenizer=tokenizer.name,
            vocab_size=self._vocabulary(),
            prime=self.prime,
            exit_tokens=data.my_exit_tokens or tokens,
            sampler=own.name,
            samples=samples.period,
        )
        return Dataset(samples, self.content, data.ctx_len, facts, self.notes)

    def _vocabulary(self) -> int:
        """Size of the vocabulary: of ids that came without a tokenizer, that of the model they fit."""
        tokenizer = self.content.tokenizer
        guessed = self.data_type in ("binidx", "numpy", "uint16") and tokenizer.name == "world"
        return self.vocab_size if guessed and not self.data.tokenizer and self.vocab_size else tokenizer.vocab_size

    def _tokens_of_pass(self, samples: Samples) -> int:
        """Tokens on which one pass over our own data trains, as the length of a run counts them."""
        windows = samples.name in ("cubic", "cover", "random")
        return len(self.content.stream) if windows else samples.period * self.data.ctx_len

    def _samples(self) -> Samples:
        """Our own data in their order."""
        data = self.data
        if data.my_sample_len:
            self.content = replace(self.content, sizes=_rows(len(self.content.stream), data))
            return self._windows(self._document_order())
        if self.dataload != "get":
            return self._documents()
        self._count_trained()
        if self.places:
            return self._windows(RandomSampler(self.places, data.ctx_len, self.seed))
        sampler = self._order()
        if data.my_random_steps:
            places = [_whole(len(self.content.stream), data)]
            sampler = RandomFirst(sampler, RandomSampler(places, data.ctx_len, self.seed), data.my_random_steps)
        return self._windows(sampler)

    def _windows(self, sampler: Sampler) -> Windows:
        return Windows(self.content, sampler, self.mask, self.data.ctx_len)

    def _count_trained(self) -> None:
        """Of windows, where it can be told without looking at each of them."""
        said = self.content.said
        if said is not None:
            self.trained = int(np.count_nonzero(said[: len(said)]))
        elif self.mask is None:
            self.trained = len(self.content.stream) - 1

    def _documents(self) -> Samples:
        """One or several documents a sample; those in which nothing would be trained are left out."""
        if not self.rows:
            message = _(
                "dataload {dataload} takes documents, of which {file} has none",
                dataload=self.dataload,
                file=self.data.data_file,
            )
            raise UserError(message)
        documents = CutDocuments(self.content, self.mask, self.data.ctx_len)
        # To the reference, every document is a sample of pad.
        if self.dataload != "pad" or self.content.said is not None:
            documents = self._leave_out(documents)
        self._count_cut()
        if self.dataload == "pad":
            return self._windows(self._document_order())
        if self.dataload == "only":
            return Singles(documents, self._document_order())
        return self._packs(documents)

    def _leave_out(self, documents: CutDocuments) -> CutDocuments:
        """Those in which something is trained."""
        trained = documents.trained()
        self.trained = int(trained.sum())
        chosen = trained > 0
        self.left_out = int(np.count_nonzero(~chosen))
        said = {"rows": self.rows, "ctx_len": self.data.ctx_len, "file": self.data.data_file}
        if not chosen.any():
            message = _(
                "{file}: none of the {rows} documents has anything to train within ctx_len {ctx_len}; "
                "rookery data preview shows them",
                **said,
            )
            raise UserError(message)
        if not self.left_out:
            return documents
        self.notes.append(
            _(
                "{count} of the {rows} documents of {file} are left out: they have nothing to train within ctx_len "
                "{ctx_len}",
                count=self.left_out,
                **said,
            )
        )
        self.content = self.content.take(chosen)
        return CutDocuments(self.content, self.mask, self.data.ctx_len)

    def _count_cut(self) -> None:
        sizes, ctx_len = self.content.sizes, self.data.ctx_len
        self.cut = int(np.count_nonzero(sizes > ctx_len + 1))
        if self.cut:
            self.notes.append(
                _(
                    "{cut} of {documents} documents are longer than ctx_len {ctx_len} and are cut there; ctx_len "
                    "{longest} would hold all of them whole",
                    cut=self.cut,
                    documents=len(sizes),
                    ctx_len=ctx_len,
                    longest=int(sizes.max()) - 1,
                )
            )

    def _document_order(self) -> DocumentSampler:
        return DocumentSampler(self.content.starts, self.content.sizes, self._shuffle_seed())

    def _shuffle_seed(self) -> int | None:
        return self.seed if self.data.data_shuffle else None

    def _packs(self, documents: CutDocuments) -> Samples:
        # Only here and for masks, because nothing else in reading data needs Numba.
        from rookery.data.pack import Packs

        packs = Packs(documents.read, documents.sizes, self.data.ctx_len, self._shuffle_seed())
        self.notes.append(
            _(
                "{documents} documents are packed into {samples} samples of {ctx_len} tokens, {full:.1f} % full; "
                "{trained} targets are trained in a pass",
                documents=len(documents.sizes),
                samples=packs.period,
                ctx_len=self.data.ctx_len,
                full=100 * documents.sizes.sum() / (packs.period * self.data.ctx_len),
                trained=self.trained,
            )
        )
        return packs

    def _question_mixture(self, own: Samples) -> Samples:
        data = self.data
        if not data.qa_mix_file:
            raise UserError(
                _("my_qa_mask mixes in other data, in the reference the Pile: give their prefix as qa_mix_file")
            )
        mixed = BinIdx(data.qa_mix_file).stream
        check_ids(mixed, self.vocab_size or self.content.tokenizer.vocab_size, data.qa_mix_file)
        part = _whole(len(mixed), data.model_copy(update={"data_file": data.qa_mix_file}))
        place = RandomSampler([part], data.ctx_len, self.seed)
        return QuestionMixture(own, mixed, place, data.ctx_len, answers_only=data.my_qa_mask == 1)

    def _others(self) -> list[tuple[Samples, Fraction]]:
        """The samples of `mix`, each with its share of all samples mixed so far and its own."""
        found = []
        shares = mix_shares(self.data.mix)
        left = 1 - sum((share for _name, share in shares), Fraction(0))
        for name, share in shares:
            others = open_dataset(
                _further(self.data, name),
                vocab_size=self.vocab_size,
                seed=self.seed,
                tokenizer=self.content.tokenizer,
            )
            left += share
            found.append((others.samples, share / left))
            self.notes.append(
                _(
                    "{share} of the samples come from {file}, which has {samples} of them",
                    share=f"{float(share):.1%}",
                    file=name,
                    samples=others.facts.samples,
                )
            )
        return found

    def _order(self) -> Sampler:
        """The order of windows that meets all of the data."""
        data, tokens = self.data, len(self.content.stream)
        found = magic_prime(tokens, data.ctx_len)
        prime = data.magic_prime or found
        if prime_fits(prime, tokens, data.ctx_len):
            shift = max(0, data.my_pile_shift)
            room = tokens - prime * data.ctx_len - 1
            if shift > room:
                message = _(
                    "my_pile_shift {shift} goes beyond the data: the largest that fits is {room}",
                    shift=shift,
                    room=room,
                )
                raise UserError(message)
            self.prime = prime
            return CubicSampler(prime, data.ctx_len, shift)
        if prime != found:
            message = _(
                "magic_prime {prime} does not fit {tokens} tokens at ctx_len {ctx_len}; leave it out and it is found",
                prime=prime,
                tokens=tokens,
                ctx_len=data.ctx_len,
            )
            raise UserError(message)
        cover = CoverSampler(tokens, data.ctx_len, self.seed)
        self.notes.append(
            _(
                "{tokens} tokens are too few for the prime rule at ctx_len {ctx_len}: the {windows} windows are "
                "shuffled instead, and each pass covers every token",
                tokens=tokens,
                ctx_len=data.ctx_len,
                windows=cover.period,
            )
        )
        return cover


def mix_shares(mix: list[str]) -> list[tuple[str, Fraction]]:
    """Files and shares of `mix`, the shares exactly as written.

    Raises:
        UserError: one is not PREFIX:SHARE with a share between 0 and 1, or together they leave nothing.
    """
    found = []
    for entry in mix:
        name, _colon, share = entry.rpartition(":")
        try:
            part = Fraction(share)
        except (ValueError, ZeroDivisionError):
            part = Fraction(0)
        if not name or not 0 < part < 1:
            raise UserError(_("mix {entry}: expected FILE:SHARE with a share between 0 and 1", entry=entry))
        found.append((name, part))
    if sum(share for _name, share in found) >= 1:
        raise UserError(_("the shares of mix add up to 1 or more: nothing would be left of the data themselves"))
    return found


def how_to_read(data: DataSection, conversations: bool) -> tuple[str, str]:
    """`dataload` and `loss_mask`, decided for data that are `conversations` or not."""
    dataload = data.dataload if data.dataload != "auto" else "pack" if conversations else "get"
    loss_mask = data.loss_mask if data.loss_mask != "auto" else "answer" if conversations else "none"
    return dataload, loss_mask


def make_mask_of(loss_mask: str, data: DataSection, tokenizer: Tokenizer) -> Mask | None:
    """The mask that looks at the tokens; None when all of them count."""
    if loss_mask in ("none", "pad"):
        return None
    # Only here and for packing, because nothing else in reading data needs Numba.
    from rookery.data.mask import make_mask

    return make_mask(loss_mask, tokenizer, data.mask_id)


def _open_list(data: DataSection, vocab_size: int | None, seed: int, tokenizer: Tokenizer | None) -> Dataset:
    """Data of `my_pile_version` 2: many binidx files with weights, read at random places."""
    if data.val_split and not data.val_file:
        raise UserError(_("val_split holds out documents of one file, not of a list: give validation data as val_file"))
    parts, places = read_list(data.data_file, data.ctx_len)
    tokenizer = tokenizer or known_tokenizer(parts[0].prefix, data.tokenizer)
    for part in parts:
        check_ids(part.stream, vocab_size or tokenizer.vocab_size, part.prefix)
    stream = Joined([part.stream for part in parts])
    content = Content(data.data_file, stream, np.concatenate([part.sizes for part in parts]), tokenizer)
    return _Opening(data, "binidx", content, vocab_size, seed, places).dataset()


def _whole(tokens: int, data: DataSection) -> Part:
    """All of a stream, for random windows."""
    places = tokens - data.ctx_len
    if places < 1:
        message = _(
            "{file} has {tokens} tokens, too few for ctx_len {ctx_len}",
            file=data.data_file,
            tokens=tokens,
            ctx_len=data.ctx_len,
        )
        raise UserError(message)
    return Part(0, places, places)


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
