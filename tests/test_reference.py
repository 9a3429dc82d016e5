"""The reference against torch in float64: the phases, the collapse of an upsampling, the epilogue."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from cnnfast import reference
from cnnfast.activations import ACTIVATIONS, Activation
from cnnfast.norms import Norm
from cnnfast.reference import run_reference
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step, Upsample, upsample_step

from .cases import fitted
from .test_spec import random_specs, torch_conv

DOUBLE = torch.float64


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
def test_phases_give_torch_s_convolution(transposed: bool) -> None:
    """One product per tap and phase, scattered: the decomposition that the kernels run, on random specs."""
    for spec, size in random_specs(80, transposed):
        x, w = rand(2, spec.in_channels, *size), rand(*spec.weight_shape, seed=1)
        if spec.ndim == 1:
            got = reference.gather_conv(x.unsqueeze(-2), w.unsqueeze(-2), spec.as_2d()).squeeze(-2)
        else:
            got = reference.gather_conv(x, w, spec)
        torch.testing.assert_close(got, torch_conv(spec, x, w), msg=lambda m, s=spec: f"{s}: {m}")
        assert torch.equal(reference.conv(x, w, None, spec), torch_conv(spec, x, w))


def test_a_phase_without_taps_is_the_bias() -> None:
    spec = ConvSpec.make(3, 2, 3, 2, 1, 1, dilation=2)
    x, w, bias = rand(1, 3, 4, 4), rand(3, 2, 3, 3), rand(2)
    y = reference.conv(x, w, bias, spec)
    empty = [ph.residue for ph in spec.phases[0] if ph.taps == 0]
    assert empty == [0]
    assert torch.equal(y[:, :, 0::2, :], bias.reshape(1, -1, 1, 1).expand_as(y[:, :, 0::2, :]))


def reference_collapse(x: torch.Tensor, w: torch.Tensor, step: Step) -> torch.Tensor:
    """The step as backends run it: padded input, summed weight, transposed convolution."""
    assert step.upsample is not None
    return reference.conv(step.pad_input(x), reference.conv_weight(step, w), None, step.spec)


_KERNELS = {2: [(1, 1), (3, 3), (5, 3), (7, 5)], 3: [(3, 3, 3), (1, 5, 3)]}
_FACTORS = {2: [(1, 1), (2, 2), (3, 2), (2, 4)], 3: [(2, 2, 2), (3, 1, 2)]}


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect"])
def test_collapsed_upsampling(mode: str, groups: int, ndim: int) -> None:
    count = 0
    for kernel, factor in itertools.product(_KERNELS[ndim], _FACTORS[ndim]):
        for pad in itertools.product(*(sorted({0, (k - 1) // 2, k - 1}) for k in kernel)):
            size = (4, 5, 3)[:ndim]
            if any(n * r + 2 * p < k for n, r, p, k in zip(size, factor, pad, kernel, strict=True)):
                continue
            u = Upsample(factor, pad, mode)
            if mode == "reflect" and any(p > r - 1 for p, r in zip(pad, factor, strict=True)):
                with pytest.raises(ValueError, match="reflect padding"):
                    upsample_step(4, 6, kernel, u, groups)
                continue
            step = upsample_step(4, 6, kernel, u, groups)
            x, w = rand(2, 4, *size), rand(6, 4 // groups, *kernel, seed=1)
            expected = reference.upsample_conv(x, w, None, factor, pad, mode, groups)
            got = reference_collapse(x, w, step)
            assert got.shape == expected.shape == (2, 6, *step.output_size(size))
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
            assert step.weight_shape == w.shape
            conv, entering = step.unfused(size)
            assert conv.output_size(entering) == step.output_size(size)
            count += 1
    assert count >= 8


def test_upsample_conv_is_torch_s_modules() -> None:
    for n, make in enumerate((torch.nn.Conv2d, torch.nn.Conv3d), 2):
        x, w, bias = rand(2, 4, *(5, 6, 3)[:n]), rand(6, 4, *(3,) * n, seed=1), rand(6, seed=2)
        up = torch.nn.Upsample(scale_factor=2)(x)
        for mode in ("zeros", "replicate", "reflect"):
            conv = make(4, 6, 3, padding=1, padding_mode=mode, dtype=DOUBLE)
            conv.weight.data, conv.bias.data = w, bias
            got = reference.upsample_conv(x, w, bias, (2,) * n, (1,) * n, mode)
            torch.testing.assert_close(got, conv(up), rtol=1e-14, atol=1e-14)


def test_summed_taps_are_rounded_once() -> None:
    w = rand(4, 4, 3, 3).half()
    summed = reference.collapse_weight(w, (2, 2))
    assert summed.dtype == torch.float16
    assert torch.equal(summed, reference.collapse_weight(w.double(), (2, 2)).half())


def test_unknown_padding_mode() -> None:
    with pytest.raises(ValueError, match="padding_mode='circular' must be one of"):
        upsample_step(4, 4, (3, 3), Upsample((2, 2), (1, 1), "circular"))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_epilogue(name: str) -> None:
    """act(scale * (conv + bias) + shift + residual), float32 inside and rounded once."""
    spec = ConvSpec.make(4, 6, 3, 2, 1, 1)
    x, w, bias = rand(2, 4, 3, 3), rand(4, 6, 3, 3, seed=1), rand(6, seed=2)
    scale, shift, residual = rand(6, seed=3), rand(6, seed=4), rand(2, 6, 6, 6, seed=5)
    slope = rand(6, seed=6).abs() if name == "prelu" else None
    act = Activation(name)
    column = (1, -1, 1, 1)
    before = F.conv_transpose2d(x, w, bias, 2, 1, 1) * scale.reshape(column) + shift.reshape(column) + residual
    got = reference.conv_block(x, w, bias, spec, scale, shift, residual, act, slope)
    torch.testing.assert_close(got, act(before, slope), rtol=1e-14, atol=1e-14)
    half = reference.epilogue(before.half(), scale.float(), shift.float(), residual.half(), act, slope)
    wide = before.half().float() * scale.float().reshape(column) + shift.float().reshape(column)
    once = act(wide + residual.half().float(), None if slope is None else slope.float()).half()
    assert half.dtype == torch.float16 and torch.equal(half, once)


def test_run_reference_is_the_modules_in_eval_mode() -> None:
    conv, norm = torch.nn.ConvTranspose2d(4, 6, 4, 2, 1, dtype=DOUBLE), torch.nn.BatchNorm2d(6, dtype=DOUBLE)
    norm(rand(3, 6, 4, 4)), norm.eval()
    norm.weight.data, norm.bias.data = rand(6, seed=7), rand(6, seed=8)
    x = rand(2, 4, 3, 3)
    o = Operands(x, conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    step = Step(ConvSpec.make(4, 6, 4, 2, 1), Activation("tanh"), norm=Norm("running", eps=norm.eps))
    expected = torch.tanh(norm(conv(x)))
    torch.testing.assert_close(run_reference(step, o), expected, rtol=1e-14, atol=1e-14)
    scale, shift = o.folded(step.norm, DOUBLE)
    folded = Operands(x, conv.weight, scale=scale, shift=shift)
    step = replace(step, norm=Norm("affine"))
    torch.testing.assert_close(run_reference(step, folded), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)), ids=str)
def test_folded(given: tuple[bool, bool, bool, bool]) -> None:
    """Any of bias, norm, scale and shift left out."""
    has_bias, has_norm, has_scale, has_shift = given
    x, w = rand(2, 4, 3, 3), rand(4, 6, 4, 4, seed=1)
    o = Operands(
        x, w,
        bias=rand(6, seed=2) if has_bias else None,
        mean=rand(6, seed=3) if has_norm else None,
        var=rand(6, seed=4).abs() + 0.1 if has_norm else None,
        scale=rand(6, seed=5) if has_scale else None,
        shift=rand(6, seed=6) if has_shift else None,
    )  # fmt: skip
    step = fitted(Step(ConvSpec.make(4, 6, 4, 2, 1)), o)
    scale, shift = o.folded(step.norm, DOUBLE)
    folded = Operands(x, w, scale=scale, shift=shift)
    got = run_reference(fitted(step, folded), folded)
    torch.testing.assert_close(got, run_reference(step, o), rtol=1e-12, atol=1e-12)


def test_reference_is_differentiable() -> None:
    spec = ConvSpec.make(2, 4, 3, 2, 1, 1, groups=2)
    x, w, bias = (t.requires_grad_() for t in (rand(1, 2, 2, 3), rand(2, 2, 3, 3), rand(4)))
    scale, shift = rand(4, seed=1).requires_grad_(), rand(4, seed=2).requires_grad_()

    def block(*t: torch.Tensor) -> torch.Tensor:
        return reference.conv_block(*t[:3], spec, *t[3:], activation=Activation("silu"))

    assert gradcheck(block, (x, w, bias, scale, shift))
