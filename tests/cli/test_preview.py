"""`rookery data preview`, and `data make` of conversations, as a person, a pipe and the console see them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rookery.cli import run
from rookery.config.tree import DataSection
from rookery.data import BinIdx, BinIdxWriter, make, open_dataset
from rookery.data.preview import ENOUGH, preview
from rookery.tokenizer import World

CHAT = {
    "messages": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2 🐼"},
        {"role": "user", "content": "好？"},
        {"role": "assistant", "content": "好。"},
    ]
}


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def told(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert run(["data", *words]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_what_is_trained_stands_in_brackets_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(tmp_path / "x.jsonl", CHAT, *({"messages": CHAT["messages"][:2]} for _ in range(9)))
    shown = told(capsys, "preview", file, "--rows", "1", "--ctx-len", "64")
    assert "User: 1+1?\n\nAssistant:⟦ 2 🐼\n\n⟧User: 好？\n\nAssistant:⟦ 好。<|endoftext|>⟧\n" in shown
    assert f"{file}: data_type jsonl, data_format messages, template world, dataload pack, ctx_len 64" in shown
    assert "what the assistant says" in shown
    assert "10 documents" in shown
    assert "█" in shown
    assert "\x1b" not in shown
    assert "cut" not in shown


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX")
@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_shows_it_in_green(tmp_path: Path, no_color: bool) -> None:
    import pty

    file = jsonl(tmp_path / "x.jsonl", CHAT)
    terminal, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
    environment.pop("NO_COLOR", None)
    environment |= {"NO_COLOR": "1"} if no_color else {}
    command = [sys.executable, "-m", "rookery", "data", "preview", file]
    process = subprocess.Popen(command, stdout=other, stderr=subprocess.DEVNULL, env=environment)
    os.close(other)
    screen = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:
            break
        if not part:
            break
        screen += part
    os.close(terminal)
    assert process.wait() == 0
    text = screen.decode().replace("\r\n", "\n")
    assert ("\x1b[32m 2 🐼" in text) != no_color
    assert ("⟦ 2 🐼\n\n⟧" in text) == no_color
    assert ("\x1b[32m" in text) != no_color


def test_json_for_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = jsonl(tmp_path / "x.jsonl", CHAT, {"messages": 3}, CHAT)
    found = json.loads(told(capsys, "preview", "--json", file, "--rows", "1"))
    assert (found["data_format"], found["documents"], found["fault_count"]) == ("messages", 2, 1)
    assert found["faults"] == [f'{file}, line 2: "messages" is not a list']
    (row,) = found["rows"]
    assert [(span["text"], span["trained"], span["kind"]) for span in row["spans"]] == [
        ("User: 1+1?\n\nAssistant:", False, "text"),
        (" 2 🐼\n\n", True, "text"),
        ("User: 好？\n\nAssistant:", False, "text"),
        (" 好。", True, "text"),
        ("", True, "end"),
    ]
    assert found["trained"] == 2 * row["trained"]
    assert sum(entry["documents"] for entry in found["histogram"]) == 2


def test_its_figures_are_those_of_the_training(tmp_path: Path) -> None:
    words = "one two three four five six seven eight nine ten"
    rows = [{"prompt": f"q{i}", "completion": words[: i * 3]} for i in range(17)]
    for data in (
        DataSection(data_file=jsonl(tmp_path / "x.jsonl", *rows), ctx_len=12),
        DataSection(data_file=str(tmp_path / "x.jsonl"), ctx_len=12, loss_mask="none", dataload="only"),
        DataSection(data_file=str(tmp_path / "x.jsonl"), ctx_len=12, loss_mask="qa"),
        DataSection(data_file=jsonl(tmp_path / "t.jsonl", *({"text": words[: i * 3]} for i in range(17))), ctx_len=12),
        DataSection(data_file=str(tmp_path / "t.jsonl"), ctx_len=5, dataload="pack"),
    ):
        found, facts = preview(data), open_dataset(data).facts
        assert (found.trained, found.cut, found.left_out) == (facts.trained, facts.cut, facts.left_out)
        assert found.documents == facts.documents
        assert (found.dataload, found.loss_mask, found.data_format) == (
            facts.dataload,
            facts.loss_mask,
            facts.data_format,
        )


def test_what_is_cut_and_what_is_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = jsonl(
        tmp_path / "x.jsonl",
        {"prompt": "q", "completion": "word " * 100},
        {"prompt": "word " * 100, "completion": "a"},
        {"prompt": "q", "completion": ""},
    )
    shown = told(capsys, "preview", file, "--ctx_len", "20")
    assert "2 documents (66.7%) are longer than ctx_len 20 and will be cut there" in shown
    assert "2 documents have nothing to train within ctx_len 20" in shown
    assert "✂ cut here: 87 more tokens" in shown
    assert "reads on in the next sample" in told(capsys, "preview", file, "--ctx_len", "20", "--dataload", "get")


def test_thoughts_and_templates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = jsonl(tmp_path / "x.jsonl", {"prompt": "q", "completion": "<think>hm</think>yes"})
    assert "template world leaves out" in told(capsys, "preview", file)
    shown = told(capsys, "preview", file, "--template", "g1")
    assert "⟦ <think>\nhm\n</think>\nyes<|endoftext|>⟧" in shown
    assert "leaves out" not in shown


def test_any_data_can_be_previewed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("first text", encoding="utf-8")
    (tmp_path / "texts" / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "c.txt").write_bytes(b"bad \xff")
    make(tmp_path / "texts", 1, tmp_path / "x", shuffle=False)
    np.save(tmp_path / "ids.npy", np.arange(1, 300))
    for name, documents in (("texts", 2), ("texts/a.txt", 1), ("x", 2), ("x.bin", 2), ("ids.npy", 1)):
        found = preview(DataSection(data_file=str(tmp_path / name), ctx_len=64))
        assert (found.documents, found.fault_count, found.complete) == (documents, 0, True)
        assert found.trained == found.tokens - 1
    (tmp_path / "texts" / "c.txt").write_bytes(b"bad \xff")
    found = preview(DataSection(data_file=str(tmp_path / "texts")))
    assert (found.documents, found.fault_count) == (2, 1)
    assert "not UTF-8" in found.faults[0]
    assert "answer" not in told(capsys, "preview", str(tmp_path / "x"), "--loss_mask", "none")
    make(jsonl(tmp_path / "chat.jsonl", CHAT), 1, tmp_path / "chat")
    shown = told(capsys, "preview", str(tmp_path / "chat"), "--loss_mask", "answer")
    assert "Assistant:⟦ 2 🐼\n\n⟧User:" in shown


def test_a_recipe_can_be_previewed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = jsonl(tmp_path / "x.jsonl", {"q": "1+1", "a": "2"})
    (tmp_path / "r.toml").write_text(
        f"[data]\ndata_file = {json.dumps(file)}\nsft_field = ['q', 'a']\n", encoding="utf-8"
    )
    assert "Assistant:⟦ 2<|endoftext|>⟧" in told(capsys, "preview", str(tmp_path / "r.toml"))
    assert "Assistant:⟦ 2<|endoftext|>⟧" in told(capsys, "preview", file, "--sft_field", "q", "a")


def test_a_long_document_is_shown_from_both_ends(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", {"prompt": "q", "completion": "word " * 3000 + "last"})
    (row,) = preview(DataSection(data_file=file, ctx_len=8192)).rows
    kinds = [span.kind for span in row.spans]
    assert kinds == ["text", "text", "gap", "text", "end"]
    assert row.spans[2].text == str(row.tokens - 1000)
    assert row.spans[3].text.endswith(" last")


def test_a_large_file_is_looked_at_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = tmp_path / "x"
    with BinIdxWriter(prefix, "<u2", World()) as writer:
        for _ in range(ENOUGH // 2 // (1 << 20) + 3):
            writer.add(np.full(1 << 20, 300, np.uint16))
    data = DataSection(data_file=str(prefix))
    found = preview(data)
    assert not found.complete
    assert found.documents < len(BinIdx(prefix))
    assert preview(data, everything=True).documents == len(BinIdx(prefix))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.jsonl"], "missing.jsonl does not exist"),
        (["missing"], "missing"),
        (["--json"], "no training data"),
        (["x.jsonl", "--template", "chatml"], "--template chatml: must be one of world, g1"),
        (["x.jsonl", "--loss_mask", "all"], "must be one of auto, none, pad, qa, se, answer"),
        (["x.jsonl", "--nonsense", "1"], "--nonsense is not a flag"),
        (["x.jsonl", "--loss_mask", "se"], "mask_id"),
        (["unknown.jsonl"], "unknown.jsonl: rows with the keys a, b are of no known format"),
    ],
)
def test_mistakes_are_told_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "x.jsonl", CHAT)
    jsonl(tmp_path / "unknown.jsonl", {"a": 1, "b": 2})
    shown = told(capsys, "preview", *words, status=2)
    assert message in shown
    assert "Traceback" not in shown


def test_nothing_but_bad_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text("bad\n" * 30, encoding="utf-8")
    shown = told(capsys, "preview", str(tmp_path / "x.jsonl"))
    assert "30 lines are no documents" in shown
    assert "line 20: not JSON" in shown
    assert "and 10 more" in shown
    (tmp_path / "x.jsonl").write_text("", encoding="utf-8")
    assert "0 documents" in told(capsys, "preview", str(tmp_path / "x.jsonl"))


def test_make_says_that_binidx_holds_no_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "x.jsonl", {"query": "1+1", "reply": "<think>hm</think>2"})
    shown = told(capsys, "make", "x.jsonl", "--sft_field", "query", "reply", "--template", "g1")
    assert "rows of format prompt became text (template g1); binidx cannot hold" in shown
    stream = BinIdx(tmp_path / "x").stream.tolist()
    assert World().decode(stream[:-1]) == "User: 1+1\n\nAssistant: <think>\nhm\n</think>\n2"
    jsonl(tmp_path / "y.jsonl", {"text": "a"})
    assert "became text" not in told(capsys, "make", "y.jsonl")
    assert "template chatml: expected" in told(capsys, "make", "y.jsonl", "--template", "chatml", status=2)
