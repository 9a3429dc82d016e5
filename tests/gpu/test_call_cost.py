"""What a call costs beside the kernel: binaries per layer, look-ups, the device it goes to.

No GPU: a driver for one that is not there records every launch and what it would compile."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.activations import Activation
from cnnfast.gpu.conv_choice import BINARIES
from cnnfast.norms import Norm
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step, Upsample, upsample_step

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.rehearse.inspector import ARCHS, Call, recording  # noqa: E402
from cnnfast.gpu import conv  # noqa: E402

RELU = Activation("relu")
BN = Norm("running")
LAYERS = {
    "dcgan": Step(ConvSpec.make(128, 64, 4, 2, 1), RELU, norm=BN),
    "cyclegan": Step(ConvSpec.make(128, 64, 3, 2, 1, 1), RELU, norm=BN),
    "rgb": Step(ConvSpec.make(64, 3, 4, 2, 1), Activation("tanh"), norm=BN),
    "plain": Step(ConvSpec.make(64, 64, 3, 1, 1, transposed=False), RELU, norm=BN),
    "upsample": replace(upsample_step(64, 64, (3, 3), Upsample((2, 2), (1, 1))), norm=BN),
    "vocoder": Step(ConvSpec.make(64, 32, (1, 16), (1, 8), (0, 4)), Activation("leaky_relu", (0.1,)), norm=BN),
}
# (batch, height, width): multiples of 16 and ones, on which Triton specialises arguments, odd ones, small and large.
SIZES = (
    (1, 2, 2), (1, 4, 4), (2, 4, 4), (16, 4, 4), (64, 4, 4), (1, 8, 8), (7, 8, 8), (64, 8, 8), (1, 16, 16),
    (16, 16, 16), (1, 1, 17), (3, 5, 7), (5, 13, 11), (1, 31, 33), (1, 32, 32), (8, 32, 32), (1, 64, 64), (4, 64, 48),
    (1, 128, 128), (1, 100, 1),
)  # fmt: skip


def operands(step: Step, batch: int, h: int, w: int, dtype: torch.dtype = torch.float16) -> Operands:
    s = step.spec
    weight = torch.empty(step.weight_shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x = torch.empty(batch, s.in_channels, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    vectors = [torch.empty(s.out_channels) for _ in range(4)]
    return Operands(x, weight, None, vectors[0], vectors[1], vectors[2], vectors[3])


def binaries(calls: list[Call]) -> set[str]:
    """Of the convolution and a split's second pass."""
    return {c.job.key for c in calls if c.job.function != "gather_weight_kernel"}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_few_binaries_over_many_sizes(name: str, arch: int) -> None:
    assert len(SIZES) == len(set(SIZES)) == 20
    step = LAYERS[name]
    for dtype in (torch.float16, torch.float32):
        with recording(arch) as calls, torch.no_grad():
            for size in SIZES:
                conv.run(step, operands(step, *size, dtype=dtype), True)
        assert len(SIZES) <= len(calls)
        assert 1 <= len(binaries(calls)) <= BINARIES == 3, [c.job.function for c in calls]
        assert len({c.job.key for c in calls} - binaries(calls)) <= 1, "one more that gathers the weight"


@pytest.mark.parametrize("name", LAYERS)
def test_batch_height_and_width_are_no_compile_keys(name: str) -> None:
    """With the plan fixed, all sizes share the binary."""
    step = LAYERS[name]
    with recording(90) as calls:
        o = operands(step, 2, 4, 6)
        conv.run(step, o, True)
        plan = conv.lookup(step, o, True).plan
        for size in SIZES:
            if step.spec.transposed and size[1:] == (1, 1):
                continue
            conv.run(step, operands(step, *size), True, plan)
    first, *_ = (c for c in calls if c.job.function == "conv_transpose_kernel")
    assert {c.job.key for c in calls if c.job.function == "conv_transpose_kernel"} == {first.job.key}


def test_odd_addresses_and_layouts_are_no_compile_keys() -> None:
    step = LAYERS["dcgan"]
    o = operands(step, 2, 4, 6)

    def odd(t: torch.Tensor) -> torch.Tensor:
        return t.new_empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride())

    moved = Operands(*(odd(t) if isinstance(t, torch.Tensor) else t for t in o))
    strided = o._replace(x=o.x.contiguous(), weight=o.weight.contiguous(), shift=torch.empty(128)[::2])
    assert moved.x.data_ptr() % 16 and moved.shift.data_ptr() % 16
    with recording(90) as calls:
        for each in (o, moved, strided):
            conv.run(step, each, True)
    assert len(binaries(calls)) == 1 and len(calls) == 3


