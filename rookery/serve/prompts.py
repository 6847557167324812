"""From what a client asks to what the engine is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rookery.i18n import _
from rookery.infer import Constraint, Request, Sampling
from rookery.serve.errors import ApiError
from rookery.serve.reading import FENCE
from rookery.serve.schema import (
    ChatRequest,
    Choosing,
    CompletionRequest,
    Content,
    EmbeddingRequest,
    Instruction,
    NamedTool,
    ObjectFormat,
    Reply,
    SchemaFormat,
    Tool,
    ToolResult,
)
from rookery.tokenizer import Tokenizer, chat

COMPLETION_TOKENS = 16
"""Length of a plain completion when nothing is said, as OpenAI has it."""

THINKING: dict[str, chat.Thinking] = {
    "none": "none",
    "minimal": "quick",
    "low": "bit",
    "medium": "think",
    "high": "lot",
    "xhigh": "lot",
}
"""`reasoning_effort` -> how a G1 model thinks."""


@dataclass(frozen=True)
class Prompter:
    """Makes requests to the engine, for one model.

    Attributes:
        tokenizer: the model's.
        sampling: settings where a client says nothing; its `max_tokens` is the longest answer allowed.
        thinking: of a chat, where a client says nothing.
    """

    tokenizer: Tokenizer
    sampling: Sampling
    thinking: chat.Thinking = "none"

    def chat(self, asked: ChatRequest) -> Chat:
        """The prompt of a chat, and how to read what comes back.

        Raises:
            ApiError: something asked for cannot be had.
            UserError, ValueError: a text cannot be encoded, a schema is none.
        """
        messages = [_message(message) for message in asked.messages]
        tools = [] if asked.tool_choice == "none" else asked.tools or []
        forced = _forced(asked, tools)
        if tools:
            messages = chat.with_tools(messages, [tool.model_dump(exclude_unset=True) for tool in tools])
        wanted = THINKING[asked.reasoning_effort] if asked.reasoning_effort else self.thinking
        constraint, structure = _constraint(asked), _structure(asked)
        if sum(map(bool, (forced, constraint, structure))) > 1:
            raise ApiError(
                400, _("response_format, structured_outputs and a call that must be made exclude each other.")
            )
        constraint = constraint or structure
        if forced:
            constraint = Constraint.json_schema(_call_schema(forced))
        # A form holds from the first token on, which leaves no room for thoughts.
        thinking = "none" if constraint else wanted
        text = chat.prompt(messages, thinking, "g1") + (f" {FENCE}\n" if forced else "")
        begin = FENCE + "\n" if forced else chat.answer_begin(thinking)
        sampling = self._sampling(
            asked,
            self._longest(asked.max_completion_tokens or asked.max_tokens, self.sampling.max_tokens),
            () if constraint else chat.stop_strings(thinking),
        )
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, _("top_logprobs needs logprobs to be true."), param="top_logprobs")
        request = Request(
            self.tokenizer.encode(text),
            sampling,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            constraint=constraint,
        )
        return Chat(_copies(request, asked.n or 1), begin, frozenset(tool.function.name for tool in tools))

    def completion(self, asked: CompletionRequest) -> Completions:
        """The prompts of plain completions, each `n` times.

        Raises:
            ApiError, UserError, ValueError: as for `chat`.
        """
        if asked.suffix:
            raise ApiError(400, _("This model cannot fill in text before a suffix."), param="suffix")
        if asked.best_of is not None and asked.best_of != (asked.n or 1):
            raise ApiError(400, _("best_of other than n is not supported."), param="best_of")
        silent = asked.max_tokens == 0
        sampling = self._sampling(asked, 1 if silent else self._longest(asked.max_tokens, COMPLETION_TOKENS), ())
        scored = bool(asked.echo) and asked.logprobs is not None
        constraint = _structure(asked)
        prompts = self._prompts(asked.prompt)
        requests = [
            copy
            for prompt in prompts
            for copy in _copies(
                Request(
                    prompt,
                    sampling,
                    logprobs=asked.logprobs,
                    constraint=constraint,
                    score=scored,
                    silent=silent,
                ),
                asked.n or 1,
            )
        ]
        return Completions(requests, [self._text(prompt) for prompt in prompts] if asked.echo else [])

    def embedding(self, asked: EmbeddingRequest) -> list[Request]:
        """A request for each input.

        Raises:
            ApiError, UserError, ValueError: as for `chat`.
        """
        return [Request(prompt, embed=True) for prompt in self._prompts(asked.input)]

    def _prompts(self, given: str | Sequence[Any]) -> list[list[int]]:
        """Token ids of one text or several, of ids or lists of ids."""
        if isinstance(given, str):
            entries: list[Any] = [given]
        else:
            entries = [given] if isinstance(given[0], int) else list(given)
        return [self._ids(entry) if isinstance(entry, str) else entry for entry in entries]

    def _ids(self, text: str) -> list[int]:
        end = self.tokenizer.end_of_document
        if not text and end is not None:
            return [end]  # what stands before every document in the training data
        return self.tokenizer.encode(text)

    def _text(self, prompt: list[int]) -> str:
        end = self.tokenizer.end_of_document
        return self.tokenizer.decode([token for token in prompt if token != end])

    def _longest(self, asked: int | None, default: int) -> int:
        most = self.sampling.max_tokens
        if asked is not None and asked > most:
            raise ApiError(
                400,
                _("max_tokens is {asked}; this server gives {most} at most.", asked=asked, most=most),
                param="max_tokens",
            )
        return min(asked or default, most)

    def _sampling(self, asked: Choosing, max_tokens: int, stop: tuple[str, ...]) -> Sampling:
        # Who asks for the likeliest token does not mean the likeliest but for those that were said already.
        plain = {"alpha_presence": 0.0, "alpha_frequency": 0.0} if asked.temperature == 0 else {}
        given: dict[str, Any] = {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k,
            "min_p": asked.min_p,
            "alpha_presence": asked.presence_penalty,
            "alpha_frequency": asked.frequency_penalty,
            "alpha_decay": asked.penalty_decay,
            "seed": asked.seed,
        }
        end = self.tokenizer.end_of_document
        own = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        return replace(
            self.sampling,
            **(plain | {name: value for name, value in given.items() if value is not None}),
            logit_bias=tuple((int(token), amount) for token, amount in (asked.logit_bias or {}).items()),
            stop=(*own, *stop),
            token_stop=() if end is None else (end,),
            max_tokens=max_tokens,
        )


@dataclass(frozen=True)
class Chat:
    """Requests, one a choice; what the prompt holds of the answer; names of the functions that may be called."""

    requests: list[Request]
    begin: str
    tools: frozenset[str]


@dataclass(frozen=True)
class Completions:
    """Requests, `n` for each prompt in turn; the prompts' texts if they are to stand before the answers."""

    requests: list[Request]
    echoes: list[str]


