"""A training step of cnnfast.Sequential on the Triton kernels, with PyTorch's convolutions and norms forbidden."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast

from ..conftest import conv_precision
from ..tolerance import assert_close
from .test_sequential_training import loss_of, randomized

CL = torch.channels_last
FUNCTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "batch_norm",
             "instance_norm", "group_norm")  # fmt: skip
OPERATORS = ("convolution", "_convolution", "convolution_backward", "native_batch_norm", "native_batch_norm_backward",
             "native_group_norm", "native_group_norm_backward", "cudnn_batch_norm", "mkldnn_convolution",
             "conv2d", "conv_transpose2d", "batch_norm", "group_norm")  # fmt: skip


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's convolutions and norms raise, by whichever name Python code calls them. Their derivatives run in C++,
    but only for operators that Python called."""

    def refuse(name: str) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> None:
            raise AssertionError(f"PyTorch's {name} ran")

        return call

    for name in FUNCTIONS:
        for place in (F, torch):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, refuse(name))
    for name in OPERATORS:
        monkeypatch.setattr(torch.ops.aten, name, refuse(name))
    for name in ("native_batch_norm", "native_group_norm", "convolution", "_convolution"):
        monkeypatch.setattr(torch, name, refuse(name))


def graph(y: Tensor) -> set[str]:
    """The names of all nodes that differentiate y."""
    seen: set[Any] = set()
    todo = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return {node.name() for node in seen}


def generator(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(32, 48, 4, bias=False),
        norm(48),
        nn.ReLU(inplace=True),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(48, 32, 3, padding=1),
        norm(32),
        nn.SiLU(),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        norm(32),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(32, 16, 4, 2, 1),
        nn.Tanh(),
    )


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "batch-average": lambda c: nn.BatchNorm2d(c, momentum=None),
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "group": lambda c: nn.GroupNorm(4, c),
    "none": lambda c: nn.Identity(),
}


def results(model: nn.Sequential, y: Tensor) -> dict[str, Tensor]:
    """Of a step that has been taken: the result, gradients and running statistics."""
    values = {"y": y.detach()}
    vectors: list[Tensor] = []
    for name, module in model.named_modules():
        grads = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
        if grads and isinstance(module, nn.modules.conv._ConvNd):
            # A bias ahead of a norm has no gradient but rounding: with the weight's, it has a scale.
            values[name] = torch.cat([g.flatten() for g in grads])
        else:
            vectors += grads
        vectors += [b for b in module.buffers(recurse=False) if b.is_floating_point()]
    return {**values, "vectors": torch.cat(vectors)} if vectors else values


def check(
    plain: nn.Sequential, x: Tensor, device: torch.device, request: pytest.FixtureRequest, train: bool = True
) -> set[str]:
    """A step of ``plain``'s modules on the kernels against nn.Sequential on a CPU. Returns the names of the graph."""
    ours = cnnfast.Sequential(*copy.deepcopy(plain)).to(device).train(train)
    references = []
    exact = copy.deepcopy(plain).double().train(train)
    for model in (exact, plain.train(train)):
        xi = x.to(next(model.parameters()).dtype).requires_grad_()
        y = model(xi)
        loss_of(y).backward()
        references.append({**results(model, y), "dx": xi.grad})
    request.getfixturevalue("forbidden")
    xi = x.to(device).requires_grad_()
    with cnnfast.backend("triton"), conv_precision("ieee"):
        y = ours(xi)
        names = graph(y)
        loss = (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y)).sum()
        loss.backward()
    got = {**results(ours, y), "dx": xi.grad}
    for name, want in references[1].items():
        assert_close(got[name], references[0][name], want, name)
    for a, b in zip(plain.buffers(), ours.buffers(), strict=True):
        assert a.is_floating_point() or torch.equal(a, b.cpu())
    for p in ours.parameters():
        assert p.grad is not None and p.grad.stride() == p.stride()
    return names


ATEN = ("Conv", "Norm", "Slow", "Thnn", "Mkldnn")


