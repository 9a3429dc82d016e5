"""An accelerated model's sums in the memory of what is added: where nobody reads that any more, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast
from cnnfast.cpu import content, inference, methods, onednn
from cnnfast.cpu.isa import instruction_set, products_dtype
from cnnfast.nn import accelerate_call
from cnnfast.nn.accelerate_call import record_of
from cnnfast.nn.rewrite_settle import _Settled
from cnnfast.nn.rewrite_spare import Memory

from .test_sequential_training import randomized

CHANNELS = {1: 32, 2: 128, 3: 32}  # whose weights are packed for maps like `_image`, in float32, too


class Block(nn.Module):
    """``of`` makes the result, of the block's convolutions and a map that the first of them made."""

    def __init__(self, of: Callable[[Any, Tensor], Any], dim: int = 2) -> None:
        super().__init__()
        conv, c = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dim], CHANNELS[dim]
        self.first, self.second, self.third = (conv(c, c, 3, padding=1) for _ in range(3))
        self.of = of

    def forward(self, x: Tensor) -> Any:
        return self.of(self, F.relu(self.first(x)))


@pytest.fixture
def onto(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each sum of a packed convolution, whether its result lies where what is added did."""
    found: list[bool] = []
    plain = onednn.Convolution.run_adding

    def run_adding(self: Any, x: Tensor, packed: Any, residual: Tensor, onto: bool) -> Tensor | None:
        y = plain(self, x, packed, residual, onto)
        found.append(y is not None and y.data_ptr() == residual.data_ptr())
        return y

    monkeypatch.setattr(onednn.Convolution, "run_adding", run_adding)
    return found


@pytest.fixture(autouse=True)
def _all_run_packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls that gain little, too, and what Winograd's filters would take on some processors and threads."""
    decided = inference._way, inference._why_slower_plain
    with monkeypatch.context() as patch:
        patch.setattr(accelerate_call, "stands", lambda kind: False)
        for module in (inference, methods):
            patch.setattr(module, "winograd_gain", lambda *_: 1.0)
        for cache in decided:
            cache.cache_clear()
        yield
    for cache in decided:
        cache.cache_clear()


def _chained(m: Any, x: Tensor) -> Tensor:
    return x + m.third(F.relu(m.second(x)))


def _twice(m: Any, x: Tensor) -> Tensor:
    x = x + m.second(F.leaky_relu(x, 0.1))
    return x + m.second(F.leaky_relu(x, 0.1))


def _in_place(m: Any, x: Tensor) -> Tensor:
    y = m.second(F.silu(x))
    y += x
    return F.relu_(y)


def _summed(m: Any, x: Tensor) -> Tensor:
    a = x * 2 + 1
    return m.second(x) + a


def _pooled(m: Any, x: Tensor) -> Tensor:
    a = F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0)
    return m.second(x - 1) + a


def _ahead_of_calls(m: Any, x: Tensor) -> Tensor:
    """That run as they stand, in the same site."""
    y = m.second(F.silu(x)) + x
    return F.interpolate(F.hardtanh(y) + m.third.weight[0, 0, 0, 0], scale_factor=2.0)


def _added_again(m: Any, x: Tensor) -> Tensor:
    return x + (m.second(F.silu(x)) + x)


SPARE: dict[str, tuple[Callable[[Any, Tensor], Any], int, int]] = {  # and the dimensions, and how many sums
    "after a chain of its own": (_chained, 2, 1),
    "one after the other": (_twice, 2, 2),
    "signals": (_twice, 1, 2),
    "volumes": (_twice, 3, 2),
    "to the convolution's result": (_in_place, 2, 1),
    "a sum": (_summed, 2, 1),
    "ahead of calls": (_ahead_of_calls, 2, 1),
    "an upsampled map": (_pooled, 2, 1),
}


def _needed_later(m: Any, x: Tensor) -> Tensor:
    return m.third(F.tanh(x + m.second(F.silu(x)))) * x


def _returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x + m.second(F.silu(x))


def _kept(m: Any, x: Tensor) -> Tensor:
    m.seen = x
    return x + m.second(F.silu(x))


def _view_needed(m: Any, x: Tensor) -> Tensor:
    a = x.flatten(2)
    return F.relu(x + m.second(F.silu(x))) + a.mean()


def _part_needed(m: Any, x: Tensor) -> Tensor:
    a, _ = x.chunk(2, 1)
    return F.relu(x + m.second(F.silu(x)))[:, : a.shape[1]] * a


def _copy_needed(m: Any, x: Tensor) -> Tensor:
    """Contiguous: a copy of a channels-last map, and a view of one that was contiguous."""
    a = x.contiguous()
    return F.relu(x + m.second(F.silu(x))) * a


def _dropout_needed(m: Any, x: Tensor) -> Tensor:
    a = F.dropout(x, 0.5, training=False)
    return F.relu(x + m.second(F.silu(x))) * a


def _same_input(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.second(x) + x)


def _same_input_by_another_name(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.second(F.dropout(x, 0.5, training=False)) + x)


def _two_sums(m: Any, x: Tensor) -> Tensor:
    return m.third(F.relu(m.second(F.silu(x)) + x)) + x


def _expanded(m: Any, x: Tensor) -> Tensor:
    a = x[:, :, :1, :1].expand_as(x)
    return m.second(F.silu(x)) + a


def _of_a_part(m: Any, x: Tensor) -> Tensor:
    a, b = torch.cat([x, -x], 1).chunk(2, 1)
    return m.second(F.tanh(b)) + a


_HELD: dict[tuple[int, ...], Tensor] = {}


@torch.library.custom_op("cnnfast_tests::held", mutates_args=())
def _held(x: Tensor) -> Tensor:
    """The same memory each time."""
    return _HELD.setdefault((*x.shape, *x.stride()), torch.full_like(x, 0.5))