def _copies(request: Request, n: int) -> list[Request]:
    """`n` requests that differ in their seeds."""
    seed = request.sampling.seed
    if seed is None or n == 1:
        return [request] * n
    return [replace(request, sampling=replace(request.sampling, seed=_wrap(seed + i))) for i in range(n)]


def _wrap(seed: int) -> int:
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _message(message: Any) -> chat.Message:
    if isinstance(message, Instruction):
        return chat.Message("system", _said(message.content))
    if isinstance(message, ToolResult):
        return chat.Message("tool", _said(message.content))
    if isinstance(message, Reply):
        calls = tuple(
            chat.Call(call.function.name, _arguments(call.function.arguments)) for call in message.tool_calls or []
        )
        return chat.Message("assistant", _said(message.content), message.reasoning_content or "", calls)
    return chat.Message("user", _said(message.content))


def _said(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def _arguments(text: str) -> Any:
    """What a call in the history was made with; the text itself if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _constraint(asked: ChatRequest) -> Constraint | None:
    wanted = asked.response_format
    if isinstance(wanted, ObjectFormat):
        return Constraint.json_object()
    if isinstance(wanted, SchemaFormat):
        return Constraint.json_schema(wanted.json_schema.form or {"type": "object"})
    return None


def _structure(asked: Choosing) -> Constraint | None:
    wanted = asked.structured_outputs
    if wanted is None:
        return None
    makers = {
        "form": Constraint.json_schema,
        "regex": Constraint.regex,
        "choice": Constraint.choice,
        "grammar": Constraint.rules,
    }
    given = [name for name in makers if getattr(wanted, name) is not None]
    if len(given) != 1:
        raise ApiError(
            400,
            _("structured_outputs holds one of json, regex, choice and grammar."),
            param="structured_outputs",
        )
    return makers[given[0]](getattr(wanted, given[0]))


def _forced(asked: ChatRequest, tools: list[Tool]) -> list[Tool]:
    """The functions of which one must be called; none if the model is free."""
    choice = asked.tool_choice
    if choice in (None, "none", "auto"):
        return []
    forced = [t for t in tools if not isinstance(choice, NamedTool) or t.function.name == choice.function.name]
    if not forced:
        raise ApiError(400, _("tool_choice names no function of tools."), param="tool_choice")
    return forced


def _call_schema(tools: list[Tool]) -> dict[str, Any]:
    """The form of one call. What the schemas of arguments define for themselves moves to the root, where they look."""
    shared: dict[str, dict[str, Any]] = {}
    calls = []
    for tool in tools:
        arguments = dict(tool.function.parameters or {})
        for key in ("$defs", "definitions"):
            definitions = arguments.pop(key, None)
            if isinstance(definitions, Mapping):
                shared.setdefault(key, {}).update(definitions)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": {"type": "object", **arguments}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, **shared}
