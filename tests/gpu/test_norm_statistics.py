"""Statistics of norms: centred, merged from parts, bookkeeping as PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cnnfast.activations import Activation
from cnnfast.gpu.devices import device_for
from cnnfast.norm_sync import merged
from cnnfast.norms import Norm, Partials
from cnnfast.ops.run import run_step
from cnnfast.step import Operands, norm_step

from ..norm_cases import NormCase, check, compute, expect, spread
from ..tolerance import assert_close

pytest.importorskip("triton", reason="triton is not installed")
from cnnfast.gpu import norm_act, norm_act_autograd, norm_act_plan  # noqa: E402

RELU = Activation("relu")
KINDS = [Norm("batch"), Norm("instance"), Norm("group", 5)]


# --- far from zero ----------------------------------------------------------------------------------------------------


def far(norm: Norm) -> NormCase:
    return NormCase(f"far-{norm.kind}", norm, RELU, (4, 20, 9, 8), mean=1000.0, deviation=0.1)


@pytest.mark.parametrize("norm", KINDS, ids=lambda n: n.kind)
def test_mean_of_1000_and_deviation_of_a_tenth(norm: Norm, device: torch.device, launches: list[str]) -> None:
    """Statistics, result and gradients are as good as the yardstick's."""
    check(far(norm), torch.float32, device, launches)


def test_the_mean_square_formula_would_fail_there() -> None:
    """E[x^2] - E[x]^2 in float32 has no digit of the variance: the inputs of these tests tell the formulas apart."""
    case = far(Norm("batch"))
    t = case.tensors(torch.float32, "cpu")
    dims = (0, 2, 3)
    mean, square = t.x.mean(dims), t.x.square().mean(dims)
    var = (square - mean.square()).clamp_min(0)
    exact = t.x.double().var(dims, correction=0)
    assert ((var - exact).abs() / exact).median() > 0.5
    assert t.weight is not None and t.bias is not None
    y = F.relu(F.batch_norm(t.x, mean, var, t.weight, t.bias))
    got = compute(case, t, torch.float32)
    with pytest.raises(AssertionError, match="max error"):
        expect(case, t, {**got, "y": y}, "naive")


# --- parts ------------------------------------------------------------------------------------------------------------


def random_parts(segments: int, parts: int, channels: int, device: torch.device) -> Partials:
    """Parts of very different counts, the first and every fifth of them empty."""
    g = torch.Generator().manual_seed(parts)
    count = torch.randint(1, 700, (segments, parts), generator=g).float()
    count[:, ::5] = 0
    mean = torch.randn(segments, parts, channels, generator=g) + 1000
    m2 = torch.rand(segments, parts, channels, generator=g) * count[..., None]
    empty = (count == 0)[..., None]
    return Partials.of(*(v.to(device) for v in (count, mean.masked_fill(empty, 0), m2.masked_fill(empty, 0))))


@pytest.mark.parametrize(
    ("segments", "parts", "channels", "join"),
    [(1, 2, 1, 1), (1, 3000, 11, 1), (3, 7, 40, 1), (2, 300, 24, 12), (4, 3, 6, 2), (1, 600, 5, 5)],
    ids=str,
)
def test_merge(segments: int, parts: int, channels: int, join: int, device: torch.device, launches: list[str]) -> None:
    p = random_parts(segments, parts, channels, device)
    moments, var = norm_act.merge(p, norm_act.merge_of(p.shape, join, 1e-5, True))
    mean, rstd = moments.unbind(1)
    assert launches == ["norm-merge"] and var is not None
    count, center, m2 = (v.cpu().double() for v in p.each)
    groups = channels // join
    center, m2 = (v.reshape(segments, parts, groups, join) for v in (center, m2))
    weight = count[:, :, None, None].expand_as(center)
    total = weight.sum((1, 3))
    exact = (center * weight).sum((1, 3)) / total
    m2 = (m2 + (center - exact[:, None, :, None]).square() * weight).sum((1, 3))
    eps = torch.finfo(torch.float32).eps
    assert ((mean.cpu() - exact).abs() <= 2 * eps * 1000).all()
    for got, want in ((rstd, (m2 / total + 1e-5).rsqrt()), (var, m2 / (total - 1))):
        assert ((got.cpu() - want).abs() <= 1e-5 * want).all()
    if join == 1:
        _, one_mean, one_m2 = merged(p._replace(stats=p.stats.cpu())).each
        torch.testing.assert_close(one_mean[:, 0].double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(one_m2[:, 0].double(), m2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("each", [False, True], ids=["batch", "image"])
def test_parts_are_those_of_the_tensor(each: bool, last: bool, device: torch.device, launches: list[str]) -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 10, 17, 9, generator=g) + 5).to(device)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    p = norm_act.partials(x, each)
    assert launches == ["norm-statistics"]
    assert p.shape[0] == (3 if each else 1) and p.shape[2] == 10
    count, mean, m2 = merged(p._replace(stats=p.stats.cpu())).each
    exact = x.cpu().double().transpose(0, 1).reshape(10, 3, -1)
    exact = exact.transpose(0, 1) if each else exact.reshape(1, 10, -1)
    assert count.flatten().tolist() == [exact.shape[-1]] * exact.shape[0]
    for got, of in ((mean, lambda v: v.mean(-1)), (m2, lambda v: v.var(-1, correction=0) * v.shape[-1])):
        assert_close(got[:, 0], of(exact), of(exact.float()))


