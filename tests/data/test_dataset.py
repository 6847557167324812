import json
from pathlib import Path

import numpy as np
import pytest

from rookery.config.tree import DataSection
from rookery.data import BinIdxWriter, make, open_dataset, sample_offset
from rookery.errors import UserError
from rookery.tokenizer import Character, World, load

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def binidx(path: Path, tokens: np.ndarray, dtype: str = "<u2") -> str:
    with BinIdxWriter(path, dtype, World()) as writer:
        writer.add(tokens)
    return str(path)


def test_samples_are_those_of_the_reference_order(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(1, 60000, 10_007)
    dataset = open_dataset(DataSection(data_file=binidx(tmp_path / "x", tokens), ctx_len=16))
    facts = dataset.facts
    assert (facts.data_type, facts.tokens, facts.documents) == ("binidx", 10_007, 1)
    assert (facts.sampler, facts.prime, facts.samples, facts.exit_tokens) == ("cubic", 617, 617, 10_007)
    assert (facts.tokenizer, facts.vocab_size, dataset.notes) == ("world", 65536, [])
    for i in range(700):
        x, y, _lengths = dataset.sample(i)
        offset = sample_offset(i % 617, rank=0, world_size=1, epoch=0, ctx_len=16, prime=617)
        assert x.dtype == y.dtype == np.int64
        assert x.tolist() == tokens[offset : offset + 16].tolist()
        assert y.tolist() == tokens[offset + 1 : offset + 17].tolist()
    x, y, lengths = dataset.batch([3, 700])
    assert lengths is None
    assert x.shape == y.shape == (2, 16)
    assert np.array_equal(x[1], dataset.sample(700)[0])


def test_small_data_fall_back_to_full_coverage_and_say_so(tmp_path: Path) -> None:
    dataset = open_dataset(DataSection(data_file=binidx(tmp_path / "x", np.arange(1, 62)), ctx_len=16), seed=5)
    assert (dataset.facts.sampler, dataset.facts.prime, dataset.facts.samples) == ("cover", 0, 4)
    assert "too few for the prime rule" in dataset.notes[0]
    targets = np.concatenate([dataset.sample(i)[1] for i in range(4, 8)])
    assert set(targets.tolist()) == set(range(2, 62))


def test_data_shorter_than_a_window_are_padded(tmp_path: Path) -> None:
    dataset = open_dataset(DataSection(data_file=binidx(tmp_path / "x", np.array([5, 6, 7])), ctx_len=5))
    x, y, _lengths = dataset.sample(0)
    assert (x.tolist(), y.tolist()) == ([5, 6, 7, 0, 0], [6, 7, -100, -100, -100])


def test_one_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fewer than two tokens"):
        open_dataset(DataSection(data_file=binidx(tmp_path / "x", np.array([5]))))


def test_given_prime(tmp_path: Path) -> None:
    name = binidx(tmp_path / "x", np.arange(10_007) % 7)
    assert open_dataset(DataSection(data_file=name, ctx_len=16, magic_prime=587)).facts.prime == 587
    for prime in (619, 11, 600, 641):
        with pytest.raises(UserError, match=f"magic_prime {prime}"):
            open_dataset(DataSection(data_file=name, ctx_len=16, magic_prime=prime))


def test_a_prime_copied_from_data_make_works_even_for_little_data(tmp_path: Path) -> None:
    name = binidx(tmp_path / "x", np.arange(753) % 7)
    assert open_dataset(DataSection(data_file=name, ctx_len=16, magic_prime=41)).facts.sampler == "cover"


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8", "u1"])
def test_ids_beyond_the_vocabulary_are_found_before_training(tmp_path: Path, dtype: str) -> None:
    tokens = np.arange(1000) % 50
    tokens[777] = 99
    name = binidx(tmp_path / "x", tokens, dtype)
    assert open_dataset(DataSection(data_file=name, ctx_len=16), vocab_size=100).facts.tokens == 1000
    with pytest.raises(UserError, match=r"token 777 is id 99.* 99 ids"):
        open_dataset(DataSection(data_file=name, ctx_len=16), vocab_size=99)


def test_negative_ids_are_found(tmp_path: Path) -> None:
    name = binidx(tmp_path / "x", np.array([1, 2, -3, 4] * 20), "<i4")
    with pytest.raises(UserError, match="token 2 is id -3"):
        open_dataset(DataSection(data_file=name, ctx_len=16))


def test_masks_reach_the_targets(tmp_path: Path, world: World) -> None:
    ids = np.array(world.encode("User: a\n\nAssistant: b\n\nUser: c"))
    name = binidx(tmp_path / "x", ids)
    dataset = open_dataset(DataSection(data_file=name, ctx_len=len(ids) - 1, loss_mask="answer"))
    x, y, _lengths = dataset.sample(0)
    assert x.tolist() == ids[:-1].tolist()
    assert world.decode([i for i in y.tolist() if i != -100]) == " b\n\n"


def test_character_text_as_the_reference_reads_it(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / "charlevel.json").read_text(encoding="utf-8"))
    file = tmp_path / "text.txt"
    file.write_text(golden["text"], encoding="utf-8", newline="\r\n")
    for section, vocab_size in (
        (DataSection(data_file=str(file), ctx_len=16), 0),
        (DataSection(data_file=str(file), ctx_len=16, data_type="utf-8", tokenizer="char"), None),
    ):
        dataset = open_dataset(section, vocab_size=vocab_size)
        assert (dataset.facts.vocab_size, dataset.facts.tokens) == (golden["vocab_size"], golden["data_size"])
        assert (dataset.facts.data_type, dataset.facts.tokenizer) == ("utf-8", "char")
        offset = golden["offset"]
        assert dataset.content.stream[offset : offset + 16].tolist() == golden["x"]
    dataset.save_vocabulary(tmp_path)
    assert (tmp_path / "vocab.json").read_bytes() == golden["vocab_json_text"].encode()
    assert isinstance(load(tmp_path), Character)


