"""No product of sm_90's tensor cores without a proxy fence after the copies that it reads, in any Triton."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cnnfast.gpu import fence
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs  # noqa: E402

from benchmarks.rehearse.inspections import Inspections  # noqa: E402
from benchmarks.rehearse.inspector import Report, inspect, recording, target  # noqa: E402
from benchmarks.rehearse.rules import limits  # noqa: E402
from cnnfast.gpu import conv, conv_wgrad  # noqa: E402
from cnnfast.gpu.devices import DEVICES  # noqa: E402
from cnnfast.kernels import conv_transpose  # noqa: E402
from cnnfast.kernels import conv_wgrad as kernels_wgrad  # noqa: E402

UP = ConvSpec.make(128, 128, 4, 2, 1)
SHAPE = (16, 128, 16, 16)


def forget() -> None:
    """Launches that know whether they need the fence, and what was compiled for them."""
    conv.prepare.cache_clear(), conv_wgrad.prepare.cache_clear()
    for kernel in (conv_transpose.conv_transpose_kernel, kernels_wgrad.conv_wgrad_kernel):
        kernel.device_caches.pop(90, None)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    forget()
    yield
    forget()


def convolution() -> None:
    x, weight = (
        torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last) for shape in (SHAPE, UP.weight_shape)
    )
    conv.run(Step(UP), Operands(x, weight), True)


def weight_gradient() -> None:
    x, weight = (
        torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last) for shape in (SHAPE, UP.weight_shape)
    )
    grad = torch.empty(16, 128, 32, 32, dtype=torch.float16, memory_format=torch.channels_last)
    conv_wgrad.run(x, grad, UP, weight)


LAUNCHES = {"convolution": convolution, "weight gradient": weight_gradient}


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_product_has_its_fence(name: str) -> None:
    """As a launch compiles it, and as the rehearsal does."""
    with target(90) as compiled:
        LAUNCHES[name]()
    with recording(90) as calls:
        LAUNCHES[name]()
    kernel = next(k for k in compiled if "wgmma.mma_async" in k.asm["ptx"])
    reports = [inspect(kernel), *Inspections(0).of([calls[0].job]).values()]
    for report in reports:
        assert isinstance(report, Report) and report.mma_kind == "wgmma" and report.unfenced == 0
        assert limits(report, DEVICES[90]) == []


def without(kernel: Any) -> Any:
    """The kernel as Triton before 3.7 leaves it."""

    class Kernel:
        metadata = kernel.metadata
        asm = {**kernel.asm, "ptx": re.sub(r"^\s*fence\.proxy\.async.*\n", "", kernel.asm["ptx"], flags=re.MULTILINE)}

    return Kernel


def test_the_rehearsal_fails_a_kernel_without_it() -> None:
    with target(90) as compiled:
        convolution()
    report = inspect(without(compiled[0]))
    assert report.unfenced >= 4
    (found,) = limits(report, DEVICES[90])
    assert "wgmma without fence.proxy.async after a write to shared memory" in found


def test_a_fence_ahead_of_every_wgmma_fence() -> None:
    ptx = "\tbar.sync \t0;\n\twgmma.fence.sync.aligned;\n  wgmma.fence.sync.aligned;\n\twgmma.wait_group.sync 0;\n"
    assert fence.with_fences(ptx) == (
        "\tbar.sync \t0;\n\tfence.proxy.async.shared::cta;\n\twgmma.fence.sync.aligned;\n"
        "  fence.proxy.async.shared::cta;\n  wgmma.fence.sync.aligned;\n\twgmma.wait_group.sync 0;\n"
    )


def test_a_triton_that_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any version: the fences go in through Triton's hook, another binary by its key, and the hook is gone."""
    with target(90) as compiled:
        convolution()
        monkeypatch.setattr(fence, "_left_out", lambda: True)
        forget()
        convolution()
        assert knobs.runtime.add_stages_inspection_hook is None
    ptx = compiled[-1].asm["ptx"]
    fences = len(re.findall(r"fence\.proxy\.async\.shared::cta;\s*\n\s*wgmma\.fence\.sync", ptx))
    assert fences == len(re.findall(r"wgmma\.fence\.sync", ptx)) > 0
    assert inspect(compiled[-1]).unfenced == 0


def test_only_where_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for left_out in (True, False):
        monkeypatch.setattr(fence, "_left_out", lambda left_out=left_out: left_out)
        assert [fence.needed(arch) for arch in (80, 89, 90, 100, 120)] == [False, False, left_out, False, False]


def test_a_hook_of_somebody_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def theirs(*args: Any) -> Any:
        seen.append(args)
        return None if args else ("theirs", "1")

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", theirs)
    stages = {"ptx": lambda source, metadata: "\twgmma.fence.sync.aligned;\n"}
    with fence.inserted():
        hook = knobs.runtime.add_stages_inspection_hook
        assert hook is not None and hook is not theirs
        key, digest = hook()
        assert key.startswith("theirs") and key != "theirs" and digest != "1"
        hook(None, stages, None, None, 90)
    assert seen[-1][1] is stages and "fence.proxy.async" in stages["ptx"]("", {})
    assert knobs.runtime.add_stages_inspection_hook is theirs
    with fence.inserted(False):
        assert knobs.runtime.add_stages_inspection_hook is theirs
