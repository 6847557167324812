"""What the console remembers between two starts: language, theme and folders."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rookery.errors import UserError
from rookery.i18n import LANGUAGES, _

THEMES = ("auto", "light", "dark")


def default_file() -> Path:
    """Where this system keeps the settings of programs."""
    if sys.platform == "win32":
        base = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return base / "rookery" / "console.json"


@dataclass
class Settings:
    """Language ("" = the system's), theme, and the folders beside the one the console was started in."""

    language: str = ""
    theme: str = "auto"
    folders: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Settings:
        """What `file` holds; the defaults where it is missing, or not ours to understand."""
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls()
        settings = cls()
        return settings.changed(stored) if isinstance(stored, dict) else settings

    def changed(self, values: dict[str, Any]) -> Settings:
        """These settings with the sound ones of `values` in their place."""
        folders = values.get("folders", self.folders)
        sound = isinstance(folders, list) and all(isinstance(folder, str) for folder in folders)
        language, theme = values.get("language", self.language), values.get("theme", self.theme)
        return Settings(
            language=str(language) if str(language) in LANGUAGES else self.language,
            theme=str(theme) if str(theme) in THEMES else self.theme,
            folders=list(dict.fromkeys(folders)) if sound else self.folders,
        )

    def write(self, file: Path) -> None:
        """
        Raises:
            UserError: the file cannot be written.
        """
        beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1), encoding="utf-8")
            os.replace(beside, file)
        except OSError as error:
            raise UserError(_("the settings cannot be written to {path}: {reason}", path=file, reason=error)) from error
