"""ops.norm_act, batch_norm, instance_norm, group_norm and steps without a convolution: derivatives, torch's behaviour,
errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast
from cnnfast import dispatch, ops
from cnnfast.activations import ACTIVATIONS, Activation
from cnnfast.gpu.norm_act_autograd import activation_backward, activation_backward_by_torch
from cnnfast.norms import Norm
from cnnfast.ops.run import run_step
from cnnfast.reference import composition
from cnnfast.step import Operands, norm_step

from ..norm_cases import NormCase, expect, of_every_kind, spread
from ..tolerance import assert_close

NORMS = of_every_kind(Norm("batch"), Norm("instance"), Norm("group", 2), Norm("affine"))
TABLE = [Activation(name) for name in ACTIVATIONS] + [Activation("leaky_relu", (-0.3,)), Activation("elu", (-0.5,))]
RELU, TANH = Activation("relu"), Activation("tanh")


def double(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("size", [(512, 512), (300, 211), (5, 7)], ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_statistics_of_large_channels_last_maps(size: tuple[int, int], affine: bool) -> None:
    """As exact as of NCHW, which an InstanceNorm module converts to, whatever the mean."""
    torch.manual_seed(0)
    x = torch.rand(1, 5, *size) * torch.tensor([1, 1, 0.1, 1e-3, 5]).view(-1, 1, 1) + torch.arange(5).view(-1, 1, 1)
    vectors = (torch.rand(5) + 0.5, torch.rand(5)) if affine else (None, None)
    wide = [None if v is None else v.double() for v in vectors]
    expected = F.instance_norm(x.double(), weight=wide[0], bias=wide[1])
    eager = F.instance_norm(x, weight=vectors[0], bias=vectors[1])
    channels_last = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        found = ops.instance_norm(channels_last, None, None, *vectors)
    assert (found - expected).abs().max() <= 2 * (eager - expected).abs().max()
    assert_close(found, expected, eager)
    network = [nn.Upsample(scale_factor=2), nn.Conv2d(5, 5, 3, 1, 1, bias=False), nn.InstanceNorm2d(5)]
    with torch.inference_mode():
        found = cnnfast.Sequential(*network).eval()(channels_last)
        eager = nn.Sequential(*network).eval()(x)
        expected = nn.Sequential(*network).eval().double()(x.double())
    assert_close(found, expected, eager)


# --- derivatives on the reference path --------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", TABLE, ids=str)
@pytest.mark.parametrize("kind", [*NORMS, "eval", None], ids=str)
def test_gradcheck(kind: str | None, activation: Activation) -> None:
    """First and second derivatives in float64, with residual, for every norm and activation."""
    c = 4
    x, residual = double(2, c, 2, 3), double(2, c, 2, 3, seed=1)
    weight, bias, slope = (
        double(c, seed=2),
        double(c, seed=3),
        (double(c, seed=4).detach().abs() + 0.1).requires_grad_(),
    )
    running = (
        (torch.zeros(c, dtype=torch.float64), torch.ones(c, dtype=torch.float64)) if kind == "eval" else (None,) * 2
    )

    def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
        norm = None if kind is None else NORMS.get(kind, Norm("running"))
        s, vectors = slope if activation.name == "prelu" else None, (None, None) if kind is None else (weight, bias)
        o = Operands(x, None, None, *running, *vectors, residual, s)  # type: ignore[arg-type]
        return run_step(norm_step(norm, True, activation), o, channels_last=False, backend="aten")

    inputs = (x, residual, weight, bias, slope)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# --- second derivatives on the kernels --------------------------------------------------------------------------------


def second(t: Any, run: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Gradients of a combination of the gradients of the input and the weight: what a gradient penalty takes."""
    leaves = {n: v.requires_grad_() for n, v in t.leaves().items()}
    dx, dw = torch.autograd.grad(run(t), [leaves["x"], leaves["weight"]], t.grad, create_graph=True)
    with torch.no_grad():
        of_dx, of_dw = torch.roll(t.grad, 1, 0), torch.roll(t.weight, 1, 0)
    grads = torch.autograd.grad((dx, dw), list(leaves.values()), (of_dx, of_dw), allow_unused=True)
    return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(leaves.items(), grads, strict=True)}


