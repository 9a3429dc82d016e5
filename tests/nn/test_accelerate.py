"""`cnnfast.accelerate`, `restore` and `explain`: the same model in place; what is found, and what is not and why."""

from __future__ import annotations

import copy
import io
import operator
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
from cnnfast.cpu import norm_inference
from cnnfast.cpu.packing import PACKS
from cnnfast.memory_format import LAST, is_channels_last, reformatted
from cnnfast.messages import CnnfastWarning, UsageError
from cnnfast.nn import accelerate_worth, rewrite, rewrite_eager, rewrite_layout
from cnnfast.nn.accelerate_call import plain_call, record_of
from cnnfast.nn.accelerate_verify import _Trial, differs
from cnnfast.nn.rewrite import rewritten
from cnnfast.nn.rewrite_effects import written as written_by
from cnnfast.nn.rewrite_norm import NormCall
from cnnfast.nn.rewrite_site import Call, Site
from cnnfast.norms import Norm
from cnnfast.tolerance import model_verdict

from .test_sequential_training import randomized


class Generator(nn.Module):
    """A block of each kind; an encoder and a decoder, to be called apart."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(inplace=True))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2), nn.Conv2d(32, 16, 3, padding=1), nn.Dropout(0.5), nn.Tanh(),
            nn.ConvTranspose2d(16, 3, 3, padding=1),
        )  # fmt: skip

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.decode(self.encode(x)))


def pair(model: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """(accelerated, plain) with the same values, in eval mode."""
    torch.manual_seed(0)
    plain = randomized(Generator() if model is None else model).eval()
    return cnnfast.accelerate(copy.deepcopy(plain)), plain


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 16, 16)), generator=torch.Generator().manual_seed(1))


def graphs(model: nn.Module) -> int:
    record = record_of(model)
    assert record is not None and record.failed is None
    return record.compilations


@torch.no_grad()
def same(ours: nn.Module, plain: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Twice, as weights are packed at the second call."""
    for _ in range(2):
        a, b = ours(*args, **kwargs), plain(*args, **kwargs)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.stride() == b.stride()


# --- in place, and back -----------------------------------------------------------------------------------------------


def test_it_is_the_same_object_with_the_same_state() -> None:
    model = Generator()
    before, parameters = {k: t.clone() for k, t in model.state_dict().items()}, list(model.parameters())
    assert cnnfast.accelerate(model) is model and type(model) is Generator
    assert list(model.state_dict()) == list(before)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    model(images())
    assert graphs(model) == 1
    assert cnnfast.restore(model) is model and record_of(model) is None
    assert all("_compiled_call_impl" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_plain(copy_of: Callable[[nn.Module], nn.Module]) -> None:
    ours, plain = pair()
    same(ours, plain, images())
    other = copy_of(ours)
    assert record_of(other) is None and record_of(ours) is not None
    same(other, plain, images())


def test_a_sequential_of_ours_copies_plain_too() -> None:
    ours, plain = pair(cnnfast.Sequential(nn.ConvTranspose2d(3, 8, 4, 2, 1), nn.ReLU()))
    same(ours, plain, images())
    assert record_of(copy.deepcopy(ours)) is None


def test_saving_the_model_saves_the_plain_one() -> None:
    ours, plain = pair()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    same(torch.load(file, weights_only=False), plain, images())


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1))), "not a"),
        (lambda: torch.compile(nn.Conv2d(3, 3, 1), backend="eager"), "not a OptimizedModule"),
    ],
    ids=["scripted", "compiled"],
)
def test_models_that_are_taken_as_they_were_written(model: Callable[[], Any], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        cnnfast.accelerate(model())


def test_a_model_compiled_in_place_is_refused() -> None:
    model = nn.Conv2d(3, 3, 1)
    model.compile(backend="eager")
    with pytest.raises(UsageError, match="compiled already"):
        cnnfast.accelerate(model)


def test_no_module() -> None:
    with pytest.raises(TypeError, match="takes an nn.Module, got function"):
        cnnfast.accelerate(lambda x: x)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="takes an nn.Module, got int"):
        cnnfast.explain(3)  # type: ignore[arg-type]


# --- what changes later is seen ---------------------------------------------------------------------------------------


def test_five_sizes_cost_two_compilations() -> None:
    ours, plain = pair()
    for shape in ((1, 3, 16, 16), (2, 3, 24, 24), (3, 3, 40, 32), (5, 3, 16, 20), (2, 3, 64, 16)):
        same(ours, plain, images(*shape))
    assert graphs(ours) == 2


@pytest.mark.parametrize("inside", [False, True], ids=["on the model", "inside"])
def test_hooks_added_and_removed_later(inside: bool) -> None:
    ours, plain = pair()
    same(ours, plain, images())
    handles = []
    for model in (ours, plain):
        module = model.decoder[0] if inside else model  # type: ignore[index]
        handles.append(module.register_forward_hook(lambda m, args, y: y * 2))
        handles.append(module.register_forward_pre_hook(lambda m, args: (args[0] + 1,)))
    assert not torch.allclose(plain(images()), cnnfast.restore(copy.deepcopy(ours))(images()) * 0)
    same(ours, plain, images())
    for handle in handles:
        handle.remove()
    same(ours, plain, images())


