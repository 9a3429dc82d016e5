"""The tolerance rule on right results: random layers on the CPU's paths, badly scaled ones among them.

CNNFAST_SEED chooses other ones; case i of seed s is always the same. ONEDNN_MAX_CPU_ISA chooses the instruction set.
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast
from cnnfast.activations import ACTIVATIONS, Activation
from cnnfast.cpu import inference as cpu_inference
from cnnfast.cpu import onednn
from cnnfast.cpu import training as cpu_training
from cnnfast.cpu.isa import instruction_set, products_dtype
from cnnfast.cpu.winograd import Winograd
from cnnfast.norms import Norm
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step, Upsample, norm_step, plain_step, upsample_step
from cnnfast.tolerance import expected, limits, verdict

from ..cases import fitted

pytestmark = pytest.mark.skipif(onednn.why_missing() is not None, reason=str(onednn.why_missing()))

SEED = int(os.environ.get("CNNFAST_SEED", "10"))
FEW, MANY = 150, 2000
WORK = 2e7  # multiply-adds of a case, at most
CL = torch.channels_last


class Result(NamedTuple):
    """What is compared, and the arguments of `verdict`."""

    name: str
    actual: Tensor
    exact: Tensor
    yardstick: Tensor
    before: Tensor | float = 0.0


class Random:
    """Numbers of one case."""

    def __init__(self, index: int) -> None:
        self.choose = random.Random(f"{SEED}/{index}")
        self.generator = torch.Generator().manual_seed(SEED * 100_000 + index)

    def maybe(self, probability: float) -> bool:
        return self.choose.random() < probability

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def powers(self, low: float, high: float, *shape: int) -> Tensor:
        """10 to the power of uniform numbers."""
        return 10 ** (low + (high - low) * torch.rand(*shape, generator=self.generator))

    def input(self, *shape: int, constant: bool = True) -> Tensor:
        """An input as layers meet it: centred, rectified, far from zero, with outliers, or constant."""
        kinds = ("normal", "normal", "rectified", "far", "outliers", "constant")
        kind = self.choose.choice(kinds if constant else kinds[:-1])
        x = self.normal(*shape)
        if kind == "constant":
            return x[:, :, :1, :1].expand(shape).clone()
        if kind == "outliers":
            return x * torch.where(torch.rand(shape, generator=self.generator) < 0.01, 30.0, 1.0)
        return {"normal": x, "rectified": x.relu(), "far": x + 5}[kind]

    def dtype(self) -> torch.dtype:
        return self.choose.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))

    def activation(self) -> Activation:
        return Activation(self.choose.choice(tuple(ACTIVATIONS)))


# --- inference --------------------------------------------------------------------------------------------------------


def random_step(r: Random) -> tuple[Step, tuple[int, ...], tuple[int, ...]]:
    """(a step, the shape of its input, that of its weight) with at most WORK multiply-adds."""
    pick = r.choose.choice
    while True:
        groups = pick((1, 1, 1, 1, 2))
        c_in, c_out = groups * pick((3, 8, 16, 32, 64, 128, 512)), groups * pick((1, 3, 3, 8, 16, 24, 64, 128))
        size, batch = (pick((1, 2, 4, 5, 8, 9, 16)), pick((1, 3, 4, 7, 8, 12))), pick((1, 2, 3, 4))
        act = r.activation()
        kind = pick(("transposed", "transposed", "plain", "upsample"))
        if kind == "upsample":
            mode = pick(("zeros", "replicate"))
            step = upsample_step(c_in, c_out, (3, 3), Upsample((2, 2), (1, 1), mode), groups, act)
            weight: tuple[int, ...] = (c_out, c_in // groups, 3, 3)
        else:
            k, s = pick(((4, 2), (4, 2), (3, 1), (3, 2), (5, 3), (2, 2), (1, 1), (7, 4)))
            spec = ConvSpec.make(
                c_in, c_out, k, s, r.choose.randint(0, k // 2), groups=groups, transposed=kind == "transposed"
            )
            step = replace(Step(spec), activation=act) if kind == "transposed" else plain_step(spec, "zeros", act)
            weight = spec.weight_shape
        try:
            out = step.output_size(size)
        except ValueError:
            continue
        places = math.prod(size if step.spec.transposed else out)
        if batch * places * c_in * c_out // groups * math.prod(step.spec.kernel_size) <= WORK:
            return step, (batch, c_in, *size), weight


def operands(
    r: Random, step: Step, shape: tuple[int, ...], weight_shape: tuple[int, ...], dtype: torch.dtype
) -> Operands:
    spec = step.spec
    c = spec.out_channels
    weight = r.normal(*weight_shape) * (spec.in_channels // spec.groups * math.prod(weight_shape[2:])) ** -0.5
    if r.maybe(0.3) and spec.groups == 1:  # channels of the result that differ in scale
        weight = weight * r.powers(-3, 0.5, c).view(
            *((1, -1) if spec.transposed and step.upsample is None else (-1, 1)), 1, 1
        )
    if r.maybe(0.2):  # channels of the input that do
        weight = weight * r.powers(-3, 0.5, weight_shape[0]).view(-1, 1, 1, 1)
    o = Operands(r.input(*shape).to(dtype), weight.to(dtype))
    if r.maybe(0.5):
        o = o._replace(bias=r.normal(c).to(dtype))
    epilogue = r.choose.choice(("", "", "norm", "norm", "scale"))
    if epilogue == "norm":
        low = -2 if dtype == torch.float16 else -4
        o = o._replace(mean=r.normal(c), var=r.powers(low, 1, c), scale=r.normal(c), shift=r.normal(c))
    elif epilogue == "scale":
        o = o._replace(scale=r.powers(-3, 1, c), shift=r.normal(c))
    if r.maybe(0.25):
        o = o._replace(residual=r.normal(shape[0], c, *step.output_size(shape[2:])).to(dtype))
    if step.activation.name == "prelu":
        o = o._replace(slope=torch.rand(r.choose.choice((1, c)), generator=r.generator))
    return o._replace(x=o.x.contiguous(memory_format=CL), weight=nn.Parameter(o.weight.contiguous(memory_format=CL)))


def inference(r: Random, force: Callable[[type[onednn.Method]], None]) -> Iterator[Result]:
    while True:  # what is run packed: little work is ATen's
        step, shape, weight_shape = random_step(r)
        dtype = r.dtype()
        o = operands(r, step, shape, weight_shape, dtype)
        step = fitted(step, o)
        if cpu_inference.why_not(step, o) is None:
            break
    spec = step.spec
    kinds: list[type[onednn.Method]] = [onednn.Convolution]
    if spec.transposed:
        kinds = [onednn.Deconvolution, *(m for m in (onednn.Gathered, onednn.Merged) if m.applies(spec))]
    padded = (*shape[:2], *(n + 2 * p for n, p in zip(shape[2:], step.pad, strict=True)))
    if products_dtype(dtype, instruction_set()) == torch.float32 and Winograd.applies(spec, padded):
        kinds.append(Winograd)
    if shape[2:] != (1, 1):
        force(r.choose.choice(kinds))
    with torch.no_grad():
        found = (cpu_inference.run(step, o, True) for _ in range(3))  # packed when it is met again
        y = next(y for y in found if y is not None)
        exact, yardstick, before = expected(step, o, False)
    what = (
        f"{step.describe()} {step.activation.name} {tuple(shape)} {cpu_inference.method_name(step, o.x.shape, dtype)}"
    )
    yield Result(what, y, exact, yardstick, before)


# --- training ---------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b for name, b in model.named_buffers() if b.is_floating_point()}


class PerImage(nn.Module):
    """An InstanceNorm as the BatchNorm of each image, in channels_last; its parameters as they are named there."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.batch_norm(image, None, None, self.weight, self.bias, True) for image in x.split(1)])


