"""Compiled models and functions whose steps run on the Triton kernels, with gradients.

Dynamo needs a PyTorch that knows the device: these run on a GPU, and on a CPU by Triton's interpreter
(``TRITON_INTERPRET=1 CNNFAST_TEST_DEVICE=cpu``). `test_on_the_interpreter` runs them so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from cnnfast.gpu import traced
from cnnfast.memory_format import to_format
from cnnfast.reference import run_reference
from cnnfast.tolerance import verdict

from ..conftest import conv_precision
from .test_traced import STEPS, calls, leaves, operands


@pytest.fixture
def compiler(device: torch.device) -> Iterator[torch.device]:
    """Where compiled code can launch kernels."""
    if device.type == "cuda" and torch.version.cuda is None:
        pytest.skip("this PyTorch is not built for CUDA: Dynamo cannot trace tensors on such a device")
    torch._dynamo.reset()
    with conv_precision("ieee"):
        yield device


def generator(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    modules: list[nn.Module] = [
        nn.ConvTranspose2d(16, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Upsample(scale_factor=2), nn.Conv2d(32, 16, 3, 1, 1), nn.InstanceNorm2d(16), nn.SiLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.PReLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh(),
    ]  # fmt: skip
    return nn.Sequential(*modules).to(device)


class Backend:
    """AOTAutograd with nothing behind it; the operators of its forward and backward graphs."""

    def __init__(self) -> None:
        from torch._dynamo.backends.common import aot_autograd

        self.forward, self.backward = list[str](), list[str]()

        def keep(names: list[str]) -> Callable[..., Any]:
            def compile(graph: Any, inputs: Any) -> Any:
                names.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
                return graph

            return compile

        self.call = aot_autograd(
            fw_compiler=keep(self.forward), bw_compiler=keep(self.backward), inference_compiler=keep(self.forward)
        )

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return self.call(graph, inputs)


def close(got: Tensor, want64: Tensor, yardstick: Tensor, what: str) -> None:
    problem = verdict(*(t.detach().cpu() for t in (got, want64, yardstick)))
    assert problem is None, f"{what}: {problem}"


def test_training_step(compiler: torch.device, launches: list[str]) -> None:
    """Forward and backward of every kind of norm: the graphs hold no convolution and no norm of PyTorch's, and results,
    gradients and running statistics are as near to float64 as eager PyTorch's."""
    plain = generator(compiler)
    ours, wide = cnnfast.Sequential(*deepcopy(list(plain))), deepcopy(plain).double()
    # So few positions that the interpreter is quick and no weight gradient is split (which it cannot run).
    x = torch.randn(2, 16, 2, 2, device=compiler)
    xs = [t.clone().requires_grad_() for t in (x, x.double(), x)]
    backend = Backend()
    with cnnfast.backend("triton"):
        compiled = torch.compile(ours, backend=backend, fullgraph=True)
        ys = [compiled(xs[0]), wide(xs[1]), plain(xs[2])]
        assert launches
        forward = len(launches)
        grad = torch.randn(ys[0].shape, device=compiler)
        for y in ys:
            y.backward(grad.to(y.dtype))
        assert len(launches) > forward
    for names in (backend.forward, backend.backward):
        assert sum("cnnfast.conv" in n and "weight_grad" not in n for n in names) >= 4, names
        assert not any("aten.convolution" in n or "aten.native" in n or "batch_norm" in n for n in names), names
    assert sum("conv_weight_grad" in n for n in backend.backward) == 4
    assert sum("norm_act_backward" in n for n in backend.backward) == 3
    close(*ys, "result")
    close(*(t.grad for t in xs), "input")  # type: ignore[arg-type]
    names = list(dict(plain.named_parameters()))
    # A bias ahead of statistics moves nothing: its gradient is rounding alone.
    skip = {"4.bias", "7.bias"}
    for name in names:
        if name not in skip:
            close(*(dict(m.named_parameters())[name].grad for m in (ours, wide, plain)), name)  # type: ignore[arg-type]
    for name in dict(plain.named_buffers()):
        buffers = [dict(m.named_buffers())[name] for m in (ours, wide, plain)]
        if buffers[0].is_floating_point():
            close(*buffers, name)  # type: ignore[arg-type]
        else:
            assert torch.equal(buffers[0], buffers[2])


