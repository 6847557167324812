"""Taking answers apart: the same whatever the pieces they come in."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rookery.serve.reading import AnswerReader, calls_in
from rookery.tokenizer.chat import Call

TOOLS = frozenset({"add", "sub"})
ADD = '{"name": "add", "arguments": {"a": 1}}'
CALL = Call("add", {"a": 1})

CASES = [
    # prompt's beginning, tools, answer, thoughts, text, calls
    ("", (), " Hello  world\n", "", "Hello  world\n", ()),
    ("", (), f" ```json\n{ADD}\n```", "", f"```json\n{ADD}\n```", ()),
    (" <think", (), ">\nOne.\n\nTwo < 3.\n</think>\nYes.", "One.\n\nTwo < 3.", "Yes.", ()),
    (" <think", (), ">\nOne.\n\nTwo </thin", "One.\n\nTwo </thin", "", ()),
    (" <think>\n</think", (), ">\nAt once.", "", "At once.", ()),
    ("", (), " <think>Well</think>\n\nYes", "Well", "Yes", ()),
    ("", (), " <thinking> is hard", "", "<thinking> is hard", ()),
    ("", TOOLS, f" ```json\n{ADD}\n```", "", "", (CALL,)),
    ("", TOOLS, f" {ADD}", "", "", (CALL,)),
    ("", TOOLS, f" [{ADD}, {ADD}]", "", "", (CALL, CALL)),
    ("", TOOLS, f" Let me add.\n```json\n{ADD}\n```", "", "Let me add.", (CALL,)),
    ("", TOOLS, f" ```json\n{ADD}\n```\n```json\n{ADD}\n```\nDone.", "", "Done.", (CALL, CALL)),
    ("", TOOLS, f"```json\n{ADD}", "", "", (CALL,)),
    ("```json\n", TOOLS, ADD, "", "", (CALL,)),
    (" <think", TOOLS, f">\nHm.\n</think>\n```json\n{ADD}\n```", "Hm.", "", (CALL,)),
    ("", TOOLS, " Use `x` and ``` and ```js here", "", "Use `x` and ``` and ```js here", ()),
    ("", TOOLS, ' See:\n\n```json\n{"name": "rm"}\n```\nend', "", 'See:\n\n```json\n{"name": "rm"}\n```\nend', ()),
    ("", TOOLS, " {not json", "", "{not json", ()),
    ("", TOOLS, ' {"name": ["add"]}', "", '{"name": ["add"]}', ()),
    ("", TOOLS, ' {"name": "add", "arguments": 1}', "", '{"name": "add", "arguments": 1}', ()),
    ("", TOOLS, ' {"name": "add"}', "", "", (Call("add", {}),)),
]


def read(begin: str, tools: frozenset[str], pieces: list[str]) -> tuple[str, str, tuple[Call, ...]]:
    reader = AnswerReader(begin, frozenset(tools))
    parts = [part for piece in pieces for part in reader.feed(piece)] + reader.finish()
    assert all(part.text or part.calls for part in parts)
    said = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("thoughts", "text")}
    return said["thoughts"], said["text"], tuple(call for part in parts for call in part.calls)


@pytest.mark.parametrize(("begin", "tools", "answer", "thoughts", "text", "calls"), CASES)
def test_whole_and_letter_by_letter(begin, tools, answer, thoughts, text, calls) -> None:
    assert read(begin, tools, [answer]) == (thoughts, text, calls)
    assert read(begin, tools, list(answer)) == (thoughts, text, calls)


FRAGMENTS = ["<think>", "</think>", "```json", "\n```", "`", "\n", " ", "{", "}", "[", "]", ADD, "<", "x", "世"]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), st.data())
def test_pieces_do_not_matter(answer: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    ends = [0, *cuts, len(answer)]
    pieces = [answer[start:end] for start, end in pairwise(ends)]
    for tools in (frozenset(), TOOLS):
        whole = read("", tools, [answer])
        assert read("", tools, pieces) == whole
        assert not (whole[2] and not tools)
        if "<think>" not in answer and not whole[2]:
            assert whole[1] == answer.lstrip(), "what is no call is said as it is"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["name", "arguments", "a"]), x),
    )
)
def test_anything_may_stand_in_a_fence(value) -> None:
    assert all(call.name in TOOLS for call in calls_in(json.dumps(value), TOOLS))


def test_deep_nesting_is_no_call() -> None:
    assert calls_in("[" * 100_000, TOOLS) == ()
