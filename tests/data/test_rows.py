"""The formats of rows: from a file on disk to the text that is trained."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rookery.config.tree import DataSection
from rookery.data import BinIdx, Dataset, make, open_dataset
from rookery.data.preview import preview
from rookery.data.rows import FORMATS, BadRow, RowReader, choose_reader
from rookery.data.sources import CHUNK, find_units, first_rows, read_lines
from rookery.errors import UserError
from rookery.tokenizer import World

WEATHER = {"type": "function", "function": {"name": "rain", "parameters": {"properties": {"city": {"type": "string"}}}}}
OFFER = "Tools:\n- rain(city: string)\nReturn only a JSON function call."
CALL = '```json\n{"name": "rain", "arguments": {"city": "Oslo"}}\n```'

ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "text": ("text", {"text": "User: a\n\nAssistant: b", "id": 3}, "User: a\n\nAssistant: b"),
    "messages": (
        "messages",
        {
            "messages": [
                {"role": "system", "content": "Be\n\nbrief."},
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": [{"type": "text", "text": "你好"}, "世界"]},
                {"role": "assistant", "content": "🐼 好"},
            ]
        },
        "System: Be\nbrief.\n\nUser: 1+1?\n\nAssistant:⟦ 2\n\n⟧User: 你好\n世界\n\nAssistant:⟦ 🐼 好<end>⟧",
    ),
    "messages with tools": (
        "messages",
        {
            "tools": [WEATHER],
            "messages": [
                {"role": "developer", "content": "Help."},
                {"role": "user", "content": "Rain?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "rain", "arguments": '{"city": "Oslo"}'}}],
                },
                {"role": "tool", "content": '{"mm": 3}'},
                {"role": "assistant", "content": "Yes, 3 mm."},
            ],
        },
        f"System: Help.\n{OFFER}\n\nUser: Rain?\n\nAssistant:⟦ {CALL}\n\n⟧User: Function output:\n"
        '{"mm": 3}\n\nAssistant:⟦ Yes, 3 mm.<end>⟧',
    ),
    "messages that are not all learnt": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "bad", "weight": 0},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "good", "weight": 1},
                {"role": "user", "content": "c"},
            ]
        },
        "User: a\n\nAssistant: bad\n\nUser: b\n\nAssistant:⟦ good\n\n⟧User: c<end>",
    ),
    "sharegpt": (
        "sharegpt",
        {
            "system": "s",
            "tools": json.dumps([WEATHER]),
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": '{"name": "rain", "arguments": {"city": "Oslo"}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "Yes."},
            ],
        },
        f"System: s\n{OFFER}\n\nUser: Rain?\n\nAssistant:⟦ {CALL}\n\n⟧User: Function output:\n3\n\n"
        "Assistant:⟦ Yes.<end>⟧",
    ),
    "sharegpt with roles": (
        "sharegpt",
        {"conversation": [{"role": "User", "content": "a"}, {"role": "Assistant", "content": "b"}]},
        "User: a\n\nAssistant:⟦ b<end>⟧",
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Below is an instruction"},
        "User: Add.\n1, 2\n\nAssistant:⟦ 3<end>⟧",
    ),
    "alpaca with history": (
        "alpaca",
        {"instruction": "and 3?", "input": "", "output": "6", "system": "s", "history": [["1+2?", "3"]]},
        "System: s\n\nUser: 1+2?\n\nAssistant:⟦ 3\n\n⟧User: and 3?\n\nAssistant:⟦ 6<end>⟧",
    ),
    "prompt": ("prompt", {"prompt": "a", "completion": "b"}, "User: a\n\nAssistant:⟦ b<end>⟧"),
    "question": ("prompt", {"question": "a", "answer": "b", "text": "c"}, "User: a\n\nAssistant:⟦ b<end>⟧"),
    "prompt of messages": (
        "prompt",
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        "User: a\n\nAssistant:⟦ b<end>⟧",
    ),
}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def marked(dataset: Dataset) -> str:
    """The stream of a data set, with what is trained in brackets and the ends of documents named."""
    content = dataset.content
    said = np.zeros(len(content.stream), bool) if content.said is None else content.said[: len(content.stream)]
    text, inside = b"", False
    for token, count in zip(content.stream[: len(content.stream)].tolist(), said.tolist(), strict=True):
        if count != inside:
            text += "⟦".encode() if count else "⟧".encode()
            inside = count
        text += content.tokenizer.decode_bytes([token]) if token else b"<end>"
    return text.decode() + ("⟧" if inside else "")


@pytest.mark.parametrize("name", ROWS)
def test_every_format_end_to_end(tmp_path: Path, name: str, world: World) -> None:
    data_format, row, expected = ROWS[name]
    lines = DataSection(data_file=jsonl(tmp_path / "x.jsonl", row))
    array = tmp_path / "x.json"
    array.write_text(json.dumps([row], ensure_ascii=False, indent=2), encoding="utf-8")
    for section in (lines, lines.model_copy(update={"data_file": str(array)})):
        for update in ({}, {"data_format": data_format}):
            dataset = open_dataset(section.model_copy(update=update), tokenizer=world)
            assert (dataset.facts.data_format, dataset.facts.documents) == (data_format, 1)
            assert marked(dataset).removesuffix("<end>") == expected.removesuffix("<end>")
    text = data_format == "text"
    assert (dataset.facts.dataload, dataset.facts.loss_mask) == (("get", "none") if text else ("pack", "answer"))


@pytest.mark.parametrize("name", ROWS)
def test_binidx_holds_the_same_tokens(tmp_path: Path, name: str, world: World) -> None:
    _format, row, expected = ROWS[name]
    made = make(jsonl(tmp_path / "x.jsonl", row, row), 1, tmp_path / "x")
    dataset = open_dataset(DataSection(data_file=str(tmp_path / "x.jsonl")), tokenizer=world)
    assert made.reader.format == dataset.facts.data_format
    text = expected.replace("⟦", "").replace("⟧", "").removesuffix("<end>")
    assert BinIdx(tmp_path / "x").stream.tolist() == [*world.encode(text), 0] * 2
    assert BinIdx(tmp_path / "x").stream.tolist() == dataset.content.stream.tolist()


@pytest.mark.parametrize(
    "message",
    [
        {"content": "4", "reasoning_content": "2\n\nand 2"},
        {"content": "4", "reasoning": "2\n\nand 2"},
        {"content": "<think>\n2\n\nand 2\n</think>\n\n4"},
        {"content": [{"type": "thinking", "thinking": "2\n\nand 2"}, {"type": "text", "text": "4"}]},
    ],
)
def test_thoughts_are_trained_with_template_g1_and_missed_with_world(tmp_path: Path, message: dict[str, Any]) -> None:
    row = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", **message}]}
    section = DataSection(data_file=jsonl(tmp_path / "x.jsonl", row), template="g1")
    dataset = open_dataset(section)
    assert marked(dataset) == "User: 2+2\n\nAssistant:⟦ <think>\n2\n\nand 2\n</think>\n4<end>⟧"
    assert not any("have thoughts" in note for note in dataset.notes)
    dataset = open_dataset(section.model_copy(update={"template": "world"}))
    assert marked(dataset) == "User: 2+2\n\nAssistant:⟦ 4<end>⟧"
    assert any("1 conversations have thoughts" in note for note in dataset.notes)


def test_fields_of_other_names(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", {"problem": "1+1", "solution": "2", "text": "other"})
    dataset = open_dataset(DataSection(data_file=file, sft_field=["problem", "solution"]))
    assert marked(dataset) == "User: 1+1\n\nAssistant:⟦ 2<end>⟧"
    made = make(file, 1, tmp_path / "y", fields=("problem", "solution"))
    assert made.reader.fields == ("problem", "solution")
    assert open_dataset(DataSection(data_file=file, data_format="text")).facts.data_format == "text"
    for wrong in (["problem"], ["problem", "a", "b"]):
        with pytest.raises(UserError, match="sft_field takes two names"):
            open_dataset(DataSection(data_file=file, sft_field=wrong))
    with pytest.raises(UserError, match=r'x\.jsonl, line 1: no key "answer"'):
        open_dataset(DataSection(data_file=file, sft_field=["problem", "answer"]))
    with pytest.raises(UserError, match="data_format prompt, not alpaca"):
        open_dataset(DataSection(data_file=file, sft_field=["a", "b"], data_format="alpaca"))


def test_a_token_begins_where_the_answer_does_whatever_the_vocabulary_joins(tmp_path: Path) -> None:
    vocabulary = tmp_path / "v.txt"
    lines = [f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)]
    joined = [": h", "llo\n\nUser", " he"]
    vocabulary.write_text(
        "".join([*lines, *(f"{257 + i} {text!r} {len(text)}\n" for i, text in enumerate(joined))]), encoding="utf-8"
    )
    row = {
        "conversations": [
            {"from": "user", "value": "x"},
            {"from": "gpt", "value": "hello"},
            {"from": "user", "value": "hi"},
        ]
    }
    dataset = open_dataset(DataSection(data_file=jsonl(tmp_path / "x.jsonl", row), tokenizer=str(vocabulary)))
    # "Assistant: hello": with the token ': h' the model could not be prompted with the mark alone. The token 'llo…User'
    # would begin in the answer, and so the model must learn to say it.
    assert marked(dataset) == "User: x\n\nAssistant:⟦ hello\n\nUser⟧: hi<end>"
    tokens = dataset.content.stream.tolist()
    assert tokens.count(257) == 1, "only the question has the joined token"


def test_conversations_in_a_character_vocabulary(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", ROWS["messages"][1])
    dataset = open_dataset(DataSection(data_file=file), vocab_size=0)
    assert marked(dataset) == ROWS["messages"][2]
    assert dataset.tokenizer.name == "char"


BAD: dict[str, tuple[Any, str]] = {
    "number": (3, "not an object"),
    "no messages": ({"messages": None}, 'no key "messages"'),
    "messages are text": ({"messages": "User: a"}, '"messages" is not a list'),
    "message is text": ({"messages": ["a"]}, "message 1 is not an object"),
    "role": ({"messages": [{"role": "narrator", "content": "a"}]}, "message 1 has the role 'narrator'"),
    "no role": ({"messages": [{"content": "a"}]}, "message 1 has the role None"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 has no content"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, "neither a string nor a list"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part 'image_url'; only text"),
    "call": ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "message 1 calls a tool without a name"),
    "calls": ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, '"tool_calls" is not a list'),
    "tools": ({"messages": [{"role": "user", "content": "a"}], "tools": "f"}, '"tools" is not a list'),
    "tool": ({"messages": [{"role": "user", "content": "a"}], "tools": [3]}, "a tool has no name"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    "text": ({"text": "a"}, 'no key "messages"; this row is text, and the file is read as messages'),
    "alpaca": ({"instruction": "a", "output": "b"}, "this row is alpaca, and the file is read as messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_its_line_and_the_reason(tmp_path: Path, name: str, world: World) -> None:
    row, reason = BAD[name]
    good = ROWS["messages"][1]
    file = tmp_path / "x.jsonl"
    file.write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n{json.dumps(good)}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.jsonl, line 3: ") as error:
        open_dataset(DataSection(data_file=str(file)), tokenizer=world)
    assert reason in str(error.value)
    (tmp_path / "x.json").write_text(json.dumps([good, row, good]), encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.json, row 2: ") as error:
        open_dataset(DataSection(data_file=str(tmp_path / "x.json")), tokenizer=world)
    assert reason in str(error.value)
    found = preview(DataSection(data_file=str(file)))
    assert (found.documents, found.fault_count) == (2, 1)
    assert found.faults[0].endswith(str(error.value).partition(": ")[2])


@pytest.mark.parametrize(
    ("data_format", "row", "reason"),
    [
        ("alpaca", {"instruction": 1, "output": "a"}, '"instruction" is not a string'),
        ("alpaca", {"instruction": "a", "output": "a", "history": [["a"]]}, '"history" is not a list of pairs'),
        ("alpaca", {"instruction": "a", "output": "a", "history": [["a", 1]]}, '"history" is not a list of pairs'),
        ("alpaca", {"instruction": "a", "output": "a", "input": 1}, '"input" is not a string'),
        ("prompt", {"prompt": "a", "completion": 2}, '"completion" is not a string'),
        ("sharegpt", {"conversations": {}}, '"conversations" is not a list'),
        ("text", {"text": 5}, '"text" is not a string'),
    ],
)
def test_bad_rows_of_the_other_formats(tmp_path: Path, data_format: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"line 1: {reason}"):
        open_dataset(DataSection(data_file=jsonl(tmp_path / "x.jsonl", row), data_format=data_format))


def test_rows_of_no_known_format(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", {"dialogue": "a", "lang": "en"})
    with pytest.raises(UserError, match=r"keys dialogue, lang are of no known format.*sft_field"):
        open_dataset(DataSection(data_file=file))
    for words, match in (({"data_format": "xml"}, "data_format xml"), ({"template": "chatml"}, "template chatml")):
        with pytest.raises(UserError, match=match):
            make(file, 1, tmp_path / "x", **words)


def test_the_first_readable_row_decides(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('\n{"broken\n{"note": 1}\n{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    reader = choose_reader(str(file), first_rows(find_units(file)))
    assert reader == RowReader("prompt", "world", ("prompt", "completion"))
    assert {reader.format, "text", "messages", "sharegpt", "alpaca"} == set(FORMATS)


def texts_of(path: Path) -> tuple[list[str], list[str]]:
    """Documents and faults of a file of format text."""
    parts = [part for unit in find_units(path) for part in read_lines(unit, RowReader())]
    documents = [document.text.decode() for part in parts for document in part.documents]
    return documents, [str(fault) for part in parts for fault in part.faults]


@pytest.mark.parametrize(
    "text",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '\ufeff \n[\n{"text": "a"}\n,\n{"text": "b"},\n]\n',
        '[{"text":"a"}{"text":"b"}]',
    ],
)
def test_arrays(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert texts_of(tmp_path / "x.json") == (["a", "b"], [])


def test_an_array_is_read_in_parts(tmp_path: Path) -> None:
    rows = [f"{i} 好" * (3000 + i) for i in range(700)]
    file = tmp_path / "x.json"
    file.write_text(json.dumps([{"text": row} for row in rows], ensure_ascii=False), encoding="utf-8")
    assert file.stat().st_size > 2 * CHUNK
    (unit,) = find_units(file)
    parts = list(read_lines(unit, RowReader()))
    assert len(parts) > 2
    assert sum(part.bytes for part in parts) == file.stat().st_size
    assert texts_of(file) == (rows, [])


@pytest.mark.parametrize(
    ("text", "documents", "fault"),
    [
        ("[]", [], None),
        ('[{"text": "a"}', ["a"], "row 2: not JSON (the array has no end at line 1)"),
        ('[{"text": "a"},\n{"text": b}]', ["a"], "row 2: not JSON (Expecting value at line 2)"),
        ('[{"text": "a"},\n\n{"text": "b', ["a"], "row 2: not JSON (Unterminated string starting at at line 3)"),
        ('[{"text": "a"},\n"b', ["a"], "row 2: not JSON (Unterminated string starting at at line 2)"),
        ("[" * 100_000, [], "row 1: not JSON ("),
    ],
)
def test_damaged_arrays(tmp_path: Path, text: str, documents: list[str], fault: str | None) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    found, faults = texts_of(tmp_path / "x.json")
    assert found == documents
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]


def test_an_array_that_is_no_utf_8(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes('[{"text": "好"}]'.encode("gb18030"))
    with pytest.raises(UserError, match="row 1: not UTF-8 text"):
        open_dataset(DataSection(data_file=str(tmp_path / "x.json")))


KEYS = (
    "messages",
    "conversations",
    "role",
    "from",
    "content",
    "value",
    "text",
    "tools",
    "tool_calls",
    "function",
    "name",
)
KEYS += ("arguments", "parameters", "properties", "instruction", "input", "output", "history", "system", "prompt")
KEYS += ("completion", "weight", "reasoning", "thinking", "type", "function_call")
SCALARS = st.sampled_from(
    [None, True, 0, -1.5, "", "user", "assistant", "function_call", "tool", "a\n\nb", "<think>x", "{}"]
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
LISTS = st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3).flatmap(
    lambda row: st.lists(JSON, max_size=3).map(lambda items: row | {"messages": items, "conversations": items})
)


@settings(deadline=None, max_examples=300)
@given(JSON | LISTS, st.sampled_from(FORMATS), st.sampled_from(["world", "g1"]))
def test_no_row_ends_in_a_traceback(row: Any, data_format: str, template: Any) -> None:
    reader = RowReader(data_format, template)
    with suppress(BadRow):
        reader.read(row).text.decode("utf-8")
