"""PyTorch's own samples of the convolutions that want gradients, forward and backward through both backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cnnfast

from ..conftest import conv_precision
from ..gpu.test_conv_autograd import convolutions
from ..tolerance import assert_close

pytest.importorskip("expecttest", reason="expecttest, which PyTorch's test suite imports, is not installed")
_frozen = torch.backends.flags_frozen()
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

# PyTorch's test suite forbids setting torch.backends' switches outside a context manager, for the whole process.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = not _frozen

NAMES = ("conv_transpose1d", "conv_transpose2d", "conv1d", "conv2d")
OPS = {n: next(op for op in op_db if op.name == f"nn.functional.{n}") for n in NAMES}


def leaves_of(sample: Any) -> list[torch.Tensor]:
    given = [sample.input, *sample.args, *sample.kwargs.values()]
    return [t for t in given if isinstance(t, torch.Tensor)]


def run(function: Callable[..., torch.Tensor], sample: Any, dtype: torch.dtype, **more: Any) -> list[torch.Tensor]:
    """The result and the gradients of its sum weighted by fixed noise, for the sample's tensors in ``dtype``."""
    leaves = [t.detach().type(dtype).requires_grad_() for t in leaves_of(sample)]
    rest = iter(leaves)

    def swap(value: Any) -> Any:
        return next(rest) if isinstance(value, torch.Tensor) else value

    x, args = swap(sample.input), [swap(a) for a in sample.args]
    y = function(x, *args, **{k: swap(v) for k, v in sample.kwargs.items()}, **more)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).type(torch.bfloat16)  # exact in them all
    noise = noise.type(dtype).to(y.device)
    grads = torch.autograd.grad(y, leaves, noise)
    return [y.detach(), *grads]


def cpu(sample: Any) -> Any:
    return sample.transform(lambda t: t.cpu() if isinstance(t, torch.Tensor) else t)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    count = 0
    for sample in OPS[name].sample_inputs("cpu", dtype, requires_grad=True):
        got = run(getattr(cnnfast.ops, name), sample, dtype, backend="aten")
        want, exact = run(OPS[name].op, sample, dtype), run(OPS[name].op, sample, torch.float64)
        assert [t.dtype for t in got] == [t.dtype for t in want]
        for a, b, e in zip(got, want, exact, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(a, b)
            else:
                assert_close(a, e, b, f"{name}: {sample}")
        count += 1
    assert count >= 5


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] * ((name, dtype) != ("conv_transpose2d", torch.float32)))
        for name in NAMES
        for dtype in (torch.float32, torch.bfloat16)
    ],
    ids=str,
)
def test_samples_on_the_device(name: str, dtype: torch.dtype, device: torch.device, launches: list[str]) -> None:
    """All that have even padding and an image run on the kernels, few channels or not."""
    on_kernels = 0
    for sample in OPS[name].sample_inputs(str(device), dtype, requires_grad=True):
        launches.clear()
        uneven = sample.kwargs.get("padding") == "same" or "same" in [a for a in sample.args if isinstance(a, str)]
        fits = min(sample.input.shape) > 0 and not uneven
        with conv_precision("ieee"):
            got = run(getattr(cnnfast.ops, name), sample, dtype, backend="triton" if fits else "auto")
        assert not fits or convolutions(launches) == ["conv", "conv", "wgrad"], f"{sample}: {launches}"
        on_kernels += fits
        here = cpu(sample)
        exact = run(OPS[name].op, here, torch.float64)
        yard = [t.type(dtype) for t in run(OPS[name].op, here, torch.float32)]
        for a, e, y in zip(got, exact, yard, strict=True):
            assert_close(a, e, y, f"{name}: {sample}")
    assert on_kernels >= 4


@pytest.mark.parametrize("activation", list(cnnfast.activations.ACTIVATIONS))
@pytest.mark.parametrize("name", [*NAMES, "upsample_conv2d"])
def test_gradcheck_on_the_reference_path(name: str, activation: str) -> None:
    """First and second derivatives in float64, by differences."""
    torch.manual_seed(0)
    ndim = 1 if name.endswith("1d") else 2
    x = torch.randn(2, 2, *(5 - ndim,) * ndim, dtype=torch.float64)
    weight = torch.randn(2, 2, *(3,) * ndim, dtype=torch.float64)
    bias, scale, shift = (torch.randn(2, dtype=torch.float64) for _ in range(3))
    geometry = {} if name == "upsample_conv2d" else dict(stride=2, padding=1)
    inputs = [x, weight, bias, scale, shift]
    if activation == "prelu":
        inputs.append(torch.rand(2, dtype=torch.float64))

    def function(*t: torch.Tensor) -> torch.Tensor:
        return getattr(cnnfast.ops, name)(
            t[0], t[1], t[2], **geometry, scale=t[3], shift=t[4], activation=activation,
            activation_param=t[5] if len(t) > 5 else None, backend="aten",
        )  # fmt: skip

    leaves = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
