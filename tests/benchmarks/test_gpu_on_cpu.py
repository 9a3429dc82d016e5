"""Triton kernels on a CPU, with any Triton (`benchmarks.gpu.on_cpu`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ttsem", reason="ttsem is not installed")
pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
# Two programs, side by side or at one place.
KERNEL = """
import sys
import torch, triton, triton.language as tl

@triton.jit
def kernel(x_ptr, y_ptr, n, STEP: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, B)
    acc = tl.zeros((B,), tl.float32)
    for _ in range(0, n):
        acc += tl.load(x_ptr + i)
    tl.store(y_ptr + i, acc + tl.program_id(0))

x, y = torch.arange(64.0, device="cuda"), torch.empty(64, device="cuda")
kernel[(2,)](x, y, 3, int(sys.argv[1]), 32)
assert torch.equal(y, 3 * x + torch.arange(64) // 32), y
"""
# A wheel as before 3.7: nothing switches its printer over.
OLDER = """
import sys
from ttsem import mlir
from benchmarks.gpu import on_cpu
mlir._REGISTER_ASM_PRINTER_CL_OPTIONS = "not_exported"
on_cpu.triton.__version__ = "3.6.0"
sys.exit(on_cpu.main())
"""


@pytest.mark.parametrize(
    ("step", "said"), [(32, "ok: 1 launch(es)"), (0, "tl.store(y_ptr + i, acc")], ids=["right", "a race"]
)
def test_a_triton_that_prints_no_generic_form(tmp_path, step, said):
    script = tmp_path / "script.py"
    script.write_text(KERNEL)
    done = subprocess.run(
        [sys.executable, "-c", OLDER, str(script), "--", str(step)], cwd=ROOT, capture_output=True, text=True
    )
    assert said in done.stdout and (step or "race" in done.stdout), done.stdout + done.stderr


def test_locations_where_they_are_used():
    from benchmarks.gpu.on_cpu import with_locations

    text = """#loc = loc("f.py":1:0)
#loc1 = loc("x"(#loc))
"builtin.module"() ({
  ^bb0(%x: i32 loc("x"(#loc1))):
    "tt.return"() : () -> () loc(#loc2)
}) : () -> () loc(#loc)
#loc2 = loc(unknown)
"""
    expected = """"builtin.module"() ({
  ^bb0(%x: i32 loc("x"("x"("f.py":1:0)))):
    "tt.return"() : () -> () loc(unknown)
}) : () -> () loc("f.py":1:0)
"""
    assert with_locations(text) == expected
