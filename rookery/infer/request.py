"""What is asked of the engine, and what comes back."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from rookery.infer.constraint import Constraint
from rookery.infer.sampler import Sampling
from rookery.models import State

Finish = Literal["", "stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    Attributes:
        prompt: token ids, at least one.
        sampling: how the answer is drawn and where it ends.
        state: name of a mounted tuned state ("": the model's own), or a state to go on from, (L, 1, ...) as
            `rookery.models.State` has it; the engine copies it.
        adapter: name of a mounted adapter; "" is the model as it is.
        logprobs: with each token its log-probability, and those of this many of the likeliest tokens; None for neither.
        constraint: the form the answer must have.
        score: `logprobs` is meant of the prompt's tokens too, in `Handle.prompt`.
        embed: no answer, but `Handle.embedding`: the mean of what the head would see of the prompt's tokens.
        silent: no answer, the prompt is only read.
        reuse: whether states of shared prefixes are taken from the engine's cache and left there.
    """

    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    state: str | State = ""
    adapter: str = ""
    logprobs: int | None = None
    constraint: Constraint | None = None
    score: bool = False
    embed: bool = False
    silent: bool = False
    reuse: bool = True


@dataclass(frozen=True)
class Token:
    """A token of an answer, or of a prompt.

    Attributes:
        id: its id.
        data: the bytes it stands for, perhaps not whole characters.
        logprob: natural logarithm of the probability that the model gave it, before sampling settings; None unless
            asked for, and of the first token of a prompt.
        top: the likeliest tokens at this place and their log-probabilities, as many as were asked for.
    """

    id: int
    data: bytes
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text of whole characters, never a part of a stop text, and the tokens since the piece before.

    The tokens of all pieces are those of the answer without a stop token and without tokens that only served a stop
    text; a last piece may have tokens and no text.
    """

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, how many of them came from the cache, tokens generated (a stop token included), and the
    seconds a request waited for a slot, then took until its first token, then until its end."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    waited: float = 0.0
    first: float = 0.0
    rest: float = 0.0


@dataclass(frozen=True)
class Answer:
    """A whole answer. `finish`: "stop" (a stop token or text, or the form is complete), "length" or "cancelled"."""

    text: str
    tokens: tuple[Token, ...]
    finish: Finish
    usage: Usage


class Handle:
    """An answer in the making. All methods may be called from any thread.

    Iterate, plainly or with `async for`, to get each `Piece` as it comes; leaving the loop early cancels the request
    and frees its place. One iteration gets a piece; do not iterate twice.

    Attributes:
        request: what was asked.
        finish: "" until the end, then "stop", "length", "cancelled" or "error".
        usage: figures so far.
        embedding: for a request that asks for it, a vector of length 1 with the model's width; empty before its end.
        prompt: for a request that asks for it, the tokens of the prompt; all are there before the first piece.
        stopped_by: the stop token that ended the answer, described as the others are; None if none did.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.finish: Finish = ""
        self.usage = Usage(prompt=len(request.prompt))
        self.embedding: list[float] = []
        self.prompt: list[Token] = []
        self.stopped_by: Token | None = None
        self.created = time.monotonic()
        self.cancelled = False
        self._error: BaseException | None = None
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._wake: Callable[[], object] = lambda: None

    def cancel(self) -> None:
        """End the answer; its place is free after the step in progress."""
        self.cancelled = True

    def result(self) -> Answer:
        """Wait for the whole answer.

        Raises:
            Exception: what went wrong in the engine.
        """
        pieces = list(self)
        tokens = tuple(token for piece in pieces for token in piece.tokens)
        return Answer("".join(piece.text for piece in pieces), tokens, self.finish, self.usage)

    def __iter__(self) -> Iterator[Piece]:
        try:
            while (piece := self._pieces.get()) is not None:
                yield piece
        finally:
            self.cancel()
        self._raise()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(woken.set)
        try:
            while True:
                woken.clear()
                while not self._pieces.empty():
                    piece = self._pieces.get()
                    if piece is None:
                        self._raise()
                        return
                    yield piece
                await woken.wait()
        finally:
            self.cancel()

    def give(self, piece: Piece) -> None:
        """For the engine: hand out a piece."""
        self._pieces.put(piece)
        self._notify()

    def end(self, finish: Finish, error: BaseException | None = None) -> None:
        """For the engine: the answer is finished, or failed with `error`."""
        self.finish, self._error = finish, error
        self._pieces.put(None)
        self._notify()

    def _notify(self) -> None:
        try:
            self._wake()
        except RuntimeError:  # the event loop of whoever listened is closed
            self.cancel()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
