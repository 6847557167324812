import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rookery.data import BinIdx, BinIdxWriter
from rookery.errors import UserError
from rookery.tokenizer import Character, World

GOLDEN = Path(__file__).parents[1] / "golden"
META = json.loads((GOLDEN / "binidx_meta.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_reads_the_files_of_the_reference(suffix: str) -> None:
    data = BinIdx(GOLDEN / f"sample_shared{suffix}")
    assert len(data) == META["n_items"]
    assert data.tokens == META["n_tokens"]
    assert data.dtype == np.uint16
    assert data.sizes.tolist() == META["sizes"]
    assert data.pointers.tolist() == META["pointers"]
    assert data.document_ends.tolist() == META["doc_idx"]
    assert data.get(0).tolist() == data.stream[:23].tolist()
    assert all(data.get(i)[-1] == 0 for i in range(len(data)))


def test_get_reads_past_the_end_of_a_document() -> None:
    data = BinIdx(GOLDEN / "sample_shared")
    assert data.get(1, 1, 30).tolist() == data.stream[24:54].tolist()
    assert data.get(0, 700, 53).tolist() == data.stream[700:].tolist()
    assert data.get(2, 3).tolist() == data.stream[28:49].tolist()
    for arguments in [(0, 700, 54), (0, -1, 2), (33, 0, 1)]:
        with pytest.raises(IndexError):
            data.get(*arguments)


def test_writes_the_files_of_the_reference(tmp_path: Path) -> None:
    data = BinIdx(GOLDEN / "sample_shared")
    with BinIdxWriter(tmp_path / "x", np.uint16, World()) as writer:
        for i in range(10):
            writer.add(data.get(i))
        rest = int(data.pointers[10]) // 2
        writer.add_many(data.stream[rest:], data.sizes[10:])
    assert writer.tokens == 753
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"x{suffix}").read_bytes() == (GOLDEN / f"sample_shared{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "code"),
    [("u1", 1), ("i1", 2), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<f4", 6), ("<f8", 7), ("<u2", 8)],
)
def test_every_token_type(tmp_path: Path, dtype: str, code: int) -> None:
    with BinIdxWriter(tmp_path / "x", dtype, World()) as writer:
        writer.add(np.array([1, 2, 100]))
        writer.add(np.array([], dtype))
        writer.add(np.array([7]))
    assert (tmp_path / "x.idx").read_bytes()[17] == code
    data = BinIdx(tmp_path / "x")
    assert data.dtype == np.dtype(dtype)
    assert data.tokens == 4
    assert [data.get(i).tolist() for i in range(3)] == [[1, 2, 100], [], [7]]


def test_spans_in_any_order(tmp_path: Path) -> None:
    with BinIdxWriter(tmp_path / "x", np.uint16, World()) as writer:
        writer.add_spans(np.arange(10, dtype=np.uint16), np.array([3, 3, 7, 10]), [2, 0, 1, 3, 2])
    data = BinIdx(tmp_path / "x")
    assert [data.get(i).tolist() for i in range(5)] == [[3, 4, 5, 6], [0, 1, 2], [], [7, 8, 9], [3, 4, 5, 6]]


def test_an_exception_leaves_the_old_files(tmp_path: Path) -> None:
    with BinIdxWriter(tmp_path / "x", np.uint16, Character.build("ab", documents=True)) as writer:
        writer.add(np.array([1, 0]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["x.bin", "x.idx", "x.vocab.json"]
    with pytest.raises(OverflowError), BinIdxWriter(tmp_path / "x", np.uint16, World()) as writer:
        writer.add_many(np.array([5, 5, 5]), [2**40])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with BinIdxWriter(tmp_path / "x", np.uint16, World()) as writer:
        writer.add(np.array([5, 5, 5]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_killed_while_the_files_take_their_names(tmp_path: Path, suffix: str) -> None:
    code = (
        "import os, sys, numpy as np\n"
        "from rookery.data import BinIdxWriter\n"
        "from rookery.tokenizer import Character\n"
        "def hook(event, values):\n"
        "    if event == 'os.rename' and str(values[1]).endswith(sys.argv[2] or 'never'):\n"
        "        os._exit(9)\n"
        "sys.addaudithook(hook)\n"
        "with BinIdxWriter(sys.argv[1], np.uint16, Character(['\\0', 'a'])) as writer:\n"
        "    writer.add(np.array(range(int(sys.argv[3]), 8)))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    assert subprocess.run([*command, "", "1"], check=False).returncode == 0
    assert BinIdx(tmp_path / "x").tokens == 7
    assert subprocess.run([*command, suffix, "2"], check=False).returncode == 9
    with pytest.raises(UserError, match=r"x\.idx does not exist"):
        BinIdx(tmp_path / "x")
    assert subprocess.run([*command, "", "2"], check=False).returncode == 0
    assert BinIdx(tmp_path / "x").tokens == 6


def damaged(tmp_path: Path, index: bytes | None, data: bytes | None) -> Path:
    if index is not None:
        (tmp_path / "x.idx").write_bytes(index)
    if data is not None:
        (tmp_path / "x.bin").write_bytes(data)
    return tmp_path / "x"


INDEX = (GOLDEN / "sample_shared.idx").read_bytes()
DATA = (GOLDEN / "sample_shared.bin").read_bytes()


@pytest.mark.parametrize(
    ("index", "data", "named"),
    [
        (None, DATA, "x.idx does not exist"),
        (INDEX, None, "x.bin does not exist"),
        (INDEX[:30], DATA, "cut short"),
        (INDEX[:-8], DATA, "cut short"),
        (INDEX + b"\0", DATA, "damaged"),
        (INDEX, DATA[:-2], "do not belong together"),
        (INDEX, DATA + b"\0\0", "do not belong together"),
        (INDEX, b"", "do not belong together"),
        (b"PK" + INDEX[2:], DATA, "MMIDIDX"),
        (b"", DATA, "MMIDIDX"),
        (INDEX[:17] + b"\x09" + INDEX[18:], DATA, "token type 9"),
        (INDEX[:9] + struct.pack("<Q", 2) + INDEX[17:], DATA, "version 2"),
        (INDEX[:18] + struct.pack("<QQ", 0, 0), b"", "no documents"),
        (INDEX[:18] + struct.pack("<QQ", 2**60, 34) + INDEX[34:], DATA, "cut short"),
        (INDEX[:18] + struct.pack("<QQiqqq", 1, 2, 0, 0, 0, 1), b"", "no tokens"),
    ],
)
def test_damaged_files(tmp_path: Path, index: bytes | None, data: bytes | None, named: str) -> None:
    with pytest.raises(UserError, match=named):
        BinIdx(damaged(tmp_path, index, data))
