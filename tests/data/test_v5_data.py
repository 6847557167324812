"""Ways of reading data that the v5 line of trainers and RWKV-PEFT have, against their published definitions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rookery.config.tree import DataSection
from rookery.data import BinIdx, BinIdxWriter, Dataset, open_dataset, open_datasets, sample_offset
from rookery.data.mixture import answers
from rookery.errors import UserError
from rookery.tokenizer import Character, World

GOLDEN = Path(__file__).parents[1] / "golden"
CTX = 8


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def write(path: Path, *documents: np.ndarray, dtype: str = "<u2", tokenizer: World) -> str:
    with BinIdxWriter(path, dtype, tokenizer) as writer:
        for document in documents:
            writer.add(document)
    return str(path)


def offsets(dataset: Dataset, samples: int) -> list[int]:
    """Where windows begin, in data whose every token is its own place."""
    return [int(dataset.sample(i)[0][0]) for i in range(samples)]


def test_documents_as_rwkv_peft_pads_them() -> None:
    rows = json.loads((GOLDEN / "peft_dataload.json").read_text(encoding="utf-8"))["pad"]
    assert len(rows) > 4
    for row in rows:
        section = DataSection(
            data_file=str(GOLDEN / "sample_shared"), dataload="pad", data_shuffle=0, ctx_len=row["ctx_len"]
        )
        x, y, _lengths = open_dataset(section).sample(row["item"])
        assert (x.tolist(), y.tolist()) == (row["x"], row["y"])


def test_every_document_is_read_once_a_pass_in_an_order_of_its_own() -> None:
    section = DataSection(data_file=str(GOLDEN / "sample_shared"), dataload="pad", ctx_len=4)
    dataset = open_dataset(section, seed=3)
    documents = dataset.facts.documents
    assert (dataset.facts.sampler, dataset.facts.samples) == ("documents", documents)
    assert dataset.facts.exit_tokens == documents * 4
    passes = [[dataset.samples.sampler.offset(turn * documents + i) for i in range(documents)] for turn in range(2)]
    starts = np.cumsum(BinIdx(GOLDEN / "sample_shared").sizes) - BinIdx(GOLDEN / "sample_shared").sizes
    assert sorted(passes[0]) == sorted(passes[1]) == starts.tolist()
    assert passes[0] != passes[1]
    assert passes[0] != starts.tolist()


def test_lines_of_jsonl_are_documents_too(tmp_path: Path, world: World) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": "two three"}\n', encoding="utf-8")
    section = DataSection(data_file=str(tmp_path / "x.jsonl"), dataload="pad", data_shuffle=0, ctx_len=5)
    x, y, _lengths = open_dataset(section).sample(1)
    line = [*world.encode("two three"), 0]
    assert x[: len(line)].tolist() == line
    assert y.tolist() == [*line[1:], *[-100] * (6 - len(line))]
    np.save(tmp_path / "x.npy", np.arange(100))
    with pytest.raises(UserError, match="dataload pad takes documents"):
        open_dataset(section.model_copy(update={"data_file": str(tmp_path / "x.npy")}))


def test_rows_of_uint16(tmp_path: Path) -> None:
    tokens = np.arange(1, 43, dtype="<u2").reshape(7, 6)
    tokens.tofile(tmp_path / "x")
    section = DataSection(data_file=str(tmp_path / "x"), data_type="uint16", my_sample_len=6, ctx_len=5)
    dataset = open_dataset(section)
    rows = [[*x[:1], *y] for x, y, _lengths in (dataset.sample(i) for i in range(7))]
    assert sorted(rows) == tokens.tolist()
    assert rows != tokens.tolist()
    wider = open_dataset(section.model_copy(update={"ctx_len": 7, "data_shuffle": 0}))
    assert wider.sample(1)[1].tolist() == [8, 9, 10, 11, 12, -100, -100]
    with pytest.raises(UserError, match="rows of 6 tokens need ctx_len 5"):
        open_dataset(section.model_copy(update={"ctx_len": 4}))
    with pytest.raises(UserError, match="no rows of my_sample_len 5"):
        open_dataset(section.model_copy(update={"my_sample_len": 5}))


def test_int32_data_are_not_read_as_uint16(tmp_path: Path) -> None:
    np.arange(1, 200, dtype="<i4").tofile(tmp_path / "x")
    with pytest.raises(UserError, match="these are int32 ids"):
        open_dataset(DataSection(data_file=str(tmp_path / "x"), data_type="uint16", ctx_len=CTX))


def test_shifted_windows(tmp_path: Path, world: World) -> None:
    section = DataSection(data_file=write(tmp_path / "x", np.arange(1000), tokenizer=world), ctx_len=CTX)
    plain, shifted = open_dataset(section), open_dataset(section.model_copy(update={"my_pile_shift": 5}))
    assert offsets(shifted, 20) == [offset + 5 for offset in offsets(plain, 20)]
    room = 1000 - plain.facts.prime * CTX - 1
    last = open_dataset(section.model_copy(update={"my_pile_shift": room}))
    assert max(int(last.sample(i)[1][-1]) for i in range(plain.facts.prime)) == 999
    with pytest.raises(UserError, match=f"the largest that fits is {room}"):
        open_dataset(section.model_copy(update={"my_pile_shift": room + 1}))


def test_random_windows_are_anywhere_and_always_the_same(tmp_path: Path, world: World) -> None:
    section = DataSection(data_file=write(tmp_path / "x", np.arange(60), tokenizer=world), ctx_len=CTX)
    found = [offsets(open_dataset(section, seed=seed, random_places=True), 600) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert set(found[0]) == set(range(60 - CTX))
    with pytest.raises(UserError, match="too few"):
        open_dataset(section.model_copy(update={"ctx_len": 60}), random_places=True)


def test_random_samples_at_the_beginning(tmp_path: Path, world: World) -> None:
    """The reference counts samples ii from 1: random while ii < my_random_steps, then the order begins at ii = 0."""
    section = DataSection(data_file=write(tmp_path / "x", np.arange(1000), tokenizer=world), ctx_len=CTX)
    prime = open_dataset(section).facts.prime
    dataset = open_dataset(section.model_copy(update={"my_random_steps": 10}))
    assert dataset.facts.exit_tokens == 1000 + 10 * CTX
    found = offsets(dataset, 40)
    order = [0, *(sample_offset(i, rank=0, world_size=1, epoch=0, ctx_len=CTX, prime=prime) for i in range(30))]
    assert found[9:] == order
    assert any(offset % CTX for offset in found[:9])


def test_lists_of_data(tmp_path: Path, world: World) -> None:
    first = write(tmp_path / "a", np.arange(100, 140), tokenizer=world)
    second = write(tmp_path / "b", np.arange(200, 230), tokenizer=world, dtype="<i4")
    listing = tmp_path / "list.txt"
    section = DataSection(data_file=str(listing), my_pile_version=2, ctx_len=CTX)

    def drawn() -> np.ndarray:
        dataset = open_dataset(section, seed=1)
        assert dataset.facts.tokens == 70
        for i in range(50):
            x, y, _lengths = dataset.sample(i)
            assert y.tolist() == (x + 1).tolist(), "a window lies within one part"
        return np.array(offsets(dataset, 3000))

    # 32 and 22 places; the second part counts ten times: its running sum ends at 32 + 220.
    listing.write_text(f"{first} 32 0.5 32\n{second} 22 x 252\n", encoding="utf-8")
    weighted = drawn()
    assert set(weighted.tolist()) == {*range(100, 132), *range(200, 222)}
    assert (weighted >= 200).mean() == pytest.approx(220 / 252, abs=0.03)
    listing.write_text(f"{first}\n{second}.bin\n", encoding="utf-8")
    assert (drawn() >= 200).mean() == pytest.approx(22 / 54, abs=0.04)

    for line, message in (
        (f"{first} 31 31", "line 1: .* has 32 places for ctx_len 8"),
        (f"{first} 32 many", "line 1: after the prefix come whole numbers"),
        (f"{first}\n{second} 22 20", "line 2: nothing can be drawn"),
        ("missing 3 3", "missing.idx does not exist"),
        ("", "names no binidx data"),
    ):
        listing.write_text(line, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            open_dataset(section)
    listing.write_text(f"{first}\n{second}", encoding="utf-8")
    with pytest.raises(UserError, match="val_split holds out documents of one file"):
        open_datasets(section.model_copy(update={"val_split": 0.1}))
    with pytest.raises(UserError, match="b: token 5 is id 205"):
        open_dataset(section, vocab_size=205)


def reference_answers(dix: list[int]) -> list[int]:
    """The loop of RWKV-LM's dataset, restated."""
    z, good = [0] * len(dix), False
    for i in range(3, len(dix)):
        if dix[i - 3 : i + 1] == [187, 187, 34, 27]:
            good = True
        if dix[i] == 0:
            good = False
        z[i] = int(good)
    return z


