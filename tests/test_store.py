"""The records on disk: kept between processes, whole under concurrent writers, and never a reason to fail."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cnnfast import CnnfastWarning, files, store

KEY = {"gpu": "a GPU", "versions": ["1", 2], "tf32": True, "bounds": [0.0, float("inf")]}
RECORD = {"block_m": 64, "name": "phases"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path / "cache"))
    store.forget()
    return tmp_path / "cache"


def put_and_forget() -> Path:
    assert store.put("plans", KEY, RECORD)
    store.forget()
    return store.path("plans", KEY)


def test_what_was_put_is_there_in_a_new_process(cache: Path) -> None:
    assert store.get("plans", KEY) is None
    assert store.put("plans", KEY, RECORD)
    assert store.get("plans", KEY) == RECORD
    store.forget()
    assert store.get("plans", KEY) == RECORD
    assert store.get("proofs", KEY) is None and store.get("plans", {**KEY, "tf32": False}) is None
    (file,) = [p for p in cache.rglob("*") if p.is_file()]
    assert file.parent == cache / "plans" and json.loads(file.read_text())["key"]["gpu"] == "a GPU"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_the_order_of_a_key_does_not_matter() -> None:
    store.put("plans", KEY, RECORD)
    assert store.get("plans", dict(reversed(KEY.items()))) == RECORD


def test_a_second_put_replaces_the_first() -> None:
    put_and_forget()
    store.put("plans", KEY, {"block_m": 128})
    store.forget()
    assert store.get("plans", KEY) == {"block_m": 128}


def test_the_memo_spares_the_disk_and_does_not_change_under_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    file = put_and_forget()
    reads: list[Path] = []
    real = store._read
    monkeypatch.setattr(store, "_read", lambda f, entry: reads.append(f) or real(f, entry))
    assert store.get("plans", KEY) == RECORD
    file.unlink()
    assert store.get("plans", KEY) == RECORD and reads == [file]
    other = {"gpu": "another"}
    assert store.get("plans", other) is None and store.get("plans", other) is None and len(reads) == 2


def changed(**change: object) -> str:
    entry = {"schema": store.SCHEMA, "kind": "plans", "key": json.loads(json.dumps(KEY)), "record": RECORD}
    return json.dumps({**entry, **change})


BAD = {
    "empty": b"",
    "no-json": b"block_m = 64",
    "no-utf8": b"\xff\xfe\x00\x01",
    "truncated": changed().encode()[:-9],
    "a-list": b"[1, 2]",
    "no-record": json.dumps({"schema": store.SCHEMA, "kind": "plans", "key": KEY}).encode(),
    "record-is-a-number": changed(record=3).encode(),
    "other-schema": changed(schema=store.SCHEMA + 1).encode(),
    "other-kind": changed(kind="proofs").encode(),
    "foreign-key": changed(key={**KEY, "gpu": "another GPU"}).encode(),
    "brackets": b"[" * 200_000,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_not_there_and_is_replaced(name: str) -> None:
    file = put_and_forget()
    file.write_bytes(BAD[name])
    assert store.get("plans", KEY) is None
    assert store.put("plans", KEY, RECORD)
    store.forget()
    assert store.get("plans", KEY) == RECORD


def test_the_files_above_are_bad_for_the_reason_named() -> None:
    file = put_and_forget()
    file.write_text(changed())
    assert store.get("plans", KEY) == RECORD


def test_a_folder_in_the_place_of_a_file() -> None:
    file = put_and_forget()
    file.unlink()
    file.mkdir()
    assert store.get("plans", KEY) is None
    assert not store.put("plans", KEY, RECORD)
    assert not [p for p in file.parent.iterdir() if p != file], "a temporary file was left"


def test_a_file_in_the_place_of_the_folder(cache: Path) -> None:
    cache.write_text("not a folder")
    assert store.get("plans", KEY) is None
    assert not store.put("plans", KEY, RECORD)
    assert store.get("plans", KEY) == RECORD, "a record that cannot be written holds for the process"


def test_an_unreadable_file(monkeypatch: pytest.MonkeyPatch) -> None:
    put_and_forget()

    def refuse(name: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(store, "_open", refuse)  # root may read everything: no file mode would do
    assert store.get("plans", KEY) is None


@pytest.mark.parametrize("name", ["mkdir", "open", "replace"])
def test_a_place_that_cannot_be_written(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path if name == "mkdir" else files.os, name, refuse)
    assert not store.put("plans", KEY, RECORD)
    assert store.get("plans", KEY) == RECORD
    assert not [p for p in cache.rglob("*") if p.is_file()], "a temporary file was left"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(cache: Path) -> None:
    (cache / "plans").mkdir(parents=True)
    (cache / "plans").chmod(0o555)
    assert not store.put("plans", KEY, RECORD)


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise files.CacheError("no folder for the cache")

    monkeypatch.setattr(store, "cache_dir", refuse)
    assert store.get("plans", KEY) is None and not store.put("plans", KEY, RECORD)
    assert store.count("plans") == 0 and store.where("plans") == "no folder for the cache"


# --- what others could have written -----------------------------------------------------------------------------------

posix = pytest.mark.skipif(os.name != "posix", reason="users and modes as POSIX has them")
root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files away")


def refused(reason: str) -> None:
    """The record is not read, nothing is written, it is said once, and `env` would show it."""
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in store.folder("plans").rglob("*")}
    with pytest.warns(CnnfastWarning, match=f"cnnfast: stored plans are not used: {reason}") as caught:
        assert store.get("plans", KEY) is None
        assert store.get("plans", {"another": 1}) is None
        store._memo.clear()
        assert store.get("plans", KEY) is None
    assert len(caught) == 1
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in store.folder("plans").rglob("*")} == before


@posix
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777], ids=oct)
@pytest.mark.parametrize("where", ["the cache", "the folder"])
def test_a_folder_that_others_can_write(mode: int, where: str, cache: Path) -> None:
    put_and_forget()
    folder = cache if where == "the cache" else cache / "plans"
    folder.chmod(mode)
    refused(rf"others can write {folder} \(mode {mode:o}\): chmod go-w {folder}")
    assert not store.put("plans", {"new": 1}, RECORD) and store.get("plans", {"new": 1}) == RECORD
    assert len(list((cache / "plans").iterdir())) == 1 and store.count("plans") == 0
    assert store.where("plans").startswith(f"{cache / 'plans'} (not used: others can write {folder}")
    folder.chmod(0o755)
    store.forget()
    assert store.get("plans", KEY) == RECORD


@posix
@pytest.mark.parametrize("mode", [0o664, 0o646], ids=oct)
def test_a_file_that_others_can_write(mode: int) -> None:
    file = put_and_forget()
    file.chmod(mode)
    refused(rf"others can write {file} \(mode {mode:o}\)")
    file.chmod(0o644)
    store.forget()
    assert store.get("plans", KEY) == RECORD


@root
@pytest.mark.parametrize("what", ["cache", "folder", "file"])
def test_what_belongs_to_another_user(what: str, cache: Path) -> None:
    file = put_and_forget()
    path = {"cache": cache, "folder": cache / "plans", "file": file}[what]
    os.chown(path, 4242, -1)
    refused(rf"{path} belongs to another user \(uid 4242\): set CNNFAST_CACHE to a folder of your own")


@posix
def test_another_user_than_this_one(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The same without being root: it is this process that becomes another user."""
    put_and_forget()
    owner = cache.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        assert store.get("plans", KEY) == RECORD, "root is trusted"
    else:
        refused(rf"{cache} belongs to another user \(uid {owner}\)")


