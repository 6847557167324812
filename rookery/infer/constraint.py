"""Answers bound to a form: a JSON schema, a regular expression or a grammar, kept by the `llguidance` package.

What may come next is worked out on bytes, so it holds for any vocabulary, also in the middle of a character.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer import Tokenizer

BETWEEN = {"whitespace_flexible": False, "whitespace_pattern": r"( |\n {0,16})?"}
"""Blanks that JSON may have between its parts: none, one, or a new line, indented. Without a limit, a model that has
lost its way writes blanks until its tokens are spent."""

LONGEST_REASON = 200
"""Letters of the library's own words in a message; they can hold a whole grammar."""


@dataclass(frozen=True)
class Constraint:
    """The form of an answer; make one with `json_schema`, `json_object`, `regex`, `choice` or `rules`."""

    grammar: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Constraint:
        """JSON that a schema accepts.

        Raises:
            UserError: `schema` is not a JSON object.
        """
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            return cls(_library().LLMatcher.grammar_from_json_schema(text, BETWEEN))
        except (TypeError, ValueError) as error:
            raise UserError(_("The JSON schema cannot be used: {reason}", reason=error)) from error

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text that a regular expression matches wholly (Rust's syntax)."""
        return cls(_library().LLMatcher.grammar_from_regex(pattern))

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Constraint:
        """One of some texts."""
        return cls.rules("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))

    @classmethod
    def rules(cls, grammar: str) -> Constraint:
        """Text of a context-free grammar, in Lark's notation or in llama.cpp's (GBNF).

        Raises:
            UserError: it has GBNF's signs and is none.
        """
        library = _library()
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            return cls(library.LLMatcher.grammar_from_lark(any_to_lark(grammar)))
        except Exception as error:  # the package raises plain ones, and whatever an unfinished text leads it to
            reason = f"{type(error).__name__}: {error}"[:LONGEST_REASON]
            raise UserError(_("The grammar cannot be used: {reason}", reason=reason)) from error


class Guide:
    """Follows one answer and says which tokens may come next.

    Args:
        constraint: the form.
        tokenizer: the model's; its `end_of_document` becomes possible where the form may end.
        size: ids of the model, the length of `allowed`.

    Raises:
        UserError: the form is no valid schema, expression or grammar.
    """

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer, size: int) -> None:
        self._size = size
        vocabulary = _vocabulary(tokenizer)  # type: ignore[arg-type]  # the protocol does not say that it is hashable
        self._matcher = _library().LLMatcher(vocabulary, constraint.grammar, log_level=0)
        self._check()

    def allowed(self) -> Tensor:
        """Which tokens may come next, `(size,)` bool on the CPU."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.zeros(self._size, np.bool_)
        known = np.unpackbits(bits, bitorder="little")[: self._size]
        mask[: len(known)] = known
        return torch.from_numpy(mask)

    def accept(self, token: int) -> None:
        """Take `token`, one that was allowed, as the next one."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().splitlines()[0][:LONGEST_REASON]
            raise UserError(_("The form asked of the answer cannot be used: {reason}", reason=reason))


class _Words:
    """A vocabulary as `llguidance` wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        data, offsets = tokenizer.token_bytes()
        text, ends = data.tobytes(), offsets.tolist()
        self.tokens = [text[start:end] for start, end in pairwise(ends)]
        end = tokenizer.end_of_document
        if end is None:  # an id that no model has: the form then ends where nothing may follow
            end = len(self.tokens)
            self.tokens.append(b"")
        self.tokens[end] = b"\xff<end>"
        self.eos_token_id = end
        self.special_token_ids = [end]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    library = _library()
    return library.LLTokenizer(library.TokenizerWrapper(_Words(tokenizer)))


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UserError(
            _(
                "Answers of a given form need the package llguidance: pip install {extra}",
                extra="'rookery[constrained]'",
            )
        ) from error
    return llguidance
