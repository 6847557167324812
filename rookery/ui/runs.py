"""Run directories: finding them, and what the console tells of each."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rookery.errors import UserError
from rookery.i18n import _
from rookery.ui import failures, processes
from rookery.ui.form import quoted
from rookery.ui.metrics import Metrics, finite
from rookery.ui.places import Places, natural

DEPTH = 4
"""Folders below one that was set in which runs are looked for."""

SKIPPED = {"checkpoints", "node_modules", "__pycache__", "site-packages"}

LOOK_EVERY = 5.0
"""Seconds between two searches for new runs."""

ACTIVE = ("starting", "preparing", "training", "evaluating", "saving")

REQUEST = "console.toml"
"""In a run directory: what the form said, when the console started it."""

OUTPUT = "console.log"
"""In a run directory: what the process printed, when the console started it."""

BELIEVED = 900.0
"""Seconds for which a run on another machine may say nothing, as in a long validation, before it counts as killed."""

TAIL = 200_000
"""Bytes at the end of a log that are shown."""


class Run:
    """One run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = Metrics(path / "metrics.jsonl")
        self._heard: tuple[float, float] | None = None
        """Of a run on another machine: when it last wrote, by its clock and by this process's."""
        self._stamp: tuple[Any, ...] = ()
        self._summary: dict[str, Any] = {}

    def status(self) -> dict[str, Any]:
        """status.json without what is of the wrong kind, such as a loss that is no number; empty when there is none
        yet."""
        try:
            found = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {name: value for name, value in found.items() if _sound(name, value)} if isinstance(found, dict) else {}

    def config(self, name: str = "config.toml") -> dict[str, Any]:
        """Leaf -> value of config.toml; empty when it cannot be read."""
        try:
            document = tomllib.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {
            leaf: value for section in document.values() if isinstance(section, dict) for leaf, value in section.items()
        }

    def request(self) -> dict[str, Any]:
        """Leaf -> value of what a person asked for, without what was found from it: to begin another run like it."""
        if asked := self.config(REQUEST):
            return asked
        text = (self.path / "config.toml").read_text(encoding="utf-8") if self.config() else ""
        # Behind each value stands where it came from: a flag, or a line of a recipe.
        given = {line.split(" = ")[0] for line in text.splitlines() if re.search(r"  # (--?\w.*|.*:\d+)$", line)}
        return {leaf: value for leaf, value in self.config().items() if leaf in given}

    def phase(self, status: dict[str, Any]) -> str:
        """The phase as it is, not as a process that was killed last wrote it."""
        started = started_here(self.path)
        phase = str(status.get("phase", ""))
        if started and started["time"] > status.get("started", 0) and started["pid"] != status.get("pid"):
            # The process has not written its status yet, or will never do it.
            return "starting" if processes.alive(started["pid"]) else "failed"
        if phase in ACTIVE and not self._lives(status):
            return "killed"
        return phase or "unknown"

    def _lives(self, status: dict[str, Any]) -> bool:
        """Whether the process that wrote `status` runs. One of another machine, which shares the folder with this one,
        is believed for a while after it has written something new: by the clock of this machine, except for what was
        there when the console first looked, since the other clock may be wrong."""
        if not elsewhere(status):
            return processes.alive(status.get("pid"), status.get("started", 0))
        now, updated = time.monotonic(), float(status.get("updated", 0))
        if self._heard is None:
            self._heard = (updated, now - max(0.0, time.time() - updated))
        elif self._heard[0] != updated:
            self._heard = (updated, now)
        return now - self._heard[1] < BELIEVED

    def summary(self) -> dict[str, Any]:
        """What the list of runs shows."""
        status = self.status()
        phase = self.phase(status)
        stamp = (phase, *(self._modified(name) for name in ("status.json", "metrics.jsonl", "config.toml")))
        if stamp == self._stamp:
            return self._summary
        self.metrics.refresh()
        config = self.config()
        reason = str(status.get("exit_reason", ""))
        if phase == "failed" and not (started_here(self.path) is None or status.get("phase") == "failed"):
            reason = self.log_end(4000)
        loss = self.metrics.columns["loss"]
        steps = self.metrics.columns["step"]
        self._summary = {
            "path": str(self.path),
            "name": self.path.name,
            "phase": phase,
            "step": status.get("step", int(steps[-1]) if steps else 0),
            "total_steps": status.get("total_steps", 0),
            "progress": status.get("progress", 0),
            "eta": status.get("eta") if phase == "training" else None,
            "loss": status.get("loss", finite(loss[-1]) if loss else None),
            "val_loss": finite(self.metrics.validations[-1][1]) if self.metrics.validations else None,
            "tok_s": status.get("tok_s"),
            "pid": status.get("pid"),
            "started": status.get("started"),
            "updated": status.get("updated") or self._modified("config.toml"),
            "seconds": self.metrics.seconds(),
            "exit_reason": reason,
            "failure": failures.explain(phase, reason) if phase in ("failed", "killed") else None,
            "warnings": failures.warnings(self.metrics, new_model=method_of(config) == "pretrain"),
            "method": method_of(config),
            "host": elsewhere(status),
            "config": {leaf: config.get(leaf) for leaf in SHOWN},
            "spark": self.metrics.sparkline(),
            "weights": self.has_weights(),
            "chat": quoted(["rookery", "chat", str(self.path)]),
            "resumable": phase in ("stopped", "killed", "failed") and bool(config),
        }
        self._stamp = stamp
        return self._summary

    def has_weights(self) -> bool:
        """Whether there is something to talk to."""
        return any(self.path.glob("rwkv-*.pth")) or any(self.path.glob("adapter-*.safetensors"))

    def log_file(self) -> Path:
        """What the process printed, or the reference's log of a run that was started in a terminal."""
        output = self.path / OUTPUT
        return output if output.exists() else self.path / "train_log.txt"

    def log_end(self, size: int = TAIL) -> str:
        """The last `size` bytes of the log, from the beginning of a line."""
        return read_from(self.log_file(), -size)[0]

    def contents(self) -> list[dict[str, Any]]:
        """The files and folders in it with their sizes, for the question before it is deleted."""
        entries = sorted(self.path.iterdir(), key=lambda entry: natural(entry.name))
        return [
            {"name": entry.name + ("/" if entry.is_dir() else ""), "bytes": sum(_sizes(entry))} for entry in entries
        ]

    def _modified(self, name: str) -> float:
        try:
            return (self.path / name).stat().st_mtime
        except OSError:
            return 0.0


