"""The text of a chat, as the World and G1 models were trained on it.

Turns are ``User: …`` and ``Assistant: …``, after an optional ``System: …``, separated by a blank line; so no message
may contain one. A prompt ends with ``Assistant:`` and no space, and the answer ends at the next blank line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]
Thinking = Literal["none", "quick", "think", "bit", "lot"]

SEPARATOR = "\n\n"
MARKS: dict[Role, str] = {
    "system": "System:",
    "user": "User:",
    "assistant": "Assistant:",
    "tool": "User: Function output:\n",
}
"""What a turn begins with. The result of a tool comes back as a turn of the user."""

_REQUEST: dict[Thinking, str] = {"none": "", "quick": "", "think": "", "bit": " (think a bit)", "lot": " (think a lot)"}
_BEGIN: dict[Thinking, str] = {
    "none": "",
    "quick": " <think>\n</think",
    "think": " <think",
    "bit": " <think",
    "lot": " <think",
}


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: Role
    text: str


def clean(text: str) -> str:
    """Message text without what would break the format: CRLF becomes LF, blank lines go, the ends are stripped."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def turn(message: Message) -> str:
    """One turn, mark and cleaned text, without the separator."""
    mark = MARKS[message.role]
    gap = "" if mark.endswith("\n") else " "
    return f"{mark}{gap}{clean(message.text)}"


def document(messages: Sequence[Message]) -> str:
    """A whole chat as a training document (the end of document is the tokenizer's business)."""
    return SEPARATOR.join(turn(message) for message in messages)


def prompt(messages: Sequence[Message], thinking: Thinking = "none") -> str:
    """The text after which the model answers.

    Args:
        messages: the chat so far; the last one is usually the user's.
        thinking: how a G1 model should reason. "none": as a World model; "quick": it answers at once, with its thoughts
            left empty; "think": it thinks first; "bit", "lot": the same with a word on the length.
    """
    if messages and messages[-1].role == "user" and _REQUEST[thinking]:
        last = messages[-1]
        messages = [*messages[:-1], Message(last.role, clean(last.text) + _REQUEST[thinking])]
    turns = [turn(message) for message in messages]
    return SEPARATOR.join([*turns, MARKS["assistant"] + answer_begin(thinking)])


def answer_begin(thinking: Thinking = "none") -> str:
    """What the prompt already holds of the answer: to be shown or stored before the generated text."""
    return _BEGIN[thinking]


def stop_strings(thinking: Thinking = "none") -> tuple[str, ...]:
    """Where an answer ends (besides the end of document). Thoughts may hold blank lines: there a new turn ends it."""
    if thinking in ("none", "quick"):
        return (SEPARATOR,)
    return tuple(SEPARATOR + MARKS[role] for role in ("user", "assistant", "system"))
