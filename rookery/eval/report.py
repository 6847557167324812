"""The file of results, eval.json."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
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
        partial.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(_("Cannot write {path}: {reason}", path=path, reason=error.strerror)) from error
    finally:
        with suppress(OSError):
            partial.unlink()
