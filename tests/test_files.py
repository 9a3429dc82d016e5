"""The cache folder, folders for output, and the one atomic writer."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnnfast import files
from cnnfast.files import CacheError, cache_dir, make_cache_dir, make_output_dir, write_atomically

posix = pytest.mark.skipif(os.name != "posix", reason="modes as POSIX has them")


@pytest.fixture
def umask() -> Iterator[None]:
    """Group may write, as where every user has a group of their own."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's folder")
def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path / "a"))
    assert cache_dir() == tmp_path / "a"
    monkeypatch.setenv("CNNFAST_CACHE", "~/a")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_dir() == tmp_path / "c" / "a"
    monkeypatch.setenv("CNNFAST_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_dir() == tmp_path / "b" / "cnnfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / "c" / ".cache" / "cnnfast"
    assert list(tmp_path.iterdir()) == [], "asking makes nothing"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container under a user id that no password file knows."""
    pwd = pytest.importorskip("pwd")

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "CNNFAST_CACHE"):
        monkeypatch.delenv(name, raising=False)


@posix
def test_no_home(homeless: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CacheError, match=r"no folder for the cache \(the home folder is not known\): set CNNFAST_CACHE"
    ):
        cache_dir()
    monkeypatch.setenv("CNNFAST_CACHE", "~nobody-of-this-name/x")
    with pytest.raises(CacheError, match=r"\(CNNFAST_CACHE=~nobody-of-this-name/x\): set CNNFAST_CACHE to one"):
        cache_dir()


def test_a_platformdirs_that_leaves_the_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    import platformdirs

    monkeypatch.delenv("CNNFAST_CACHE", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name, appauthor: Path("~/.cache") / name)
    with pytest.raises(CacheError, match="the home folder is not known"):
        cache_dir()


@posix
def test_nobody_else_may_write_into_the_cache(umask: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path / "above" / "cache"))
    assert make_cache_dir("plans", "more") == tmp_path / "above" / "cache" / "plans" / "more"
    assert [mode(cache_dir() / part) for part in ("", "plans", "plans/more")] == [0o755] * 3
    assert make_cache_dir("plans") == cache_dir() / "plans"


# --- output -----------------------------------------------------------------------------------------------------------


def test_an_output_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    make_output_dir(tmp_path / "a" / "b")
    make_output_dir(tmp_path / "a" / "b")
    assert list((tmp_path / "a").rglob("*")) == [tmp_path / "a" / "b"]


def test_an_output_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make_output_dir(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        make_output_dir(tmp_path / "file" / "below")

    def full(dir: Path) -> None:
        raise OSError(28, "No space left on device", f"{dir}/tmpabcdef")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        make_output_dir(tmp_path)
    assert caught.value.filename == str(tmp_path)


# --- the writer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"\0\xff", "text, \N{LATIN SMALL LETTER E WITH ACUTE}"], ids=["bytes", "text"])
def test_a_file_is_written_and_replaced(data: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    for _ in range(2):
        write_atomically(path, data)
        assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert list(path.parent.iterdir()) == [path]


@posix
def test_modes_follow_the_umask(umask: None, tmp_path: Path) -> None:
    write_atomically(tmp_path / "shared", b"")
    write_atomically(tmp_path / "own", b"", mode=0o644)
    assert (mode(tmp_path / "shared"), mode(tmp_path / "own")) == (0o664, 0o644)
    os.umask(0o077)
    write_atomically(tmp_path / "private", b"", mode=0o644)
    assert mode(tmp_path / "private") == 0o600


@pytest.mark.parametrize("what", ["open", "write", "fsync", "replace"])
def test_a_failure_keeps_the_old_file(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", "a temporary name")

    if what == "write":
        with pytest.raises(TypeError):
            write_atomically(path, 3)  # type: ignore[arg-type]
    else:
        monkeypatch.setattr(files.os, what, full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            write_atomically(path, b"new")
        assert caught.value.filename == str(path)
        monkeypatch.undo()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "x" / ".."):
        with pytest.raises(OSError):
            write_atomically(path, b"")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_the_library_starts_without_them() -> None:
    """filelock, platformdirs and tabulate together cost a tenth of a second: they are imported where they work."""
    code = "import sys, cnnfast.nn.layers; print(sorted({'filelock', 'platformdirs', 'tabulate'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
