"""The public operators on the CPU: torch's results, layouts and errors, and our own errors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cnnfast
from cnnfast import ops, reference
from cnnfast.activations import ACTIVATIONS, Activation

from ..tolerance import assert_close

PAIRS = {1: (ops.conv_transpose1d, F.conv_transpose1d), 2: (ops.conv_transpose2d, F.conv_transpose2d)}


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positional(ndim: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The whole call by position, as ours hands it on: torch words some errors differently for arguments by name."""
    parameters = list(inspect.signature(PAIRS[ndim][0]).parameters.values())[len(args) : 8]
    assert set(kwargs) <= {p.name for p in parameters}
    return (*args, *(kwargs.get(p.name, p.default) for p in parameters))


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [1, 2])
def test_signature_begins_as_torch_s(ndim: int) -> None:
    names = list(inspect.signature(PAIRS[ndim][0]).parameters)
    torch_s = ["input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"]
    assert f"conv_transpose{ndim}d({', '.join(torch_s)}" in re.sub(r"=\w+", "", PAIRS[ndim][1].__doc__ or "")
    assert names[:8] == torch_s
    keywords = inspect.signature(PAIRS[ndim][0]).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY for p in list(keywords)[8:])


# --- values and layouts -----------------------------------------------------------------------------------------------

