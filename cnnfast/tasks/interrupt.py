"""Ctrl-C and SIGTERM: as a request to stop at the next good moment, and SIGTERM as an exception."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupt", "Terminated", "exit_status", "terminable"]


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which torchrun ends processes, too: handled like Ctrl-C."""


def exit_status(error: KeyboardInterrupt) -> int:
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


@contextmanager
def terminable() -> Iterator[None]:
    """In it SIGTERM raises `Terminated`, so that temporary files are removed. In the main thread, and where nobody else
    handles it."""
    alone = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if alone:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if alone:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


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