SECOND = [
    NormCase(
        f"second-{kind}-{a}{'-residual' * r}",
        norm,
        Activation(a),
        (3, 24, 6, 5),
        residual=r,
        slopes=24 * (a == "prelu"),
    )
    for (kind, norm), (a, r) in itertools.product(
        [
            ("batch", Norm("batch")),
            ("instance", Norm("instance")),
            ("group", Norm("group", 3)),
            ("affine", Norm("affine")),
        ],
        [("tanh", False), ("tanh", True), ("silu", True), ("prelu", False), ("relu", True)],
    )
] + [NormCase("second-eval", Norm("batch"), TANH, (3, 24, 6, 5), measured=False)]


@pytest.mark.parametrize("case", SECOND, ids=lambda c: c.id)
def test_second_derivatives_on_the_kernels(case: NormCase, device: torch.device, launches: list[str]) -> None:
    """As those of PyTorch's own operators in float64."""

    def through(backend: str) -> Callable[[Any], Tensor]:
        def run(t: Any) -> Tensor:
            return run_step(case.step, case.operands(t), channels_last=True, backend=backend)

        return run

    got = second(case.tensors(torch.float32, device), through("triton"))
    assert "norm-apply" in launches
    cpu = case.tensors(torch.float32, "cpu")
    exact = second(cpu.map(lambda v: v.detach().double()), through("aten"))
    yardstick = second(cpu, through("aten"))
    for name, value in got.items():
        assert_close(value, exact[name], yardstick[name], f"{case.id}: {name}")


def test_residual_that_the_input_was_made_of(device: torch.device) -> None:
    """Nothing is counted twice where the norm's input, weight and residual depend on each other."""
    results = []
    wide, narrow = torch.float64, torch.float32
    for backend, dtype, where in (("triton", narrow, device), ("aten", wide, "cpu"), ("aten", narrow, "cpu")):
        r = double(2, 4, 3, 3).detach().type(dtype).to(where).requires_grad_()
        x = r * r + 1
        weight = x.mean((0, 2, 3))
        step = norm_step(Norm("batch"), True, Activation("silu"))
        y = run_step(step, Operands(x, scale=weight, residual=r), channels_last=True, backend=backend)
        (g,) = torch.autograd.grad(y.square().sum(), r, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), r)[0])
    assert_close(*results)


# --- gradients of odd layouts, and where only some are wanted ---------------------------------------------------------


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_expanded_and_strided_gradients(residual: bool, last: bool, device: torch.device) -> None:
    case = NormCase("strided", Norm("batch"), TANH, (2, 8, 4, 6), residual=residual, y_last=last)
    t = case.tensors(torch.float32, device)
    for grad in (
        torch.ones(1, device=device).expand(2, 8, 4, 6),
        torch.randn(2, 8, 4, 1, device=device).expand(2, 8, 4, 6),
        torch.randn(6, 4, 8, 2, device=device).permute(3, 2, 1, 0),
        torch.randn(2, 8, 8, 6, device=device)[:, :, ::2],
    ):
        t.grad = grad
        expect(case, t, spread(case, t, "triton"), str(grad.stride()))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual", "slope"])
def test_one_gradient_alone(wanted: str, device: torch.device, launches: list[str]) -> None:
    case = NormCase("alone", Norm("batch"), Activation("prelu"), residual=True, slopes=20)
    t, whole = case.tensors(torch.float32, device), case.tensors(torch.float32, device)
    all_of_them = spread(case, whole, "triton")
    launches.clear()
    leaf = t.leaves()[wanted].requires_grad_()
    y = run_step(case.step, case.operands(t), channels_last=True, backend="triton")
    (grad,) = torch.autograd.grad(y, leaf, t.grad)
    assert torch.equal(grad, all_of_them[wanted])
    backward = [name for name in launches if "grad" in name]
    sums = ["norm-grad-sums", "norm-grad-finish"]
    assert backward == {"x": [*sums, "norm-grad-apply"], "residual": ["norm-grad-apply"]}.get(wanted, sums)


def test_input_of_any_strides(device: torch.device) -> None:
    case = NormCase("input", Norm("group", 2), RELU, (2, 8, 4, 6))
    t = case.tensors(torch.float32, device)
    t.x = t.x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    expect(case, t, spread(case, t, "triton"), "transposed")
    t.x = torch.cat([t.x.detach()] * 2, 1)[:, ::2].detach()
    expect(case, t, spread(case, t, "triton"), "sliced")


