"""The run directory: its files, its lock, and what of an earlier run is found in it.

config.toml      every resolved value
status.json      phase, progress, ETA, pid, exit reason; replaced atomically
metrics.jsonl    one line a step
train_log.txt    RWKV-LM's line a mini-epoch
rwkv-init.pth  rwkv-0.pth …  rwkv-final.pth
adapter-init.safetensors  adapter-0.safetensors …  adapter-final.safetensors    of an adapter's training
checkpoints/     full state
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rookery.errors import UserError
from rookery.i18n import _

Phase = Literal["preparing", "training", "evaluating", "saving", "done", "stopped", "failed"]


class RunFiles:
    """The names of a run's files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.toml"
        self.status_file = self.path / "status.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.log_file = self.path / "train_log.txt"
        self.checkpoints = self.path / "checkpoints"

    def weights_file(self, name: str | int) -> Path:
        """`rwkv-init.pth`, `rwkv-0.pth`, `rwkv-final.pth` …, and `best.pth`: RWKV-LM's trainer, when it goes on in this
        directory, would take any other word after `rwkv-` for a number."""
        return self.path / ("best.pth" if name == "best" else f"rwkv-{name}.pth")

    def adapter_file(self, name: str | int) -> Path:
        """`adapter-init.safetensors`, which training begins with, `adapter-0.safetensors` …, `adapter-best` and
        `adapter-final`."""
        return self.path / f"adapter-{name}.safetensors"

    def numbered_adapters(self) -> list[tuple[int, Path]]:
        """(N, adapter-N.safetensors), newest first."""
        found = []
        for file in self.path.glob("adapter-*.safetensors"):
            if match := re.fullmatch(r"adapter-(\d+)\.safetensors", file.name):
                found.append((int(match[1]), file))
        return sorted(found, reverse=True)

    def numbered_weights(self) -> list[tuple[int, Path]]:
        """(N, rwkv-N.pth), newest first, with rwkv-init.pth as -1: where RWKV-LM's trainer goes on from."""
        found = []
        for file in self.path.glob("rwkv-*.pth"):
            if match := re.fullmatch(r"rwkv-(init|\d+)\.pth", file.name):
                found.append((-1 if match[1] == "init" else int(match[1]), file))
        return sorted(found, reverse=True)


class RunDir(RunFiles):
    """The files of a run that this process trains. It holds a lock: one process trains in a run directory at a time."""

    def __init__(self, path: str | Path) -> None:
        """Makes the directory if it is missing, and locks it.

        Raises:
            UserError: another process is training in it, or it cannot be written.
        """
        super().__init__(path)
        self._status: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _Lock(self.path / "run.lock")
        except OSError as error:
            raise UserError(_("proj_dir {path} cannot be written: {reason}", path=self.path, reason=error)) from error

    def close(self) -> None:
        """Releases the lock."""
        self._lock.release()

    def write_status(self, **changes: Any) -> None:
        """Replaces status.json; keys that are not given keep their value."""
        self._status |= changes | {"updated": time.time()}
        replace_text(self.status_file, json.dumps(self._status, indent=1))

    def forget_after(self, step: int, epoch: int) -> None:
        """Cuts metrics.jsonl after `step`, and train_log.txt before the first line of mini-epoch `epoch` or later."""

        def later_step(line: str) -> bool:
            return json.loads(line)["step"] > step

        def later_epoch(line: str) -> bool:
            number = line.split(" ", 1)[0]
            return number.isdigit() and int(number) >= epoch

        _cut_before(self.metrics_file, later_step)
        _cut_before(self.log_file, later_epoch)


def replace_text(file: Path, text: str) -> None:
    """Writes `file` so that a reader sees the old text or the new one, whole."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    for attempt in range(20):
        try:
            os.replace(temporary, file)
            return
        except PermissionError:
            # Windows refuses while somebody reads the old file.
            if os.name != "nt" or attempt == 19:
                raise
            time.sleep(0.01)


def _cut_before(file: Path, unwanted: Callable[[str], bool]) -> None:
    """Truncates a text file before its first unwanted line, or before a line torn or garbled by a crash."""
    if not file.exists():
        return
    with file.open("r+b") as stream:
        keep = 0
        for line in stream:
            try:
                if not line.endswith(b"\n") or unwanted(line.decode("utf-8")):
                    break
            except (ValueError, KeyError, TypeError):
                break
            keep += len(line)
        stream.truncate(keep)


class _Lock:
    """A lock of the operating system on a file that holds the owner's pid: it cannot outlive its process."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("a+", encoding="utf-8")
        try:
            _lock_file(self._stream.fileno())
        except OSError:
            self._stream.seek(0)
            owner = self._stream.read().strip() or "?"
            self._stream.close()
            raise UserError(
                _(
                    "{folder} is in use: process {pid} trains in it; wait for it, stop it, or take another --proj_dir",
                    folder=file.parent,
                    pid=owner,
                )
            ) from None
        self._stream.truncate(0)
        self._stream.write(f"{os.getpid()}\n")
        self._stream.flush()

    def release(self) -> None:
        self._stream.close()


if os.name == "nt":
    import msvcrt

    def _lock_file(descriptor: int) -> None:
        # Locked bytes cannot be read by others, so lock one far behind the pid.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock_file(descriptor: int) -> None:
        # Unlike flock, a lock of this kind is not inherited by forked workers, which could outlive the trainer.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