def doubled(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y * 2


def test_hooks_that_come_and_go_are_compiled_once() -> None:
    ours, plain = pair()
    found = []
    for _ in range(3):
        handles = [m.decoder[0].register_forward_hook(doubled) for m in (ours, plain)]  # type: ignore[union-attr, index, operator]
        same(ours, plain, images())
        for handle in handles:
            handle.remove()
        same(ours, plain, images())
        found.append(graphs(ours))
    assert found == [2, 2, 2]


def test_hooks_on_what_took_a_modules_place() -> None:
    ours, plain = pair()
    same(ours, plain, images())
    for model in (ours, plain):
        model.decoder[0] = copy.deepcopy(model.decoder[0])  # type: ignore[index, operator]
        model.decoder[0].register_forward_hook(doubled)  # type: ignore[index, operator, union-attr]
    same(ours, plain, images())


class Listed(nn.Module):
    """Calls modules that are none of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Conv2d(4, 8, 3)
        self.blocks = [nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())]
        object.__setattr__(self, "hidden", nn.Conv2d(8, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        for block in [self.own, *self.blocks, self.hidden]:  # type: ignore[list-item]
            x = block(x)
        return x


@pytest.mark.parametrize("on", ["blocks", "hidden"])
def test_hooks_on_modules_outside_of_the_tree(on: str) -> None:
    ours, plain = pair(Listed())
    x = images(2, 4, 16, 16)
    same(ours, plain, x)
    for model in (ours, plain):
        module: Any = model.blocks[0][0] if on == "blocks" else model.hidden  # type: ignore[index, union-attr]
        module.register_forward_hook(doubled)
    same(ours, plain, x)


def test_settings_of_dynamo_are_as_they_were() -> None:
    ours, plain = pair(Listed())
    names = ("skip_nnmodule_hook_guards", "recompile_limit", "rewrite_assert_with_torch_assert")
    before = [getattr(torch._dynamo.config, name) for name in names]
    same(ours, plain, images(2, 4, 16, 16))
    assert [getattr(torch._dynamo.config, name) for name in names] == before


def test_changed_attributes_weights_and_modules() -> None:
    ours, plain = pair()
    same(ours, plain, images())
    changes: list[Callable[[Any], None]] = [
        lambda m: setattr(m.decoder[1], "eps", 0.3),
        lambda m: setattr(m.decoder[1], "eps", 0.7),
        lambda m: setattr(m.decoder[2], "negative_slope", 0.5),
        lambda m: m.decoder[0].weight.data.mul_(0.5),
        lambda m: setattr(m.decoder[0], "weight", nn.Parameter(m.decoder[0].weight.detach() * 2)),
        lambda m: m.load_state_dict({k: t * 0.9 if t.is_floating_point() else t for k, t in m.state_dict().items()}),
        lambda m: m.load_state_dict({k: t.clone() for k, t in m.state_dict().items()}, assign=True) and None,
        lambda m: m.decoder.__setitem__(2, nn.ELU()),
        lambda m: torch.nn.utils.parametrizations.weight_norm(m.encoder[0]),
        lambda m: torch.nn.utils.parametrize.remove_parametrizations(m.encoder[0], "weight"),
        lambda m: m.decoder[3].__setattr__("scale_factor", 3.0),
    ]
    for change in changes:
        for model in (ours, plain):
            change(model)
        same(ours, plain, images())
    record = record_of(ours)
    assert record is not None and record.failed is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cast_models(dtype: torch.dtype) -> None:
    ours, plain = pair()
    same(ours, plain, images())
    x = images().to(dtype)
    ours.to(dtype), plain.to(dtype)
    with torch.no_grad():
        a, b, exact = ours(x), plain(x), copy.deepcopy(plain).double()(x.double())
    assert a.dtype == b.dtype and a.stride() == b.stride()
    assert (a - exact).abs().max() <= 2 * (b - exact).abs().max() + torch.finfo(dtype).eps


def test_autocast() -> None:
    ours, plain = pair()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        a, b = ours(images()), plain(images())
    with torch.no_grad():
        exact = plain(images())
    assert a.dtype == b.dtype == torch.bfloat16
    assert (a - exact).abs().max() <= 2 * (b - exact).abs().max() + 0.004
    same(ours, plain, images())  # outside again


def test_meta_device_and_empty_batches() -> None:
    ours, plain = pair()
    same(ours, plain, images(0, 3, 16, 16))
    assert ours.to("meta")(images().to("meta")).shape == (2, 3, 32, 32)


def test_channels_last_models_and_inputs() -> None:
    ours, plain = pair()
    same(ours, plain, images().contiguous(memory_format=torch.channels_last))
    for model in (ours, plain):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    same(ours, plain, images())


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_with_an_optimiser_and_dropout() -> None:
    ours, plain = pair()
    for model in (ours, plain):
        model.train()
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3) for m in (ours, plain)]
    for step in range(3):
        losses = []
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad(set_to_none=True)
            loss = model(images()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert int(ours.decoder[1].num_batches_tracked) == 3  # type: ignore[union-attr,index,arg-type]


def test_second_derivatives() -> None:
    ours, plain = pair()
    found = []
    for model in (ours, plain):
        x = images().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_computes_again() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.ConvTranspose2d(3, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

    ours, plain = pair(Checkpointed())
    found = []
    for model in (ours, plain):
        model.train()
        x = images().requires_grad_()
        model(x).square().sum().backward()
        found.append((x.grad, *[p.grad for p in model.parameters()], *model.buffers()))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    assert int(ours.body[1].num_batches_tracked) == 2  # type: ignore[union-attr,index,arg-type]


# --- who sees the plain model -----------------------------------------------------------------------------------------


def test_tracers_transforms_and_modes_see_the_plain_model() -> None:
    ours, plain = pair()
    x = images()
    same(torch.jit.trace(ours, x, check_trace=False), plain, x)
    parameters = {k: p.detach() for k, p in ours.named_parameters()}
    call = torch.func.functional_call
    torch.testing.assert_close(
        torch.func.vmap(lambda x: call(ours, parameters, x))(x[None]), plain(x)[None], rtol=1e-5, atol=1e-5
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours(x)
    with FlopCounterMode(display=False) as expected, torch.no_grad():
        plain(x)
    assert counter.get_total_flops() == expected.get_total_flops() > 0
    tangent = torch.func.jvp(lambda x: ours(x), (x,), (x,))[1]
    torch.testing.assert_close(tangent, torch.func.jvp(lambda x: plain(x), (x,), (x,))[1])
    assert graphs(ours) == 0


def test_hooks_on_every_module_see_every_module() -> None:
    ours, _ = pair()
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m)))
    try:
        ours(images())
    finally:
        handle.remove()
    assert seen.count(nn.ConvTranspose2d) == 2 and graphs(ours) == 0


def test_compiled_and_exported_around() -> None:
    ours, plain = pair()
    outer = torch.compile(nn.Sequential(ours, nn.ReLU()), backend="eager", fullgraph=True)
    torch.testing.assert_close(outer(images()), plain(images()).relu())
    exported = torch.export.export(ours, (images(),)).module()
    torch.testing.assert_close(exported(images()), plain(images()))


def test_functional_call_with_other_weights() -> None:
    ours, plain = pair()
    other = {k: p.detach() * 1.5 for k, p in plain.named_parameters()}
    same(ours, plain, images())
    with torch.no_grad():
        a, b = (torch.func.functional_call(m, other, (images(),)) for m in (ours, plain))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["at the first call", "later"])
@pytest.mark.parametrize(
    "bad",
    [images(1, 5, 16, 16), images(3, 16, 16, 4, 4), images().long(), None],
    ids=["channels", "dims", "dtype", "none"],
)
def test_a_bad_input_raises_what_it_raised(bad: Any, first: bool) -> None:
    ours, plain = pair()
    if not first:
        same(ours, plain, images())
    with pytest.raises(Exception) as expected:
        plain(bad)
    with pytest.raises(type(expected.value)) as raised:
        ours(bad)
    assert type(raised.value) is type(expected.value) and str(raised.value) == str(expected.value)
    same(ours, plain, images())
    assert graphs(ours) >= 1


def test_what_cannot_be_traced_runs_as_it_stands_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> Any:
        raise ValueError("a matcher with a bug")

    monkeypatch.setattr("cnnfast.nn.accelerate_call.rewritten", broken)
    ours, plain = pair()
    with pytest.warns(CnnfastWarning, match="Generator runs as it stands: .*a matcher with a bug"):
        same(ours, plain, images())
    same(ours, plain, images())
    assert "a matcher with a bug" in str(cnnfast.explain(ours))


_PLAIN: dict[str, Any] = {}
exec("def check(x):\n    assert (x >= 0).all(), 'below zero'", _PLAIN)  # pytest would rewrite it


class Checks(nn.Module):
    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error = error
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.error is AssertionError:
            _PLAIN["check"](x)
        elif self.error is IndexError:
            return self.conv(x) * self.table[(x < 0).sum().reshape(1) + 3]
        elif x.min() < 0:
            raise self.error("below zero")
        return self.conv(x).relu()


@pytest.mark.parametrize("first", [True, False], ids=["at the first call", "later"])
@pytest.mark.parametrize("error", [AssertionError, IndexError, KeyError, ValueError])
def test_values_that_a_model_refuses_raise_what_they_raised(
    error: type[Exception], first: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    ours, plain = pair(Checks(error))
    with torch.no_grad():
        if not first:
            for _ in range(3):
                torch.testing.assert_close(ours(images().abs()), plain(images().abs()))
        with pytest.raises(error) as expected:
            plain(-images().abs())
        with pytest.raises(error) as raised:
            ours(-images().abs())
        assert type(raised.value) is type(expected.value) and str(raised.value) == str(expected.value)
        torch.testing.assert_close(ours(images().abs()), plain(images().abs()))
    assert graphs(ours) > 0, "it goes on accelerated"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [AssertionError, IndexError])
def test_errors_of_dynamos_own_are_no_users(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises some as they are: "Guard failed on the same frame it was created" for NumPy's numbers in inference
    mode."""

    def broken(*args: object, **kwargs: object) -> None:
        raise error("Guard failed on the same frame it was created")

    monkeypatch.setattr("torch._dynamo.convert_frame.CheckFunctionManager", broken)
    ours, plain = pair()
    with pytest.warns(CnnfastWarning, match="Generator runs as it stands: .*Guard failed on the same frame"):
        same(ours, plain, images())


class Passed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 8, 3), nn.Dropout(0.3), nn.Dropout2d(0.3, inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(x)
        return self.one(x), y, self.two(y), self.two(y[0].unsqueeze(0)), self.one(y).relu_()


@pytest.mark.parametrize("gradients", [True, False])
def test_a_dropout_that_is_off_gives_what_it_is_given(gradients: bool) -> None:
    ours, plain = pair(Passed())
    x = images()
    with torch.set_grad_enabled(gradients):
        for _ in range(3):
            got, expected = ours(x), plain(x)
            same_objects = [[a is b for b in (x, *ys)] for ys in (got, expected) for a in ys]
            assert same_objects[:5] == same_objects[5:]
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)
        for model in (ours, plain):
            model.train()
        torch.manual_seed(3)
        got = ours(x)
        torch.manual_seed(3)
        for a, b in zip(got, plain(x), strict=True):
            torch.testing.assert_close(a, b)


