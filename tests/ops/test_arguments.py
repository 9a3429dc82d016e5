"""Odd, wrong and absurd arguments of cnnfast.ops: what torch makes of them, or an error that says what is wrong."""

from __future__ import annotations

import enum
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast import ops
from cnnfast.activations import Activation
from cnnfast.norms import Norm
from cnnfast.ops import convolution
from cnnfast.ops.run import run_step
from cnnfast.step import Operands, Step

CL = torch.channels_last


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X2, X1 = rand(2, 16, 6, 6), rand(2, 16, 6)
# name -> (input, weight, defaults of the other arguments in torch's order)
CONVOLUTIONS: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
    "conv1d": (X1, rand(8, 16, 3, seed=1), dict(stride=1, padding=0, dilation=1, groups=1)),
    "conv2d": (X2, rand(8, 16, 3, 3, seed=1), dict(stride=1, padding=0, dilation=1, groups=1)),
    "conv_transpose1d": (
        X1, rand(16, 8, 3, seed=1), dict(stride=1, padding=0, output_padding=0, groups=1, dilation=1)
    ),
    "conv_transpose2d": (
        X2, rand(16, 8, 3, 3, seed=1), dict(stride=1, padding=0, output_padding=0, groups=1, dilation=1)
    ),
}  # fmt: skip


def upsampled(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, 1, 1)


PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    **{name: (getattr(ops, name), getattr(F, name)) for name in CONVOLUTIONS},
    "upsample_conv2d": (ops.upsample_conv2d, upsampled),
}


def operands(name: str) -> tuple[Tensor, Tensor]:
    return CONVOLUTIONS["conv2d" if name == "upsample_conv2d" else name][:2]


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result, or (the error's class, its first line)."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error).splitlines()[:1]


def same(got: Any, want: Any) -> None:
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor), got
        assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)
    else:
        assert got == want


# --- whole numbers ----------------------------------------------------------------------------------------------------


