"""Running a model: prompts in parallel form, answers in recurrent form, one or many at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from rookery.infer.sampler import Sampling
from rookery.infer.sequence import Sequence, Tokenizer
from rookery.models import Model, State

PREFILL = 512
"""Tokens of a prompt read in one forward pass."""


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
        state: the model's state.
        unread: tokens of the text that are not in `state` yet.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        sampling: Sampling,
        state: State | None = None,
    ) -> None:
        if not prompt_ids:
            raise ValueError("the prompt has no tokens")
        self.sequence = Sequence(tokenizer, sampling)
        self.state = state
        self.unread = list(prompt_ids)
        self._model = model
        self._tokenizer = tokenizer
        self._pending: list[tuple[State, int]] = []

    def cancel(self) -> None:
        """End the answer after the token in progress; for a signal handler or another thread."""
        self.sequence.finish = self.sequence.finish or "cancelled"

    def __iter__(self) -> Iterator[str]:
        tokens = self.unread
        state = self.state
        while not self.sequence.finish:
            logits, state = read(self._model, [tokens], state)
            piece = self.sequence.choose(logits[0])
            tokens = self.sequence.tokens[-1:]
            self._pending.append((state, tokens[0]))
            self._settle()
            if piece:
                yield piece

    def _settle(self) -> None:
        """Set `state` and `unread` to the end of the released text.

        `_pending` holds the last tokens, each with the state before it: from the first one that is not wholly released,
        or the very last one, which the model has not read.
        """
        sequence = self.sequence
        first = len(self._pending)
        if sequence.tokens[-1] in sequence.sampling.token_stop:
            first -= 1
        surplus = sequence.unreleased_bytes
        while surplus > 0:
            first -= 1
            surplus -= len(sequence.bytes_of(self._pending[first][1]))
        if first < len(self._pending):
            state, token = self._pending[first]
            released = sequence.bytes_of(token)[:-surplus] if surplus else b""
            unread = self._tokenizer.encode(released)
        else:
            state, token = self._pending[-1]
            unread = [token]
            first -= 1
        self.state, self.unread = state, unread
        del self._pending[:first]


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    sampling: Sampling,
    state: State | None = None,
) -> Generation:
    """Answer a prompt, in pieces of text that are whole characters: ``for piece in generate(...): print(piece)``."""
    return Generation(model, tokenizer, prompt_ids, sampling, state)


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
