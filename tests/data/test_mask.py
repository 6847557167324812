import json
from pathlib import Path

import numpy as np
import pytest

from rookery.data.mask import make_mask
from rookery.errors import UserError
from rookery.tokenizer import Character, World

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "peft_dataload.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("row", GOLDEN["masks"], ids=lambda row: str(row["item"]))
@pytest.mark.parametrize("kind", ["qa", "pad"])
def test_masks_of_the_reference(world: World, row: dict, kind: str) -> None:
    counts = make_mask(kind, world)(np.array(row["dix"]), row["min_len"])
    assert counts.astype(int).tolist() == row[f"mask_{kind}"]


@pytest.mark.parametrize("row", GOLDEN["pad"], ids=lambda row: f"{row['item']}-{row['ctx_len']}")
def test_padding_of_the_reference(world: World, row: dict) -> None:
    window = np.array([*row["x"], 0])
    window[1:] = [y if y != -100 else 0 for y in row["y"]]
    counts = make_mask("pad", world)(window, row["min_len"])
    assert np.where(counts, window[1:], -100).tolist() == row["y"]


def reference_walk(window: list[int], end: list[int], begin: list[int], real: int, skip: bool) -> list[int]:
    """RWKV-PEFT's definition, as rwkv-formats words it."""
    values, held, i = [0] * len(window), 0, 0
    while i < real:
        step = 1
        if window[i : i + len(end)] == end and i + len(end) <= real:
            held, step = 0, len(end) if skip else 1
        elif window[i : i + len(begin)] == begin and i + len(begin) <= real:
            held, step = 1, len(begin) if skip else 1
        values[i : i + step] = [held] * step
        i += step
    if not any(values):
        values[: real - 1] = [1] * (real - 1)
    return values[1:]


@pytest.mark.parametrize("kind", ["qa", "se"])
def test_walking_masks_on_random_windows(kind: str) -> None:
    tokenizer = Character(["A", "s", "i", "t", "a", "n", ":", "U", "e", "r", "x"])
    marks = {"mask0": "xx", "mask1": "xAx"}
    mask = make_mask(kind, tokenizer, marks)
    end = tokenizer.encode("User:" if kind == "qa" else "xx")
    begin = tokenizer.encode("Assistant:" if kind == "qa" else "xAx")
    generator = np.random.default_rng(0)
    for _ in range(200):
        pieces = [[end, begin, [10], [0, 10]][k] for k in generator.integers(0, 4, 12)]
        window = [i for piece in pieces for i in piece]
        real = int(generator.integers(2, len(window) + 1))
        expected = reference_walk(window, end, begin, real, skip=kind == "se")
        assert mask(np.array(window), real).astype(int).tolist() == expected


def trained(tokenizer: World | Character, ids: list[int]) -> list[str]:
    """The runs of text that the answer mask trains."""
    counts = make_mask("answer", tokenizer)(np.array(ids), len(ids))
    runs, previous = [], False
    for token, count in zip(ids[1:], counts, strict=True):
        text = tokenizer.decode([token]) if token else "<end>"
        if count:
            runs = [*runs[:-1], runs[-1] + text] if previous else [*runs, text]
        previous = bool(count)
    return runs


CASES = {
    "two turns": ("User: 1+1\n\nAssistant: 2\n\nUser: x\n\nAssistant: 3\0", [" 2\n\n", " 3<end>"]),
    "newlines inside other tokens": (
        "User: 好。\n\nAssistant: 是。\n\nUser: 好。\n\nAssistant: 不。\0",
        [" 是。\n\n", " 不。<end>"],
    ),
    "mark and answer in one token": ('User: a\n\nAssistant: "b"\n\nUser: c', [' "b"\n\n']),
    "middle of a document": ("5\n\nnone of this\n\nUser: a\n\nAssistant: b\n\nUser: c", [" b\n\n"]),
    "begins with an answer": ("Assistant: hi\n\nUser: a", [" hi\n\n"]),
    "plain text": ("Once upon a time. Assistant: no\0The end.", []),
    "documents": ("Assistant: a\0User: b\0Assistant: c\0", [" a<end>", " c<end>"]),
    "an answer of paragraphs": ("User: a\n\nAssistant: one\n\ntwo\n\n\nUser: b", [" one\n\ntwo\n\n\n"]),
    "mark inside a line": ("User: a\n\nAssistant: the User: mark\n\nUser: b", [" the User: mark\n\n"]),
    "after a system turn": ("System: s\n\nAssistant: hi\n\nSystem: t\n\nUser: u", [" hi\n\n"]),
    "two answers": ("Assistant: a\n\nAssistant: b\n\nUser: c", [" a\n\n", " b\n\n"]),
    "cut within a mark": ("Assistant: a\n\nUse", [" a\n\n"]),
    "what looks like a mark and is none": ("Assistant: a\n\nUsers are b\n\nUser: c", [" a\n\nUsers are b\n\n"]),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_in_both_vocabularies(world: World, name: str) -> None:
    text, expected = CASES[name]
    ids = [i for part in text.split("\0") for i in [*world.encode(part), 0]]
    assert trained(world, ids if text.endswith("\0") else ids[:-1]) == expected
    characters = Character.build(text, documents=True)
    assert trained(characters, characters.encode(text)) == expected


def test_a_colon_that_belongs_to_the_text_is_not_part_of_the_answer(world: World) -> None:
    # The vocabulary has the token ':"', which begins in the mark: predicting it would train the mark.
    ids = world.encode('User: a\n\nAssistant:"b"\n\nUser: c')
    assert world.encode(':"')[0] in ids
    assert trained(world, ids) == ['b"\n\n']


def test_a_mark_that_begins_inside_a_token(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    lines = [f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)]
    file.write_text("".join([*lines, "257 '\\n\\nUs' 4\n", "258 'Assistant:' 10\n"]), encoding="utf-8")
    tokenizer = World(file)
    ids = tokenizer.encode("Assistant: ab\n\nUser: c")
    assert ids[:5] == [258, 33, 98, 99, 257]
    # Its first byte ends the answer, so the model must learn to predict it.
    assert trained(tokenizer, ids) == [" ab\n\nUs"]


def test_padding_never_counts(world: World) -> None:
    ids = [*world.encode("Assistant: a"), 0, 0, 0]
    counts = make_mask("answer", world)(np.array(ids), len(ids) - 2)
    assert counts.tolist() == [False, False, True, True, False, False]


def test_marks_must_be_in_the_vocabulary() -> None:
    tokenizer = Character.build("0123456789+=", documents=True)
    with pytest.raises(UserError, match="'U'"):
        make_mask("qa", tokenizer)
    with pytest.raises(UserError, match="mask_id"):
        make_mask("se", tokenizer)
    with pytest.raises(UserError, match="mask_id"):
        make_mask("se", tokenizer, {"mask0": "1"})
