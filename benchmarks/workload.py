"""What is compared: a case at one batch and dtype, as a forward or as a training step, and the check of a result.

Every implementation gets the same modules with the same weights and the same input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from cnnfast.memory_format import format_of
from cnnfast.nn.accelerate_verify import moved

from .case import Case

__all__ = ["Implementation", "NotAvailable", "Prepared", "TOLERANCES", "TrainingWorkload", "Workload"]

# Largest |y - float64| over largest |float64|. float32: some roundings of sums of a few thousand products. The others:
# ten roundings to the dtype, two for each of five layers with a norm. A wrong tap or channel is off by far more.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 10 * 2**-11, torch.bfloat16: 10 * 2**-8}
TF32_TOLERANCE = 10 * 2**-11

Container = type[nn.Sequential]


class NotAvailable(Exception):
    """This implementation cannot run this workload here; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """``call`` is what is timed; ``result`` turns what it returned into what `Workload.expected` is; ``path`` tells,
    after a call, what ran."""

    call: Callable[[], object]
    result: Callable[[Any], Any] = lambda y: y
    path: Callable[[], str] = str  # str() is ""


@dataclass(frozen=True)
class Implementation:
    """``prepare`` raises NotAvailable with the reason where it cannot run the workload."""

    name: str
    prepare: Callable[[Any], Prepared]


