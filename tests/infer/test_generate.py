"""Streaming, stop texts, carried state and batches, on a small random model with the World vocabulary."""

import copy

import pytest
import torch

from rookery.infer import Sampling, Sequence, complete, generate, read

GREEDY = Sampling(temperature=0, alpha_presence=0, alpha_frequency=0, max_tokens=40)


def stream(tokenizer, tokens, **settings) -> tuple[list[str], Sequence]:
    sequence = Sequence(tokenizer, Sampling(**settings))
    pieces = []
    for token in tokens:
        pieces.append(sequence.accept(token))
        if sequence.finish:
            break
    return pieces, sequence


def test_pieces_are_whole_characters_and_add_up(world) -> None:
    text = "héllo 世界 😀!"
    single_bytes = [byte + 1 for byte in text.encode()]
    pieces, sequence = stream(world, [*single_bytes, 0])
    assert "".join(pieces) == sequence.text == text
    assert "\ufffd" not in "".join(pieces)
    assert "😀" in pieces
    assert sequence.finish == "stop"


def test_bytes_that_are_no_text_become_replacement_characters(world) -> None:
    pieces, _sequence = stream(world, [0xFF + 1, ord("a") + 1, 0xE4 + 1, 65530, 0])
    assert "".join(pieces) == "\ufffda\ufffd\ufffd"


def test_a_cut_character_at_the_length_limit(world) -> None:
    pieces, sequence = stream(world, [0xE4 + 1, 0xB8 + 1], max_tokens=2)
    assert pieces == ["", "\ufffd"]
    assert sequence.finish == "length"


@pytest.mark.parametrize(
    ("text", "stop", "answer"),
    [
        ("168\n\nUser: 1", ("\n\n",), "168"),
        ("line\nline\n\n", ("\n\n",), "line\nline"),
        ("a STOp STO STOP b", ("STOP",), "a STOp STO "),
        ("aab aac", ("aac", "zz"), "aab "),
        ("ababac", ("abac",), "ab"),
        ("one two", ("two", "one"), ""),
    ],
)
def test_stop_texts_never_show_not_even_in_part(world, text, stop, answer) -> None:
    for tokens in ([byte + 1 for byte in text.encode()], world.encode(text)):
        pieces, sequence = stream(world, tokens, stop=stop)
        shown = ""
        for piece in pieces:
            shown += piece
            assert answer.startswith(shown)
        assert shown == sequence.text == answer
        assert sequence.finish == "stop"


def test_text_that_only_began_like_a_stop_is_shown_in_the_end(world) -> None:
    pieces, _sequence = stream(world, [*(byte + 1 for byte in b"ab\n"), 0], stop=("\n\n",))
    assert pieces == ["a", "b", "", "\n"]


def test_generate_equals_a_plain_loop(model, world) -> None:
    prompt = world.encode("User: 1+1=\n\nAssistant:")
    tokens = list(prompt)
    with torch.inference_mode():
        while len(tokens) < len(prompt) + 40 and tokens[-1] != 0:
            logits, _state = model(torch.tensor([tokens]))
            tokens.append(int(logits[0, -1].argmax()))
    expected = tokens[len(prompt) :]
    generation = generate(model, world, prompt, GREEDY)
    text = "".join(generation)
    assert generation.sequence.tokens == expected
    assert len(set(expected)) > 10
    assert text == generation.sequence.text


