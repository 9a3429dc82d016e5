"""The tolerance rule on wrong results: faults put into layers as generators have them, in every precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast.reference import conv as convolution
from cnnfast.reference import conv_weight, run_reference
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step
from cnnfast.tolerance import expected, round_tf32, verdict

from ..cases import PRECISIONS, Case, conv, upsample

precisions = pytest.mark.parametrize("precision", PRECISIONS)
LEAKY = dict(activation="leaky_relu", params=(0.2,))
LAYERS = {
    case.id: case
    for case in (
        conv("latent", "", 100, 128, 4, size=(1, 1), batch=8, bias=False, norm=True),
        conv("dcgan", "", 256, 64, 4, 2, 1, size=(8, 8), bias=False, norm=True),
        conv("dcgan-bias", "", 128, 64, 4, 2, 1, size=(8, 8)),
        conv("no-activation", "", 64, 32, 4, 2, 1, size=(8, 8), activation="identity"),
        conv("rgb-head", "", 64, 3, 4, 2, 1, size=(16, 16), activation="tanh"),
        upsample("upsample", "", 64, 32, (3, 3), (2, 2), (1, 1), size=(8, 8)),
        upsample("upsample-norm", "", 64, 32, (3, 3), (2, 2), (1, 1), "reflect", size=(8, 8), bias=False, norm=True),
        conv("discriminator", "", 64, 64, 4, 2, 1, size=(16, 16), transposed=False, **LEAKY),
        conv("resnet", "", 64, 64, 3, 1, 1, size=(8, 8), transposed=False, bias=False, norm=True, residual=True),
    )
}
layers = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)


class Layer(NamedTuple):
    step: Step
    o: Operands
    tf32: bool
    exact: Tensor
    yardstick: Tensor
    before: Tensor
    right: Tensor

    @classmethod
    def of(cls, step: Step, o: Operands, tf32: bool) -> Layer:
        at = cls(step, o, tf32, *expected(step, o, tf32), o.x)
        return at._replace(right=at.run())

    def verdict(self, y: Tensor) -> str | None:
        return verdict(y, self.exact, self.yardstick, self.before)

    def run(self, **changes: Tensor) -> Tensor:
        """The step as a kernel computes it, in another order than the yardstick: by blocks of input channels, from the
        last one on."""
        o = self.o._replace(**changes)
        wide = Operands(*(v.float() if isinstance(v, Tensor) else v for v in o))
        if self.tf32:
            wide = wide._replace(x=round_tf32(wide.x), weight=round_tf32(wide.weight))
        step = self.step
        if step.upsample is not None and o.x.dtype != torch.float32:
            summed = conv_weight(step, o.weight).float()
            wide = wide._replace(x=step.pad_input(wide.x), weight=summed)
            step = replace(step, upsample=None, pad=(0, 0))
        across = 1 if step.upsample is not None or not step.spec.transposed else 0  # the weight's input channels
        blocks = zip(reversed(wide.x.split(32, 1)), reversed(wide.weight.split(32, across)), strict=True)
        total = sum(run_reference(_narrow(step.bare, x.shape[1]), Operands(x, w)) for x, w in blocks)
        assert isinstance(total, Tensor)
        if wide.bias is not None:
            total = total + wide.bias[:, None, None]
        return run_reference(step.tail, wide.after(total)).type(o.x.dtype)


def _narrow(step: Step, channels: int) -> Step:
    return replace(step, spec=replace(step.spec, in_channels=channels))


@functools.cache
def layer(case: Case, precision: str) -> Layer:
    dtype, _ = PRECISIONS[precision]
    o = case.operands(dtype, "cpu")
    if case.norm:  # as in a trained generator: channels of about one scale
        g = torch.Generator().manual_seed(1)
        mean, var, scale, shift = (torch.randn(case.step.spec.out_channels, generator=g) for _ in range(4))
        o = o._replace(mean=0.2 * mean, var=1 + 0.2 * var.tanh(), scale=1 + 0.1 * scale, shift=0.3 * shift)
    tf32 = precision == "tf32"
    return Layer.of(case.step, o, tf32)


def wrong_tap(at: Layer) -> Tensor:
    """A tap missing in one phase."""
    y, weight = at.right.clone(), at.o.weight.clone()
    weight[:, :, -2, -2] = 0
    r = at.step.spec.stride[0] if at.step.spec.transposed else 1
    phase = (slice(None), slice(None), slice(r // 2, None, r), slice(r // 2, None, r))
    y[phase] = at.run(weight=weight)[phase]
    return y


def lost_shift(at: Layer) -> Tensor:
    """One channel without its shift: the one with the shift of median size."""
    name = "shift" if at.o.shift is not None else "bias"
    shift = getattr(at.o, name).clone()
    shift[shift.abs().median(0).indices] = 0
    return at.run(**{name: shift})


def wrong_border(at: Layer) -> Tensor:
    """The last row of the last image from the row of the input beside the right one."""
    y, x = at.right.clone(), at.o.x.clone()
    x[:, :, -1] = x[:, :, -2] if x.shape[2] > 1 else 0
    y[-1, :, -1] = at.run(x=x)[-1, :, -1]
    return y


def dropped_block(at: Layer) -> Tensor:
    """The last 32 input channels left out, of one tile of 64 positions."""
    x = at.o.x.clone()
    x[:, -32:] = 0
    y, wrong = at.right.clone(), at.run(x=x)
    y.flatten(2)[-1, :, :64] = wrong.flatten(2)[-1, :, :64]
    return y


FAULTS: dict[str, Callable[[Layer], Tensor]] = {
    f.__name__: f for f in (wrong_tap, lost_shift, wrong_border, dropped_block)
}


@layers
@precisions
def test_a_layer_in_another_order_passes(case: Case, precision: str) -> None:
    at = layer(case, precision)
    assert at.verdict(at.right) is None
    assert precision != "fp32" or not torch.equal(at.right, at.yardstick), "an order of its own"


@pytest.mark.parametrize("fault", FAULTS)
@layers
@precisions
def test_a_fault_is_noticed(case: Case, precision: str, fault: str) -> None:
    at = layer(case, precision)
    assert at.verdict(FAULTS[fault](at)) is not None


# By which an element must not differ, relative to the RMS of what enters the activation.
ELEMENT = {"fp32": 1e-4, "tf32": 0.01, "fp16": 0.006, "bf16": 0.04}


@layers
@precisions
def test_one_element(case: Case, precision: str) -> None:
    """Any of those that are no larger than usual: beyond, it is relative to the element."""
    at = layer(case, precision)
    off = ELEMENT[precision] * at.before.square().mean().sqrt().item()
    usual = (at.exact.abs() < at.before.square().mean().sqrt()).nonzero()
    for k in torch.randperm(len(usual), generator=torch.Generator().manual_seed(0))[:8]:
        y, place = at.right.clone(), tuple(usual[k].tolist())
        y[place] = at.exact[place] + off * 1.01  # where rounding it again does not lose the difference
        problem = at.verdict(y)
        assert problem is not None and str(list(place)) in problem, (place, problem)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_small_channel_has_limits_of_its_own(precision: str) -> None:
    """Of a channel a hundred times smaller than the others, the shift is lost."""
    case = LAYERS["dcgan"]
    at = layer(case, precision)
    assert at.o.scale is not None and at.o.shift is not None
    small = torch.ones_like(at.o.scale)
    small[5] = 0.01
    o = at.o._replace(scale=at.o.scale * small, shift=at.o.shift * small)
    at = Layer.of(at.step, o, at.tf32)
    lost = o.shift.clone()  # type: ignore[union-attr]
    lost[5] = 0
    assert at.verdict(at.right) is None
    assert "max error" in str(at.verdict(at.run(shift=lost)))


# --- weight gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["", "position", "channel", "tap"])
@pytest.mark.parametrize("c_out", [64, 3])
@precisions
def test_weight_gradients(precision: str, c_out: int, fault: str) -> None:
    """Of an image one position is left out, one channel is not accumulated, or a tap is shifted by a pixel."""
    dtype, _ = PRECISIONS[precision]
    spec, g = ConvSpec.make(64, c_out, 4, 2, 1), torch.Generator().manual_seed(2)
    x = torch.randn(4, 64, 8, 8, generator=g).type(dtype)
    grad = torch.randn(4, c_out, 16, 16, generator=g).type(dtype)

    def gradient(x: Tensor, grad: Tensor) -> Tensor:
        w = torch.zeros(spec.weight_shape, dtype=x.dtype, requires_grad=True)
        return torch.autograd.grad(convolution(x, w, None, spec), w, grad)[0]

    exact = gradient(x.double(), grad.double())
    wide = [round_tf32(t) if precision == "tf32" else t.float() for t in (x, grad)]
    yardstick = gradient(*wide).type(dtype)
    parts = [gradient(a, b) for a, b in zip(*(t.split(1) for t in wide), strict=True)]
    if fault == "position":
        wide[1][2, :, 5, 5] = 0
        parts[2] = gradient(wide[0][2:3], wide[1][2:3])
    elif fault == "channel":
        parts[3][:, 1] = 0
    elif fault == "tap":
        parts[1][:, :, 0, 0] = parts[1][:, :, 0, 1]
    y = torch.stack(parts).sum(0).type(dtype)
    assert (verdict(y, exact, yardstick) is None) == (fault == "")


# --- norms ------------------------------------------------------------------------------------------------------------


def normalised(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.leaky_relu((x - mean[:, None, None]) * torch.rsqrt(var[:, None, None] + 1e-5), 0.2)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 32), ("fp16", 8), ("bf16", 4)])
def test_statistics_of_one_value_less(precision: str, size: int) -> None:
    """One channel's mean and variance are without its last value. In the result this is as small as one part in as many
    as there are values: in 16 bits it shows in small maps (`test_statistics_themselves`: in any)."""
    dtype, _ = PRECISIONS[precision]
    x = torch.randn(2, 32, size, size, generator=torch.Generator().manual_seed(3)).type(dtype)
    x[-1, 7, -1, -1] = 2.5
    flat = x.double().transpose(0, 1).flatten(1)
    mean, var = flat.mean(1), flat.var(1, correction=0)
    exact = normalised(x.double(), mean, var)
    wide = x.float().transpose(0, 1).flatten(1)
    yardstick = normalised(x.float(), wide.mean(1), wide.var(1, correction=0)).type(dtype)
    parts = [t.mean(1) for t in wide.split(16, 1)]
    right = torch.stack(parts).mean(0)
    y = normalised(x.float(), right, (wide - right[:, None]).square().mean(1)).type(dtype)
    assert verdict(y, exact, yardstick) is None
    off_mean, off_var = right.clone(), wide.var(1, correction=0)
    off_mean[7], off_var[7] = wide[7, :-1].mean(), wide[7, :-1].var(correction=0)
    assert verdict(normalised(x.float(), off_mean, off_var).type(dtype), exact, yardstick) is not None


@pytest.mark.parametrize("rows", [16, 256, 16384])
def test_statistics_themselves(rows: int) -> None:
    """As the check of a convolution's statistics compares them, float32 whatever the result's dtype."""
    x = torch.randn(32, rows, generator=torch.Generator().manual_seed(4)).bfloat16().double()
    mean, m2 = x.mean(1), x.var(1, correction=0) * rows
    wide = x.float()
    yardsticks = wide.mean(1), (wide - wide.mean(1, keepdim=True)).square().sum(1)
    blocks = torch.stack([t.sum(1) for t in wide.split(8, 1)]).sum(0) / rows
    results = blocks, torch.stack([t.square().sum(1) for t in (wide - blocks[:, None]).split(8, 1)]).sum(0)
    for exact, yardstick, y in zip((mean, m2), yardsticks, results, strict=True):
        assert verdict(y, exact, yardstick, x.abs().max().item()) is None
    shorter = x[:, :-1]
    for exact, yardstick, off in zip(
        (mean, m2), yardsticks, (shorter.mean(1), shorter.var(1, correction=0) * rows), strict=True
    ):
        y = yardstick.clone()
        y[9] = off[9]
        assert verdict(y, exact, yardstick, x.abs().max().item()) is not None