class Signs(nn.Module):
    """Wavelets as Cosmos' VAE has them: a high pass by powers of -1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.register_buffer("wave", torch.rand(4))
        self.register_buffer("at", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        high = (self.wave * (-1) ** self.at).reshape(1, 1, 1, 4).repeat(16, 1, 1, 1)
        y = torch.nn.functional.conv2d(self.conv(x).relu(), high, groups=16)
        return y * (-1.5) ** self.at[: y.shape[-1] // 4].sum() * (-2) ** (x.shape[-1] // 8)


@pytest.mark.parametrize("gradients", [True, False])
def test_powers_of_numbers_below_zero(gradients: bool) -> None:
    """FX writes them as ``-1 ** x``."""
    ours, plain = pair(Signs())
    with torch.set_grad_enabled(gradients):
        for size in (16, 16, 16, 24, 32):
            torch.testing.assert_close(ours(images(2, 16, size, size)), plain(images(2, 16, size, size)))


# --- methods and parts ------------------------------------------------------------------------------------------------


def test_methods_run_the_children() -> None:
    ours, plain = pair()
    z = plain.encode(images()).detach()  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(z), plain.decode(z), rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    child = record_of(ours.decoder)  # type: ignore[arg-type]
    assert child is not None and len(child.graphs) == 1 and graphs(ours) == 0


def test_weights_are_packed_once() -> None:
    ours, plain = pair()
    ours.requires_grad_(False)
    for _ in range(3):
        same(ours, plain, images(4, 3, 64, 64))
    assert PACKS.invalidate(ours) > 0


def test_scripted_and_quantised_children() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()))
            self.up = nn.Sequential(nn.ConvTranspose2d(8, 16, 4, 2, 1), nn.ReLU())
            self.last = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(16, 16)), {nn.Linear})

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.up(self.first(x)).movedim(1, -1))

    torch.manual_seed(0)
    plain = Mixed().eval()
    ours = Mixed().eval()
    for name in ("first", "up"):
        getattr(ours, name).load_state_dict(getattr(plain, name).state_dict())
    ours.last = plain.last
    cnnfast.accelerate(ours)
    same(ours, plain, images())
    record = record_of(ours)
    assert record is not None and record.failed is None and any(g.sites for g in record.graphs)


def test_hooks_that_were_there_before() -> None:
    torch.manual_seed(0)
    plain = randomized(Generator()).eval()
    seen: list[int] = []
    plain.decoder[0].register_forward_hook(lambda m, args, y: seen.append(1) or y * 2)  # type: ignore[index,func-returns-value,union-attr]
    ours = cnnfast.accelerate(copy.deepcopy(plain))
    same(ours, plain, images())
    assert len(seen) == 4


def test_an_average_of_weights_is_seen() -> None:
    ours, plain = pair()
    same(ours, plain, images())
    for model in (ours, plain):
        for k, p in enumerate(model.parameters()):
            p.data.lerp_(torch.full_like(p, 0.01 * k), 0.1)
    same(ours, plain, images())


def test_in_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        ours, plain = pair()
        parallel = nn.parallel.DistributedDataParallel(ours)
        for model in (parallel, plain):
            model(images()).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert graphs(ours) >= 1
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).abs().max() <= 1e-4 * b.grad.abs().max() + 1e-4


# --- what is found ----------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """One convolution, 64 -> 64 and transposed so that a CPU gains, and calls around it."""

    def __init__(self, calls: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(64, 64, 4, 2, 1)
        self.plain = nn.Conv2d(64, 64, 3, padding=1)
        self.norm = nn.BatchNorm2d(64)
        self.calls = calls

    def forward(self, x: Tensor) -> Any:
        return self.calls(self, x)


FOUND = {
    "functional": (lambda m, x: F.relu(m.conv(x)), "conv_transpose2d + relu"),
    "method": (lambda m, x: m.conv(x).tanh(), "conv_transpose2d + tanh"),
    "in place": (lambda m, x: m.norm(m.conv(x)).relu_(), "conv_transpose2d + batch_norm + relu"),
    "positional in place": (lambda m, x: F.leaky_relu(m.conv(x), 0.3, True), "conv_transpose2d + leaky_relu"),
    "added after": (lambda m, x: F.relu(m.norm(m.conv(x)) + m.other), "conv_transpose2d + batch_norm + add + relu"),
    "added before": (lambda m, x: F.relu(m.other + m.norm(m.conv(x))), "conv_transpose2d + batch_norm + add + relu"),
    "added in place": (lambda m, x: F.relu(m.conv(x).add_(m.other)), "conv_transpose2d + add + relu"),
    "size": (
        lambda m, x: F.relu(m.plain(F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] * 2)))),
        "interpolate + conv2d + relu",
    ),
    "float factor": (lambda m, x: m.plain(F.interpolate(x, scale_factor=2.0)), "interpolate + conv2d"),
    "padded": (
        lambda m, x: torch.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), m.plain.weight)),
        "pad + conv2d + relu",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_functional_forms(name: str) -> None:
    calls, pattern = FOUND[name]
    ours, plain = pair(Calls(calls))
    x = images(2, 64, 16, 16)
    for model in (ours, plain):
        model.other = images(2, 64, 32, 32)  # type: ignore[assignment]
    same(ours, plain, x)
    same(ours, plain, images(1, 64, 16, 16)) if name.startswith("size") else None
    with torch.no_grad():
        (row,) = cnnfast.explain(ours, x).rows
    assert row.pattern == pattern and row.found and row.flops > 0 and row.bytes > 0
    assert row.fused or name == "padded", row.why_not
    assert "test_accelerate.py:" in row.line


def _two_users(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return F.relu(y) + y


def _alias(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = m.conv(x)
    x.add_(1)
    return F.relu(y)


def _grad_mode(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    torch._C._set_grad_enabled(torch.is_grad_enabled())
    return F.relu(y)


APART = {
    "two users": (_two_users, "its result has 2 users"),
    "a write to an alias": (_alias, "add_, which runs in between, may write"),
    "a switch": (_grad_mode, "_set_grad_enabled, which runs in between"),
    "another shape": (
        lambda m, x: F.relu(m.conv(x) + m.other[:, :, :1, :1]),
        "what is added to it is of another shape",
    ),
    "scaled": (lambda m, x: F.relu(torch.add(m.conv(x), m.other, alpha=2)), ""),
    "onto another": (lambda m, x: F.relu((m.other * 1).add_(m.conv(x))), "add_ follows, which takes it in another way"),
    "unknown": (lambda m, x: m.conv(x).softmax(1), "softmax follows"),
}


@pytest.mark.parametrize("name", APART)
def test_what_does_not_go_on(name: str) -> None:
    calls, ended = APART[name]
    ours, plain = pair(Calls(calls))
    for model in (ours, plain):
        model.other = images(2, 64, 32, 32)  # type: ignore[assignment]
    same(ours, plain, images(2, 64, 16, 16))
    record = record_of(ours)
    assert record is not None
    site = record.graphs[-1].sites[0]
    assert ended in site.ended
    with torch.no_grad():
        (row,) = cnnfast.explain(ours, images(2, 64, 16, 16)).rows
    assert row.pattern == "conv_transpose2d"


class Residual3d(nn.Module):
    """As in SegResNet: what is added has three dimensions, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, 16), nn.Conv3d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.norm(x))) + x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_three_dimensions(channels_last: bool) -> None:
    ours, plain = pair(nn.Sequential(Residual3d(), Residual3d()))
    x = images(1, 16, 12, 12, 12)
    if channels_last:
        ours, plain = (m.to(memory_format=torch.channels_last_3d) for m in (ours, plain))
        x = x.contiguous(memory_format=torch.channels_last_3d)
    same(ours, plain, x)
    with torch.no_grad():
        found = cnnfast.explain(ours, x)
    assert found.found == 2 and found.rows[0].pattern == "conv3d + add + relu"


class Decoder3d(nn.Module):
    """Nearest upsampling by modules and by calls, as decoders of volumes have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(16, 16, 3, padding=1), nn.LeakyReLU(0.2))
        self.second, self.norm = nn.Conv3d(16, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.third = nn.Conv3d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.first(x), scale_factor=(1.0, 2.0, 2.0), mode="nearest")
        y = F.silu(self.norm(self.second(y)))
        return self.third(F.interpolate(y, size=[2 * n for n in y.shape[2:]]))


@pytest.mark.parametrize("channels_last", [False, True])
def test_upsamplings_in_three_dimensions(channels_last: bool) -> None:
    ours, plain = pair(Decoder3d())
    x = images(1, 16, 5, 6, 4)
    if channels_last:
        ours, plain = (m.to(memory_format=torch.channels_last_3d) for m in (ours, plain))
        x = x.contiguous(memory_format=torch.channels_last_3d)
    same(ours, plain, x)
    with torch.no_grad():
        rows = cnnfast.explain(ours, x).rows
    assert [row.pattern for row in rows] == [
        "interpolate + conv3d + leaky_relu",
        "interpolate + conv3d + group_norm + silu",
        "interpolate + conv3d",
    ]
    assert all(row.fused for row in rows), [row.why_not for row in rows]


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_in_three_dimensions(batch: int) -> None:
    ours, plain = pair(Decoder3d())
    exact, x = copy.deepcopy(plain).double(), images(batch, 16, 8, 8, 8)
    found = []
    for model in (plain, ours, exact):
        leaf = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
        y = model(leaf)
        y.square().mean().backward()
        found.append([y.detach(), leaf.grad, *(p.grad for p in model.parameters())])
    for want, got, e in zip(*found, strict=True):
        assert got.stride() == want.stride() and model_verdict(got, e, [want]) is None
    rows = cnnfast.explain(ours, x).rows
    assert len(rows) == 3 and all(row.fused for row in rows), [row.why_not for row in rows]


class Up3d(nn.Module):
    """As SegResNet's decoder: a 1x1x1 convolution, whose result ATen has contiguous, is enlarged and added to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.low = nn.Conv3d(8, 32, 3, padding=1), nn.Conv3d(32, 16, 1, bias=False)
        self.skip, self.last = nn.Conv3d(8, 16, 1), nn.Conv3d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.low(F.relu(self.first(x))), scale_factor=2, mode="trilinear", align_corners=False)
        return self.last(y + self.skip(F.pad(x, (8,) * 6)))


def test_channels_last_goes_on_inside_of_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    run = Call.run

    def recorded(self: Call, x: Any, operands: Any) -> Any:
        if self.kind.name == "interpolate":
            given.append(x.is_contiguous(memory_format=torch.channels_last_3d))
        return run(self, x, operands)

    monkeypatch.setattr(Call, "run", recorded)
    ours, plain = pair(Up3d())
    same(ours, plain, images(1, 8, 16, 16, 16))
    assert given == [True]  # then the graph has settled


@pytest.mark.parametrize("leads", [False, True])
def test_sum_with_a_stride_of_a_dimension_of_one(leads: bool) -> None:
    """As attention leaves its maps: channels-last but for the batch's stride, which ATen's sum follows."""
    ours, plain = pair(
        Calls(lambda m, x: torch.rand_like(F.relu(m.other + m.conv(x) if leads else m.conv(x) + m.other)))
    )
    other = images(32 * 32, 1, 64).permute(1, 2, 0).reshape(1, 64, 32, 32)
    assert other.stride() == (64, 1, 32 * 64, 64)
    for model in (ours, plain):
        model.other = other  # type: ignore[assignment]
    x = images(1, 64, 16, 16)
    results = []
    with torch.no_grad():
        for model in (ours, plain):
            torch.manual_seed(0)
            results.append(model(x))
    assert results[0].stride() == results[1].stride()
    assert torch.equal(*results)


@pytest.mark.parametrize("channels_last", [False, True])
def test_sites_that_are_switched_off_keep_the_format(channels_last: bool) -> None:
    """Each alone and all: what follows, random numbers too, is as in eager mode."""

    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + torch.randn_like(y)

    ours, plain = pair(Noisy(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 3), nn.ReLU()))
    x = images(2, 32, 48, 48)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def run(model: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return model(x)

    with torch.no_grad():
        expected = run(plain)
        run(ours)
        record = record_of(ours)
        assert record is not None
        sites = record.graphs[-1].sites
        assert [s.converts for s in sites] == [True, True]
        for off in [[s] for s in sites] + [sites]:
            for s in sites:
                s.off = "the test's wish" if s in off else None
            got = run(ours)
            assert got.stride() == expected.stride()
            torch.testing.assert_close(got, expected)


def test_unknown_padding_runs_as_it_stands() -> None:
    with torch.no_grad():
        found = cnnfast.explain(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), images())
        assert found.convolutions == 1


# --- memory formats between steps -------------------------------------------------------------------------------------


class Maps(nn.Module):
    """Two convolutions whose steps gain, with a function of the first one's result in between."""

    def __init__(self, between: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.ConvTranspose2d(16, 32, 4, 2, 1), nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.third = nn.ConvTranspose2d(64, 16, 4, 2, 1)
        self.same = nn.Conv2d(32, 32, 3, padding=1)
        self.wide = nn.Parameter(torch.randn(16, 128, 3, 3) * 0.1)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.first(x))
        return self.between(self, y)  # type: ignore[call-arg]


def written(m: Any, y: Tensor) -> Tensor:
    z = m.second(y)
    y[:, 0] = 1
    return z.sum() + y


