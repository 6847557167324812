"""What a row of a .jsonl or .json file says: plain text, or a conversation in one of the formats that people use.

* text: ``{"text": …}``, a document as it is.
* messages: OpenAI's chat format, ``{"messages": [{"role": …, "content": …}, …], "tools": […]}``.
* sharegpt: ``{"conversations": [{"from": "human", "value": …}, …]}``, with ``system`` and ``tools`` beside.
* alpaca: ``{"instruction": …, "input": …, "output": …}``, with ``system`` and ``history`` (pairs) beside.
* prompt: ``{"prompt": …, "completion": …}``, or two fields of other names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer import chat
from rookery.tokenizer.chat import Call, Message, Role, Template

FORMATS = ("text", "messages", "sharegpt", "alpaca", "prompt")

FIELDS = (("prompt", "completion"), ("prompt", "response"), ("query", "response"), ("question", "answer"))
"""Pairs of fields that are taken for prompt and completion without being told."""

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of the speakers in the wild."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")
"""Keys of a message that hold what the assistant thought."""

_THINK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


class BadRow(Exception):
    """Why a row is no document, for people."""


class Document(NamedTuple):
    """A training document.

    Attributes:
        text: as UTF-8.
        answers: byte offsets at which an answer begins and has ended, in turns; None: all of the text counts.
        thoughts_lost: whether the template leaves out thoughts.
    """

    text: bytes
    answers: tuple[int, ...] | None = None
    thoughts_lost: bool = False


@dataclass(frozen=True)
class RowReader:
    """Makes documents of rows.

    Attributes:
        format: one of `FORMATS`.
        template: how a conversation becomes text.
        fields: of a row of format "prompt".
    """

    format: str = "text"
    template: Template = "world"
    fields: tuple[str, str] = FIELDS[0]

    def read(self, row: Any) -> Document:
        """The document of a row, which is what JSON gave for it.

        Raises:
            BadRow: it has another form.
        """
        if not isinstance(row, dict):
            raise BadRow(_("not an object of the form {example}", example=self._example()))
        if self.format == "text":
            return Document(_utf8(_string(row, "text")))
        try:
            messages = self.messages(row)
        except BadRow as error:
            self._explain(row, error)
            raise
        pieces = chat.pieces(messages, self.template)
        answers: list[int] = []
        parts: list[bytes] = []
        place = 0
        for text, said in pieces:
            parts.append(_utf8(text))
            if said:
                answers += [place, place + len(parts[-1])]
            place += len(parts[-1])
        lost = self.template != "g1" and any(message.thoughts.strip() for message in messages)
        return Document(b"".join(parts), tuple(answers), lost)

    def messages(self, row: Mapping[str, Any]) -> list[Message]:
        """The conversation of a row of any format but "text".

        Raises:
            BadRow: it has another form.
        """
        if self.format == "messages":
            messages = _messages(row, "messages")
        elif self.format == "sharegpt":
            messages = _messages(row, "conversations" if "conversations" in row else "conversation")
        elif self.format == "alpaca":
            messages = _alpaca(row)
        else:
            prompt, completion = self.fields
            messages = [*_side(row, prompt, "user"), *_side(row, completion, "assistant")]
        system = row.get("system")
        if isinstance(system, str) and system.strip() and (not messages or messages[0].role != "system"):
            messages.insert(0, Message("system", system))
        tools = row.get("tools")
        if isinstance(tools, str):
            tools = _parsed(tools) if tools.strip() else None
        if tools:
            if not isinstance(tools, list):
                raise BadRow(_("{key} is not a list", key='"tools"'))
            try:
                messages = chat.with_tools(messages, tools)
            except ValueError as error:
                raise BadRow(str(error)) from error
        return messages

    def _example(self) -> str:
        return {
            "text": '{"text": "…"}',
            "messages": '{"messages": […]}',
            "sharegpt": '{"conversations": […]}',
            "alpaca": '{"instruction": "…", "output": "…"}',
            "prompt": f'{{"{self.fields[0]}": "…", "{self.fields[1]}": "…"}}',
        }[self.format]

    def _explain(self, row: dict[str, Any], error: BadRow) -> None:
        """Say so if a row that could not be read is one of another format."""
        other = recognise(row)
        if other is not None and other[0] != self.format:
            message = _(
                "{reason}; this row is {found}, and the file is read as {format}",
                reason=error,
                found=other[0],
                format=self.format,
            )
            raise BadRow(message) from error


def recognise(row: Any) -> tuple[str, tuple[str, str]] | None:
    """Format and fields of a row by its keys; None when they say nothing.

    What has structure comes first: some files repeat it as ``text`` in a template that is not ours.
    """
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("messages"), list):
        return "messages", FIELDS[0]
    if isinstance(row.get("conversations"), list) or isinstance(row.get("conversation"), list):
        return "sharegpt", FIELDS[0]
    if "instruction" in row and "output" in row:
        return "alpaca", FIELDS[0]
    for pair in FIELDS:
        if pair[0] in row and pair[1] in row:
            return "prompt", pair
    return ("text", FIELDS[0]) if "text" in row else None


def choose_reader(
    path: str,
    first_rows: Iterable[Any],
    data_format: str = "auto",
    fields: Sequence[str] | None = None,
    template: Template = "world",
) -> RowReader:
    """The reader of a file's rows.

    Args:
        path: of the file, for messages.
        first_rows: what JSON gave for the first of them.
        data_format: one of `FORMATS`, or "auto".
        fields: names of the two fields that hold prompt and completion; they choose format "prompt".
        template: of conversations.

    Raises:
        UserError: nothing is said, and none of the first rows is of a known format.
    """
    if data_format not in ("auto", *FORMATS):
        known = ", ".join(("auto", *FORMATS))
        raise UserError(_("data_format {format}: expected one of {known}", format=data_format, known=known))
    if template not in get_args(Template):
        known = ", ".join(get_args(Template))
        raise UserError(_("template {template}: expected one of {known}", template=template, known=known))
    if fields:
        if len(fields) != 2:
            names = ", ".join(fields)
            raise UserError(_("sft_field takes two names, of prompt and completion, not {names}", names=names))
        if data_format not in ("auto", "prompt"):
            raise UserError(_("sft_field names the fields of data_format prompt, not {format}", format=data_format))
        return RowReader("prompt", template, (fields[0], fields[1]))
    rows = list(first_rows)
    found = [known for known in map(recognise, rows) if known is not None]
    if data_format != "auto":
        pair = next((known[1] for known in found if known[0] == "prompt"), FIELDS[0])
        return RowReader(data_format, template, pair)
    if found:
        return RowReader(found[0][0], template, found[0][1])
    keys = sorted({str(key) for row in rows if isinstance(row, dict) for key in row})
    if keys:
        message = _(
            "{path}: rows with the keys {keys} are of no known format (text, messages, conversations, "
            "instruction and output, prompt and completion); name the two fields of prompt and completion as sft_field",
            path=path,
            keys=", ".join(keys),
        )
        raise UserError(message)
    return RowReader("text", template)


def _messages(row: Mapping[str, Any], key: str) -> list[Message]:
    items = row.get(key)
    if items is None:
        raise BadRow(_("no key {key}", key=f'"{key}"'))
    if not isinstance(items, list):
        raise BadRow(_("{key} is not a list", key=f'"{key}"'))
    return [_message(item, number) for number, item in enumerate(items, 1)]


def _message(item: Any, number: int) -> Message:
    if not isinstance(item, dict):
        raise BadRow(_("message {number} is not an object", number=number))
    name = item.get("role", item.get("from"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        known = "system, user, assistant, tool"
        raise BadRow(
            _("message {number} has the role {role}; known are {known}", number=number, role=repr(name), known=known)
        )
    content = item.get("content", item.get("value"))
    text, thoughts = _content(content, number)
    if name == "function_call":
        return Message(role, "", calls=(_call(_parsed(text), number),))
    calls = item.get("tool_calls") or list(filter(None, [item.get("function_call")]))
    if not isinstance(calls, list):
        raise BadRow(_("message {number}: {key} is not a list", number=number, key='"tool_calls"'))
    if content is None and not calls:
        raise BadRow(_("message {number} has no content", number=number))
    for key in THOUGHTS:
        value = item.get(key)
        if isinstance(value, str) and value.strip():
            thoughts = value
    if role == "assistant" and (inline := _THINK.match(text)):
        thoughts, text = thoughts or inline[1], text[inline.end() :]
    found = tuple(_call(call, number) for call in calls)
    return Message(role, text, thoughts, found, trained=item.get("weight", 1) != 0)


def _content(content: Any, number: int) -> tuple[str, str]:
    """Text and thoughts of a message's content: a string, or a list of parts."""
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise BadRow(_("message {number}: the content is neither a string nor a list of parts", number=number))
    texts, thoughts = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("thinking"), str):
            thoughts.append(part["thinking"])
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = repr(part.get("type")) if isinstance(part, dict) else repr(part)
            raise BadRow(_("message {number} has a part {kind}; only text can be trained", number=number, kind=kind))
    return "\n".join(texts), "\n".join(thoughts)


