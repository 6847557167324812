"""`rookery data make` beside the plain-Python tokenizer of the `rwkv` package, in one run, on one core.

The corpus is 20 MB of .jsonl, a third each of English prose (texts of installed packages), Chinese (Rookery's own
messages, drawn at random, and arithmetic dialogues) and code (Python's library), cut into documents of a few kilobytes.
Times are CPU seconds of this process; each is the median of several runs, peers in turn. The plain loop does what
make_data.py does and gets a slice of the corpus, because it is slow.

    python benchmarks/data_make.py [-o benchmarks/results/DATE-data-make.json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import rwkv.rwkv_tokenizer
from pyrwkv_tokenizer import RWKVTokenizer

from rookery.data import BinIdx, make
from rookery.data.arithmetic import LEVELS, write
from rookery.i18n import catalogue
from rookery.tokenizer import World

MEGABYTE = 1_000_000
CORPUS_BYTES = 20 * MEGABYTE
PEER_SHARE = 10
"""The plain-Python peer gets one document in this many."""


def pieces(files: list[Path], generator: random.Random) -> Iterator[str]:
    """Documents of 500 to 6000 characters, cut from files, over and over."""
    for file in cycle(files):
        text = file.read_text(encoding="utf-8", errors="ignore")
        start = 0
        while start < len(text):
            length = generator.randrange(500, 6000)
            yield text[start : start + length]
            start += length


def chinese(generator: random.Random, folder: Path) -> Iterator[str]:
    """Messages of Rookery in random order, and the dialogues of the full arithmetic level, in turn."""
    sentences = sorted(catalogue().values())
    write(folder / "arithmetic.jsonl", LEVELS["full"], 2000, workers=1)
    dialogues = [json.loads(line)["text"] for line in (folder / "arithmetic.jsonl").open(encoding="utf-8")]
    for dialogue in cycle(dialogues):
        yield "\n".join(generator.choices(sentences, k=generator.randrange(5, 60)))
        yield dialogue


def corpus(folder: Path) -> list[str]:
    """The texts, in random order."""
    generator = random.Random(0)
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    prose = sorted(file for pattern in ("METADATA", "*.md", "*.rst", "LICENSE*") for file in packages.rglob(pattern))
    sources = [
        pieces(sorted(library.glob("*.py")), generator),
        pieces([file for file in prose if file.is_file()], generator),
        chinese(generator, folder),
    ]
    texts = []
    for source in sources:
        size = 0
        while size < CORPUS_BYTES // len(sources):
            text = next(source)
            texts.append(text)
            size += len(text.encode())
    generator.shuffle(texts)
    return texts


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def plain_make(source: Path, prefix: Path, tokenizer: Any) -> None:
    """One epoch in the order of the file, as make_data.py goes about it: a line at a time, checked by decoding it."""
    sizes = []
    with open(f"{prefix}.bin", "wb") as file:
        for line in source.open(encoding="utf-8"):
            text = json.loads(line.strip())["text"]
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            ids.append(0)
            file.write(np.array(ids, np.uint16).tobytes())
            sizes.append(len(ids))
    np.array(sizes, np.int32).tofile(f"{prefix}.idx")


def seconds(action: Callable[[], object]) -> float:
    """CPU time of this process in `action`."""
    begun = time.process_time()
    action()
    return time.process_time() - begun


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    texts = corpus(folder)
    size = sum(len(text.encode()) for text in texts)
    few = texts[::PEER_SHARE]
    few_size = sum(len(text.encode()) for text in few)
    source, few_source = write_lines(folder / "all.jsonl", texts), write_lines(folder / "few.jsonl", few)

    world, rust = World(), RWKVTokenizer()
    file = Path(rwkv.rwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
    plain = rwkv.rwkv_tokenizer.TRIE_TOKENIZER(str(file))
    expected = [plain.encode(text) for text in few]
    assert [world.encode(text) for text in few] == expected == [rust.encode(text) for text in few]

    encoded = [text.encode() for text in texts]
    actions: dict[str, tuple[Callable[[], object], int]] = {
        "tokenise: rookery, documents": (lambda: world.encode_documents(encoded), size),
        "tokenise: pyrwkv-tokenizer": (lambda: [rust.encode(text) for text in texts], size),
        "tokenise: rwkv": (lambda: [plain.encode(text) for text in few], few_size),
        "make: rookery": (lambda: make(source, 1, folder / "ours", shuffle=False, workers=1), source.stat().st_size),
        "make: rookery, 3 shuffled epochs": (
            lambda: make(source, 3, folder / "three", workers=1),
            3 * source.stat().st_size,
        ),
        "make: plain Python with rwkv": (
            lambda: plain_make(few_source, folder / "plain", plain),
            few_source.stat().st_size,
        ),
    }
    make(few_source, 1, folder / "few", shuffle=False, workers=1)
    plain_make(few_source, folder / "plain", plain)
    assert (folder / "few.bin").read_bytes() == (folder / "plain.bin").read_bytes()

    times: dict[str, list[float]] = {name: [] for name in actions}
    for _round in range(rounds):
        for name, (action, _size) in actions.items():
            times[name].append(seconds(action))
    rows = {
        name: {
            "mb_per_cpu_second": round(action_size / MEGABYTE / statistics.median(times[name]), 2),
            "cpu_seconds": [round(t, 4) for t in times[name]],
            "megabytes": round(action_size / MEGABYTE, 2),
        }
        for name, (_action, action_size) in actions.items()
    }

    def ratio(ours: str, theirs: str) -> float:
        return round(rows[ours]["mb_per_cpu_second"] / rows[theirs]["mb_per_cpu_second"], 1)

    return {
        "corpus": {
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            "megabytes_of_text": round(size / MEGABYTE, 2),
            "documents": len(texts),
            "tokens": BinIdx(folder / "ours").tokens,
        },
        "results": rows,
        "ratios": {
            "tokenise, over rwkv": ratio("tokenise: rookery, documents", "tokenise: rwkv"),
            "tokenise, over pyrwkv-tokenizer": ratio("tokenise: rookery, documents", "tokenise: pyrwkv-tokenizer"),
            "make, over plain Python with rwkv": ratio("make: rookery", "make: plain Python with rwkv"),
        },
        "outputs": "ids and .bin identical to those of the rwkv package",
    }


def machine() -> dict[str, Any]:
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("numpy", "numba", "rwkv", "pyrwkv-tokenizer")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="write the JSON here")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = {
            "benchmark": "data make",
            "date": time.strftime("%Y-%m-%d"),
            "clock": "CPU time of one process, one thread; median of the rounds",
            "machine": machine(),
            **measure(Path(folder), options.rounds),
        }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