def by_running(y: Tensor) -> Tensor:
    mean, var = torch.linspace(-1, 1, 32), torch.linspace(0.5, 2, 32)
    return F.batch_norm(y, mean, var)


def twice(y: Tensor) -> Tensor:
    y[:, :4].mul_(2)
    return y


def normed(y: Tensor) -> Tensor:
    """A norm over the channels, written out."""
    mean = y.mean(1, keepdim=True)
    variance = (y - mean).pow(2).mean(dim=1, keepdim=True)
    return (y - mean) / torch.sqrt(variance + 1e-6) * torch.linspace(0.5, 2, 32).view(32, 1, 1)


def gated(y: Tensor) -> Tensor:
    """By the channels' means and by the positions'."""
    by_channel = torch.sigmoid(F.adaptive_avg_pool2d(y, 1)) * y.mean((2, 3), keepdim=True)
    by_channel = by_channel + F.adaptive_avg_pool2d(y, 1)
    by_position = torch.cat([y.mean(1, keepdim=True), torch.max(y, 1, keepdim=True)[0]], 1).sigmoid().mean(1, True)
    return by_position * (by_channel * y)


def halves(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=1)
    c, d = torch.split(torch.cat([a * b, y[:, 8:24]], 1), [16, 16], dim=1)
    return torch.cat([F.silu(c) - 1, F.avg_pool2d(d, 3, 1, 1)], 1)


def half_viewed(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=1)
    return y * b.flatten(1).mean(1).view(-1, 1, 1, 1) + torch.cat([a, a], 1)


def half_returned(m: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    return m.second(y), y[:, :16]


def half_overwritten(y: Tensor) -> Tensor:
    z = y * 2
    a, b = z[:, :16], z[:, 16:]
    a.mul_(b.detach().clone())
    return torch.cat([b, a], 1)


def half_set(m: Any, y: Tensor) -> Tensor:
    """As a partial convolution is written. (Who read a part sees what it is set to.)"""
    z = y * 2
    a = z[:, :16]
    z[:, :16] = F.conv2d(F.relu(a), m.wide[:, :16], padding=1)
    z[:, 20:24] = 0.25
    return m.second(torch.cat([z[:, 16:], a], 1) + z)


def half_set_between(m: Any, y: Tensor) -> Tensor:
    """Somebody reads it in eager mode's format ahead of that, and somebody after it."""
    z = y * 2
    before = F.dropout(z, 0.5, training=True)
    z[:, 8:] = z[:, :24] + 1
    return m.second(z) + before.mean() * F.dropout(z, 0.5, training=True).sum()


def half_set_of_a_view(m: Any, y: Tensor) -> Tensor:
    z = y * 2
    rows = z.view(*z.shape[:2], -1)
    z[:, :16] = 0.5
    return m.second(z) + rows.mean()


def rows_set(m: Any, y: Tensor) -> Tensor:
    z = y * 2
    z[:, :16, 1:] = 0.5
    return m.second(z)


def attended(y: Tensor) -> Tensor:
    """A residual stream of tokens, which starts as a view of a map and ends as one."""
    tokens = y.flatten(2).transpose(1, 2)
    tokens = tokens + F.layer_norm(tokens, tokens.shape[2:])
    tokens = tokens + F.gelu(F.linear(F.layer_norm(tokens, tokens.shape[2:]), torch.eye(32, device=y.device) * 2))
    return tokens.transpose(1, 2).view(y.shape)


def windowed(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    windows = y.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1)
    rows = F.layer_norm(windows.reshape(-1, 16, c), (c,)).view(windows.shape) + windows
    return rows.permute(0, 5, 1, 3, 2, 4).reshape(y.shape) + y


def parts_of_tokens(y: Tensor) -> Tensor:
    tokens = y.permute(0, 2, 3, 1)
    tokens = tokens + F.layer_norm(tokens, (32,))
    a, b = tokens.chunk(2, dim=-1)
    first, others = torch.cat([a * b.sigmoid(), b], -1).split([1, y.shape[2] - 1], dim=1)
    return torch.cat([others.sin(), first], 1).permute(0, 3, 1, 2)


def mixed(y: Tensor) -> Tensor:
    """A sum that lies as its first operand does."""
    tokens = y.permute(0, 2, 3, 1)
    return tokens + F.layer_norm(tokens, (32,))


def tokens_overwritten(y: Tensor) -> Tensor:
    """A copy in eager mode."""
    rows = y.permute(0, 2, 3, 1).reshape(-1, 32)
    rows += 1
    return y.mean() + rows.mean()


def overwritten_after(y: Tensor) -> Tensor:
    z = y * 2
    rows = z.permute(0, 2, 3, 1).reshape(-1, 32)
    z.mul_(3)
    return z + rows.mean()


def half_normed(m: Any, y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=1)
    return m.second(torch.cat([F.group_norm(a, 4), F.conv2d(b, m.wide[:, :16], padding=1)], 1))


def ramp(channels: int) -> Tensor:
    """A contiguous map that no convolution made, beside those of `Maps`."""
    return torch.linspace(-1, 1, 2 * channels * 16 * 16).view(2, channels, 16, 16)


def onto_what_is_outside(m: Any, y: Tensor) -> Tensor:
    z = ramp(32)
    z += y
    return m.second(z) + z.mean()


def without_autocast(m: Any, y: Tensor) -> Tensor:
    """As quantizers and attention are guarded."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        z = y * 2
    return m.second(z)


BETWEEN: dict[str, tuple[Callable[[Any, Tensor], Any], list[bool | None]]] = {
    "a step with two users": (lambda m, y: m.second(y) + m.second(y * 0.5), [True, False, True]),
    "activations": (lambda m, y: m.second(F.silu(y) + F.relu(y) * 0.5), [True, False]),
    "a pool": (lambda m, y: m.second(F.max_pool2d(y, 2)), [True, False]),
    "shuffled pixels": (lambda m, y: m.second(F.pixel_shuffle(torch.cat([y, y * 2, y, y], 1), 2)), [None, None]),
    "pixels shuffled back": (lambda m, y: F.conv2d(F.pixel_unshuffle(y, 2), m.wide), [None, None]),
    "padded": (lambda m, y: m.second(F.pad(y * 2, (1, 2, 0, 1), mode="reflect") + 1), [None, None]),
    "cropped by a padding": (lambda m, y: m.second(F.pad(y * 2, (-1, -1, -1, 0)) + 1), [None, None]),
    "padded by channels": (lambda m, y: m.third(F.pad(y * 2, (0, 0, 0, 0, 0, 32)) + 1), [None, None]),
    "padded in a circle": (lambda m, y: m.second(F.pad(y * 2, (1, 1, 1, 1), mode="circular") + 1), [None, None]),
    "prelu": (lambda m, y: m.second(F.prelu(y * 2, torch.linspace(-1, 1, 32))), [None, None]),
    "a sum": (lambda m, y: m.second(y).tanh() + F.interpolate(y, scale_factor=2.0)[:, :16], [True, False]),
    "cat": (lambda m, y: m.third(torch.cat([y, torch.sigmoid(y)], 1)), [True, False]),
    "cat along rows": (lambda m, y: m.second(torch.cat([y, y], 2)), [None, None]),
    "returned, too": (lambda m, y: (m.second(y), y), [True, False]),
    "returned": (lambda m, y: y, [None]),
    "dropout": (lambda m, y: m.second(F.dropout(y * 2, 0.5, training=True)), [None, None]),
    "dropouts that are off": (
        lambda m, y: m.second(F.dropout2d(F.alpha_dropout(F.dropout(y * 2, 0.5, False), 0.5), 0.5, False, True)),
        [True, False],
    ),
    "dropout in the next step": (
        lambda m, y: m.third(torch.cat([F.dropout(m.same(y), 0.5, training=True), y], 1)),
        [None, None, None],
    ),
    "statistics in the next step": (lambda m, y: F.group_norm(m.second(y), 4) + y.mean(), [None, None]),
    "a sum of positions": (lambda m, y: m.second(y) * y.mean((1, 2, 3), keepdim=True), [True, False]),
    "a view": (lambda m, y: (m.second(y), y.view(y.shape[0], -1)), [None, None]),
    "written": (written, [None, None]),
    "as a weight": (lambda m, y: F.conv2d(m.second(y), y[:, :16, :3, :3]), [None, None]),
    "a part copied": (lambda m, y: F.conv2d(m.second(y), y[:, :16, :3, :3].contiguous()), [None, None]),
    "tokens": (lambda m, y: m.second(y) + F.layer_norm(y.permute(0, 2, 3, 1), (32,)).mean(), [None, None]),
    "tokens by a linear layer": (
        lambda m, y: m.second(y).mean() + F.linear(y.flatten(2).transpose(1, 2), torch.eye(32)),
        [None, None],
    ),
    "tokens and back": (lambda m, y: m.second(attended(y)), [None, None]),
    "windows and back": (lambda m, y: m.second(windowed(y)), [None, None]),
    "parts of tokens": (lambda m, y: m.second(parts_of_tokens(y)), [None, None]),
    "tokens returned": (lambda m, y: (m.second(y), y.permute(0, 2, 3, 1)), [None, None]),
    "tokens returned, normed": (lambda m, y: (m.second(y), mixed(y)), [None, None]),
    "tokens overwritten": (lambda m, y: m.second(y) + tokens_overwritten(y), [None, None]),
    "tokens of what is overwritten": (lambda m, y: m.second(overwritten_after(y)), [None, None]),
    "tokens read by rows": (lambda m, y: m.second(y) + y.flatten(2).transpose(1, 2).softmax(1).mean(), [None, None]),
    "flattened": (lambda m, y: m.second(y) + y.reshape(y.shape[0], -1).softmax(1).mean(), [None, None]),
    "a norm": (lambda m, y: m.second(F.silu(F.group_norm(y * 2, 4))), [None, None]),
    "a norm of each channel": (lambda m, y: m.second(F.relu_(F.instance_norm(y * 2))), [None, None]),
    "a norm by what was measured before": (lambda m, y: m.second(by_running(y * 2)), [None, None]),
    "bilinear": (lambda m, y: m.second(F.interpolate(y * 2, scale_factor=2.0, mode="bilinear")), [True, False]),
    "overwritten": (lambda m, y: m.second((y * 2).mul_(0.5).relu_()), [None, None]),
    "added to": (lambda m, y: m.second(operator.iadd(y * 2, y)) + y.mean(), [None, None]),
    "a norm over the channels": (lambda m, y: m.second(normed(y)), [None, None]),
    "gates": (lambda m, y: m.second(gated(y)), [None, None]),
    "parts of the channels": (lambda m, y: m.second(halves(y)), [None, None]),
    "a viewed part of the channels": (lambda m, y: m.second(half_viewed(y)), [None, None]),
    "a returned part of the channels": (half_returned, [None, None]),
    "a returned view of a part": (lambda m, y: (m.second(y), y[:, :16].flatten(2)), [None, None]),
    "an overwritten part of the channels": (lambda m, y: m.second(half_overwritten(y)), [None, None]),
    "a norm of a part": (half_normed, [None, None, None]),
    "a part of the channels is set": (half_set, [None, None, None]),
    "a part is set, and the map read": (half_set_between, [None, None]),
    "a part is set, and viewed": (half_set_of_a_view, [None, None]),
    "a part of the rows is set": (rows_set, [None, None]),
    "normalized": (lambda m, y: m.second(F.normalize(y, dim=1) + y.norm(dim=1, keepdim=True)), [None, None]),
    "a view is overwritten": (lambda m, y: m.second(twice(y * 2)), [None, None]),
    "beside a map from outside": (lambda m, y: m.third(torch.cat([ramp(32), y], 1)), [None, None]),
    "by a map from outside": (lambda m, y: m.second(ramp(32) * y), [None, None]),
    "written to a map from outside": (onto_what_is_outside, [None, None]),
    "beside a larger map from outside": (
        lambda m, y: F.conv2d(torch.cat([y, ramp(96)], 1), m.wide, padding=1),
        [None, None],
    ),
    "autocast that is off": (without_autocast, [True, False]),
}
# Without gradients, more stays.
IN_INFERENCE: dict[str, list[bool | None]] = {
    "cat along rows": [True, False],
    "a part copied": [True, False],
    "tokens": [True, False],
    "tokens by a linear layer": [True, False],
    "tokens read by rows": [True, False],
    "a viewed part of the channels": [True, False],
    "tokens and back": [True, False],
    "windows and back": [True, False],
    "parts of tokens": [True, None],
    "tokens returned, normed": [True, False],
    "statistics in the next step": [True, False],
    "shuffled pixels": [True, False],
    "pixels shuffled back": [True, False],
    "padded": [True, False],
    "cropped by a padding": [True, False],
    "prelu": [True, False],
    "a norm": [True, False],
    "a norm of each channel": [True, False],
    "a norm by what was measured before": [True, False],
    "a norm over the channels": [True, False],
    "gates": [True, False],
    "parts of the channels": [True, False],
    "a norm of a part": [True, True, False],
    "a part of the channels is set": [True, True, False],
    "a part is set, and the map read": [True, False],
    "normalized": [True, False],
    "overwritten": [True, False],
    "padded by channels": [True, False],
    "added to": [True, False],
    "beside a map from outside": [True, False],
    "by a map from outside": [True, False],
    "dropout in the next step": [True, None, False],
}


@pytest.mark.filterwarnings("error::cnnfast.messages.CnnfastWarning")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", BETWEEN)
def test_channels_last_stays_between_steps_where_nobody_can_tell(
    name: str, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite_layout, "_MAPS", 0)  # as if the maps were larger
    monkeypatch.setitem(norm_inference.SMALL, "instance", 0)
    between, formats = BETWEEN[name]
    if name == "written" and gradients:
        pytest.skip("autograd has saved it")
    ours, plain = pair(Maps(between))  # type: ignore[arg-type]
    x = images(2, 16, 8, 8)
    for _ in range(2):
        results = []
        for model in (ours, plain):
            torch.manual_seed(5)
            given = x.clone().requires_grad_(gradients)
            with torch.set_grad_enabled(gradients):
                ys = model(given)
            ys = ys if isinstance(ys, tuple) else (ys,)
            if gradients:
                sum(y.sin().mean() for y in ys).backward()  # type: ignore[union-attr]
            results.append([*ys, *([given.grad, *(p.grad for p in model.parameters())] if gradients else [])])
            model.zero_grad()
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
                assert a.stride() == b.stride()
    record = record_of(ours)
    assert record is not None
    expected = formats if gradients else IN_INFERENCE.get(name, formats)
    assert [site.channels_last for site in record.graphs[-1].sites] == expected


def odd(x: Tensor) -> Tensor:
    """A channels-last map of one image, of whose strides ATen does not say so."""
    n, c, h, w = x.shape
    return F.linear(x.flatten(2).transpose(1, 2), torch.eye(c, device=x.device)).transpose(1, 2).reshape(n, c, h, w)


def summed(m: Any, x: Tensor) -> Tensor:
    """A sum of two such maps, of which ATen says so: it has one loop for both."""
    a = (odd(x) + m.same(x)) / 1.0
    return odd(a) + a


ODD: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "given": lambda m, x: m.same(odd(x)),
    "added": lambda m, x: odd(x) + m.same(x),
    "added to": lambda m, x: m.same(x) + odd(x),
    "added, relu": lambda m, x: F.relu(odd(x) + m.same(x)),
    "added, relu in place": lambda m, x: F.relu_(odd(x) + m.same(x)),
    "added in place": lambda m, x: operator.iadd(odd(x), m.same(x)),
    "a sum of two": lambda m, x: m.same(odd(x) + odd(x * 2)),
    "scaled": lambda m, x: m.same(odd(x) / 2) + odd(x) * 2,
    "a residual block behind another": lambda m, x: m.same(
        F.silu((odd(odd(x) + m.same(F.silu(F.group_norm(odd(x), 4)))) + m.same(x)) / 1.0 + odd(x) / 1.0)
    ),
    "a sum with what a step made": lambda m, x: m.same(m.same(summed(m, x)).sin()),
    "enlarged behind a step": lambda m, x: F.interpolate(
        m.same(m.same(odd(x)).sin()), scale_factor=2.0, mode="bilinear"
    ),
    "padded behind a step": lambda m, x: F.pad(m.same(m.same(odd(x)).sin()), (1, 1, 1, 1)),
    "enlarged": lambda m, x: m.same(F.interpolate(odd(x) / 1.0 + odd(x) / 1.0, scale_factor=2.0)),
    "pooled": lambda m, x: m.same(F.max_pool2d(odd(x), 2)),
    "its tokens": lambda m, x: m.same(odd(x)) * F.layer_norm(odd(x).flatten(2).transpose(1, 2), (16,)).mean(),
    "tokens of what is made of it": lambda m, x: m.same(odd(x)).flatten(2).transpose(1, 2) * 2,
    "a sum of tokens": lambda m, x: (
        m.same(odd(x)).flatten(2).transpose(1, 2) + F.layer_norm(odd(x).flatten(2).transpose(1, 2), (16,))
    ),
}


class Same(nn.Module):
    """``model(x) = f(model, x)``, with two convolutions from 16 channels to 16."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor], dims: int = 2) -> None:
        super().__init__()
        self.f, self.conv = f, (nn.Conv2d if dims == 2 else nn.Conv3d)(16, 16, 3, padding=1)

    def same(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))

    def behind(self, x: Tensor) -> Tensor:
        """Two steps, of which one gives its map to the other."""
        return self.same(self.same(x).sin())

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


