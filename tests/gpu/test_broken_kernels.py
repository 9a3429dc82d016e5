"""Kernels that are broken on purpose: the check that is there for each kind of fault must fail.

Each test changes one line of a copy of the kernels' source, puts the copy in the kernels' place, and runs the check
that guards the real ones: the rehearsal's verdict, or the comparison with float64 that all kernel tests share. The
same check passes without the change.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import cases  # noqa: E402
from benchmarks.rehearse.__main__ import rehearse  # noqa: E402
from benchmarks.rehearse.analysis import Row  # noqa: E402
from benchmarks.rehearse.inspections import Inspections  # noqa: E402
from cnnfast.gpu import conv as launch  # noqa: E402
from cnnfast.gpu import conv_wgrad, trial  # noqa: E402
from cnnfast.gpu.devices import precision_of, tf32_convolutions  # noqa: E402
from cnnfast.memory_format import format_of  # noqa: E402
from cnnfast.spec import ConvSpec  # noqa: E402
from cnnfast.step import Operands, Step  # noqa: E402

from ..cases import check, conv  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def broken(folder: Path, file: str, line: str, instead: str) -> Path:
    """A package of the kernels' source in ``folder`` with one line of ``file`` replaced."""
    package = folder / f"broken_{abs(hash((file, line, instead)))}"
    shutil.copytree(ROOT / "kernels", package, ignore=shutil.ignore_patterns("__pycache__", "__init__.py"))
    (package / "__init__.py").touch()
    source = (package / file).read_text()
    assert source.count(line) == 1, f"{line!r} stands {source.count(line)} times in kernels/{file}"
    (package / file).write_text(source.replace(line, instead))
    return package


@pytest.fixture
def replace_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that puts a changed copy of the kernels in their place for the rest of the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    imported: list[str] = []

    def put(file: str, line: str, instead: str) -> ModuleType:
        package = broken(tmp_path, file, line, instead)
        imported.append(package.name)
        module = importlib.import_module(f"{package.name}.conv_transpose")
        monkeypatch.setattr(launch, "kernels", module)
        monkeypatch.setattr(conv_wgrad, "kernels", importlib.import_module(f"{package.name}.conv_wgrad"))
        forget()  # launches prepared for the real kernels
        return module

    def forget() -> None:
        launch.prepare.cache_clear()
        conv_wgrad.prepare.cache_clear()

    yield put
    forget()
    for name in [n for n in sys.modules if n.split(".")[0] in imported]:
        del sys.modules[name]


# --- what the rehearsal sees ------------------------------------------------------------------------------------------


def rehearsed(tmp_path: Path, name: str = "dcgan64.4", batch: int = 16, arch: int = 80) -> Row:
    """The verdict on one layer, compiled here and now."""
    found = rehearse(cases.find([name]), [arch], ["fp16"], [batch], Inspections(0, tmp_path / "inspections"))
    (row,) = found.rows
    return row


def test_the_real_kernel_passes_the_rehearsal(tmp_path: Path) -> None:
    assert rehearsed(tmp_path).failures == ()


def test_dropped_divisibility_hint(tmp_path: Path, replace_kernels: Any) -> None:
    """Without the pointers' alignment, every element is loaded alone."""
    replace_kernels(
        "conv_transpose.py",
        '@triton.jit(do_not_specialize=["N", "D",',
        '@triton.jit(do_not_specialize=["x_ptr", "w_ptr", "N", "D",',
    )
    failures = rehearsed(tmp_path).failures
    assert any("loads of 2 bytes or less" in f for f in failures), failures


def test_oversized_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile whose buffers exceed the multiprocessor, and whose accumulators its registers."""
    choose = launch.choose_plan

    def oversized(*arguments: Any) -> Any:
        return dataclasses.replace(
            choose(*arguments), block_m=128, block_n=256, block_k=64, unroll=1, num_warps=8, num_stages=5
        )

    monkeypatch.setattr(launch, "choose_plan", oversized)
    launch.prepare.cache_clear()
    try:
        failures = rehearsed(tmp_path).failures
    finally:
        launch.prepare.cache_clear()
    assert any("shared memory" in f for f in failures), failures


def huge(images: int) -> cases.Case:
    """A layer whose input has 2^30 elements an image (nobody touches them)."""

    def make() -> torch.nn.Sequential:
        return torch.nn.Sequential(torch.nn.ConvTranspose2d(16, 16, 4, 2, 8192))

    return cases.Case("huge", "layers", (16, 8192, 8192), (images,), make)


@pytest.mark.parametrize("images", [1, 3])
def test_offsets_that_overflow_are_seen_from_the_shapes(
    images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch that forgets to ask for 64-bit offsets where it needs them."""
    where = Inspections(0, tmp_path)
    (row,) = rehearse([huge(images)], [80], ["fp16"], inspections=where).rows
    assert not [f for f in row.failures if "overflow" in f], row.failures
    real = launch.constants
    monkeypatch.setattr(launch, "constants", lambda *arguments: real(*arguments[:-2], False, arguments[-1]))
    launch.prepare.cache_clear()
    try:
        (row,) = rehearse([huge(images)], [80], ["fp16"], inspections=where).rows
    finally:
        launch.prepare.cache_clear()
    assert any("overflows 32-bit offsets" in f for f in row.failures) == (images == 3), row.failures


