"""How the turns of a conversation become the text that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rookery.tokenizer import chat
from rookery.tokenizer.chat import Message, Thinking


@dataclass(frozen=True)
class Template:
    """Turns with marks before them and blank lines between, as in `rookery.tokenizer.chat`.

    Attributes:
        user, assistant, system: the marks. When `user` is empty there are no turns: the model continues the text.
    """

    user: str
    assistant: str
    system: str = chat.MARKS["system"]

    @property
    def plain(self) -> bool:
        """Whether the model just continues what is said."""
        return not self.user

    def prompt(self, messages: Sequence[Message], thinking: Thinking = "none") -> str:
        """The text after which the model answers the last of `messages`."""
        if self.plain:
            return "".join(message.text for message in messages)
        if self == TEMPLATES["chat"]:
            return chat.prompt(messages, thinking)
        turns = [f"{getattr(self, message.role)} {chat.clean(message.text)}" for message in messages]
        return chat.SEPARATOR.join([*turns, self.assistant + chat.answer_begin(thinking)])

    def stops(self, thinking: Thinking = "none") -> tuple[str, ...]:
        """The texts at which an answer ends."""
        if self.plain:
            return ()
        if self == TEMPLATES["chat"] or thinking in ("none", "quick"):
            return chat.stop_strings(thinking)
        return tuple(chat.SEPARATOR + mark for mark in (self.user, self.assistant, self.system))


TEMPLATES = {
    "chat": Template(chat.MARKS["user"], chat.MARKS["assistant"]),
    "qa": Template("Question:", "Answer:"),
    "instruct": Template("Instruction:", "Response:"),
    "text": Template("", ""),
}
"""By name: "chat" is that of the World and G1 models, the next two were also used by World models of v5 and v6."""
