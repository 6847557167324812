"""Running a model: prompts in parallel form, answers in recurrent form, one or many at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from rookery.infer.forms import PREFILL, Form, PlainForm, assign
from rookery.infer.sampler import Sampling, check_numbers
from rookery.infer.sequence import Sequence, Tokenizer
from rookery.models import Model, State


@torch.inference_mode()
def read(model: Model, rows: list[list[int]], state: State | None = None) -> tuple[Tensor, State]:
    """Read B rows of T >= 1 tokens each, after `state`.

    Only the last position meets the head, so that a long prompt costs no `(B, T, V)` logits.

    Returns:
        Logits `(B, V)` fp32 for the token that follows, and the state after all tokens.
    """
    tokens = torch.tensor(rows, device=next(model.parameters()).device)
    for part in tokens.split(PREFILL, dim=1):
        x, state = model.hidden(part, state)
    assert state is not None
    return model.head(x[:, -1]).float(), state


def join(states: list[State]) -> State:
    """One batch of the sequences of several."""
    return State(
        torch.cat([state.att_shift for state in states], dim=1),
        torch.cat([state.wkv for state in states], dim=1),
        torch.cat([state.ffn_shift for state in states], dim=1),
    )


class Generation:
    """An answer being generated: iterate for its pieces of text, stop when you like.

    After any piece, `state` and `unread` say where the model stands: `state` after all tokens of the prompt and the
    text so far except `unread`, which are to be read before anything that follows. A stop text or token is in neither.

    Attributes:
        sequence: the answer so far, its tokens and why it ended.
        read: tokens of the prompt.
        unread: tokens of the text that are not in `state` yet.
        prompt_seconds, answer_seconds: time spent on the prompt and the first token, and on the tokens after it.
    """

    def __init__(
        self,
        form: Form,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        sampling: Sampling,
        state: State | None = None,
    ) -> None:
        if not prompt_ids:
            raise ValueError("the prompt has no tokens")
        self.sequence = Sequence(tokenizer, sampling)
        self.read = len(prompt_ids)
        self.unread = list(prompt_ids)
        self.prompt_seconds = self.answer_seconds = 0.0
        self._form = form
        self._tokenizer = tokenizer
        self._slots = form.slots(1)
        assign(self._slots, slice(0, 1), form.initial() if state is None else state)
        self._held: list[tuple[State, int]] = []
        """The last tokens from the first that is not wholly released on, each with the state before it."""

    @property
    def state(self) -> State:
        """The model's state, (L, 1, ...); a copy."""
        return (self._held[0][0] if self._held else self._slots.select(slice(0, 1))).clone()

    def cancel(self) -> None:
        """End the answer after the token in progress; for a signal handler or another thread."""
        self.sequence.finish = self.sequence.finish or "cancelled"

    def __iter__(self) -> Iterator[str]:
        while not self.sequence.finish:
            begun = time.perf_counter()
            with torch.inference_mode():
                piece = self.sequence.choose(self._next_logits())
                self._settle()
            if len(self.sequence.tokens) == 1:
                self.prompt_seconds = time.perf_counter() - begun
            else:
                self.answer_seconds += time.perf_counter() - begun
            if piece:
                yield piece

    def _next_logits(self) -> Tensor:
        if self.sequence.tokens:
            return self._form.step(self._slots, [0], self.sequence.tokens[-1:])[0]
        for begin in range(0, len(self.unread), PREFILL):
            hidden = self._form.read(self._slots, 0, self.unread[begin : begin + PREFILL])
        return self._form.head(hidden[-1:])[0]

    def _settle(self) -> None:
        """After a token was chosen, which the model has not read: set `unread`, and `_held` if text is held back."""
        sequence = self.sequence
        token = sequence.tokens[-1]
        ended = token in sequence.sampling.token_stop
        surplus = sequence.unreleased_bytes
        if not surplus and not ended:
            self._held, self.unread = [], [token]
            return
        self._held.append((self._slots.select(slice(0, 1)).clone(), token))
        first = len(self._held) - ended
        while surplus > 0:
            first -= 1
            surplus -= len(sequence.bytes_of(self._held[first][1]))
        # `first` is the first token that is not wholly released, of which a beginning may be.
        del self._held[:first]
        if self._held:
            beginning = sequence.bytes_of(self._held[0][1])[:-surplus] if surplus else b""
            self.unread = self._tokenizer.encode(beginning)


def generate(
    model: Model | Form,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    sampling: Sampling,
    state: State | None = None,
) -> Generation:
    """Answer a prompt, in pieces of text that are whole characters: ``for piece in generate(...): print(piece)``.

    Args:
        model: a model, or a form of one (`form_of(model)` is the fastest).
        state: to go on from.
    """
    form = PlainForm(model) if isinstance(model, Model) else model
    return Generation(form, tokenizer, prompt_ids, sampling, state)


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sequence]:
    """Answer many prompts, `batch` at a time; each answer is what it would be alone, up to rounding.

    Prompts of one length are read together; then all of a batch go on together, and a finished answer leaves it.
    `progress(done, total)` is called in answers.

    Raises:
        NoNumbers: the model's logits are NaN or infinite.
    """
    answers = [Sequence(tokenizer, sampling) for _prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        live = order[start : start + batch]
        read_groups = [
            read(model, [prompts[i] for i in group]) for _length, group in groupby(live, key=lambda i: len(prompts[i]))
        ]
        logits = torch.cat([group_logits for group_logits, _state in read_groups])
        state = join([group_state for _logits, group_state in read_groups])
        while True:
            if sampling.greedy:
                check_numbers(logits)
                for i, token in zip(live, logits.argmax(-1).tolist(), strict=True):
                    answers[i].accept(token)
            else:
                for i, row in zip(live, logits.cpu(), strict=True):
                    answers[i].choose(row)
            rows = [row for row, i in enumerate(live) if not answers[i].finish]
            if progress:
                progress(start + min(batch, len(order) - start) - len(rows), len(order))
            if not rows:
                break
            if len(rows) < len(live):
                state = state.select(torch.tensor(rows, device=logits.device))
                live = [live[row] for row in rows]
            logits, state = read(model, [answers[i].tokens[-1:] for i in live], state)
    return answers