@pytest.mark.filterwarnings("error::cnnfast.messages.CnnfastWarning")
@pytest.mark.parametrize("name", ODD)
def test_strides_are_eager_modes_of_maps_that_aten_does_not_take_for_channels_last(name: str) -> None:
    ours, plain = pair(Same(ODD[name]))
    with torch.inference_mode(), accelerate_worth.never_standing():
        for size in (8, 8, 8, 10, 12):  # from the second on, sizes are symbolic
            x = images(1, 16, size, size)
            a, b = ours(x), plain(x)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            assert a.stride() == b.stride()


def unpooled(x: Tensor) -> Tensor:
    return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2) if x.dim() == 4 else x.roll(1, 2)


def by_tokens(x: Tensor) -> Tensor:
    t = x.flatten(2).transpose(1, 2)
    return (t + F.layer_norm(t, (16,))).transpose(1, 2).view(x.shape)


MISTOLD: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "rolled": lambda m, x: m.same(torch.roll(m.same(x), (1, -1), (2, 3))),
    "rolled in one": lambda m, x: m.same(m.same(x).roll(3)),
    "shifted by half": lambda m, x: m.same(torch.fft.ifftshift(m.same(x), dim=(-2, -1))),
    "shuffled": lambda m, x: m.same(F.channel_shuffle(m.same(x), 4)),
    "padded by edges": lambda m, x: m.same(F.pad(m.same(x), (1, 1) * (x.dim() - 2), "replicate")),
    "padded by reflection, relu": lambda m, x: F.relu(F.pad(m.same(x), (1, 1) * (x.dim() - 2), mode="reflect")) * 2,
    "padded by edges, and around": lambda m, x: m.same(
        m.conv(F.pad(m.conv(F.pad(x, (1, 1) * (x.dim() - 2), "replicate")), (1, 1) * (x.dim() - 2), "circular")).sin()
    ),
    "unpooled": lambda m, x: m.same(unpooled(m.same(x))),
    "logarithms": lambda m, x: m.same(F.logsigmoid(m.same(x))),
    "a power of a number": lambda m, x: m.same(0.5 ** m.same(x)) + m.same(x),
    "rolled tokens": lambda m, x: m.same(x) + m.same(m.same(x).movedim(1, -1).roll(-1, 1).movedim(-1, 1)),
    "its parts": lambda m, x: m.same(torch.cat([m.same(x).roll(1, 2), x], 1)[:, 8:24]),
    "tokens of what is rolled": lambda m, x: m.behind(by_tokens(torch.roll(m.same(x), (1, -1), (2, 3)))),
    "tokens of what is shuffled": lambda m, x: m.behind(by_tokens(F.channel_shuffle(m.same(x), 4))),
    "tokens of what is shifted": lambda m, x: m.behind(by_tokens(torch.fft.fftshift(m.same(x)))),
    "tokens of what is padded": lambda m, x: m.behind(by_tokens(F.pad(m.same(x), (1, 1) * (x.dim() - 2), "reflect"))),
    "tokens of what is unpooled": lambda m, x: m.behind(by_tokens(unpooled(m.same(x)))),
    "tokens of powers": lambda m, x: m.behind(by_tokens(0.5 ** m.same(x))) + m.same(x),
    "tokens of logarithms": lambda m, x: m.behind(by_tokens(F.relu(F.logsigmoid(m.same(x)) + 1))),
    "tokens by einsum": lambda m, x: m.same(torch.einsum("nlc->ncl", by_tokens(x).flatten(2).mT).reshape(x.shape)),
}


