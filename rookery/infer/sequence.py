"""One answer in the making: which token comes next, which text may be shown, and whether it is finished."""

from __future__ import annotations

import codecs
from typing import Literal, Protocol

from torch import Tensor

from rookery.infer.sampler import Sampler, Sampling


class Tokenizer(Protocol):
    """What inference needs of a tokenizer."""

    def encode(self, text: str | bytes) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def decode_bytes(self, ids: list[int]) -> bytes: ...


class Sequence:
    """The answer of one prompt, token by token.

    Text is released in pieces that are whole characters, and never a part of a stop text: what might become one waits
    until it is decided.

    Attributes:
        tokens: every token chosen, the one that ended the answer included.
        text: the answer released so far.
        finish: "" while it goes on, then "stop" (a stop token or text), "length" or "cancelled".
    """

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling) -> None:
        self.sampling = sampling
        self.tokens: list[int] = []
        self.text = ""
        self.finish: Literal["", "stop", "length", "cancelled"] = ""
        self._tokenizer = tokenizer
        self._sampler = Sampler(sampling, lambda token: tokenizer.decode([token]))
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def choose(self, logits: Tensor, allowed: Tensor | None = None) -> str:
        """Draw a token from logits `(V,)`, only from `allowed` if given; returns the text that it releases."""
        return self.accept(self._sampler.draw(logits, allowed))

    def accept(self, token: int) -> str:
        """Take `token` as the next one; returns the text that it releases."""
        self.tokens.append(token)
        if token in self.sampling.token_stop:
            self.finish = "stop"
            return self._release_all()
        self._sampler.saw(token)
        self._held += self._decoder.decode(self.bytes_of(token))
        ends = [at for at in (self._held.find(stop) for stop in self.sampling.stop) if at >= 0]
        if ends:
            self.finish = "stop"
            return self._release(min(ends))
        if len(self.tokens) >= self.sampling.max_tokens:
            self.finish = "length"
            return self._release_all()
        return self._release(len(self._held) - self._beginning_of_a_stop())

    def end(self) -> str:
        """End the answer here, as complete; returns the text that it releases."""
        self.finish = "stop"
        return self._release_all()

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; U+FFFD for an id that the model has and the vocabulary has not."""
        try:
            return self._tokenizer.decode_bytes([token])
        except ValueError:
            return "\ufffd".encode()

    @property
    def unreleased_bytes(self) -> int:
        """Bytes of the tokens so far that are not, or not yet, part of `text`."""
        return len(self._held.encode()) + len(self._decoder.getstate()[0])

    def _beginning_of_a_stop(self) -> int:
        """Length of the longest end of the held text with which a stop text begins."""
        return max(
            (
                size
                for stop in self.sampling.stop
                for size in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:size])
            ),
            default=0,
        )

    def _release_all(self) -> str:
        self._held += self._decoder.decode(b"", final=True)
        return self._release(len(self._held))

    def _release(self, size: int) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        self.text += piece
        return piece