# --- torch's behaviour ------------------------------------------------------------------------------------------------


def calls() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Any, ...]]]:
    return {
        "batch": (ops.batch_norm, F.batch_norm, (None, None, None, None, True)),
        "instance": (ops.instance_norm, F.instance_norm, ()),
        "group": (ops.group_norm, F.group_norm, (2,)),
    }


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("batch", (1, 4)), ("batch", (1, 4, 1)), ("batch", (1, 4, 1, 1)), ("instance", (3, 4)),
        ("instance", (3, 4, 1, 1)), ("group", (1, 2, 1, 1)), ("group", (1, 2)), ("group", (2, 3, 5)), ("group", (4,)),
        ("batch", (4,)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_errors_of_shapes_are_torchs(kind: str, shape: tuple[int, ...], backend: str) -> None:
    ours, theirs, args = calls()[kind]
    with pytest.raises(Exception) as expected:  # noqa: B017, PT011
        theirs(torch.ones(shape), *args)
    with pytest.raises(type(expected.value)) as got:
        ours(torch.ones(shape), *args, backend=backend)
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(), dict(running_mean=torch.zeros(3), running_var=torch.ones(3)),
        dict(training=True, weight=torch.ones(3)), dict(training=True, bias=torch.ones(5)),
    ],
    ids=str,
)  # fmt: skip
def test_errors_of_arguments_are_torchs(arguments: dict[str, Any]) -> None:
    full = {"running_mean": None, "running_var": None, **arguments}
    with pytest.raises(Exception) as expected:  # noqa: B017, PT011
        F.batch_norm(torch.ones(2, 4, 3, 3), **full)
    with pytest.raises(type(expected.value)) as got:
        ops.batch_norm(torch.ones(2, 4, 3, 3), **full)
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize(("training", "eps"), [(True, 0.0), (True, -1.0), (False, -1.0)])
def test_eps_that_is_an_error_is_torchs_too(training: bool, eps: float) -> None:
    """PyTorch 2.11 says less of what it allows, so the words are compared around that."""
    x, mean, var = torch.ones(2, 4, 3, 3), torch.zeros(4), torch.ones(4)
    for function in (F.batch_norm, ops.batch_norm):
        with pytest.raises(ValueError, match=f"^batch_norm eps must be .*, but got {eps}$"):
            function(x, mean, var, training=training, eps=eps)
    assert (mean == 0).all() and (var == 1).all()


def test_our_own_errors() -> None:
    x = torch.randn(2, 4, 3, 3)
    for text, kind, call in (
        ("unknown norm", ValueError, lambda: Norm("layer")),
        ("groups=0 must be positive", ValueError, lambda: Norm("group", 0)),
        ("unknown activation", ValueError, lambda: ops.batch_norm(x, None, None, training=True, activation="swoosh")),
        ("prelu needs activation_param", ValueError, lambda: ops.instance_norm(x, activation="prelu")),
        ("residual must have the output's shape", ValueError, lambda: ops.group_norm(x, 2, residual=x[:1])),
        ("unknown backend", ValueError, lambda: ops.group_norm(x, 2, backend="cuda")),
        ("takes a norm of kind 'batch'", ValueError, lambda: ops.norm_act(x, Norm("group"), process_group=object())),
        ("input must be a tensor", TypeError, lambda: ops.norm_act([1.0], Norm("batch"))),
        ("shape \\(4,\\)", ValueError, lambda: ops.norm_act(x, Norm("affine"), torch.ones(3))),
    ):
        with pytest.raises(kind, match=text):
            call()


def test_triton_says_why_not(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="cannot run this: dtype torch.float64"):
        ops.batch_norm(torch.randn(2, 4, 3, 3, dtype=torch.float64), None, None, training=True, backend="triton")
    with pytest.raises(RuntimeError, match="cannot run this: the input has shape"):
        ops.batch_norm(torch.randn(2, 4, 3, 3, 3, 1), None, None, training=True, backend="triton")


