"""Strides of results and gradients: those of torch's own operators, and a parameter's for its gradient.

Images are four pixels wide at least and results two: oneDNN's convolutions of smaller channels-last ones read and write
past their memory (torch 2.13), for PyTorch as for cnnfast.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, note
from hypothesis import strategies as st
from torch import Tensor, nn

import cnnfast
from cnnfast import ops
from cnnfast.activations import Activation
from cnnfast.cpu import conv_autograd, training

from ..nn.test_sequential import stack_profile
from ..tolerance import assert_close

CL = torch.channels_last


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["", "everything"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ "everything": no layer is too small for products, patches, merged phases and collapsed upsamplings."""
    caches = conv_autograd.ways, conv_autograd._macs, training.collapses
    if request.param:
        for cached in caches:
            cached.cache_clear()
        monkeypatch.setattr(conv_autograd, "_LEAST", 0.0)
        monkeypatch.setattr(conv_autograd, "_LEAST_MERGED", 0.0)
        monkeypatch.setattr(training, "collapses", lambda *args: True)
    yield
    for cached in caches:
        cached.cache_clear()


# --- layouts ----------------------------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "contiguous", "channels_last", "permuted", "strided")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """``t`` in another layout: of three dimensions channels_last is that of (N, C, 1, L)."""
    if layout == "channels_last":
        return t.contiguous(memory_format=CL) if t.dim() == 4 else t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "permuted":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([t, t], -1)[..., 0]
    return t.contiguous()


