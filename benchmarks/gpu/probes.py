"""What the device does that no data sheet says, and whether kernels are the same every time.

Rounding of tensor cores, bandwidth of the L2 cache, thousands of launches that must be equal to the bit, and one launch
of each kernel under compute-sanitizer where that is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

import cnnfast
from cnnfast.gpu import conv, conv_wgrad, fence
from cnnfast.gpu.devices import target_device

from .. import cases, timers
from ..peers import backend, fused
from ..workload import TrainingWorkload, Workload
from .compare import set_tf32
from .rows import Item, Steps

__all__ = ["probe_items", "rounding"]

LAYERS = ("dcgan64.2", "dcgan64.3", "cyclegan.res", "pix2pix.5", "upsample256")  # wide tiles of wgmma on sm_90
LAUNCHES, DRY_LAUNCHES = 2000, 3
MIB = 2**20


# --- rounding ---------------------------------------------------------------------------------------------------------


@triton.jit
def product_kernel(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr, K: tl.constexpr):
    """One product of (BLOCK, K) and (K, BLOCK) row-major matrices, accumulated and stored in float32."""
    i, k = tl.arange(0, BLOCK), tl.arange(0, K)
    a = tl.load(a_ptr + i[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * BLOCK + i[None, :])
    y = tl.dot(a, b, input_precision="tf32", out_dtype=tl.float32)
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], y)


def rounding(dtype: torch.dtype, device: str = "cuda") -> dict[str, Any]:
    """How a tensor core sums products of ``dtype`` (float32: TF32). ``truncates``: whether 1 + 3/4 of float32's last
    place is 1. ``bits``: the most j up to 3 for which 2^j terms of 2^-j of that place still add up to it; 0: not even
    two halves do."""

    def summed(term: float, count: int) -> float:
        a, b = torch.zeros(64, 16, device=device), torch.zeros(16, 64, device=device)
        a[:, 0], b[0] = 1.0, 1.0
        a[:, 1 : 1 + count], b[1 : 1 + count] = 2.0**-12, term * 2.0**-11  # of 2^-23
        y = torch.zeros(64, 64, device=device)
        product_kernel[(1,)](a.to(dtype), b.to(dtype), y, 64, 16, num_warps=4)
        return (y[0, 0].item() - 1) * 2**23

    kept = [j for j in (1, 2, 3) if summed(2.0**-j, 2**j) == 1.0]
    return {"truncates": summed(0.75, 1) == 0.0, "bits": max(kept, default=0)}


# --- the L2 cache -----------------------------------------------------------------------------------------------------


def l2_bandwidth(timer: timers.Timer, dry_run: bool) -> dict[str, Any]:
    """Bytes per second that copies inside the L2 cache move (read and written), and per clock and multiprocessor at the
    data sheet's clock: what `cnnfast.gpu.devices` assumes, next to it."""
    device = target_device(torch.empty(0, device="cuda"))
    size = MIB if dry_run else device.l2_bytes // 8  # of each side
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    into = torch.zeros_like(source)
    rate = 2 * size / timer({"copy": lambda: into.copy_(source)})["copy"].median
    per_clock = rate / (device.multiprocessors * device.clock_mhz * 1e6)
    found = {"bytes": rate, "per_clock": per_clock, "assumed": device.l2_bytes_per_clock}
    if dry_run:
        return found
    paste = f"{device.name}: l2_bytes_per_clock={per_clock:.0f}, read and written by copies"
    return found | {"note": f"for cnnfast/gpu/devices.py: {paste}"}


# --- the same every time ----------------------------------------------------------------------------------------------


def differing(call: Callable[[], object], launches: int) -> int:
    """Of so many calls, how many give other bits than the first. Waits once."""
    first = call()
    assert isinstance(first, torch.Tensor)
    bits = {2: torch.int16, 4: torch.int32}[first.element_size()]
    expected = first.clone().view(bits)
    bad = torch.zeros((), dtype=torch.int64, device=first.device)
    for _ in range(launches):
        y = call()
        assert isinstance(y, torch.Tensor)
        bad += (y.view(bits) != expected).any()
    return int(bad.item())