@pytest.mark.filterwarnings("error::cnnfast.messages.CnnfastWarning")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", MISTOLD)
def test_strides_are_eager_modes_where_the_fake_mode_says_others(name: str, last: bool, train: bool) -> None:
    """As it does on a CPU of some calls of channels-last maps."""
    for dims in (2, 3) if "pad" in name else (2,):
        ours, plain = pair(Same(MISTOLD[name], dims))
        with torch.set_grad_enabled(train), accelerate_worth.never_standing():
            for size in (8, 8, 10):
                x = images(2, 16, *[size] * dims)
                x = x.contiguous(memory_format=LAST[x.dim()]) if last else x
                a, b = ours(x), plain(x)
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
                assert a.stride() == b.stride()


@pytest.mark.parametrize(("size", "gradients", "last"), [(8, True, False), (64, True, True), (8, False, True)])
def test_with_gradients_maps_are_channels_last_where_they_outweigh_the_weights(
    size: int, gradients: bool, last: bool
) -> None:
    """Which ATen would convert in every step, and their gradients back."""
    ours, plain = pair(Maps(lambda m, y: m.second(y * 2)))  # type: ignore[arg-type]
    x = images(2, 16, size, size).requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        assert torch.allclose(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    record = record_of(ours)
    assert record is not None and record.graphs[-1].gradients is gradients
    assert [site.channels_last for site in record.graphs[-1].sites] == ([True, False] if last else [None, None])


@pytest.mark.parametrize(("last", "untrue"), [(True, True), (False, False)])
def test_where_dynamo_says_a_group_norm_contiguous_that_is_not(last: bool, untrue: bool) -> None:
    """As with torch 2.14; then no format is decided ahead of the call."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    norm = graph.call_function(F.group_norm, (x, 4))
    x.meta["example_value"] = images(2, 16, 8, 8).contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )
    norm.meta["example_value"] = images(2, 16, 8, 8)
    assert rewrite_eager._untrue(norm) is untrue and not rewrite_eager._untrue(x)


class Pooled(nn.Module):
    """A global mean of maps that are channels-last in the default format, too, resized onto them, and what is made of
    both."""

    def __init__(self, of: Callable[[Any, Tensor, Tensor], Any], gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.first, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.second, self.third = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 1, 3, padding=1)
        self.relu = nn.ReLU()
        self.of = of

    def forward(self, x: Tensor) -> Any:
        y = self.relu(self.third(x))
        x = F.layer_norm(x.permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2)
        mean = self.relu(self.norm(self.first(F.adaptive_avg_pool2d(x, 1))))
        if self.gated:  # of broadcast tensors alone, and of a map and one
            x = x * torch.sigmoid(self.first(mean)) + mean * x.mean(1, keepdim=True)
        found = self.of(self, x, F.interpolate(mean, size=x.shape[2:], mode="bilinear"))
        return (*found, mean, y) if isinstance(found, tuple) else self.relu(self.third(found + y))


def _kept_as_they_are(m: Any, x: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    z = m.relu(m.second(torch.cat([up, x], 1)))
    return z, up, m.relu(m.third(z)), z * 2, F.interpolate(z, scale_factor=2.0)


# What is made of both, and whether a map of it is kept in another format.
OF_A_MEAN: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], bool]] = {
    "joined": (lambda m, x, up: m.relu(m.second(torch.cat([x, up], 1))), True),
    "joined with itself": (lambda m, x, up: m.relu(m.second(torch.cat([up, up], 1))), True),
    "joined with what is channels-last": (
        lambda m, x, up: m.relu(m.second(torch.cat([m.relu(m.third(x)), up], 1))),
        True,
    ),
    "added": (lambda m, x, up: m.relu(m.third(x + up)), True),
    "added to": (lambda m, x, up: m.relu(m.third(up + x)), True),
    "a convolution added": (lambda m, x, up: m.relu(up + m.third(x)), True),
    "added to a convolution": (lambda m, x, up: m.relu(m.third(x) + up), True),
    "multiplied": (lambda m, x, up: m.third(F.silu(x * torch.sigmoid(up))), True),
    "returned": (_kept_as_they_are, True),
    "one channel": (
        lambda m, x, up: (m.last(up + x), m.last(m.relu(m.third(up))), F.interpolate(m.last(up), size=9)),
        False,
    ),
    "resized again": (
        lambda m, x, up: m.third(F.interpolate(F.interpolate(up, size=5), scale_factor=2.0))[:, :, :1, :1],
        False,
    ),
    "parts": (lambda m, x, up: m.third(torch.cat([t * 2 for t in up.chunk(2, 1)], 1)), False),
    "pooled": (lambda m, x, up: m.third(F.max_pool2d(up, 3, 1, 1)), False),
    "viewed": (lambda m, x, up: m.third(up.permute(0, 1, 3, 2).contiguous()), False),
    "flat": (lambda m, x, up: (up.flatten(2), m.third(up).flatten(1), x), False),
    "averaged": (lambda m, x, up: m.third(up * up.mean((2, 3), keepdim=True)), False),
}


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", OF_A_MEAN)
def test_a_batch_norm_of_one_position_is_contiguous_whatever_is_traced(
    name: str, batch: int, last: bool, gated: bool
) -> None:
    """Dynamo gives it the strides of its input, and takes what follows for channels-last."""
    of, kept = OF_A_MEAN[name]
    model, x = Pooled(of, gated).eval(), images(batch, 16, 24, 24)
    if last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours, plain = pair(model)
    with torch.no_grad():
        for _ in range(4):
            for found, want in zip(tree_leaves(ours(x)), tree_leaves(plain(x)), strict=True):
                torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
                assert found.stride() == want.stride()
    record = record_of(ours)
    assert record is not None
    if not last and not gated:
        assert any(site.channels_last is not None for site in record.graphs[-1].sites) is kept


def test_an_operator_without_an_overload_writes_what_its_schemas_say() -> None:
    """As torch 2.14 traces ``.mH``."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(2, 2)
    assert not written_by(graph.call_function(torch.ops.aten.mH, (x,)))
    assert written_by(graph.call_function(torch.ops.aten.add_, (x, 1)))


def test_functions_named_as_python_keywords_write_nothing() -> None:
    """Their names end as those do of what writes."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(2, 2) > 0
    for function in (operator.and_, operator.or_):
        assert not written_by(graph.call_function(function, (x, x)))
    for function in (operator.not_, operator.is_):
        assert not written_by(graph.call_function(function, (x, None)[: 1 + (function is operator.is_)]))
    assert written_by(graph.call_function(operator.iand, (x, x)))


def test_nothing_is_converted_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnfast.nn import chain

    seen: list[bool] = []
    run = chain.Chain.run

    def recorded(self: Any, x: Tensor, *how: Any, **more: Any) -> Tensor:
        y = run(self, x, *how, **more)
        seen.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (x, y))
        return y

    monkeypatch.setattr(chain.Chain, "run", recorded)
    ours, plain = pair(Maps(BETWEEN["activations"][0]))  # type: ignore[arg-type]
    same(ours, plain, images(2, 16, 8, 8))
    assert seen[1:3] == [True, True] and seen[3] is False


# --- torch.compile's own front end ------------------------------------------------------------------------------------


def test_as_a_backend_of_torch_compile() -> None:
    from cnnfast.nn.rewrite import backend

    _, plain = pair()
    compiled = torch.compile(plain, backend=backend)
    same(compiled, plain, images())


def test_the_entry_point_names_the_backend() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points.torch_dynamo_backends]\ncnnfast = "cnnfast.nn.rewrite:backend"' in text


def test_a_graph_without_convolutions_stays() -> None:
    graph = torch.fx.symbolic_trace(nn.ReLU())
    run, found = rewritten(graph)
    assert not found.sites and not found.apart and torch.equal(run(torch.ones(2)), torch.ones(2))


# --- verification -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification without its times."""
    monkeypatch.setattr("cnnfast.nn.accelerate_verify._veto", lambda *args: None)


@pytest.mark.usefixtures("no_clock")
@pytest.mark.parametrize("training", [False, True])
def test_verified_with_example_inputs(training: bool) -> None:
    _, plain = pair()
    plain.train(training)
    model = copy.deepcopy(plain)
    model.decoder[1].weight.grad = torch.ones(32)  # type: ignore[union-attr,index]
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cnnfast.accelerate(model, images())
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3)), "random state is as before"
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(model.decoder[1].weight.grad, torch.ones(32))  # type: ignore[union-attr,index]
    assert model.encoder[0].weight.grad is None  # type: ignore[union-attr,index]
    found = cnnfast.explain(model)
    assert found.convolutions >= 4 and all(row.verified == "yes" for row in found.rows), str(found)
    assert not found.notes


