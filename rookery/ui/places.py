"""The folders the console may touch, and looking around in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rookery.errors import UserError
from rookery.i18n import _

MODELS = (".pth", ".safetensors", ".st")
TEXTS = (".jsonl", ".json", ".txt", ".npy", ".csv", ".parquet")
KINDS: dict[str, tuple[str, ...]] = {
    "model": MODELS,
    "data": (*TEXTS, ".idx"),
    "toml": (".toml",),
    "folder": (),
    "any": (),
}
"""What a person looks for -> the suffixes of such files."""


class OutsideError(UserError):
    """A path that lies in none of the folders set."""


class Places:
    """The folders set. Relative paths belong to the first."""

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self.folders = list(dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders))

    @property
    def first(self) -> Path:
        return self.folders[0]

    def allowed(self, path: str | Path) -> Path:
        """`path`, absolute and without links.

        Raises:
            OutsideError: it lies in none of the folders.
        """
        text = str(path)
        try:
            full = Path(os.path.realpath(self.first / Path(text).expanduser()))
            full.exists()
        except (ValueError, RuntimeError, OSError) as error:  # a zero byte, no home directory, a name that is too long
            raise OutsideError(_("{path} is not a path", path=repr(text[:200]))) from error
        if not any(full == folder or folder in full.parents for folder in self.folders):
            raise OutsideError(
                _("{path} lies outside the folders of the console; add its folder under Settings first", path=path)
            )
        return full

    def short(self, path: Path) -> str:
        """`path` relative to the first folder when it lies there, as a person would type it."""
        return path.relative_to(self.first).as_posix() if self.first in path.parents else str(path)

    def listing(self, path: str, kind: str) -> dict[str, Any]:
        """What a person sees who looks for a file of `kind` (a key of `KINDS`) in the folder `path`.

        The folders themselves when `path` is empty and there are several.
        """
        if not path and len(self.folders) > 1:
            folders = [_entry(folder, str(folder)) for folder in self.folders]
            return {"path": "", "parent": None, "entries": folders, "weights": False}
        folder = self.allowed(path) if path else self.first
        if not folder.is_dir():
            folder = folder.parent
        if not folder.is_dir():
            raise UserError(_("{path} does not exist", path=path))
        top = folder in self.folders
        parent = ("" if len(self.folders) > 1 else None) if top else str(folder.parent)
        entries = []
        try:
            found = sorted(folder.iterdir(), key=lambda entry: (not entry.is_dir(), natural(entry.name)))
        except OSError as error:
            raise UserError(_("cannot read {path}: {reason}", path=folder, reason=error)) from error
        for entry in found:
            if entry.name.startswith("."):
                continue
            if entry.is_dir() or (kind != "folder" and (not KINDS[kind] or entry.suffix.lower() in KINDS[kind])):
                entries.append(_entry(entry, entry.name))
        return {"path": str(folder), "parent": parent, "entries": entries, "weights": _has_weights(folder)}


def _entry(path: Path, name: str) -> dict[str, Any]:
    folder = path.is_dir()
    try:
        size = None if folder else path.stat().st_size
    except OSError:
        size = None
    # The two files of binidx data are one thing, known by its prefix.
    data = path.suffix.lower() == ".idx"
    return {
        "name": path.stem if data else name,
        "path": str(path.with_suffix("") if data else path),
        "folder": folder,
        "run": folder and (path / "status.json").exists(),
        "bytes": path.with_suffix(".bin").stat().st_size if data and path.with_suffix(".bin").exists() else size,
    }


def _has_weights(folder: Path) -> bool:
    """Whether the folder itself is a model: of a run, or of Hugging Face."""
    names = ("status.json", "rwkv-final.pth", "model.safetensors", "model.safetensors.index.json")
    return any((folder / name).exists() for name in names)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts run-2 before run-10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name.lower())]
