"""Norms of channels-last maps in inference: as exact as PyTorch's of contiguous ones, whatever their mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast.activations import Activation
from cnnfast.cpu import norm_inference, norm_statistics
from cnnfast.memory_format import format_of
from cnnfast.norms import Norm
from cnnfast.ops.run import run_step
from cnnfast.step import Operands, norm_step
from cnnfast.tolerance import verdict

SHAPES = {
    "one part": (2, 24, 7, 9),
    "many parts": (1, 32, 96, 80),
    "a rest": (1, 8, 83, 97),
    "few channels": (3, 2, 64, 64),
    "three dimensions": (1, 16, 9, 20, 11),
    "two rows": (1, 64, 1, 2),
    "short sums": (2, 64, 20, 21),
    "small groups": (1, 8, 30, 32),
    "larger, small groups": (1, 72, 30, 32),
    "half a vector": (1, 48, 40, 40),
}


def plain(norm: Norm, x: Tensor, o: Operands) -> Tensor:
    scale, shift = (None if t is None else t.to(x.dtype) for t in (o.scale, o.shift))
    if norm.kind == "group":
        return F.group_norm(x, norm.groups, scale, shift, norm.eps)
    return F.instance_norm(x, weight=scale, bias=shift, eps=norm.eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", [Norm("group", 4), Norm("instance")], ids=["group", "instance"])
def test_a_value_that_is_no_number_stays_in_its_group(norm: Norm, dtype: torch.dtype) -> None:
    """Means far from 0 beside it are seen all the same."""
    torch.manual_seed(0)
    x = (torch.randn(1, 64, 48, 40) + 100).to(dtype)
    x[0, 3, 5, 6] = torch.nan
    y = run_step(norm_step(norm), Operands(x.contiguous(memory_format=torch.channels_last)), channels_last=True)
    none = Operands(x)
    exact, plainly = plain(norm, x.double(), none), plain(norm, x, none)
    assert torch.equal(y.isnan(), exact.isnan())
    assert verdict(y[:, 16:], exact[:, 16:], plainly[:, 16:]) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38], ids=str)
@pytest.mark.parametrize("norm", [Norm("group", 4), Norm("instance")], ids=["group", "instance"])
def test_statistics_of_what_is_not_finite_say_nothing(norm: Norm, value: float) -> None:
    """NumPy would warn of what they are. (A variance may be more than a float32 holds.)"""
    x = torch.ones(1, 16, 80, 81)
    x[0, 3, ::2] = value
    x[0, 3, 1::2] = -value
    o = Operands(x.contiguous(memory_format=torch.channels_last))
    assert norm_inference.why_not(norm, o) is None
    y = norm_inference.finished(norm, o, Activation("identity"), ours=False)
    assert y[:, 4:].abs().max() < 1e-5


@pytest.mark.parametrize("norm", [Norm("group", 2), Norm("instance")], ids=["group", "instance"])
@pytest.mark.parametrize("shape", [(2, 24, 40, 42), (1, 64, 48, 40), (1, 8, 4, 4)], ids=str)
def test_of_16_bits_with_float32_vectors(shape: tuple[int, ...], norm: Norm) -> None:
    """As autocast has them."""
    torch.manual_seed(0)
    x = torch.randn(shape).add_(2).bfloat16().contiguous(memory_format=torch.channels_last)
    o = Operands(x, scale=torch.randn(shape[1]), shift=torch.randn(shape[1]))
    assert norm_inference.why_not(norm, o) is None
    y = run_step(norm_step(norm), o, channels_last=True)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    exact = plain(norm, x.double(), o)
    assert verdict(y, exact, exact.bfloat16()) is None


@pytest.mark.parametrize("mean", [0.0, 0.4, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("norm", [Norm("group", 1), Norm("group", 4), Norm("instance")], ids=["1", "4", "instance"])
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (32, 32), (32, 39), (64, 64), (25, 14, 16)], ids=str)
def test_maps_that_are_flat_for_the_most_part(
    size: tuple[int, ...], norm: Norm, threads: int, mean: float, one_thread: None
) -> None:
    """Of which sums of one value after the other are all rounded alike."""
    torch.set_num_threads(threads)
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.where(torch.rand(size) < 0.1, torch.randn(1, 8, *size), torch.rand(1, 8, *(1,) * len(size)) * 2 - 1)
        x = x / x.std() + mean
        last = x.contiguous(memory_format=format_of(x.dim(), True))
        y = run_step(norm_step(norm), Operands(last), channels_last=True)
        exact = plain(norm, x.double(), Operands(x))
        assert (y - exact).abs().max() <= 1e-5 * exact.abs().max(), seed


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mean", [0.0, 3.0, 300.0])
@pytest.mark.parametrize("norm", [Norm("group", 2), Norm("group", 1), Norm("instance")], ids=["2", "1", "instance"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_as_exact_as_of_contiguous_maps(shape: tuple[int, ...], norm: Norm, mean: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    c = shape[1]
    x = (torch.randn(shape) * (1 + torch.rand(c).view(-1, *(1,) * (len(shape) - 2))) + mean).to(dtype)
    last = x.contiguous(memory_format=format_of(len(shape), True))
    o = Operands(last, scale=torch.randn(c).to(dtype), shift=torch.randn(c).to(dtype))
    assert norm_inference.why_not(norm, o) is None
    kept = last.clone()
    y = run_step(norm_step(norm), o, channels_last=True)
    assert y.is_contiguous(memory_format=format_of(len(shape), True)) and torch.equal(last, kept)
    assert verdict(y, plain(norm, x.double(), o), plain(norm, x, o)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["many parts", "a rest"])
def test_maps_larger_than_a_cache(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read in pieces, the last of which is smaller."""
    torch.manual_seed(0)
    shape, joined = SHAPES[name], []
    statistics = norm_statistics._float32_statistics
    monkeypatch.setattr(norm_statistics, "_float32_statistics", lambda x: joined.append(x.shape[1]) or statistics(x))
    monkeypatch.setattr(norm_statistics, "_READ_TWICE", 7 * 500 * shape[1] * dtype.itemsize)
    monkeypatch.setattr(norm_inference, "_by_aten", lambda *given: None)
    x = (torch.randn(shape) + 3).to(dtype).contiguous(memory_format=torch.channels_last)
    o = Operands(x, scale=torch.randn(shape[1]).to(dtype), shift=torch.randn(shape[1]).to(dtype))
    norm = Norm("group", 2)
    y = run_step(norm_step(norm), o, channels_last=True)
    assert len(joined) > 2 and joined[0] == joined[1] > joined[-1]
    assert verdict(y, plain(norm, x.double(), o), plain(norm, x, o)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["relu", "silu", "mish", "gelu", "prelu", "tanh"])
