"""How well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rookery.errors import UserError
from rookery.i18n import _
from rookery.models import Model, State
from rookery.tokenizer import Tokenizer

CHUNK = 512
"""Tokens read in one forward pass; the state carries on from one to the next."""


@dataclass(frozen=True)
class Result:
    """What was measured over a whole text.

    Attributes:
        loss: mean negative log-likelihood of a token, in nats.
        tokens: tokens predicted.
        text_bytes: UTF-8 bytes of those tokens.
    """

    loss: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        """Of a token; depends on the tokenizer."""
        return math.exp(self.loss)

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
        }


@torch.inference_mode()
def measure(
    model: Model, tokenizer: Tokenizer, text: str, *, progress: Callable[[int, int], None] | None = None
) -> Result:
    """Read `text` as one document with the state carried through, and sum how surprising each token was.

    The end of the document before it comes first, so that the first token is predicted too; a vocabulary without one
    leaves the first token out. `progress(done, total)` is called in tokens.

    Raises:
        UserError: the text is empty, or has a character that the tokenizer lacks.
    """
    ends = tokenizer.end_of_document
    ids = ([] if ends is None else [ends]) + tokenizer.encode(text)
    if len(ids) < 2:
        raise UserError(_("The text is too short: there is nothing to predict."))
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    state: State | None = None
    total = 0.0
    for start in range(0, len(ids) - 1, CHUNK):
        inputs = tokens[:, start : min(start + CHUNK, len(ids) - 1)]
        logits, state = model(inputs, state)
        targets = tokens[0, start + 1 : start + 1 + inputs.shape[1]]
        total += float(F.cross_entropy(logits[0].float(), targets, reduction="sum"))
        if progress:
            progress(start + inputs.shape[1], len(ids) - 1)
    predicted = ids[1:]
    return Result(total / len(predicted), len(predicted), len(tokenizer.decode_bytes(predicted)))


def measure_file(
    model: Model, tokenizer: Tokenizer, path: str | Path, *, progress: Callable[[int, int], None] | None = None
) -> Result:
    """`measure` for a UTF-8 text file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(_("Cannot read the text {path}: {reason}", path=path, reason=error)) from error
    return measure(model, tokenizer, text, progress=progress)
