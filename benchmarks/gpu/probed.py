"""What the stage "probes" found, in words: its page's table, and the facts of the machine among it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..report import table

__all__ = ["facts", "table_of"]

Data = Mapping[str, Any]
Row = Mapping[str, Any]


DEVICE = ("truncates", "descriptor", "three", "per_clock")  # what a row has that is of the device, not of our kernels


def _said(row: Row, stubbed: bool) -> str:
    if "truncates" in row:
        how = "truncates" if row["truncates"] else "rounds"
        return f"{how}, {row['bits']} bits below float32's last place kept"
    if "descriptor" in row:
        return str(row["descriptor"])
    if "three" in row:
        faster = "stub" if stubbed else f"{row['faster']:.2f}x as fast as the CUDA cores"
        return (
            f"{row['three']:.2f} of the allowed error where the CUDA cores' one chain has {row['cores']:.2f}; {faster}"
        )
    if "per_clock" in row:
        rate = f"{row['bytes'] / 1e9:.0f} GB/s, {row['per_clock']:.0f} bytes a clock and multiprocessor"
        return "stub" if stubbed else f"{rate}, {row['assumed']} assumed"
    if "differing" in row:
        return f"{row['differing']} of {row['launches']} launches differ from the first"
    return str(row.get("note", ""))


def facts(data: Data | None) -> dict[str, str]:
    """What the device itself does: facts of the machine like its name, for the summary."""
    rows = () if data is None else data["rows"]
    return {row["key"]: _said(row, bool(data and data.get("stubbed"))) for row in rows if any(n in row for n in DEVICE)}


def table_of(data: Data) -> Iterator[str]:
    """A line for each probe."""
    body = [[row["key"], _said(row, bool(data.get("stubbed")))] for row in data["rows"]]
    yield from table(["probe", ""], body, (0, 1))
