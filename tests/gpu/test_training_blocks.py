"""Convolution + norm + activation in training on the Triton path: statistics from the epilogue, gradients, launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cnnfast.activations import Activation
from cnnfast.norms import Norm
from cnnfast.ops.run import run_step
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step, Upsample, upsample_step

from ..cases import PRECISIONS
from ..conftest import conv_precision
from ..tolerance import assert_close

pytestmark = pytest.mark.usefixtures("poison")


@dataclass(frozen=True)
class Block:
    name: str
    step: Step
    x: tuple[int, int, int, int]
    norm: Norm
    epilogue: bool  # whether the convolution's epilogue gives the statistics
    residual: bool = False

    @property
    def whole(self) -> Step:
        return replace(self.step, norm=self.norm, residual=self.residual)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.step.weight_shape


def block(name: str, spec: ConvSpec, size: tuple[int, int], norm: Norm, epilogue: bool, act: str, **more: Any) -> Block:
    batch = more.pop("batch", 3)
    return Block(name, Step(spec, Activation(act)), (batch, spec.in_channels, *size), norm, epilogue, **more)


BN, IN, GN = Norm("batch"), Norm("instance"), Norm("group", groups=4)
DCGAN = ConvSpec.make(32, 48, 4, 2, 1)
BLOCKS = (
    block("batch", DCGAN, (4, 4), BN, True, "tanh"),
    block("batch-latent", ConvSpec.make(64, 32, 4), (1, 1), BN, False, "sigmoid", batch=6),
    block("batch-residual", ConvSpec.make(32, 32, 3, 1, 1, transposed=False), (5, 6), BN, True, "silu", residual=True),
    block("instance", DCGAN, (8, 8), IN, True, "tanh"),
    block("instance-odd", ConvSpec.make(32, 32, 3, 2, 1, 1), (3, 5), IN, False, "elu"),
    block("group", DCGAN, (8, 8), GN, True, "gelu"),
    Block(
        "upsample-batch",
        upsample_step(32, 48, (3, 3), Upsample((2, 2), (1, 1)), 1, Activation("silu")),
        (2, 32, 4, 4),
        BN,
        True,
    ),
)


def tensors(b: Block, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    c, gain = b.step.spec.out_channels, (b.x[1] * 4) ** -0.5
    out = {
        "x": torch.randn(b.x, generator=g).to(dtype),
        "weight": (torch.randn(b.weight_shape, generator=g) * gain).to(dtype),
        "bias": torch.randn(c, generator=g).to(dtype),
        "scale": torch.randn(c, generator=g),
        "shift": torch.randn(c, generator=g),
    }
    size = (b.x[0], c, *b.step.output_size(b.x[2:]))
    if b.residual:
        out["residual"] = torch.randn(size, generator=g).to(dtype)
    out["dy"] = torch.randn(size, generator=g).to(dtype)
    return out


def reference(b: Block, t: dict[str, torch.Tensor], running: list[torch.Tensor]) -> torch.Tensor:
    s, up = b.step.spec, b.step.upsample
    if up is not None:
        u = F.conv2d(F.interpolate(t["x"], scale_factor=2.0), t["weight"], t["bias"], padding=1)
    elif s.transposed:
        u = F.conv_transpose2d(t["x"], t["weight"], t["bias"], s.stride, s.padding, s.output_padding)
    else:
        u = F.conv2d(t["x"], t["weight"], t["bias"], s.stride, s.padding)
    if b.norm.kind == "batch":
        y = F.batch_norm(u, *running, t["scale"], t["shift"], training=True)
    elif b.norm.kind == "instance":
        y = F.instance_norm(u, weight=t["scale"], bias=t["shift"])
    else:
        y = F.group_norm(u, b.norm.groups, t["scale"], t["shift"])
    return b.step.activation(y + t["residual"] if b.residual else y)


def ours(b: Block, t: dict[str, torch.Tensor], running: list[torch.Tensor]) -> torch.Tensor:
    stats = running if b.norm.kind == "batch" else (None, None)
    o = Operands(t["x"], t["weight"], t["bias"], *stats, t["scale"], t["shift"], t.get("residual"))
    return run_step(b.whole, o, channels_last=True, backend="triton")


Function = Callable[[Block, dict[str, torch.Tensor], list[torch.Tensor]], torch.Tensor]


def gradients(function: Function, b: Block, t: dict[str, torch.Tensor], twice: bool) -> dict[str, torch.Tensor]:
    c = b.step.spec.out_channels
    running = [t["scale"].new_zeros(c), t["scale"].new_ones(c)]
    t = {k: v.detach().requires_grad_() for k, v in t.items()}
    leaves = [v for k, v in t.items() if k != "dy"]
    y = function(b, t, running)
    out = {"y": y.detach(), "running_mean": running[0], "running_var": running[1]}
    grads = torch.autograd.grad(y, leaves, t["dy"] if twice else t["dy"].detach(), create_graph=twice)
    if not twice:
        return out | dict(zip((k for k in t if k != "dy"), grads, strict=True))
    penalty = grads[0].square().sum() + grads[1].square().sum()
    return dict(zip(t, torch.autograd.grad(penalty, list(t.values()), materialize_grads=True), strict=True))


def check(b: Block, precision: str, device: torch.device, twice: bool) -> None:
    dtype, switch = PRECISIONS[precision]
    given = tensors(b, dtype)
    with conv_precision(switch):
        got = gradients(ours, b, {k: v.to(device) for k, v in given.items()}, twice)
    exact = gradients(reference, b, {k: v.double() for k, v in given.items()}, twice)
    yard = gradients(reference, b, {k: v.float() for k, v in given.items()}, twice)
    for name, value in got.items():
        if name == "bias" and b.norm.kind != "group":
            # A norm by channel forgets the bias: what is left of its gradient is rounding, relative to dy's sums.
            assert value.abs().max() < 0.05 * exact["shift"].abs().max()
            continue
        yardstick = rounded(b, given, name, yard, dtype)
        assert_close(value, exact[name], yardstick.to(value.dtype), f"{b.name} {precision} {name}")


def rounded(
    b: Block, given: dict[str, torch.Tensor], name: str, yard: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """The yardstick in float32 alone; in 16 bits with the convolution's result and its gradient rounded, as any chain
    of operators rounds them."""
    if dtype == torch.float32:
        return yard[name]
    if "rounded" not in yard:
        yard["rounded"] = gradients(_through(dtype), b, {k: v.float() for k, v in given.items()}, False)  # type: ignore
    return yard["rounded"][name]  # type: ignore


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.dtype = dtype
        return t.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad.to(ctx.dtype).float(), None


def _through(dtype: torch.dtype) -> Function:
    def run(b: Block, t: dict[str, torch.Tensor], running: list[torch.Tensor]) -> torch.Tensor:
        s = b.step.spec
        assert s.transposed and b.step.upsample is None and not b.residual
        u = _Rounded.apply(F.conv_transpose2d(t["x"], t["weight"], t["bias"], s.stride, s.padding), dtype)
        if b.norm.kind == "batch":
            y = F.batch_norm(u, *running, t["scale"], t["shift"], training=True)
        elif b.norm.kind == "instance":
            y = F.instance_norm(u, weight=t["scale"], bias=t["shift"])
        else:
            y = F.group_norm(u, b.norm.groups, t["scale"], t["shift"])
        return b.step.activation(y)

    return run


@pytest.mark.parametrize("b", BLOCKS, ids=lambda b: b.name)
def test_block(b: Block, device: torch.device, launches: list[str]) -> None:
    check(b, "fp32", device, twice=False)
    kinds = [name.split()[0] for name in launches]
    assert ("norm-statistics" not in kinds) == b.epilogue, launches


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["batch", "instance", "group"])
def test_precisions(name: str, precision: str, device: torch.device) -> None:
    check(next(b for b in BLOCKS if b.name == name), precision, device, twice=False)


@pytest.mark.parametrize(
    "b",
    [
        pytest.param(b, id=b.name, marks=[pytest.mark.slow] * (b.name == "group"))
        for b in BLOCKS
        if b.name in ("batch", "group", "upsample-batch")
    ],
)
def test_second_gradients(b: Block, device: torch.device) -> None:
    check(b, "fp32", device, twice=True)


def test_launches_of_a_block(device: torch.device, launches: list[str]) -> None:
    """What a training step of one block costs: three launches forward, three of the norm and two convolutions back."""
    b = BLOCKS[0]
    given = {k: v.to(device) for k, v in tensors(b, torch.float16).items() if k != "bias"}
    y = None
    t = {k: v.detach().requires_grad_() for k, v in given.items()}
    o = Operands(t["x"], t["weight"], scale=t["scale"], shift=t["shift"])
    y = run_step(b.whole, o, channels_last=True, backend="triton")
    forward = [name.split()[0] for name in launches]
    launches.clear()
    y.backward(given["dy"])
    backward = [name.split()[0] for name in launches]
    assert forward == ["phases", "norm-merge", "norm-apply"]
    assert sorted(backward) == ["norm-grad-apply", "norm-grad-finish", "norm-grad-sums", "phases", "wgrad"]


def test_a_frozen_convolution_ahead_of_a_norm(device: torch.device, launches: list[str]) -> None:
    b = BLOCKS[0]
    t = {k: v.to(device) for k, v in tensors(b, torch.float32).items()}
    t["scale"].requires_grad_()
    y = ours(b, t, [torch.zeros(48, device=device), torch.ones(48, device=device)])
    launches.clear()
    y.backward(t["dy"])
    assert not any(name.split()[0] in ("phases", "wgrad") for name in launches)
    assert t["scale"].grad is not None and t["weight"].grad is None