def test_text_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("你好", encoding="gb18030")
    for vocab_size in (0, None):
        with pytest.raises(UserError, match=r"x\.txt is not utf-8"):
            open_dataset(DataSection(data_file=str(tmp_path / "x.txt")), vocab_size=vocab_size)


def test_utf16_text(tmp_path: Path) -> None:
    file = tmp_path / "text.dat"
    file.write_bytes("你好你好".encode("utf-16-le"))
    dataset = open_dataset(
        DataSection(data_file=str(file), data_type="utf-16le", tokenizer="char", ctx_len=2), vocab_size=0
    )
    assert dataset.tokenizer.decode(dataset.content.stream.tolist()) == "你好你好"


def test_text_and_folder_in_the_world_vocabulary(tmp_path: Path, world: World) -> None:
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes(b"first\r\nline")
    dataset = open_dataset(DataSection(data_file=str(tmp_path), ctx_len=2))
    assert dataset.content.stream.tolist() == [*world.encode("first\nline"), 0, *world.encode("second"), 0]
    assert dataset.facts.documents == 2
    dataset = open_dataset(DataSection(data_file=str(tmp_path / "a.txt"), ctx_len=2))
    assert dataset.content.stream.tolist() == world.encode("first\nline")


def test_jsonl_in_both_vocabularies(tmp_path: Path, world: World) -> None:
    section = DataSection(data_file=str(GOLDEN / "sample_shared.jsonl"), ctx_len=4)
    dataset = open_dataset(section)
    assert dataset.facts.documents == 11
    make(GOLDEN / "sample_shared.jsonl", 1, tmp_path / "x", shuffle=False)
    made = open_dataset(DataSection(data_file=str(tmp_path / "x"), ctx_len=4))
    assert np.array_equal(dataset.content.stream, made.content.stream)

    dataset = open_dataset(section, vocab_size=0)
    assert dataset.tokenizer.end_of_document == 0
    assert np.count_nonzero(dataset.content.stream == 0) == 11


def test_a_bad_jsonl_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a"}\n\n{"txt": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.jsonl, line 3"):
        open_dataset(DataSection(data_file=str(file)))


def test_binidx_with_a_character_vocabulary_is_read_with_it(tmp_path: Path) -> None:
    make(GOLDEN / "sample_shared.jsonl", 1, tmp_path / "x", tokenizer="char")
    dataset = open_dataset(DataSection(data_file=str(tmp_path / "x.bin"), ctx_len=4))
    assert isinstance(dataset.tokenizer, Character)
    assert dataset.facts.tokenizer == str(tmp_path / "x.vocab.json")
    assert dataset.facts.vocab_size == dataset.tokenizer.vocab_size
    (tmp_path / "x.vocab.json").unlink()
    with pytest.raises(UserError, match=r"x\.vocab\.json"):
        open_dataset(DataSection(data_file=str(tmp_path / "x"), tokenizer="char"))


def test_arrays(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 60000, 1000)
    np.save(tmp_path / "x.npy", tokens)
    assert np.array_equal(
        open_dataset(DataSection(data_file=str(tmp_path / "x.npy"), ctx_len=4)).content.stream, tokens
    )
    tokens.astype("<u2").tofile(tmp_path / "x.raw")
    dataset = open_dataset(DataSection(data_file=str(tmp_path / "x.raw"), data_type="uint16", ctx_len=4))
    assert np.array_equal(dataset.content.stream, tokens)
    np.save(tmp_path / "y.npy", tokens.reshape(10, 100))
    with pytest.raises(UserError, match="one row of integers"):
        open_dataset(DataSection(data_file=str(tmp_path / "y.npy")))
    np.save(tmp_path / "z.npy", np.array([{"a": 1}], object))
    with pytest.raises(UserError, match="cannot read"):
        open_dataset(DataSection(data_file=str(tmp_path / "z.npy")))


def test_dummy_data() -> None:
    dataset = open_dataset(DataSection(data_type="dummy", ctx_len=32))
    assert (dataset.facts.tokens, dataset.facts.vocab_size) == (1_620_950, 13)
    assert dataset.tokenizer.decode(dataset.content.stream[:24].tolist()) == ".0+0=0..1+1=2..2+4=6..3+"


@pytest.mark.parametrize("name", ["", "missing", "missing.jsonl", "missing.txt", "missing.npy", "missing.bin"])
def test_missing_data(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"missing|no training data"):
        open_dataset(DataSection(data_file=name and str(tmp_path / name)))


def test_validation_text_takes_the_vocabulary_of_the_training_text(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abcdef" * 9, encoding="utf-8")
    (tmp_path / "val.txt").write_text("fedf" * 9, encoding="utf-8")
    section = DataSection(data_file=str(tmp_path / "train.txt"), val_file=str(tmp_path / "val.txt"), ctx_len=4)
    train = open_dataset(section, vocab_size=0)
    val = open_dataset(section, vocab_size=6, data_file=section.val_file, tokenizer=train.tokenizer)
    assert val.content.stream[:4].tolist() == [5, 4, 3, 5]
    (tmp_path / "val.txt").write_text("xyz", encoding="utf-8")
    with pytest.raises(UserError, match="'x'"):
        open_dataset(section, data_file=section.val_file, tokenizer=train.tokenizer)


def test_validation_data(tmp_path: Path) -> None:
    section = DataSection(data_file="unused", val_file=binidx(tmp_path / "v", np.arange(100)), ctx_len=4)
    assert open_dataset(section, data_file=section.val_file).facts.tokens == 100
