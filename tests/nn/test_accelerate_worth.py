"""Calls of an accelerated model that gain nothing run as it stands: which, from when on, and what goes on as before."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from cnnfast.cpu import isa, tuned
from cnnfast.nn import accelerate_verify, accelerate_worth
from cnnfast.nn.accelerate_call import record_of
from cnnfast.nn.chain import Chain
from cnnfast.nn.layers import Program
from cnnfast.nn.modules import read

from .test_accelerate import Generator, images, pair

pytestmark = pytest.mark.usefixtures("one_thread")

USUAL = accelerate_worth.FINDING  # ahead of all fixtures


@pytest.fixture(autouse=True)
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding costs what it does, which `conftest` has set off; steps of any size are fused."""
    monkeypatch.setattr(accelerate_worth, "FINDING", USUAL)


@pytest.fixture
def whatever(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step pays."""
    monkeypatch.setattr(accelerate_worth, "FINDING", 1e3)


def runs(model: nn.Module) -> int:
    """Graphs that it has run, its parts among it."""
    records = [record for m in model.modules() if (record := record_of(m)) is not None]
    return sum(graph.runs for record in records for graph in record.graphs)


@torch.no_grad()
def settled(model: nn.Module, *args: object, calls: int = 4) -> int:
    """How many graphs the next call runs after so many calls."""
    for _ in range(calls):
        model(*args)
    before = runs(model)
    model(*args)
    return runs(model) - before


class Large(nn.Module):
    """0.14 G multiply-adds at 64x64."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 128, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(128, 64, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@torch.no_grad()
def test_small_calls_stand_and_large_ones_do_not() -> None:
    ours, plain = pair(Large())
    assert settled(ours, images(1, 3, 8, 8)) == 0
    assert settled(ours, images(1, 3, 64, 64)) == 1
    assert settled(ours, images(1, 3, 8, 8), calls=0) == 0
    for size in (8, 64):
        torch.testing.assert_close(ours(images(1, 3, size, size)), plain(images(1, 3, size, size)))
    said = str(cnnfast.explain(ours))
    assert f"{accelerate_worth.STANDS}: so for 1 of 2 kinds of calls" in said
    assert cnnfast.explain(ours, images(1, 3, 64, 64)).fused > 0
    small = cnnfast.explain(ours, images(1, 3, 8, 8))
    assert small.fused == 0 and small.reasons[accelerate_worth.STANDS] > 0 and small.found == 2


def test_it_takes_two_calls_that_compile_nothing(whatever: None) -> None:
    ours, _ = pair()
    ran = []
    with torch.no_grad():
        for _ in range(5):
            before = runs(ours)
            ours(images())
            ran.append(runs(ours) - before)
    assert ran == [1, 1, 1, 0, 0]


def test_gradients_and_modes_are_kinds_of_their_own(whatever: None) -> None:
    ours, plain = pair()
    assert settled(ours, images()) == 0
    before = runs(ours)
    for _ in range(4):
        ours(images()).sum().backward()
    assert runs(ours) - before == 3
    ours.zero_grad()
    ours(images()).sum().backward()
    plain(images()).sum().backward()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    ours.train()
    before = runs(ours)
    ours(images())
    assert runs(ours) - before == 1


@torch.no_grad()
def test_another_state_is_judged_anew(whatever: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    assert settled(ours, images()) == 0
    torch.set_num_threads(2)
    assert settled(ours, images(), calls=0) == 1
    assert settled(ours, images()) == 0
    monkeypatch.setattr(accelerate_worth, "FINDING", USUAL)
    assert settled(ours, images()) == 0  # nothing has changed that it would see
    (site, *_) = record_of(ours).graphs[0].sites  # type: ignore[union-attr]
    site.off = "a trial"
    monkeypatch.setattr(accelerate_worth, "FINDING", -1.0)
    assert settled(ours, images()) == 1


@torch.no_grad()
def test_hooks_see_a_call_that_stands(whatever: None) -> None:
    ours, _ = pair()
    assert settled(ours, images()) == 0
    seen: list[Tensor] = []
    ours.encoder[0].register_forward_hook(lambda module, args, result: seen.append(result))  # type: ignore[operator, union-attr, index]
    ours(images())
    assert len(seen) == 1 and settled(ours, images(), calls=0) == 0


class Interrupted(Generator):
    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        if z.sum().item() > 1e9:
            return z
        return self.decode(z)


@torch.no_grad()
def test_parts_of_a_call_that_stands_do_too(whatever: None) -> None:
    ours, plain = pair(Interrupted())
    assert settled(ours, images(), calls=6) == 0
    torch.testing.assert_close(ours(images()), plain(images()))
    before = runs(ours)
    for _ in range(4):
        z = ours.encode(images())  # a call of its own, which is judged by itself
    assert 0 < runs(ours) - before < 4
    torch.testing.assert_close(z, plain.encode(images()))


@torch.no_grad()
def test_who_asks_for_a_backend_gets_it(whatever: None) -> None:
    ours, _ = pair()
    assert settled(ours, images()) == 0
    with cnnfast.backend("aten"):
        assert settled(ours, images()) == 1
    assert settled(ours, images()) == 0


def test_verification_is_of_the_steps(whatever: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate_verify, "_veto", lambda *_: None)
    _, plain = pair()
    with torch.no_grad():
        ours = cnnfast.accelerate(plain, images())
        found = cnnfast.explain(ours, images())
    assert {row.verified for row in found.rows} == {"yes"} and found.fused == 0 and found.found > 0


@torch.no_grad()
def test_tuning_sees_the_steps_of_a_call_that_stands(whatever: None) -> None:
    ours, _ = pair()
    assert settled(ours, images()) == 0
    with tuned.recorded() as seen:
        ours(images())
    assert seen


@torch.no_grad()
def test_what_cannot_be_compared_is_not_judged(whatever: None) -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Generator()

        def forward(self, x: object) -> Tensor:
            return self.inner(x.image)  # type: ignore[attr-defined]

    class Image:
        def __init__(self, image: Tensor) -> None:
            self.image = image

    ours, _ = pair(Given())
    assert settled(ours, Image(images())) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "x",
    [
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, 2).as_subclass(nn.UninitializedBuffer),
        torch.ones(2, 2, device="meta"),
        {"x": [object()]},
    ],
    ids=["nested", "sparse", "subclass", "meta", "object"],
)
def test_what_has_no_key_is_not_judged(x: object) -> None:
    assert accelerate_worth.Calls().kind(nn.Identity(), (), {"x": x}) is None


