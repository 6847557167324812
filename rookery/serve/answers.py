"""Answers of the engine in OpenAI's form, whole or as a stream of events."""

from __future__ import annotations

import base64
import codecs
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel

from rookery import __version__
from rookery.infer import Handle, Piece, Token
from rookery.infer.request import Finish
from rookery.serve.prompts import Chat, Completions
from rookery.serve.reading import AnswerReader, Part
from rookery.serve.schema import (
    AnswerMessage,
    CallDelta,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChoiceLogprobs,
    Completion,
    Delta,
    DeltaChoice,
    Embedding,
    Embeddings,
    EmbeddingUsage,
    FinishReason,
    PromptDetails,
    TextChoice,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from rookery.tokenizer import Tokenizer

FINGERPRINT = f"rookery-{__version__}"

LEAST_LOGPROB = -9999.0
"""JSON has no minus infinity."""

Pieces = AsyncIterator[tuple[int, Piece | None]]


def dump(answer: BaseModel) -> str:
    """JSON of an answer: fields that were set, also those set to null."""
    return answer.model_dump_json(exclude_unset=True)


@dataclass
class Frame:
    """What all parts of one answer have in common.

    Attributes:
        model: its name.
        tokenizer: the model's.
        n: answers to each prompt.
        kind: what its id begins with.
    """

    model: str
    tokenizer: Tokenizer
    n: int
    kind: str
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = new_id(self.kind)

    def head(self, kind: str) -> dict[str, object]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }

    def usage(self, handles: list[Handle]) -> Usage:
        """A prompt counts once, however many answers it has."""
        prompts = handles[:: self.n]
        prompt = sum(handle.usage.prompt for handle in prompts)
        completion = sum(handle.usage.completion for handle in handles)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(handle.usage.cached for handle in prompts)),
        )


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


class ChatWriter:
    """Puts the answers of a chat together.

    Args:
        frame: see there.
        asked: the chat.
        handles: the engine's, one a choice.
    """

    def __init__(self, frame: Frame, asked: Chat, handles: list[Handle]) -> None:
        self.frame, self.handles = frame, handles
        self.logprobs = asked.requests[0].logprobs is not None
        self._readers = [AnswerReader(asked.begin, asked.tools) for _handle in handles]
        self._calls = [0] * len(handles)

    async def whole(self, pieces: Pieces) -> ChatCompletion:
        """The answer when all of it is there."""
        deltas: list[list[Delta]] = [[] for _handle in self.handles]
        tokens: list[list[Token]] = [[] for _handle in self.handles]
        async for index, piece in pieces:
            deltas[index] += self._deltas(index, piece)
            tokens[index] += piece.tokens if piece else ()
        return ChatCompletion(
            **self.frame.head("chat.completion"),
            choices=[
                ChatChoice(
                    index=index,
                    message=_message(deltas[index]),
                    logprobs=self._logprobs(tokens[index]),
                    finish_reason=self._finish(index, handle.finish),
                )
                for index, handle in enumerate(self.handles)
            ],
            usage=self.frame.usage(self.handles),
        )

    async def events(self, pieces: Pieces, with_usage: bool) -> AsyncIterator[str]:
        """The answer as it comes, as JSON texts; `with_usage` adds the figures at the end."""
        for index in range(len(self.handles)):
            yield self._chunk(index, Delta(role="assistant", content=""), with_usage)
        async for index, piece in pieces:
            deltas = self._deltas(index, piece)
            logprobs = self._logprobs(piece.tokens) if piece else None
            if not deltas and logprobs and logprobs.content:
                deltas = [Delta(content="")]
            for delta in deltas:
                yield self._chunk(index, delta, with_usage, logprobs)
                logprobs = None
            if piece is None:
                finish = self._finish(index, self.handles[index].finish)
                yield self._chunk(index, Delta(), with_usage, finish=finish)
        if with_usage:
            head = self.frame.head("chat.completion.chunk")
            yield dump(ChatChunk(**head, choices=[], usage=self.frame.usage(self.handles)))

    def _chunk(
        self,
        index: int,
        delta: Delta,
        with_usage: bool,
        logprobs: ChoiceLogprobs | None = None,
        finish: FinishReason | None = None,
    ) -> str:
        choice = DeltaChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        usage = {"usage": None} if with_usage else {}
        return dump(ChatChunk(**self.frame.head("chat.completion.chunk"), choices=[choice], **usage))

    def _deltas(self, index: int, piece: Piece | None) -> list[Delta]:
        reader = self._readers[index]
        parts = reader.finish() if piece is None else reader.feed(piece.text)
        return [self._delta(index, part) for part in parts]

    def _delta(self, index: int, part: Part) -> Delta:
        if part.kind == "text":
            return Delta(content=part.text)
        if part.kind == "thoughts":
            return Delta(reasoning_content=part.text)
        first = self._calls[index]
        self._calls[index] += len(part.calls)
        return Delta(
            tool_calls=[
                CallDelta(
                    index=first + place,
                    id=new_id("call"),
                    type="function",
                    function=CalledFunction(name=call.name, arguments=json.dumps(call.arguments, ensure_ascii=False)),
                )
                for place, call in enumerate(part.calls)
            ]
        )

    def _finish(self, index: int, finish: Finish) -> FinishReason:
        return "tool_calls" if self._calls[index] else _finish_reason(finish)

    def _logprobs(self, tokens: Iterable[Token]) -> ChoiceLogprobs | None:
        if not self.logprobs:
            return None
        content = [
            TokenLogprob(
                **_described(token.data, token.logprob).model_dump(),
                top_logprobs=[_described(data_of(self.frame.tokenizer, id), value) for id, value in token.top],
            )
            for token in tokens
        ]
        return ChoiceLogprobs(content=content, refusal=None)


