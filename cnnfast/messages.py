"""What the library says by itself: one class of warnings, one logger, and errors that their message explains."""

from __future__ import annotations

import logging

__all__ = ["LOGGER", "CnnfastError", "CnnfastWarning", "UsageError", "is_out_of_memory", "one_line"]

LOGGER = logging.getLogger("cnnfast")

_LONGEST = 300  # characters of what others say


class CnnfastWarning(UserWarning, RuntimeWarning):
    """Every warning of this library. Of both kinds, so that a filter for either holds."""


class CnnfastError(RuntimeError):
    """An error whose message says what was wrong and what to do: a traceback would add nothing."""


class UsageError(CnnfastError):
    """What was asked for cannot be: an option, a value, a device, the name of a file."""


def one_line(error: BaseException, *, name: bool = True) -> str:
    """An exception in one line, without control characters. Whole where it is this library's own; of others the first
    lines, behind the name of the class unless ``name`` is False."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    first = first if len(first) <= _LONGEST else f"{first[:_LONGEST]} ..."
    if isinstance(error, CnnfastError):
        text = " ".join(lines)
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    elif first and (isinstance(error, OSError) or not name):
        text = first
    else:
        kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
        text = f"{kind}: {first}" if first else kind
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or here."""
    # torch has a class of its own for GPUs only.
    words = ("can't allocate memory", "Storage size calculation overflowed")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(word in str(error) for word in words)
    )