@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_five_dimensions_norm_by_torch(kind: str) -> None:
    ours, theirs, args = calls()[kind]
    x = torch.randn(2, 4, 3, 3, 3)
    torch.testing.assert_close(ours(x, *args, activation="relu"), theirs(x, *args).relu())


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_empty_inputs(kind: str, shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    """As torch has them: an empty result, empty gradients, running statistics untouched."""
    ours, theirs, args = calls()[kind]
    weight = torch.ones(4, requires_grad=True)
    x = torch.empty(shape, requires_grad=True)
    if kind == "instance" and len(shape) == 2:
        return
    want = theirs(x, *args[: -3 if kind == "batch" else None], *((weight, None, True) if kind == "batch" else ()))
    xd = x.detach().to(device).requires_grad_()
    y = ours(xd, *args, backend=backend, activation="relu")
    assert y.shape == want.shape and y.numel() == 0
    y.sum().backward()
    assert xd.grad is not None and xd.grad.shape == shape
    if kind == "batch":
        running = torch.full((4,), 3.0, device=device), torch.full((4,), 2.0, device=device)
        ops.batch_norm(xd.detach(), *running, training=True, backend=backend)
        assert all((v == first).all() for v, first in zip(running, (3.0, 2.0), strict=True))


@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 7), (2, 5, 4, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_public_functions_equal_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """On a CPU to the bit, in two to four dimensions, strides included; gradients too."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).type(dtype)
    weight, bias = torch.randn(5), torch.randn(5)
    for kind, (ours, theirs, _) in calls().items():
        if kind == "instance" and len(shape) == 2:
            continue
        args = {
            "batch": (None, None, weight, bias, True),
            "instance": (None, None, weight, bias),
            "group": (5, weight, bias),
        }
        results = []
        for function, more in ((ours, {"activation": "leaky_relu"}), (theirs, {})):
            leaf = x.clone().requires_grad_()
            y = function(leaf, *args[kind], **more)
            y = y if more else F.leaky_relu(y)
            y.sum().backward()
            results.append((y, leaf.grad))
        assert results[0][0].stride() == results[1][0].stride()
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), kind


def test_any_dtype_of_vectors_on_the_cpu() -> None:
    """What PyTorch does not combine is computed in the widest dtype; running tensors keep theirs."""
    x = torch.randn(3, 4, 5, 5).bfloat16()
    weight = torch.randn(4).half().requires_grad_()
    running = torch.zeros(4, dtype=torch.float16), torch.ones(4)
    y = ops.batch_norm(x, *running, weight, None, True)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad is not None and weight.grad.dtype == torch.float16
    want = torch.zeros(4), torch.ones(4)
    torch.testing.assert_close(y, F.batch_norm(x.float(), *want, weight.detach().float(), None, True).bfloat16())
    torch.testing.assert_close(running[0], want[0].half())
    torch.testing.assert_close(running[1], want[1])


@pytest.mark.parametrize("name", [n for n, row in ACTIVATIONS.items() if n != "prelu"])
def test_in_place_activations_do_not_disturb_the_gradient(name: str) -> None:
    """The activation that overwrites the norm's result leaves what the backward needs."""
    for norm in NORMS.values():
        x, r = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3, requires_grad=True)
        for residual in (None, r):
            y = ops.norm_act(x, norm, residual=residual, activation=name)
            z = composition(norm, Operands(x))
            z = Activation(name)(z if residual is None else z + residual)
            torch.testing.assert_close(y, z)
            torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(z.sum(), x))
    leaf = torch.randn(2, 4, 3, 3, requires_grad=True)
    kept = leaf.detach().clone()
    run_step(norm_step(None, False, Activation(name)), Operands(leaf), channels_last=False, backend="aten")
    assert torch.equal(leaf.detach(), kept)


def test_eval_mode_owes_gradients_to_weight_and_bias() -> None:
    running = torch.randn(4), torch.rand(4) + 0.5
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 4, 3, 3), (4,), (4,)))
    kept = [v.clone() for v in running]
    grads = [
        torch.autograd.grad(f(x, *running, weight, bias, False).tanh().sum(), (x, weight, bias))
        for f in (ops.batch_norm, F.batch_norm)
    ]
    torch.testing.assert_close(*grads)
    assert all(torch.equal(a, b) for a, b in zip(running, kept, strict=True))


