"""The console's parts together, and what the pages ask of several of them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rookery.errors import UserError
from rookery.i18n import _, set_language
from rookery.serve.guard import is_loopback
from rookery.ui import failures, form, machine, processes
from rookery.ui.jobs import Jobs
from rookery.ui.places import MODELS, Places
from rookery.ui.runs import ACTIVE, OUTPUT, REQUEST, Run, Runs, elsewhere, find_runs, start_training, started_here
from rookery.ui.servers import Servers
from rookery.ui.settings import Settings
from rookery.ui.worker import Worker

DEPTH = 4
"""Folders below one that was set in which models are looked for."""


class Console:
    """Everything behind the pages.

    Args:
        folders: where it was told to look, the first being the one that relative paths belong to.
        settings_file: what it remembers.
        host: the address it listens on: folders can only be added on this machine.
        token: of a console that others can reach, else empty.
    """

    def __init__(self, folders: list[Path], settings_file: Path, *, host: str = "127.0.0.1", token: str = "") -> None:
        self.host, self.token = host, token
        self.given = folders
        self.settings_file = settings_file
        self.settings = Settings.read(settings_file)
        if self.settings.language:
            set_language(self.settings.language)
        self.places = Places([*folders, *self.settings.folders])
        self.runs = Runs(self.places)
        self.jobs = Jobs()
        self.servers = Servers()
        self.worker = Worker(self.places.first)
        self._starting = threading.Lock()
        self._described: dict[tuple[str, int, int], dict[str, Any]] = {}

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the console."""
        return is_loopback(self.host)

    def close(self) -> None:
        """End the helpers; training goes on."""
        self.worker.close()
        self.servers.close()

    def preferences(self) -> dict[str, Any]:
        """Settings as the page shows them."""
        return {
            "language": self.settings.language,
            "theme": self.settings.theme,
            "folders": [str(folder) for folder in self.places.folders],
            "given": [str(folder.resolve()) for folder in self.given],
            "local": self.local,
        }

    def prefer(self, values: dict[str, Any]) -> dict[str, Any]:
        """Change and keep settings.

        Raises:
            UserError: a folder does not exist, or may not be added from afar.
        """
        if "folders" in values:
            if not self.local:
                raise UserError(_("folders can be added on the machine itself, or with `rookery ui --folder`"))
            folders = values["folders"]
            for folder in folders if isinstance(folders, list) else [folders]:
                if not isinstance(folder, str) or not _is_folder(folder):
                    raise UserError(_("{path} is no folder", path=folder))
        settings = self.settings.changed(values)
        settings.write(self.settings_file)
        self.settings = settings
        if settings.language:
            set_language(settings.language)
        self.places.folders = Places([*self.given, *settings.folders]).folders
        self.runs.summaries(again=True)
        return self.preferences()

    def check(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What a run with these values of the form would be, or why it cannot start."""
        found = form.read(values, self.places)
        wrong = form.check(found)
        if found.get("proj_dir"):
            try:
                self._refuse_used(self.places.allowed(found["proj_dir"]))
            except UserError as error:
                wrong["proj_dir"] = str(error)
        answer: dict[str, Any] = {"fields": wrong, "command": form.command(found), "proj_dir": self._run_dir(found)}
        if wrong:
            return answer
        reply = self.worker.ask("check", words=form.words(found), gpu_free=machine.gpu_free())
        if "error" in reply:
            failure = failures.find(reply["error"])
            known = failure is not failures.UNKNOWN or reply["trace"]
            answer["failure"] = failures.as_dict(failure if known else failures.INVALID)
            answer["error"] = reply["error"]
        else:
            answer |= reply["result"]
        return answer

    def _run_dir(self, values: Mapping[str, str]) -> str:
        """The run directory that the form names or leaves open, as a person would type it."""
        if values.get("proj_dir"):
            return values["proj_dir"]
        stem = Path(values.get("data_file", "")).stem or "run"
        name = re.sub(r"[^\w.-]+", "-", f"{stem}-{form.method_of(values)}")
        return self.places.short(self.runs.free_name(name))

    def train(self, values: Mapping[str, Any]) -> str:
        """Write config.toml and start the training; returns the run directory.

        Raises:
            UserError: a value is not valid, or the directory holds a run.
        """
        found = form.read(values, self.places)
        wrong = form.check(found)
        if wrong:
            raise UserError("\n".join(f"{leaf}: {text}" for leaf, text in wrong.items()))
        with self._starting:  # two pages may ask for the same directory at once
            found["proj_dir"] = self._run_dir(found)
            path = self.places.allowed(found["proj_dir"])
            self._refuse_used(path)
            try:
                path.mkdir(parents=True, exist_ok=True)
                for name in ("config.toml", REQUEST):  # the run will replace the first by one with every value
                    (path / name).write_text(form.toml(found), encoding="utf-8", newline="\n")
                (path / OUTPUT).unlink(missing_ok=True)
            except OSError as error:
                raise UserError(_("proj_dir {path} cannot be written: {reason}", path=path, reason=error)) from error
            self._start(path, self.places.first, found["proj_dir"])
        return str(path)

    def _refuse_used(self, path: Path) -> None:
        if not path.exists():
            return
        run = Run(path)
        if run.phase(run.status()) in ACTIVE:
            raise UserError(_("{path} is training: stop it first", path=path))
        if any((path / name).exists() for name in ("metrics.jsonl", "checkpoints")) or run.has_weights():
            raise UserError(
                _("{path} holds a run already: resume that one, or give this one another run directory", path=path)
            )

    def resume(self, path: str) -> None:
        """Go on with a run that has stopped.

        Raises:
            UserError: it trains already, or there is no configuration to go on with.
        """
        run = self.runs.get(path)
        with self._starting:
            if run.phase(run.status()) in ACTIVE:
                raise UserError(_("{path} is training already", path=path))
            config = run.config()
            if not config:
                raise UserError(_("{path} has no config.toml to go on with", path=path))
            home = self._home(run.path, str(config.get("proj_dir", "")))
            relative = run.path.relative_to(home) if home in run.path.parents else run.path
            self._start(run.path, home, relative.as_posix())

    def _home(self, path: Path, proj_dir: str) -> Path:
        """The folder in which a run was started: its relative paths belong there."""
        candidates = [self.places.first, *path.parents]
        return next((folder for folder in candidates if (folder / proj_dir).resolve() == path), self.places.first)

    def _start(self, path: Path, folder: Path, proj_dir: str) -> None:
        self.worker.rest()  # its memory is for the training
        words = ["train", "--config", f"{proj_dir}/config.toml", "--proj_dir", proj_dir]
        start_training(path, processes.rookery_command(*words), folder)
        self.runs.summaries(again=True)

    def stop(self, path: str) -> None:
        """Ask a run to save and stop.

        Raises:
            UserError: it does not run.
        """
        run = self.runs.get(path)
        status = run.status()
        started = started_here(run.path)
        phase = run.phase(status)
        pid = started["pid"] if phase == "starting" and started else status.get("pid")
        if phase not in ACTIVE or not pid:
            raise UserError(_("{path} is not training", path=path))
        if host := elsewhere(status):
            raise UserError(_("{path} trains on another machine, {host}: stop it there", path=path, host=host))
        try:
            processes.interrupt(int(pid))
        except OSError as error:
            raise UserError(_("process {pid} cannot be stopped: {reason}", pid=int(pid), reason=error)) from error

    def models(self) -> list[dict[str, Any]]:
        """What is in every weight file below the folders, read once for each state of a file."""
        files = sorted({file for folder in self.places.folders for file in weight_files(folder, DEPTH)})
        keys = {file: _stamp(file) for file in files}
        missing = [file for file in files if keys[file] not in self._described]
        if missing:
            reply = self.worker.ask("describe", paths=[str(file) for file in missing])
            for file, facts in zip(missing, reply.get("result", []), strict=False):
                self._described[keys[file]] = facts
        runs = {path for folder in self.places.folders for path in find_runs(folder)}
        return [
            {
                **self._described.get(keys[file], {"kind": "unknown", "error": ""}),
                "file": str(file),
                "name": file.name,
                "folder": self.places.short(file.parent) if file.parent != self.places.first else ".",
                "bytes": keys[file][2],
                "modified": keys[file][1] / 1e9,
                "run": str(file.parent) if file.parent in runs else None,
            }
            for file in files
        ]


def _is_folder(path: str) -> bool:
    try:
        return Path(path).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):  # too long a name, a zero byte, nobody's home
        return False


def weight_files(folder: Path, depth: int) -> Iterator[Path]:
    """Model, state and adapter files in a folder and below; a run's checkpoints and the batch on which it diverged are
    its own business."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    if any(entry.name == "pyvenv.cfg" for entry in entries):
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name in ("checkpoints", "node_modules", "site-packages"):
            continue
        if entry.is_dir():
            if depth and not entry.is_symlink():
                yield from weight_files(entry, depth - 1)
        elif entry.suffix.lower() in MODELS and not entry.name.startswith("nan-batch-"):
            yield entry


def _stamp(file: Path) -> tuple[str, int, int]:
    try:
        found = file.stat()
    except OSError:
        return str(file), 0, 0
    return str(file), found.st_mtime_ns, found.st_size


def encoded(value: Any) -> str:
    """JSON for an event of the page."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