@_held.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _of_another_operator(m: Any, x: Tensor) -> Tensor:
    return m.second(F.silu(x)) + _held(x)


NEEDED = {f.__name__.strip("_"): f for f in (
    _needed_later, _returned, _kept, _view_needed, _part_needed, _copy_needed, _dropout_needed, _same_input,
    _same_input_by_another_name, _two_sums, _added_again, _of_another_operator,
)}  # fmt: skip


def _image(dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, CHANNELS[dim], *{1: (2048,), 2: (16, 16), 3: (16, 16, 16)}[dim], generator=generator)


def _written_onto(model: nn.Module) -> int:
    """How many steps of the settled graphs may write into the memory of what they add."""
    found = 0
    for graph in record_of(model).graphs:  # type: ignore[union-attr]
        settled = graph._seen[2]
        assert settled is not None
        found += sum(n.target._onto for n in settled.__self__.graph.nodes if isinstance(n.target, _Settled))
    return found


def _leaves(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _check(plain: nn.Module, ours: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    given = x.clone()
    for a, b in zip(_leaves(ours(x)), _leaves(plain(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert a.stride() == b.stride()
    assert torch.equal(x, given)


@pytest.mark.parametrize("leased", [False, True], ids=["", "leased"])
@pytest.mark.parametrize("name", SPARE)
def test_sums_are_written_onto_maps_that_nobody_needs(
    name: str, leased: bool, onto: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights that are compared in each call, and with those that nobody has written to for long."""
    if leased:
        monkeypatch.setattr(content, "_STEADY", 0.0)
    of, dim, count = SPARE[name]
    torch.manual_seed(0)
    plain = randomized(Block(of, dim)).eval()
    ours, x = cnnfast.accelerate(copy.deepcopy(plain)), _image(dim)
    with torch.no_grad():
        for _ in range(6):
            _check(plain, ours, x)
        first = ours(x)
        want = first.clone()
        onto.clear()
        ours(_image(dim, 1))
        assert torch.equal(first, want)
    assert _written_onto(ours) == count == sum(onto)


@pytest.mark.parametrize("last", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_16_bits(dtype: torch.dtype, last: torch.memory_format, onto: list[bool]) -> None:
    torch.manual_seed(0)
    plain = randomized(Block(_twice)).eval().to(dtype=dtype, memory_format=last)
    ours, x = cnnfast.accelerate(copy.deepcopy(plain)), _image(2).to(dtype=dtype, memory_format=last)
    with torch.inference_mode():
        for _ in range(6):
            onto.clear()
            _check(plain, ours, x, 3e-2)
    assert _written_onto(ours) == 2 and sum(onto) == (2 if products_dtype(dtype, instruction_set()) == dtype else 0)


@pytest.mark.parametrize(("dim", "dtype"), [(2, torch.float32), (3, torch.float32), (2, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", NEEDED)
def test_maps_that_somebody_needs_are_left(name: str, dim: int, dtype: torch.dtype, onto: list[bool]) -> None:
    """In 16 bits, of a model in channels-last, whose views are of such maps."""
    tolerance, how = 1e-5, {}
    if dtype != torch.float32:
        tolerance, how = 5e-2, {"dtype": dtype, "memory_format": torch.channels_last}
    torch.manual_seed(0)
    plain = randomized(Block(NEEDED[name], dim)).eval().to(**how)
    ours, x = cnnfast.accelerate(copy.deepcopy(plain)), _image(dim).to(**how)
    with torch.no_grad():
        for _ in range(6):
            _check(plain, ours, x, tolerance)
            if name == "kept":
                torch.testing.assert_close(ours.seen, plain.seen, rtol=tolerance, atol=tolerance)  # type: ignore[arg-type]
    assert _written_onto(ours) == 0 and not any(onto)


@pytest.mark.parametrize("of", [_expanded, _of_a_part], ids=["expanded", "part"])
def test_a_map_that_is_not_dense_is_left(of: Callable[[Any, Tensor], Any]) -> None:
    """The step sees that, where the graph does not."""
    torch.manual_seed(0)
    plain = randomized(Block(of)).eval()
    ours = cnnfast.accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        for _ in range(6):
            _check(plain, ours, _image(2))


def test_the_models_input_is_left() -> None:
    torch.manual_seed(0)
    plain = randomized(nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1)))

    class Residual(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + x

    model = Residual(plain).eval()
    ours, x = cnnfast.accelerate(copy.deepcopy(model)), _image(2).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(6):
            _check(model, ours, x)
    assert _written_onto(ours) == 0


def test_with_gradients_all_maps_are_left() -> None:
    torch.manual_seed(0)
    plain = randomized(Block(_twice)).eval()
    ours, x = cnnfast.accelerate(copy.deepcopy(plain)), _image(2)
    for _ in range(6):
        a, b = ours(x), plain(x)
        a.square().sum().backward()
        b.square().sum().backward()
        torch.testing.assert_close(ours.second.weight.grad, plain.second.weight.grad, rtol=1e-3, atol=1e-2)
    assert _written_onto(ours) == 0


def test_a_graph_that_switches_gradients_on_keeps_all_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = Memory.spare

    def spare(self: Memory, *args: Any, **kwargs: Any) -> bool:
        asked.append(real(self, *args, **kwargs))
        return asked[-1]

    monkeypatch.setattr(Memory, "spare", spare)

    def of(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            a = F.silu(x)
        return m.second(a) + x

    torch.manual_seed(0)
    plain = randomized(Block(of, 3)).eval()
    ours = cnnfast.accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        for _ in range(6):
            _check(plain, ours, _image(3))
    assert asked and not any(asked)
