"""Which documents are trained, which are held out, and what else is mixed in."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rookery.config.tree import DataSection
from rookery.data import BinIdxWriter, Dataset, make, open_dataset, open_datasets
from rookery.data.dataset import mix_shares
from rookery.data.samples import Mixed, Sample, samples_with
from rookery.errors import UserError
from rookery.tokenizer import World

MARK = re.compile(r"answer (\d+)\.")


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def rows(path: Path, count: int, answer: str = "answer") -> str:
    lines = [json.dumps({"prompt": f"question {i}", "completion": f"{answer} {i}."}) + "\n" for i in range(count)]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def documents(dataset: Dataset) -> list[tuple[int, ...]]:
    content = dataset.content
    return [
        tuple(content.stream[start : start + size].tolist())
        for start, size in zip(content.starts.tolist(), content.sizes.tolist(), strict=True)
    ]


@pytest.mark.parametrize("dataload", ["get", "pad", "only", "pack"])
def test_held_out_documents_are_never_trained(tmp_path: Path, dataload: str, world: World) -> None:
    file = rows(tmp_path / "x.jsonl", 100)
    section = DataSection(data_file=file, val_split=0.2, ctx_len=32, dataload=dataload)
    training, validation = open_datasets(section, seed=1)
    assert validation is not None
    kept, held = documents(training), documents(validation)
    assert (len(kept), len(held)) == (80, 20)
    assert sorted(kept + held) == sorted(documents(open_dataset(section.model_copy(update={"val_split": 0}))))
    assert documents(open_dataset(section, seed=1)) == kept, "a process that only reads sees the same"
    assert (validation.facts.dataload, validation.facts.loss_mask) == (dataload, "answer")
    marks = {mark for document in held for mark in MARK.findall(world.decode(list(document)))}
    seen: set[str] = set()
    for index in range(3 * training.facts.samples):
        x, y, _lengths = training.sample(index)
        seen.update(MARK.findall(world.decode([*x.tolist(), max(0, int(y[-1]))])))
    assert len(marks) == 20
    assert not marks & seen
    assert len(seen) == 80 or (dataload == "get" and len(seen) > 50), "windows cut some of the numbers"


def test_a_seed_chooses_what_is_held_out(tmp_path: Path) -> None:
    section = DataSection(data_file=rows(tmp_path / "x.jsonl", 50), val_split=0.1)
    held = []
    for seed in (0, 0, 1):
        _training, validation = open_datasets(section, seed=seed)
        assert validation is not None
        held.append(documents(validation))
    assert held[0] == held[1] != held[2]
    assert len(held[0]) == 5


def test_copies_of_a_held_out_document_are_held_out_too(tmp_path: Path) -> None:
    rows(tmp_path / "x.jsonl", 40)
    make(tmp_path / "x.jsonl", 3, tmp_path / "x")
    section = DataSection(data_file=str(tmp_path / "x"), val_split=0.25, ctx_len=16)
    training, validation = open_datasets(section, seed=4)
    assert validation is not None
    kept, held = documents(training), documents(validation)
    assert (len(kept), len(held)) == (90, 30)
    assert not set(kept) & set(held)
    assert (training.facts.dataload, validation.facts.documents) == ("get", 30)
    x, y, lengths = training.batch(range(training.facts.samples))
    assert lengths is None
    assert np.array_equal(x[:, 1:], y[:, :-1])


def test_nothing_can_be_held_out_of_a_single_document(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one text", encoding="utf-8")
    for file, share, count in ((tmp_path / "x.txt", 0.1, 0), (rows(tmp_path / "x.jsonl", 4), 0.99, 4)):
        with pytest.raises(UserError, match=rf"val_split {share} of \d documents that differ holds out {count}"):
            open_datasets(DataSection(data_file=str(file), val_split=share))


def test_validation_file(tmp_path: Path) -> None:
    section = DataSection(
        data_file=rows(tmp_path / "x.jsonl", 30),
        val_file=rows(tmp_path / "v.jsonl", 7),
        val_split=0.5,
        ctx_len=32,
        epochs=4,
    )
    training, validation = open_datasets(section, vocab_size=0)
    assert validation is not None
    assert (training.facts.documents, validation.facts.documents) == (30, 7)
    assert validation.tokenizer is training.tokenizer
    assert validation.facts.exit_tokens == validation.facts.samples * 32
    assert open_datasets(DataSection(data_file=section.data_file))[1] is None


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(20)),
        ("train[:3]", range(3)),
        ("train[5:8]", range(5, 8)),
        ("train[-2:]", range(18, 20)),
        ("train[10%:30%]", range(2, 6)),
        ("test[:]", range(20)),
    ],
)
def test_rows_of_a_split(tmp_path: Path, world: World, split: str, expected: range) -> None:
    section = DataSection(data_file=rows(tmp_path / "x.jsonl", 20), sft_split=split, data_shuffle=0)
    found = [world.decode(list(document)) for document in documents(open_dataset(section, tokenizer=world))]
    assert found == [f"User: question {i}\n\nAssistant: answer {i}." for i in expected]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[1000]", "expected train"),
        ("train[:1.5]", "expected train"),
        ("", "expected"),
        ("train[30:]", "none of the 20"),
    ],
)
def test_splits_that_name_nothing(tmp_path: Path, world: World, split: str, message: str) -> None:
    section = DataSection(data_file=rows(tmp_path / "x.jsonl", 20), sft_split=split)
    with pytest.raises(UserError, match=message):
        open_dataset(section, tokenizer=world)


class Numbers:
    """Samples that are their kind and their number."""

    name = "numbers"

    def __init__(self, kind: int, period: int) -> None:
        self.kind = kind
        self.period = period

    def sample(self, index: int) -> Sample:
        pair: Any = np.array([self.kind, index])
        return Sample(pair, pair)


@given(st.fractions(Fraction(1, 100), Fraction(99, 100), max_denominator=1000), st.integers(1, 200))
def test_a_share_is_exact_in_every_beginning(share: Fraction, own: int) -> None:
    mixed = Mixed(Numbers(0, own), Numbers(1, 5), share)
    others = 0
    for index in range(mixed.period):
        kind, number = mixed.sample(index).x.tolist()
        assert number == (others if kind else index - others), "both kinds in their own order, none left out"
        others += kind
        assert others == int((index + 1) * share)
    assert mixed.period - others == own
    assert mixed.period == samples_with(own, share)
    assert mixed.sample(mixed.period - 1).x[0] == 0, "a pass ends with the last of our own"


def test_replaying_other_data(tmp_path: Path, world: World) -> None:
    prefix = tmp_path / "pile"
    with BinIdxWriter(prefix, "<u2", world) as writer:
        writer.add(np.arange(40_000, 41_000, dtype=np.uint16))
    other = rows(tmp_path / "other.jsonl", 9, answer="else")
    section = DataSection(
        data_file=rows(tmp_path / "x.jsonl", 200), ctx_len=24, mix=[f"{prefix}:0.2", f"{other}:1/8"], epochs=2
    )
    dataset = open_dataset(section, tokenizer=world)
    plain = open_dataset(section.model_copy(update={"mix": []}), tokenizer=world)
    own = round(2 * plain.facts.samples)
    kinds = {"pile": 0, "else": 0, "own": 0}
    total = dataset.facts.exit_tokens // 24
    for index in range(total):
        x, _y, lengths = dataset.sample(index)
        kind = "pile" if x[0] >= 40_000 else "else" if "else" in world.decode(x.tolist()) else "own"
        assert (lengths is None) == (kind == "pile")
        kinds[kind] += 1
    assert kinds["own"] == own
    assert kinds["pile"] == int(total * 0.2)
    assert kinds["else"] == pytest.approx(total / 8, abs=1)
    x, y, lengths = dataset.batch(range(8))
    assert lengths is not None
    assert (x.shape, y.shape, lengths.sum()) == ((8, 24), (8, 24), 8 * 24)
    assert 24 in lengths.tolist(), "a window of other data is one sequence"
    assert sum("of the samples come from" in note for note in dataset.notes) == 2


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (["pile"], "mix pile: expected FILE:SHARE"),
        (["pile:0"], "mix pile:0: expected"),
        (["pile:1.0"], "expected"),
        (["pile:-0.1"], "expected"),
        (["pile:much"], "expected"),
        (["pile:1/0"], "expected"),
        ([":0.5"], "expected"),
        (["a:0.5", "b:0.5"], "add up to 1"),
        (["missing:0.5"], "missing"),
    ],
)
def test_shares_that_are_none(tmp_path: Path, world: World, mix: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_dataset(DataSection(data_file=rows(tmp_path / "x.jsonl", 3), mix=mix), tokenizer=world)


def test_mixed_data_of_another_vocabulary(tmp_path: Path, world: World) -> None:
    file = rows(tmp_path / "x.jsonl", 30)
    for name in ("a", "b"):
        rows(tmp_path / f"{name}.jsonl", 30, answer=name * 30)
        make(tmp_path / f"{name}.jsonl", 1, tmp_path / name, tokenizer="char")
    section = DataSection(data_file=str(tmp_path / "a"), ctx_len=8, mix=[f"{tmp_path / 'b'}:0.1"])
    with pytest.raises(UserError, match=r"b was made with another vocabulary than the training data: .*b\.vocab\.json"):
        open_dataset(section)
    assert open_dataset(section.model_copy(update={"mix": [f"{section.data_file}:0.1"]})).facts.samples
    with pytest.raises(UserError, match="another vocabulary"):
        open_dataset(DataSection(data_file=file, mix=section.mix), tokenizer=world)


def test_a_windows_path_has_a_colon_too() -> None:
    assert mix_shares([r"C:\data\pile:0.1"]) == [(r"C:\data\pile", Fraction(1, 10))]


def test_a_run_goes_on_at_the_same_samples(tmp_path: Path) -> None:
    section = DataSection(
        data_file=rows(tmp_path / "x.jsonl", 60),
        ctx_len=32,
        val_split=0.1,
        mix=[f"{rows(tmp_path / 'o.jsonl', 5)}:0.3"],
    )
    first, second = (open_datasets(section, seed=9)[0] for _ in range(2))
    whole = [first.batch(range(4 * step, 4 * step + 4)) for step in range(20)]
    for step in (19, 7, 8, 0):
        for one, other in zip(second.batch(range(4 * step, 4 * step + 4)), whole[step], strict=True):
            assert (one is None) == (other is None)
            assert one is None or np.array_equal(one, other)  # type: ignore[arg-type]
