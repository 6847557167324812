"""What all requests to a server share: the engine, its limits, what is mounted, and what was counted."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from rookery.errors import UserError
from rookery.i18n import _
from rookery.infer import Closed, Engine, Handle, NoNumbers, Piece, Request
from rookery.serve.errors import ApiError
from rookery.serve.metrics import Metrics
from rookery.serve.mounts import Mounts
from rookery.serve.prompts import Prompter

T = TypeVar("T")

GRACE = 5.0
"""Seconds that a client has to take the rest of an answer after its time is over."""


@dataclass(frozen=True)
class Limits:
    """How much a server takes on.

    Attributes:
        queue: answers that may wait for a slot; beyond, requests are refused at once.
        prompt: longest prompt, in tokens.
        seconds: longest time for a request, the wait for a slot included.
        body: largest request, in bytes.
        body_seconds: time in which a request must have arrived.
        drain: seconds that running answers have when the server ends.
    """

    queue: int = 64
    prompt: int = 32768
    seconds: float = 600.0
    body: int = 4 << 20
    body_seconds: float = 30.0
    drain: float = 30.0


class Service:
    """One model, answering.

    Args:
        engine: started; it must take `slots + limits.queue` requests and more, since the service does the refusing.
        name: of the model.
        prompter: makes requests to the engine.
        limits: see there.
        states, adapters: what is mounted.

    Attributes:
        created: when it began, in seconds since 1970.
        accepted: answers begun and not yet delivered.
        draining: whether nothing new is taken.
    """

    def __init__(
        self, engine: Engine, name: str, prompter: Prompter, limits: Limits, states: Mounts, adapters: Mounts
    ) -> None:
        self.engine = engine
        self.name = name
        self.prompter = prompter
        self.limits = limits
        self.states, self.adapters = states, adapters
        self.metrics = Metrics()
        self.created = int(time.time())
        self.slots = engine.load.slots
        self.accepted = 0
        self.draining = False
        self._drained_at = math.inf
        self._jobs: set[Job] = set()

    def mounts(self, kind: Literal["state", "adapter"]) -> Mounts:
        return self.states if kind == "state" else self.adapters

    def check_model(self, name: str | None) -> None:
        """Raises:
        ApiError: the name is not this model's.
        """
        if name is not None and name != self.name:
            raise ApiError(
                404,
                _("There is no model {name} here; this server has {own}.", name=name[:200], own=self.name),
                param="model",
                code="model_not_found",
            )

    def admit(self, answers: int) -> Job:
        """Take on a request for so many answers.

        Raises:
            ApiError: there is no room for it, or the server is ending.
        """
        if self.draining:
            raise self.ending()
        room = self.slots + self.limits.queue
        if answers > room:
            raise ApiError(
                400, _("{n} answers at once are too many; this server has room for {room}.", n=answers, room=room)
            )
        if self.accepted + answers > room:
            self.metrics.refused += 1
            raise ApiError(
                429,
                _("All slots are taken and the queue is full; try again later."),
                code="queue_full",
                retry_after=self._until_room(),
            )
        self.accepted += answers
        job = Job(self, answers)
        self._jobs.add(job)
        return job

    def ending(self) -> ApiError:
        """The refusal of a server that is ending."""
        self.metrics.refused += 1
        return ApiError(503, _("The server is ending; it takes no more requests."), code="draining", retry_after=10)

    def _until_room(self) -> int:
        rounds = max(1.0, self.accepted / self.slots)
        return math.ceil(min(60.0, max(1.0, rounds * self.metrics.whole.mean)))

    def release(self, job: Job) -> None:
        """For `Job.close`."""
        if job in self._jobs:
            self._jobs.remove(job)
            self.accepted -= job.answers

    def drain(self) -> None:
        """Take nothing new; what runs has `Limits.drain` seconds, or ends now if this was called before.

        May be called from a signal handler.
        """
        self._drained_at = time.monotonic() + (0 if self.draining else self.limits.drain)
        self.draining = True

    def drained(self) -> bool:
        """Whether a draining server may end; called again and again, it ends what takes too long."""
        if time.monotonic() > self._drained_at:
            for job in self._jobs:
                job.stop()
            return not self._jobs or time.monotonic() > self._drained_at + GRACE
        return self.draining and not self._jobs

    def count(self, handle: Handle) -> None:
        """Put an answer that has ended into the metrics."""
        usage = handle.usage
        self.metrics.waited.add(usage.waited)
        self.metrics.first.add(usage.waited + usage.first)
        self.metrics.whole.add(usage.waited + usage.first + usage.rest)

    def metrics_text(self) -> str:
        """The page for Prometheus."""
        load = self.engine.load
        gauges = {
            "rookery_slots": ("Answers that can be in progress", load.slots),
            "rookery_slots_active": ("Answers in progress", load.active),
            "rookery_queue": ("Answers waiting for a slot", load.waiting),
            "rookery_accepted": ("Answers begun and not yet delivered", self.accepted),
            "rookery_cache_bytes": ("Memory of the states of shared prefixes", load.cache_bytes),
            "rookery_cache_entries": ("States of shared prefixes", load.cache_entries),
            "rookery_states": ("States mounted", len(self.states.names)),
            "rookery_adapters": ("Adapters mounted", len(self.adapters.names)),
        }
        counters = {
            "rookery_answers_total": ("Answers begun", load.requests),
            "rookery_prompt_tokens_total": ("Tokens of prompts", load.prompt_tokens),
            "rookery_cached_tokens_total": ("Tokens of prompts that were not read again", load.cached_tokens),
            "rookery_completion_tokens_total": ("Tokens generated", load.completion_tokens),
        }
        return self.metrics.text(gauges, counters)


class Job:
    """The answers that one HTTP request asked for, from its acceptance to its delivery."""

    def __init__(self, service: Service, answers: int) -> None:
        self.answers = answers
        self.handles: list[Handle] = []
        self.deadline = asyncio.get_running_loop().time() + service.limits.seconds
        self._service = service
        self._stopped = False
        self._timer = asyncio.get_running_loop().call_at(self.deadline, self.stop)

    async def prepare(self, make: Callable[[], T]) -> T:
        """Run `make` in another thread, since encoding texts and compiling forms takes time.

        Raises:
            ApiError: what it was asked for cannot be had.
        """
        try:
            return await asyncio.to_thread(make)
        except (UserError, ValueError) as error:
            raise ApiError(400, _reason(error)) from error
        except RecursionError as error:
            raise ApiError(400, _("The request is nested too deeply.")) from error
        except Closed as error:
            raise self._service.ending() from error

    async def submit(
        self, requests: list[Request], state: str | None = None, adapter: str | None = None
    ) -> list[Handle]:
        """Give requests to the engine.

        Args:
            state, adapter: names as a client gives them; None is what is mounted as `default`.

        Raises:
            ApiError: they cannot be served.
        """
        return await self.prepare(lambda: self._submit(requests, state, adapter))

    def _submit(self, requests: list[Request], state: str | None, adapter: str | None) -> list[Handle]:
        service = self._service
        state, adapter = service.states.choose(state), service.adapters.choose(adapter)
        handles = []
        for request in requests:
            if len(request.prompt) > service.limits.prompt:
                raise ApiError(
                    400,
                    _(
                        "The prompt has {n} tokens; this server takes {most} at most.",
                        n=len(request.prompt),
                        most=service.limits.prompt,
                    ),
                    code="context_length_exceeded",
                )
            handles.append(service.engine.submit(replace(request, state=state, adapter=adapter)))
            self.handles.append(handles[-1])
            if self._stopped:
                handles[-1].cancel()
        return handles

    def stop(self) -> None:
        """End the answers where they are."""
        self._stopped = True
        for handle in self.handles:
            handle.cancel()

    def close(self) -> None:
        """The request is over, whether it was answered or not."""
        self._timer.cancel()
        if any(not handle.finish for handle in self.handles):
            self._service.metrics.abandoned += 1
        self.stop()
        self._service.release(self)

    async def pieces(self, handles: list[Handle]) -> AsyncIterator[tuple[int, Piece | None]]:
        """(index, piece) of all answers as they come; None in the place of a piece is an answer's end.

        Raises:
            ApiError: the engine failed, a form that was asked for cannot be had, or the time was over too early.
        """
        arrived: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()
        tasks = [asyncio.create_task(_follow(index, handle, arrived)) for index, handle in enumerate(handles)]
        try:
            going_on = len(tasks)
            while going_on:
                index, piece = await arrived.get()
                if isinstance(piece, UserError):
                    raise ApiError(500 if isinstance(piece, NoNumbers) else 400, str(piece)) from piece
                if isinstance(piece, Exception):
                    raise ApiError(500, _("The model failed; the server's log says why.")) from piece
                if piece is None:
                    self._ended(handles[index])
                    going_on -= 1
                yield index, piece
        finally:
            for task in tasks:
                task.cancel()

    def _ended(self, handle: Handle) -> None:
        if handle.finish == "cancelled" and not handle.usage.completion:
            raise ApiError(503, _("The request waited too long for its turn."), code="timeout", retry_after=10)
        self._service.count(handle)


async def _follow(index: int, handle: Handle, arrived: asyncio.Queue[tuple[int, Piece | Exception | None]]) -> None:
    try:
        async for piece in handle:
            arrived.put_nowait((index, piece))
        arrived.put_nowait((index, None))
    except Exception as error:
        arrived.put_nowait((index, error))


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return _("A text holds half of a surrogate pair, which is no character.")
    return str(error)
