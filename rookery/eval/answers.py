"""Exact answers to the conversations of a file: whether fine-tuning taught what it was to teach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rookery.data.conversations import read_conversations
from rookery.errors import UserError
from rookery.i18n import _
from rookery.infer import Sampling, complete
from rookery.models import Model
from rookery.tokenizer import Tokenizer, chat

SAMPLES = 10


@dataclass(frozen=True)
class Asked:
    """The end of a conversation, and what the model said there."""

    user: str
    expected: str
    said: str

    @property
    def right(self) -> bool:
        return self.said == self.expected


def likeliest(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[str],
    expected: list[str],
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The likeliest answer to each prompt, up to a little more than the longest expected one."""
    longest = max(len(tokenizer.encode(f" {answer}{chat.SEPARATOR}")) for answer in expected)
    ends = tokenizer.end_of_document
    sampling = Sampling(
        temperature=0,
        alpha_presence=0,
        alpha_frequency=0,
        stop=chat.stop_strings(),
        token_stop=() if ends is None else (ends,),
        max_tokens=longest + 2,
    )
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    return [answer.text.strip() for answer in complete(model, tokenizer, ids, sampling, progress=progress)]


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Asked]:
    """Ask for the last answer of each conversation of a file, each alone.

    `progress(done, total)` is called in answers.

    Raises:
        UserError: the file holds no conversation that ends with an answer, or the tokenizer lacks a character of one.
    """
    conversations = [c for c in read_conversations(path) if len(c) > 1 and c[-1].role == "assistant"]
    if not conversations:
        raise UserError(_("{path} holds no conversation that ends with an answer of the assistant", path=path))
    expected = [chat.body(messages[-1]) for messages in conversations]
    prompts = [chat.prompt(messages[:-1]) for messages in conversations]
    said = likeliest(model, tokenizer, prompts, expected, progress)
    asked = [messages[-2].text for messages in conversations]
    return [Asked(*entry) for entry in zip(asked, expected, said, strict=True)]


def report(file: str | Path, answers: list[Asked]) -> dict[str, Any]:
    """What eval.json holds under "answers"."""
    wrong = [answer for answer in answers if not answer.right]
    right = [answer for answer in answers if answer.right]
    shown = [*wrong[: max(SAMPLES // 2, SAMPLES - len(right))], *right][:SAMPLES]
    return {
        "file": str(file),
        "exact": round(len(right) / len(answers), 4),
        "n": len(answers),
        "samples": [{"user": a.user, "assistant": a.said, "expected": a.expected, "right": a.right} for a in shown],
    }
