"""How well a model predicts a text, or the documents of binidx data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rookery.data import BinIdx
from rookery.data.binidx import prefix_of
from rookery.data.samples import check_ids
from rookery.errors import UserError
from rookery.i18n import _
from rookery.models import Model, State
from rookery.tokenizer import Tokenizer

CHUNK = 512
"""Tokens read in one forward pass: of several short documents, or of a part of a long one, whose state carries on."""

LARGEST = 700.0
"""Loss, in nats, beyond which the perplexity is no number any more."""


@dataclass(frozen=True)
class Result:
    """What was measured over a whole text or data set.

    Attributes:
        loss: mean negative log-likelihood of a token, in nats.
        tokens: tokens predicted.
        text_bytes: UTF-8 bytes of those tokens.
        documents: how many.
    """

    loss: float
    tokens: int
    text_bytes: int
    documents: int = 1

    @property
    def perplexity(self) -> float:
        """Of a token; depends on the tokenizer."""
        return math.exp(self.loss) if not self.loss > LARGEST else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.text_bytes

    def report(self) -> dict[str, Any]:
        """What eval.json holds under "text"."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "documents": self.documents,
        }


@torch.inference_mode()
def document_losses(
    model: Model, documents: Iterable[list[int]], read: Callable[[int], None] = lambda tokens: None
) -> Iterator[float]:
    """For each document of at least two ids, the negative log-likelihood of all but its first, summed, in nats.

    Each is read alone, from the model's initial state, whatever its length. `read` is told how many tokens were, again
    and again.
    """
    packed: list[list[int]] = []
    for document in documents:
        if packed and sum(map(len, packed)) + len(document) > CHUNK:
            yield from _packed_losses(model, packed, read)
            packed = []
        if len(document) > CHUNK:
            yield _long_loss(model, document, read)
        else:
            packed.append(document)
    if packed:
        yield from _packed_losses(model, packed, read)


def _packed_losses(model: Model, documents: list[list[int]], read: Callable[[int], None]) -> list[float]:
    device = model.emb.weight.device
    lengths = torch.tensor([len(document) - 1 for document in documents])
    inputs = torch.tensor([[id for document in documents for id in document[:-1]]], device=device)
    targets = torch.tensor([id for document in documents for id in document[1:]], device=device)
    logits, _state = model(inputs, lengths=lengths)
    losses = F.cross_entropy(logits[0].float(), targets, reduction="none").double()
    read(len(targets))
    return [float(part.sum()) for part in losses.split(lengths.tolist())]


def _long_loss(model: Model, document: list[int], read: Callable[[int], None]) -> float:
    tokens = torch.tensor([document], device=model.emb.weight.device)
    state: State | None = None
    total = 0.0
    for inputs, targets in zip(tokens[:, :-1].split(CHUNK, 1), tokens[0, 1:].split(CHUNK), strict=True):
        logits, state = model(inputs, state)
        total += float(F.cross_entropy(logits[0].float(), targets, reduction="sum"))
        read(len(targets))
    return total


def measure(
    model: Model, tokenizer: Tokenizer, text: str, *, progress: Callable[[int, int], None] | None = None
) -> Result:
    """Read `text` as one document, and sum how surprising each token was.

    The end of the document before it comes first, so that the first token is predicted too; a vocabulary without one
    leaves the first token out. `progress(done, total)` is called in tokens.

    Raises:
        UserError: the text is empty, or has a character that the tokenizer lacks.
    """
    ids = tokenizer.encode(text)
    return _measure(model, tokenizer, iter([ids]), len(ids), progress)


def measure_data(
    model: Model,
    tokenizer: Tokenizer,
    prefix: str | Path,
    *,
    limit: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Read the documents of binidx data, each alone, as `measure` reads a text; the end of each is not predicted.

    Args:
        limit: of documents, from the first on; 0 = all.
        progress: called with tokens done and all.

    Raises:
        UserError: the files are missing or damaged, or the data were made with another vocabulary.
    """
    data = BinIdx(prefix)
    check_ids(data.stream, tokenizer.vocab_size, str(prefix))
    count = min(len(data), limit) if limit else len(data)
    documents = (data.get(number).tolist() for number in range(count))
    return _measure(model, tokenizer, documents, int(data.sizes[:count].sum(dtype="int64")), progress)


def _measure(
    model: Model,
    tokenizer: Tokenizer,
    documents: Iterator[list[int]],
    size: int,
    progress: Callable[[int, int], None] | None,
) -> Result:
    ends = tokenizer.end_of_document
    tokens = text_bytes = done = 0

    def predicted() -> Iterator[list[int]]:
        nonlocal tokens, text_bytes
        for ids in documents:
            if ends is not None:
                ids = [ends, *(ids[:-1] if ids[-1:] == [ends] else ids)]
            if len(ids) > 1:
                tokens += len(ids) - 1
                text_bytes += len(tokenizer.decode_bytes(ids[1:]))
                yield ids

    def read(number: int) -> None:
        nonlocal done
        done += number
        if progress:
            progress(done, size)

    losses = list(document_losses(model, predicted(), read))
    if not losses:
        raise UserError(_("The text is too short: there is nothing to predict."))
    return Result(sum(losses) / tokens, tokens, text_bytes, len(losses))


def measure_file(
    model: Model,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    limit: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """`measure` for a UTF-8 text file, `measure_data` for the prefix of binidx data or one of its files.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(path)
    if path.suffix in (".bin", ".idx") or (not path.exists() and Path(prefix_of(path) + ".idx").exists()):
        return measure_data(model, tokenizer, path, limit=limit, progress=progress)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(_("Cannot read the text {path}: {reason}", path=path, reason=error)) from error
    return measure(model, tokenizer, text, progress=progress)
