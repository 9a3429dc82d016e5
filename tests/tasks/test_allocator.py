"""Memory that is freed and wanted again, in processes of their own."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys

import pytest

from cnnfast.tasks import allocator

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

# Pages that each of twenty rounds of three tensors of 12 MiB brings in, beyond the first rounds. Such tensors are given
# back as they are freed (M_MMAP_THRESHOLD at its first value; glibc moves it by what a process does, to kept or not).
PROGRAM = """
import ctypes, resource, torch
from cnnfast.tasks.allocator import keep_freed_memory
ctypes.CDLL(None).mallopt(-3, 2**17)
changed = keep_freed_memory() if {keep} else None
def round():
    tensors = [torch.ones(3 * 2**20) for _ in range(3)]
for _ in range(3):
    round()
pages = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(20):
    round()
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(changed, *(after - before for before, after in zip(pages, pages[1:])))
"""


def run(keep: bool, **environment: str) -> tuple[str, list[int]]:
    clean = {name: value for name, value in os.environ.items() if name not in allocator.CHOSEN}
    command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    changed, *pages = done.stdout.split()
    return changed, [int(count) for count in pages]


def test_freed_memory_is_kept() -> None:
    """A round fills 9,216 pages, without the setting always anew; with it, a few rounds may bring in some.

    A small object that lands between two freed tensors parts them, and the heap grows by one tensor (five times in
    twenty rounds at the most that was seen, in one process of three at all).
    """
    changed, pages = run(True)
    assert changed == "True" and statistics.median(pages) == 0
    changed, pages = run(False)
    assert changed == "None" and min(pages) >= 9216


def test_what_the_user_has_chosen_stays() -> None:
    assert run(True, MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
