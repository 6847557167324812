import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rwkv.rwkv_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pyrwkv_tokenizer import RWKVTokenizer

from rookery.errors import UserError
from rookery.tokenizer import StreamDecoder, World, load, load_beside, save_beside

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))["rows"]
VOCABULARY = Path(rwkv.rwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def reference() -> rwkv.rwkv_tokenizer.TRIE_TOKENIZER:
    return rwkv.rwkv_tokenizer.TRIE_TOKENIZER(str(VOCABULARY))


def test_golden_ids_and_text(world: World) -> None:
    assert len(ROWS) == 300
    for row in ROWS:
        content = bytes.fromhex(row["hex"])
        assert world.encode(content) == row["ids"]
        assert world.decode(row["ids"]) == row["decode"]
        assert world.decode_bytes(row["ids"]) == content
        if row.get("text") is not None:
            assert world.encode(row["text"]) == row["ids"]


def test_every_token_is_the_reference_token(world: World, reference) -> None:
    assert len(reference.idx2token) == 65529
    assert all(world.decode_bytes([i]) == token for i, token in reference.idx2token.items())
    assert all(world.encode(token) == [i] for i, token in reference.idx2token.items())
    assert world.vocab_size == 65536
    assert world.end_of_document == 0


# Pieces of the vocabulary cut and joined at random meet far more of its branches than random characters do.
cuts = st.tuples(st.integers(1, 65529), st.integers(0, 8))


@settings(deadline=None, max_examples=300)
@given(st.lists(cuts, max_size=30))
def test_cut_tokens_encode_as_in_the_reference(reference, world: World, pieces: list[tuple[int, int]]) -> None:
    content = b"".join(reference.idx2token[i][cut:] for i, cut in pieces)
    assert world.encode(content) == reference.encodeBytes(content)
    assert world.decode_bytes(world.encode(content)) == content


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_any_text_encodes_as_in_the_rust_tokenizer(oracle, world: World, text: str) -> None:
    ids = world.encode(text)
    assert ids == oracle.encode(text)
    assert world.decode(ids) == text


@pytest.fixture(scope="module")
def oracle() -> RWKVTokenizer:
    return RWKVTokenizer()


@settings(deadline=None, max_examples=300)
@given(st.binary())
def test_any_bytes_come_back(reference, world: World, content: bytes) -> None:
    ids = world.encode(content)
    assert ids == reference.encodeBytes(content)
    assert world.decode_bytes(ids) == content
    assert world.decode(ids) == reference.decode(ids)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(), max_size=8))
def test_documents_together_are_documents_one_by_one(world: World, texts: list[str]) -> None:
    ids, sizes = world.encode_documents([text.encode() for text in texts])
    assert ids.tolist() == [i for text in texts for i in [*world.encode(text), 0]]
    assert sizes.tolist() == [len(world.encode(text)) + 1 for text in texts]
    assert ids.dtype == np.uint16


def test_a_stream_encodes_as_the_whole(world: World) -> None:
    text = "    def f(x):\n\n\n        return '你好，世界'*3  # ==========================\n" * 200_000
    cut = [text[i : i + 999_983] for i in range(0, len(text), 999_983)]
    assert len(text.encode()) > 3 << 22
    assert np.array_equal(np.concatenate(list(world.encode_stream(cut))), world.encode_array(text))


def test_decode_of_unknown_ids_and_of_the_end(world: World) -> None:
    assert world.decode([65530]) == "\ufffd"
    assert world.decode([-1]) == "\ufffd"
    assert world.decode([*world.encode("hi"), 0]) == "hi"
    with pytest.raises(ValueError, match="65535"):
        world.decode_bytes([1, 65535])


def test_surrogates_are_refused(world: World) -> None:
    with pytest.raises(UnicodeEncodeError):
        world.encode("\ud83d")


@settings(deadline=None)
@given(st.text(), st.integers(1, 3))
def test_stream_decoder_gives_only_whole_characters(world: World, text: str, step: int) -> None:
    decoder = StreamDecoder(world)
    ids = [byte + 1 for byte in text.encode()]
    pieces = [decoder.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "".join(pieces) + decoder.finish() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_stream_decoder_marks_what_never_becomes_text(world: World) -> None:
    decoder = StreamDecoder(world)
    assert decoder.push(world.encode(b"a\xff")) == "a\ufffd"
    assert decoder.push(world.encode("你".encode()[:2])) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(world.encode("好")) == "好"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "newline"])
def test_vocabulary_file_in_its_variants(tmp_path: Path, newline: str, last: str) -> None:
    lines = [f"{i + 1} {bytes([i])!r} 1" for i in range(256)] + ["257 'ab' 2", "300 '你好' 6"]
    file = tmp_path / "vocab.txt"
    file.write_bytes((newline.join(lines) + (newline if last else "")).encode())
    tokenizer = load(file)
    assert tokenizer.encode("abc你好") == [257, 100, 300]
    assert tokenizer.vocab_size == 301

    save_beside(tokenizer, tmp_path / "kept")
    again = load_beside(tmp_path / "kept")
    assert again is not None
    assert again.encode("abc你好") == [257, 100, 300]
    save_beside(World(), tmp_path / "kept")
    assert load_beside(tmp_path / "kept") is None


def test_reference_vocabulary_file_is_the_world(world: World) -> None:
    assert load(VOCABULARY).encode(VOCABULARY.read_bytes()[:100_000]) == world.encode(VOCABULARY.read_bytes()[:100_000])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("1 'a' 1\n2 'bb' 1\n", "line 2"),
        ("1 'a' 1\nnonsense\n", "line 2"),
        ("1 open('x') 1\n", "line 1"),
        ("", "empty"),
    ],
)
def test_damaged_vocabulary_file(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=named):
        load(file)


def test_a_byte_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text("1 'a' 1\n2 'ab' 2\n", encoding="utf-8")
    tokenizer = load(file)
    assert tokenizer.encode("aaba") == [1, 2, 1]
    with pytest.raises(UserError, match="0x62"):
        tokenizer.encode("aabb")


def test_no_such_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrold"):
        load("wrold")
    assert isinstance(load(tmp_path), World)


def test_importing_the_package_does_not_import_numba() -> None:
    code = "import rookery.tokenizer, rookery.tokenizer.chat, sys; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
