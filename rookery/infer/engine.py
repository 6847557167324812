"""Answers to many requests at once: continuous batching over one model.

Every sequence has a slot, which holds its recurrent state and never grows. Sequences join and leave between any two
steps. One turn of the engine reads a piece of some prompts in parallel form, then one token of every answer in
progress, so a long prompt delays the others by one piece at most::

    with Engine(model, tokenizer) as engine:
        engine.mount_state("poet", "poet.pth")
        handle = engine.submit(Request(tokenizer.encode("User: Hi\\n\\nAssistant:"), Sampling(stop=("\\n\\n",))))
        for piece in handle:              # or: async for piece in handle
            print(piece.text, end="")
        print(handle.finish, handle.usage)

`Handle.cancel`, or leaving the loop early, frees the slot. Without `start`, nothing runs until `turn` is called, which
is how tests drive it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from rookery import formats
from rookery.adapters import attach, detach, enable
from rookery.errors import UserError
from rookery.i18n import _
from rookery.infer.cache import PrefixCache
from rookery.infer.constraint import Guide
from rookery.infer.forms import PREFILL, Form, PlainForm, assign, form_of
from rookery.infer.request import Finish, Handle, Piece, Request, Token
from rookery.infer.sampler import NoNumbers, check_numbers
from rookery.infer.sequence import Sequence
from rookery.infer.work import Active, Busy, Closed, Job, Load
from rookery.models import Model, State
from rookery.tokenizer import Tokenizer

logger = logging.getLogger("rookery.infer")

PIECE = 64
"""Tokens of prompts read between two steps of answers in progress."""

WORTH_KEEPING = 16
"""Tokens that two prompts must share beyond what is cached for the state at their parting to be kept."""


class Engine:
    """Runs one model for many requests.

    Args:
        model: in evaluation mode; it must not be used otherwise while the engine runs.
        tokenizer: the model's.
        form: how the model is run; None for the fastest way (`form_of`).
        slots: sequences that are answered at the same time; more wait.
        waiting: requests that may wait; `submit` raises `Busy` beyond.
        cache_bytes: memory for states of shared prefixes; 0 for none.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        form: Form | None = None,
        slots: int = 32,
        waiting: int = 1024,
        cache_bytes: int = 256 << 20,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size = model.shape.vocab_size
        self._form = form or form_of(model)
        self._max_waiting = waiting
        self._slots = self._form.slots(slots)
        self._free = list(range(slots))[::-1]
        self._cache = PrefixCache(cache_bytes)
        self._states: dict[str, tuple[State, int]] = {}
        self._adapters: dict[str, tuple[Form, int]] = {}
        self._retired: list[PlainForm] = []
        self._mounts = 0
        self._waiting: deque[Active] = deque()
        self._jobs: deque[Job] = deque()
        self._reading: deque[Active] = deque()
        self._answering: list[Active] = []
        self._totals = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_error: object) -> None:
        self.close(drain=False)

    def start(self) -> Self:
        """Run in a thread of its own until `close`."""
        self._thread = threading.Thread(target=self._run, name="rookery-engine", daemon=True)
        self._thread.start()
        return self

    def close(self, *, drain: bool = True, seconds: float | None = None) -> None:
        """Take no more requests and end.

        Args:
            drain: finish what was accepted first; else it is cancelled.
            seconds: longest time to spend on that; what is left is cancelled.
        """
        with self._condition:
            self._closing = True
            self._condition.notify()
        if self._thread and drain:
            self._thread.join(seconds)
        with self._condition:
            for active in (*self._reading, *self._answering, *self._waiting):
                active.handle.cancel()
            self._condition.notify()
        if self._thread:
            self._thread.join()
            self._thread = None

    def submit(self, request: Request) -> Handle:
        """Queue a request.

        Raises:
            UserError: an id is outside the vocabulary, a name is not mounted, or the form is none.
            Busy: the queue is full.
            Closed: the engine is closed.
        """
        self._check(request)
        guide = Guide(request.constraint, self.tokenizer, self.vocab_size) if request.constraint else None
        with self._condition:
            if self._closing:
                raise Closed
            if len(self._waiting) >= self._max_waiting + len(self._free):
                raise Busy
            handle = Handle(request)
            start, form, context = self._start(request)
            sequence = Sequence(self.tokenizer, request.sampling)
            self._waiting.append(Active(handle, sequence, guide, start, form, context))
            self._totals["requests"] += 1
            self._condition.notify()
        return handle

    def mount_state(self, name: str, source: str | Path | State) -> None:
        """Make a tuned initial state available to requests as `state=name`, in the place of one of that name.

        Args:
            source: file with `blocks.N.att.time_state`, or a state (L, 1, ...).

        Raises:
            UserError: the file cannot be read or belongs to another model.
        """
        state = self._form.initial()
        if isinstance(source, State):
            assign(state, slice(0, 1), source)
        else:
            tensors = formats.read_state(source, self.model.shape)
            for layer in range(self.model.shape.n_layer):
                state.wkv[layer, 0] = tensors[f"blocks.{layer}.att.time_state"]
        with self._condition:
            self._mounts += 1
            self._states[name] = (state, self._mounts)

    def unmount_state(self, name: str) -> None:
        """Forget a state; requests that use it go on.

        Raises:
            UserError: there is none of that name.
        """
        with self._condition:
            if self._states.pop(name, None) is None:
                raise UserError(_("No state called {name} is mounted.", name=name))

    def mount_adapter(self, name: str, source: str | Path | formats.AdapterFile) -> None:
        """Make an adapter available to requests as `adapter=name`, in the place of one of that name.

        Where the model is packed, the adapter is merged into a packed copy of the matrices it changes, which takes
        their memory again; else the model's module computes with the adapter switched on, and requests with different
        adapters take turns.

        Args:
            source: what `rookery.formats.read_adapter` reads, or what it gave.

        Raises:
            UserError: the file cannot be read or belongs to another model.
        """
        content = source if isinstance(source, formats.AdapterFile) else formats.read_adapter(source)
        weights = {key: value for key, value in self.model.state_dict().items() if ".adapters." not in key}
        content = content.fitted(weights, _("the model"))
        self._between_turns(lambda: self._mount(name, content))

    def unmount_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it go on.

        Raises:
            UserError: there is none of that name.
        """
        with self._condition:
            if name not in self._adapters:
                raise UserError(_("No adapter called {name} is mounted.", name=name))
            self._retire(self._adapters.pop(name)[0])

    @property
    def adapters(self) -> list[str]:
        """Names of the mounted adapters."""
        return sorted(self._adapters)

    @property
    def states(self) -> list[str]:
        """Names of the mounted states."""
        return sorted(self._states)

    @property
    def load(self) -> Load:
        """Figures for monitoring."""
        with self._condition:
            active = len(self._reading) + len(self._answering)
            return Load(
                slots=active + len(self._free), active=active, waiting=len(self._waiting),
                cache_bytes=self._cache.bytes, cache_entries=len(self._cache), **self._totals,
            )  # fmt: skip

    def turn(self) -> bool:
        """Do one turn of work; False if there was none."""
        with self._condition:
            jobs = [self._jobs.popleft() for _job in range(len(self._jobs))]
        for job in jobs:
            job.run()
        with self._condition:
            self._drop_cancelled()
            self._detach_retired()
            self._admit()
        with torch.inference_mode():
            busy = bool(jobs or self._reading or self._answering)
            try:
                self._read_prompts()
                self._answer()
            except Exception as error:
                # Whatever it was, the states of these sequences can no longer be trusted; others still can be served.
                logger.exception("the engine failed; %d answers are lost", len(self._reading) + len(self._answering))
                for active in (*self._reading, *self._answering):
                    self._end(active, "error", error)
        return busy

    def _run(self) -> None:
        while True:
            worked = self.turn()
            with self._condition:
                idle = not (worked or self._waiting or self._jobs or self._retired)
                if idle and self._closing:
                    return
                if idle:
                    self._condition.wait()

    def _between_turns(self, action: Callable[[], None]) -> None:
        """Have `action` done when nothing is being computed, and wait for it."""
        job = Job(action)
        with self._condition:
            if self._closing:
                raise Closed
            self._jobs.append(job)
            self._condition.notify()
        if self._thread is None:
            self.turn()
        job.done.result()

    def _mount(self, name: str, content: formats.AdapterFile) -> None:
        with self._condition:
            self._mounts += 1
            inner = f"mounted_{self._mounts}"
        attach(self.model, content.config, inner, tensors=content.tensors)
        try:
            form = self._form.again()
        except BaseException:
            detach(self.model, inner)
            raise
        if form is None:
            enable(self.model, inner, False)
            form = PlainForm(self.model, inner)
        else:
            detach(self.model, inner)
        with self._condition:
            if name in self._adapters:
                self._retire(self._adapters[name][0])
            self._adapters[name] = (form, self._mounts)

    def _retire(self, form: Form) -> None:
        """Take the adapter of a form off the model once no request uses it; a packed form goes by itself."""
        if isinstance(form, PlainForm) and form.adapter is not None:
            self._retired.append(form)
            self._condition.notify()

    def _detach_retired(self) -> None:
        used = {id(active.form) for active in (*self._waiting, *self._reading, *self._answering)}
        for form in [form for form in self._retired if id(form) not in used]:
            self._retired.remove(form)
            detach(self.model, str(form.adapter))

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise UserError(_("The prompt has no tokens."))
        sampling = request.sampling
        known = (*request.prompt, *sampling.token_ban, *(token for token, _amount in sampling.logit_bias))
        if not (min(known) >= 0 and max(known) < self.vocab_size):
            raise UserError(_("A token id lies outside the vocabulary of {size} ids.", size=self.vocab_size))
        if isinstance(request.state, State) and request.state.wkv.shape != self._form.initial().wkv.shape:
            raise UserError(_("The state given belongs to another model."))

    def _drop_cancelled(self) -> None:
        for active in [a for a in (*self._reading, *self._answering) if a.handle.cancelled]:
            self._end(active, "cancelled")
        for active in [a for a in self._waiting if a.handle.cancelled]:
            self._waiting.remove(active)
            active.handle.end("cancelled")

    def _admit(self) -> None:
        while self._waiting and self._free:
            active = self._waiting.popleft()
            active.slot, active.started = self._free.pop(), time.monotonic()
            prompt, start = active.request.prompt, active.start
            if active.context is not None:
                active.position, cached = self._cache.find(active.context, prompt)
                start = cached or start
                shared = self._cache.shared(active.context, prompt)
                if active.position + WORTH_KEEPING <= shared < len(prompt):
                    active.part_at = shared
            assign(self._slots, slice(active.slot, active.slot + 1), start)
            handle = active.handle
            handle.usage = replace(handle.usage, cached=active.position, waited=active.started - handle.created)
            self._totals["prompt_tokens"] += len(prompt)
            self._totals["cached_tokens"] += active.position
            self._reading.append(active)

    def _start(self, request: Request) -> tuple[State, Form, Hashable]:
        """The state before the first token, how the model is run, and what the two are for the cache."""
        form, adapter = self._form, 0
        if request.adapter:
            if request.adapter not in self._adapters:
                raise UserError(_("No adapter called {name} is mounted.", name=request.adapter))
            form, adapter = self._adapters[request.adapter]
        if isinstance(request.state, State):
            return request.state, form, None
        start, mount = form.initial(), 0
        if request.state:
            if request.state not in self._states:
                raise UserError(_("No state called {name} is mounted.", name=request.state))
            start, mount = self._states[request.state]
        # Of what the cache holds, there is neither an embedding nor a probability.
        whole = request.embed or request.score
        return start, form, (mount, adapter) if request.reuse and not whole else None

    def _read_prompts(self) -> None:
        left = PIECE if self._answering else PREFILL
        for _n in range(len(self._reading)):
            if left <= 0:
                return
            active = self._reading.popleft()
            # While it is read, it belongs to those that a failure ends.
            self._reading.append(active)
            prompt, begin = active.request.prompt, active.position
            end = active.part_at if active.part_at > begin else len(prompt)
            end = min(end, begin + left)
            left -= end - begin
            hidden = active.form.read(self._slots, active.slot, prompt[begin:end])
            active.position = end
            try:
                check_numbers(hidden)
            except NoNumbers as error:
                self._end(active, "error", error)
                continue
            if active.request.embed:
                active.total = active.total + hidden.float().sum(0)
            if active.request.score:
                self._score(active, hidden, begin)
            if end in (active.part_at, len(prompt)):
                self._keep(active, prompt[:end])
            if end < len(prompt):
                continue
            if active.request.embed:
                active.handle.embedding = (active.total / torch.linalg.vector_norm(active.total)).tolist()
            if active.request.embed or active.request.silent:
                self._end(active, "stop" if active.request.embed else "length")
            else:
                self._reading.remove(active)
                self._answering.append(active)
                self._choose(active, active.form.head(hidden[-1:])[0])

    def _score(self, active: Active, hidden: Tensor, begin: int) -> None:
        """Describe the tokens of the prompt that are predicted by `hidden` (T, C), what the head takes from position
        `begin` on."""
        request, described = active.request, active.handle.prompt
        if begin == 0:
            described.append(Token(request.prompt[0], active.sequence.bytes_of(request.prompt[0])))
        # In parts: logits of a long piece in a large vocabulary would take much more memory than its states.
        for at, rows in zip(range(begin, begin + len(hidden), PIECE), hidden.split(PIECE), strict=True):
            targets = request.prompt[at + 1 : at + 1 + len(rows)]
            described += self._described(active, targets, active.form.head(rows)[: len(targets)])

    def _answer(self) -> None:
        going_on = [a for a in self._answering if a.sequence.tokens and not a.handle.cancelled]
        for form in {id(active.form): active.form for active in going_on}.values():
            group = [active for active in going_on if active.form is form]
            rows = [active.slot for active in group]
            logits = form.step(self._slots, rows, [active.sequence.tokens[-1] for active in group])
            for active, row in zip(group, logits, strict=True):
                self._choose(active, row)

    def _choose(self, active: Active, logits: Tensor) -> None:
        """Draw the next token of an answer, hand out the text it releases, and end the answer where it ends."""
        sequence, guide = active.sequence, active.guide
        try:
            text = sequence.choose(logits, guide.allowed() if guide else None)
            token = sequence.tokens[-1]
            ends = token in active.request.sampling.token_stop
            if guide and not ends:
                guide.accept(token)
        except UserError as error:  # a form can turn out to be too large, or impossible, at any of its tokens
            self._end(active, "error", error)
            return
        if not active.first:
            active.first = time.monotonic()
        if ends:
            [active.handle.stopped_by] = self._described(active, [token], logits[None])
        else:
            active.bytes += len(sequence.bytes_of(token))
            [described] = self._described(active, [token], logits[None])
            active.tokens.append((described, active.bytes))
            if guide and guide.complete and not sequence.finish:
                text += sequence.end()
        released = active.bytes - sequence.unreleased_bytes
        if sequence.finish:
            tokens = tuple(t for t, end in active.tokens if end - len(t.data) < released or not t.data)
            if text or tokens:
                active.handle.give(Piece(text, tokens))
            self._end(active, sequence.finish)
        elif text:
            tokens = tuple(t for t, end in active.tokens if end <= released)
            del active.tokens[: len(tokens)]
            active.handle.give(Piece(text, tokens))

    def _described(self, active: Active, ids: list[int], logits: Tensor) -> list[Token]:
        """The tokens `ids` as they came of `logits` (T, V)."""
        data, count = map(active.sequence.bytes_of, ids), active.request.logprobs
        if count is None:
            return [Token(*known) for known in zip(ids, data, strict=True)]
        logprobs = logits.float().log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(ids, dtype=torch.long, device=logprobs.device)[:, None])[:, 0].tolist()
        values, places = logprobs.topk(count)
        tops = [tuple(zip(*row, strict=True)) for row in zip(places.tolist(), values.tolist(), strict=True)]
        return [Token(*known) for known in zip(ids, data, own, tops, strict=True)]

    def _end(self, active: Active, finish: Finish, error: Exception | None = None) -> None:
        now, handle, tokens = time.monotonic(), active.handle, active.sequence.tokens
        first = active.first or now
        handle.usage = replace(
            handle.usage, completion=len(tokens), first=first - active.started, rest=now - first
        )  # fmt: skip
        if finish in ("stop", "length") and len(tokens) > 1:
            # The last token was not read.
            self._keep(active, active.request.prompt + tokens[:-1])
        with self._condition:
            self._totals["completion_tokens"] += len(tokens)
            if active in self._reading:
                self._reading.remove(active)
            else:
                self._answering.remove(active)
            self._free.append(active.slot)
        handle.end(finish, error)

    def _keep(self, active: Active, tokens: list[int]) -> None:
        """Leave a copy of the state, which is that after `tokens`, in the cache."""
        if active.context is not None:
            self._cache.put(active.context, tokens, self._slots.select(slice(active.slot, active.slot + 1)).clone())
