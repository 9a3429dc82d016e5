"""Small records kept on disk between processes: which kernels are proven, which plans are tuned.

One JSON file an entry, named by a hash of its key and holding the whole key, so that a record is only ever given for
the key it was put under. Files are written under a temporary name and renamed: processes that write at once leave one
whole file. Nothing here fails: what cannot be read (damaged, of another schema, no permission) is not there, and what
cannot be written is kept for the process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .fetch import cache_dir, write_atomically

__all__ = ["SCHEMA", "count", "folder", "forget", "get", "path", "put", "where"]

SCHEMA = 1  # of the files; another one is ignored

# File -> record, or None where there is none: what this process has seen does not change under it.
_memo: dict[Path, dict[str, Any] | None] = {}


def folder(kind: str) -> Path:
    """Where the records of a kind ("proofs", "plans") are kept. Not created here. RuntimeError without a home folder
    and without ``CNNFAST_CACHE``."""
    return cache_dir() / kind


def where(kind: str) -> str:
    """The same for people to read, whatever is wrong with it."""
    try:
        return str(folder(kind))
    except RuntimeError as error:
        return f"no folder: {error}"


def count(kind: str) -> int:
    """How many records of a kind there are, of any GPU and version."""
    try:
        return sum(1 for _ in folder(kind).glob("*.json"))
    except (OSError, RuntimeError):
        return 0


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


def _read(file: Path, entry: dict[str, Any]) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):  # absent or unreadable; no JSON, or no UTF-8; a bomb of brackets
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
    try:
        write_atomically(file, json.dumps(entry, indent=1).encode())
    except OSError:
        return False
    return True


def forget() -> None:
    """Drop what this process has seen, as a new process would start."""
    _memo.clear()