@posix
def test_in_a_sticky_folder_files_of_one_s_own_are_used(cache: Path) -> None:
    file = put_and_forget()
    for folder in (cache, cache / "plans"):
        folder.chmod(0o1777)
    assert store.get("plans", KEY) == RECORD and store.why_not("plans") is None
    assert store.put("plans", {"new": 1}, RECORD)
    if os.geteuid() == 0:  # whatever somebody else has laid there
        os.chown(file, 4242, -1)
        store.forget()
        with pytest.warns(CnnfastWarning, match="belongs to another user"):
            assert store.get("plans", KEY) is None
        assert store.get("plans", {"new": 1}) == RECORD


@posix
def test_a_sticky_file_is_not_a_sticky_folder() -> None:
    file = put_and_forget()
    file.chmod(0o1666)
    refused("others can write")


@posix
def test_a_pipe_in_the_place_of_a_file() -> None:
    file = put_and_forget()
    file.unlink()
    os.mkfifo(file)
    assert store.get("plans", KEY) is None, "waiting for a writer would be for ever"


@posix
def test_its_own_folders_can_be_used_whatever_the_umask(cache: Path) -> None:
    before = os.umask(0o002)
    try:
        put_and_forget()
    finally:
        os.umask(before)
    assert store.get("plans", KEY) == RECORD


def test_a_system_without_users(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_and_forget()
    cache.chmod(0o777)
    monkeypatch.delattr(os, "geteuid")
    assert store.get("plans", KEY) == RECORD


def test_a_key_that_json_cannot_hold() -> None:
    with pytest.raises(TypeError):
        store.get("plans", {"gpu": object()})


WRITER = """
    import sys
    from cnnfast import store
    me, size = sys.argv[1], 20_000
    for i in range(60):
        assert store.put("plans", {"shared": True}, {"writer": me, "i": i, "data": me * size})
        store.forget()
        found = store.get("plans", {"shared": True})
        assert found is not None, "a reader saw half a file"
        assert found["data"] == found["writer"] * size
"""


def test_writers_at_once_leave_whole_files(cache: Path) -> None:
    code = textwrap.dedent(WRITER)
    writers = [subprocess.Popen([sys.executable, "-c", code, me], stderr=subprocess.PIPE, text=True) for me in "abc"]
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0, said
    assert len([p for p in cache.rglob("*") if p.is_file()]) == 1
    found = store.get("plans", {"shared": True})
    assert found is not None and found["i"] == 59
