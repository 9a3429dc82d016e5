"""The user's cache folder, and files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from .messages import CnnfastError

__all__ = ["CacheError", "cache_dir", "make_cache_dir", "make_output_dir", "write_atomically"]


class CacheError(CnnfastError):
    """There is no cache folder: neither a home folder nor ``CNNFAST_CACHE``."""


def cache_dir() -> Path:
    """``$CNNFAST_CACHE``, or the system's folder for caches (Linux: ``$XDG_CACHE_HOME/cnnfast``, else
    ``~/.cache/cnnfast``). Not created here. `CacheError` where the home folder is not known."""
    explicit = os.environ.get("CNNFAST_CACHE")
    try:
        if explicit:
            return Path(explicit).expanduser()
        import platformdirs  # here: most programs never ask

        found = platformdirs.user_cache_path("cnnfast", appauthor=False)
        if not found.is_absolute():  # older releases leave "~" as it stands
            raise RuntimeError("no home folder")
        return found
    except RuntimeError as error:
        reason = f"CNNFAST_CACHE={explicit}" if explicit else "the home folder is not known"
        raise CacheError(f"no folder for the cache ({reason}): set CNNFAST_CACHE to one that can be written") from error


def make_cache_dir(*parts: str) -> Path:
    """`cache_dir` or a folder in it, made where it is missing. OSError where that cannot be, `CacheError` as there.

    Not writable by others whatever the umask: `store` does not use what others can write.
    """
    folder = cache_dir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o755, exist_ok=True)
    for part in parts:
        folder = folder / part
        folder.mkdir(mode=0o755, exist_ok=True)
    return folder


def make_output_dir(folder: Path) -> None:
    """Make ``folder`` where it is missing, and see that files can be written into it: before the work, not after it.
    OSError that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def write_atomically(path: Path, data: bytes | str, mode: int = 0o666) -> None:
    """Write ``data`` (text as UTF-8) under a temporary name beside ``path`` and move it into place: others see the old
    file or the whole new one, after a crash too. Folders that are missing are made. ``mode``: less what the umask
    forbids.

    OSError where that cannot be done: the old file is as it was, and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".cnnfast-{secrets.token_hex(8)}"
    try:
        # Not by tempfile, whose files are for their owner alone.
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror:  # of the temporary name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