@dataclass(frozen=True)
class Workload:
    """One row of the comparison: a forward in inference mode. ``tf32``: float32 on a GPU with TF32 products, for every
    implementation alike."""

    case: Case
    batch: int
    dtype: torch.dtype
    device: str = "cpu"
    tf32: bool = False

    slack = 2
    gradients = False  # whether calls need grad mode; otherwise they are made in inference mode

    @property
    def dtype_name(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"{self.case.name}, {self.dtype_name}, batch {self.batch}"

    @cached_property
    def tolerance(self) -> float:
        """The relative error that is allowed: a bound of the dtype, or twice what PyTorch's own modules in NCHW are off
        by here. (In 16 bits these round after each layer; how far that goes depends on the processor's order of
        sums.)"""
        bound = TF32_TOLERANCE if self.tf32 else TOLERANCES[self.dtype]
        with torch.inference_mode(not self.gradients):
            found = self.call(self.modules(), False)()
        return bound if self._shapes(found) else max(self.slack * max(self._errors(found)), bound)

    @property
    def macs(self) -> int:
        """Multiply-adds (`Case.macs`)."""
        return self.case.macs(self.batch)

    @property
    def least_bytes(self) -> int:
        """`Case.least_bytes`."""
        return self.case.least_bytes(self.batch, self.dtype.itemsize)

    @cached_property
    def source(self) -> nn.Sequential:
        """The modules, rounded to the dtype. Implementations copy them: `modules`."""
        return self.case.build().to(self.device, self.dtype)

    @cached_property
    def x(self) -> torch.Tensor:
        return self.case.input(self.batch).to(self.device, self.dtype)

    @cached_property
    def expected(self) -> Any:
        """The result in float64, from the rounded weights and input."""
        with torch.no_grad():
            return copy.deepcopy(self.source).double()(self.x.double())

    def modules(self, container: Container = nn.Sequential, channels_last: bool = False) -> nn.Sequential:
        made = container(*copy.deepcopy(list(self.source))).train(self.gradients)
        return made.to(memory_format=format_of(self.x.dim(), True)) if channels_last else made  # type: ignore[call-overload]

    @property
    def has_formats(self) -> bool:
        """Whether there are memory formats to choose from: 1-D inputs have one."""
        return self.x.dim() > 3

    def input(self, channels_last: bool) -> torch.Tensor:
        """``x``, in channels_last where asked for and there is such a thing."""
        return self._in(self.x, channels_last)

    def _in(self, t: torch.Tensor, channels_last: bool) -> torch.Tensor:
        last = channels_last and self.has_formats
        return t.contiguous(memory_format=format_of(t.dim(), last))

    def call(self, model: Callable[[torch.Tensor], torch.Tensor], channels_last: bool) -> Callable[[], Any]:
        """What is timed of a model made of `modules`."""
        x = self.input(channels_last)
        return lambda: model(x)

    def check(self, prepared: Prepared) -> tuple[float, str | None]:
        """(relative error against float64, what is wrong or None). Compares one call."""
        with torch.inference_mode(not self.gradients):
            y = prepared.result(prepared.call())
        if problem := self._shapes(y):
            return float("inf"), problem
        errors = self._errors(y)
        over = [(e, most) for e, most in zip(errors, self.allowed, strict=True) if not e <= most]  # a NaN is
        wrong = "relative error {:.2g} is above {:.2g}".format(*max(over)) if over else None
        return max(errors), wrong

    @cached_property
    def allowed(self) -> list[float]:
        """The relative error of each tensor of the result that is allowed."""
        return [self.tolerance]

    def _shapes(self, y: Any) -> str | None:
        """What is wrong with the shape of a result."""
        if y.shape != self.expected.shape:
            return f"shape {tuple(y.shape)} instead of {tuple(self.expected.shape)}"
        return None

    def _errors(self, y: Any) -> list[float]:
        return [((y.double() - self.expected).abs().max() / self.expected.abs().max()).item()]


class _Step:
    """Forward in training mode and backward of a given gradient of the result. Gradients start as None in every call,
    as after `zero_grad`, and go with its result: the model's result, then the gradients that there are."""

    def __init__(
        self, model: Callable[[torch.Tensor], torch.Tensor], leaves: Sequence[torch.Tensor], x: torch.Tensor,
        grad: torch.Tensor, autocast: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.model, self.leaves, self.x, self.grad, self.autocast = model, leaves, x, grad, autocast

    def __call__(self) -> list[torch.Tensor | None]:
        with torch.autocast(self.x.device.type, self.autocast, enabled=self.autocast is not None):
            y = self.model(self.x)
        y.backward(self.grad.to(y.dtype))
        found = [y.detach(), *(t.grad for t in self.leaves)]
        for t in self.leaves:
            t.grad = None
        return found


@dataclass(frozen=True)
class TrainingWorkload(Workload):
    """One row of the comparison: a training step. Parameters are float32; another ``dtype`` is autocast's.

    In a generator the input needs no gradient, in a block (the middle of a network) it does. The error of a step is the
    worst of its tensors', each the 2-norm of the difference over that of float64's; four times that of PyTorch's own
    modules in NCHW is allowed, or a forward's tolerance if that is more. A gradient jumps at the kinks of activations,
    so that for each gradient the same modules with parameters off by some roundings are a measure, too.
    """

    slack = 4
    gradients = True

    @property
    def dtype_name(self) -> str:
        return super().dtype_name + ("" if self.dtype == torch.float32 else " autocast")

    @property
    def macs(self) -> int:
        """Of forward, input gradient and weight gradient."""
        return 3 * super().macs

    @cached_property
    def source(self) -> nn.Sequential:
        return self.case.build().train().to(self.device)

    @cached_property
    def x(self) -> torch.Tensor:
        return self.case.input(self.batch).to(self.device)

    @cached_property
    def grad(self) -> torch.Tensor:
        """The gradient of the result, of no memory format yet."""
        with torch.no_grad():
            shape = copy.deepcopy(self.source)(self.x).shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(self.device)

    @cached_property
    def expected(self) -> list[torch.Tensor]:
        modules = copy.deepcopy(self.source).double()
        x = self.x.double().requires_grad_(self._input_gradient)
        found = _Step(modules, self._leaves(modules, x), x, self.grad.double(), None)()
        return [t for t in found if t is not None]

    @property
    def _input_gradient(self) -> bool:
        return self.case.suite != "generator"

    @staticmethod
    def _leaves(modules: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        return [t for t in (x, *modules.parameters()) if t.requires_grad]

    def call(self, model: Callable[[torch.Tensor], torch.Tensor], channels_last: bool) -> Callable[[], Any]:
        assert isinstance(model, nn.Module)
        # Tensors of its own: another implementation's may be the same one in another format.
        x = self.input(channels_last).clone().requires_grad_(self._input_gradient)
        grad = self._in(self.grad, channels_last)
        return _Step(model, self._leaves(model, x), x, grad, None if self.dtype == torch.float32 else self.dtype)

    def _shapes(self, y: Any) -> str | None:
        found, wanted = ([None if t is None else tuple(t.shape) for t in of] for of in (y, self.expected))
        return None if found == wanted else f"shapes {found} instead of {wanted}"

    @cached_property
    def allowed(self) -> list[float]:
        """See the class."""
        kinks = self._errors(self.call(moved(self.modules(), 2**-20), False)())
        return [self.tolerance, *(max(self.tolerance, self.slack * kink) for kink in kinks[1:])]  # a result is smooth

    def _errors(self, y: Any) -> list[float]:
        exact = self.expected
        # A gradient that is zero in exact arithmetic (a bias ahead of a norm) is rounding noise: no ratio says a thing.
        largest = max(e.norm().item() / e.numel() ** 0.5 for e in exact)
        some = [e.norm().item() > 1e-6 * largest * e.numel() ** 0.5 for e in exact]
        each = zip(y, exact, some, strict=True)
        return [((f.double() - e).norm() / e.norm()).item() if much else 0.0 for f, e, much in each]
