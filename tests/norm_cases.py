"""Norm + residual + activation: tensors of a test, and the check that all tests of the kernels share."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from cnnfast.activations import Activation, activation_derivative
from cnnfast.norms import KINDS, Norm
from cnnfast.ops.run import run_step
from cnnfast.reference import composition
from cnnfast.step import Operands, Step, norm_step

from .tolerance import assert_close

__all__ = ["FORMATS", "NormCase", "Tensors", "check", "compute", "expect", "of_every_kind", "spread"]

FORMATS = {True: torch.channels_last, False: torch.contiguous_format}


def of_every_kind(*norms: Norm) -> dict[str, Norm]:
    """``norms`` by kind. All kinds must be there but "running", whose statistics are given: a new one is tested by
    whoever asks for every kind."""
    found = {norm.kind: norm for norm in norms}
    if missing := {*KINDS} - {"running", *found}:
        raise ValueError(f"no case of the norm {', '.join(sorted(missing))}")
    return found


@dataclass
class Tensors:
    """Of one call; ``grad`` is the gradient of its result."""

    x: Tensor
    grad: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    slope: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None

    def map(self, function: Any) -> Tensors:
        return Tensors(*(None if t is None else function(t) for t in self.all()))

    def all(self) -> list[Tensor | None]:
        return [getattr(self, f.name) for f in fields(self)]

    def leaves(self) -> dict[str, Tensor]:
        """What has a gradient."""
        named = {n: getattr(self, n) for n in ("x", "weight", "bias", "residual", "slope")}
        return {n: t for n, t in named.items() if t is not None}


@dataclass(frozen=True)
class NormCase:
    """``mean`` and ``deviation`` of the input, which every channel has of its own size. ``measured`` False: by running
    statistics. ``norm`` None: residual and activation alone."""

    id: str
    norm: Norm | None
    activation: Activation = Activation()
    shape: tuple[int, ...] = (3, 20, 5, 7)
    measured: bool = True
    affine: bool = True
    residual: bool = False
    slopes: int = 0
    x_last: bool = True
    y_last: bool = True
    vectors: torch.dtype = torch.float32
    mean: float = 0.0
    deviation: float = 1.0

    def tensors(self, dtype: torch.dtype, device: torch.device | str) -> Tensors:
        g = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        c = self.shape[1]

        def rand(*size: int, to: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*size, generator=g).type(to)

        x = (rand(*self.shape) * self.deviation + self.mean).type(dtype)
        t = Tensors(x.contiguous(memory_format=FORMATS[self.x_last]), rand(*self.shape, to=dtype))
        if self.affine:
            t.weight, t.bias = rand(c, to=self.vectors), rand(c, to=self.vectors)
        if self.residual:
            t.residual = rand(*self.shape, to=dtype)
        if self.slopes:
            t.slope = torch.rand(self.slopes, generator=g).type(self.vectors)
        if not self.measured:
            t.mean = rand(c) * 0.3 + self.mean
            t.var = (torch.rand(c, generator=g) + 0.5) * self.deviation**2
        return t.map(lambda v: v.to(device))

    @property
    def kind(self) -> Norm | None:
        """What the norm is with ``measured``."""
        return self.norm if self.measured or self.norm is None else Norm("running", eps=self.norm.eps)

    @property
    def step(self) -> Step:
        return norm_step(self.kind, self.residual, self.activation)

    def operands(self, t: Tensors) -> Operands:
        affine = (t.weight, t.bias) if self.norm is not None else (None, None)
        return Operands(t.x, None, None, t.mean, t.var, *affine, t.residual, t.slope)  # type: ignore[arg-type]


def compute(case: NormCase, t: Tensors, dtype: torch.dtype, stored: torch.dtype | None = None) -> dict[str, Tensor]:
    """The result and the gradients on the CPU in ``dtype`` by the elementary composition. ``stored``: where the
    backward takes the activation's derivative of the result, it takes it of the result as this dtype holds it."""
    t = t.map(lambda v: v.detach().cpu().type(dtype).requires_grad_())
    z = composition(case.kind, case.operands(t))
    if t.residual is not None:
        z = z + t.residual
    y = case.activation(z, t.slope)
    leaves = {n: v for n, v in t.leaves().items() if case.norm is not None or n not in ("weight", "bias")}
    if stored is not None and case.residual and case.activation.saves() == "y":
        of_y = activation_derivative(case.activation, y.detach().type(stored).type(dtype), of="y")
        grads = torch.autograd.grad(z, list(leaves.values()), t.grad * of_y)
    else:
        grads = torch.autograd.grad(y, list(leaves.values()), t.grad)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def expect(case: NormCase, t: Tensors, got: dict[str, Tensor], what: str) -> None:
    """Each of ``got`` under the tolerance rule: the yardstick is float32 arithmetic on the same operands, its results
    rounded once to the dtype of ours."""
    exact, yardstick = compute(case, t, torch.float64), compute(case, t, torch.float32, t.x.dtype)
    assert got.keys() == exact.keys()
    for name, ours in got.items():
        assert_close(ours, exact[name], yardstick[name].type(ours.dtype), f"{case.id}, {what}: {name}")


def spread(case: NormCase, t: Tensors, backend: str, create_graph: bool = False) -> dict[str, Tensor]:
    """The result and the gradients through `run_step`; tensors as given, with gradients."""
    leaves = {n: v for n, v in t.leaves().items() if case.norm is not None or n not in ("weight", "bias")}
    for v in leaves.values():
        v.requires_grad_()
    y = run_step(case.step, case.operands(t), channels_last=case.y_last, backend=backend)
    assert y.is_contiguous(memory_format=FORMATS[case.y_last])
    assert y.dtype == t.x.dtype
    grads = torch.autograd.grad(y, list(leaves.values()), t.grad, create_graph=create_graph)
    for v, grad in zip(leaves.values(), grads, strict=True):
        assert grad.dtype == v.dtype and grad.shape == v.shape
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def check(case: NormCase, dtype: torch.dtype, device: torch.device, launches: list[str]) -> dict[str, Tensor]:
    """Run the case on the kernels, hold it against float64 and assert which kernels ran, and how often."""
    t = case.tensors(dtype, device)
    launches.clear()
    got = spread(case, t, "triton")
    forward = ["norm-statistics", "norm-merge"] if case.step.measured else []
    backward = ["norm-grad-sums", "norm-grad-finish"] if case.norm is not None or case.slopes else []
    if case.norm is not None and not case.measured and not case.affine:
        backward = []
    assert launches == [*forward, "norm-apply", *backward, "norm-grad-apply"], f"{case.id}: launched {launches}"
    expect(case, t, got, str(dtype))
    return got
