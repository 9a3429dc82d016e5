"""Ctrl-C and SIGTERM as a request to stop at the next good moment."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Interrupt"]


class Interrupt:
    """A context in which the first SIGINT or SIGTERM is noted in ``signal`` and the second acts as usual.

    The handlers that were there are restored on leaving. Outside the main thread, where Python cannot set handlers,
    it does nothing.
    """

    def __init__(self, message: str) -> None:
        self.signal: signal.Signals | None = None
        self._message = message
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # A second one must end even what hangs.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(2, f"\n{self.signal.name}: {self._message}\n".encode())  # sys.stderr may be in the middle of a write