def stress(w: Workload, launches: int, fenced: bool) -> dict[str, Any]:
    """``fenced`` False: as Triton before 3.7 compiles it (`cnnfast.gpu.fence`)."""
    set_tf32(w.tf32)
    w = replace(w)
    left_out = nullcontext() if fenced else mock.patch.object(fence, "needed", lambda arch: False)
    try:
        with left_out, torch.inference_mode(), cnnfast.backend(backend()):
            conv.prepare.cache_clear(), conv_wgrad.prepare.cache_clear()
            model, x = fused(w), w.input(True)
            found = differing(lambda: model(x), launches)
    finally:
        conv.prepare.cache_clear(), conv_wgrad.prepare.cache_clear()
    row: dict[str, Any] = {"launches": launches, "differing": found}
    return row | ({"failures": 1, "note": f"{found} of {launches} launches differ"} if found and fenced else {})


def graphed(w: Workload) -> dict[str, Any]:
    """`cnnfast.graphed` against the same model called eagerly: replays with another input in between, every bit."""
    set_tf32(w.tf32)
    w = replace(w)
    with torch.no_grad():
        model, x = fused(w), w.input(True)
        run, expected = cnnfast.graphed(model, x), model(x).clone()
        other = model(-x).clone()
        wrong = sum(not torch.equal(run(given), y) for given, y in ((x, expected), (-x, other), (x, expected)))
    return {"launches": 3, "differing": wrong} | ({"failures": 1, "note": "replays differ"} if wrong else {})


# --- compute-sanitizer ------------------------------------------------------------------------------------------------

SANITIZER = "compute-sanitizer"


def launch_each() -> None:
    """Every kernel once, forward and backward."""
    for case in cases.MINI:
        for dtype in (torch.float16, torch.float32):
            w = TrainingWorkload(case, 2, dtype, "cuda")
            with cnnfast.backend("triton"):
                w.call(fused(w), True)()
            w = Workload(case, 2, dtype, "cuda")
            with torch.inference_mode(), cnnfast.backend("triton"):
                fused(w)(w.input(True))
    torch.cuda.synchronize()


def sanitized(tool: str, seconds: float) -> dict[str, Any]:
    """What ``tool`` of compute-sanitizer says."""
    command = shutil.which(SANITIZER)
    if command is None:
        return {"note": f"{SANITIZER} is not installed"}
    code = "from benchmarks.gpu.probes import launch_each; launch_each()"
    asked = [command, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=seconds, cwd=root)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
    row = {"note": lines[-1].strip("= ") if lines else f"exit status {done.returncode}"}
    return row | ({"failures": 1} if done.returncode else {})


# --- the stage --------------------------------------------------------------------------------------------------------


def probe_items(numerics: tuple[tuple[torch.dtype, bool], ...], dry_run: bool) -> Iterator[Item]:
    timer = timers.stubbed if dry_run else timers.warm

    def item(key: str, work: Callable[[], Mapping[str, Any]], seconds: float) -> Item:
        def attempted(steps: Steps) -> Mapping[str, Any]:
            return steps.attempt("probe", work)

        return Item(key, attempted, seconds)

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = "tf32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
        yield item(f"rounding, {name}", lambda dtype=dtype: rounding(dtype), 3.0)  # type: ignore[misc]
    yield item("L2 cache, copies inside it", lambda: l2_bandwidth(timer, dry_run), 2.0)
    launches = DRY_LAUNCHES if dry_run else LAUNCHES
    layers = cases.MINI[1:2] if dry_run else cases.find(list(LAYERS))
    arch = target_device(torch.empty(0, device="cuda")).arch
    for fenced in (True, False) if fence.needed(arch) else (True,):
        for case in layers:
            for dtype, tf32 in numerics[: 1 if dry_run else 3]:
                w = Workload(case, case.batches[len(case.batches) // 2], dtype, "cuda", tf32)
                key = f"stress, {w.name}{'' if fenced else ', without the fence'}"
                yield item(key, lambda w=w, fenced=fenced: stress(w, launches, fenced), 4.0)  # type: ignore[misc]
    for case in () if dry_run else layers[:1]:  # an interpreter captures nothing
        w = Workload(case, case.batches[0], torch.float16, "cuda")
        yield item(f"graphed, {w.name}", lambda w=w: graphed(w), 3.0)  # type: ignore[misc]
    for tool in () if dry_run else ("memcheck", "racecheck"):
        yield item(f"{SANITIZER}, {tool}", lambda tool=tool: sanitized(tool, 60.0), 20.0)  # type: ignore[misc]
