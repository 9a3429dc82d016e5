"""Prove on first use, of the kernels of training: PyTorch's operators stand in for the one that is wrong, alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.activations import Activation
from cnnfast.gpu import guard, norm_act_backward
from cnnfast.gpu.norm_act_autograd import activation_backward
from cnnfast.gpu.norm_act_trial import activation_problem
from cnnfast.norms import Norm
from cnnfast.ops.run import run_step
from cnnfast.reference import Saved
from cnnfast.spec import ConvSpec, Precision
from cnnfast.step import Operands, Step, Upsample, norm_step, upsample_step

from ..norm_cases import NormCase, expect, spread
from ..tolerance import assert_close
from . import test_conv_wgrad as cases
from . import test_norm_act as norms
from .test_guard import cache, capture, forget, silent  # noqa: F401 (a fixture)

STEP = Step(ConvSpec.make(32, 32, 4, 2, 1))
WGRAD = "weight gradient of conv_transpose 32 -> 32, kernel 4x4, float16, wgrad "


@pytest.fixture(autouse=True)
def fresh(cache: Any) -> Any:  # noqa: F811
    a_new_process()
    yield
    a_new_process()


def a_new_process() -> None:
    from cnnfast.gpu import conv_wgrad, weight

    for cached in (conv_wgrad.prepare, weight._sum):
        cached.cache_clear()
    forget()
    norm_act_backward.forget()


Spoil = Callable[..., None]


@pytest.fixture
def spoil(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Launch a kernel (the weight gradient's where no other is named) with other compile-time constants than the right
    ones."""
    from cnnfast.gpu import conv_wgrad, norm_act_plan

    def change(kernel: str = "conv_wgrad_kernel", **constants: Any) -> None:
        real = conv_wgrad.Binary

        def binary(function: Any, values: dict[str, Any], **options: int) -> Any:
            other = constants if function.__name__ == kernel else {}
            return real(function, {**values, **other}, **options)

        for module in (norm_act_plan, conv_wgrad):
            monkeypatch.setattr(module, "Binary", binary)

    return change


@pytest.fixture
def starts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch of every launch of the weight gradient, trials included."""
    from cnnfast.gpu import conv_wgrad

    record: list[int] = []
    real = conv_wgrad._launch
    monkeypatch.setattr(conv_wgrad, "_launch", lambda a, *rest: (record.append(a.shape[0]), real(a, *rest))[1])
    return record


def lines(of: str) -> list[str]:
    return [line for line in guard.report() if line.startswith(of)]


def gradients(device: torch.device, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Of x and the weight through a training step, held against float64."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 32, 4, 3, generator=g), torch.randn(STEP.spec.weight_shape, generator=g) / 11
    dy = torch.randn(2, 32, 8, 6, generator=g)
    found = []
    for dtype, where in ((torch.float16, device), (torch.float64, "cpu"), (torch.float32, "cpu")):
        leaves = [t.half().type(dtype).to(where).requires_grad_() for t in (x, w)]
        if where == "cpu":
            y = torch.nn.functional.conv_transpose2d(*leaves, stride=2, padding=1)
        else:
            y = run_step(STEP, Operands(*leaves), backend=backend)
        found.append(torch.autograd.grad(y, leaves, dy.half().type(dtype).to(where)))
    for name, got, exact, near in zip(("x", "weight"), *found, strict=True):
        assert_close(got, exact, near.half(), name)
    return found[0]


# --- the weight gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", cases.PRECISIONS.values(), ids=cases.PRECISIONS)
@pytest.mark.parametrize("c", cases.REGIMES, ids=lambda c: c.name)
def test_right_weight_gradients_of_every_regime_pass(
    c: cases.Case, precision: Precision, device: torch.device, starts: list[int]
) -> None:
    with silent():
        cases.check(c, precision, device)
    (line,) = guard.report()
    assert line.startswith("weight gradient of conv") and line.endswith("right (checked)") and len(starts) == 2


@pytest.mark.parametrize("c", cases.GEOMETRY, ids=lambda c: c.name)
def test_right_weight_gradients_of_every_geometry_pass(c: cases.Case, device: torch.device) -> None:
    with silent():
        cases.check(c, cases.PRECISIONS["fp16"], device)
    assert guard.report()[0].endswith("right (checked)")


def test_a_right_weight_gradient_is_checked_once(device: torch.device, starts: list[int]) -> None:
    with silent():
        for _ in range(3):
            gradients(device)
        assert starts == [2] * 4 and lines(WGRAD)[0].endswith("right (checked)")
        a_new_process()
        gradients(device)
    assert starts == [2] * 5 and lines(WGRAD)[0].endswith("right (checked by an earlier process)")
    assert len(guard.report()) == 3, "the convolution, its input's and its weight's gradient"


WRONG = {"tap": {"PAD_H": 0}, "transposed": {"OUT_H": 1, "OUT_W": 4}, "dilation": {"DH": 2}}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_weight_gradient(name: str, device: torch.device, starts: list[int], spoil: Spoil) -> None:
    spoil(**WRONG[name])
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(3):
            gradients(device)
    assert starts == [2]
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(f"cnnfast: {WGRAD}") and text.endswith("PyTorch's operators run instead.")
    assert "the Triton kernel gave wrong results on " in text and "weight gradient: max error" in text
    assert all(line.endswith("right (checked)") for line in guard.report() if line not in lines(WGRAD))
    with pytest.raises(RuntimeError, match='backend="triton" cannot run this: the kernel gave wrong results on .*max'):
        gradients(device, "triton")


def test_a_weight_gradient_that_does_not_compile(device: torch.device, spoil: Spoil) -> None:
    spoil(BLOCK_K=48)
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(2):
            gradients(device)
    (warning,) = caught
    assert "the Triton kernel cannot run on " in str(warning.message) and "power of 2" in str(warning.message)
    with pytest.raises(guard.Refused, match='backend="triton" cannot run this: the kernel cannot run'):
        gradients(device, "triton")


def test_many_positions_are_a_short_sum(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of a trial is at few positions, of which none is at the edge by chance alone."""
    from cnnfast.gpu import conv_wgrad

    seen = []
    real = conv_wgrad._launch
    monkeypatch.setattr(conv_wgrad, "_launch", lambda a, b, *rest: (seen.append(b.cpu()), real(a, b, *rest))[1])
    c = cases.case("many", 32, 32, 4, 2, 1, size=(24, 20), batch=9)
    cases.check(c, cases.PRECISIONS["fp16"], device)
    trial, call = (b.permute(0, 2, 3, 1).ne(0).any(-1) for b in seen)
    assert call.all() and trial.sum((1, 2)).ne(0).nonzero().flatten().tolist() == [0, 2, 5, 8]
    assert 200 < trial.sum() < 320 and trial[0, 0, 0] and trial[8, -1, -1] and trial[5, 0, -1] and trial[2, -1, 0]


