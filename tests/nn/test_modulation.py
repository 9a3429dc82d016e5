"""Accelerated models whose norms are scaled and shifted sample by sample: fused as people write them, and like eager
mode's, gradients and memory formats too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    torch.compiler.reset()


def spread(t: Tensor, n: int) -> Tensor:
    return t.view(*t.shape, *(1,) * n)


def one_plus(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return F.relu(y * (1 + s) + t)


def gain_first(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return F.silu(t + (s + 1) * y)


def addcmul(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return torch.addcmul(t, y, s).relu()


def addcmul_first(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(torch.addcmul(t, s, y))


def methods(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return F.leaky_relu(y.mul(s).add(t), 0.2)


def in_place(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    y *= s
    y += t
    return y.relu_()


def scale_alone(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return F.gelu(y * s)


def shift_alone(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return F.relu(y + t)


def shift_first(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return F.relu((y + t) * s)


FORMS = (
    one_plus, gain_first, addcmul, addcmul_first, methods, in_place, scale_alone, shift_alone, shift_first,
)  # fmt: skip


class Net(nn.Module):
    """A block of a conditional generator: gamma and beta are halves of a Linear's result."""

    def __init__(self, norm: str, form: Callable[..., Tensor], n: int = 2, up: bool = False, residual: bool = False):
        super().__init__()
        c, self.form, self.residual, self.n = 32, form, residual, n
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self.conv = (
            (nn.ConvTranspose1d, nn.ConvTranspose2d)[n - 1](c, c, 4, 2, 1) if up else kinds[n - 1](c, c, 3, 1, 1)
        )
        self.style = nn.Linear(8, 2 * c)
        self.norm = {
            "instance": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[n - 1](c),
            "instance, affine": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[n - 1](c, affine=True),
            "group": nn.GroupNorm(8, c, affine=False),
            "group, affine": nn.GroupNorm(8, c),
            "batch": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n - 1](c, affine=False),
        }[norm]

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        s, t = self.style(w).chunk(2, 1)
        y = self.form(self.norm(self.conv(x)), spread(s, self.n), spread(t, self.n))
        return y + x if self.residual else y


SIZES = {1: (300,), 2: (24, 24), 3: (8, 12, 12)}


def made(
    norm: str, form: Callable[..., Tensor], samples: int, n: int = 2, **more: bool
) -> tuple[Net, Net, Tensor, Tensor]:
    torch.manual_seed(0)
    plain = Net(norm, form, n, **more).eval()
    for p in plain.norm.parameters():
        nn.init.normal_(p)
    ours = cnnfast.accelerate(copy.deepcopy(plain))
    return plain, ours, torch.randn(samples, 32, *SIZES[n]), torch.randn(samples, 8)


def same(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() and bool((a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item()))


NORMS = ("instance", "group", "instance, affine", "group, affine")
CASES = [(form, NORMS[-1 - k % 2], 1 + 2 * (k % 3 > 0)) for k, form in enumerate(FORMS)] + [
    (one_plus, norm, samples) for norm in NORMS for samples in (1, 3)
]


@pytest.mark.parametrize("form, norm, samples", CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_as_people_write_them(form: Callable[..., Tensor], norm: str, samples: int) -> None:
    plain, ours, x, w = made(norm, form, samples, up=True)
    with torch.no_grad():
        for k in range(3):
            assert same(ours(x, w * (k + 1)), plain(x, w * (k + 1)))
        (row,) = cnnfast.explain(ours, (x, w)).rows
    calls = {
        "addcmul": ["addcmul"], "addcmul_first": ["addcmul"], "scale_alone": ["mul"], "shift_alone": ["shift"],
        "shift_first": ["shift", "mul"],
    }.get(form.__name__, ["mul", "shift"])  # fmt: skip
    assert row.pattern.split(" + ")[2:-1] == calls and row.fused, row


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    "norm, up, channels_last",
    [
        ("instance", True, False),
        ("instance", True, True),
        ("group, affine", True, False),
        ("group, affine", False, True),
    ],
)
def test_gradients(norm: str, up: bool, samples: int, channels_last: bool) -> None:
    plain, ours, x, w = made(norm, one_plus, samples, up=up)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    found = []
    for net in (plain, ours):
        given = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = net.train()(*given)
        (y.square().mean() + y.sin().sum() * 0.01).backward()
        found.append([y.detach(), *[t.grad for t in (*given, *net.parameters())]])
        assert all(t is not None for t in found[-1])
    largest = max(float(t.abs().max()) for t in found[0][3:])
    for k, (a, b) in enumerate(zip(found[1], found[0], strict=True)):
        assert a.stride() == b.stride() and (a - b).abs().max() <= 2e-5 * max(float(b.abs().max()), 0.1 * largest), k


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_dimensions(n: int, samples: int) -> None:
    plain, ours, x, w = made("instance", one_plus, samples, n)
    with torch.no_grad():
        for _ in range(3):
            assert same(ours(x, w), plain(x, w))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype, samples: int) -> None:
    plain, ours, x, w = made("group", one_plus, samples)
    exact = copy.deepcopy(plain).double()(x.double(), w.double())
    with torch.no_grad():
        a, b = ours.to(dtype)(x.to(dtype), w.to(dtype)), plain.to(dtype)(x.to(dtype), w.to(dtype))
    assert a.dtype == b.dtype and (a - exact).abs().max() <= 2 * (b - exact).abs().max() + 1e-3


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("samples", [1, 2])
def test_autocast(samples: int, grad: bool) -> None:
    plain, ours, x, w = made("instance", one_plus, samples, up=True)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            a, b = ours(x, w), plain(x, w)
            assert a.dtype == b.dtype and a.stride() == b.stride() and (a - b).abs().max() <= 0.05 * b.abs().max()