def test_three_dimensions(compiler: torch.device, launches: list[str]) -> None:
    """A training step and inference of a model of three dimensions."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.ConvTranspose3d(16, 16, 2, 2, bias=False), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 16, (1, 2, 1)),
        nn.GroupNorm(4, 16), nn.SiLU(),
    ).to(compiler)  # fmt: skip
    ours, wide = cnnfast.Sequential(*deepcopy(list(plain))), deepcopy(plain).double()
    x = torch.randn(2, 16, 1, 2, 1, device=compiler)
    backend = Backend()
    with cnnfast.backend("triton"):
        ys = [torch.compile(ours, backend=backend, fullgraph=True)(x), wide(x.double()), plain(x)]
        grad = torch.randn(ys[0].shape, device=compiler)
        for y in ys:
            y.backward(grad.to(y.dtype))
        assert len(launches) > 4 and "cnnfast.conv_weight_grad.default" in backend.backward
        assert not any("aten.convolution" in n or "aten.native" in n for n in backend.forward + backend.backward)
        close(*ys, "result")
        assert ys[0].stride() == ys[2].stride()
        close(*(m[0].weight.grad for m in (ours, wide, plain)), "weight")  # type: ignore[arg-type]
        for m in (ours, wide, plain):
            m.eval()
        launches.clear()
        with torch.no_grad():
            close(torch.compile(ours, backend=backend, fullgraph=True)(x), wide(x.double()), plain(x), "inference")
        assert launches


def test_inference(compiler: torch.device, launches: list[str]) -> None:
    plain = generator(compiler).eval()
    ours = cnnfast.Sequential(*deepcopy(list(plain)))
    x = torch.randn(2, 16, 2, 2, device=compiler)
    backend = Backend()
    with torch.no_grad(), cnnfast.backend("triton"):
        got = torch.compile(ours, backend=backend, fullgraph=True)(x)
        assert launches and not any("aten.convolution" in n for n in backend.forward)
        close(got, deepcopy(plain).double()(x.double()), plain(x), "result")


def test_functions_with_gradients(compiler: torch.device, launches: list[str]) -> None:
    def f(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return cnnfast.ops.conv_transpose2d(
            x, w, None, 2, 1, residual=r, activation="leaky_relu", activation_param=0.2, backend="triton"
        )

    def g(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        y = torch.nn.functional.conv_transpose2d(x, w, None, 2, 1) + r
        return torch.nn.functional.leaky_relu(y, 0.2)

    shapes = ((2, 16, 3, 5), (16, 32, 4, 4), (2, 32, 6, 10))
    ours, wide, plain = (
        [t.to(dtype).requires_grad_() for t in (torch.randn(s, device=compiler) for s in shapes)]
        for dtype in (torch.float32, torch.float64, torch.float32)
    )
    with torch.no_grad():
        for a, b, c in zip(ours, wide, plain, strict=True):
            b.copy_(a), c.copy_(a)
    backend = Backend()
    ys = [torch.compile(f, backend=backend, fullgraph=True)(*ours), g(*wide), g(*plain)]
    grads = [torch.autograd.grad(y.square().sum(), t) for y, t in zip(ys, (ours, wide, plain), strict=True)]
    assert len(launches) >= 4 and "cnnfast.conv_weight_grad.default" in backend.backward
    close(*ys, "result")
    for k, name in enumerate(("x", "weight", "residual")):
        close(*(g[k] for g in grads), name)


@pytest.mark.parametrize("name", STEPS)
def test_fakes_on_the_kernels(device: torch.device, launches: list[str], name: str) -> None:
    """What the kernels return has the shapes, dtypes and strides that the fakes say."""
    operands(name)
    found = calls(name, device, "triton")
    assert launches
    for func, args in found:
        name = func._schema.name.split("::")[1]
        fake_of = getattr(traced, name)._abstract_fn
        outs, fakes = ([o] if isinstance(o, Tensor) else list(o) for o in (func(*args), fake_of(*args)))
        for out, fake in zip(outs, fakes, strict=True):
            said = (tuple(fake.shape), fake.dtype, fake.stride())
            assert (tuple(out.shape), out.dtype, out.stride()) == said, func


@pytest.mark.parametrize("name", STEPS)
def test_gradients_on_the_kernels(device: torch.device, launches: list[str], name: str) -> None:
    """Values and gradients of the operators, called outside of compiled code, equal the composition's."""
    step, o = operands(name, device)
    with conv_precision("ieee"):
        y = traced.run(step, o, True, "triton")
        assert launches
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        found = [y, *torch.autograd.grad(y, leaves(o), grad.to(device))]
    by_torch = []
    for dtype in (torch.float64, torch.float32):
        step, o = operands(name, dtype=dtype)
        y = to_format(run_reference(step, o), True)
        by_torch.append([y, *torch.autograd.grad(y, leaves(o), grad.to(dtype))])
    for k, (got, want, yardstick) in enumerate(zip(found, *by_torch, strict=True)):
        assert got.shape == yardstick.shape and got.dtype == yardstick.dtype
        if not (k == 3 and step.measured):  # a bias ahead of statistics: rounding alone
            close(got, want, yardstick, f"result {k}")


@pytest.mark.slow
def test_on_the_interpreter(interpreter: None) -> None:
    names = ("test_training_step", "test_three_dimensions", "test_inference", "test_functions_with_gradients")
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"{here}::{n}" for n in names)],
        cwd=here.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "CNNFAST_TEST_DEVICE": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