def _call(value: Any, number: int) -> Call:
    function = value.get("function", value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise BadRow(_("message {number} calls a tool without a name", number=number))
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments) if arguments.strip() else {}
    return Call(name, arguments)


def _parsed(text: str) -> Any:
    """What JSON says, or the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow(_("{key} is not a list of pairs", key='"history"'))
    messages = []
    for question, answer in history:
        if not isinstance(question, str) or not isinstance(answer, str):
            raise BadRow(_("{key} is not a list of pairs", key='"history"'))
        messages += [Message("user", question), _answer(answer)]
    question = "\n".join(filter(None, [_string(row, "instruction"), _optional(row, "input")]))
    return [*messages, Message("user", question), _answer(_string(row, "output"))]


def _side(row: Mapping[str, Any], field: str, role: Role) -> list[Message]:
    """Prompt or completion: a string, or messages."""
    if isinstance(row.get(field), list):
        return _messages(row, field)
    text = _string(row, field)
    return [_answer(text) if role == "assistant" else Message(role, text)]


def _answer(text: str) -> Message:
    """What the assistant says, its thoughts taken from in front of it."""
    inline = _THINK.match(text)
    return Message("assistant", text[inline.end() :], inline[1]) if inline else Message("assistant", text)


def _string(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        raise BadRow(_("no key {key}", key=f'"{key}"'))
    if not isinstance(value, str):
        raise BadRow(_("{key} is not a string", key=f'"{key}"'))
    return value


def _optional(row: Mapping[str, Any], key: str) -> str:
    return _string(row, key) if row.get(key) is not None else ""


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(_("the text has half of a surrogate pair (\\ud800 to \\udfff), which is no character")) from error