def _message(deltas: list[Delta]) -> AnswerMessage:
    """One message of all its parts."""
    text = "".join(delta.content or "" for delta in deltas)
    thoughts = "".join(delta.reasoning_content or "" for delta in deltas)
    calls = [call.model_copy() for delta in deltas for call in delta.tool_calls or []]
    for call in calls:
        call.model_fields_set.discard("index")  # only a stream counts them
    return AnswerMessage(
        role="assistant",
        content=None if calls and not text else text,
        refusal=None,
        **({"reasoning_content": thoughts} if thoughts else {}),
        **({"tool_calls": calls} if calls else {}),
    )


class CompletionWriter:
    """Puts plain completions together; see `ChatWriter`."""

    def __init__(self, frame: Frame, asked: Completions, handles: list[Handle]) -> None:
        self.frame, self.handles = frame, handles
        self.logprobs = asked.requests[0].logprobs is not None
        self._echoes = [echo for echo in asked.echoes for _answer in range(frame.n)]
        self._offsets = [0] * len(handles)
        self._decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _handle in handles]

    async def whole(self, pieces: Pieces) -> Completion:
        """The answer when all of it is there."""
        texts = list(self._echoes) or [""] * len(self.handles)
        tokens: list[list[Token]] = [[] for _handle in self.handles]
        async for index, piece in pieces:
            if piece:
                texts[index] += piece.text
                tokens[index] += piece.tokens
        choices = [
            TextChoice(
                index=index,
                text=texts[index],
                logprobs=self._logprobs(index, [*handle.prompt, *tokens[index], *_ending(handle)]),
                finish_reason=_finish_reason(handle.finish),
            )
            for index, handle in enumerate(self.handles)
        ]
        head = self.frame.head("text_completion")
        return Completion(**head, choices=choices, usage=self.frame.usage(self.handles))

    async def events(self, pieces: Pieces, with_usage: bool) -> AsyncIterator[str]:
        """The answer as it comes, as JSON texts."""
        unsaid = dict(enumerate(self._echoes))
        async for index, piece in pieces:
            handle = self.handles[index]
            if index in unsaid:
                yield self._chunk(index, Piece(unsaid.pop(index), tuple(handle.prompt)), with_usage)
            if piece is None:
                finish = _finish_reason(handle.finish)
                yield self._chunk(index, Piece("", _ending(handle)), with_usage, finish)
            else:
                yield self._chunk(index, piece, with_usage)
        if with_usage:
            head = self.frame.head("text_completion")
            yield dump(Completion(**head, choices=[], usage=self.frame.usage(self.handles)))

    def _chunk(self, index: int, piece: Piece, with_usage: bool, finish: FinishReason | None = None) -> str:
        logprobs = self._logprobs(index, piece.tokens) if piece.tokens else None
        choice = TextChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=finish)
        usage = {"usage": None} if with_usage else {}
        return dump(Completion(**self.frame.head("text_completion"), choices=[choice], **usage))

    def _logprobs(self, index: int, tokens: Iterable[Token]) -> TextLogprobs | None:
        if not self.logprobs:
            return None
        texts: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token in tokens:
            texts.append(token.data.decode("utf-8", "replace"))
            values.append(None if token.logprob is None else _finite(token.logprob))
            tops.append(None if token.logprob is None else self._top(token))
            offsets.append(self._offsets[index])
            # A character of several tokens is there with the last of them.
            self._offsets[index] += len(self._decoders[index].decode(token.data))
        return TextLogprobs(tokens=texts, token_logprobs=values, top_logprobs=tops, text_offset=offsets)

    def _top(self, token: Token) -> dict[str, float]:
        """The likeliest tokens by their text; of several that are pieces of a character, and so have none of their own,
        the likeliest."""
        described = ((data_of(self.frame.tokenizer, id), value) for id, value in reversed(token.top))
        return {data.decode("utf-8", "replace"): _finite(value) for data, value in described}


def embeddings(model: str, handles: list[Handle], encoding: str) -> Embeddings:
    """Vectors of length 1, as numbers or as base64 of fp32 in little-endian order."""
    prompt = sum(handle.usage.prompt for handle in handles)

    def encoded(vector: list[float]) -> list[float] | str:
        return base64.b64encode(np.array(vector, "<f4").tobytes()).decode() if encoding == "base64" else vector

    return Embeddings(
        object="list",
        data=[
            Embedding(object="embedding", index=index, embedding=encoded(handle.embedding))
            for index, handle in enumerate(handles)
        ],
        model=model,
        usage=EmbeddingUsage(prompt_tokens=prompt, total_tokens=prompt),
    )


def _ending(handle: Handle) -> tuple[Token, ...]:
    """The token that ended the answer, where it was the end of a document. Clients that count back from the last
    token, as lm-eval does, need it among the others; it has no text."""
    return () if handle.stopped_by is None else (handle.stopped_by,)


def _finish_reason(finish: Finish) -> FinishReason:
    """An answer that was ended because its time was over has, like one that is too long, reached a limit."""
    return "stop" if finish == "stop" else "length"


def _finite(logprob: float | None) -> float:
    return max(LEAST_LOGPROB, logprob if logprob is not None else LEAST_LOGPROB)


def _described(data: bytes, logprob: float | None) -> TopLogprob:
    return TopLogprob(token=data.decode("utf-8", "replace"), logprob=_finite(logprob), bytes=list(data))


def data_of(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token stands for; U+FFFD for an id that the model has and the vocabulary has not."""
    try:
        return tokenizer.decode_bytes([token])
    except ValueError:
        return "\ufffd".encode()
