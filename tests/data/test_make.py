import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rookery.data import BinIdx, make
from rookery.data.sources import CHUNK, find_units
from rookery.errors import UserError
from rookery.tokenizer import Character, World, load, load_beside

GOLDEN = Path(__file__).parents[1] / "golden"
ROOKERY = [sys.executable, "-m", "rookery"]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def lines_of(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def documents(prefix: Path) -> list[list[int]]:
    data = BinIdx(prefix)
    return [data.get(i).tolist() for i in range(len(data))]


def digests(prefix: Path) -> list[str]:
    return [hashlib.sha256(Path(f"{prefix}{suffix}").read_bytes()).hexdigest() for suffix in (".bin", ".idx")]


def golden_digests() -> list[str]:
    return digests(GOLDEN / "sample_shared")


def test_the_files_of_the_reference_for_its_order(tmp_path: Path) -> None:
    made = make(GOLDEN / "sample_shared_shuffled.jsonl", 1, tmp_path / "x", shuffle=False)
    assert (made.documents, made.tokens, made.dtype, made.skipped) == (33, 753, np.uint16, 0)
    assert digests(tmp_path / "x") == golden_digests()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_the_shuffled_files_of_the_reference_for_its_seed(tmp_path: Path) -> None:
    make(GOLDEN / "sample_shared.jsonl", 3, tmp_path / "x", seed=77)
    assert digests(tmp_path / "x") == golden_digests()


def test_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    generator = random.Random(0)
    texts = ["".join(generator.choices("abc 你好，\n", k=generator.randrange(4000))) for _ in range(2500)]
    texts[1000] = "x" * (CHUNK + 10)  # a line longer than a chunk
    source = lines_of(tmp_path / "in.jsonl", texts)
    assert source.stat().st_size > 2 * CHUNK
    for tokenizer in ("world", "char"):
        made = [make(source, 2, tmp_path / f"{tokenizer}{n}", seed=3, workers=n, tokenizer=tokenizer) for n in (1, 2)]
        assert digests(tmp_path / f"{tokenizer}1") == digests(tmp_path / f"{tokenizer}2")
        assert made[0].documents == 5000
    assert (tmp_path / "char1.vocab.json").read_bytes() == (tmp_path / "char2.vocab.json").read_bytes()
    make(source, 1, tmp_path / "plain", shuffle=False)
    tokenizer = World()
    assert documents(tmp_path / "plain") == [[*tokenizer.encode(text), 0] for text in texts]


def test_seeds_differ_and_every_epoch_has_every_document(tmp_path: Path, world: World) -> None:
    texts = [f"document {i}" for i in range(50)]
    source = lines_of(tmp_path / "in.jsonl", texts)
    expected = sorted([*world.encode(text), 0] for text in texts)
    orders = []
    for seed in (0, 1):
        make(source, 3, tmp_path / "x", seed=seed)
        found = documents(tmp_path / "x")
        orders += [found[:50], found[50:100], found[100:]]
    assert all(sorted(order) == expected for order in orders)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_lines_as_the_reference_strips_them(tmp_path: Path, world: World) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(
        "\ufeff".encode()
        + b'{"text": "a"}\r\n\r\n  \n\xe3\x80\x80\n\xc2\xa0{"text": "b"} \r'
        + b'{"text": "\\ud83d\\udc3c", "other": [1]}\n{"text": ""}'
    )
    make(source, 1, tmp_path / "x", shuffle=False)
    assert documents(tmp_path / "x") == [[*world.encode(text), 0] for text in ("a", "b", "🐼", "")]


@pytest.mark.parametrize("cut", [-1, 0, 1])
def test_lines_at_the_edge_of_a_unit(tmp_path: Path, world: World, cut: int) -> None:
    line = b'{"text": "a line"}\n'
    first = b'{"text": "' + b"x" * (CHUNK + cut - 13) + b'"}\n'
    source = tmp_path / "in.jsonl"
    source.write_bytes(first + line * 3)
    assert len(first) == CHUNK + cut
    assert len(find_units(source)) == 2
    make(source, 1, tmp_path / "x", shuffle=False)
    assert documents(tmp_path / "x")[1:] == [[*world.encode("a line"), 0]] * 3
    source.write_bytes(first + line * 3 + b"bad\n")
    with pytest.raises(UserError, match="line 5"):
        make(source, 1, tmp_path / "x")


BAD = [
    ("not JSON at all", "not JSON"),
    ('{"text": "cut', "not JSON"),
    ("[1, 2]", "not an object"),
    ('{"txt": "a"}', 'no key "text"'),
    ('{"text": null}', 'no key "text"'),
    ('{"text": 5}', "not a string"),
    ('{"text": "\\ud83d alone"}', "surrogate"),
    ("[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_stops_and_nothing_is_written(tmp_path: Path, line: str, reason: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n\n' + line + '\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=f"line 3: .*{reason}"):
        make(source, 1, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_lines_are_skipped_and_reported_with_their_numbers(tmp_path: Path, world: World) -> None:
    source = tmp_path / "in.jsonl"
    good = b'{"text": "good"}\n'
    filler = good * (CHUNK // len(good) + 1)
    first_lines = filler.count(b"\n")
    source.write_bytes(b"bad\n" + filler + b"\xff\xfe\n" + good + b'{"text": 1}\n' * 10)
    for workers in (1, 2):
        made = make(source, 1, tmp_path / "x", on_error="skip", workers=workers)
        assert made.skipped == 12
        assert [fault.line for fault in made.faults] == [1, *(first_lines + k for k in (2, 4, 5, 6))]
        assert "not UTF-8" in made.faults[1].reason
        assert made.documents == first_lines + 1


def test_nothing_but_bad_lines(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("x\n", encoding="utf-8")
    with pytest.raises(UserError, match="no documents"):
        make(source, 1, tmp_path / "x", on_error="skip")
    source.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="no documents"):
        make(source, 1, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_character_vocabulary(tmp_path: Path) -> None:
    source = lines_of(tmp_path / "in.jsonl", ["好a", "", "b"])
    made = make(source, 1, tmp_path / "x", tokenizer="char", shuffle=False)
    assert json.loads((tmp_path / "x.vocab.json").read_text(encoding="utf-8")) == {
        "0": "\0",
        "1": "a",
        "2": "b",
        "3": "好",
    }
    assert documents(tmp_path / "x") == [[3, 1, 0], [0], [2, 0]]
    assert isinstance(made.tokenizer, Character)

    lines_of(source, ["a", "ac", "b\0"])
    with pytest.raises(UserError, match=r"line 2: .*'c'"):
        make(source, 1, tmp_path / "y", tokenizer=str(tmp_path / "x.vocab.json"))
    made = make(source, 1, tmp_path / "y", tokenizer=str(tmp_path / "x.vocab.json"), on_error="skip")
    assert [(fault.line, made.documents) for fault in made.faults] == [(2, 1), (3, 1)]
    assert load(tmp_path / "y.vocab.json").vocab_size == 4

    Character.build("ab").save(tmp_path / "no_end.json")
    with pytest.raises(UserError, match="no end of document"):
        make(source, 1, tmp_path / "z", tokenizer=str(tmp_path / "no_end.json"))


def test_a_folder_of_texts(tmp_path: Path, world: World) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"two\r\nlines\r\n")
    (folder / "sub" / "a.txt").write_text("你好", encoding="utf-8-sig")
    (folder / "note.md").write_text("no", encoding="utf-8")
    for workers in (1, 2):
        make(folder, 1, tmp_path / "x", shuffle=False, workers=workers)
        assert documents(tmp_path / "x") == [[*world.encode("two\nlines\n"), 0], [*world.encode("你好"), 0]]


def test_a_long_text_is_one_document(tmp_path: Path, world: World) -> None:
    text = "The quick brown 狐狸 jumps over the lazy dog. " * 300_000
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    progress: list[tuple[str, int, int]] = []
    make(tmp_path / "in.txt", 1, tmp_path / "x", progress=lambda *state: progress.append(state))
    assert len(text.encode()) > 2 * CHUNK
    assert documents(tmp_path / "x") == [[*world.encode(text), 0]]
    assert len([state for state in progress if state[0] == "tokenising"]) > 3
    assert all(done <= total for _phase, done, total in progress)
    assert progress[-1][1] == progress[-1][2]


def test_a_text_that_turns_out_bad_is_taken_back(tmp_path: Path, world: World) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one", encoding="utf-8")
    (folder / "b.txt").write_bytes(b"word " * (3 * CHUNK // 5) + b"\xff")
    (folder / "c.txt").write_text("three", encoding="utf-8")
    with pytest.raises(UserError, match=r"b\.txt: not UTF-8"):
        make(folder, 1, tmp_path / "x")
    made = make(folder, 1, tmp_path / "x", on_error="skip", shuffle=False)
    assert documents(tmp_path / "x") == [[*world.encode("one"), 0], [*world.encode("three"), 0]]
    assert made.skipped == 1


def test_output_goes_to_the_current_directory_under_the_name_of_the_input(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "work").mkdir()
    source = lines_of(tmp_path / "my.data.jsonl", ["a"])
    monkeypatch.chdir(tmp_path / "work")
    assert make(source).prefix == "my.data"
    assert sorted(os.listdir()) == ["my.data.bin", "my.data.idx"]
    make(source, 1, tmp_path / "new" / "folder" / "x.bin")
    assert (tmp_path / "new" / "folder" / "x.idx").exists()


def test_wrong_arguments(tmp_path: Path) -> None:
    source = lines_of(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "empty").mkdir()
    for arguments, named in (
        ((tmp_path / "none.jsonl",), "does not exist"),
        ((tmp_path / "empty",), r"no \.txt files"),
        ((source, 0), "epochs"),
        ((tmp_path / "x.bin",), "does not exist"),
        ((GOLDEN / "sample_shared.bin",), "already"),
        ((source, 1, tmp_path / "in.jsonl" / "x"), "cannot write"),
    ):
        with pytest.raises(UserError, match=named):
            make(*arguments)
    with pytest.raises(UserError, match="wrold"):
        make(source, tokenizer="wrold")


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "LC_ALL": "C.UTF-8"}
    command = [*ROOKERY, "data", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", check=False, env=environment)


def test_commands(tmp_path: Path) -> None:
    line = "--my_exit_tokens 753 --magic_prime 41 --ctx_len 16"
    done = run("make", GOLDEN / "sample_shared.jsonl", "3", "16", "--seed", "77", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == line
    assert "753 tokens" in done.stdout
    assert digests(tmp_path / "sample_shared") == golden_digests()

    for name in ("sample_shared", "sample_shared.bin", "sample_shared.idx"):
        done = run("info", name, "--ctx_len", "16", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == line
        for part in ("documents: 33", "tokens: 753", "uint16", "1 to 53 tokens", "highest token id: 59179"):
            assert part in done.stdout
    done = run("info", "sample_shared", "--ctx-len", "512", cwd=tmp_path)
    assert "Too few tokens" in done.stdout
    assert "magic_prime" not in done.stdout


def test_commands_with_bad_input(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\nbad\n', encoding="utf-8")
    done = run("make", "in.jsonl", "1", "16", cwd=tmp_path)
    assert done.returncode == 2
    assert "line 2" in done.stderr
    assert "--on-error skip" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]

    done = run("make", "in.jsonl", "1", "16", "--on-error", "skip", cwd=tmp_path)
    assert done.returncode == 0
    assert "line 2" in done.stdout

    for arguments in (("make", "none.jsonl", "1", "16"), ("make", "in.jsonl", "x", "16"), ("info", "none")):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def living(marker: str) -> list[int]:
    """Processes with `marker` in their environment; only where /proc exists."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (
                marker.encode() in (entry / "environ").read_bytes()
                and b"Z" not in (entry / "stat").read_bytes().split()[2]
            ):
                found.append(int(entry.name))
        except (OSError, IndexError):
            continue
    return found


def test_a_killed_process_leaves_no_half_written_data(tmp_path: Path) -> None:
    source = lines_of(tmp_path / "in.jsonl", ["word " * 200 + str(i) for i in range(60_000)])
    make(lines_of(tmp_path / "old.jsonl", ["old"]), 1, tmp_path / "x")
    before = digests(tmp_path / "x")
    marker = f"ROOKERY_TEST={tmp_path}"
    name, _, value = marker.partition("=")
    command = [*ROOKERY, "data", "make", str(source), "3", "16", "-o", "x", "--workers", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, name: value}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        spool = tmp_path / "x.tokens.partial"
        if spool.exists() and spool.stat().st_size > CHUNK // 4:
            break
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert digests(tmp_path / "x") == before
    while living(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not living(marker)

    done = run("make", source, "3", "16", "-o", "x", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(BinIdx(tmp_path / "x")) == 180_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "old.jsonl", "x.bin", "x.idx"]


def test_compact_vocabulary_encodes_any_text_in_few_ids(tmp_path: Path) -> None:
    source = tmp_path / "talk.jsonl"
    source.write_text('{"text": "User: 三＋4\\n\\nAssistant: 7"}\n', encoding="utf-8")
    made = make(source, 1, tmp_path / "talk", tokenizer="compact", shuffle=False)
    kept = load_beside(f"{tmp_path / 'talk'}.vocab")
    assert kept is not None
    assert kept.vocab_size == made.tokenizer.vocab_size < 300
    assert [kept.decode([i]) for i in kept.encode("User: 三＋4\n\nAssistant: 7")] == [
        "User:", " ", "三", "＋", "4", "\n\n", "Assistant:", " ", "7",
    ]  # fmt: skip
    assert kept.decode(kept.encode("never seen: 猫 🐈")) == "never seen: 猫 🐈"
