"""What goes over the wire: OpenAI's requests and answers, with our own fields marked in their descriptions.

A field that no model of this server can honour is refused unless it has its neutral value; one that has no bearing on
the answer (`user`, `metadata` …) is accepted. Fields that neither OpenAI nor Rookery knows are refused, which finds
misspelt ones.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MOST_ANSWERS = 128
MOST_STOPS = 16
MOST_TOOLS = 128
MOST_INPUTS = 2048

Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenText = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
MountName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Asked(BaseModel):
    """A request, or a part of one. A field that is null says nothing, whatever its name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name in cls.model_fields}


class Loose(BaseModel):
    """A part of a request that clients copy from answers, with fields that we need not know."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class TextPart(Loose):
    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class Instruction(Loose):
    role: Literal["system", "developer"]
    content: Content


class Question(Loose):
    role: Literal["user"]
    content: Content


class CalledFunction(Loose):
    name: str
    arguments: str = Field(description="JSON")


class ToolCall(Loose):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Reply(Loose):
    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = Field(None, description="Rookery: the thoughts before the answer")
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None


class ToolResult(Loose):
    role: Literal["tool"]
    content: Content
    tool_call_id: str = ""


ChatMessage = Annotated[Instruction | Question | Reply | ToolResult, Field(discriminator="role")]


class Function(Loose):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Loose):
    type: Literal["function"]
    function: Function


class NamedFunction(Loose):
    name: str


class NamedTool(Loose):
    type: Literal["function"]
    function: NamedFunction


class PlainFormat(Loose):
    type: Literal["text"]


class ObjectFormat(Loose):
    type: Literal["json_object"]


class NamedSchema(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True)

    name: Name
    description: str | None = None
    form: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class SchemaFormat(Loose):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(Loose):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Structure(Asked):
    """The form of an answer, as vLLM takes it; one of these."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    form: dict[str, Any] | None = Field(None, alias="json", description="A JSON schema")
    regex: Annotated[str, StringConstraints(min_length=1)] | None = Field(None, description="In Rust's syntax")
    choice: Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)] | None = None
    grammar: Annotated[str, StringConstraints(min_length=1)] | None = Field(None, description="Lark's, or GBNF")


class Choosing(Asked):
    """What chat and plain completions have in common."""

    model: str | None = Field(None, description="The model's name; this server has one, so it may be left out")
    max_tokens: int | None = Field(None, ge=1, description="Longest answer")
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenText, Bias], Field(max_length=1024)] | None = None
    user: str | None = None

    top_k: int | None = Field(None, ge=0, lt=1 << 31, description="Rookery: draw from so many tokens only")
    min_p: float | None = Field(None, ge=0, le=1, description="Rookery: least share of the likeliest's probability")
    penalty_decay: float | None = Field(None, ge=0, le=1, description="Rookery: how the penalties fade at each token")
    state: str | None = Field(None, description="Rookery: a mounted state; '' for none; left out: `default`, if any")
    adapter: str | None = Field(None, description="Rookery: a mounted adapter; likewise")
    structured_outputs: Structure | None = Field(None, description="Rookery: the form of the answer")


class ChatRequest(Choosing):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Annotated[PlainFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="How a G1 model thinks: not at all, quickly (an empty thought), a bit, freely, a lot"
    )

    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    verbosity: str | None = None


class CompletionRequest(Choosing):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_ANSWERS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_ANSWERS)]
    ) = Field(description="Text or token ids; an empty text begins a document")
    max_tokens: int | None = Field(None, ge=0, description="Longest answer; 0 for none")
    logprobs: int | None = Field(None, ge=0, le=20, description="With `echo`, of the prompt's tokens too")
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    suffix: str | None = None


class EmbeddingRequest(Asked):
    model: str | None = None
    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None
    state: str | None = None
    adapter: str | None = None


class MountRequest(Asked):
    """Mount a file under a name; one that has the name is replaced."""

    name: MountName
    file: Annotated[str, StringConstraints(min_length=1, max_length=1024)] = Field(
        description="Path inside the folder that the server allows"
    )


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class CallDelta(BaseModel):
    index: int | None = None
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[CallDelta] | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class DeltaChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[DeltaChoice]
    usage: Usage | None = None


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="None for the first token of a prompt")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None = None


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rookery"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Mounted(BaseModel):
    id: str
    object: Literal["state", "adapter"]
    created: int
    file: str


class MountList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Mounted]
    available: list[str] = Field(description="Files that can be mounted")


class Unmounted(BaseModel):
    id: str
    object: Literal["state", "adapter"]
    deleted: Literal[True] = True


class Health(BaseModel):
    status: Literal["ok", "draining"]
    model: str
    slots: int
    active: int
    waiting: int


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
