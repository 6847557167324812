import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rookery.errors import UserError
from rookery.tokenizer import Character, StreamDecoder, World, load, load_beside, save_beside

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "charlevel.json").read_text(encoding="utf-8"))


def test_vocabulary_file_is_that_of_the_reference(tmp_path: Path) -> None:
    tokenizer = Character.build(GOLDEN["text"])
    assert tokenizer.vocab_size == GOLDEN["vocab_size"]
    tokenizer.save(tmp_path / "vocab.json")
    assert (tmp_path / "vocab.json").read_bytes() == GOLDEN["vocab_json_text"].encode("utf-8")
    ids = tokenizer.encode_array(GOLDEN["text"])
    assert len(ids) == GOLDEN["data_size"]
    offset, length = GOLDEN["offset"], len(GOLDEN["x"])
    assert ids[offset : offset + length].tolist() == GOLDEN["x"]
    assert load(tmp_path / "vocab.json").encode(GOLDEN["text"]) == ids.tolist()


@given(st.text(min_size=1))
def test_text_comes_back(text: str) -> None:
    tokenizer = Character.build(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\0", "")
    assert tokenizer.encode(text.encode()) == tokenizer.encode(text)
    assert tokenizer.characters == sorted(set(text))
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push([i]) for i in tokenizer.encode(text)) == text.replace("\0", "")


def test_unknown_character_is_named() -> None:
    tokenizer = Character.build("abc")
    for text, named in (("abz", "'z' .U.007A."), ("你", "U.4F60"), ("\0", "U.0000")):
        with pytest.raises(UserError, match=named):
            tokenizer.encode(text)


def test_end_of_document() -> None:
    assert Character.build("ab").end_of_document is None
    tokenizer = Character.build("ab", documents=True)
    assert tokenizer.end_of_document == 0
    ids, sizes = tokenizer.encode_documents([b"ab", b"", b"b"])
    assert (ids.tolist(), sizes.tolist()) == ([1, 2, 0, 0, 2, 0], [3, 1, 2])
    assert tokenizer.decode(ids) == "abb"
    with pytest.raises(UserError, match=r"U\+0000"):
        tokenizer.encode_documents([b"a\0b"])
    with pytest.raises(UserError, match="no end of document"):
        Character.build("ab").encode_documents([b"a"])


def test_unknown_id() -> None:
    tokenizer = Character.build("ab")
    assert tokenizer.decode([0, 2]) == "\ufffd"
    with pytest.raises(ValueError, match="-1"):
        tokenizer.decode_bytes([-1])


def test_a_run_directory_keeps_it(tmp_path: Path) -> None:
    save_beside(Character.build("xyz"), tmp_path / "vocab")
    assert load(tmp_path).encode("zyx") == [2, 1, 0]
    assert isinstance(load_beside(tmp_path / "vocab"), Character)
    save_beside(World(), tmp_path / "vocab")
    assert not list(tmp_path.iterdir())


def test_more_characters_than_uint16_holds() -> None:
    text = "".join(chr(code) for code in range(0x20, 0x20000) if not 0xD800 <= code < 0xE000)
    tokenizer = Character.build(text)
    assert tokenizer.dtype is np.int32
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "vocab.json"),
        ("[1]", "object"),
        ('{"0": "ab"}', "'0'"),
        ('{"1": "a"}', "'1'"),
        ('{"0": 5}', "'0'"),
        ("{}", "empty"),
    ],
)
def test_damaged_vocabulary(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "vocab.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=named):
        load(tmp_path / "vocab.json")


def test_utf16_vocabulary_of_the_old_helper_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"0": "a"}', encoding="utf-16")
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path / "vocab.json")
