"""Small records kept on disk between processes: which kernels are proven, which plans are tuned.

One JSON file an entry, named by a hash of its key and holding the whole key, so that a record is only ever given for
the key it was put under. Files are written under a temporary name and renamed: processes that write at once leave one
whole file. Nothing here fails: what cannot be read (damaged, of another schema, no permission) is not there, and what
cannot be written is kept for the process.

A proof says that a kernel may run unchecked, and a plan is compiled: both are believed only where nobody else can have
written them. A store of which the cache folder, its own folder or the file belongs to another user than this one and
root, or can be written by group or others, is not used, which is said once; in a sticky folder (as /tmp) files of one's
own are safe. Windows has no such bits: there nothing is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import cache_dir, make_cache_dir, write_atomically
from .messages import LOGGER, CnnfastWarning, one_line

__all__ = [
    "SCHEMA",
    "count",
    "folder",
    "forget",
    "generation",
    "get",
    "holds",
    "path",
    "put",
    "renew",
    "where",
    "why_not",
]

SCHEMA = 1  # of the files; another one is ignored

# File -> record, or None where there is none: what this process has seen does not change under it.
_memo: dict[Path, dict[str, Any] | None] = {}
_told: set[Path] = set()  # folders that are not used
_changes: dict[str, int] = {}  # kind -> how often what this process has seen of it has changed


def folder(kind: str) -> Path:
    """Where the records of a kind ("proofs", "plans") are kept. Not created here. RuntimeError without a home folder
    and without ``CNNFAST_CACHE``."""
    return cache_dir() / kind


def where(kind: str) -> str:
    """The same for people to read, whatever is wrong with it."""
    try:
        place = str(folder(kind))
    except RuntimeError as error:
        return str(error)
    reason = why_not(kind)
    return place if reason is None else f"{place} (not used: {reason})"


def count(kind: str) -> int:
    """How many records of a kind there are, of any GPU and version; 0 where they are not used."""
    try:
        return 0 if why_not(kind) is not None else sum(1 for _ in folder(kind).glob("*.json"))
    except (OSError, RuntimeError):
        return 0


def why_not(kind: str) -> str | None:
    """Why the records of a kind are not used: other users could have written them. None where they are, and where there
    are none. RuntimeError as `folder`."""
    for place in (cache_dir(), folder(kind)):
        try:
            reason = _risk(place, os.stat(place))
        except OSError:  # not there, or not for us to see: nothing will be read from it
            continue
        if reason is not None:
            return reason
    return None


def _risk(place: Path, found: os.stat_result) -> str | None:
    """Why what lies at ``place`` may be another user's word, or None."""
    if not hasattr(os, "geteuid"):
        return None
    if found.st_uid not in (0, os.geteuid()):
        return f"{place} belongs to another user (uid {found.st_uid}): set CNNFAST_CACHE to a folder of your own"
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        return f"others can write {place} (mode {stat.S_IMODE(found.st_mode):o}): chmod go-w {place}"
    return None


def _say(kind: str, reason: str) -> None:
    if folder(kind) not in _told:
        _told.add(folder(kind))
        warnings.warn(f"cnnfast: stored {kind} are not used: {reason}", CnnfastWarning, stacklevel=4)


def _entry(kind: str, key: Mapping[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, "kind": kind, "key": json.loads(json.dumps(key))}


def path(kind: str, key: Mapping[str, Any]) -> Path:
    """The file of a key. TypeError for a key that JSON cannot hold; RuntimeError as `folder`."""
    text = json.dumps(_entry(kind, key), sort_keys=True)
    return folder(kind) / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.json"


def get(kind: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record put under this key, by any process, or None."""
    try:
        file = path(kind, key)
    except RuntimeError:  # no home folder
        return None
    if file not in _memo:
        _memo[file] = _read(file, _entry(kind, key))
    return _memo[file]


def _open(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe laid in a file's place has no end


def _read(file: Path, entry: dict[str, Any]) -> dict[str, Any] | None:
    try:
        with open(file, "rb", opener=_open) as opened:
            # Of the file that is open: a name may be given to another one meanwhile.
            reason = why_not(entry["kind"]) or _risk(file, os.fstat(opened.fileno()))
            if reason is not None:
                _say(entry["kind"], reason)
                return None
            found = json.loads(opened.read())
    except OSError:  # absent or unreadable
        return None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8; a bomb of brackets
        LOGGER.warning("%s is damaged and not used (%s)", file, one_line(error))
        return None
    if not isinstance(found, dict) or not isinstance(found.get("record"), dict):
        return None
    return found["record"] if all(found.get(name) == value for name, value in entry.items()) else None


def put(kind: str, key: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Keep ``record`` under ``key``, in place of what was there. Returns whether it is on disk: where that cannot be
    written, the record holds for this process."""
    try:
        file = path(kind, key)
    except RuntimeError:
        return False
    entry = _entry(kind, key)
    entry["record"] = _memo[file] = json.loads(json.dumps(record))
    renew(kind)
    reason = why_not(kind)
    if reason is not None:
        _say(kind, reason)
        return False
    try:
        make_cache_dir(kind)
        write_atomically(file, json.dumps(entry, indent=1), mode=0o644)
    except OSError:
        return False
    return True


def holds(kind: str) -> bool:
    """Whether `get` may have something of a kind, for some key."""
    try:
        here = {file.parent for file, record in _memo.items() if record is not None}
        return folder(kind) in here or any(folder(kind).glob("*.json"))
    except (OSError, RuntimeError):
        return False


def renew(kind: str) -> None:
    """Change a kind's `generation`."""
    _changes[kind] = generation(kind) + 1


def generation(kind: str) -> int:
    """A number that changes whenever `get` may give something else for a kind than before, in this process: for who
    keeps what follows from it."""
    return _changes.setdefault(kind, 0)


def forget() -> None:
    """Drop what this process has seen and said, as a new process would start."""
    _memo.clear()
    _told.clear()
    for kind in _changes:
        renew(kind)
