"""Ctrl-C and SIGTERM: the step in progress is finished and saved before the program ends."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from rookery.i18n import _

_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGBREAK")  # the last is Windows' Ctrl-Break
    if hasattr(signal, name)
]


class StopRequest:
    """While entered, notes the first request to stop; a second one raises KeyboardInterrupt at once.

    Outside the main thread nothing is noted: only that thread receives signals.
    """

    def __init__(self) -> None:
        self.made = False
        """Whether a stop was asked for."""
        self.deferred = False
        """Whether a first request waits for somebody to read `made`; else it raises KeyboardInterrupt too."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.made or not self.deferred:
            raise KeyboardInterrupt
        self.made = True
        message = _("Stopping: the step is finished and saved first. Once more stops at once.")
        # Not print: the signal may have arrived inside another write to the same stream.
        os.write(2, f"\n{message}\n".encode())