@pytest.fixture
def two_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that every program walks several tiles."""
    for module in (norm_act, norm_act_plan):
        monkeypatch.setattr(module, "target_device", lambda x: device_for(80, 2))


WALKS = [
    NormCase("walk-batch", Norm("batch"), RELU, (5, 20, 33, 31), residual=True),
    NormCase("walk-group", Norm("group", 2), Activation("prelu"), (2, 6, 40, 41), slopes=1),
    NormCase("walk-nchw", Norm("instance"), Activation("gelu"), (2, 3, 61, 67), x_last=False, y_last=False),
]


@pytest.mark.parametrize("case", WALKS, ids=lambda c: c.id)
def test_programs_that_walk_several_tiles(
    case: NormCase, device: torch.device, launches: list[str], two_multiprocessors: None
) -> None:
    check(case, torch.float32, device, launches)
    n, c, h, w = case.shape
    inside = not case.x_last
    each = case.norm is not None and case.norm.per_image
    assert norm_act_plan.tiling(n, c, h * w, each or inside, inside, 2).tiles > 1


def test_tiling_covers_every_row_once() -> None:
    for n, c, size, images, inside in [
        (1, 1, 1, False, False), (64, 64, 4096, False, False), (16, 512, 16, True, False), (8, 3, 65536, True, True),
        (1000, 40, 49, True, True), (2, 5000, 7, False, False),
    ]:  # fmt: skip
        for sms in (2, 108, 132):
            t = norm_act_plan.tiling(n, c, size, images, inside, sms)
            m, block_c = t.constants["BLOCK_M"], t.constants["BLOCK_C"]
            assert t.segments * t.rows == n * size and m * block_c <= norm_act_plan.TILE
            assert (t.parts - 1) * t.tiles * m < t.rows <= t.parts * t.tiles * m  # no part is empty
            assert t.grid[0] == t.segments * t.parts and (t.grid[1] - 1) * block_c < c <= t.grid[1] * block_c
            assert t.rows % t.constants["ROWS_BY"] == 0


@pytest.mark.parametrize("norm", KINDS, ids=lambda n: n.kind)
def test_the_same_bits_from_run_to_run(norm: Norm, device: torch.device) -> None:
    case = NormCase(f"bits-{norm.kind}", norm, Activation("tanh"), (3, 20, 21, 8), residual=True)
    first, second = (spread(case, case.tensors(torch.float32, device), "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_given_partials_are_taken(device: torch.device, launches: list[str]) -> None:
    case = NormCase("given", Norm("batch"), RELU)
    t = case.tensors(torch.float32, device)
    parts = norm_act.partials(t.x, False)
    launches.clear()
    y = norm_act_autograd.run(case.step, case.operands(t), parts, True, torch.float32, True)
    assert y is not None
    assert launches == ["norm-merge", "norm-apply"]
    exact, yardstick = compute(case, t, torch.float64), compute(case, t, torch.float32)
    assert_close(y, exact["y"], yardstick["y"])


# --- bookkeeping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["batch", "instance"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
def test_running_statistics(kind: str, momentum: float, dtype: torch.dtype, device: torch.device) -> None:
    """As torch moves them, in float32 from the values as stored; autograd is told of it where torch tells it (a batch
    norm of its own may have saved them)."""
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(4, 10, 5, 3, generator=g) * 2 + 3).type(dtype)
    before = torch.randn(10, generator=g), torch.rand(10, generator=g)
    ours = [v.clone().to(device) for v in before]
    versions = [v._version for v in ours]
    o = Operands(x.to(device), mean=ours[0], var=ours[1], momentum=momentum)
    run_step(norm_step(Norm(kind)), o, channels_last=False, backend="triton")
    function = F.batch_norm if kind == "batch" else F.instance_norm
    results = []
    for wide in (torch.float64, torch.float32):
        theirs = [v.type(wide) for v in before]
        function(x.type(wide), *theirs, None, None, True, momentum)
        results.append(theirs)
    for mine, exact, yardstick in zip(ours, *results, strict=True):
        assert_close(mine, exact, yardstick, f"{kind} {momentum}")
    told = [v._version > 0 for v in results[0]]
    assert [v._version > old for v, old in zip(ours, versions, strict=True)] == told


def test_running_statistics_of_other_dtypes_and_strides(device: torch.device) -> None:
    x = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(2)).to(device)
    mean, var = torch.zeros(6, dtype=torch.float16), torch.ones(12)[::2]
    want = mean.float(), var.clone()
    mean, var = mean.to(device), torch.ones(12).to(device)[::2]
    run_step(norm_step(Norm("batch")), Operands(x, mean=mean, var=var), channels_last=True, backend="triton")
    F.batch_norm(x.cpu(), *want, training=True)
    torch.testing.assert_close(mean.cpu().float(), want[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(var.cpu(), want[1])


def test_statistics_without_a_gradient_do_not_record(device: torch.device) -> None:
    x = torch.randn(2, 4, 3, 3).to(device)
    with torch.no_grad():
        step = norm_step(Norm("batch"), False, RELU)
        y = run_step(step, Operands(x.requires_grad_()), channels_last=True, backend="triton")
    assert not y.requires_grad