def rand(shape: tuple[int, ...], seed: int, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return laid_out(t.to(dtype), layout)


def like(t: Tensor, seed: int) -> Tensor:
    return torch.empty_like(t.detach()).copy_(rand(tuple(t.shape), seed))


# --- functions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A convolution: ``kind`` of the function, its tensors, and its other arguments in torch's order."""

    kind: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: tuple[Any, ...] = ()
    activation: str | None = None
    residual: str | None = None  # its layout
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def ndim(self) -> int:
        return self.x.dim() - 2

    def torch(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        if self.kind == "upsample_conv2d":
            pad = [(k - 1) // 2 for k in w.shape[2:]]
            return F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, 1, pad, 1, *self.geometry)
        return getattr(F, self.kind)(x, w, b, *self.geometry)

    def whole(self, x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None) -> Tensor:
        y = self.torch(x, w, b)
        return Activation(self.activation or "identity")(y if r is None else y + r)

    def ours(self, x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None) -> Tensor:
        geometry = (2, None, "zeros", *self.geometry) if self.kind == "upsample_conv2d" else self.geometry
        return getattr(ops, self.kind)(x, w, b, *geometry, residual=r, activation=self.activation)


KINDS = ["conv_transpose1d", "conv_transpose2d", "conv1d", "conv2d", "upsample_conv2d"]


@st.composite
def calls(draw: st.DrawFn, dtype: torch.dtype, epilogue: bool) -> Call:
    kind = draw(st.sampled_from(KINDS))
    ndim = 1 if kind.endswith("1d") else 2
    c_in, c_out = (draw(st.sampled_from([1, 2, 8, 16, 32])) for _ in range(2))
    groups = draw(st.sampled_from([g for g in (1, 1, 1, 2, 8, 32) if c_in % g == 0 and c_out % g == 0]))
    size = tuple(draw(st.sampled_from([4, 5, 8])) for _ in range(ndim))
    seed = draw(st.integers(0, 99))
    if kind == "upsample_conv2d":
        kernel, geometry = tuple(draw(st.sampled_from([1, 3])) for _ in range(2)), (groups,)
    else:
        kernel = tuple(draw(st.sampled_from([1, 2, 3, 4])) for _ in range(ndim))
        stride = tuple(draw(st.sampled_from([1, 2])) for _ in range(ndim))
        padding = tuple(draw(st.integers(0, (k - 1) // 2)) for k in kernel)
        if "transpose" in kind:
            geometry = (stride, padding, 0, groups, 1)
        else:
            geometry = (stride, padding, 1, groups)
            out = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)]
            assume(min(out) >= 2)
    first, second = (c_in, c_out) if "transpose" in kind else (c_out, c_in)
    shape = (draw(st.sampled_from([1, 2, 4])), c_in, *size)
    weight = rand((first, second // groups, *kernel), seed + 1, draw(st.sampled_from(LAYOUTS)), dtype)
    call = Call(
        kind,
        rand(shape, seed, draw(st.sampled_from(LAYOUTS)), dtype),
        weight / (c_in // groups * weight[0, 0].numel()) ** 0.5,
        rand((c_out,), seed + 2, dtype=dtype) if draw(st.booleans()) else None,
        geometry,
        draw(st.sampled_from([None, "relu", "tanh", "leaky_relu", "silu", "hardtanh"])) if epilogue else None,
        draw(st.sampled_from([None, "contiguous", "channels_last"])) if epilogue else None,
    )
    note(f"{kind} of {shape} with {call.x.stride()}, weight {tuple(weight.shape)} with {call.weight.stride()}")
    return call


def real(t: Tensor) -> list[int]:
    """Strides of dimensions with more than one element."""
    return [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


Run = tuple[Tensor, list[Tensor]]


def run(function: Callable[..., Tensor], c: Call, dtype: torch.dtype, r: Tensor | None, seed: int = 5) -> Run:
    """The result and the gradients of x, weight, bias and residual, which are leaves of ``dtype`` in their layouts. A
    parameter's is accumulated."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (c.x, c.weight, c.bias, r)]
    y = function(*leaves)
    y.backward(like(y, seed))
    return y.detach(), [t.grad for t in leaves if t is not None]  # type: ignore[misc]


def check(c: Call) -> None:
    dtype = c.x.dtype
    bare = c.torch(c.x, c.weight, c.bias)
    r = None if c.residual is None else rand(tuple(bare.shape), 3, c.residual, dtype)
    y, (dx, *rest) = run(c.ours, c, dtype, r)
    want_y, (want_dx, *want) = run(c.whole, c, dtype, r)
    bare_call = c.activation is None and r is None
    strides = Tensor.stride if bare_call else real  # TensorIterator chooses anew where sizes of one leave a choice
    assert strides(y) == strides(bare), "the result's strides are the convolution's"
    # Accumulated into x, they would be x's.
    x, w, b = (None if t is None else t.detach().requires_grad_() for t in (c.x, c.weight, c.bias))
    again = c.ours(x, w, b, r)
    inputs = [t for t in (x, w, b) if t is not None]
    got = torch.autograd.grad(again, inputs, like(again, 5))
    theirs = c.whole(x, w, b, r)
    like_torch = torch.autograd.grad(theirs, inputs, like(theirs, 5))
    assert got[0].stride() == like_torch[0].stride(), "the input's gradient has torch's strides"
    assert got[1].stride() == torch.empty_like(c.weight).stride(), "a weight's gradient has the weight's"
    assert [g.dtype for g in got] == [g.dtype for g in like_torch]
    for name, t, g in zip(("weight", "bias"), (c.weight, c.bias), rest, strict=False):
        if t is not None and torch.empty_like(t).stride() == t.stride():  # dense: another is accumulated contiguous
            assert g.stride() == t.stride(), f"{name}'s accumulated gradient"
    if r is not None:
        assert real(rest[-1]) == real(want[-1]), "the residual's gradient"
    exact_y, exact = run(c.whole, c, torch.float64, r)
    # Of a handful of numbers each: all together, in units of the largest of each tensor.
    columns = [(y, exact_y, want_y), *zip([dx, *rest], exact, [want_dx, *want], strict=True)]
    units = [e.abs().max().clamp_min(1e-30) for _, e, _ in columns]
    scaled = [[t.double().flatten() / u for t in column] for column, u in zip(columns, units, strict=True)]
    if dtype == torch.float32 or c.activation in (None, "tanh", "silu"):  # the others' derivatives jump
        got_all, exact_all, want_all = (torch.cat(parts) for parts in zip(*scaled, strict=True))
        assert_close(got_all.to(dtype), exact_all, want_all.to(dtype), c.kind)


@pytest.mark.parametrize("epilogue", [False, True], ids=["", "epilogue"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("ways")
def test_functions(dtype: torch.dtype, epilogue: bool) -> None:
    @stack_profile(150)
    @given(calls(dtype, epilogue))
    def run(c: Call) -> None:
        check(c)

    run()


@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d", "conv1d", "conv_transpose1d", "upsample_conv2d"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_a_gradient_penalty_flattens_the_inputs_gradient(function: str, autocast: bool) -> None:
    """By ``.view``, as most programs do; its own gradient, through the weight, has the weight's strides."""
    ndim = 1 if function.endswith("1d") else 2
    channels = (32, 64) if "transpose" in function else (64, 32)
    w = rand((*channels, *(4 if "transpose" in function else 3,) * ndim), 1).div(20).requires_grad_()
    x = rand((4, 32, *(8,) * ndim), 0).requires_grad_()
    for residual in (None, "residual"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = getattr(ops, function)(x, w)
            r = None if residual is None else rand(tuple(y.shape), 2).to(y.dtype).requires_grad_()
            score = getattr(ops, function)(x, w, residual=r, activation="leaky_relu").mean()
        leaves = [x] if r is None else [x, r]
        grads = torch.autograd.grad(score, leaves, create_graph=True)
        assert all(g.stride() == t.stride() for g, t in zip(grads, leaves, strict=True))
        ((grads[0].view(4, -1).norm(2, dim=1) - 1) ** 2).mean().backward()
        assert w.grad is not None and w.grad.stride() == w.stride()


def test_a_residual_that_needs_a_gradient_alone() -> None:
    """Its gradient is contiguous where it and the result are."""
    x, w = rand((2, 32, 8, 8), 0), rand((32, 32, 4, 4), 1)
    r = rand((2, 32, 16, 16), 2).requires_grad_()
    for activation in ("relu", "leaky_relu", "silu", "tanh", None):
        (g,) = torch.autograd.grad(ops.conv_transpose2d(x, w, None, 2, 1, residual=r, activation=activation).sum(), r)
        assert activation is None or g.is_contiguous()


# --- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batch_norm", "instance_norm", "group_norm"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("size", [(), (8,), (8, 4), (8, 1)], ids=str)
def test_norms(kind: str, layout: str, size: tuple[int, ...]) -> None:
    """Results and gradients have torch's strides; an instance norm's have its input's, where torch's are contiguous."""
    if kind == "instance_norm" and not size:
        pytest.skip("takes no (N, C)")
    for batch in (1, 2):
        if batch == 1 and not size:
            continue
        for residual in (False, True):
            x = rand((batch, 32, *size), 0, layout if size else "contiguous").requires_grad_()
            w, b = rand((32,), 1).requires_grad_(), rand((32,), 2).requires_grad_()
            r = rand(tuple(x.shape), 3).requires_grad_()
            args = {"batch_norm": (None, None, w, b, True), "instance_norm": (None, None, w, b)}.get(kind, (4, w, b))
            y = getattr(ops, kind)(x, *args, residual=r if residual else None, activation="silu")
            z = getattr(F, kind)(x, *args)
            z = F.silu(z + r if residual else z)
            leaves = [x, w, b, *[r] * residual]
            got, want = (torch.autograd.grad(t, leaves, like(t, 4)) for t in (y, z))
            assert [t.stride() for t in got[1:3]] == [(1,), (1,)]
            if kind == "instance_norm" and layout == "channels_last" and len(size) == 2:
                assert all(real(t) == real(x) for t in (y, got[0], *got[3:])) and z.is_contiguous()
            else:
                assert [real(t) for t in (y, *got)] == [real(t) for t in (z, *want)]


@pytest.mark.parametrize("function", [ops.batch_norm, ops.instance_norm])
def test_a_norm_of_sizes_of_one_with_odd_strides(function: Callable[..., Tensor]) -> None:
    """Whose gradient PyTorch's own batch norm gets wrong (torch 2.13)."""
    for shape, strides in (((4, 8, 4, 1), (32, 1, 8, 1)), ((1, 32, 4), (32, 1, 32)), ((1, 2, 3), (1, 1, 2))):
        x = rand((256,), 0).as_strided(shape, strides).requires_grad_()
        exact = x.detach().double().contiguous().requires_grad_()
        dy = rand(shape, 1)
        args = () if function is ops.instance_norm else (None, None, None, None, True)
        (dx,) = torch.autograd.grad(function(x, *args), x, dy)
        (want,) = torch.autograd.grad(function(exact, *args), exact, dy.double())
        torch.testing.assert_close(dx.double(), want, rtol=1e-4, atol=1e-4)


# --- modules ----------------------------------------------------------------------------------------------------------

CHANNELS = st.sampled_from([1, 2, 8, 16])


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Sequential, Tensor]:
    """One to three convolutions with what follows them, and an input."""
    ndim = draw(st.sampled_from([1, 2]))
    of: Callable[[str], Any] = lambda name: getattr(nn, f"{name}{ndim}d")  # noqa: E731
    first = channels = draw(CHANNELS)
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        out = draw(CHANNELS)
        groups = draw(st.sampled_from([g for g in (1, 1, 2, 8) if channels % g == 0 and out % g == 0]))
        kind = draw(st.sampled_from(["transposed", "conv", "upsample"][: ndim + 1]))
        kernel, bias = draw(st.sampled_from([1, 3, 4])), draw(st.booleans())
        if kind == "transposed":
            stride = draw(st.integers(1, 2))
            modules.append(
                of("ConvTranspose")(channels, out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=bias)
            )
        elif kind == "conv":
            mode = draw(st.sampled_from(["zeros", "zeros", "reflect"]))
            kernel = min(kernel, 3)
            modules.append(
                of("Conv")(channels, out, kernel, 1, kernel // 2, groups=groups, bias=bias, padding_mode=mode)
            )
        else:
            modules += [nn.Upsample(scale_factor=2), nn.Conv2d(channels, out, 3, 1, 1, groups=groups, bias=bias)]
        channels = out
        norm = draw(st.sampled_from([None, None, "batch", "instance", "group"]))
        if norm is not None:
            modules.append(nn.GroupNorm(1, out) if norm == "group" else of(f"{norm.title()}Norm")(out, affine=True))
        modules.append(
            draw(
                st.sampled_from(
                    [nn.Identity(), nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.2), nn.SiLU(), nn.PReLU(out), nn.Sigmoid()]
                )
            )
        )
    model = nn.Sequential(*modules).train(draw(st.booleans()))
    if draw(st.integers(0, 2)) == 0:
        cnnfast.channels_last(model)
    size = draw(st.sampled_from([(4,), (8,), (5, 4), (8, 8), (1, 1), (1,)]).filter(lambda s: len(s) == ndim))
    if min(size) == 1:  # no room to reflect, and statistics of a single value
        assume(not any(getattr(m, "padding_mode", "") == "reflect" for m in model))
        assume(not any(isinstance(m, nn.GroupNorm) or "InstanceNorm" in type(m).__name__ for m in model))
        assume(not (model.training and any("BatchNorm" in type(m).__name__ for m in model)))
    x = rand((draw(st.sampled_from([1, 2, 4])), first, *size), 0, draw(st.sampled_from(LAYOUTS[:4])))
    note(f"{model} on {tuple(x.shape)} with strides {x.stride()}")
    return model, x


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.usefixtures("ways")
def test_models(autocast: bool) -> None:
    """The strides of a result, and of its input's gradient, are exactly nn.Sequential's; a parameter's gradient has the
    parameter's (where torch's own, of a channels-last input, may have others). Values: tests/test_sequential*.py."""

    @stack_profile(200)
    @given(models())
    def run(given_: tuple[nn.Sequential, Tensor]) -> None:
        plain, x = given_
        ours = cnnfast.Sequential(*copy.deepcopy(plain))
        results = []
        for model in (plain, ours):
            leaf = x.detach().clone().requires_grad_()
            assert leaf.stride() == torch.empty_like(x).stride()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = model(leaf)
            # An identity, so that the gradient comes as the model gives it.
            (dx,) = torch.autograd.grad(y, leaf, like(y, 1), retain_graph=True)
            y.backward(like(y, 1))
            results.append((y.stride(), y.dtype, dx.stride(), dx.dtype))
        assert results[1] == results[0]
        for name, p in ours.named_parameters():
            assert p.grad is not None and p.grad.stride() == p.stride(), name

    run()


GREY: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "grey-image": ([nn.ConvTranspose2d(64, 1, 4, 2, 1), nn.Tanh()], (4, 64, 16, 16)),
    "grey-image-with-norm": ([nn.ConvTranspose2d(64, 1, 4, 2, 1), nn.BatchNorm2d(1), nn.Tanh()], (4, 64, 16, 16)),
    "mono-sound": ([nn.ConvTranspose1d(64, 1, 4, 2, 1), nn.Tanh()], (4, 64, 64)),
    "one-column": ([nn.ConvTranspose1d(64, 64, 1), nn.ReLU()], (4, 64, 64)),
    "one-pixel": ([nn.ConvTranspose2d(64, 64, 1), nn.ReLU()], (4, 64, 8, 8)),
    "one-pixel-between": (
        [nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1)],
        (4, 64, 8, 8),
    ),
    "depthwise": (
        [nn.Conv1d(256, 256, 3, groups=256, padding=2), nn.ReLU(), nn.ConvTranspose1d(256, 64, 4, 2, 1)], (4, 256, 5)
    ),
    "upsampled": ([nn.Upsample(scale_factor=2), nn.Conv2d(1, 32, 3, 1, 1), nn.ReLU()], (4, 1, 32, 32)),
    "upsampled-to-grey": ([nn.Upsample(scale_factor=2), nn.Conv2d(32, 1, 3, 1, 1), nn.Tanh()], (4, 32, 32, 32)),
    "latent": ([nn.ConvTranspose2d(100, 64, 4), nn.BatchNorm2d(64), nn.ReLU()], (4, 100, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("name", GREY)
def test_layers_with_sizes_of_one(name: str, channels_last: bool, autocast: torch.dtype | None) -> None:
    """What DistributedDataParallel compares with the strides of its buckets, which are the parameters'."""
    layers, shape = GREY[name]
    model = cnnfast.Sequential(*copy.deepcopy(layers))
    if channels_last:
        cnnfast.channels_last(model)
    for second in (False, True):
        model.zero_grad(set_to_none=True)
        x = rand(shape, 0).requires_grad_()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            y = model(x)
        (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=second, retain_graph=True)
        (dx.float().square().sum() if second else y.float().square().sum()).backward()
        for n, p in model.named_parameters():
            assert p.grad is None or p.grad.stride() == p.stride(), n
        assert sum(p.grad is not None for p in model.parameters()) >= len(layers) // 2


# --- results that are written to --------------------------------------------------------------------------------------


@pytest.mark.parametrize("saves", [nn.Tanh, nn.Sigmoid, nn.ReLU])
def test_a_result_of_one_dimension_that_is_overwritten(saves: type[nn.Module]) -> None:
    """A backward that has saved it says so, as PyTorch's; nothing else is in the way of writing to it."""
    for make in (lambda: nn.ConvTranspose1d(64, 32, 4, 2, 1), lambda: nn.Conv1d(64, 32, 3, 1, 1)):
        model = cnnfast.channels_last(cnnfast.Sequential(make(), saves()))
        x = rand((2, 64, 32), 0)
        y = model(x)
        assert not y._is_view() and y.is_contiguous() is False
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        assert model(x).detach_() is not None
    w = rand((64, 32, 4), 1).requires_grad_()
    for layout in ("contiguous", "channels_last"):
        x = rand((2, 64, 32), 0, layout)
        y = ops.conv_transpose1d(x, w, None, 2, 1, activation="tanh")
        assert not y._is_view()
        expected = torch.autograd.grad(torch.tanh(F.conv_transpose1d(x, w, None, 2, 1)).sum(), w)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), w), expected, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            assert ops.conv_transpose1d(x, w, None, 2, 1).detach_().shape == y.shape