def test_a_capture_of_a_training_step_that_was_not_run(
    device: torch.device, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(monkeypatch, True)
    with pytest.warns(RuntimeWarning, match="call cnnfast.warmup first. The graph holds PyTorch's") as caught:
        gradients(device)
    assert len(caught) == 3 and not starts
    capture(monkeypatch, False)
    with silent():
        gradients(device)
    assert starts == [2, 2]


# --- norms and activations --------------------------------------------------------------------------------------------


def norm_calls(case: NormCase, dtype: torch.dtype, device: torch.device, backend: str = "auto") -> None:
    """Forward and backward of a norm, held against float64."""
    t = case.tensors(dtype, device)
    expect(case, t, spread(case, t, backend), str(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("case", norms.CASES, ids=lambda c: c.id)
def test_right_norms_pass(case: NormCase, dtype: torch.dtype, device: torch.device) -> None:
    with silent():
        norm_calls(case, dtype, device)
    forward, backward = guard.report()
    assert backward.startswith("gradient of ") and all(line.endswith("right (checked)") for line in (forward, backward))


@pytest.mark.parametrize("activation", norms.TABLE, ids=lambda a: f"{a.name}{a.params}")
def test_every_activation_passes(activation: Activation, device: torch.device) -> None:
    slopes = 20 if activation.name == "prelu" else 0
    with silent():
        norm_step(NormCase("all", Norm("batch"), activation, slopes=slopes), torch.float32, device)
    assert all(line.endswith("right (checked)") for line in guard.report())


NORM = NormCase("guarded", Norm("batch"), Activation("leaky_relu", (0.2,)), (3, 32, 5, 7))
FORWARD = "batch norm + leaky_relu of 32 channels, float32, one pass"


def test_right_norms_are_checked_once(device: torch.device, launches: list[str]) -> None:
    with silent():
        norm_calls(NORM, torch.float32, device)
        first = len(launches)
        norm_calls(NORM, torch.float32, device)
        assert first == 12 and len(launches) == 18
        a_new_process()
        norm_calls(NORM, torch.float32, device)
    assert len(launches) == 24
    forward, backward = guard.report()
    assert forward == f"{FORWARD}, cuda:0: right (checked by an earlier process)"
    assert backward.startswith(f"gradient of {FORWARD.split(',')[0]}")


BROKEN = {
    "statistics": ("partial_stats_kernel", {"C": 31}),
    "merge": ("merge_stats_kernel", {"C": 31}),
    "apply": ("norm_act_kernel", {"P0": 0.25}),
    "sums": ("grad_sums_kernel", {"P0": 0.25}),
    "finish": ("finish_sums_kernel", {"C": 31}),
    "gradient": ("grad_apply_kernel", {"VAR": True}),
    "does-not-compile": ("norm_act_kernel", {"ACT": "nonsense"}),
    "does-not-compile-back": ("grad_apply_kernel", {"BLOCK_C": 3}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_of_a_norm(name: str, device: torch.device, spoil: Spoil) -> None:
    kernel, constants = BROKEN[name]
    spoil(kernel, **constants)
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(2):
            norm_calls(NORM, torch.float32, device)
    (warning,) = caught
    said = "cannot run on " if "compile" in name else "gave wrong results on "
    assert f"the Triton kernel {said}" in str(warning.message)
    backward = kernel in ("grad_sums_kernel", "finish_sums_kernel", "grad_apply_kernel")
    (line,) = lines("gradient of batch norm" if backward else "batch norm")
    assert "PyTorch's operators run" in line
    assert [other.endswith("right (checked)") for other in guard.report() if other != line] == [True] * backward
    with pytest.raises(guard.Refused, match=f"the kernel {said}"):
        norm_calls(NORM, torch.float32, device, "triton")


@pytest.mark.parametrize("broken", [False, True])
def test_running_statistics_move_once(broken: bool, device: torch.device, spoil: Spoil) -> None:
    if broken:
        spoil("norm_act_kernel", P0=9.0)
    t = NORM.tensors(torch.float32, device)
    running = [torch.zeros(32).to(device), torch.ones(32).to(device)]
    how: dict[str, Any] = dict(training=True, activation="leaky_relu", activation_param=0.2)
    with pytest.warns(RuntimeWarning, match="wrong results") if broken else silent():
        y = cnnfast.ops.batch_norm(t.x, *running, t.weight, t.bias, **how)
    expected = [torch.zeros(32), torch.ones(32)]
    z = torch.nn.functional.batch_norm(t.x.cpu(), *expected, t.weight.cpu(), t.bias.cpu(), training=True)
    torch.testing.assert_close(y.cpu(), torch.nn.functional.leaky_relu(z, 0.2))
    for got, want in zip(running, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("kernel", ["", "merge_stats_kernel", "norm_act_kernel"])
def test_a_block_counts_its_batch_once(kernel: str, device: torch.device, spoil: Spoil) -> None:
    """With a trial ahead of it, and where PyTorch's operators stand in for the norm."""
    if kernel:
        spoil(kernel, **({"C": 31} if kernel == "merge_stats_kernel" else {"P0": 9.0}))
    step = replace(STEP, activation=Activation("leaky_relu", (0.2,)), norm=Norm("batch"))
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 32, 4, 3, generator=g), torch.randn(STEP.spec.weight_shape, generator=g) / 11
    mean, var, batches = torch.zeros(32), torch.ones(32), torch.tensor(4)
    u = torch.nn.functional.conv_transpose2d(x, w, stride=2, padding=1)
    z = torch.nn.functional.leaky_relu(torch.nn.functional.batch_norm(u, mean, var, training=True), 0.2)
    moved = [t.to(device) for t in (torch.zeros(32), torch.ones(32), batches.clone())]
    o = Operands(x.to(device), w.to(device), mean=moved[0], var=moved[1], batches=moved[2])
    with pytest.warns(RuntimeWarning, match="wrong results") if kernel else silent():
        y = run_step(step, o)
    torch.testing.assert_close(y.cpu(), z, rtol=1e-3, atol=1e-3)  # TF32
    for got, want in zip(moved, (mean, var, batches + 1), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("processes", [None, 3])
@pytest.mark.parametrize("given", [None, 1, 5, 300])
@pytest.mark.parametrize("norm", [Norm("batch"), Norm("group", 4)], ids=lambda n: n.kind)
def test_trials_of_known_and_of_shared_statistics(
    norm: Norm, given: int | None, processes: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics from a convolution's epilogue, in ``given`` parts; those of several processes, without a word to the
    others."""
    if processes and norm.kind != "batch":
        pytest.skip("only a batch norm is synchronised")
    from cnnfast import norm_sync
    from cnnfast.gpu import norm_act_autograd, norm_act_trial
    from cnnfast.norms import Partials

    monkeypatch.setattr(norm_sync, "shared", lambda norm, o: norm is not None and o.group is not None)
    monkeypatch.setattr(norm_act_trial.dist, "get_world_size", lambda group: processes)
    case = replace(NORM, norm=norm)
    t = case.tensors(torch.float32, device)
    running = [None, None] if norm.kind == "group" else [torch.zeros(32).to(device), torch.ones(32).to(device)]
    o = case.operands(t)._replace(mean=running[0], var=running[1], group=processes and object())
    segments = 1 if norm.kind == "batch" else 3
    shape = (segments, given or 0, 32)
    parts = None if given is None else Partials.empty(torch.empty(0).to(device), shape)
    for forward, right in (
        (norm_act_autograd.forward, True),
        (lambda *args: scaled(norm_act_autograd.forward(*args)), False),
    ):
        found = norm_act_trial.forward_problem(forward, case.step, o, parts, True, torch.float32)
        assert (found is None) is right, found
    assert all(v is None or torch.equal(v.cpu(), torch.full((32,), float(k))) for k, v in enumerate(running))
    done = norm_act_autograd.forward(case.step, o._replace(group=None), None, True, torch.float32)
    saved = Saved(t.x, t.weight, t.bias, None, done.mean, done.var, None)
    need = (True, True, True, False, False)
    assert norm_act_trial.backward_problem(t.grad, saved, case.step, True, need, processes is not None) is None


def scaled(done: Any) -> Any:
    return done._replace(y=done.y * 1.001)


@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_of_an_activation(
    bias: bool, device: torch.device, spoil: Spoil, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    y, grad = (torch.randn(2, 32, 5, 4, generator=g).tanh() for _ in range(2))

    def run(backend: str = "auto") -> None:
        dz, db = activation_backward(
            grad.to(device), y.to(device), Activation("tanh"), bias=bias, required=backend == "triton"
        )
        torch.testing.assert_close(dz.cpu(), grad * (1 - y * y))
        assert (db is not None) is bias
        if db is not None:
            torch.testing.assert_close(db.cpu(), (grad * (1 - y * y)).sum((0, 2, 3)))

    with silent():
        run()
    assert guard.report()[0].startswith("gradient of tanh of 32 channels, float32")
    a_new_process()
    spoil("act_backward_kernel", ACT="relu")
    monkeypatch.setattr(guard.store, "get", lambda *key: None)
    with pytest.warns(RuntimeWarning, match="gradient of tanh of 32 channels.* gave wrong results .*: gradient: max"):
        run()
    with pytest.raises(guard.Refused, match="gave wrong results"):
        run("triton")


# --- the summed weight of an upsampling -------------------------------------------------------------------------------

UPSAMPLED = upsample_step(32, 32, (3, 3), Upsample((2, 2), (1, 1)))


def weight_gradient_of_upsampled(device: torch.device, backend: str = "auto") -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 32, 4, 3, generator=g).half(), (torch.randn(32, 32, 3, 3, generator=g) / 11).half()
    dy = torch.randn(2, 32, 8, 6, generator=g).half()
    leaf = w.to(device).requires_grad_()
    y = run_step(UPSAMPLED, Operands(x.to(device), leaf), backend=backend)
    (dw,) = torch.autograd.grad(y, leaf, dy.to(device))
    found = []
    for wide in (torch.float64, torch.float32):
        leaf = w.type(wide).requires_grad_()
        y = torch.nn.functional.conv2d(torch.nn.functional.interpolate(x.type(wide), scale_factor=2), leaf, padding=1)
        found.append(torch.autograd.grad(y, leaf, dy.type(wide))[0])
    assert_close(dw, found[0], found[1].half())


def test_right_sums_of_weights_are_checked_once(device: torch.device) -> None:
    with silent():
        for _ in range(2):
            weight_gradient_of_upsampled(device)
    for what in ("summed weight of upsample + conv 32 -> 32, kernel 3x3, float16", "gradient of the summed weight of"):
        (line,) = lines(what)
        assert line.endswith("right (checked)")


@pytest.mark.parametrize("back", [False, True])
def test_a_wrong_sum_of_weights(back: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnfast.gpu import weight

    real = weight._sum

    @functools.lru_cache
    def first_term_only(*args: Any) -> Any:
        g = real(*args)
        table = g.table.clone()
        table[:, 1:] = -1
        return replace(g, table=table) if args[-1] is back else g

    monkeypatch.setattr(weight, "_sum", first_term_only)
    with pytest.warns(RuntimeWarning, match="summed weight of .* gave wrong results") as caught:
        for _ in range(2):
            weight_gradient_of_upsampled(device)
    assert len(caught) == 1
    with pytest.raises(guard.Refused, match="weight: max error"):
        weight_gradient_of_upsampled(device, "triton")


# --- telling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["weight gradient", "norm"])
def test_explain_names_failures_of_gradients(what: str, device: torch.device, spoil: Spoil) -> None:
    if what == "norm":
        spoil("grad_apply_kernel", P0=9.0)
    else:
        spoil(**WRONG["tap"])
    layers = nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.LeakyReLU(0.2), nn.Conv2d(32, 16, 3, padding=1)
    model = cnnfast.Sequential(*layers).to(device)
    with cnnfast.backend("triton"):
        y = model(torch.randn(2, 32, 4, 3).to(device))
        with pytest.raises(guard.Refused, match="wrong results"):
            y.square().mean().backward()
    first, second = model.explain().splitlines()
    if what == "norm":
        assert "the kernel of the gradient of batch norm + leaky_relu of 32 channels, float32, two passes" in first
        assert "gradient of" not in second
    else:
        expected = "fused, but PyTorch's operators run: the kernel of the weight gradient of conv 32 -> 16, kernel 3x3"
        assert expected in second and "gradient of" not in first


def test_which_kernels_concern_a_step() -> None:
    from cnnfast.gpu.conv_wgrad import WeightGradient
    from cnnfast.gpu.guard import NormPass

    step = replace(STEP, activation=Activation("relu"))
    other = Step(ConvSpec.make(32, 32, 3, 2, 1))
    adjoint = Step(STEP.spec.adjoint((4, 3)))
    assert all(kernel.concerns(step) for kernel in (step, STEP, adjoint, WeightGradient(STEP.spec)))
    assert not any(kernel.concerns(other) for kernel in (step, STEP, adjoint, WeightGradient(STEP.spec)))
    tail = norm_step(Norm("batch"), False, Activation("relu"))
    assert NormPass("", tail, 32).concerns(step) and not NormPass("", tail, 16).concerns(step)


# --- ahead of time ----------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A training step with everything that must be as before after a warm-up."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.register_buffer("steps", torch.zeros(()))
        self.seen: list[tuple[int, bool]] = []

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> dict[str, torch.Tensor]:
        self.seen.append((x.shape[0], x.requires_grad))
        self.steps = self.steps + 1
        return {"y": self.body(x) * gain}


@pytest.mark.parametrize("fails", [False, True])
def test_warmup_of_a_training_step_leaves_no_trace(fails: bool) -> None:
    torch.manual_seed(0)
    model, x = Noisy(), torch.randn(2, 4, 3, 3, requires_grad=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    if fails:
        model.body[0].weight.register_hook(lambda grad: 1 / 0)
    generator, steps = torch.get_rng_state(), model.steps
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(ZeroDivisionError))
        cnnfast.warmup(model, x, 2.0, batch_sizes=(1, 3), backward=True)
    assert model.seen == [(2, True), (1, True), (3, True)][: 1 if fails else 3]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.steps is steps and torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters()) and x.grad is None


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(STEP.spec.weight_shape) / 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cnnfast.ops.conv_transpose2d(x, self.weight, None, 2, 1, activation="tanh", backend="triton")


def test_a_capture_after_the_warmup_of_a_training_step(
    device: torch.device, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Fused().half().to(device)
    x = torch.randn(2, 32, 4, 3).half().to(device).requires_grad_()
    cnnfast.warmup(model, x, backward=True)
    assert model.weight.grad is None and all("right (checked)" in line for line in guard.report())
    capture(monkeypatch, True)
    monkeypatch.setattr(guard, "first_use", None)
    launches.clear()
    with silent():
        model(x).backward(torch.ones(2, 32, 8, 6).half().to(device))
    assert len([name for name in launches if name.startswith("wgrad")]) == 1 and model.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu"])
def test_an_activation_with_a_bias_passes_its_trial(device: torch.device, name: str, dtype: torch.dtype) -> None:
    """A bias's gradient sums what was stored, thousands of roundings to the dtype."""
    grad = torch.empty(2, 16, 24, 24, dtype=dtype, device=device)
    assert activation_problem(grad, torch.empty_like(grad), Activation(name), True) is None
