"""States and adapters that requests can name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rookery.errors import UserError
from rookery.i18n import _

DEFAULT = "default"
"""The name of what is used when a request names nothing."""

MOST = 256
"""Mounted at the same time at most; each takes memory."""

SUFFIXES = (".pth", ".safetensors", ".st")


@dataclass(frozen=True)
class Mount:
    """What is mounted: its name, its file, and since when, in seconds since 1970."""

    name: str
    file: str
    created: int


class Mounts:
    """Everything of one kind that is mounted. Its methods may be called from any thread.

    Args:
        mount: makes a file available under a name.
        unmount: forgets a name.
        folder: where files may be mounted from while the server runs; None for nowhere.
        flag: the one that names the folder, for messages.
    """

    def __init__(
        self,
        mount: Callable[[str, Path], None],
        unmount: Callable[[str], None],
        folder: Path | None,
        flag: str,
    ) -> None:
        self._mount, self._unmount = mount, unmount
        self._folder = folder.resolve() if folder else None
        self._flag = flag
        self._mounted: dict[str, Mount] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return sorted(self._mounted)

    @property
    def all(self) -> list[Mount]:
        return [self._mounted[name] for name in self.names]

    def choose(self, name: str | None) -> str:
        """The name that a request means: None is `default` where that is mounted, else nothing, as ""."""
        if name is None:
            return DEFAULT if DEFAULT in self._mounted else ""
        return name

    def add(self, name: str, file: Path) -> Mount:
        """Mount a file, in the place of what has the name.

        Raises:
            UserError: it cannot be read, does not fit the model, or too many are mounted.
        """
        with self._lock:
            if name not in self._mounted and len(self._mounted) >= MOST:
                raise UserError(_("{most} are mounted already; unmount one first.", most=MOST))
            self._mount(name, file)
            self._mounted[name] = Mount(name, file.name, int(time.time()))
            return self._mounted[name]

    def remove(self, name: str) -> bool:
        """Unmount; requests that use it go on. False if there is none of that name."""
        with self._lock:
            if self._mounted.pop(name, None) is None:
                return False
            self._unmount(name)
            return True

    def allowed(self, file: str) -> Path:
        """The path of a file in the folder.

        Raises:
            PermissionError: there is no folder, or the path leads out of it.
            FileNotFoundError: there is no such file.
        """
        if self._folder is None:
            raise PermissionError(_("The server was started without {flag}.", flag=self._flag))
        try:
            path = (self._folder / file).resolve()
            inside = path.is_relative_to(self._folder)
            if inside and path.is_file():
                return path
        except (OSError, ValueError):  # a name that no file can have
            inside = True
        if not inside:
            raise PermissionError(_("{file} is not in the folder of {flag}.", file=file, flag=self._flag))
        raise FileNotFoundError(_("There is no file {file} in the folder of {flag}.", file=file, flag=self._flag))

    def available(self) -> list[str]:
        """Files of the folder that could be mounted, as `allowed` takes them."""
        if self._folder is None:
            return []
        found = (path for path in self._folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        return sorted(path.relative_to(self._folder).as_posix() for path in found)
