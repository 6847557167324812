"""What other runtimes need to know of a tokenizer: its tokens, the end of a turn, and how a chat becomes text."""

from __future__ import annotations

from collections.abc import Sequence

from rookery.tokenizer import Tokenizer

CHAT_TEMPLATE = r"""
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- 'System: ' + message['content']|trim + '\n\n' -}}
    {%- elif message['role'] == 'user' -%}
        {{- 'User: ' + message['content']|trim + '\n\n' -}}
    {%- elif message['role'] == 'tool' -%}
        {{- 'User: Function output:\n' + message['content']|trim + '\n\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'Assistant: ' + message['content']|trim + '\n\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt is not defined or add_generation_prompt -%}
    {{- 'Assistant:' -}}
    {%- if enable_thinking is defined -%}
        {{- ' <think' if enable_thinking else ' <think>\n</think' -}}
    {%- endif -%}
{%- endif -%}
"""
"""`rookery.tokenizer.chat` in Jinja, which cannot take blank lines out of a message. Thinking is asked for by
`enable_thinking`. llama.cpp knows the line for the user by its text."""


def pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every token id; none for the end of a document and for ids that are not used."""
    data, offsets = tokenizer.token_bytes()
    content = data.tobytes()
    return [content[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def end_of_turn(pieces: Sequence[bytes]) -> int | None:
    """The token id of the blank line that ends a turn, if the vocabulary has one."""
    return pieces.index(b"\n\n") if b"\n\n" in pieces else None