@pytest.mark.usefixtures("no_clock")
def test_a_wrong_step_is_found_and_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnfast.nn.chain import Chain
    from cnnfast.nn.rewrite_site import Site

    run = Chain.run

    def wrong(self: Any, x: Any, reading: Any, *rest: Any) -> Any:
        y = run(self, x, reading, *rest)
        return y * 1.001 if self.steps[-1].step.spec.out_channels == 32 else y

    monkeypatch.setattr(Chain, "run", wrong)
    monkeypatch.setattr(Site, "_kind", lambda *_: None)  # which would pass that by

    class Apart(Generator):
        def forward(self, x: Tensor) -> Tensor:
            y = self.decoder[2](self.decoder[1](self.decoder[0](self.encode(x))))
            y = y + torch.flip(y, (3,))
            return self.decoder[7](torch.tanh(self.decoder[4](y)))

    ours, plain = pair(Apart())
    cnnfast.restore(ours)
    with (
        torch.no_grad(),
        pytest.warns(CnnfastWarning, match=r"encoder\.0, decoder\.0: fused, it differs from PyTorch's"),
    ):
        cnnfast.accelerate(ours, (images(),))
    found = cnnfast.explain(ours)
    off = [row for row in found.rows if row.why_not.startswith("differs")]
    assert [row.path for row in off] == ["encoder.0", "decoder.0"] and "differs" in off[0].verified
    assert sum(row.verified == "yes" for row in found.rows) == found.convolutions - 2 == 2
    same(ours, plain, images())


def test_what_differs_only_together_says_so() -> None:
    trial: Any = object.__new__(_Trial)
    trial.wrong = lambda on: f"much of {len(on)}" if len(on) > 2 else None
    each = [(site, "much of 4 (by 4 sites together)") for site in "abcd"]
    assert trial.culprits("abcd") == each
    trial.wrong = lambda on: "much" if "c" in on else None
    assert trial.culprits("abcd") == [("c", "much")]


class Kinks(nn.Module):
    """Two million values ahead of a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def test_a_gradient_that_jumps_at_kinks_is_no_difference() -> None:
    """Of a right run that differs by a few roundings; one that is wrong by a thousandth still differs."""
    torch.manual_seed(0)
    model = cnnfast.accelerate(Kinks())
    trial = _Trial(model, (images(1, 4, 256, 256),), {})
    assert trial.prepare(True) is None
    right = copy.deepcopy(Kinks())
    right.load_state_dict(model.state_dict())
    with torch.no_grad():  # some roundings of each weight
        right.first.weight.mul_(1 + 2**-18 * torch.randn(right.first.weight.shape))
    found = trial._run(right, trial.args, trial.kwargs)
    jumped = {name: t for name, t in found.items() if name == "gradient of first.weight"}
    exact = {name: trial.exact[name] for name in jumped}
    assert differs(jumped, exact, trial.yardsticks[:2]) is not None, "no value crossed its kink: no test"
    assert differs(jumped, exact, trial.yardsticks) is None
    wrong = {name: t * 1.001 for name, t in jumped.items()}
    assert differs(wrong, exact, trial.yardsticks) is not None
    result = {"result 0": found["result 0"] * 1.0001}
    assert differs(result, {"result 0": trial.exact["result 0"]}, trial.yardsticks) is not None, "results do not jump"


class NormAhead(nn.Module):
    """A contiguous residual that PyTorch's own norm gave, of one image, added between two steps that are channels-last:
    of a channels-last gradient that norm's backward makes something else (torch 2.13)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.inner = nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.norm(x), 0.0)
        z = y + self.inner(self.first(y))
        return self.second(F.interpolate(z, scale_factor=2.0))


class NormAheadOfModules(NormAhead):
    """The step that adds runs as PyTorch's modules, which get channels-last maps from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.last = nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ConvTranspose2d(8, 8, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.norm(x), 0.0)
        return self.last(F.relu(self.first(F.relu(self.up(x[..., ::2, ::2]))) + y))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("model", [NormAhead, NormAheadOfModules])
def test_the_gradient_of_a_residual_has_its_format(model: Callable[[], nn.Module], n: int) -> None:
    ours, plain = pair(model())
    found = []
    for of in (ours, plain, copy.deepcopy(plain).double()):
        dtype = next(of.parameters()).dtype
        x = images(n, 8, 32, 32).to(dtype).requires_grad_()
        y = of(x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        found.append(torch.autograd.grad(y, [x, of.norm.weight, of.norm.bias], grad))  # type: ignore[union-attr]
    for a, b, exact in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * exact.abs().max() and a.stride() == b.stride()


@pytest.mark.usefixtures("no_clock")
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_model_that_cannot_be_copied_is_verified_as_far_as_that_goes() -> None:
    """The older weight_norm, after a forward."""
    model = torch.nn.utils.weight_norm(nn.Conv2d(3, 16, 3))
    model(images())
    cnnfast.accelerate(model, images())
    notes = cnnfast.explain(model).notes
    assert any(note.startswith("gradients compared without regard to kinks") for note in notes)


@pytest.mark.usefixtures("no_clock")
def test_a_gradient_of_nothing_but_rounding_hinders_no_verification() -> None:
    """That of a bias ahead of a norm; of many large values it is far from zero in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16), nn.Conv2d(16, 3, 3))
    with torch.no_grad():
        model[2].weight.mul_(1e4)
    cnnfast.accelerate(model, images(2, 3, 64, 64))
    assert not cnnfast.explain(model).notes


def test_a_slower_model_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnfast.timing import Timing

    times = {"cnnfast": 3.0, "plain": 2.0, "channels-last": 1.0}

    def measure(candidates: Any, **kwargs: Any) -> dict[str, Timing]:
        gradients = "channels-last" not in candidates  # whose backward can crash
        assert candidates.keys() | {"channels-last"} == times.keys()
        assert all(call() is not None for call in candidates.values())
        slower = 10 if gradients else 1
        return {name: Timing((times[name] * (slower if name == "cnnfast" else 1),), 1) for name in candidates}

    monkeypatch.setattr("cnnfast.nn.accelerate_verify.measure", measure)
    model = Generator().eval()
    with torch.no_grad(), pytest.warns(CnnfastWarning, match="Generator is restored: on these inputs channels-last"):
        cnnfast.accelerate(model, {"x": images()})
    assert record_of(model) is None
    times["cnnfast"] = 0.9
    with torch.no_grad():
        cnnfast.accelerate(model, images())
    assert record_of(model) is not None
    cnnfast.restore(model)
    said = (
        r"Generator runs as it stands with gradients: on these inputs plain takes 2000.00 ms.*, accelerated 9000.00 ms"
    )
    with pytest.warns(CnnfastWarning, match=said):
        cnnfast.accelerate(model, images())
    record = record_of(model)
    assert record is not None and {graph.gradients for graph in record.graphs} == {False, True}
    for graph in record.graphs:
        assert all((site.off is not None) is graph.gradients for site in graph.sites)
    times["cnnfast"] = 1.1
    with pytest.warns(CnnfastWarning, match=r"is restored: on these inputs channels-last.*; with gradients plain"):
        cnnfast.accelerate(model, images())
    assert record_of(model) is None


# --- explain ----------------------------------------------------------------------------------------------------------


def test_explain_leaves_no_trace() -> None:
    model = Generator()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    found = cnnfast.explain(model, images())
    assert record_of(model) is None and found.graphs == found.compilations == 1 and not found.breaks
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    text = str(found)
    assert text.startswith(f"Generator: {found.fused} of 4 convolutions fused")
    assert "decoder.0" in text and "conv_transpose2d + batch_norm + leaky_relu" in text


def test_explain_names_what_interrupts() -> None:
    class Interrupted(Generator):
        def forward(self, x: Tensor) -> Tensor:
            z = self.encode(x)
            return self.decode(z * 2 if z.sum() > 0 else z)

    found = cnnfast.explain(Interrupted(), images())
    assert found.graphs == 2 and found.breaks and found.convolutions == 4


def test_explain_of_a_sequential_of_ours() -> None:
    model = nn.Sequential(cnnfast.Sequential(nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU()), nn.Sigmoid())
    text = str(cnnfast.explain(model))
    assert "not accelerated" in text and "0-1: ConvTranspose2d + ReLU fused" in text


class _Residuals(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()

        def block(c_in: int) -> list[nn.Module]:
            made = nn.InstanceNorm2d(32, affine=True) if norm == "instance" else nn.GroupNorm(4, 32)
            return [nn.Conv2d(c_in, 32, 3, padding=1, padding_mode="reflect", bias=False), made]

        self.head = nn.Sequential(*block(3), nn.ReLU())
        self.bodies = nn.ModuleList(nn.Sequential(*block(32), nn.ReLU(), *block(32)) for _ in range(2))
        self.tail = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(32, 3, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(x)
        for body in self.bodies:
            x = x + body(x)
        return self.tail(x)


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_norms_of_little_convolutions_take_channels_last_maps(norm: str) -> None:
    """Convolutions that alone gain nothing: the modules of their norms would convert, or be less exact."""
    torch.manual_seed(0)
    model, x = _Residuals(norm).eval(), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        cnnfast.accelerate(model)
        for _ in range(3):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert "6 of 6 convolutions fused" in str(cnnfast.explain(model, x))


@pytest.mark.parametrize(
    ("dtype", "size", "last"),
    [("float32", 16, [True, False]), ("bfloat16", 16, [None, None]), ("bfloat16", 64, [True, False])],
)
def test_a_stretch_ends_at_a_small_instance_norm_in_16_bits(dtype: str, size: int, last: list[bool | None]) -> None:
    """Which ATen takes contiguous."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.second(F.relu(F.instance_norm(self.first(x))).mul(2.0)))

    ours, plain = pair(Normed().to(getattr(torch, dtype)))
    x = images(2, 16, size, size).to(getattr(torch, dtype))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(ours(x), plain(x), rtol=tolerance, atol=tolerance)
    record = record_of(ours)
    assert record is not None and [site.channels_last for site in record.graphs[-1].sites] == last


# --- graphs that have settled -----------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Too little work for packed operators; with ``wide``, not in its second convolution."""

    def __init__(self, wide: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, wide, 3, padding=1), nn.Conv2d(wide, wide, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(wide), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.second(self.relu(self.first(x)))))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Site]:
    """The sites that are called."""
    found: list[Site] = []
    real = Site.__call__
    monkeypatch.setattr(Site, "__call__", lambda self, *rest: found.append(self) or real(self, *rest))
    return found