class Index:
    """What `operator.index` takes and is no number otherwise."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class Two(enum.IntEnum):
    two = 2


NUMBERS: dict[str, Any] = {
    "int": 2, "bool": True, "float": 2.0, "fraction": 1.5, "numpy": np.int64(2), "numpy-uint8": np.uint8(2),
    "numpy-bool": np.bool_(True), "numpy-float": np.float64(2), "numpy-0d": np.array(2), "tensor": torch.tensor(2),
    "tensor-uint8": torch.tensor(2, dtype=torch.uint8), "tensor-bool": torch.tensor(True),
    "tensor-float": torch.tensor(2.0), "tensor-1d": torch.tensor([2]), "tensor-of-two": torch.tensor([1, 2]),
    "tensor-meta": torch.tensor(2, device="meta"), "index": Index(2), "enum": Two.two, "text": "2", "none": None,
    "complex": 2j, "list": [2], "pair": [1, 2], "tuple": (2, 1), "three": (1, 1, 1), "empty": (),
    "pair-numpy": (np.int64(1), np.int64(2)), "pair-tensors": (torch.tensor(1), torch.tensor(2)),
    "pair-index": (Index(1), Index(2)), "pair-mixed": (1, 2.0), "pair-bool": (1, True), "pair-none": (1, None),
    "size": torch.Size([1, 2]), "range": range(1, 3), "set": {2}, "nested": ((1,), 2), "zero": 0, "negative": -1,
    "array": np.array([2, 2]), "too-large": 2**63, "much-too-large": 2**70, "too-small": -(2**63) - 1,
}  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_whole_numbers_as_torch_takes_them(name: str, number: str) -> None:
    """Each argument in turn: torch's result or torch's own error. No cached good call answers for one that compares
    equal to it."""
    x, w, defaults = CONVOLUTIONS[name]
    for argument in defaults:
        getattr(ops, name)(
            x, w, None, *{**defaults, argument: {"padding": 0, "output_padding": 0}.get(argument, 1)}.values()
        )
        args = {**defaults, argument: NUMBERS[number]}
        if argument == "output_padding":
            args["stride"] = 3
        ours, theirs = PAIRS[name]
        same(outcome(ours, x, w, None, *args.values()), outcome(theirs, x, w, None, *args.values()))


@pytest.mark.parametrize(
    "number", ["numpy", "numpy-uint8", "tensor", "enum", "pair-numpy", "pair-tensors", "pair-index"]
)
def test_numbers_of_other_types_run_fused(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    real = convolution.run_step
    monkeypatch.setattr(convolution, "run_step", lambda step, *a, **k: (ran.append(step), real(step, *a, **k))[1])
    x, w, _ = CONVOLUTIONS["conv_transpose2d"]
    value, slope = NUMBERS[number], torch.rand(16)
    groups = 2 if number.startswith("pair") else value
    y = ops.conv_transpose2d(x, w, None, value, 0, 0, groups, activation="prelu", activation_param=slope)
    torch.testing.assert_close(y, F.prelu(F.conv_transpose2d(x, w, None, value, 0, 0, groups), slope))
    x, w = operands("upsample_conv2d")
    up = value if number.startswith("pair") else (value, 1)
    z = ops.upsample_conv2d(x, w, None, up, up, "replicate")
    (rh, rw), (ph, pw) = ([int(v) for v in up] for _ in range(2))
    padded = F.pad(F.interpolate(x, scale_factor=[float(rh), float(rw)]), (pw, pw, ph, ph), mode="replicate")
    torch.testing.assert_close(z, F.conv2d(padded, w), rtol=1e-4, atol=1e-4)
    assert len(ran) == 2 and {type(n) for step in ran for n in step.spec.stride} == {int}


def test_upsampling_factors() -> None:
    x, w = operands("upsample_conv2d")
    for factor in (2.0, np.int64(2), np.float32(2), torch.tensor(2), (2, 2.0), [Index(2), 2]):
        if isinstance(factor, np.floating):
            factor = float(factor)  # `torch.nn.Upsample` makes one of its factor
        torch.testing.assert_close(ops.upsample_conv2d(x, w, None, factor), upsampled(x, w))
    for factor in (1.5, (2, 1.5), "2", None, 2j, True, (2, None), torch.tensor(2.0), {2}):
        with pytest.raises(TypeError, match="scale_factor must be an int or two ints"):
            ops.upsample_conv2d(x, w, None, factor)
    for factor in (2**63, (2, 2, 2), ()):
        with pytest.raises(ValueError, match="scale_factor must be an int or two ints"):
            ops.upsample_conv2d(x, w, None, factor)
    torch.testing.assert_close(  # beyond what is collapsed; nearest pixels are those of F.interpolate
        ops.upsample_conv2d(x[:1, :, :2, :2], w, None, 41),
        F.conv2d(F.interpolate(x[:1, :, :2, :2], scale_factor=41.0), w, None, 1, 1),
    )
    for name in ("padding", "groups"):
        for value in (1.0, "1", True, 1j, None, torch.tensor(1.0), object()):
            if (name, value) == ("padding", None):
                continue
            with pytest.raises(TypeError, match=f"{name} must be an int|conv2d\\(\\)"):
                ops.upsample_conv2d(x, w, **{name: value})
    for groups in (0, -1, 3, 2**62):
        assert outcome(ops.upsample_conv2d, x, w, groups=groups)[0] is RuntimeError, "torch's own words"


# --- numbers beyond sense ---------------------------------------------------------------------------------------------

EXTREMES = """
    import itertools, resource, sys
    import torch, torch.nn.functional as F
    from cnnfast import ops

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # an allocation that cannot be is an error at once
    x2, x1 = torch.randn(1, 16, 3, 3), torch.randn(1, 16, 3)
    plain = ("stride", "padding", "dilation", "groups")
    calls = {
        "conv1d": (x1, torch.randn(8, 16, 3), plain),
        "conv2d": (x2, torch.randn(8, 16, 3, 3), plain),
        "conv_transpose1d": (x1, torch.randn(16, 8, 3), (*plain, "output_padding")),
        "conv_transpose2d": (x2, torch.randn(16, 8, 3, 3), (*plain, "output_padding")),
        "upsample_conv2d": (x2, torch.randn(8, 16, 3, 3), ("scale_factor", "padding", "groups")),
    }
    numbers = (2**63 - 1, 2**62, 2**62 + 1, 2**61, 2**53, 2**40, 2**32 + 1, 2**31, 2**31 - 1, -(2**63), -1)
    for (name, (x, w, arguments)), n in itertools.product(calls.items(), numbers):
        for argument, mode in itertools.product(arguments, ("zeros", "replicate", "reflect")):
            more = {"padding_mode": mode} if name == "upsample_conv2d" else {}
            if mode != "zeros" and not more:
                continue
            for value in (n, (1, n)) if x is x2 and argument != "groups" else (n,):
                for recorded in (False, True):
                    try:
                        y = getattr(ops, name)(x, w.clone().requires_grad_(recorded), **{argument: value}, **more)
                    except (RuntimeError, ValueError) as error:
                        # Ours, or torch's where it has one: no MemoryError of Python's, no TypeError about an int.
                        assert str(error), (name, argument, value)
                    else:
                        assert argument == "stride" and not name.startswith("conv_t"), (name, argument, value, y.shape)
                        like = getattr(F, name)(x, w, **{argument: value})
                        torch.testing.assert_close(y.detach(), like)
    for factor in ((1, 2**40), 100000):  # torch's own ends the process in float32
        y = ops.conv_transpose1d(x1[..., :2], calls["conv_transpose1d"][1], None, 100000)
        assert y.shape == (1, 8, 100003) and y[..., 3:100000].count_nonzero() == 0
    print("all")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory")
