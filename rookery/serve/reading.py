"""Taking an answer apart while it comes: thoughts, text, and calls of functions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from rookery.tokenizer.chat import Call

FENCE = "```json"
_PERHAPS_FENCE = re.compile(r"\s*(?:`{1,2}|```(?:j(?:so?)?)?)?$")
_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Part:
    """A piece of one kind; `calls` are whole."""

    kind: Literal["thoughts", "text", "calls"]
    text: str = ""
    calls: tuple[Call, ...] = ()


class AnswerReader:
    """Feed it an answer's pieces; it gives back what is certain.

    Blanks before the thoughts, before the text and after the thoughts belong to the template, not to the answer.

    Args:
        begin: what the prompt already held of the answer.
        tools: names of the functions that may be called; without any, JSON is text.
    """

    def __init__(self, begin: str = "", tools: frozenset[str] = frozenset()) -> None:
        self._held = begin
        self._tools = tools
        self._phase: Literal["begin", "thoughts", "text", "call"] = "begin"
        self._spoken = False
        self._before = ""

    def feed(self, text: str) -> list[Part]:
        """Take the next piece."""
        self._held += text
        parts: list[Part] = []
        while (phase := self._phase) and self._advance(parts) and phase != self._phase:
            pass
        return parts

    def finish(self) -> list[Part]:
        """The answer has ended: what was held back."""
        parts: list[Part] = []
        if self._phase == "call":
            parts = self._called(self._held.rstrip().removesuffix("```"))
        elif self._phase == "thoughts":
            parts = _part("thoughts", self._held.rstrip())
        if not parts and self._phase != "thoughts":
            parts = _part("text", self._before + self._held)
        self._held = self._before = ""
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """Do what can be done in this phase; True if the next one may go on with the rest."""
        return {"begin": self._begin, "thoughts": self._think, "text": self._speak, "call": self._call}[self._phase](
            parts
        )

    def _begin(self, _parts: list[Part]) -> bool:
        self._held = self._held.lstrip()
        if self._held.startswith(_OPEN):
            self._held = self._held.removeprefix(_OPEN)
            self._phase = "thoughts"
            return True
        if _OPEN.startswith(self._held):
            return False
        self._phase = "text"
        return True

    def _think(self, parts: list[Part]) -> bool:
        if not self._spoken:
            self._held = self._held.lstrip()
        thoughts, end, rest = self._held.partition(_CLOSE)
        if end:
            parts += _part("thoughts", thoughts.rstrip())
            self._held, self._phase, self._spoken = rest.lstrip(), "text", False
            return True
        keep = re.search(r"\s*(?:<(?:/(?:t(?:h(?:i(?:nk?)?)?)?)?)?)?$", self._held)
        assert keep is not None
        self._say("thoughts", keep.start(), parts)
        return False

    def _speak(self, parts: list[Part]) -> bool:
        if not self._spoken:
            self._held = self._held.lstrip()
        if not self._tools:
            self._say("text", len(self._held), parts)
            return False
        if not self._spoken and self._held.startswith(("{", "[")):
            self._phase = "call"
            return True
        text, fence, rest = self._held.partition(FENCE)
        if fence:
            said = text.rstrip()
            parts += _part("text", said)
            # Given back if it turns out to be no call.
            self._before = text[len(said) :] + fence
            self._held, self._phase = rest, "call"
            return True
        keep = _PERHAPS_FENCE.search(self._held)
        assert keep is not None
        self._say("text", keep.start(), parts)
        return False

    def _call(self, parts: list[Part]) -> bool:
        # Strings in JSON hold no line breaks, so this is where the block ends.
        text, end, rest = self._held.partition("\n```")
        if not self._before or not end:
            return False
        calls = self._called(text)
        parts += calls or _part("text", self._before + text + end)
        self._held, self._before = rest, ""
        self._phase, self._spoken = "text", not calls
        return True

    def _called(self, text: str) -> list[Part]:
        calls = calls_in(text, self._tools)
        return [Part("calls", calls=calls)] if calls else []

    def _say(self, kind: Literal["thoughts", "text"], size: int, parts: list[Part]) -> None:
        parts += _part(kind, self._held[:size])
        self._spoken = self._spoken or size > 0
        self._held = self._held[size:]


def _part(kind: Literal["thoughts", "text"], text: str) -> list[Part]:
    return [Part(kind, text)] if text else []


def calls_in(text: str, tools: frozenset[str]) -> tuple[Call, ...]:
    """The calls that a JSON text holds, one or a list; none if it is anything else or names an unknown function."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    calls = []
    for entry in found if isinstance(found, list) else [found]:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in tools:
            return ()
        if not isinstance(arguments := entry.get("arguments", {}), dict):
            return ()
        calls.append(Call(name, arguments))
    return tuple(calls)