def test_what_follows(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, added = (torch.randn(2, 16, 20, 30).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    slope = torch.rand(16).to(dtype) if activation == "prelu" else None
    o = Operands(x, scale=torch.randn(16).to(dtype), residual=added.contiguous(), slope=slope)
    act = Activation(activation)
    y = run_step(norm_step(Norm("group", 4), True, act), o, channels_last=True)
    exact = act(
        F.group_norm(x.double(), 4, o.scale.double()) + added.double(), None if slope is None else slope.double()
    )
    assert verdict(y, exact, act(F.group_norm(x.contiguous(), 4, o.scale) + added, slope)) is None


def test_what_it_does_not_take() -> None:
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    norm = Norm("group", 2)
    assert "gradient" in str(norm_inference.why_not(norm, Operands(x.clone().requires_grad_())))
    assert "channels-last" in str(norm_inference.why_not(norm, Operands(x.contiguous())))
    assert "float32" in str(norm_inference.why_not(norm, Operands(x.double())))
    mixed = Operands(x.bfloat16(), scale=torch.ones(8), shift=torch.ones(8, dtype=torch.bfloat16))
    assert "float32" in str(norm_inference.why_not(norm, mixed))
    assert "float32" in str(norm_inference.why_not(norm, Operands(x.bfloat16(), residual=x)))
    assert "running" in str(norm_inference.why_not(Norm("instance"), Operands(x, mean=torch.zeros(8))))
    assert norm_inference.why_not(Norm("batch"), Operands(x)) and norm_inference.why_not(None, Operands(x))
