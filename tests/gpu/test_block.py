"""A step with gradients in one node: the straight way launches what the general one does, and only where it may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import cnnfast
from cnnfast.activations import Activation
from cnnfast.gpu.observers import observed
from cnnfast.norms import Norm
from cnnfast.ops.run import run_step
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step

pytestmark = pytest.mark.usefixtures("poison")

SPEC = ConvSpec.make(32, 48, 4, 2, 1)
NORMS = [Norm("batch"), Norm("instance"), Norm("group", 4)]


@dataclass
class Ways:
    """Whether the straight way was gone, for every forward and backward that asked."""

    forward: list[bool]
    backward: list[bool]


@pytest.fixture
def ways(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Ways:
    from cnnfast.gpu import block, conv

    conv.prepare.cache_clear()  # what earlier tests have left there
    seen = Ways([], [])
    for way, name in ((seen.forward, "_straight_forward"), (seen.backward, "_straight_backward")):
        real: Callable[..., Any] = getattr(block, name)

        def spy(*args: Any, real: Callable[..., Any] = real, way: list[bool] = way) -> Any:
            found = real(*args)
            way.append(found is not None)
            return found

        monkeypatch.setattr(block, name, spy)
    return seen


def tensors(device: torch.device, dtype: torch.dtype, spec: ConvSpec = SPEC) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    c = spec.out_channels
    out = {
        "x": torch.randn(2, spec.in_channels, 3, 4, generator=g).to(dtype),
        "weight": (torch.randn(spec.weight_shape, generator=g) / 11).to(dtype),
        "scale": torch.randn(c, generator=g).to(dtype),
        "shift": torch.randn(c, generator=g).to(dtype),
        "grad": torch.randn(2, c, *spec.output_size((3, 4)), generator=g).to(dtype),
    }
    last = torch.channels_last
    return {k: (t.contiguous(memory_format=last) if t.dim() == 4 else t).to(device) for k, t in out.items()}


def train(norm: Norm, t: dict[str, Tensor], frozen: tuple[str, ...] = (), spec: ConvSpec = SPEC) -> dict[str, Tensor]:
    """A training step: its result, the gradients, and what it moved."""
    step = Step(spec, Activation("leaky_relu", (0.2,)), norm=norm)
    leaves = {k: t[k].detach().requires_grad_(k not in frozen) for k in t if k != "grad"}
    c, device = spec.out_channels, t["x"].device
    moved: dict[str, Any] = {}
    if norm.kind == "batch":
        moved = {"mean": torch.zeros(c).to(device), "var": torch.ones(c).to(device)}
        moved["batches"] = torch.tensor(3).to(device)
    y = run_step(step, Operands(**leaves, **moved), channels_last=True, backend="triton")
    wanted = {k: v for k, v in leaves.items() if k not in frozen}
    grads = torch.autograd.grad(y, list(wanted.values()), t["grad"])
    return {"y": y.detach(), **moved, **{f"d{k}": g for k, g in zip(wanted, grads, strict=True)}}


def generally(*args: Any, **more: Any) -> dict[str, Tensor]:
    """`train` where somebody observes: by the general way."""
    with observed(launch=lambda name: None):
        return train(*args, **more)


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
        assert got[name].stride() == value.stride() and got[name].dtype == value.dtype, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.kind)
def test_both_ways_give_the_same_bits(norm: Norm, dtype: torch.dtype, device: torch.device, ways: Ways) -> None:
    t = tensors(device, dtype)
    expected = generally(norm, t)
    same(train(norm, t), expected)
    assert ways == Ways([False, True], [False, True])
    if norm.kind == "batch":
        assert expected["batches"].item() == 4 and not expected["mean"].eq(0).any()


@pytest.mark.parametrize("frozen", [("x",), ("weight",), ("scale", "shift"), ("x", "weight"), ("x", "weight", "scale")])
def test_with_fewer_gradients(frozen: tuple[str, ...], device: torch.device, ways: Ways) -> None:
    t = tensors(device, torch.float16)
    expected = generally(NORMS[0], t, frozen)
    same(train(NORMS[0], t, frozen), expected)
    assert ways.forward == [False, True]
    assert ways.backward == [False, not {"x", "weight"} <= {*frozen}], "a frozen convolution has nothing to launch"


@pytest.mark.parametrize("odd", ["x", "weight", "scale", "grad"])
@pytest.mark.parametrize("how", ["address", "layout"])
def test_odd_tensors_go_the_general_way(odd: str, how: str, device: torch.device, ways: Ways) -> None:
    t = tensors(device, torch.float16)
    expected = generally(NORMS[0], t)
    plain = t[odd]
    if how == "address":
        t[odd] = plain.new_zeros(plain.numel() + 1)[1:].as_strided(plain.shape, plain.stride()).copy_(plain)
    else:
        # Neither contiguous nor channels-last.
        t[odd] = plain.mT.contiguous().mT if plain.dim() == 4 else plain.repeat_interleave(2)[::2]
    got = train(NORMS[0], t)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert ways.forward[1] is (odd == "grad") and ways.backward[1] is False


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.kind)
def test_a_contiguous_gradient_is_read_as_it_is(norm: Norm, device: torch.device, ways: Ways) -> None:
    """As eager mode's of an InstanceNorm; a kind of its own."""
    t = tensors(device, torch.float16)
    contiguous = {**t, "grad": t["grad"].contiguous()}
    for given in (t, contiguous, t):
        expected = generally(norm, given)
        same(train(norm, given), expected)
    assert ways.backward == [False, True] * 3


