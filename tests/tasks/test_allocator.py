"""Memory that is freed and wanted again, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from cnnfast.tasks import allocator

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

# Pages brought in by twenty rounds of three tensors of 12 MiB, beyond the first rounds.
PROGRAM = """
import resource, torch
from cnnfast.tasks.allocator import keep_freed_memory
changed = keep_freed_memory() if {keep} else None
def round():
    tensors = [torch.ones(3 * 2**20) for _ in range(3)]
for _ in range(3):
    round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    round()
print(changed, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(keep: bool, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if name not in allocator.CHOSEN}
    command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    changed, pages = done.stdout.split()
    return changed, int(pages)


def test_freed_memory_is_kept() -> None:
    """A round fills 9,216 pages; without the setting, much of that comes anew in every round (100,000 in all)."""
    changed, pages = run(True)
    assert changed == "True" and pages < 9216


def test_what_the_user_has_chosen_stays() -> None:
    assert run(True, MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