# --- what the values show ---------------------------------------------------------------------------------------------

LAYER = conv("broken", "phases", 32, 32, 4, 2, 1, size=(4, 5), plan=(("split_k", 1),))


def test_the_real_kernel_passes_the_comparison(device: torch.device, launches: list[str]) -> None:
    check(LAYER, "fp16", device, launches)


VALUES = {
    "missing-mask": (
        "conv_transpose.py",
        "a = tl.load(x_ptrs + u * BLOCK_K, mask=ok, other=0.0)",
        "a = tl.load(x_ptrs + u * BLOCK_K)",
    ),
    "wrong-tap": (
        "conv_transpose.py",
        "w_tap = (th0 * KW + tw0) * W_TAP",
        "w_tap = (tw0 * KW + th0) * W_TAP",
    ),
    "wrong-first-tap": (
        "indexing.py",
        "first = (c // G) * INVERSE % (S // G)",
        "first = (c // G + 1) * INVERSE % (S // G)",
    ),
}


@pytest.mark.parametrize("fault", VALUES)
def test_wrong_values(fault: str, device: torch.device, launches: list[str], replace_kernels: Any) -> None:
    """A mask left out of the border taps, and taps that are not the phase's: float64 says otherwise."""
    replace_kernels(*VALUES[fault])
    with pytest.raises(AssertionError, match="max error"):
        check(LAYER, "fp16", device, launches)
    assert len(launches) == 1


FAULTS = VALUES | {
    "stale-tile": (
        "conv_transpose.py",
        "a = tl.load(x_ptrs + u * BLOCK_K, mask=ok, other=0.0)",
        "a = tl.load(x_ptrs, mask=ok, other=0.0)",
    ),
    "skipped-split": ("conv_transpose.py", "for split in range(SPLITS):", "for split in range(SPLITS - 1):"),
}


THREE = {  # of the products of float32 by TF32
    "lost-product": ("product.py", "low = tl.dot(a_high, b_low, low,", "low = tl.dot(a_high * 0.0, b_low, low,"),
    "rounded-operand": ("product.py", "return high, half - high", "return high, high - high"),
    "lost-scale": ("product.py", "return acc * 4.0", "return acc"),
}


VOLUME = {  # of what three dimensions add
    "tap-of-another-plane": (
        "conv_transpose.py",
        "w_off += jd * (TAP_STEP_D * KH * KW * W_TAP)",
        "w_off += jh * (TAP_STEP_D * KH * KW * W_TAP)",
    ),
    "wrong-tap-of-the-depth": ("conv_transpose.py", "w_tap += td0 * (KH * KW * W_TAP)", "w_tap += td0 * (KW * W_TAP)"),
    "mask-too-small": ("conv_transpose.py", "PADDED_D = D + 2 * EDGE_D", "PADDED_D = D - 1 + 2 * EDGE_D"),
    "phase-in-the-wrong-plane": ("conv_transpose.py", "od = qd * (SD * MERGE_D) + rd", "od = qd * SD + 1 - rd"),
}


def tried(device: torch.device, splits: int, three: bool = False, ndim: int = 2) -> str | None:
    """What the trial at a kernel's first use says of a launch, two channel blocks a trip: in float16, or in float32
    by three products."""
    step, size = Step(ConvSpec.make(64, 32, 4, 2, 1, ndim=ndim)), (3, 4, 5)[-ndim:]
    dtype = torch.float32 if three else torch.float16
    x, weight = (
        torch.empty(shape, dtype=dtype, memory_format=format_of(ndim + 2, True)).to(device)
        for shape in ((2, 64, *size), step.spec.weight_shape)
    )
    with tf32_convolutions(False):
        o, precision = Operands(x, weight), precision_of(x.dtype)
        plan = launch.choose_plan(step.spec, 2, size, precision, launch.target_device(x), True)
        plan = dataclasses.replace(plan, block_k=32, unroll=2, splits=splits > 1, split_k=splits, three=three)
        found = launch.lookup(step, o, True, plan)
        return trial.problem(lambda some: launch._start(step, some, True, found), step, o, False)


