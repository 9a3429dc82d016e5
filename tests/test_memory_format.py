"""`cnnfast.channels_last`: the same model, its weights in the kernels' order; `convert`: the other memory format."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast import memory_format
from cnnfast.memory_format import convert, format_of, new_strides
from cnnfast.nn.fusion import FusedStep, plan_modules
from cnnfast.step import Operands


def model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = nn.ConvTranspose1d(32, 16, 4, 2, 1), nn.LeakyReLU(0.1), nn.Conv1d(16, 8, 3, 1, 1, bias=False)
        return nn.Sequential(*modules).eval()


def test_values_stay_and_strides_change() -> None:
    before, after = model(), model()
    assert cnnfast.channels_last(after) is after
    x = torch.randn(2, 32, 9)
    assert torch.allclose(before(x), after(x), atol=1e-6)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name])
    assert after[0].weight.stride() == (16 * 4, 1, 16) and after[2].weight.stride() == (16 * 3, 1, 16)


def test_load_state_dict_and_copies_keep_the_order() -> None:
    source, target = model(), cnnfast.channels_last(model())
    with torch.no_grad():
        source[0].weight.mul_(2)
    target.load_state_dict(source.state_dict())
    for m in (target, copy.deepcopy(target)):
        assert torch.equal(m[0].weight, source[0].weight) and m[0].weight.stride() == (64, 1, 16)


def test_four_dimensions_as_torch() -> None:
    conv = cnnfast.channels_last(nn.Sequential(nn.ConvTranspose2d(8, 4, 4, 2, 1)))[0]
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_three_dimensions_and_other_tensors_of_five() -> None:
    """Which PyTorch's own conversion refuses."""
    modules = nn.Sequential(nn.Conv3d(4, 8, 3), nn.ConvTranspose3d(8, 4, 2, 2), nn.Conv2d(4, 8, 3))
    modules.register_parameter("other", nn.Parameter(torch.randn(1, 4, 5, 3, 3)))
    before = copy.deepcopy(modules.state_dict())
    strides = modules.other.stride()
    cnnfast.channels_last(modules)
    for conv in modules[:2]:
        assert conv.weight.is_contiguous(memory_format=torch.channels_last_3d) and not conv.weight.is_contiguous()
    assert modules[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert modules.other.stride() == strides
    assert all(torch.equal(t, before[name]) for name, t in modules.state_dict().items())


def test_kernels_read_it_in_place(device: torch.device) -> None:
    from cnnfast.gpu.conv import lookup

    def in_place(step: FusedStep, weight: torch.Tensor) -> bool:
        weight = weight.unsqueeze(2)
        x = torch.zeros(1, step.step.spec.in_channels, 1, 9, device=device)
        launch = lookup(step.step, Operands(x, weight), True)
        return not launch.gathers and weight.is_contiguous(memory_format=torch.channels_last)

    modules = list(cnnfast.channels_last(model().to(device)))
    for step in plan_modules(modules):
        assert isinstance(step, FusedStep) and in_place(step, modules[step.conv].weight)
    first = plan_modules(list(model().to(device)))[0]
    assert isinstance(first, FusedStep) and not in_place(first, model()[0].weight.to(device))


WAYS = {
    "at once": memory_format._at_once,
    "at once, widened": memory_format._at_once_16,
    "in runs": memory_format._shuffled,
    "by matrices": memory_format._transposed,
    "ATen's": None,
}


@pytest.mark.parametrize(
    ("shape", "dtype", "to", "ways"),
    [
        ((1, 64, 64, 64), torch.float32, True, ["at once", "at once", "in runs", "in runs", "in runs"]),
        ((1, 64, 64, 64), torch.float32, False, ["at once", "at once", "in runs", "in runs", "in runs"]),
        ((4, 64, 64, 64), torch.float32, True, ["at once"] * 4 + ["in runs"]),  # a thread for each image
        ((1, 64, 32, 32), torch.float32, True, ["at once"] * 5),
        ((1, 64, 256, 256), torch.float32, False, ["in runs"] * 5),
        ((1, 16, 1, 20011), torch.float32, True, ["at once"] * 4 + ["ATen's"]),  # a prime number is one run
        ((1, 3, 128, 128), torch.float32, True, ["ATen's"] * 5),
        ((1, 64, 8, 8), torch.float32, True, ["ATen's"] * 5),
        ((4, 1024, 7, 7), torch.float32, True, ["by matrices"] + ["ATen's"] * 4),  # as many positions as a kernel's
        ((1, 64, 64, 64), torch.float64, True, ["by matrices"] * 4 + ["ATen's"]),
        ((1, 64, 60, 80), torch.bfloat16, True, ["ATen's"] * 5),
        ((1, 64, 128, 128), torch.bfloat16, False, ["by matrices"] + ["in runs"] * 4),
        ((1, 16, 256, 256), torch.float16, False, ["in runs"] * 5),
        ((1, 16, 128, 256), torch.float16, False, ["ATen's"] * 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("conflicting", [True, False])
def test_the_way_of_a_conversion(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    to: bool,
    ways: list[str],
    conflicting: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On 1, 2, 3, 4 and 8 threads."""
    monkeypatch.setattr(memory_format, "_conflicting", lambda: conflicting)
    assert [_way(shape, dtype, to, threads) for threads in (1, 2, 3, 4, 8)] == ways


@pytest.mark.parametrize(
    ("shape", "to", "ways"),
    [
        ((1, 64, 64, 64), True, ["at once, widened"] * 4 + ["ATen's"]),
        ((1, 64, 256, 512), True, ["by matrices"] * 4 + ["ATen's"]),
        ((1, 64, 64, 64), False, ["at once, widened"] + ["ATen's"] * 4),
        ((4, 64, 64, 64), False, ["by matrices"] + ["in runs"] * 4),
    ],
    ids=str,
)
def test_conflicts_of_the_cache(
    shape: tuple[int, ...], to: bool, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ATen's copies in 16 bits do not meet them, they are the fastest."""
    for conflicting, expected in ((True, ways), (False, ["ATen's"] * 5)):
        monkeypatch.setattr(memory_format, "_conflicting", lambda value=conflicting: value)
        assert [_way(shape, torch.bfloat16, to, threads) for threads in (1, 2, 3, 4, 8)] == expected


@pytest.mark.parametrize(
    ("processor", "conflicting"),
    [
        ({"cpu_name": "AMD EPYC 9R14", "l1d_cache_size": 32768}, True),
        ({"cpu_name": "AMD EPYC 9R45", "l1d_cache_size": 49152}, False),
        ({"cpu_name": "Intel Xeon", "l1d_cache_size": 32768}, False),
        ({}, False),
    ],
    ids=["Zen 4", "Zen 5", "Intel", "nothing told"],
)
def test_processors_with_conflicts(
    processor: dict[str, Any], conflicting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    assert memory_format._conflicting.__wrapped__() is conflicting


def _way(shape: tuple[int, ...], dtype: torch.dtype, to: bool, threads: int) -> str:
    found = memory_format._way.__wrapped__(shape, dtype, to, threads)
    return next(name for name, way in WAYS.items() if way is found)


LARGE = [(1, 64, 1, 2048), (3, 64, 24, 25), (1, 32, 65, 64), (2, 32, 8, 16, 16), (1, 64, 72, 72), (2, 256, 1, 130),
         (1, 10, 127, 129), (3, 9, 1, 20011), (1, 9, 1, 20011), (1, 64, 32, 32), (1, 16, 3, 16, 64)]  # fmt: skip
SMALL = [(1, 3, 128, 128), (1, 1, 256, 256), (2, 4096, 1, 8), (1, 64, 1, 1), (0, 64, 32, 32), (2, 16, 5, 7),
         (256, 64, 4, 4)]  # fmt: skip


@pytest.mark.parametrize("to", [True, False], ids=["to channels-last", "back"])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.float16)])
@pytest.mark.parametrize("shape", LARGE + SMALL, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_conversions(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    to: bool,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values, strides and gradients, by each way."""
    before, after = dtypes
    if way == "at once" and after != torch.float32 or way == "at once, widened" and after.itemsize != 2:
        pytest.skip("the vectors are of the other width")
    small = shape in SMALL or way == "in runs" and not memory_format._in_runs(shape)
    found: list[str] = []

    def choice(*args: Any) -> Any:
        real = WAYS[way]
        return None if real is None or small else lambda t, to: found.append(way) or real(t, to)

    monkeypatch.setattr(memory_format, "_way", choice)
    x = torch.randn(shape).to(before, memory_format=format_of(len(shape), not to))
    _check(x, after, to)
    parts = x[:, : max(1, shape[1] // 2)]  # which are not dense
    _check(parts, after, to)
    assert bool(found) == (way != "ATen's" and not small)


def _check(x: torch.Tensor, after: torch.dtype, to: bool) -> None:
    y = convert(x, after, to)
    assert torch.equal(y, x.to(after)) and y.dtype == after
    if x.numel() and x.dim() == 4 and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1 and x.dtype == after:
        assert y.stride() == new_strides(x.shape, to)
    if y is not x:
        assert not y._is_view() and y.untyped_storage().nbytes() == y.nbytes, "its user may write to it"
    given = x.detach().float().requires_grad_()
    grad = torch.randn(x.shape)
    convert(given, after, to).backward(grad.to(after))
    assert given.grad is not None and torch.equal(given.grad, grad.to(after).float())