def worst(candidates: list[Tensor], exact: Tensor) -> Tensor:
    """Eager mode rounds differently in each of its forms: the one that is further from float64."""
    return max(candidates, key=lambda t: (t.double() - exact).norm().item())


def training(r: Random) -> Iterator[Result]:
    """A block in training mode: each tensor by itself."""
    pick = r.choose.choice
    c_in, c, size, batch = pick((3, 16, 32, 64)), pick((1, 3, 8, 16, 32)), pick((4, 5, 8, 11)), pick((2, 4, 8))
    k, s, p = pick(((4, 2, 1), (3, 1, 1), (3, 2, 1), (2, 2, 0)))
    norm = pick(("none", "batch", "batch", "instance", "group"))
    block: list[nn.Module] = [
        pick((nn.ConvTranspose2d, nn.Conv2d))(c_in, c, k, s, p, bias=norm == "none" or r.maybe(0.3))
    ]
    if norm != "none":
        affine = {"batch": lambda: nn.BatchNorm2d(c), "instance": lambda: nn.InstanceNorm2d(c, affine=True)}
        block.append(affine.get(norm, lambda: nn.GroupNorm(pick((1, c)), c))())
    dtype = r.dtype()
    smooth = [[], [nn.Tanh()], [nn.Sigmoid()], [nn.SiLU()]]
    # The gradient at a kink is one of two numbers, and in 16 bits enough values come as near to it as they are rounded.
    kinks = [[nn.ReLU()], [nn.LeakyReLU(0.2)], [nn.PReLU()]] if dtype == torch.float32 else []
    block += pick(smooth + kinks)
    plain = nn.Sequential(*block)
    with torch.no_grad():
        for q in plain.parameters():
            q.copy_(
                r.normal(*q.shape)
                * (q[0].numel() ** -0.5 if q.dim() > 1 else 1)
                * (r.powers(-2, 0.5, 1) if r.maybe(0.2) else 1)
            )
    plain = plain.to(dtype).to(memory_format=CL)
    x = r.input(batch, c_in, size, size, constant=False).to(dtype)  # a norm of equal values is rounding alone
    x = x.contiguous(memory_format=CL)
    with torch.no_grad():
        grad = r.normal(*copy.deepcopy(plain)(x).shape).to(dtype)
    ours = gradients(cnnfast.Sequential(*copy.deepcopy(plain)), x, grad)
    exact = gradients(copy.deepcopy(plain).double(), x.double(), grad.double())
    # In 16 bits eager mode rounds between the modules, and may; in float32 by either memory format.
    nchw = copy.deepcopy(plain).to(memory_format=torch.contiguous_format)
    each = copy.deepcopy(plain)
    if norm == "instance":
        each[1] = PerImage(each[1])
    eager = [gradients(copy.deepcopy(plain), x, grad), gradients(nchw, x.contiguous(), grad), gradients(each, x, grad)]
    if dtype != torch.float32:
        eager.append(gradients(copy.deepcopy(plain).float(), x.float(), grad.float()))
    for name, actual in ours.items():
        candidates = [e[name].to(actual.dtype) for e in eager]
        yield Result(f"{plain} {dtype}: {name}", actual, exact[name], worst(candidates, exact[name]))