def test_kinds_are_told_apart() -> None:
    calls, one = accelerate_worth.Calls(), nn.Identity()
    x = torch.ones(1, 2, 3, 4)
    kinds = [
        calls.kind(one, (x,), {}), calls.kind(one, (x.mT,), {}), calls.kind(one, (x.bfloat16(),), {}),
        calls.kind(one, ([x], None), {}), calls.kind(one, (x,), {"flag": True}), calls.kind(one, (x,), {"flag": False}),
    ]  # fmt: skip
    assert len({id(k) for k in kinds}) == len(kinds)
    assert calls.kind(one, (x, 3), {}) is calls.kind(one, (torch.zeros_like(x), 4), {})  # a timestep, say


@pytest.fixture
def few_kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(accelerate_worth, "_MAX_KINDS", 2)
    yield


@torch.no_grad()
def test_many_kinds_are_forgotten(few_kinds: None, whatever: None) -> None:
    ours, _ = pair()
    for k in range(5):
        ours(images(1, 3, 16, 16 + 8 * k))
    record = record_of(ours)
    assert record is not None and len(record.calls.kinds) <= 2


class Depthwise(nn.Module):
    """Convolutions of each channel, between operators that end no stretch of channels-last maps; ``shuffled`` ahead of
    the last one."""

    def __init__(self, count: int, shuffled: bool = False) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1, groups=64) for _ in range(count))
        self.last = nn.Conv2d(16 if shuffled else 64, 3, 3, padding=1)
        self.shuffled = shuffled

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = layer(x) * 2
        return self.last(nn.functional.pixel_shuffle(x, 2) if self.shuffled else x)