TEXTS = ("phase", "host", "exit_reason")
"""What status.json says in words; the rest are numbers."""


def _sound(name: str, value: Any) -> bool:
    if name in TEXTS:
        return isinstance(value, str)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


SHOWN = (
    "peft", "load_model", "adapter_load", "data_file", "version", "n_layer", "n_embd", "ctx_len", "micro_bsz",
    "accumulate_grad_batches", "lr_init", "lr_final", "precision", "quant", "lora_r", "accelerator", "tokenizer",
)  # fmt: skip
"""Settings that the list and the heading of a run name."""


def method_of(config: dict[str, Any]) -> str:
    """The method of the form that a configuration amounts to."""
    peft = config.get("peft", "none")
    if peft != "none":
        return str(peft)
    return "full" if config.get("load_model") else "pretrain"


class Runs:
    """Every run in the folders set."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._runs: dict[Path, Run] = {}
        self._look_next = 0.0
        self._lock = threading.Lock()

    def get(self, path: str | Path) -> Run:
        """The run in the directory `path`.

        Raises:
            UserError: there is none, or it lies outside the folders.
        """
        full = self.places.allowed(path)
        with self._lock:
            if full not in self._runs:
                if not is_run(full):
                    raise UserError(_("{path} is no run directory", path=path))
                self._runs[full] = Run(full)
            return self._runs[full]

    def summaries(self, again: bool = False) -> dict[str, dict[str, Any]]:
        """Path -> summary of each run; `again` searches the folders now."""
        with self._lock:
            if again or time.monotonic() > self._look_next:
                self._look()
            return {str(path): run.summary() for path, run in self._runs.items()}

    def _look(self) -> None:
        begun = time.monotonic()
        found = {path for folder in self.places.folders for path in find_runs(folder)}
        self._runs = {path: self._runs.get(path) or Run(path) for path in sorted(found)}
        # Large trees, such as a home directory, are searched less often.
        took = time.monotonic() - begun
        self._look_next = begun + max(LOOK_EVERY, 30 * took)

    def delete(self, path: str) -> None:
        """Remove a run directory with everything in it.

        Raises:
            UserError: it is no run, or it trains, or is one of the folders set.
        """
        run = self.get(path)
        if run.phase(run.status()) in ACTIVE:
            raise UserError(_("{path} is training: stop it first", path=path))
        if any(folder == run.path or run.path in folder.parents for folder in self.places.folders):
            raise UserError(_("{path} holds a folder of the console and is not deleted", path=path))
        try:
            shutil.rmtree(run.path)
        except OSError as error:
            raise UserError(_("cannot delete {path}: {reason}", path=path, reason=error)) from error
        with self._lock:
            self._runs.pop(run.path, None)

    def free_name(self, stem: str) -> Path:
        """A run directory `out/STEM`, `out/STEM-2` … that is not there yet."""
        folder = self.places.first / "out"
        number = 1
        while (path := folder / (stem if number == 1 else f"{stem}-{number}")).exists():
            number += 1
        return path


_started: dict[Path, dict[str, Any]] = {}
"""Run directory -> id and time of the process that the console started last in it."""


def start_training(path: Path, command: list[str], folder: Path) -> int:
    """Start a training process for the run directory `path`; returns its id."""
    pid = processes.start(command, folder, path / OUTPUT)
    _started[path] = {"pid": pid, "time": time.time()}
    return pid


def started_here(path: Path) -> dict[str, Any] | None:
    """Id and time of the process that this console started last in the run directory `path`."""
    return _started.get(path)


def elsewhere(status: dict[str, Any]) -> str:
    """The other machine on which a run was started; "" for this one."""
    host = str(status.get("host", ""))
    return host if host != socket.gethostname() else ""


def is_run(path: Path) -> bool:
    """Whether a directory is one of a run."""
    return (path / "status.json").is_file() or (
        (path / "config.toml").is_file() and any((path / name).exists() for name in ("metrics.jsonl", OUTPUT))
    )


def find_runs(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Run directories in a folder and below."""
    if is_run(folder):
        yield folder
    if depth == 0:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    if any(entry.name == "pyvenv.cfg" for entry in entries):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and entry.name not in SKIPPED and not entry.name.startswith("."):
            yield from find_runs(Path(entry.path), depth - 1)


def read_from(file: Path, offset: int) -> tuple[str, int]:
    """The text of a growing file from byte `offset`, and the offset to go on from; a negative one counts from the end
    and begins with a whole line. A file that became shorter is read anew."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            begin = max(0, size + offset) if offset < 0 else offset if offset <= size else 0
            stream.seek(begin)
            content = stream.read()
    except OSError:
        return "", 0
    if offset < 0 and begin:
        skipped = content.find(b"\n") + 1
        begin, content = begin + skipped, content[skipped:]
    # A line that is not whole yet comes with the next part.
    content = content[: content.rfind(b"\n") + 1]
    return content.decode("utf-8", "replace"), begin + len(content)


def _sizes(path: Path) -> Iterator[int]:
    try:
        if path.is_dir() and not path.is_symlink():
            for entry in path.iterdir():
                yield from _sizes(entry)
        else:
            yield path.lstat().st_size
    except OSError:
        return