@pytest.mark.parametrize("fault", FAULTS | THREE | VOLUME)
def test_the_trial_at_first_use_catches(fault: str, device: torch.device, replace_kernels: Any) -> None:
    """An error of the order of one, however wide the limit of a rounding error is; and of float32 that of TF32."""
    splits, three, ndim = 2 if fault == "skipped-split" else 1, fault in THREE, 3 if fault in VOLUME else 2
    assert tried(device, splits, three, ndim) is None
    replace_kernels(*(FAULTS | THREE | VOLUME)[fault])
    problem = tried(device, splits, three, ndim)
    assert problem is not None and problem.startswith("max error")


OF_WEIGHTS = {
    "wrong-plane": ("(n0 + n - image * D) * SD", "(n0 + n - image * D)"),
    "wrong-tap": ("(td * DD - PAD_D)[None, :]", "(th * DD - PAD_D)[None, :]"),
    "mask-too-small": ("ok = ok & inside(bd, BD)", "ok = ok & inside(bd, BD - 1)"),
}


@pytest.mark.parametrize("fault", OF_WEIGHTS)
def test_the_trial_of_a_weight_gradient_in_three_dimensions(
    fault: str, device: torch.device, replace_kernels: Any
) -> None:
    def problem() -> str | None:
        spec = ConvSpec.make(32, 32, 3, 2, 1, ndim=3)
        x, grad, out = (
            torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last_3d).to(device)
            for shape in ((2, 32, 2, 3, 4), (2, 32, 3, 5, 7), spec.weight_shape)
        )
        return conv_wgrad._problem(x, grad, out, conv_wgrad.lookup(x, grad, spec, out))

    assert problem() is None
    replace_kernels("conv_wgrad.py", *OF_WEIGHTS[fault])
    found = problem()
    assert found is not None and "max error" in found


# In a process of its own, which may crash; Triton's interpreter reads the very addresses, and touches no others.
OVERFLOW = """
import importlib, sys
import torch
from cnnfast.step import Operands, Step
from cnnfast.gpu import conv as launch
from cnnfast.ops.run import run_step
from cnnfast.spec import ConvSpec

if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])
    launch.kernels = importlib.import_module(sys.argv[2] + ".conv_transpose")
size, near, g = 8192, 4093, torch.Generator().manual_seed(0)
x = torch.empty(3, 16, size, size, dtype=torch.float16, memory_format=torch.channels_last)
crop = torch.randn(3, 16, 6, 6, generator=g).half()
x[:, :, near : near + 6, near : near + 6] = crop
w = torch.randn(16, 16, 4, 4, generator=g).half().contiguous(memory_format=torch.channels_last)
with torch.no_grad():
    y = run_step(Step(ConvSpec.make(16, 16, 4, 2, size)), Operands(x, w), channels_last=True, backend="triton")
at = size - 2 * near
exact = torch.nn.functional.conv_transpose2d(crop.double(), w.double(), stride=2)[:, :, at : at + 2, at : at + 2]
assert (y.double() - exact).abs().max() < 0.02, "max error"
print("right")
"""


def last_of_huge(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The four outputs in the middle of images that begin 0, 2^30 and 2^31 elements into the input."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", OVERFLOW, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_offset_that_overflows(tmp_path: Path, interpreter: None) -> None:
    real = last_of_huge()
    assert real.returncode == 0 and real.stdout.strip() == "right", real.stderr
    package = broken(
        tmp_path,
        "conv_transpose.py",
        "tl.where(row_mask, n, 0).to(tl.int64) * (volume(D, H, W) * CHANNELS)",
        "tl.where(row_mask, n, 0) * (volume(D, H, W) * CHANNELS)",
    )
    wrong = last_of_huge(str(tmp_path), package.name)
    assert wrong.returncode != 0 and "right" not in wrong.stdout, "the fault was not seen"
    assert wrong.returncode < 0 or "max error" in wrong.stderr, wrong.stderr  # a crash, or another image's values
