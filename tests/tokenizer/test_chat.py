import pytest

from rookery.tokenizer.chat import Message, Thinking, answer_begin, clean, document, prompt, stop_strings

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