def test_a_later_call_looks_up_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    step = LAYERS["dcgan"]
    o = operands(step, 2, 4, 6)
    with recording(90) as calls:
        conv.run(step, o, True)
        before = conv.prepare.cache_info()
        monkeypatch.setattr(conv, "choose_plan", None)
        monkeypatch.setattr(conv, "constants", None)
        monkeypatch.setattr(conv.guard, "first_use", None)
        conv.run(step, o, True)
    after = conv.prepare.cache_info()
    assert after.misses == before.misses and after.hits == before.hits + 1
    assert len(calls) == 2 and len(binaries(calls)) == 1


def test_warmup_leaves_nothing_to_compile() -> None:
    torch.manual_seed(0)
    model = cnnfast.Sequential(
        nn.ConvTranspose2d(32, 64, 4, 1, 0), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh(),
    ).half().eval()  # fmt: skip
    z = torch.zeros(1, 32, 1, 1, dtype=torch.float16)
    with recording(90) as calls, cnnfast.backend("triton"):
        cnnfast.warmup(model, z, batch_sizes=(4, 64))
        warm = {c.job.key for c in calls}
        calls.clear()
        with torch.no_grad():
            for n in (1, 4, 64):
                model(z.expand(n, -1, -1, -1))
    assert calls and {c.job.key for c in calls} <= warm


def test_launches_go_to_the_tensors_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever device is current: all launches of a call happen under the tensors' one."""
    entered: list[Any] = []
    started: list[int] = []

    class Entered(contextlib.AbstractContextManager[None]):
        def __init__(self, where: torch.device) -> None:
            self.where = where

        def __enter__(self) -> None:
            entered.append(self.where)

        def __exit__(self, *rest: object) -> None:
            entered.append(None)

    real = conv._launch
    monkeypatch.setattr(conv, "_launch", lambda *a: (started.append(len(entered)), real(*a))[1])
    step = LAYERS["rgb"]
    o = operands(step, 1, 2, 2)
    o = Operands(*(torch.ones_like(t).to(device) if isinstance(t, torch.Tensor) else t for t in o))
    index = o.x.device.index or 0
    conv.run(step, o, True)
    assert started == [0] and entered == [], "the current device is the right one"
    if not o.x.is_cuda:
        return
    monkeypatch.setattr(torch.cuda, "current_device", lambda: index + 1)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    conv.run(step, o, True)
    assert started == [0, 1] and entered == [o.x.device, None]


def test_autocast_casts_an_input_and_a_weight_by_pytorchs_own_nodes() -> None:
    model = cnnfast.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    model = cnnfast.channels_last(model.train())
    x = torch.zeros(2, 32, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    with recording(90), cnnfast.backend("triton"), torch.autocast("cpu", torch.float16):
        y = model(x)
    assert y.grad_fn is not None and y.dtype == torch.float16
    behind = [node.name() for node, _ in y.grad_fn.next_functions if node is not None]
    assert behind == ["ToCopyBackward0"] * 2 + ["torch::autograd::AccumulateGrad"] * 2


def test_repeated_blocks_share_their_step() -> None:
    """An equal one would be compared with, field by field, in every look-up of a call."""
    block = [nn.ConvTranspose2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU()]
    model = cnnfast.Sequential(*block, *copy.deepcopy(block)).half().eval()
    with recording(90), cnnfast.backend("triton"), torch.no_grad():
        model(torch.zeros(2, 32, 4, 4, dtype=torch.float16))
    (chain,) = model._plan.items
    first, second = chain.steps
    assert first.step is second.step


def test_inference_of_a_chain_asks_once_for_each_kind_of_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnfast.gpu import backend

    asked: list[Step] = []
    real = backend.why_not
    monkeypatch.setattr(backend, "why_not", lambda step, *a, **k: asked.append(step) or real(step, *a, **k))
    model = cnnfast.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3))
    model = cnnfast.channels_last(model.half().eval())
    x = torch.zeros(2, 32, 4, 4, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    with recording(90) as calls, cnnfast.backend("triton"), torch.inference_mode():
        for _ in range(3):
            model(x)
        assert len(asked) == 2 and len(calls) == 6
        model(x[:1])
        assert len(asked) == 4 and len(calls) == 8
        with cnnfast.backend("aten"):
            model(x)
        assert len(calls) == 8
