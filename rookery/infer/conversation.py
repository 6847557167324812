"""A conversation with a model: the recurrent state carried from turn to turn, so that no turn is read twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rookery.errors import UserError
from rookery.i18n import _
from rookery.infer.generation import Generation
from rookery.infer.sampler import Sampling
from rookery.models import Model, State
from rookery.tokenizer import Tokenizer, chat

FORMAT = "rookery-conversation"


class Conversation:
    """Turns of User and Assistant in the chat template of the World models.

    Attributes:
        messages: every turn so far, the system message included.
        state: the model's state after all of it but `unread`; None at the beginning.
        unread: tokens to be read before the next turn.
        tokens: tokens read or generated so far.
        generation: the answer in progress or the last one.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, system: str = "") -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[chat.Message] = []
        self.state: State | None = None
        self.unread: list[int] = []
        self.tokens = 0
        self.generation: Generation | None = None

    def ask(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Say something; yields the answer in pieces, without the blanks around it.

        When the answer ends, or the caller stops asking for pieces, the turn is part of the conversation.

        Raises:
            UserError: the tokenizer cannot encode the text; the conversation is as it was.
        """
        turns = [chat.Message("user", text)]
        if not self.messages and self._system:
            turns.insert(0, chat.Message("system", self._system))
        prompt = (chat.SEPARATOR if self.messages else "") + chat.prompt(turns)
        ids = self.unread + self._tokenizer.encode(prompt)
        ends = self._tokenizer.end_of_document
        sampling = replace(sampling, stop=chat.stop_strings(), token_stop=() if ends is None else (ends,))
        self.generation = Generation(self._model, self._tokenizer, ids, sampling, self.state)
        return self._answer(turns, self.generation)

    def stop(self) -> None:
        """End the answer in progress; for a signal handler or another thread."""
        if self.generation:
            self.generation.cancel()

    def _answer(self, turns: list[chat.Message], generation: Generation) -> Iterator[str]:
        read = len(generation.unread) - len(self.unread)
        begun = False
        try:
            for piece in generation:
                shown = piece if begun else piece.lstrip()
                begun = begun or shown != ""
                if shown:
                    yield shown
        finally:
            self.state, self.unread = generation.state, generation.unread
            self.tokens += read + len(generation.sequence.tokens)
            self.messages += [*turns, chat.Message("assistant", generation.sequence.text.strip())]

    def save(self, path: str | Path) -> None:
        """Write the conversation to a file: the text alone (.txt, .md), else everything needed to go on (safetensors).

        Raises:
            UserError: nothing was said yet, or the file cannot be written.
        """
        path = Path(path)
        if self.state is None:
            raise UserError(_("Nothing was said yet, so there is nothing to save."))
        partial = path.with_name(path.name + ".partial")
        try:
            if path.suffix.lower() in (".txt", ".md"):
                partial.write_text(chat.document(self.messages) + "\n", encoding="utf-8")
            else:
                self._write(partial, self.state)
            os.replace(partial, path)
        except OSError as error:
            raise UserError(_("Cannot write {path}: {reason}", path=path, reason=error.strerror)) from error
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, path: Path, state: State) -> None:
        conversation = {
            "messages": [[message.role, message.text] for message in self.messages],
            "system": self._system,
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
        device = next(self._model.parameters()).device
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(_("{path} is not a conversation that /save wrote.", path=path))
                said = json.loads(metadata["conversation"])
                state = State(*(file.get_tensor(name).to(device) for name in ("att_shift", "wkv", "ffn_shift")))
                messages = [chat.Message(role, str(text)) for role, text in said["messages"]]
                unread, tokens, system = [int(i) for i in said["unread"]], int(said["tokens"]), str(said["system"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(_("Cannot read the conversation {path}: {reason}", path=path, reason=error)) from error
        expected = State.zeros(self._model.shape, 1, "cpu", next(self._model.parameters()).dtype)
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
            setattr(state, name, given.to(wanted.dtype))
        self.messages, self.state, self.unread, self.tokens, self._system = messages, state, unread, tokens, system
        self.generation = None

    def norms(self) -> list[tuple[float, float, float]]:
        """For each layer, the norms of the state: time-mixing shift, matrix of the recurrence, channel-mixing shift."""
        if self.state is None:
            return []
        state = self.state
        parts = [torch.linalg.vector_norm(part.flatten(1).float(), dim=1) for part in vars(state).values()]
        return [(float(a), float(w), float(f)) for a, w, f in zip(*parts, strict=True)]