def test_autocast_dtypes_are_torchs() -> None:
    x = torch.randn(2, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs, args in calls().values():
            for dtype in (torch.float32, torch.bfloat16):
                assert ours(x.type(dtype), *args).dtype == theirs(x.type(dtype), *args).dtype


@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_autocast_on_the_device(kind: str, device: torch.device) -> None:
    """CUDA's autocast runs group norms in float32, and their result is float32; the other norms keep the dtype."""
    if device.type != "cuda":
        pytest.skip("CUDA's list")
    ours, theirs, args = calls()[kind]
    x = torch.randn(2, 4, 3, 3).type(torch.float16)
    leaf = x.to(device).requires_grad_()
    with torch.autocast("cuda", torch.float16):
        y = ours(leaf, *args, backend="triton", activation="relu")
    assert y.dtype == (torch.float32 if kind == "group" else torch.float16)
    y.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.float16
    want = theirs(x.double(), *args).relu()
    yardstick = theirs(x.float(), *args).relu()
    assert_close(y, want, yardstick.type(y.dtype), kind)


# --- the activation's backward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["identity", "relu", "tanh", "silu"])
@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
def test_activation_backward(
    name: str, dtype: torch.dtype, last: bool, device: torch.device, launches: list[str], poison: None
) -> None:
    activation = Activation(name)
    g = torch.Generator().manual_seed(5)
    grad, x = (torch.randn(3, 10, 5, 7, generator=g).type(dtype) for _ in range(2))
    saved = {"y": activation(x), "x": x, "": None}[activation.saves()]
    fmt = torch.channels_last if last else torch.contiguous_format
    tensors = [None if t is None else t.contiguous(memory_format=fmt).to(device) for t in (grad, saved)]
    assert tensors[0] is not None
    dz, db = activation_backward(tensors[0], tensors[1], activation, bias=True, required=True)
    assert launches == ["activation-grad", "norm-grad-finish"]
    without, none = activation_backward(tensors[0], tensors[1], activation, bias=False, required=True)
    assert none is None and torch.equal(without, dz) and db is not None
    results = []
    for wide in (torch.float64, torch.float32):
        pair = activation_backward_by_torch(
            grad.type(wide), None if saved is None else saved.type(wide), activation, bias=True
        )
        results.append(pair)
    (dz64, _), (dz32, _) = results
    assert_close(dz, dz64, dz32.type(dtype), f"{name}: dz")
    stored = dz.cpu().type(torch.float64)
    assert_close(db, stored.sum((0, 2, 3)), stored.float().sum((0, 2, 3)), f"{name}: bias gradient")


def test_backend_of_the_context(device: torch.device, launches: list[str]) -> None:
    x = torch.randn(2, 4, 3, 3, device=device)
    with dispatch.backend("triton"):
        ops.instance_norm(x)
    assert launches == ["norm-statistics", "norm-merge", "norm-apply"]
    launches.clear()
    ops.instance_norm(x, backend="aten")
    assert not launches


@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
@pytest.mark.parametrize("batch", [1, 3])
def test_channels_last_on_the_cpu(kind: str, batch: int) -> None:
    """In float64 the gradients are those of the elementary operations whichever way x and the gradient lie, and far
    from zero float32 keeps its digits: PyTorch's own functions fail one or the other for some layouts."""
    x, weight = double(batch, 4, 5, 6), double(4, seed=1)
    grad = double(batch, 4, 5, 6, seed=2).detach()
    last = torch.channels_last
    norm, step = NORMS[kind], norm_step(NORMS[kind])
    exact = torch.autograd.grad(composition(norm, Operands(x, scale=weight)), (x, weight), grad)
    for x_ in (x, x.contiguous(memory_format=last)):
        for grad_ in (grad, grad.contiguous(memory_format=last)):
            y = run_step(step, Operands(x_, scale=weight), channels_last=True, backend="aten")
            torch.testing.assert_close(torch.autograd.grad(y, (x, weight), grad_), exact)
    far = (x.detach() * 0.1 + 1000).float().contiguous(memory_format=last)
    y = run_step(step, Operands(far), channels_last=True, backend="aten")
    assert (y - composition(norm, Operands(far.double()))).abs().max() < 0.01