def test_the_same_seed_gives_the_same_answer(model, world) -> None:
    prompt = world.encode("Hi")
    runs = [
        "".join(generate(model, world, prompt, Sampling(temperature=2.0, top_p=1.0, seed=seed, max_tokens=20)))
        for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_long_prompt_read_in_parts_equals_one_pass(model, world, monkeypatch) -> None:
    rows = [world.encode("多轮 arithmetic 123 " * 9)[:50]]
    whole, state = read(model, rows)
    monkeypatch.setattr("rookery.infer.generation.PREFILL", 7)
    parts, split = read(model, rows)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(split.wkv, state.wkv, rtol=1e-4, atol=1e-5)


def position_of(model, world, generation):
    """The state once everything unread is read."""
    if not generation.unread:
        return generation.state
    return read(model, [generation.unread], generation.state)[1]


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_state_and_unread_stand_at_the_end_of_the_text(model, world, max_tokens) -> None:
    prompt = world.encode("Hello")
    generation = generate(model, world, prompt, Sampling(temperature=0, max_tokens=max_tokens))
    "".join(generation)
    _logits, expected = read(model, [prompt + generation.sequence.tokens])
    torch.testing.assert_close(position_of(model, world, generation).wkv, expected.wkv, rtol=1e-4, atol=1e-5)


def test_a_stop_in_the_middle_of_a_token_leaves_its_beginning_unread(model, world) -> None:
    prompt = world.encode("Hello")
    free = generate(model, world, prompt, GREEDY)
    "".join(free)
    at, token = next(
        (i, t)
        for i, t in enumerate(free.sequence.tokens)
        if i > 3 and len(world.decode_bytes([t]).decode("utf-8", "ignore")) > 3
    )
    text = world.decode([token])
    generation = generate(model, world, prompt, Sampling(**{**vars(GREEDY), "stop": (text[2:],)}))
    answer = "".join(generation)
    assert answer == world.decode_bytes(free.sequence.tokens[:at]).decode("utf-8", "replace") + text[:2]
    assert world.decode(generation.unread) == text[:2]
    _logits, expected = read(model, [prompt + free.sequence.tokens[:at] + world.encode(text[:2])])
    torch.testing.assert_close(position_of(model, world, generation).wkv, expected.wkv, rtol=1e-4, atol=1e-5)


def test_a_cancelled_answer_stops_and_keeps_its_place(model, world) -> None:
    prompt = world.encode("Hello")
    generation = generate(model, world, prompt, GREEDY)
    shown = ""
    for piece in generation:
        shown += piece
        if len(generation.sequence.tokens) >= 5:
            generation.cancel()
    assert generation.sequence.finish == "cancelled"
    assert len(generation.sequence.tokens) == 5
    _logits, expected = read(model, [prompt + generation.sequence.tokens])
    torch.testing.assert_close(position_of(model, world, generation).wkv, expected.wkv, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5, top_p=0.9, seed=5, max_tokens=15)])
def test_a_batch_answers_as_each_prompt_alone(model, world, sampling) -> None:
    # In fp64, so that the rounding of a larger batch cannot tip a draw.
    model = copy.deepcopy(model).double()
    texts = [
        "Hi",
        "User: 三加四=?\n\nAssistant:",
        "Hello world",
        "a",
        "b",
        "User: x+1=2, x=?\n\nAssistant:",
        "zz top",
        "q",
    ]
    prompts = [world.encode(text) for text in texts]
    calls: list[tuple[int, int]] = []
    together = complete(model, world, prompts, sampling, batch=3, progress=lambda *done: calls.append(done))
    for prompt, answer in zip(prompts, together, strict=True):
        alone = generate(model, world, prompt, sampling)
        "".join(alone)
        assert answer.tokens == alone.sequence.tokens
        assert answer.text == alone.sequence.text
    assert calls[-1] == (8, 8)
    assert calls == sorted(calls)


def test_finished_answers_leave_the_batch(model, world) -> None:
    """Answers of different lengths: a stop text that some meet early."""
    prompts = [world.encode(f"prompt {n}") for n in range(12)]
    free = complete(model, world, prompts, GREEDY)
    stop = free[0].text[3:5]
    sampling = Sampling(**{**vars(GREEDY), "stop": (stop,)})
    stopped = complete(model, world, prompts, sampling)
    assert stopped[0].finish == "stop"
    assert len({len(answer.tokens) for answer in stopped}) > 1
    for answer, whole in zip(stopped, free, strict=True):
        assert answer.text == whole.text.partition(stop)[0]


def test_an_empty_prompt_is_refused(model, world) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, world, [], GREEDY)