# --- norms ------------------------------------------------------------------------------------------------------------


def norms(r: Random) -> Iterator[Result]:
    pick = r.choose.choice
    n, c, size = pick((1, 2, 4)), pick((3, 6, 16)), pick((3, 8, 16, 32))
    x = (
        r.input(n, c, size, size, constant=False) * r.powers(-2, 1, c, 1, 1) + r.normal(c, 1, 1) * r.powers(-1, 3, 1)
    ).contiguous(memory_format=CL)
    weight, bias = r.normal(c), r.normal(c)
    kind, groups = pick(("batch", "instance", "group")), pick((1, c))

    def by_torch(x: Tensor) -> Tensor:
        w, b = weight.to(x.dtype), bias.to(x.dtype)
        if kind == "group":
            return F.group_norm(x, groups, w, b)
        return F.batch_norm(x, None, None, w, b, True) if kind == "batch" else F.instance_norm(x, None, None, w, b)

    def last(x: Tensor) -> Tensor:
        """In channels_last, whose statistics ATen adds up in another way: an image's InstanceNorm is its BatchNorm."""
        if kind == "group":
            return by_torch(x)
        parts = x.split(1 if kind == "instance" else n)
        return torch.cat([F.batch_norm(part, None, None, weight, bias, True) for part in parts])

    norm = Norm(kind, groups if kind == "group" else 1)
    o = Operands(x.clone(memory_format=CL), scale=weight, shift=bias)
    y = cpu_training._finished(norm_step(norm), o)
    exact = by_torch(x.contiguous().double())
    yield Result(f"{kind} {tuple(x.shape)} {groups}", y, exact, worst([by_torch(x.contiguous()), last(x)], exact))


# --- the study --------------------------------------------------------------------------------------------------------


def results(index: int, force: Callable[[type[onednn.Method]], None]) -> Iterator[Result]:
    r = Random(index)
    kind = r.choose.choices((inference, training, norms), (70, 20, 10))[0]
    return inference(r, force) if kind is inference else kind(r)  # type: ignore[operator]


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_nothing_right_is_refused(count: int, monkeypatch: pytest.MonkeyPatch, state: Callable[[str], None]) -> None:
    most, most_rms, compared, refused = 0.0, 0.0, 0, []
    for index in range(count):
        with monkeypatch.context() as patch:
            cpu_inference._way.cache_clear()

            def force(method: type[onednn.Method], patch: pytest.MonkeyPatch = patch) -> None:
                patch.setattr(cpu_inference, "by_rule", lambda *_: method)
                cpu_inference._way.cache_clear()

            found = list(results(index, force))
        for name, actual, exact, yardstick, before in found:
            problem = verdict(actual, exact, yardstick, before)
            if problem is not None:
                refused.append(f"case {index}, {name}: {problem}")
            allowed = limits(exact, yardstick, before)
            error = (actual.detach().double() - exact).abs()
            most = max(most, (error / allowed.each).max().item())
            most_rms = max(most_rms, error.square().mean().sqrt().item() / max(allowed.rms, 1e-300))
            compared += 1
    cpu_inference._way.cache_clear()
    state(
        f"tolerance, {count} random cases of seed {SEED}: {compared} results, {len(refused)} refused; at most "
        f"{100 * most:.0f} % of the limit of an element, {100 * most_rms:.0f} % of that of the RMS"
    )
    assert not refused, "\n".join(refused)
