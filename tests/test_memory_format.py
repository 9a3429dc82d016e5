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


@pytest.mark.parametrize(
    ("shape", "to", "threads"),
    [
        ((1, 64, 64, 64), True, [1, 2, 3, 4]),
        ((1, 16, 128, 128), True, [1]),  # ATen's copy is on all threads
        ((1, 512, 16, 16), True, [1]),
        ((1, 64, 64, 64), False, [1]),
        ((1, 256, 64, 64), False, [1, 2, 3, 4]),
        ((1, 16, 256, 256), False, []),
    ],
    ids=str,
)
def test_matrices_are_transposed_where_that_is_faster(
    shape: tuple[int, ...], to: bool, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, found = torch.empty(shape).contiguous(memory_format=format_of(4, not to)), []
    for n in range(1, 9):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        found += [n] * memory_format._by_matrices(x, to)
    assert found == threads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_large_maps_of_few_channels_are_shuffled_in_16_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, found = memory_format._shuffled, []
    monkeypatch.setattr(memory_format, "_shuffled", lambda t, to: found.append(tuple(t.shape)) or real(t, to))
    for shape in [(1, 16, 256, 256), (1, 16, 128, 256), (1, 64, 128, 128)]:
        x = torch.randn(shape).to(dtype)
        y = convert(convert(x, dtype, True), dtype, False)
        assert y.is_contiguous() and torch.equal(y, x)
    assert found == [(1, 16, 256, 256)]


LARGE = [(1, 64, 1, 2048), (3, 64, 24, 25), (1, 32, 65, 64), (2, 32, 8, 16, 16), (1, 64, 72, 72), (2, 256, 1, 130)]
SMALL = [(1, 3, 128, 128), (1, 1, 256, 256), (2, 4096, 1, 8), (1, 64, 1, 1), (0, 64, 32, 32), (2, 16, 5, 7),
         (256, 64, 4, 4)]  # fmt: skip
# In float32: parts of rows, rows, several, whole images; a prime number of positions is one run.
SHUFFLED = [(1, 64, 1, 2048), (1, 32, 65, 64), (2, 32, 8, 16, 16), (1, 64, 72, 72), (1, 10, 127, 129), (3, 9, 1, 20011)]
WHOLE = [(1, 9, 1, 20011)]


@pytest.mark.parametrize("to", [True, False], ids=["to channels-last", "back"])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.float16)])
@pytest.mark.parametrize("shape", LARGE + SMALL + SHUFFLED[-2:] + WHOLE, ids=str)
def test_conversions(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], to: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, strides and gradients; and that many channels go as matrices, or shuffled."""
    found: list[str] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for real in (memory_format._transposed, memory_format._shuffled):

        def way(t: torch.Tensor, to: bool, real: Any = real) -> torch.Tensor:
            found.append(real.__name__)
            return real(t, to)

        monkeypatch.setattr(memory_format, real.__name__, way)
    before, after = dtypes
    x = torch.randn(shape).to(before, memory_format=format_of(len(shape), not to))
    y = convert(x, after, to)
    assert torch.equal(y, x.to(after)) and y.dtype == after
    if x.numel() and len(shape) == 4 and shape[1] > 1 and shape[2] * shape[3] > 1:
        assert y.stride() == new_strides(shape, to)
    assert not y._is_view(), "its user may write to it"
    shuffled = shape in SHUFFLED and before == after == torch.float32
    assert ("_shuffled" in found) == shuffled
    if to and not shuffled:
        assert ("_transposed" in found) == (shape in LARGE or shape in SHUFFLED and shape[1] >= 16)
    given = x.float().requires_grad_()
    grad = torch.randn(shape)
    convert(given, after, to).backward(grad.to(after))
    assert torch.equal(given.grad, grad.to(after).float())  # type: ignore[arg-type]