class Plain(nn.Module):
    """Convolutions that gain nothing by themselves, and operators that no step takes in."""

    def __init__(self, count: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = layer(x) * 0.5
        return x


def saved_if_packed(*modules: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> float:
    """What the rule says that one step of these saves, on one thread, as if it ran packed on every processor."""
    ours, _ = pair(nn.Sequential(*modules).to(dtype))
    with torch.no_grad():
        ours(images(*shape).to(dtype))
    (graph,) = record_of(ours).graphs  # type: ignore[union-attr]
    (site,) = graph.sites
    (chain,) = site.ran
    assert isinstance(chain, Chain) and chain.latest is not None
    run = SimpleNamespace(as_modules=None, channels_last=True)
    latest = (*chain.latest[:2], SimpleNamespace(convert=False, runs=[run] * len(chain.steps)))
    packed = SimpleNamespace(steps=chain.steps, latest=latest)
    return accelerate_worth._saved_by_chain(site, packed, 1)  # type: ignore[arg-type]


def test_a_norm_by_the_images_own_statistics_costs_a_step_more() -> None:
    def saved(norm: nn.Module) -> float:
        return saved_if_packed(nn.Conv2d(32, 32, 3, padding=1), norm, nn.ReLU(), shape=(1, 32, 32, 32))

    assert 0 < saved(nn.Identity()) < saved(nn.BatchNorm2d(32))
    assert saved(nn.InstanceNorm2d(32)) < 0 and saved(nn.GroupNorm(4, 32)) < 0


def test_an_upsampling_step_saves_the_products_that_it_leaves_out() -> None:
    """Nearest x2 and 3x3: 4 products for 9."""
    conv, shape = nn.Conv2d(32, 32, 3, padding=1), (1, 32, 32, 32)
    saved = saved_if_packed(nn.Upsample(scale_factor=2), conv, nn.ReLU(), shape=shape)
    left_out = 2 * 64 * 64 * 32 * 32 * (9 - 4)
    assert left_out / accelerate_worth._FLOPS < saved < 1.3 * left_out / accelerate_worth._FLOPS


@pytest.mark.parametrize("ndim", [2, 3])
def test_steps_of_16_bits_save_less_where_the_processor_has_instructions_for_these(
    ndim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an AVX2 processor they are float32's, several times faster than PyTorch's."""

    def saved(best: isa.InstructionSet) -> float:
        monkeypatch.setattr(accelerate_worth, "instruction_set", lambda: best)
        conv = nn.Conv2d(32, 64, 3, padding=1) if ndim == 2 else nn.Conv3d(32, 64, 3, padding=1)
        size = 64 if ndim == 2 else 16
        return saved_if_packed(conv, nn.ReLU(), shape=(1, 32, *(size,) * ndim), dtype=torch.bfloat16)

    by_float32, by_bfloat16 = saved(isa.InstructionSet.AVX2), saved(isa.InstructionSet.AVX512_BF16)
    assert 0 < by_bfloat16 < (0.5 if ndim == 2 else 0.2) * by_float32


class Bare(nn.Sequential):
    """A chain of such convolutions, one step behind the other."""

    def __init__(self, count: int, channels: int, dilation: int = 1) -> None:
        each = [nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation) for _ in range(count)]
        super().__init__(*each)


@pytest.mark.parametrize(
    ("model", "shape", "narrow", "full"),
    [
        pytest.param(Depthwise(1), (64, 128), 0, 0, id="one"),
        pytest.param(Depthwise(9), (64, 128), 1, 1, id="many"),
        pytest.param(Depthwise(2), (64, 128), 1, 1, id="few"),
        pytest.param(Depthwise(1, shuffled=True), (64, 128), 1, 1, id="one and a shuffle"),
        pytest.param(Plain(40, 8, 1), (8, 16), 1, 1, id="by the number of calls"),
        pytest.param(Plain(4, 8, 1), (8, 16), 0, 0, id="few calls"),
        pytest.param(Plain(3, 48, 3), (48, 64), 0, 1, id="by the kernel for another layout"),
        pytest.param(Bare(8, 32), (32, 128), 1, 1, id="a chain"),
        pytest.param(Bare(5, 32), (32, 128), 1, 1, id="a short chain"),
        pytest.param(Bare(3, 32), (32, 128), 0, 1, id="a shorter one"),
        pytest.param(Plain(8, 64, 3), (64, 32), 1, 1, id="by oneDNN"),
        pytest.param(Bare(8, 16, 4), (16, 32), 1, 1, id="by patches that a loop gathers"),
        pytest.param(Bare(8, 8, 4), (8, 48), 0, 0, id="likewise, of few channels"),
        pytest.param(Plain(8, 64, 3), (64, 16), 0, 0, id="by patches, which a contiguous map costs nothing"),
    ],
)
@pytest.mark.parametrize("width", ["narrow", "full"])
def test_conversions_saved_are_weighed_against_those_made(
    model: nn.Module, shape: tuple[int, int], narrow: int, full: int, width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products are twice as fast, contiguous maps cost a convolution part of its time, too."""
    monkeypatch.setattr(isa, "full_width", lambda: width == "full")
    ours, plain = pair(model.eval())
    x = images(1, shape[0], shape[1], shape[1])
    assert settled(ours, x) == (full if width == "full" else narrow)
    with torch.no_grad():
        a, b = ours(x), plain(x)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert a.stride() == b.stride()


@pytest.mark.parametrize(
    ("norm", "size", "seconds"),
    [
        (nn.ReLU(), 16, accelerate_worth._A_STEP),
        (nn.BatchNorm2d(16).eval(), 128, accelerate_worth._A_STEP),
        (nn.GroupNorm(4, 16), 16, accelerate_worth._A_MEASURED_STEP),
        (nn.GroupNorm(4, 16), 128, accelerate_worth._A_NORM_OF_MANY),
        (nn.InstanceNorm2d(16), 32, accelerate_worth._A_MEASURED_STEP),
        (nn.InstanceNorm2d(16), 128, accelerate_worth._A_NORM_OF_MANY),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_a_norm_of_many_calls_costs_more_than_one_of_few(norm: nn.Module, size: int, seconds: float) -> None:
    (chain,) = Program.make(read(cnnfast.Sequential(nn.Conv2d(16, 16, 3, padding=1), norm).eval())).items
    assert accelerate_worth._of_its_own(chain.steps[0], (1, 16, size, size)) == seconds


def test_volumes_that_pytorch_convolves_by_loops_go_on() -> None:
    """Their steps save more than their own time."""
    for size, ran in ((4, 0), (8, 1)):
        model = nn.Sequential(*(nn.Conv3d(16, 16, 3, padding=1) for _ in range(2))).eval()
        cnnfast.accelerate(model)
        assert settled(model, torch.randn(1, 16, *(size,) * 3)) == ran