def test_numbers_beyond_sense_do_not_end_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EXTREMES)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and done.stdout == "all\n", (done.returncode, done.stderr[-2000:])


def test_what_is_said_of_sizes_beyond_64_bits() -> None:
    x, w, _ = CONVOLUTIONS["conv2d"]
    with pytest.raises(
        RuntimeError, match="padding=9223372036854775807 at dimension 0 , expected padding to be at most"
    ):
        ops.conv2d(x, w, padding=2**63 - 1)
    with pytest.raises(RuntimeError, match="dilation=9223372036854775807 .* at dimension 1, an input of size 6 would"):
        ops.conv2d(x, w, dilation=(1, 2**63 - 1))
    with pytest.raises(
        RuntimeError, match="padding=9223372036854775807 at dimension 0 , expected padding to be at most"
    ):
        ops.upsample_conv2d(x, w, padding=2**63 - 1, padding_mode="replicate")
    with pytest.raises(
        RuntimeError, match=r"upsampled to \(12, 12\) and padded by \(1073741824, 1073741824\) is larger"
    ):
        ops.upsample_conv2d(x, w, padding=2**30, padding_mode="replicate")


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_meta_tensors(name: str, layout: torch.memory_format) -> None:
    """torch's own meta result, strides included, and the epilogue's checks."""
    ours, theirs = PAIRS[name]
    x, w = (t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in operands(name))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for batched in (True, False) if name != "upsample_conv2d" else (True,):
            mx, mw, b = (t.to("meta", dtype) for t in (x if batched else x[0], w, rand(8)))
            want = theirs(mx, mw, b)
            got = ours(mx, mw, b)
            assert (got.shape, got.dtype, got.stride(), got.device) == (
                want.shape,
                want.dtype,
                want.stride(),
                want.device,
            )
            vector, residual = torch.empty(8, device="meta"), torch.empty_like(want)
            more = ours(
                mx, mw, scale=vector, shift=vector, residual=residual, activation="prelu", activation_param=vector
            )
            assert (more.shape, more.dtype, more.device) == (want.shape, want.dtype, want.device)
            with pytest.raises(ValueError, match="residual must have the output's shape"):
                ours(mx, mw, residual=residual[..., :1])
            mw.requires_grad_()
            (g,) = torch.autograd.grad(ours(mx, mw, activation="relu").sum(), mw)
            assert g.shape == mw.shape and g.device.type == "meta"


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=str)
def test_norms_of_meta_tensors(layout: torch.memory_format) -> None:
    x = torch.empty(2, 16, 6, 6, device="meta", memory_format=layout)
    v = torch.empty(16, device="meta")
    for name, args in {
        "batch_norm": (v, v, v, v, True), "instance_norm": (None, None, v, v), "group_norm": (4, v, v),
    }.items():  # fmt: skip
        got, want = (getattr(m, name)(x, *args) for m in (ops, F))
        assert (got.shape, got.dtype, got.stride(), got.device) == (want.shape, want.dtype, want.stride(), want.device)
        assert getattr(ops, name)(x, *args, residual=x, activation="tanh").shape == x.shape


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", PAIRS)
def test_tensors_of_several_devices(name: str, autocast: bool) -> None:
    """torch's own error, which its kernels for meta tensors forget to say: they leave the result uninitialised."""
    x, w = operands(name)
    b = rand(8)
    for where in ("cpu,meta,cpu", "meta,cpu,cpu", "cpu,cpu,meta", "meta,meta,cpu", "meta,cpu,meta", "cpu,meta,none"):
        tensors = [None if d == "none" else t.to(d) for t, d in zip((x, w, b), where.split(","), strict=True)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, .* two devices"):
                PAIRS[name][0](*tensors)
    for argument, tensor in (("scale", b), ("shift", b), ("residual", PAIRS[name][1](x, w))):
        with pytest.raises((RuntimeError, ValueError), match=f"{argument} .*on cpu like the input, got .*meta"):
            PAIRS[name][0](x, w, **{argument: tensor.to("meta")})


# --- wrong types ------------------------------------------------------------------------------------------------------

NO_TENSORS = [0.5, 1, True, "a", [1.0] * 8, np.ones(8, dtype=np.float32), object(), (1, 2), {}, 1j]


@pytest.mark.parametrize("argument", ["bias", "scale", "shift", "residual"])
@pytest.mark.parametrize("name", PAIRS)
def test_what_is_no_tensor(name: str, argument: str) -> None:
    x, w = operands(name)
    for value in NO_TENSORS:
        for dtype in (torch.float32, torch.complex64):  # complex tensors never reach a fused step
            for autocast in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    with pytest.raises(
                        TypeError, match=f"^{argument} must be a tensor.* or None, got {type(value).__name__}$"
                    ):
                        PAIRS[name][0](x.to(dtype), w.to(dtype), **{argument: value})


@pytest.mark.parametrize("name", [*PAIRS, "batch_norm", "instance_norm", "group_norm", "norm_act"])
def test_wrong_types_of_activations(name: str) -> None:
    args = {"group_norm": (X2, 4), "instance_norm": (X2,), "norm_act": (X2, Norm("affine"))}.get(name)
    args = operands(name) if name in PAIRS else (X2, None, None, None, None, True) if args is None else args
    function = getattr(ops, name)
    for value in (0, 1.0, False, [], torch.relu, nn.ReLU(), nn.ReLU, b"relu", ("relu",)):
        with pytest.raises(
            TypeError, match=f"^activation must be a name, an Activation or None, got {type(value).__name__}"
        ):
            function(*args, activation=value)
    with pytest.raises(ValueError, match="unknown activation ''"):
        function(*args, activation="")
    for value in ("a", object(), 1j, {}, (None,), [0.1, "a"], {0.1}):
        with pytest.raises(TypeError, match="^activation_param of 'elu' must be a number or numbers, got"):
            function(*args, activation="elu", activation_param=value)
    for value in (0.25, "a", [0.25] * 8, np.ones(8), object()):
        with pytest.raises(TypeError, match=f"^prelu needs activation_param, a tensor .*, got {type(value).__name__}$"):
            function(*args, activation="prelu", activation_param=value)
    want = function(*args, activation="elu", activation_param=0.5)
    for value in (np.float32(0.5), np.float64(0.5), [0.5], np.array([0.5])):
        assert torch.equal(function(*args, activation="elu", activation_param=value), want)


def test_norms_name_what_is_wrong() -> None:
    for name, args in {"batch_norm": (None, None, None, None, True), "instance_norm": (), "group_norm": (4,)}.items():
        for value in NO_TENSORS:
            with pytest.raises(TypeError, match="^residual must be a tensor of the input's shape or None, got"):
                getattr(ops, name)(X2, *args, residual=value)
            with pytest.raises(TypeError, match="^input must be a tensor, got"):
                getattr(ops, name)(value, *args)
    for value in ("batch", None, 1, nn.BatchNorm2d(16)):
        with pytest.raises(TypeError, match=r"^norm must be a cnnfast\.norms\.Norm, got"):
            ops.norm_act(X2, value)
    with pytest.raises(ValueError, match=r"input must be floating point, got torch\.int64"):
        ops.norm_act(X2.long(), Norm("affine"))


# --- norms that torch judges ------------------------------------------------------------------------------------------

V, M = torch.rand(16) + 0.5, rand(16)
INPUTS: dict[str, Tensor] = {
    "float32": X2, "half": X2.half(), "bfloat16": X2.bfloat16(), "long": X2.long(), "int": X2.int(),
    "uint8": X2.byte(), "bool": X2 > 0, "complex": X2.to(torch.complex64), "float8": X2.to(torch.float8_e4m3fn),
    "empty-batch": X2[:0], "no-channels": X2[:, :0], "no-pixels": X2[:, :, :0], "scalar": torch.tensor(1.0),
    "vector": V, "matrix": rand(4, 16), "three": X1, "five": rand(2, 16, 2, 3, 2), "one-pixel": rand(2, 16, 1, 1),
    "one-value": rand(1, 16, 1, 1), "sparse": torch.eye(16).to_sparse(), "meta": X2.to("meta"),
}  # fmt: skip
VECTORS: dict[str, Any] = {
    "long": torch.ones(16).long(), "bool": V > 0, "complex": V.to(torch.complex64), "short": V[:8], "scalar": V[0],
    "matrix": V[None], "meta": V.to("meta"), "empty": V[:0], "list": [1.0] * 16, "number": 1.0, "array": V.numpy(),
    "text": "a",
}  # fmt: skip
ODD_NUMBERS: list[Any] = [
    0, 0.0, -1e-5, float("nan"), float("inf"), 1, True, "a", None, np.float32(1e-3), torch.tensor(1e-3), 1e-5j, [1e-5],
    10**400,
]  # fmt: skip


def calls_of_norms(x: Any, w: Any = V, b: Any = M, mean: Any = M, var: Any = V, eps: Any = 1e-5, momentum: Any = 0.1):  # type: ignore[no-untyped-def]
    """name -> the call, of `cnnfast.ops` or `torch.nn.functional`; running tensors are copied for each."""

    def copied(t: Any) -> Any:
        return t.clone() if isinstance(t, Tensor) else t

    for measured in (True, False):
        yield (
            f"batch {measured}",
            lambda m, t=measured: m.batch_norm(x, copied(mean), copied(var), w, b, t, momentum, eps),
        )
        yield (
            f"instance {measured}",
            lambda m, t=measured: m.instance_norm(x, copied(mean), copied(var), w, b, t, momentum, eps),
        )
    yield "instance without", lambda m: m.instance_norm(x, None, None, w, b, False, momentum, eps)
    yield "instance alone", lambda m: m.instance_norm(x, None, None, w, b, True, momentum, eps)
    yield "group", lambda m: m.group_norm(x, 4, w, b, eps)


def like_torch(**change: Any) -> None:
    for name, call in calls_of_norms(**{"x": X2, **change}):
        got, want = outcome(call, ops), outcome(call, F)
        if isinstance(got, Tensor) and not got.numel() and not isinstance(want, Tensor):
            assert want[0] is IndexError and got.shape == change["x"].shape  # torch selects from an empty batch
        elif isinstance(want, Tensor) and want.device.type == "meta":
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
        else:
            same(got, want), name


@pytest.mark.parametrize("name", INPUTS)
def test_norms_of_odd_inputs(name: str) -> None:
    like_torch(x=INPUTS[name])
    like_torch(x=INPUTS[name], w=None, b=None, mean=None, var=None)


@pytest.mark.parametrize("argument", ["w", "b", "mean", "var"])
@pytest.mark.parametrize("name", VECTORS)
def test_norms_with_odd_vectors(name: str, argument: str) -> None:
    like_torch(**{argument: VECTORS[name]})


@pytest.mark.parametrize("argument", ["eps", "momentum"])
@pytest.mark.parametrize("k", range(len(ODD_NUMBERS)))
def test_norms_with_odd_numbers(k: int, argument: str) -> None:
    for x in (X2, X2[:1], X1):
        like_torch(x=x, **{argument: ODD_NUMBERS[k]})


def test_odd_numbers_of_groups() -> None:
    for value in [*NUMBERS.values(), 3, 16, 17, 2**31, 2**62, 2**63 - 1, -(2**63)]:
        same(outcome(ops.group_norm, X2, value, V, M), outcome(F.group_norm, X2, value, V, M))


def test_odd_calls_have_their_epilogue() -> None:
    """What torch's own function ran is followed by residual and activation all the same."""
    for x, eps in ((X2, 0.0), (X2[:1], 0.0), (X2[:, :, :0], 1e-5)):
        want = torch.tanh(F.instance_norm(x, eps=eps) + x)
        torch.testing.assert_close(ops.instance_norm(x, eps=eps, residual=x, activation="tanh"), want)
    module = nn.InstanceNorm2d(16, eps=0.0)
    torch.testing.assert_close(ops.instance_norm(X2[:1], eps=0.0), module(X2[:1]))


# --- a residual of another dtype --------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z, "relu": F.relu, "silu": F.silu, "mish": F.mish,
    "prelu": lambda z: F.prelu(z, torch.full((8,), 0.25, dtype=z.dtype)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*PAIRS, "batch_norm", "group_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_residual_under_autocast(activation: str, dtype: torch.dtype, name: str) -> None:
    """Result and gradients are those of ``act(f(x) + residual)``: dtype, and rounding where it is in float32."""
    torch.manual_seed(0)
    if name in PAIRS:
        x, w = operands(name)
        w = w * 0.1
        ours, theirs = (lambda m, k=k, **more: PAIRS[name][k](m, w, **more) for k in (0, 1))
    else:
        x = X2[:, :8].bfloat16()
        args = (None, None, None, None, True) if name == "batch_norm" else (4,)
        ours, theirs = (lambda t, m=m, **more: getattr(m, name)(t, *args, **more) for m in (ops, F))
    more = dict(activation=activation, activation_param=torch.full((8,), 0.25)) if activation == "prelu" else {}
    with torch.autocast("cpu", torch.bfloat16):
        bare = theirs(x)
        r = torch.randn(bare.shape).to(dtype).requires_grad_()
        r2 = r.detach().clone().requires_grad_()
        want = ACTIVATIONS[activation](bare + r)
        got = ours(x, residual=r2, **{"activation": activation, **more})
    assert got.dtype == want.dtype and got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    if got.dtype == torch.float32:  # the sum is not rounded to bfloat16
        assert (got != got.bfloat16()).any()
    got.float().sum().backward()
    want.float().sum().backward()
    assert r2.grad is not None and r2.grad.dtype == dtype
    torch.testing.assert_close(r2.grad, r.grad, rtol=5e-2, atol=5e-2)


def test_scale_and_shift_beside_a_wide_residual() -> None:
    x, w = operands("conv_transpose2d")
    scale, shift = torch.rand(8) + 0.5, rand(8)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.conv_transpose2d(x, w)
        r = torch.randn(y.shape)
        want = F.relu(y * scale[:, None, None] + shift[:, None, None] + r)
        got = ops.conv_transpose2d(x, w, scale=scale, shift=shift, residual=r, activation="relu")
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-2, atol=2e-1)


def test_what_is_said_of_a_residual_that_does_not_fit() -> None:
    x, w = operands("conv2d")
    r = F.conv2d(x, w)
    with pytest.raises(ValueError, match=r"residual must be torch\.float32 on cpu like the input, got torch\.bfloat16"):
        ops.conv2d(x, w, residual=r.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(
            ValueError, match=r"residual must be floating point on cpu like the input, got torch\.int64"
        ):
            ops.conv2d(x, w, residual=r.long())
        assert ops.conv2d(x, w, residual=r).dtype == torch.float32
        with torch.autocast("cpu", enabled=False), pytest.raises(ValueError, match=r"must be torch\.float32 on cpu"):
            ops.conv2d(x, w, residual=r.double())


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_refuses_operands_that_it_would_not_read(gradient):
    x = torch.randn(1, 4, 5, 5, requires_grad=gradient)
    step = Step(None, Activation("relu"))
    with pytest.raises(ValueError, match="a residual"):
        run_step(step, Operands(x, residual=torch.ones(1, 4, 5, 5)))
    for name in ("mean", "var", "scale", "shift"):
        with pytest.raises(ValueError, match="norm's tensors"):
            run_step(step, Operands(x, **{name: torch.ones(4)}))