@pytest.mark.parametrize("samples", [1, 2])
def test_with_a_residual_behind(samples: int) -> None:
    plain, ours, x, w = made("instance", lambda y, s, t: y * s + t, samples, residual=True)
    with torch.no_grad():
        for _ in range(3):
            assert same(ours(x, w), plain(x, w))
    assert cnnfast.explain(ours, (x, w)).rows[0].pattern == "conv2d + instance_norm + mul + shift + add"


def test_batches_in_turn() -> None:
    """One trace for several batches: a plan for each."""
    plain, ours, x, w = made("instance", one_plus, 4)
    with torch.no_grad():
        for n in (4, 1, 2, 3, 1, 4):
            assert same(ours(x[:n], w[:n]), plain(x[:n], w[:n]))


def test_one_style_for_a_batch() -> None:
    plain, ours, x, w = made("group", one_plus, 3)
    with torch.no_grad():
        for _ in range(3):
            assert same(ours(x, w[:1]), plain(x, w[:1]))


# --- what is left to PyTorch's operators ------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(32, 32, 3, padding=1), nn.InstanceNorm2d(32), how
        self.bn = nn.BatchNorm2d(32)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        y, s = self.conv(x), w.repeat(1, 4)[:, :, None, None]
        if self.how == "behind a BatchNorm":
            return F.relu(self.bn(y) * s)
        if self.how == "behind no norm":
            return F.relu(y * s)
        y = self.norm(y)
        if self.how == "by itself":
            return F.relu(y * y)
        if self.how == "of every pixel":
            return F.relu(y * s.expand_as(y))
        if self.how == "of a column":
            return F.relu(y * s.expand(-1, -1, 24, 1))
        if self.how == "a number":
            return F.relu(y * 2)
        if self.how == "more samples than images":
            return F.relu(y * s.repeat(2, 1, 1, 1))
        if self.how == "one channel":
            return F.relu(y * s[:, :1])
        if self.how == "another dtype":
            return F.relu(y * s.double())
        if self.how == "twice as much":
            return F.relu(torch.addcmul(s, y, s, value=2))
        if self.how == "twice the shift":
            return F.relu(torch.add(y, s, alpha=2))
        if self.how == "two users":
            return F.relu(y * s) + y
        return torch.lerp(y, s, 0.5)


@pytest.mark.parametrize(
    "how",
    ["behind a BatchNorm", "behind no norm", "by itself", "of every pixel", "of a column", "a number", "one channel"]
    + ["more samples than images", "another dtype", "twice as much", "twice the shift", "two users", "lerp"],
)
def test_others(how: str) -> None:
    samples = 1 if how == "more samples than images" else 2
    torch.manual_seed(0)
    plain = Odd(how).eval()
    ours = cnnfast.accelerate(copy.deepcopy(plain))
    x, w = torch.randn(samples, 32, 24, 24), torch.randn(samples, 8)
    with torch.no_grad():
        for _ in range(3):
            a, b = ours(x, w), plain(x, w)
            assert a.dtype == b.dtype and same(a, b)
    (row,) = cnnfast.explain(ours, (x, w)).rows
    assert "mul" not in row.pattern and "shift" not in row.pattern and "addcmul" not in row.pattern, row
