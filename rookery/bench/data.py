"""Data: tokenising, making binidx, and reading samples, on one core."""

from __future__ import annotations

import json
import random
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np

from rookery.bench.timing import CLOCKS, alternate, faster, rounded
from rookery.config.tree import DataSection
from rookery.data import BinIdx, make, open_dataset
from rookery.data.arithmetic import LEVELS, write
from rookery.i18n import catalogue
from rookery.tokenizer import World

MEGABYTE = 1_000_000

SLOW_SHARE = 10
"""Peers written in Python get one document in this many."""

Action = tuple[Callable[[], object], int]
"""What is measured, and the bytes or tokens that it goes through."""


def measure(megabytes: int, ctx_len: int, rounds: int, against: Sequence[str] = ()) -> dict[str, Any]:
    """Megabytes of text a second, of documents that this machine has anyway: a third each of English prose (texts of
    installed packages), Chinese (Rookery's own messages and dialogues) and code (Python's library).

    Args:
        megabytes: of text.
        ctx_len: of the samples that are read from the result.
        against: peers that can run here; what they make must be the same to the byte.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = corpus(folder, megabytes * MEGABYTE)
        few = texts[::SLOW_SHARE]
        size, few_size = (sum(len(text.encode()) for text in part) for part in (texts, few))
        source, few_source = _write_lines(folder / "all.jsonl", texts), _write_lines(folder / "few.jsonl", few)
        world = World()
        encoded = [text.encode() for text in texts]
        actions: dict[str, Action] = {
            "tokenise": (lambda: world.encode_documents(encoded), size),
            "make": (lambda: make(source, 1, folder / "ours", shuffle=False, workers=1), source.stat().st_size),
        }
        if "pyrwkv" in against:
            from pyrwkv_tokenizer import RWKVTokenizer

            rust = RWKVTokenizer()
            _check([world.encode(text) for text in few], [rust.encode(text) for text in few])
            actions["tokenise: pyrwkv"] = (lambda: [rust.encode(text) for text in texts], size)
        if "rwkv" in against:
            plain = _plain_tokenizer()
            _check([world.encode(text) for text in few], [plain.encode(text) for text in few])
            make(few_source, 1, folder / "few", shuffle=False, workers=1)
            plain_make(few_source, folder / "plain", plain)
            _check((folder / "few.bin").read_bytes(), (folder / "plain.bin").read_bytes())
            actions["tokenise: rwkv"] = (lambda: [plain.encode(text) for text in few], few_size)
            actions["make: rwkv"] = (
                lambda: plain_make(few_source, folder / "plain", plain),
                few_source.stat().st_size,
            )
        times = alternate({name: action for name, (action, _amount) in actions.items()}, rounds)
        results = {
            name: {
                "megabytes": rounded(amount / MEGABYTE),
                "MB a second": times[name].rate(amount / MEGABYTE, "cpu"),
                "seconds": times[name].report("cpu"),
            }
            for name, (_action, amount) in actions.items()
        }
        ratios = {}
        for name, (_action, amount) in actions.items():
            ours, _colon, peer = name.partition(": ")
            if peer:
                per_byte = faster(times[name], times[ours], "cpu")
                ratios[name] = {clock: rounded(x * actions[ours][1] / amount) for clock, x in per_byte.items()}
        return {
            "clocks": CLOCKS,
            "corpus": {"megabytes": size / MEGABYTE, "documents": len(texts), "tokens": BinIdx(folder / "ours").tokens},
            "results": results | {"read samples": _loader(folder / "ours", ctx_len, rounds)},
            "rookery is faster by": ratios,
        }


def _loader(prefix: Path, ctx_len: int, rounds: int) -> dict[str, Any]:
    """Tokens a second that one process reads for training, 16 samples at a time."""
    dataset = open_dataset(DataSection(data_file=str(prefix), ctx_len=ctx_len))
    numbers = count()

    def read() -> None:
        for _batch in range(20):
            dataset.batch([next(numbers) for _sample in range(16)])

    times = alternate({"read": read}, rounds)["read"]
    return {"tokens a second": times.rate(20 * 16 * ctx_len, "cpu"), "seconds": times.report("cpu")}


def corpus(folder: Path, size: int) -> list[str]:
    """Texts of `size` bytes in random order; `folder` is worked in."""
    generator = random.Random(0)
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    prose = sorted(file for pattern in ("METADATA", "*.md", "*.rst", "LICENSE*") for file in packages.rglob(pattern))
    sources = [
        _pieces(sorted(library.glob("*.py")), generator),
        _pieces([file for file in prose if file.is_file()], generator),
        _chinese(generator, folder),
    ]
    texts = []
    for source in sources:
        got = 0
        while got < size // len(sources):
            texts.append(next(source))
            got += len(texts[-1].encode())
    generator.shuffle(texts)
    return texts


def _pieces(files: list[Path], generator: random.Random) -> Iterator[str]:
    """Documents of 500 to 6000 characters, cut from files, over and over."""
    for file in cycle(files):
        text = file.read_text(encoding="utf-8", errors="ignore")
        start = 0
        while start < len(text):
            length = generator.randrange(500, 6000)
            yield text[start : start + length]
            start += length


def _chinese(generator: random.Random, folder: Path) -> Iterator[str]:
    """Messages of Rookery in random order, and the dialogues of the full arithmetic level, in turn."""
    sentences = sorted(catalogue().values())
    write(folder / "arithmetic.jsonl", LEVELS["full"], 2000, workers=1)
    with (folder / "arithmetic.jsonl").open(encoding="utf-8") as file:
        dialogues = [json.loads(line)["text"] for line in file]
    for dialogue in cycle(dialogues):
        yield "\n".join(generator.choices(sentences, k=generator.randrange(5, 60)))
        yield dialogue


def _write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def _plain_tokenizer() -> Any:
    import rwkv.rwkv_tokenizer

    file = Path(rwkv.rwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
    return rwkv.rwkv_tokenizer.TRIE_TOKENIZER(str(file))


def plain_make(source: Path, prefix: Path, tokenizer: Any) -> None:
    """One epoch in the order of the file, as make_data.py goes about it: a line at a time, checked by decoding it."""
    sizes = []
    with open(f"{prefix}.bin", "wb") as file, source.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line.strip())["text"]
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            ids.append(0)
            file.write(np.array(ids, np.uint16).tobytes())
            sizes.append(len(ids))
    np.array(sizes, np.int32).tofile(f"{prefix}.idx")


def _check(ours: object, theirs: object) -> None:
    if ours != theirs:
        raise RuntimeError("a peer makes other tokens: it does not do the same work, and its speed says nothing")
