"""Weights brought into the kernel's order: against the same by plain indexing, in float64, to the bit."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from cnnfast import reference
from cnnfast.gpu.conv_plan import Lowering, lower, tap_map
from cnnfast.reference import conv_weight
from cnnfast.spec import ConvSpec
from cnnfast.step import Step, Upsample, upsample_step

pytestmark = pytest.mark.usefixtures("poison")


def transposed(*args: Any, **keywords: Any) -> Step:
    return Step(ConvSpec.make(*args, ndim=2, **keywords))


def upsampled(c_in: int, c_out: int, kernel: int, scale: tuple[int, int], groups: int = 1, mode: str = "zeros") -> Step:
    up = Upsample(scale, (kernel // 2,) * 2, mode)
    return upsample_step(c_in, c_out, (kernel, kernel), up, groups)


# (step, input size, packed for merged phases or not)
LAYERS = {
    "rgb": (transposed(64, 3, 4, 2, 1), (8, 8), True),
    "rgb-k5s3": (transposed(48, 3, 5, 3, 2), (8, 8), True),
    "grey-k3s2": (transposed(33, 1, 3, 2, 1, 1), (8, 8), True),
    "latent-cropped": (transposed(40, 20, 4, 2, 1), (1, 1), False),
    "latent-dilated": (transposed(40, 20, 3, 1, 1, 0, dilation=2), (1, 1), True),
    "rgb-groups": (transposed(64, 6, 4, 2, 1, groups=2), (8, 8), True),
    "up": (upsampled(40, 36, 3, (2, 2)), (4, 4), False),
    "up-k5x3": (upsampled(32, 32, 5, (3, 3)), (4, 4), False),
    "up-uneven": (upsampled(32, 16, 3, (2, 1)), (4, 4), False),
    "up-groups": (upsampled(32, 64, 3, (2, 2), 2), (4, 4), False),
    "up-replicate": (upsampled(32, 32, 3, (2, 2), mode="replicate"), (4, 4), False),
    "up-rgb": (upsampled(32, 3, 3, (2, 2)), (4, 4), True),
    "up-1x1": (upsampled(32, 32, 1, (2, 2)), (4, 4), False),
}


def expected(step: Step, low: Lowering, weight: torch.Tensor, packed: bool) -> torch.Tensor:
    """Flat, in the weight's dtype."""
    w = weight if step.upsample is None else reference.collapse_weight(weight, step.upsample.scale, step.spec.groups)
    if not packed:
        return w.permute(0, 2, 3, 1).flatten()
    groups = step.spec.groups
    w = w.reshape(groups, -1, *w.shape[1:])  # (g, C_in/g, C_out/g, kh, kw)
    (map_h, map_w), (a_h, a_w) = tap_map(low), low.merge
    out = w.new_zeros(groups, *low.kernel, w.shape[1], a_h, a_w, w.shape[2])
    for u in range(low.kernel[0]):
        for v in range(low.kernel[1]):
            for a in range(a_h):
                for b in range(a_w):
                    if map_h[a][u] >= 0 and map_w[b][v] >= 0:
                        out[:, u, v, :, a, b] = w[..., map_h[a][u], map_w[b][v]]
    return out.flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_kernel_weight(layer: str, dtype: torch.dtype, device: torch.device) -> None:
    from cnnfast.gpu.weight import kernel_weight, weight_layout

    step, size, packed = LAYERS[layer]
    low = lower(step.spec, size)
    assert weight_layout(low).packed is packed
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(step.weight_shape, generator=generator).to(dtype)
    want = expected(step, low, weight, packed)
    wide = torch.full([2 * n for n in weight.shape], float("nan"), dtype=dtype)
    view = wide[(slice(None, None, 2),) * 4]
    view.copy_(weight)
    for given in (weight, weight.to(memory_format=torch.channels_last), view):
        got = kernel_weight(step, low, given.to(device) if given is not view else wide.to(device)[::2, ::2, ::2, ::2])
        assert got.dtype == dtype and math.prod(got.shape) == want.numel()
        if got.dim() == 4:  # the parameter itself or its copy, channels-last
            got = got.permute(0, 2, 3, 1)
        assert torch.equal(got.flatten().cpu(), want), f"{given.stride()}"


UPSAMPLED = [name for name, (step, _, _) in LAYERS.items() if step.upsample is not None]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layer", UPSAMPLED)
def test_summed_weight_and_its_derivatives(layer: str, channels_last: bool, device: torch.device) -> None:
    from cnnfast.gpu.weight import summed_weight

    step, s = LAYERS[layer][0], LAYERS[layer][0].spec
    weight = torch.randn(step.weight_shape)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    grad, second = torch.randn(s.weight_shape), torch.randn(weight.shape)

    def run(w: torch.Tensor, g: torch.Tensor, v: torch.Tensor, function: Any) -> list[torch.Tensor]:
        w, g = w.requires_grad_(), g.requires_grad_()
        y = function(w)
        (plain,) = torch.autograd.grad(y, w, g.detach(), retain_graph=True)
        (dw,) = torch.autograd.grad(y, w, g, create_graph=True)
        (dg,) = torch.autograd.grad(dw, g, v)
        return [y.detach(), plain, dw.detach(), dg]

    got = run(*(t.to(device) for t in (weight.clone(), grad, second)), lambda w: summed_weight(step, w))
    want = run(*(t.double() for t in (weight, grad, second)), functools.partial(conv_weight, step))
    assert got[1].stride() == weight.stride()
    for a, b in zip(got, want, strict=True):
        # float64 sums, rounded once.
        assert torch.equal(a.cpu(), b.to(torch.float32))


@pytest.mark.parametrize("layer", ["rgb", "up"])
def test_a_table_stays_where_a_captured_graph_reads_it(layer: str) -> None:
    """However many layers there are besides."""
    pytest.importorskip("triton", reason="triton is not installed")
    from cnnfast.gpu import weight as weights

    def table(step: Step, size: tuple[int, int]) -> torch.Tensor:
        strides = (1024, 16, 4, 1)
        if step.upsample is not None:
            return weights._sum(step, strides, torch.float16, torch.device("cpu"), None, False).table
        return weights._gather(step, lower(step.spec, size), strides, torch.float16, torch.device("cpu")).table

    step, size, _ = LAYERS[layer]
    first = table(step, size)
    for channels in range(65, 65 + 257):
        table(transposed(channels, 3, 4, 2, 1) if layer == "rgb" else upsampled(channels, 16, 3, (2, 2)), size)
    assert table(step, size) is first
