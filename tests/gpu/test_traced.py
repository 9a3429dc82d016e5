"""The operators of steps with gradients: schemas, fakes and derivatives against the eager formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cnnfast.activations import Activation
from cnnfast.gpu import traced
from cnnfast.memory_format import to_format
from cnnfast.norms import Norm
from cnnfast.reference import run_reference
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step

UP = ConvSpec.make(16, 8, 4, 2, 1)
ODD = ConvSpec.make(8, 6, (3, 2), (2, 1), 1, (1, 0), 2, 1)
PLAIN = ConvSpec.make(8, 16, 4, 2, 1, transposed=False)
VOLUME = ConvSpec.make(16, 16, (2, 3, 4), (2, 1, 2), 1, (1, 0, 0), ndim=3)
SIZES = {UP: (3, 4), ODD: (4, 5), PLAIN: (7, 6), VOLUME: (2, 3, 2)}

STEPS: dict[str, Step] = {
    "conv": Step(UP, Activation("tanh")),
    "conv identity": Step(ODD),
    "conv plain": Step(PLAIN, Activation("relu")),
    "silu": Step(UP, Activation("silu")),
    "residual": Step(PLAIN, Activation("relu"), residual=True),
    "residual identity": Step(PLAIN, residual=True),
    "batch": Step(UP, Activation("relu"), norm=Norm("batch")),
    "batch residual": Step(PLAIN, Activation("leaky_relu", (0.2,)), norm=Norm("batch"), residual=True),
    "instance": Step(UP, Activation("tanh"), norm=Norm("instance")),
    "group": Step(ODD, Activation("gelu"), norm=Norm("group", 3)),
    "eval": Step(UP, Activation("relu"), norm=Norm("running")),
    "affine": Step(UP, Activation("elu"), norm=Norm("affine")),
    "conv volume": Step(VOLUME, Activation("tanh")),
    "volume": Step(VOLUME, Activation("relu"), norm=Norm("batch"), residual=True),
    "volume group": Step(VOLUME, Activation("silu"), norm=Norm("group", 4)),
    "prelu": Step(UP, Activation("prelu"), norm=Norm("batch"), residual=True),
}


def operands(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """(step, operands) of a case, its floating leaves requiring gradients; running statistics as in training."""
    step, g = STEPS[name], torch.Generator().manual_seed(0)
    s, c = step.spec, step.spec.out_channels

    def rand(*size: int, grad: bool = True, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=g).to(device=device, dtype=kind).requires_grad_(grad)

    size = SIZES[s]
    o = Operands(
        rand(2, s.in_channels, *size),
        rand(*s.weight_shape),
        rand(c),
        residual=rand(2, c, *s.output_size(size)) if step.residual else None,
        slope=rand(c) if step.activation.name == "prelu" else None,
    )
    if step.norm is not None:
        o = o._replace(scale=rand(c, kind=torch.float32), shift=rand(c, kind=torch.float32))
        if step.norm.kind in ("batch", "instance", "running"):
            mean, var = rand(c, grad=False, kind=torch.float32), torch.rand(c, generator=g).to(device) + 0.5
            o = o._replace(mean=mean, var=var)
    return step, o


def leaves(o: Operands) -> list[Tensor]:
    return [t for t in o if isinstance(t, Tensor) and t.requires_grad]


def calls(name: str, device: torch.device | str, backend: str | None, dtype: torch.dtype = torch.float32) -> Any:
    """(operator, arguments) of every operator that forward and backward of the case call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    step, o = operands(name, device, dtype)
    found: list[tuple[Any, tuple[Any, ...]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "cnnfast":
                found.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        y = traced.run(step, o, True, backend)
        torch.autograd.grad(y, leaves(o), torch.ones_like(y), allow_unused=True)
    return found


def fresh(args: tuple[Any, ...], requires_grad: bool) -> tuple[Any, ...]:
    def copy(t: Any) -> Any:
        return t.detach().clone().requires_grad_(requires_grad) if isinstance(t, Tensor) else t

    return tuple(copy(a) for a in args)


WITHOUT_GRADIENT = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("name", STEPS)
def test_fakes_of_forward_and_backward(name: str) -> None:
    for func, args in calls(name, "cpu", None):
        torch.library.opcheck(func, fresh(args, False), test_utils=WITHOUT_GRADIENT)


@pytest.mark.parametrize("name", STEPS)
def test_opcheck(name: str) -> None:
    """All of opcheck, symbolic shapes and the traced backward among it, of the operator that the step is."""
    step, o = operands(name)
    func, args = calls(name, "cpu", None)[0]
    torch.library.opcheck(func, args)


@pytest.mark.parametrize("name", STEPS)
def test_backward_is_made_of_operators(name: str) -> None:
    names = [f._schema.name.split("::")[1] for f, _ in calls(name, "cpu", None)]
    first = "conv" if name.startswith("conv") else "conv_norm_act"
    assert names[0] == first
    assert "conv_weight_grad" in names and names.count("conv") == (2 if first == "conv" else 1)
    assert ("norm_act_backward" in names) == (first == "conv_norm_act")


@pytest.mark.parametrize("name", STEPS)
def test_values_and_gradients_equal_pytorch(name: str) -> None:
    step, o = operands(name)
    given = leaves(o)
    running = [o.mean, o.var]
    before = [None if t is None else t.clone() for t in running]
    want = to_format(run_reference(step, o), True)
    grad = torch.randn(want.shape)
    expected = torch.autograd.grad(want, given, grad)
    moved = [None if t is None else t.clone() for t in running]
    for t, old in zip(running, before, strict=True):
        if t is not None:
            t.copy_(old)
    got = traced.run(step, o, True, None)
    torch.testing.assert_close(got, want)
    assert got.stride() == want.stride()
    for g, e in zip(torch.autograd.grad(got, given, grad), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)
    for t, m in zip(running, moved, strict=True):
        assert (t is None) == (m is None)
        if t is not None:
            torch.testing.assert_close(t, m)
