from typing import Any

import pytest

from rookery.tokenizer.chat import (
    Call,
    Message,
    Template,
    Thinking,
    answer_begin,
    clean,
    document,
    pieces,
    prompt,
    stop_strings,
    with_tools,
)

CHAT = [Message("user", "hi\r\n\r\n\n there "), Message("assistant", "Hello."), Message("user", "2+3?")]


def test_prompt_and_document() -> None:
    assert prompt(CHAT) == "User: hi\n there\n\nAssistant: Hello.\n\nUser: 2+3?\n\nAssistant:"
    assert document(CHAT) == "User: hi\n there\n\nAssistant: Hello.\n\nUser: 2+3?"
    assert prompt([Message("system", "Be brief."), CHAT[2]]) == "System: Be brief.\n\nUser: 2+3?\n\nAssistant:"
    assert prompt([]) == "Assistant:"


@pytest.mark.parametrize(
    ("thinking", "end"),
    [
        ("quick", "User: 2+3?\n\nAssistant: <think>\n</think"),
        ("think", "User: 2+3?\n\nAssistant: <think"),
        ("bit", "User: 2+3? (think a bit)\n\nAssistant: <think"),
        ("lot", "User: 2+3? (think a lot)\n\nAssistant: <think"),
    ],
)
def test_thinking(thinking: Thinking, end: str) -> None:
    text = prompt(CHAT, thinking)
    assert text.endswith(end)
    assert text.endswith(answer_begin(thinking))


def test_tool_result_is_a_turn_of_the_user() -> None:
    assert document([Message("tool", '{"t": 21}')]) == 'User: Function output:\n{"t": 21}'


def test_clean_leaves_no_blank_line() -> None:
    assert clean("\n a\n\n\n\nb\r\n\r\nc\n") == "a\nb\nc"


def test_an_answer_ends_at_a_blank_line_unless_it_thinks() -> None:
    assert stop_strings() == stop_strings("quick") == ("\n\n",)
    assert "\n\n" not in stop_strings("think")
    assert "\n\nUser:" in stop_strings("think")


THOUGHTFUL = [Message("user", "2+3?"), Message("assistant", "5", thoughts="Two,\n\nthen three.\n")]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("world", "User: 2+3?\n\nAssistant: 5"),
        ("g1", "User: 2+3?\n\nAssistant: <think>\nTwo,\n\nthen three.\n</think>\n5"),
    ],
)
def test_thoughts_belong_to_the_g1_template(template: Template, text: str) -> None:
    assert document(THOUGHTFUL, template) == text
    assert document(THOUGHTFUL[:1], template) == "User: 2+3?"


def test_a_thinking_answer_is_what_the_prompts_for_thinking_begin() -> None:
    whole = document(THOUGHTFUL, "g1")
    assert whole.startswith(prompt(THOUGHTFUL[:1], "think"))
    quick = document([THOUGHTFUL[0], Message("assistant", "<think>\n</think>\n5")])
    assert quick.startswith(prompt(THOUGHTFUL[:1], "quick"))


def test_calls_of_functions() -> None:
    one = Message("assistant", "", calls=(Call("weather", {"city": "东京"}),))
    assert document([one]) == 'Assistant: ```json\n{"name": "weather", "arguments": {"city": "东京"}}\n```'
    two = Message("assistant", "Both.", calls=(Call("a", {}), Call("b", {"x": "1\n\n2"})))
    expected = '[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": "1\\n\\n2"}}]'
    assert document([two], "g1") == f"Assistant: Both.\n```json\n{expected}\n```"


def test_functions_on_offer() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": ["integer", "null"]}, "x": {}},
    }
    tools: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": schema}}, {"name": "now"}]
    offer = "Tools:\n- weather(city: string, days: integer|null, x: any)\n- now()\nReturn only a JSON function call."
    asked = [Message("user", "Rain?")]
    assert document(with_tools(asked, tools)) == f"System: {offer}\n\nUser: Rain?"
    assert document(with_tools([Message("system", "Be brief.\n\n"), *asked], tools)) == (
        f"System: Be brief.\n{offer}\n\nUser: Rain?"
    )
    for wrong in (
        "weather",
        {"parameters": {}},
        {"name": "f", "parameters": [1]},
        {"name": "f", "parameters": {"properties": 3}},
    ):
        with pytest.raises(ValueError, match="tool"):
            with_tools(asked, [wrong])


CHATS = {
    "one turn": CHAT[:2],
    "ends with a question": CHAT,
    "two turns": [*CHAT, Message("assistant", "5 🐼"), Message("user", "再见"), Message("assistant", "好。\n\n再见！")],
    "system and tools": [
        Message("system", "s"),
        Message("user", "u"),
        Message("assistant", "", calls=(Call("f", {}),)),
        Message("tool", "1"),
        Message("tool", "2"),
        Message("assistant", "done"),
    ],
    "thoughts": [*THOUGHTFUL, CHAT[2], Message("assistant", "also 5", thoughts="same")],
    "begins with an answer": [Message("assistant", "Hi!"), *CHAT],
    "only a question": CHAT[:1],
}


@pytest.mark.parametrize("template", ["world", "g1"])
@pytest.mark.parametrize("name", CHATS)
def test_pieces_are_the_document_and_an_answer_is_what_follows_its_prompt(name: str, template: Template) -> None:
    messages = CHATS[name]
    found = pieces(messages, template)
    assert "".join(piece.text for piece in found) == document(messages, template)
    answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
    said = [place for place, piece in enumerate(found) if piece.said]
    assert len(answers) == len(said)
    for answer, place in zip(answers, said, strict=True):
        before = "".join(piece.text for piece in found[:place])
        assert before == prompt(messages[:answer], template=template)
        last = answer == len(messages) - 1
        assert found[place].text.startswith(" ")
        assert found[place].text.endswith("\n\n") != last


def test_answers_that_are_empty_or_not_to_be_learnt_are_not_said() -> None:
    messages = [CHAT[0], Message("assistant", " \n"), CHAT[2], Message("assistant", "6", trained=False)]
    assert [piece.said for piece in pieces(messages)] == [False]
    assert pieces(messages)[0].text == "User: hi\n there\n\nAssistant:\n\nUser: 2+3?\n\nAssistant: 6"
    assert pieces([]) == []
