"""The file of results, eval.json."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rookery.errors import UserError
from rookery.i18n import _


def write_report(path: str | Path, results: dict[str, Any]) -> None:
    """Write `results` (suite -> figures) as JSON; the file is replaced as a whole.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # JSON has neither infinity nor what is no number: null.
        plain = json.loads(json.dumps(results), parse_constant=lambda _name: None)
        partial.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(_("Cannot write {path}: {reason}", path=path, reason=error.strerror)) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def check_place(path: str | Path) -> None:
    """
    Raises:
        UserError: `write_report` could not write there; to be told before the work rather than after it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise UserError(_("Cannot write {path}: {reason}", path=path, reason=error.strerror)) from error
