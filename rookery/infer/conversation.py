"""A conversation with a model: the recurrent state carried from turn to turn, so that no turn is read twice."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rookery.errors import UserError
from rookery.i18n import _
from rookery.infer.forms import Form
from rookery.infer.generation import Generation
from rookery.infer.sampler import Sampling
from rookery.infer.template import TEMPLATES, Template
from rookery.models import State
from rookery.tokenizer import Tokenizer, chat

FORMAT = "rookery-conversation"


class Conversation:
    """Turns of a person and a model.

    Args:
        form: the model (`rookery.infer.form_of`).
        tokenizer: its tokenizer.
        system: what the model is told first.
        template: how turns become text.
        start: state before the first word, (L, 1, ...); None for the model's own.

    Attributes:
        system, template: as given; a change takes effect when the conversation begins anew.
        thinking: how a G1 model should reason; may be changed at any time.
        messages: every turn so far, the system message included.
        state: the model's state after all of it but `unread`; None at the beginning.
        unread: tokens to be read before the next turn.
        tokens: tokens read or generated so far.
        generation: the answer in progress or the last one.
    """

    def __init__(
        self,
        form: Form,
        tokenizer: Tokenizer,
        system: str = "",
        *,
        template: Template = TEMPLATES["chat"],
        thinking: chat.Thinking = "none",
        start: State | None = None,
    ) -> None:
        self._form = form
        self._tokenizer = tokenizer
        self._start = start
        self.system, self.template, self.thinking = system, template, thinking
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[chat.Message] = []
        self.state: State | None = None
        self.unread: list[int] = []
        self.tokens = 0
        self.generation: Generation | None = None
        self._before: tuple[list[chat.Message], State | None, list[int], int] | None = None

    def ask(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Say something; yields the answer in pieces, without the blanks around it.

        The template's stop texts and the end of document are added to those of `sampling`. When the answer ends, or the
        caller stops asking for pieces, the turn is part of the conversation.

        Raises:
            UserError: the tokenizer cannot encode the text; the conversation is as it was.
        """
        turns = [chat.Message("user", text)]
        if not self.messages and self.system:
            turns.insert(0, chat.Message("system", self.system))
        separator = chat.SEPARATOR if self.messages and not self.template.plain else ""
        ids = self.unread + self._tokenizer.encode(separator + self.template.prompt(turns, self.thinking))
        ends = self._tokenizer.end_of_document
        stop = (*self.template.stops(self.thinking), *sampling.stop)
        sampling = replace(sampling, stop=stop, token_stop=() if ends is None else (ends,))
        start = self._start if self.state is None else self.state
        self.generation = Generation(self._form, self._tokenizer, ids, sampling, start)
        return self._answer(turns, self.generation)

    def again(self, sampling: Sampling) -> Iterator[str]:
        """Answer the last thing said once more, in the place of the answer it got.

        Raises:
            UserError: nothing was said yet.
        """
        if self._before is None:
            raise UserError(_("Nothing was said yet."))
        said = next(message.text for message in reversed(self.messages) if message.role == "user")
        self.messages, self.state, self.unread, self.tokens = self._before
        return self.ask(said, sampling)

    def stop(self) -> None:
        """End the answer in progress; for a signal handler or another thread."""
        if self.generation:
            self.generation.cancel()

    def _answer(self, turns: list[chat.Message], generation: Generation) -> Iterator[str]:
        read = generation.read - len(self.unread)
        before = (list(self.messages), self.state, list(self.unread), self.tokens)
        shown = "" if self.template.plain else chat.answer_begin(self.thinking).lstrip()
        trimmed = not shown and not self.template.plain
        try:
            if shown:
                yield shown
            for piece in generation:
                if trimmed:
                    piece = piece.lstrip()
                    trimmed = not piece
                if piece:
                    shown += piece
                    yield piece
        finally:
            self._before = before
            self.state, self.unread = generation.state, generation.unread
            self.tokens += read + len(generation.sequence.tokens)
            self.messages += [*turns, chat.Message("assistant", shown.strip())]

    def warm_up(self) -> None:
        """Have everything compiled that an answer needs; may run in another thread."""
        with torch.inference_mode():
            slots = self._form.slots(1)
            self._form.head(self._form.read(slots, 0, [0, 0])[-1:])
            self._form.step(slots, [0], [0])

    def save(self, path: str | Path) -> None:
        """Write the conversation to a file: the text alone (.txt, .md), else everything needed to go on (safetensors).

        Raises:
            UserError: nothing was said yet, or the file cannot be written.
        """
        path = Path(path)
        if self.state is None:
            raise UserError(_("Nothing was said yet, so there is nothing to save."))
        if path.is_dir():
            raise UserError(_("Cannot write {path}: {reason}", path=path, reason=os.strerror(errno.EISDIR)))
        partial = path.with_name(path.name + ".partial")
        try:
            if path.suffix.lower() in (".txt", ".md"):
                partial.write_text(self.text() + "\n", encoding="utf-8")
            else:
                self._write(partial, self.state)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(_("Cannot write {path}: {reason}", path=path, reason=reason)) from error
        finally:
            with suppress(OSError):
                partial.unlink()

    def _write(self, path: Path, state: State) -> None:
        conversation = {
            "messages": [[message.role, message.text] for message in self.messages],
            "system": self.system,
            "template": asdict(self.template),
            "version": self._form.model.version,
            "unread": self.unread,
            "tokens": self.tokens,
        }
        tensors = {
            "att_shift": state.att_shift.contiguous(),
            "wkv": state.wkv.contiguous(),
            "ffn_shift": state.ffn_shift.contiguous(),
        }
        save_file(tensors, path, {"format": FORMAT, "conversation": json.dumps(conversation, ensure_ascii=False)})

    def load(self, path: str | Path) -> None:
        """Go on with a conversation that `save` wrote.

        Raises:
            UserError: the file is missing, is something else, or belongs to a model of another shape.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(_("{path} is not a conversation that /save wrote.", path=path))
                said = json.loads(metadata["conversation"])
                state = State(*(file.get_tensor(name) for name in ("att_shift", "wkv", "ffn_shift")))
                messages = [chat.Message(role, str(text)) for role, text in said["messages"]]
                unread, tokens, system = [int(i) for i in said["unread"]], int(said["tokens"]), str(said["system"])
                vocabulary = self._form.model.shape.vocab_size
                if not all(0 <= i < vocabulary for i in unread) or {m.role for m in messages} - set(chat.MARKS):
                    raise ValueError(_("it names tokens or speakers that there are not"))
                marks = said.get("template", asdict(self.template))
                template = Template(*(str(marks[name]) for name in ("user", "assistant", "system")))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(_("Cannot read the conversation {path}: {reason}", path=path, reason=error)) from error
        own = self._form.model.version
        if said.get("version", own) != own:
            raise UserError(
                _(
                    "{path} is of a model of version {version}, and this one is {own}.",
                    path=path,
                    version=said["version"],
                    own=own,
                )
            )
        expected = self._form.initial()
        for name in ("att_shift", "wkv", "ffn_shift"):
            given, wanted = getattr(state, name), getattr(expected, name)
            if given.shape != wanted.shape:
                raise UserError(
                    _(
                        "{path} belongs to another model: its {name} is {given} and this model's is {wanted}.",
                        path=path,
                        name=name,
                        given=tuple(given.shape),
                        wanted=tuple(wanted.shape),
                    )
                )
            setattr(state, name, given.to(wanted))
        self.messages, self.state, self.unread, self.tokens = messages, state, unread, tokens
        self.system, self.template = system, template
        self.generation = self._before = None

    def text(self) -> str:
        """The whole conversation."""
        if self.template.plain:
            return "".join(message.text for message in self.messages)
        marks = {"user": self.template.user, "assistant": self.template.assistant, "system": self.template.system}
        return chat.SEPARATOR.join(f"{marks[message.role]} {message.text}" for message in self.messages)

    def norms(self) -> list[tuple[float, float, float]]:
        """For each layer, the norms of the state: time-mixing shift, matrix of the recurrence, channel-mixing shift."""
        if self.state is None:
            return []
        state = self.state
        parts = [torch.linalg.vector_norm(part.flatten(1).float(), dim=1) for part in vars(state).values()]
        return [(float(a), float(w), float(f)) for a, w, f in zip(*parts, strict=True)]