def test_dtypes_of_vectors_are_kinds_of_their_own(device: torch.device, ways: Ways) -> None:
    t = tensors(device, torch.float16)
    wide = {**t, "scale": t["scale"].float(), "shift": t["shift"].float()}
    for given in (t, wide):
        train(NORMS[0], given)
    for given in (t, wide):
        same(train(NORMS[0], given), generally(NORMS[0], given))
    assert ways.forward == [False, False, True, False, True, False]


def test_gradients_that_the_kernels_do_not_store_as_wanted(device: torch.device, ways: Ways) -> None:
    """An input of one position, whose gradient torch gives contiguous strides."""
    spec = ConvSpec.make(32, 32, 4)
    t = tensors(device, torch.float16, spec)
    t["x"] = t["x"][:, :, :1, :1].contiguous()
    t["weight"] = t["weight"].contiguous()
    t["grad"] = t["grad"][:, :, :4, :4].contiguous(memory_format=torch.channels_last)
    expected = generally(NORMS[0], t, spec=spec)
    same(train(NORMS[0], t, spec=spec), expected)
    assert ways.backward == [False, False]


def test_a_second_derivative_after_a_straight_forward(device: torch.device, ways: Ways) -> None:
    """It goes through the convolution's result, which is the node's second one."""
    t = tensors(device, torch.float32)
    found = []
    for run in range(3):
        leaves = [t[k].detach().requires_grad_() for k in ("x", "weight", "scale", "shift")]
        x, weight, scale, shift = leaves
        step = Step(SPEC, Activation("tanh"), norm=NORMS[0])
        y = run_step(step, Operands(x, weight, scale=scale, shift=shift), channels_last=True, backend="triton")
        grads = torch.autograd.grad(y, leaves, t["grad"], create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
        assert ways.forward == [False, True, True][: run + 1]
    for first, *later in zip(*found, strict=True):
        assert first.abs().max() > 0 and all(torch.equal(first, g) for g in later)


def test_a_graph_is_gone_through_twice(device: torch.device, ways: Ways) -> None:
    """Where it is kept; else what was saved is gone after the first time, as always."""
    t = tensors(device, torch.float16)
    train(NORMS[0], t)
    x = t["x"].detach().requires_grad_()
    step = Step(SPEC, Activation("relu"), norm=NORMS[0])
    y = run_step(step, Operands(x, t["weight"], scale=t["scale"], shift=t["shift"]), backend="triton")
    first, second = (torch.autograd.grad(y, x, t["grad"], retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, t["grad"])


def test_batches_are_counted_once_whoever_runs(device: torch.device) -> None:
    t = tensors(device, torch.float32)
    step = Step(SPEC, Activation("relu"), norm=NORMS[0])
    count = torch.tensor(0).to(device)
    for n, backend in enumerate(("triton", "aten", "auto"), 1):
        o = Operands(t["x"], t["weight"], scale=t["scale"], shift=t["shift"], batches=count)
        run_step(step, o, backend=backend)
        assert count.item() == n, backend


def test_a_module_counts_batches_in_the_merge(device: torch.device, launches: list[str]) -> None:
    model = cnnfast.Sequential(
        torch.nn.ConvTranspose2d(32, 32, 4, 2, 1), torch.nn.BatchNorm2d(32, momentum=0.3), torch.nn.ReLU()
    ).to(device)  # fmt: skip
    x = torch.randn(2, 32, 3, 4, generator=torch.Generator().manual_seed(0)).to(device)
    counter = model[1].num_batches_tracked
    before = counter._version
    with cnnfast.backend("triton"):
        for _ in range(2):
            model(x)
    assert counter is model[1].num_batches_tracked and counter.item() == 2 and counter._version == before + 2
    assert [name.split()[0] for name in launches] == ["phases", "norm-merge", "norm-apply"] * 2