@torch.no_grad()
def test_a_graph_settles(asked: list[Site]) -> None:
    """From the second call on no site is asked; all are anew where what they decided may not hold."""
    ours, plain = pair(Tiny())
    x, threads = images(2, 16, 8, 8), torch.get_num_threads()
    for _ in range(5):
        ours(x)
    assert len(asked) == 1
    for model in (ours, plain):
        model.second.weight.mul_(2.0)
    assert torch.equal(ours(x), plain(x)) and len(asked) == 1
    try:
        torch.set_num_threads(threads + 1)
        ours(x)
        assert len(asked) == 2
    finally:
        torch.set_num_threads(threads)
    rows = cnnfast.explain(ours).rows
    assert len(rows) == 2 and all("multiply-adds are too few" in row.why_not for row in rows)
    for model in (ours, plain):
        model.relu.register_forward_hook(lambda module, args, y: y + 1)
    for _ in range(5):
        assert torch.equal(ours(x), plain(x))


@torch.no_grad()
def test_steps_settle_too(asked: list[Site]) -> None:
    """Of a chain, some and some not; other weights are seen."""
    ours, plain = pair(Tiny(wide=192))
    x = images(2, 16, 24, 24)
    for change in ("", "", "", "data", "version", "object", "", ""):
        for model in (ours, plain):
            if change == "data":
                model.second.weight.data.mul_(2.0)
            elif change == "version":
                model.second.bias.add_(1.0)
            elif change == "object":
                model.second.weight = nn.Parameter(model.second.weight * 0.5)
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
        assert len(asked) == 1
    why = [row.why_not for row in cnnfast.explain(ours).rows]
    assert why[0] and not why[1]
    (site,) = set(asked)
    site.off = "the test's wish"
    for _ in range(3):
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    assert len(asked) == 4  # a site that is off is asked


class _Normed(Tiny):
    """A norm by itself, or in a site that runs as it stands."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if not self.inside:
            return F.group_norm(y.flip(2) + 300, 4)
        added = self.norm.weight[:, None, None].expand(y.shape)  # in strides that no step takes
        return F.group_norm(self.second(y * 2), 4) + added


@torch.no_grad()
@pytest.mark.parametrize("inside", [False, True])
def test_norms_of_channels_last_maps_stay_ours(asked: list[Site], inside: bool) -> None:
    """PyTorch's rounds where means are far from 0."""
    if inside and torch.__version__ >= (2, 14):
        pytest.skip("this GroupNorm is traced as contiguous: formats are not decided ahead")
    torch.manual_seed(0)
    ours = cnnfast.accelerate(_Normed(inside).eval())
    ours.second.bias.fill_(300.0)  # type: ignore[operator]
    x = images(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    with plain_call(ours):
        want = copy.deepcopy(ours).double()(x.double()).float()
        assert (ours(x) - want).abs().max() > 1e-3
    for _ in range(6):
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)
    assert len(asked) == 1 + inside
    if inside:
        assert "what is added" in cnnfast.explain(ours).rows[1].why_not


@torch.no_grad()
@pytest.mark.parametrize("last", [False, True])
def test_settled_strides_are_eager_modes(last: bool) -> None:
    """A stretch of channels-last maps in a graph whose sites gain nothing."""
    ours, plain = pair(Tiny(wide=32))
    x = images(2, 16, 32, 32)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    for _ in range(4):
        a, b = ours(x), plain(x)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.stride() == b.stride()


class _Flipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(32, 32, 3, padding=1), nn.PReLU(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x.flip(2)))


@torch.no_grad()
def test_the_input_of_a_settled_site_is_free_after_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in eager mode: the calls after that get its memory."""
    x = images(2, 32, 48, 48)

    def living(model: nn.Module) -> int:
        """Maps in memory while the last one is there."""
        for _ in range(3):
            model(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            model(x)
        assert seen.profiler is not None and seen.profiler.kineto_results is not None
        events = sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns())
        live = last = 0
        for event in events:
            if event.name() == "[memory]":
                live += event.nbytes()
                last = live if event.nbytes() >= 4 * x.numel() else last
        return round(last / (4 * x.numel()))

    ours, plain = pair(_Flipped())
    assert living(plain) == living(ours) == 2
    monkeypatch.setattr(rewrite, "settled", lambda *args, **kwargs: None)
    assert living(pair(_Flipped())[0]) == 3


@torch.no_grad()
def test_threads_in_other_states_do_not_meet() -> None:
    """One under autocast, one not: each runs what it would run alone."""
    ours, plain = pair(Tiny(wide=192))
    x = images(2, 16, 24, 24)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(3):
                ours(x)
    found: dict[bool, list[Tensor]] = {False: [], True: []}

    def work(autocast: bool) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(30):
                found[autocast].append(ours(x))

    threads = [threading.Thread(target=work, args=(autocast,)) for autocast in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = plain(x)
    assert len(found[False]) == len(found[True]) == 30
    for y in found[False]:
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert all(y.dtype == found[True][0].dtype for y in found[True])
    torch.testing.assert_close(found[True][0].float(), want, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_a_graph_whose_sizes_depend_on_values_does_not_settle(asked: list[Site]) -> None:
    class Picks(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[x.mean((1, 2, 3)) > 0])

    ours, plain = pair(Picks())
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for seed in (0, 1, 2, 6):  # of which 2, 3, 4 and 5 are picked
            x = torch.randn(6, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    record = record_of(ours)
    assert record is not None and record.failed is None and len(asked) == 4


@torch.no_grad()
def test_a_graph_of_changing_sizes_is_asked_until_they_come_again(asked: list[Site]) -> None:
    ours, plain = pair(Tiny())
    for count, size in ((1, 8), (2, 9), (3, 10), (4, 10), (4, 10), (5, 11), (5, 10), (5, 9)):
        x = images(2, 16, size, size)
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
        assert len(asked) == count


class SetsData(nn.Module):
    """As SPAN's blocks do, whose convolutions of training become one in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.of, self.one = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.one.weight.data = self.of.weight.clone() * 2
        return torch.relu(self.one(torch.relu(self.of(x))))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_data_of_a_parameter_that_was_made_in_inference_mode(mode: Callable[[], Any]) -> None:
    """What Dynamo puts behind the assignment asks such a tensor for a version, which it has not."""
    with mode():
        ours, plain = pair(SetsData())
        x = images(1, 8, 16, 16)
        for _ in range(4):
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
            ours.of.weight.mul_(1.5), plain.of.weight.mul_(1.5)
    assert graphs(ours) == 1


class Gate(nn.Module):
    """Parts of a map's channels, each through a function, between two convolutions."""

    def __init__(self, channels: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(16, 2 * channels, 3, padding=1), nn.Conv2d(channels, 16, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(x).chunk(2, 1)
        return self.narrow(self.function(a) * b)


@torch.no_grad()
@pytest.mark.parametrize(
    ("channels", "function", "copied"),
    [
        pytest.param(24, F.mish, True, id="mish"),
        pytest.param(24, F.gelu, True, id="gelu"),
        pytest.param(24, torch.exp, True, id="exp"),
        pytest.param(32, F.mish, False, id="whole_vectors"),
        pytest.param(32, torch.tanh, True, id="tanh"),
        pytest.param(24, F.relu, False, id="relu"),
        pytest.param(24, torch.neg, False, id="neg"),
        pytest.param(24, lambda a: F.silu(a, inplace=True), False, id="in_place"),
    ],
)
def test_functions_of_a_part_get_dense_memory(
    channels: int, function: Callable[[Tensor], Tensor], copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of memory with gaps ATen takes what is left of whole vectors one number after the other."""
    copies, real = [], rewrite_layout.reformatted

    def counted(t: Tensor, last: bool) -> Tensor:
        copies.append(t)
        return real(t, last)

    monkeypatch.setattr(rewrite_layout, "reformatted", counted)
    ours, plain = pair(Gate(channels, function))
    x = images(2, 16, 8, 8)
    a, b = ours(x), plain(x)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert a.stride() == b.stride() and bool(copies) is copied
    torch.testing.assert_close(ours(x), b, rtol=1e-5, atol=1e-5)


def test_functions_of_numpy_end_no_stretch() -> None:
    """Dynamo traces them as PyTorch's; none but those that draw numbers does anything to what is not given to it."""

    def between(m: Any, y: Tensor) -> Tensor:
        table = torch.tensor(np.array([[0.5, 1.0], [2.0, 3.0]]), dtype=y.dtype)
        return m.second(y * 2) + table.sum()  # type: ignore[no-any-return]

    ours, plain = pair(Maps(between))  # type: ignore[arg-type]
    x = images(2, 16, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    record = record_of(ours)
    assert record is not None
    assert [site.channels_last for site in record.graphs[-1].sites] == [True, False]


@pytest.mark.parametrize("norm", [Norm("group", 4), Norm("instance")])
def test_norms_of_odd_maps_are_contiguous_as_in_eager_mode(norm: Norm) -> None:
    x = odd(images(1, 16, 8, 8))
    y = F.group_norm(x, 4) if norm.kind == "group" else F.instance_norm(x)
    with torch.no_grad():
        mine = NormCall(norm)(x, None, None)
    torch.testing.assert_close(mine, y, rtol=1e-5, atol=1e-5)
    assert mine.stride() == y.stride()


def test_odd_maps_are_channels_last_without_a_copy() -> None:
    x = odd(images(1, 16, 8, 8))
    assert not is_channels_last(x) and x.is_contiguous(memory_format=torch.channels_last)
    y = reformatted(x, True)
    assert is_channels_last(y) and y.data_ptr() == x.data_ptr() and torch.equal(x, y)
