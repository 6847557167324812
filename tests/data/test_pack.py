"""Whole documents a sample: one (dataload only) or several packed together (pack)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rookery.config.tree import DataSection
from rookery.data import Dataset, open_dataset
from rookery.data.pack import Packs
from rookery.errors import UserError
from rookery.tokenizer import Character, World


def numbered(sizes: np.ndarray, ctx_len: int, seed: int | None) -> Packs:
    """Packs of documents whose inputs are all their number + 1, and whose targets are that negated."""
    return Packs(
        lambda i: (np.full(sizes[i], i + 1), np.full(sizes[i], -i - 1)), np.asarray(sizes, np.int64), ctx_len, seed
    )


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 40).flatmap(
        lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), min_size=1, max_size=80))
    ),
    st.one_of(st.none(), st.integers(0, 2**31)),
)
def test_every_document_once_a_pass_and_whole(case: tuple[int, list[int]], seed: int | None) -> None:
    room, lengths = case
    sizes = np.array(lengths)
    packs = numbered(sizes, room, seed)
    orders = []
    for turn in range(3):
        found: list[int] = []
        for index in range(turn * packs.period, (turn + 1) * packs.period):
            x, y, ends = packs.sample(index)
            assert x.dtype == y.dtype == ends.dtype == np.int64
            assert len(x) == len(y) == room == ends.sum()
            assert (ends > 0).all()
            for part, targets in zip(np.split(x, ends.cumsum()[:-1]), np.split(y, ends.cumsum()[:-1]), strict=True):
                number = int(part[0])
                assert (part == number).all()
                if number:
                    assert len(part) == sizes[number - 1]
                    assert (targets == -number).all()
                    found.append(number - 1)
                else:
                    assert (targets == -100).all()
        assert sorted(found) == list(range(len(sizes)))
        orders.append(found)
    if seed is None:
        assert orders == [list(range(len(sizes)))] * 3
    # Two that are filled at most half could have been one: that bounds what is wasted.
    assert packs.period <= max(1, 2 * -(-int(sizes.sum()) // room))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=200), st.integers(0, 1000), st.data())
def test_a_sample_is_a_function_of_its_number(lengths: list[int], seed: int, data: st.DataObject) -> None:
    packs = numbered(np.array(lengths), 32, seed)
    expected = [packs.sample(index) for index in range(3 * packs.period)]
    order = data.draw(st.lists(st.integers(0, 3 * packs.period - 1), max_size=12))
    again = numbered(np.array(lengths), 32, seed)
    for index in order:
        for one, other in zip(again.sample(index), expected[index], strict=True):
            assert np.array_equal(one, other)


def test_packing_wastes_little_and_every_pass_is_another() -> None:
    sizes = np.minimum(np.random.RandomState(0).lognormal(5, 0.8, 5000).astype(np.int64) + 1, 1024)
    packs = numbered(sizes, 1024, 7)
    assert sizes.sum() / (packs.period * 1024) > 0.99
    passes = [[packs.sample(turn * packs.period + i).x.tolist() for i in range(packs.period)] for turn in range(2)]
    assert passes[0] != passes[1]
    together = [{frozenset(x) for x in samples} for samples in passes]
    assert len(together[0] & together[1]) < 0.2 * packs.period, "documents meet others in the next pass"
    assert numbered(sizes, 1024, 8).sample(0).x.tolist() != passes[0][0]


def conversations(path: Path, answers: list[str], question: str = "q") -> str:
    rows = [{"prompt": f"{question}{i}", "completion": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def segments(dataset: Dataset, index: int) -> list[tuple[list[int], list[int]]]:
    x, y, lengths = dataset.sample(index)
    assert lengths is not None
    cuts = lengths.cumsum()[:-1]
    return [(a.tolist(), b.tolist()) for a, b in zip(np.split(x, cuts), np.split(y, cuts), strict=True)]


def test_packed_conversations(tmp_path: Path, world: World) -> None:
    answers = [f"{i} " * (1 + i % 7) for i in range(60)]
    section = DataSection(data_file=conversations(tmp_path / "x.jsonl", answers), ctx_len=48, epochs=3)
    dataset = open_dataset(section, seed=3, tokenizer=world)
    facts = dataset.facts
    assert (facts.dataload, facts.sampler, facts.documents, facts.cut, facts.left_out) == ("pack", "pack", 60, 0, 0)
    assert facts.exit_tokens == 3 * facts.samples * 48
    expected = {}
    trained = 0
    for i, answer in enumerate(answers):
        before = world.encode(f"User: q{i}\n\nAssistant:")
        ids = [*before, *world.encode(" " + answer.strip()), 0]
        targets = [-100 if place < len(before) else ids[place] for place in range(1, len(ids))]
        expected[tuple(ids[:-1])] = targets
        trained += len(ids) - len(before)
    assert facts.trained == trained
    for turn in range(2):
        found = []
        for index in range(turn * facts.samples, (turn + 1) * facts.samples):
            for x, y in segments(dataset, index):
                if tuple(x) in expected:
                    assert y == expected[tuple(x)]
                    found.append(tuple(x))
                else:
                    assert set(y) == {-100}
        assert sorted(found) == sorted(expected)
    x, y, lengths = dataset.batch(range(4))
    assert lengths is not None
    assert (x.shape, y.shape, lengths.sum()) == ((4, 48), (4, 48), 4 * 48)
    joined = np.concatenate([dataset.sample(i).lengths for i in range(4)])  # type: ignore[misc]
    assert np.array_equal(lengths, joined)


def test_long_documents_are_cut_and_those_without_an_answer_left_out(tmp_path: Path, world: World) -> None:
    file = conversations(tmp_path / "x.jsonl", ["a b c d e f g h i j", "", "short"])
    long_question = {"prompt": "word " * 50, "completion": "a"}
    with open(file, "a", encoding="utf-8") as more:
        more.write(json.dumps(long_question) + "\n")
    section = DataSection(data_file=file, ctx_len=12, data_shuffle=0)
    dataset = open_dataset(section, tokenizer=world)
    facts = dataset.facts
    assert (facts.documents, facts.left_out, facts.cut, facts.samples) == (4, 2, 1, 2)
    notes = "\n".join(dataset.notes)
    assert "2 of the 4 documents" in notes
    assert "1 of 2 documents are longer than ctx_len 12" in notes
    assert "data_format prompt" in notes
    first = [*world.encode("User: q0\n\nAssistant: a b c d e f g h i j"), 0]
    assert f"ctx_len {len(first) - 1} would hold" in notes
    assert segments(dataset, 0)[0][0] == first[:12]
    assert [y for y in segments(dataset, 0)[0][1] if y != -100] == first[8:13]
    with pytest.raises(UserError, match=r"none of the 4 documents has anything to train within ctx_len 4"):
        open_dataset(section.model_copy(update={"ctx_len": 4}), tokenizer=world)


def test_one_document_a_sample_without_padding(tmp_path: Path, world: World) -> None:
    answers = ["a", "b c d e", "f g"]
    section = DataSection(
        data_file=conversations(tmp_path / "x.jsonl", answers), ctx_len=10, dataload="only", data_shuffle=0
    )
    dataset = open_dataset(section, tokenizer=world)
    assert (dataset.facts.sampler, dataset.facts.samples, dataset.facts.exit_tokens) == ("only", 3, 30)
    documents = [[*world.encode(f"User: q{i}\n\nAssistant: {a}"), 0] for i, a in enumerate(answers)]
    for index, document in enumerate(documents):
        x, y, lengths = dataset.batch([index])
        assert lengths is None
        assert x.tolist() == [document[:-1][:10]]
        assert [target for target in y[0].tolist() if target != -100] == document[8:11]
    x, y, lengths = dataset.batch([0, 1, 2])
    assert lengths is not None
    assert lengths.tolist() == [len(document[:-1][:10]) for document in documents]
    assert x.tolist() == [[token for document in documents for token in document[:-1][:10]]]
    shuffled = open_dataset(section.model_copy(update={"data_shuffle": 1}), tokenizer=world)
    orders = [[tuple(shuffled.sample(3 * turn + i).x) for i in range(3)] for turn in range(6)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize("dataload", ["get", "pad", "only", "pack"])
@pytest.mark.parametrize("loss_mask", ["auto", "none", "pad", "qa", "se", "answer"])
def test_masks_and_ways_of_reading_go_together(tmp_path: Path, world: World, dataload: str, loss_mask: str) -> None:
    section = DataSection(
        data_file=conversations(tmp_path / "x.jsonl", ["a b c", "d", "e f"]),
        ctx_len=16,
        dataload=dataload,
        loss_mask=loss_mask,
        mask_id={"mask0": "User:", "mask1": "Assistant:"},
    )
    dataset = open_dataset(section, tokenizer=world)
    texts = []
    for index in range(dataset.facts.samples):
        _x, y, _lengths = dataset.sample(index)
        texts.append(world.decode([token for token in y.tolist() if token > 0]))
    text = "".join(texts)
    for answer in ("a b c", "d", "e f"):
        assert answer in text
    assert ("q1" in text) == (loss_mask in ("none", "pad"))
    assert ("Assistant:" in text) == (loss_mask in ("none", "pad") or ("sistant:" in text))
    assert (":" in text) == (loss_mask not in ("auto", "answer"))
    if dataload in ("only", "pack"):
        counted = sum(int((dataset.sample(i).y != -100).sum()) for i in range(dataset.facts.samples))
        assert dataset.facts.trained == counted


def test_text_can_be_packed_too(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "abc"}\n{"text": ""}\n{"text": "de"}\n', encoding="utf-8")
    dataset = open_dataset(DataSection(data_file=str(file), dataload="pack", ctx_len=8), vocab_size=0)
    assert isinstance(dataset.tokenizer, Character)
    assert (dataset.facts.samples, dataset.facts.left_out, dataset.facts.trained) == (1, 1, 3 + 2)
    x, y, lengths = dataset.sample(0)
    assert x.tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert y.tolist() == [2, 3, 0, 5, 0, -100, -100, -100]
    assert lengths is not None
    assert lengths.tolist() == [3, 2, 3]
    np.save(tmp_path / "x.npy", np.arange(100))
    for dataload in ("pack", "only"):
        with pytest.raises(UserError, match=f"dataload {dataload} takes documents"):
            open_dataset(DataSection(data_file=str(tmp_path / "x.npy"), dataload=dataload))


def test_reading_data_needs_no_torch(tmp_path: Path) -> None:
    file = conversations(tmp_path / "x.jsonl", ["a b c", "d", "e f"])
    code = (
        "import sys; from rookery.config.tree import DataSection; from rookery.data import open_datasets;"
        "from rookery.data.preview import preview;"
        f"section = DataSection(data_file={file!r}, ctx_len=16, val_split=0.34);"
        "open_datasets(section); preview(section);"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
