"""What the engine works on: requests from their arrival to their end, and jobs between its turns."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from rookery.infer.constraint import Guide
from rookery.infer.forms import Form
from rookery.infer.request import Handle, Request, Token
from rookery.infer.sequence import Sequence
from rookery.models import State


class Busy(Exception):
    """The queue of waiting requests is full."""


class Closed(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Load:
    """What an engine is doing and has done since its start."""

    slots: int
    active: int
    waiting: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cache_bytes: int
    cache_entries: int


@dataclass
class Active:
    """A request from `submit` to its end."""

    handle: Handle
    sequence: Sequence
    guide: Guide | None
    start: State
    """The state before the prompt."""
    form: Form
    context: Hashable
    """What `start` and `form` are, for the cache; None if nothing is to be cached."""
    slot: int = -1
    started: float = 0.0
    position: int = 0
    """Tokens of the prompt that are in the state."""
    part_at: int = 0
    """Position of the prompt at which the state is to be kept; 0 for nowhere."""
    first: float = 0.0
    tokens: list[tuple[Token, int]] = field(default_factory=list)
    """Tokens not yet handed out, each with the number of bytes of the answer up to its end."""
    bytes: int = 0
    total: Tensor | float = 0.0
    """Sum of what was read, for an embedding."""

    @property
    def request(self) -> Request:
        return self.handle.request


class Job:
    """Something to be done by the engine's thread."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self.done: Future[None] = Future()

    def run(self) -> None:
        try:
            self._action()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)