@pytest.mark.parametrize(
    ("norm", "cl"),
    [
        *(pytest.param(n, False, marks=[pytest.mark.slow] * (n not in ("batch", "group"))) for n in NORMS),
        ("batch", True),
    ],
    ids=[*NORMS, "batch-channels-last"],
)
def test_a_training_step_without_pytorchs_operators(
    norm: str, cl: bool, device: torch.device, launches: list[str], request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    plain = randomized(generator(NORMS[norm])).to(memory_format=CL if cl else torch.contiguous_format)
    names = check(plain, torch.randn(2, 32, 1, 1), device, request)  # type: ignore[arg-type]
    assert not [n for n in names if n.startswith(ATEN)], names
    ran = Counter(name.split()[0] for name in launches if "reduce" not in name)
    assert ran["wgrad"] >= 4 and sum(ran[k] for k in ("phases", "merged", "latent")) >= 7, ran
    if norm != "none":
        assert ran["norm-apply"] >= 3 and ran["norm-grad-apply"] >= 3, ran


def test_evaluation_mode_with_gradients(
    device: torch.device, launches: list[str], request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    plain = randomized(generator(nn.BatchNorm2d))
    names = check(plain, torch.randn(2, 32, 1, 1), device, request, train=False)  # type: ignore[arg-type]
    assert not [n for n in names if n.startswith(ATEN)], names
    assert sum(name.startswith("wgrad") for name in launches) >= 4


def test_what_is_forbidden_would_be_seen(device: torch.device, request: pytest.FixtureRequest) -> None:
    """The test above can fail: with PyTorch's operators, it does, and their derivatives have these names."""
    model = cnnfast.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    x = torch.randn(2, 16, 4, 4)
    y = model(x)
    assert [n for n in graph(y) if n.startswith(ATEN)]
    request.getfixturevalue("forbidden")
    for m in (nn.Sequential(*model), model):
        with pytest.raises(AssertionError, match="PyTorch's conv2d ran"):
            m(x)
    with pytest.raises(AssertionError, match="PyTorch's batch_norm ran"):
        model[1](x)


def test_without_a_gradient_statistics_move(device: torch.device, launches: list[str]) -> None:
    torch.manual_seed(0)
    plain = randomized(nn.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.BatchNorm2d(32, momentum=None), nn.ReLU()))
    ours = cnnfast.Sequential(*copy.deepcopy(plain)).to(device)
    exact = copy.deepcopy(plain).double()
    for k in range(2):
        x = torch.randn(2, 32, 3, 4, generator=torch.Generator().manual_seed(k))
        with torch.no_grad(), cnnfast.backend("triton"), conv_precision("ieee"):
            assert_close(ours(x.to(device)), exact(x.double()), plain(x))
        for a, b, c in zip(ours[1].buffers(), exact[1].buffers(), plain[1].buffers(), strict=True):
            assert torch.equal(a.cpu(), b) if not a.is_floating_point() else assert_close(a, b, c) is None
    assert [name.split()[0] for name in launches].count("norm-apply") == 2


VOLUMES: dict[str, Callable[[], list[nn.Module]]] = {
    "batch": lambda: [
        nn.ConvTranspose3d(32, 32, (2, 3, 2), bias=False), nn.BatchNorm3d(32), nn.ReLU(),
        nn.ConvTranspose3d(32, 16, 4, 2, 1), nn.Sigmoid(),
    ],
    "instance": lambda: [
        nn.Conv3d(32, 16, 3, 2, 1), nn.InstanceNorm3d(16, affine=True), nn.PReLU(16), nn.ConvTranspose3d(16, 16, 2, 2),
    ],
    "group": lambda: [
        nn.Upsample(scale_factor=2), nn.Conv3d(32, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(),
        nn.ReplicationPad3d(1), nn.Conv3d(16, 16, 3),
    ],
}  # fmt: skip
SIZES = {"batch": (1, 1, 1), "instance": (3, 4, 3), "group": (2, 1, 2)}


@pytest.mark.parametrize(
    ("name", "cl"),
    [
        *(("batch", True), ("group", True)),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in (("batch", False), ("instance", True), ("group", False))),
    ],
)
def test_three_dimensions(
    name: str, cl: bool, device: torch.device, launches: list[str], request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    plain = randomized(nn.Sequential(*VOLUMES[name]()))
    plain = cnnfast.channels_last(plain) if cl else plain
    names = check(plain, torch.randn(2, 32, *SIZES[name]), device, request)
    assert not [n for n in names if n.startswith(ATEN)], names
    ran = Counter(name.split()[0] for name in launches)
    assert ran["wgrad"] == 2 and ran["norm-apply"] == ran["norm-grad-apply"] == 1, ran


def test_one_dimension(device: torch.device, launches: list[str], request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.ConvTranspose1d(32, 32, 4, 2, 1), nn.BatchNorm1d(32), nn.LeakyReLU(0.1), nn.Conv1d(32, 16, 7, padding=3)
    )
    check(randomized(plain), torch.randn(2, 32, 11), device, request)  # type: ignore[arg-type]
    assert sum(name.startswith("wgrad") for name in launches) >= 2


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_autocast(norm: str, device: torch.device, launches: list[str], forbidden: None) -> None:
    """float16 convolutions, float32 parameters and gradients; what a GroupNorm at the end gives is float32 on CUDA."""
    if device.type != "cuda":
        pytest.skip("autocast of CUDA needs its device type")
    torch.manual_seed(0)
    modules = (nn.Conv2d(32, 32, 3, padding=1), NORMS[norm](32), nn.SiLU(), nn.ConvTranspose2d(32, 32, 4, 2, 1))
    ours = randomized(cnnfast.Sequential(*modules, NORMS[norm](32))).to(device)
    x = torch.randn(2, 32, 4, 5).to(device).requires_grad_()
    with cnnfast.backend("triton"), torch.autocast("cuda", torch.float16):
        y = ours(x)
    assert y.dtype == (torch.float32 if norm == "group" else torch.float16)
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all() and x.grad.abs().max() > 0
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    assert any("wgrad" in name for name in launches)
