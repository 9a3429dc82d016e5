"""cnnfast.Sequential in training: forward, backward, second derivatives and bookkeeping against nn.Sequential."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cnnfast
from cnnfast.cpu import inference
from cnnfast.nn import chain

from ..tolerance import assert_close
from .test_sequential import stack_profile, stacks

CL = torch.channels_last


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kind of norm of every fused step that ran, in order ("" where it measures nothing)."""
    ran: list[str] = []
    real = chain.run_step

    def spy(step, operands, **kwargs):  # type: ignore[no-untyped-def]
        ran.append(step.norm.kind if step.measured else "")
        return real(step, operands, **kwargs)

    monkeypatch.setattr(chain, "run_step", spy)
    return ran


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` with norm weights and statistics that matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if t.dim() != 1 or not t.is_floating_point():
                continue
            if name.endswith(("weight", "running_var")):
                t.copy_(torch.rand(t.shape, generator=g) + 0.5)
            else:
                t.copy_(torch.randn(t.shape, generator=g) * 0.3)
    return module


def real_strides(t: Tensor) -> list[int]:
    """Strides of the dimensions that have more than one element: the others mean nothing."""
    return [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


# --- one step against eager -------------------------------------------------------------------------------------------


def loss_of(y: Tensor) -> Tensor:
    """A sum with weights that no norm cancels, in float32 at least."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    g = torch.Generator().manual_seed(7)
    return (wide * torch.randn(y.shape, generator=g, dtype=torch.float64).to(wide.dtype)).sum()


def outcome(
    model: nn.Sequential, x: Tensor, autocast: torch.dtype | None, second: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a training step makes: (values to compare by the tolerance rule, ones that are equal)."""
    torch.manual_seed(0)  # what dropout draws
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x * 1)  # not a leaf, as in the middle of a model
    (dx,) = torch.autograd.grad(loss_of(y), x, create_graph=second, retain_graph=True)
    (dx.float() if dx.dtype != torch.float64 else dx).square().sum().add(loss_of(y)).backward() if second else loss_of(
        y
    ).backward()
    values, exactly = {"y": y.detach(), "dx": dx.detach()}, {}
    values |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, b in model.named_buffers():
        (values if b.is_floating_point() else exactly)[name] = b
    return values, exactly


TWICE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.Conv2d,
    nn.ConvTranspose1d: nn.ConvTranspose2d,
    nn.BatchNorm1d: nn.BatchNorm2d,
    nn.InstanceNorm1d: nn.InstanceNorm2d,
}


def eager_forms(plain: nn.Sequential) -> list[nn.Sequential]:
    """Models that compute the same in eager mode and round differently: in both memory formats; in two dimensions for
    one; with a BatchNorm for each InstanceNorm that normalises by running statistics."""
    changed = copy.deepcopy(plain)
    for m in changed.modules():
        m.__class__ = TWICE.get(type(m), type(m))
        if isinstance(m, nn.InstanceNorm2d) and m.track_running_stats and not m.training:
            m.__class__ = nn.BatchNorm2d
        if isinstance(m, nn.modules.conv._ConvNd) and m.weight.dim() == 3:
            m.weight = nn.Parameter(m.weight.detach().unsqueeze(2))
            for name, one in (
                ("kernel_size", 1),
                ("stride", 1),
                ("padding", 0),
                ("output_padding", 0),
                ("dilation", 1),
            ):
                setattr(m, name, (one, *getattr(m, name)))
    if any(p.dim() == 3 for p in plain.parameters()):
        changed = nn.Sequential(nn.Unflatten(2, (1, -1)), *changed, nn.Flatten(2))
    return [copy.deepcopy(f).to(memory_format=CL) for f in (plain, changed)]


def rounded_once(model: nn.Sequential, low: torch.dtype) -> nn.Sequential:
    """The convolutions under autocast by the tolerance rule's own words: float32 arithmetic on rounded operands, the
    result rounded once. (What ATen does in 16 bits, and how well, differs between processors.)"""

    def once(inner: nn.Module, parameters: dict[str, nn.Parameter]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                operands = {name: p.to(low).float() for name, p in parameters.items()}
                return torch.func.functional_call(inner, operands, (x.to(low).float(),)).to(low)

        return forward

    for m in model.modules():
        if isinstance(m, nn.modules.conv._ConvNd):
            m.forward = once(copy.deepcopy(m), dict(m.named_parameters()))  # type: ignore[method-assign]
    return model


def check(plain: nn.Sequential, x: Tensor, autocast: torch.dtype | None = None, second: bool = False) -> None:
    """A training step of cnnfast.Sequential is that of nn.Sequential: values by the tolerance rule against float64,
    integers, dtypes and strides exactly."""
    # Eager mode rounds differently in each form: the yardstick is the one that is further from float64.
    eager = [plain, *eager_forms(plain)]
    ours = cnnfast.Sequential(*copy.deepcopy(plain))
    got, got_exactly = outcome(ours, x, autocast, second)
    (want, want_exactly), *others = [outcome(copy.deepcopy(m), x, autocast, second) for m in eager]
    if autocast is not None:
        others.append(outcome(rounded_once(copy.deepcopy(plain), autocast), x, autocast, second))
    ref, _ = outcome(copy.deepcopy(plain).double(), x.double(), None, second)
    assert got.keys() == want.keys() and got_exactly == want_exactly
    for name, w, *forms in zip(want, want.values(), *(o.values() for o, _ in others), strict=True):
        assert real_strides(got[name]) == real_strides(w), (name, got[name].stride(), w.stride())
        candidates = [t.reshape(w.shape) for t in (w, *forms)]
        yardstick = max(candidates, key=lambda t, n=name: (t.double() - ref[n]).square().sum().item())
        assert_close(got[name], ref[name], yardstick, f"{name} of {plain}")
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and (p.grad.dtype, real_strides(p.grad)) == (q.dtype, real_strides(q))


def _norm(cls: type[nn.Module], *args: int, **kwargs: object) -> Callable[[int], nn.Module]:
    return lambda c: cls(*args, c, **kwargs)


# name -> a norm of c channels (2-D), the same in one dimension
NORMS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "none": (lambda c: nn.Identity(), lambda c: nn.Identity()),
    "sync": (_norm(nn.SyncBatchNorm), _norm(nn.SyncBatchNorm)),
    "group": (_norm(nn.GroupNorm, 4), _norm(nn.GroupNorm, 4)),
    "group-plain": (_norm(nn.GroupNorm, 2, affine=False, eps=0.1), _norm(nn.GroupNorm, 1, affine=False)),
    **{
        name: (_norm(two, **kwargs), _norm(one, **kwargs))
        for name, two, one, kwargs in (
            ("batch", nn.BatchNorm2d, nn.BatchNorm1d, {}),
            ("batch-plain", nn.BatchNorm2d, nn.BatchNorm1d, {"affine": False, "momentum": 1, "eps": 0.1}),
            ("batch-average", nn.BatchNorm2d, nn.BatchNorm1d, {"momentum": None}),
            ("batch-untracked", nn.BatchNorm2d, nn.BatchNorm1d, {"track_running_stats": False}),
            ("instance", nn.InstanceNorm2d, nn.InstanceNorm1d, {}),
            ("instance-affine", nn.InstanceNorm2d, nn.InstanceNorm1d, {"affine": True, "eps": 0.1}),
            ("instance-tracked", nn.InstanceNorm2d, nn.InstanceNorm1d, {"affine": True, "track_running_stats": True}),
            ("instance-still", nn.InstanceNorm2d, nn.InstanceNorm1d, {"track_running_stats": True, "momentum": None}),
        )
    },
}


def generator(norm: Callable[[int], nn.Module], train: bool = True) -> nn.Sequential:
    """Every kind of step, and every way in which an activation keeps what its derivative needs."""
    plain = nn.Sequential(
        nn.ConvTranspose2d(6, 8, 4, 2, 1),
        norm(8),
        nn.ReLU(inplace=True),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        norm(8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        norm(8),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(8, 3, 3, 1, 1),
        nn.Tanh(),
    )
    return randomized(plain).train(train)  # type: ignore[return-value]


def x2d(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape or (3, 6, 5, 4), generator=torch.Generator().manual_seed(seed))


KINDS = {"batch": "batch", "sync": "batch", "group": "group", "instance": "instance", "none": ""}


def kind(norm: str, train: bool) -> str:
    """What a fused step with this norm measures."""
    measured = (
        train or norm.startswith("group") or norm.endswith("untracked") or norm in ("instance", "instance-affine")
    )
    return KINDS[norm.partition("-")[0]] if measured else ""


def fused(norm: str, train: bool, cl: bool = False) -> list[str]:
    """What the fused steps of `generator` measure; on a CPU, modules of the plain convolution gain nothing in training,
    unless an InstanceNorm would convert to NCHW, a SyncBatchNorm refuse, or the statistics be less exact than those of
    eager mode, which are channels-last only with ``cl``."""
    better = norm.startswith("instance") or (norm == "sync" and train) or (kind(norm, train) and not cl)
    return [kind(norm, train)] * (3 if better else 2) + [""]


@pytest.mark.parametrize("cl", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_is_eagers(norm: str, train: bool, dtype: torch.dtype, cl: bool, steps: list[str]) -> None:
    memory_format = CL if cl else torch.contiguous_format
    plain = generator(NORMS[norm][0], train).to(dtype).to(memory_format=memory_format)
    check(plain, x2d().to(dtype).contiguous(memory_format=memory_format))
    assert steps == fused(norm, train, cl)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_one_dimension(norm: str, train: bool, steps: list[str]) -> None:
    n = NORMS[norm][1]
    plain = nn.Sequential(
        nn.ConvTranspose1d(6, 8, 4, 2, 1), n(8), nn.ReLU(), nn.Conv1d(8, 8, 5, padding=2), n(8), nn.LeakyReLU(0.1)
    )
    check(randomized(plain).train(train), x2d(4, 6, 17))  # type: ignore[arg-type]
    assert steps == [kind(norm, train)] * 2


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives(norm: str, train: bool, steps: list[str]) -> None:
    check(generator(NORMS[norm][0], train), x2d(), second=True)
    assert steps == fused(norm, train)


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "cl"), [(torch.bfloat16, False), (torch.float16, True)], ids=["bfloat16", "float16-channels-last"]
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_autocast(norm: str, train: bool, dtype: torch.dtype, cl: bool, steps: list[str]) -> None:
    memory_format = CL if cl else torch.contiguous_format
    plain = generator(NORMS[norm][0], train).to(memory_format=memory_format)
    check(plain, x2d().contiguous(memory_format=memory_format), autocast=dtype)
    assert steps == fused(norm, train, cl)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "leaky-in-place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "leaky-negative": lambda: nn.LeakyReLU(-0.5),
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.8),
    "prelu": nn.PReLU,
    "prelu-per-channel": lambda: nn.PReLU(8),
}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, norm: str, autocast: torch.dtype | None) -> None:
    make = ACTIVATIONS[name]
    stack = [nn.Conv2d(6, 8, 3, padding=1), NORMS[norm][0](8), make(), nn.ConvTranspose2d(8, 8, 3), make()]
    check(randomized(nn.Sequential(*stack)), x2d(), autocast=autocast, second=autocast is None)  # type: ignore[arg-type]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_of_mixed_dtypes(x_dtype: torch.dtype, weights: torch.dtype, steps: list[str]) -> None:
    """Autocast brings input and weight to its dtype whatever they are; dtypes of result and gradients are eager's."""
    plain = nn.Sequential(
        nn.ConvTranspose2d(6, 8, 3).to(weights), nn.BatchNorm2d(8), nn.PReLU(), nn.ConvTranspose2d(8, 4, 2)
    )
    ours = cnnfast.Sequential(*copy.deepcopy(plain))
    dtypes = []
    for model in (plain, ours):
        x = x2d().to(x_dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().sum().backward()
        dtypes.append([y.dtype, x.grad.dtype, *(p.grad.dtype for p in model.parameters())])
    assert dtypes[0] == dtypes[1] and dtypes[0][0] == torch.bfloat16
    assert len(steps) == 2


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=CL),
    "sliced": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "channels-last-sliced": lambda x: x.repeat_interleave(2, dim=3).contiguous(memory_format=CL)[..., ::2],
    "columns-first": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("cl", [False, True], ids=["", "weight-channels-last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_of_an_input_in_any_layout(layout: str, cl: bool, steps: list[str]) -> None:
    """Its gradient is eager's in dtype and strides, and so is the result."""
    plain = nn.Sequential(nn.ConvTranspose2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    plain = plain.to(memory_format=CL if cl else torch.contiguous_format)
    ours, found = cnnfast.Sequential(*copy.deepcopy(plain)), []
    for model in (plain, ours):
        leaf = x2d().requires_grad_()
        x = LAYOUTS[layout](leaf)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        (g,) = torch.autograd.grad(y.float().square().sum(), x, retain_graph=True)
        found.append((y.dtype, real_strides(y), g.dtype, real_strides(g)))
    assert found[0] == found[1] and steps


def test_autocast_without_gradients(steps: list[str]) -> None:
    plain = generator(NORMS["batch"][0]).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = cnnfast.Sequential(*plain)(x2d()), plain(x2d())
        assert got.dtype == want.dtype == torch.bfloat16 and got.stride() == want.stride()
        exact = copy.deepcopy(plain).double()(x2d().double())
    assert_close(got, exact, want)
    assert len(steps) == 3, "a small plain convolution runs as its modules, under autocast too"


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_autocast_without_gradients_packs_the_parameters(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[torch.dtype] = []
    pack = inference.packed
    monkeypatch.setattr(
        inference, "packed", lambda method, step, o: packed.append(o.weight.dtype) or pack(method, step, o)
    )
    plain = nn.Sequential(nn.ConvTranspose2d(64, 32, 4, 2, 1), NORMS[norm][0](32), nn.ReLU()).eval()
    ours = cnnfast.Sequential(*copy.deepcopy(plain))
    x = torch.randn(2, 64, 12, 10)

    def compare() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            got, want = ours(x), plain(x)
        assert got.dtype == want.dtype and got.stride() == want.stride()
        assert_close(got, copy.deepcopy(plain).double()(x.double()), want)

    with torch.no_grad():
        compare()
        assert not packed, "it may be used once"
        compare()
        compare()
        assert packed == [torch.float32], "once, from the Parameter"
        for model in (plain, ours):
            model[0].weight.mul_(-2)
        compare()
        compare()
    assert len(packed) == 2


def test_autocast_of_another_device_or_switched_off(steps: list[str]) -> None:
    model = cnnfast.Sequential(*generator(NORMS["group"][0]))
    with torch.autocast("cpu", enabled=False):
        assert model(x2d()).dtype == torch.float32
    with torch.autocast("cpu"), torch.autocast("cpu", enabled=False):
        assert model(x2d()).dtype == torch.float32
    torch.set_autocast_enabled("cuda", True)
    try:
        assert model(x2d()).dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert len(steps) == 12


def test_gradients_accumulate_under_autocast() -> None:
    """Several uses of a weight in one region and in several; a weight written to inside a region is used as it is."""
    plain = generator(NORMS["instance"][0])
    models = [plain, cnnfast.Sequential(*copy.deepcopy(plain)), copy.deepcopy(plain).double()]
    for model in models:
        double = model is models[2]
        for k in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=not double):
                for i in range(2):
                    x = x2d(seed=10 * k + i)
                    loss_of(model(x.double() if double else x)).backward()
    for p, q, exact in zip(*(m.parameters() for m in models), strict=True):
        if p.dim() > 1:
            assert_close(q.grad, exact.grad, p.grad)
    ours = models[1]
    with torch.autocast("cpu", torch.bfloat16):
        ours(x2d())
        with torch.no_grad():
            ours[10].weight.zero_()
            ours[10].bias.fill_(1)
        assert torch.equal(ours(x2d()), torch.ones(()).bfloat16().tanh().expand(3, 3, 20, 16))


def test_what_autocast_does_on_a_gpu() -> None:
    """PyTorch's own table of operators is what `chain` says of it: GroupNorm in float32 on CUDA only, PReLU lowered,
    every other norm and activation in the dtype it gets."""
    listed = torch._C._dispatch_has_kernel_for_dispatch_key
    for key, group in (("AutocastCUDA", True), ("AutocastCPU", False)):
        assert listed("aten::group_norm", key) is group
        for name in ("prelu", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d.input"):
            assert listed(f"aten::{name}", key)
        for name in ("batch_norm", "instance_norm", "native_batch_norm", "relu", "leaky_relu", "elu", "silu", "gelu"):
            assert not listed(f"aten::{name}", key)
        for name in ("tanh", "sigmoid", "hardtanh", "constant_pad_nd"):
            assert not listed(f"aten::{name}", key)


# --- random stacks ----------------------------------------------------------------------------------------------------


@stack_profile(30)
@given(stacks(2), st.booleans())
def test_random_stacks(stack: tuple[nn.Sequential, Tensor], train: bool) -> None:
    plain, x = stack
    if x.shape[0] == 1:
        x = torch.cat([x, x + 1])  # one value per channel is an error in training mode
    check(plain.train(train), x)
