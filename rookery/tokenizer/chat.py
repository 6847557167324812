"""The text of a chat, as the World and G1 models were trained on it.

Turns are ``User: …`` and ``Assistant: …``, after an optional ``System: …``, separated by a blank line; so no message
may contain one. A prompt ends with ``Assistant:`` and no space, and the answer ends at the next blank line.

The template "g1" adds thoughts, ``Assistant: <think>\\n…\\n</think>\\n…``; "world" leaves them out. Calls of functions,
functions on offer and what they gave are written alike in both. Source: RWKV7-G1x-templates.txt in RWKV-LM/RWKV-v7.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from rookery.i18n import _

Role = Literal["system", "user", "assistant", "tool"]
Thinking = Literal["none", "quick", "think", "bit", "lot"]
Template = Literal["world", "g1"]

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
class Call:
    """A function that the assistant calls, with its arguments as JSON knows them: usually names and values."""

    name: str
    arguments: Any


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: who speaks.
        text: what is said.
        thoughts: of the assistant, before it speaks.
        calls: of functions, by the assistant, after it has spoken.
        trained: whether a model is to learn it, if it is the assistant's.
    """

    role: Role
    text: str
    thoughts: str = ""
    calls: tuple[Call, ...] = ()
    trained: bool = True


class Piece(NamedTuple):
    """A part of a chat's text; `said` if it is what the assistant generates when prompted with everything before."""

    text: str
    said: bool


def clean(text: str) -> str:
    """Message text without what would break the format: CRLF becomes LF, blank lines go, the ends are stripped."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def body(message: Message, template: Template = "world") -> str:
    """What stands after the mark of a turn."""
    parts = [clean(message.text)] if message.text else []
    if message.calls:
        calls = [{"name": call.name, "arguments": call.arguments} for call in message.calls]
        parts.append(f"```json\n{json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False)}\n```")
    text = "\n".join(part for part in parts if part)
    if template == "g1" and message.thoughts.strip():
        # Thoughts may hold blank lines: `stop_strings` ends a thinking answer at the next mark only.
        thoughts = message.thoughts.replace("\r\n", "\n").strip()
        text = f"<think>\n{thoughts}\n</think>\n{text}".rstrip()
    return text


def turn(message: Message, template: Template = "world") -> str:
    """One turn, mark and cleaned text, without the separator."""
    mark, text = MARKS[message.role], body(message, template)
    if not text:
        return mark.rstrip()
    return mark + text if mark.endswith("\n") else f"{mark} {text}"


def pieces(messages: Sequence[Message], template: Template = "world") -> list[Piece]:
    """A whole chat, cut where each answer begins and where it has ended.

    An answer begins after its mark, with the space, and goes on up to and including the blank line after it; the last
    one of a chat ends with the document instead. Answers that are empty or not `Message.trained` are not `said`.
    """
    found: list[Piece] = []
    before = ""
    for place, message in enumerate(messages):
        text = turn(message, template) + (SEPARATOR if place < len(messages) - 1 else "")
        mark = MARKS["assistant"]
        if message.role == "assistant" and message.trained and text.strip() != mark:
            found += [Piece(before + mark, False), Piece(text[len(mark) :], True)]
            before = ""
        else:
            before += text
    return [*found, Piece(before, False)] if before else found


def document(messages: Sequence[Message], template: Template = "world") -> str:
    """A whole chat as a training document (the end of document is the tokenizer's business)."""
    return SEPARATOR.join(turn(message, template) for message in messages)


def prompt(messages: Sequence[Message], thinking: Thinking = "none", template: Template = "world") -> str:
    """The text after which the model answers.

    Args:
        messages: the chat so far; the last one is usually the user's.
        thinking: how a G1 model should reason. "none": as a World model; "quick": it answers at once, with its thoughts
            left empty; "think": it thinks first; "bit", "lot": the same with a word on the length.
        template: of the messages.
    """
    if messages and messages[-1].role == "user" and _REQUEST[thinking]:
        last = messages[-1]
        messages = [*messages[:-1], Message(last.role, clean(last.text) + _REQUEST[thinking])]
    turns = [turn(message, template) for message in messages]
    return SEPARATOR.join([*turns, MARKS["assistant"] + answer_begin(thinking)])


def answer_begin(thinking: Thinking = "none") -> str:
    """What the prompt already holds of the answer: to be shown or stored before the generated text."""
    return _BEGIN[thinking]


def stop_strings(thinking: Thinking = "none") -> tuple[str, ...]:
    """Where an answer ends (besides the end of document). Thoughts may hold blank lines: there a new turn ends it."""
    if thinking in ("none", "quick"):
        return (SEPARATOR,)
    return tuple(SEPARATOR + MARKS[role] for role in ("user", "assistant", "system"))


def with_tools(messages: Sequence[Message], tools: Sequence[Any]) -> list[Message]:
    """A chat whose system message, made if there is none, offers functions: ``- name(argument: type, …)``, a line each.

    Args:
        messages: the chat.
        tools: as in OpenAI's API, ``{"type": "function", "function": {"name": …, "parameters": {JSON schema}}}``, or
            only what stands under ``function``.

    Raises:
        ValueError: one of them is something else.
    """
    lines = ["Tools:", *(f"- {_signature(tool)}" for tool in tools), "Return only a JSON function call."]
    offer = "\n".join(lines)
    if messages and messages[0].role == "system":
        first = messages[0]
        return [replace(first, text="\n".join(filter(None, [clean(first.text), offer]))), *messages[1:]]
    return [Message("system", offer), *messages]


def _signature(tool: Any) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise ValueError(_("a tool has no name"))
    schema = function.get("parameters") or {}
    arguments = schema.get("properties") or {} if isinstance(schema, Mapping) else None
    if not isinstance(arguments, Mapping):
        raise ValueError(_("the parameters of the tool {name} are no JSON schema", name=name))
    return f"{name}({', '.join(f'{argument}: {_type(kind)}' for argument, kind in arguments.items())})"


def _type(schema: Any) -> str:
    kind = schema.get("type", "any") if isinstance(schema, Mapping) else "any"
    return "|".join(map(str, kind)) if isinstance(kind, list) else str(kind)