# (input shape, weight shape, positional arguments after the bias)
CALLS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {
    "dcgan": ((2, 16, 4, 5), (16, 8, 4, 4), (2, 1)),
    "rgb": ((2, 16, 4, 5), (16, 3, 4, 4), (2, 1)),
    "latent": ((3, 20, 1, 1), (20, 8, 4, 4), ()),
    "output-padding": ((1, 8, 5, 3), (8, 4, 3, 3), (2, 1, 1)),
    "groups": ((2, 8, 3, 3), (8, 2, 3, 3), (1, 0, 0, 4)),
    "dilation": ((2, 8, 3, 4), (8, 4, 3, 2), ((2, 1), (1, 0), (1, 0), 1, (2, 3))),
    "one-int-sequence": ((2, 8, 3, 4), (8, 4, 3, 3), ([2], (1,))),
    "unbatched": ((8, 3, 4), (8, 4, 3, 3), (2, 1)),
    "one-channel": ((2, 1, 3, 4), (1, 1, 3, 3), (2, 1)),
    "one-pixel": ((1, 8, 1, 1), (8, 4, 1, 1), ()),
    "empty-batch": ((0, 8, 3, 4), (8, 4, 3, 3), (2, 1)),
    "1d": ((2, 8, 7), (8, 4, 4), (2, 1)),
    "1d-vocoder": ((1, 16, 9), (16, 8, 16), (8, 4)),
    "1d-unbatched": ((8, 7), (8, 4, 3), (2, 1, 1, 1, 1)),
    "1d-groups-dilation": ((2, 8, 7), (8, 2, 3), (3, 1, 2, 4, 2)),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_equals_torch(call: str, dtype: torch.dtype, bias: bool) -> None:
    shape, weight_shape, args = CALLS[call]
    ours, theirs = PAIRS[len(weight_shape) - 2]
    groups = args[3] if len(args) > 3 else 1
    x, w = rand(*shape, dtype=dtype), rand(*weight_shape, seed=1, dtype=dtype)
    b = rand(weight_shape[1] * groups, seed=2, dtype=dtype) if bias else None
    y, expected = ours(x, w, b, *args), theirs(x, w, b, *args)
    assert y.dtype == expected.dtype and y.shape == expected.shape
    if dtype in (torch.float64, torch.complex64):
        torch.testing.assert_close(y, expected)
    elif not torch.equal(y, expected):  # where it runs, ATen's result to the bit: in bfloat16 it may round partial sums
        exact = theirs(x.double(), w.double(), None if b is None else b.double(), *args)
        yardstick = theirs(x.float(), w.float(), None if b is None else b.float(), *args).to(dtype)
        assert_close(y, exact, yardstick, call)


FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("call", [c for c in CALLS if len(CALLS[c][0]) == 4 and CALLS[c][0][0] > 0])
def test_strides_are_torch_s(call: str, x_format: str, weight_format: str) -> None:
    """channels_last where the input or the weight is, also where sizes of one leave the format open."""
    shape, weight_shape, args = CALLS[call]
    for dtype in (torch.float32, torch.bfloat16):
        x = rand(*shape, dtype=dtype).contiguous(memory_format=FORMATS[x_format])
        w = rand(*weight_shape, dtype=dtype).contiguous(memory_format=FORMATS[weight_format])
        y, expected = ops.conv_transpose2d(x, w, None, *args), F.conv_transpose2d(x, w, None, *args)
        open_sizes = [n for n in y.shape if n > 1]
        got, want = ([s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (y, expected))
        assert got == want, (dtype, open_sizes)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("call", ["dcgan", "rgb", "latent", "unbatched", "1d", "1d-unbatched"])
def test_epilogue(call: str, name: str) -> None:
    shape, weight_shape, args = CALLS[call]
    ours, theirs = PAIRS[len(weight_shape) - 2]
    c, ndim = weight_shape[1], len(weight_shape) - 2
    x, w, b = rand(*shape), rand(*weight_shape, seed=1) / 8, rand(c, seed=2)
    scale, shift = rand(c, seed=3), rand(c, seed=4, dtype=torch.float64)
    slope = rand(c, seed=5).abs() if name == "prelu" else None
    residual = rand(*theirs(x, w, None, *args).shape, seed=6)
    y = ours(x, w, b, *args, scale=scale, shift=shift, residual=residual, activation=name, activation_param=slope)

    def composed(dtype: torch.dtype) -> Tensor:
        column = (-1, *(1,) * ndim)
        z = theirs(x.to(dtype), w.to(dtype), b.to(dtype), *args)
        z = z * scale.to(dtype).reshape(column) + shift.to(dtype).reshape(column) + residual.to(dtype)
        batched = z if z.dim() == ndim + 2 else z.unsqueeze(0)
        return Activation(name)(batched, None if slope is None else slope.to(dtype)).reshape(z.shape)

    assert_close(y, composed(torch.float64), composed(torch.float32), f"{call} {name}")


def test_activation_arguments() -> None:
    x, w = rand(1, 8, 3, 3), rand(8, 4, 3, 3)
    y = F.conv_transpose2d(x, w)

    def check(expected: Tensor, activation: Any, param: Any = None) -> None:
        got = ops.conv_transpose2d(x, w, activation=activation, activation_param=param)
        torch.testing.assert_close(got, expected)

    check(y, None), check(y, "identity"), check(y, Activation())
    check(F.leaky_relu(y), "leaky_relu"), check(F.leaky_relu(y, 0.2), "leaky_relu", 0.2)
    check(F.leaky_relu(y, 0.2), Activation("leaky_relu", (0.2,)))
    check(F.elu(y, 2.0), "elu", 2), check(F.hardtanh(y, 0.0, 6.0), "hardtanh", (0, 6))
    check(F.hardtanh(y), "hardtanh"), check(F.gelu(y, approximate="tanh"), "gelu_tanh")
    one, each = torch.tensor(0.3), torch.tensor([0.1, 0.2, 0.3, 0.4])
    check(F.prelu(y, one.reshape(1)), "prelu", one), check(F.prelu(y, each), "prelu", each)
    check(F.prelu(y, each), Activation("prelu"), each)


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect"])
@pytest.mark.parametrize(
    "shape, weight_shape, factor, padding, groups",
    [
        ((2, 8, 4, 5), (6, 8, 3, 3), 2, None, 1),
        ((8, 4, 5), (6, 8, 3, 3), 2, 1, 1),
        ((1, 8, 4, 5), (6, 4, 5, 3), (3, 2), (2, 1), 2),
        ((2, 8, 4, 5), (6, 8, 1, 1), 2, 0, 1),
        ((2, 8, 4, 5), (6, 8, 3, 3), 1, 0, 1),
        ((2, 8, 4, 5), (6, 8, 5, 5), 2, 2, 1),  # reflects more than r - 1: unfused
        ((2, 8, 4, 5), (3, 8, 3, 3), 2, 2, 1),
    ],
)
def test_upsample_conv2d(
    shape: tuple[int, ...], weight_shape: tuple[int, ...], factor: Any, padding: Any, groups: int, mode: str
) -> None:
    x, w, b, scale = rand(*shape), rand(*weight_shape, seed=1) / 8, rand(weight_shape[0]), rand(weight_shape[0], seed=3)
    y = ops.upsample_conv2d(
        x, w, b, factor, padding, mode, groups, scale=scale, activation="leaky_relu", activation_param=0.2
    )
    factors = (factor, factor) if isinstance(factor, int) else factor
    pad = (1, 1) if padding is None else (padding, padding) if isinstance(padding, int) else padding

    def composed(dtype: torch.dtype) -> Tensor:
        image = x.to(dtype) if x.dim() == 4 else x.to(dtype).unsqueeze(0)
        z = reference.upsample_conv(image, w.to(dtype), b.to(dtype), factors, pad, mode, groups)
        return F.leaky_relu(z * scale.to(dtype).reshape(-1, 1, 1), 0.2).reshape(y.shape)

    assert_close(y, composed(torch.float64), composed(torch.float32), mode)


def test_upsample_conv2d_keeps_eager_s_layout() -> None:
    x, w = rand(2, 8, 4, 5), rand(6, 8, 3, 3)
    for fmt in FORMATS.values():
        y = ops.upsample_conv2d(x.contiguous(memory_format=fmt), w)
        assert y.is_contiguous(memory_format=fmt)


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect"])
def test_upsample_conv2d_of_an_empty_batch(mode: str) -> None:
    y = ops.upsample_conv2d(rand(0, 16, 4, 5), rand(6, 16, 3, 3), padding_mode=mode)
    assert y.shape == (0, 6, 8, 10)


# --- torch's errors ---------------------------------------------------------------------------------------------------

X, W = rand(2, 16, 4, 4), rand(16, 8, 3, 3)
X1, W1 = rand(2, 16, 4), rand(16, 8, 3)

BAD_CALLS: dict[str, tuple[int, tuple[Any, ...], dict[str, Any]]] = {
    "channels": (2, (rand(2, 15, 4, 4), W), {}),
    "channels-groups": (2, (X, W), dict(groups=3)),
    "channels-unbatched": (2, (rand(15, 4, 4), W), {}),
    "too-few-dimensions": (2, (rand(16, 4), W), {}),
    "too-many-dimensions": (2, (rand(1, 2, 16, 4, 4), W), {}),
    "weight-dimensions": (2, (X, W1), {}),
    "output-padding": (2, (X, W), dict(stride=2, output_padding=2)),
    "output-padding-1d": (1, (X1, W1), dict(stride=2, output_padding=3)),
    "output-padding-negative": (2, (X, W), dict(stride=2, output_padding=-1)),
    "stride-zero": (2, (X, W), dict(stride=0)),
    "stride-negative": (2, (X, W), dict(stride=(1, -2))),
    "stride-length": (2, (X, W), dict(stride=(1, 2, 3))),
    "stride-float": (2, (X, W), dict(stride=1.5)),
    "stride-text": (2, (X, W), dict(stride="2")),
    "stride-float-that-is-an-int": (2, (X, W), dict(stride=2.0)),
    "stride-tuple-of-floats": (2, (X, W), dict(stride=(2.0, 2.0))),
    "stride-bool": (2, (X, W), dict(stride=True)),
    "stride-nested": (2, (X, W), dict(stride=([2], 2))),
    "stride-none": (2, (X, W), dict(stride=None)),
    "padding-negative": (2, (X, W), dict(padding=-1)),
    "padding-too-large": (2, (X, W), dict(padding=8)),
    "padding-too-large-1d": (1, (X1, W1), dict(padding=9)),
    "padding-same": (2, (X, W), dict(padding="same")),
    "dilation-zero": (2, (X, W), dict(dilation=0)),
    "groups-zero": (2, (X, W), dict(groups=0)),
    "groups-negative": (2, (X, W), dict(groups=-1)),
    "groups-float": (2, (X, W), dict(groups=2.0)),
    "bias-size": (2, (X, W, rand(7)), {}),
    "bias-dimensions": (2, (X, W, rand(8, 1)), {}),
    "bias-dtype": (2, (X, W, rand(8).double()), {}),
    "dtypes": (2, (X, W.double()), {}),
    "dtypes-half": (2, (X.half(), W), {}),
    "integer-and-float": (2, (X.int(), W), {}),
    "no-image": (2, (rand(2, 16, 0, 4), W), {}),
    "no-image-1d": (1, (rand(2, 16, 0), W1), {}),
    "no-kernel": (2, (X, rand(16, 8, 0, 3)), {}),
    "not-a-tensor": (2, (X.tolist(), W), {}),
    "weight-none": (2, (X, None), {}),
    "no-output-channels": (2, (X, rand(16, 0, 3, 3)), {}),
}


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Exception | Tensor:
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return error


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(name: str) -> None:
    """The same error as torch's, or the same result where torch accepts the call."""
    ndim, args, kwargs = BAD_CALLS[name]
    for stride in (1, 2):  # no cached good call may answer for a bad one that compares equal
        ops.conv_transpose2d(X, W, stride=stride), ops.conv_transpose2d(X, W, stride=(stride, stride), groups=stride)
    got = outcome(PAIRS[ndim][0], *args, **kwargs)
    expected = outcome(PAIRS[ndim][1], *positional(ndim, args, kwargs))
    if isinstance(expected, Tensor):
        assert isinstance(got, Tensor), got
        torch.testing.assert_close(got, expected)
        return
    assert type(got) is type(expected), (got, expected)
    assert str(got) == str(expected)


def test_most_bad_calls_are_errors() -> None:
    calls = [outcome(PAIRS[ndim][1], *args, **kwargs) for ndim, args, kwargs in BAD_CALLS.values()]
    assert sum(isinstance(c, Exception) for c in calls) >= len(calls) - 6


# --- our own errors ---------------------------------------------------------------------------------------------------

OUR_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "activation": (dict(activation="swish"), ValueError, "unknown activation 'swish': expected one of identity, relu"),
    "activation-parameters": (
        dict(activation="relu", activation_param=0.1), ValueError,
        "activation 'relu' takes 0 parameter(s), got (0.1,)",
    ),
    "activation-parameter-twice": (
        dict(activation=Activation("elu"), activation_param=0.1), ValueError,
        "activation_param=0.1 is given twice: Activation(name='elu', params=(1.0,)) holds its own",
    ),
    "activation-parameter-without-activation": (
        dict(activation_param=0.1), ValueError, "activation 'identity' takes 0 parameter(s), got (0.1,)",
    ),
    "activation-parameter-tensor": (
        dict(activation="elu", activation_param=torch.tensor(1.0)), ValueError,
        "activation_param of 'elu' must be a number, got a tensor (only prelu takes one)",
    ),
    "prelu-without": (
        dict(activation="prelu"), ValueError,
        "prelu needs activation_param, a tensor of 1 or 8 elements, got None",
    ),
    "prelu-dtype": (
        dict(activation="prelu", activation_param=torch.ones(8).int()), ValueError,
        "activation_param must be floating point, got torch.int32",
    ),
    "prelu-device": (
        dict(activation="prelu", activation_param=torch.ones(8, device="meta")), RuntimeError,
        "expected activation_param on cpu like the input, got meta",
    ),
    "prelu-size": (
        dict(activation="prelu", activation_param=torch.ones(3)), ValueError,
        "prelu's activation_param must have 1 or 8 elements, got shape (3,)",
    ),
    "scale-shape": (
        dict(scale=torch.ones(7)), ValueError,
        "scale must have shape (8,), one value per output channel, got (7,)",
    ),
    "scale-scalar": (
        dict(scale=torch.tensor(1.0)), ValueError,
        "scale must have shape (8,), one value per output channel, got ()",
    ),
    "shift-shape": (
        dict(shift=torch.ones(1, 8, 1, 1)), ValueError,
        "shift must have shape (8,), one value per output channel, got (1, 8, 1, 1)",
    ),
    "shift-dtype": (dict(shift=torch.ones(8).int()), ValueError, "shift must be floating point, got torch.int32"),
    "scale-device": (
        dict(scale=torch.ones(8, device="meta")), RuntimeError, "expected scale on cpu like the input, got meta"
    ),
    "residual-shape": (
        dict(residual=torch.ones(2, 8, 6, 5)), ValueError,
        "residual must have the output's shape (2, 8, 6, 6), got (2, 8, 6, 5)",
    ),
    "residual-dtype": (
        dict(residual=torch.ones(2, 8, 6, 6).half()), ValueError,
        "residual must be torch.float32 on cpu like the input, got torch.float16 on cpu",
    ),
    "backend": (dict(backend="cudnn"), ValueError, "unknown backend 'cudnn': expected one of auto, triton, aten"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUR_ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_our_errors(name: str, dtype: torch.dtype) -> None:
    kwargs, kind, message = OUR_ERRORS[name]
    if dtype == torch.float64:
        message = message.replace("torch.float32", "torch.float64")
    with pytest.raises(kind) as error:
        ops.conv_transpose2d(X.to(dtype), W.to(dtype), **kwargs)
    assert str(error.value).startswith(message)


def test_mixed_devices() -> None:
    """torch's error for tensors on a CPU and a GPU (its own meta tensors it lets pass, and returns garbage)."""
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device.*cpu and meta"):
        ops.conv_transpose2d(X, W.to("meta"))


@pytest.mark.parametrize("name", ["scale-shape", "shift-dtype", "residual-shape", "prelu-size"])
def test_our_errors_hold_where_torch_runs_the_convolution(name: str) -> None:
    """Complex tensors never reach a fused step: the same checks."""
    kwargs, kind, message = OUR_ERRORS[name]
    with pytest.raises(kind) as error:
        ops.conv_transpose2d(X.to(torch.complex64), W.to(torch.complex64), **kwargs)
    assert str(error.value).startswith(message)


UPSAMPLE_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "even-kernel": (dict(weight=rand(8, 16, 4, 4)), ValueError, "kernel size must be odd, got (4, 4)"),
    "weight": (dict(weight=rand(8, 16, 3)), ValueError, "weight must be (C_out, C_in/groups, kh, kw), got shape"),
    "factor": (dict(scale_factor=0), ValueError, "scale_factor must be positive, got (0, 0)"),
    "factor-float": (dict(scale_factor=1.5), (ValueError, TypeError), ""),
    "factor-length": (dict(scale_factor=(2, 2, 2)), ValueError, "scale_factor must be an int or two ints"),
    "padding": (dict(padding=-1), ValueError, "padding must not be negative, got (-1, -1)"),
    "mode": (dict(padding_mode="circular"), ValueError, "padding_mode='circular' must be one of"),
    "dimensions": (dict(input=rand(16, 4)), RuntimeError, "expected 3D (unbatched) or 4D (batched) input"),
    "channels": (dict(input=rand(2, 15, 4, 4)), RuntimeError, "Given groups=1, weight of size [8, 16, 3, 3]"),
    "dtype": (dict(input=X.double()), RuntimeError, ""),
    "bias": (dict(bias=rand(7)), RuntimeError, ""),
    "scale": (dict(scale=torch.ones(7)), ValueError, "scale must have shape (8,)"),
    "residual": (
        dict(residual=torch.ones(2, 8, 8, 7)), ValueError, "residual must have the output's shape (2, 8, 8, 8)"
    ),
    "residual-unfused": (
        dict(weight=rand(8, 16, 5, 5), padding_mode="reflect", residual=torch.ones(1, 8, 8, 8)), ValueError,
        "residual must have the output's shape (2, 8, 8, 8)",
    ),
    "scale-unfused": (
        dict(weight=rand(8, 16, 5, 5), padding_mode="reflect", scale=torch.ones(1)), ValueError,
        "scale must have shape (8,)",
    ),
    "groups": (dict(groups=3), (RuntimeError, ValueError), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", UPSAMPLE_ERRORS)
def test_upsample_errors(name: str) -> None:
    kwargs, kind, message = UPSAMPLE_ERRORS[name]
    with pytest.raises(kind) as error:
        ops.upsample_conv2d(**{"input": X, "weight": rand(8, 16, 3, 3), **kwargs})
    assert str(error.value).startswith(message)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", ["x", "w", "b", "scale", "shift", "residual", "slope"])
def test_gradients_flow_to_every_operand(leaf: str) -> None:
    """Each operand alone requires a gradient: never a detached result, and the composition's own gradient."""
    tensors = dict(
        x=rand(2, 16, 3, 4), w=rand(16, 8, 4, 4), b=rand(8), scale=rand(8, seed=1), shift=rand(8, seed=2),
        residual=rand(2, 8, 6, 8), slope=rand(8, seed=3).abs(),
    )  # fmt: skip
    tensors[leaf].requires_grad_()

    def run(x: Tensor, w: Tensor, b: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
        return ops.conv_transpose2d(
            x, w, b, 2, 1, scale=scale, shift=shift, residual=residual, activation="prelu", activation_param=slope
        )

    def composed(
        x: Tensor, w: Tensor, b: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, slope: Tensor
    ) -> Tensor:
        z = F.conv_transpose2d(x, w, b, 2, 1) * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1) + residual
        return F.prelu(z, slope)

    y = run(**tensors)
    assert y.requires_grad
    (got,) = torch.autograd.grad(y.square().sum(), tensors[leaf])
    found = []
    for wide in (torch.float64, torch.float32):
        cast = {name: t.detach().to(wide).requires_grad_(name == leaf) for name, t in tensors.items()}
        found.append(torch.autograd.grad(composed(**cast).square().sum(), cast[leaf])[0])
    assert_close(got, *found, leaf)
    with torch.no_grad():
        assert not run(**tensors).requires_grad
    with torch.inference_mode():
        assert run(**tensors).is_inference()


def test_gradients_of_the_other_operators() -> None:
    for function, shape, weight_shape in (
        (ops.conv_transpose1d, (2, 16, 5), (16, 8, 4)),
        (ops.upsample_conv2d, (2, 16, 3, 4), (8, 16, 3, 3)),
        (ops.conv_transpose2d, (16, 3, 4), (16, 8, 3, 3)),
    ):
        x, w = rand(*shape).requires_grad_(), rand(*weight_shape).requires_grad_()
        for g in torch.autograd.grad(function(x, w, activation="tanh").sum(), (x, w)):
            assert g.abs().sum() > 0


def test_gradgradcheck_in_float64() -> None:
    x, w = (rand(*s, dtype=torch.float64).requires_grad_() for s in ((1, 2, 2, 2), (2, 2, 3, 3)))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return ops.conv_transpose2d(x, w, None, 2, 1, activation="tanh")

    assert torch.autograd.gradcheck(function, (x, w)) and torch.autograd.gradgradcheck(function, (x, w))


# --- autocast, dtypes, tensors of other kinds -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """The result's dtype is torch's, and the norm vectors keep their own."""
    x, w, b = rand(2, 16, 4, 4, dtype=dtype), rand(16, 8, 4, 4, dtype=dtype), rand(8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.conv_transpose2d(x, w, b, 2, 1, scale=torch.full((8,), 1.001))
        expected = F.conv_transpose2d(x, w, b, 2, 1)
        up = ops.upsample_conv2d(x, rand(8, 16, 3, 3, dtype=dtype))
    assert y.dtype == expected.dtype and up.dtype == expected.dtype
    torch.testing.assert_close(y.double(), expected.double() * 1.001, rtol=2e-2, atol=2e-2)


def test_autocast_disabled_inside() -> None:
    x, w = rand(2, 16, 4, 4), rand(16, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert ops.conv_transpose2d(x, w).dtype == torch.float32


def test_autocast_mixes_dtypes_as_torch_does() -> None:
    x, w = rand(2, 16, 4, 4, dtype=torch.bfloat16), rand(16, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.conv_transpose2d(x, w).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_cpu_tensors_never_reach_triton(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = rand(2, 32, 4, 4), rand(32, 32, 4, 4)
    launch = pytest.importorskip("cnnfast.gpu.conv", reason="triton is not installed", exc_type=ImportError)
    monkeypatch.setattr(launch, "run", lambda *a, **k: pytest.fail("launched"))
    ops.conv_transpose2d(x, w, None, 2, 1, backend=backend)


def test_nothing_is_written_to_the_operands() -> None:
    tensors = [rand(2, 16, 4, 4), rand(16, 8, 4, 4), rand(8), rand(8), rand(8), rand(2, 8, 8, 8)]
    copies = [t.clone() for t in tensors]
    x, w, b, scale, shift, residual = tensors
    y = ops.conv_transpose2d(x, w, b, 2, 1, scale=scale, shift=shift, residual=residual, activation="relu")
    y.fill_(7.0)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


def test_backend_is_public() -> None:
    x, w = rand(1, 8, 3, 3), rand(8, 4, 3, 3)
    with cnnfast.backend("aten"):
        assert torch.equal(cnnfast.ops.conv_transpose2d(x, w), F.conv_transpose2d(x, w))