def test_answers_are_found_as_the_reference_finds_them() -> None:
    random = np.random.RandomState(0)
    found = 0
    for _ in range(200):
        x = random.choice([0, 27, 34, 187, 187, 5], 40)
        x[7:11] = [187, 187, 34, 27] if random.rand() < 0.5 else x[7:11]
        assert answers(x).astype(int).tolist() == reference_answers(x.tolist())
        found += answers(x).any()
    assert found > 80
    assert not answers(np.array([187, 27])).any()


@pytest.mark.parametrize("mode", [1, 2])
def test_questions_and_answers_mixed_with_other_data(tmp_path: Path, world: World, mode: int) -> None:
    tokens = np.arange(1000, 2000)
    tokens[::CTX], tokens[1::CTX], tokens[2::CTX], tokens[3::CTX] = 187, 187, 34, 27
    tokens[6::CTX] = 0
    tokens[: 20 * CTX] = 7  # windows without an answer
    own = write(tmp_path / "own", tokens, tokenizer=world)
    pile = write(tmp_path / "pile", np.arange(30000, 31000), tokenizer=world)
    section = DataSection(data_file=own, qa_mix_file=pile, my_qa_mask=mode, ctx_len=CTX)
    plain = open_dataset(section.model_copy(update={"my_qa_mask": 0}))
    dataset = open_dataset(section)
    assert dataset.facts.exit_tokens == 2 * plain.facts.exit_tokens
    replaced = 0
    for index in range(100):
        x, y, _lengths = dataset.sample(index)
        number = index + 1
        place = 0 if number == 1 else int(plain.samples.sampler.offset(number // 2 - 1))
        ours = tokens[place : place + CTX].tolist()
        if number % 2 == 0 or (mode == 1 and not any(reference_answers(ours))):
            assert x[0] >= 30000
            assert y.tolist() == (x + 1).tolist()
            replaced += number % 2
        else:
            assert x.tolist() == ours
            targets = tokens[place + 1 : place + CTX + 1]
            counts = np.array(reference_answers(ours)) if mode == 1 else np.ones(CTX)
            assert y.tolist() == np.where(counts, targets, -100).tolist()
    assert (replaced > 0) == (mode == 1)
    with pytest.raises(UserError, match="qa_mix_file"):
        open_dataset(section.model_copy(update={"qa_mix_file": ""}))
    with pytest.raises(UserError, match="pile: token 0 is id 30000"):
        open_dataset(section, vocab_size=30000)


def test_text_types_are_characters_unless_the_model_has_the_world_vocabulary(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("banana bandana", encoding="utf-8")
    section = DataSection(data_file=str(file), data_type="utf-8", ctx_len=4)
    for vocab_size in (None, 0, 5, 300):
        assert isinstance(open_dataset(section, vocab_size=vocab_size).tokenizer, Character)
    assert open_dataset(section, vocab_size=65536).facts.tokenizer == "world"
    with pytest.raises(UserError, match="but the vocabulary has 4 ids"):
        open_dataset(section, vocab_size=4)


def test_ids_without_a_tokenizer_fit_any_model_that_is_large_enough(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100))
    section = DataSection(data_file=str(tmp_path / "x.npy"), ctx_len=4)
    assert open_dataset(section, vocab_size=50304).facts.vocab_size == 50304
    assert open_dataset(section).facts.vocab_size == 65536
    assert open_dataset(section.model_copy(update={"tokenizer": "world"}), vocab_size=300).facts.vocab_size == 65536
