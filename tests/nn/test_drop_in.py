"""cnnfast.Sequential in the hands of programs that do unusual things: everything equals nn.Sequential, errors too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

import cnnfast
from cnnfast.cpu import inference, weight

from ..tolerance import assert_close
from .test_sequential_training import loss_of, randomized, x2d

pytestmark = pytest.mark.usefixtures("one_thread")


def both(*modules: nn.Module) -> tuple[nn.Sequential, cnnfast.Sequential]:
    plain = randomized(nn.Sequential(*modules))
    return plain, cnnfast.Sequential(*copy.deepcopy(plain))  # type: ignore[return-value, misc]


def generator() -> tuple[nn.Sequential, cnnfast.Sequential]:
    """A matrix product, an upsampling that is collapsed, patches and merged phases."""
    modules = [nn.ConvTranspose2d(6, 16, 4, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Upsample(scale_factor=2)]
    modules += [nn.Conv2d(16, 8, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.LeakyReLU(0.2)]
    return both(*modules, nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Tanh())


def close(got: object, want: object, tolerance: float = 1e-5) -> None:
    """Relative to the largest value of each tensor."""
    pairs = zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True)
    for g, w in pairs:
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        assert (g - w).abs().max() <= tolerance * w.abs().max(), (g - w).abs().max() / w.abs().max()


# --- the first call is in an unusual place ----------------------------------------------------------------------------


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """What is computed once and kept has not been computed, and is not kept."""
    for kept in (weight._sums, inference._way, inference._key):
        kept.cache_clear()
    yield
    for kept in (weight._sums, inference._way, inference._key):
        kept.cache_clear()


def in_inference_mode(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x).clone()


def on_another_default_device(model: nn.Module, x: Tensor) -> Tensor:
    with torch.device("meta"):
        return model(x)


def with_another_default_dtype(model: nn.Module, x: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    try:
        return model(x)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("first", [in_inference_mode, on_another_default_device, with_another_default_dtype])
def test_the_mode_of_the_first_call_is_not_kept(first: Callable[[nn.Module, Tensor], Tensor], train: bool) -> None:
    modules = nn.Upsample(scale_factor=2), nn.Conv2d(16, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU()
    plain, ours = both(*modules, nn.ConvTranspose2d(40, 16, 4, 2, 1))
    x, results = x2d(2, 16, 16, 16), []
    for model in (plain.train(train), ours.train(train)):
        with torch.set_grad_enabled(train):
            y = first(model, x)
        again = model(x)
        loss_of(again).backward()
        results.append((y.detach(), again.detach(), model[1].weight.grad, model[4].weight.grad))
    close(results[1], results[0])


# --- how gradients are taken ------------------------------------------------------------------------------------------


def a_batch_of_gradients(model: nn.Module, x: Tensor) -> object:
    y = model(x)
    v = torch.randn((3, *y.shape), generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(y, [x, *model.parameters()], v, is_grads_batched=True)


def a_jacobian(model: nn.Module, x: Tensor) -> object:
    return torch.autograd.functional.jacobian(lambda x: model(x).mean((1, 2, 3)), x, vectorize=True)


def backward_under_autocast(model: nn.Module, x: Tensor) -> object:
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(y).backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def low_precision_of_products(model: nn.Module, x: Tensor) -> object:
    """Of matrix products alone: convolutions keep theirs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.no_grad():
            y = model.eval()(x)
        loss_of(model.train()(x)).backward()
        return [y, x.grad, *(p.grad for p in model.parameters())]
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("take", [a_batch_of_gradients, a_jacobian, backward_under_autocast, low_precision_of_products])
def test_gradients(take: Callable[[nn.Module, Tensor], object]) -> None:
    close(*(take(model, x2d(3, 6, 1, 1).requires_grad_()) for model in reversed(generator())))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_of_operators(requires_grad: bool) -> None:
    """A fused operator knows no tangents: PyTorch's runs."""
    x, w = x2d(2, 32, 8, 8), nn.Parameter(torch.randn(32, 32, 4, 4), requires_grad=requires_grad)
    found = []
    for function in (cnnfast.ops.conv_transpose2d, nn.functional.conv_transpose2d):
        with forward_ad.dual_level():
            y = function(forward_ad.make_dual(x, x.cos()), w, None, 2, 1)
            found.append(forward_ad.unpack_dual(y).tangent)
    assert found[0] is not None
    close(*found)


# --- norms ------------------------------------------------------------------------------------------------------------


def test_gradients_of_a_group_norm_alone() -> None:
    """PyTorch 2.13 ends the process where a channels-last GroupNorm's input wants no gradient: eager mode's is NCHW."""
    grads = []
    for model in both(nn.ConvTranspose2d(6, 8, 4, 2, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.ConvTranspose2d(8, 3, 3)):
        loss_of(model(x2d())).backward(inputs=list(model[1].parameters()))
        model[0].requires_grad_(False)
        loss_of(model(x2d())).backward()
        grads.append([p.grad for p in (*model[1].parameters(), *model[3].parameters())])
    close(*grads)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(16), nn.GroupNorm(4, 16)], ids=["batch", "group"])
@pytest.mark.parametrize("grad", [True, False])
def test_statistics_far_from_zero_are_as_exact_as_in_nchw(norm: nn.Module, grad: bool) -> None:
    """ATen's are not in channels-last, in which a plain convolution between others gets its input."""
    convs = [nn.ConvTranspose2d(6, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    plain, ours = both(*convs, copy.deepcopy(norm), nn.ReLU(), nn.ConvTranspose2d(16, 8, 4, 2, 1))
    with torch.set_grad_enabled(grad):
        for model in (plain, ours):
            model[2].bias.data.fill_(300.0)
        exact = copy.deepcopy(plain).double()
        x = x2d(4, 6, 8, 8)
        assert_close(ours(x), exact(x.double()), plain(x))


def test_a_batch_of_one_whose_gradient_is_permuted() -> None:
    """ATen's batch norm of a contiguous tensor reads such a gradient wrongly."""
    grads = []
    for model in both(nn.ConvTranspose1d(4, 2, 3), nn.Sigmoid(), nn.Conv1d(2, 16, 3, padding=1), nn.BatchNorm1d(16)):
        y = model.eval()(x2d(1, 4, 4)).movedim(1, -1).contiguous()
        grads.append(torch.autograd.grad(loss_of(y), list(model.parameters())))
    close(*grads)


# --- what is done to a result -----------------------------------------------------------------------------------------

RESULTS = {
    "1-D": ([nn.ConvTranspose1d(6, 8, 4, 2, 1), nn.BatchNorm1d(8), nn.ReLU()], (3, 6, 9)),
    "one-channel": ([nn.ConvTranspose2d(6, 1, 4, 2, 1), nn.Tanh()], (3, 6, 5, 4)),
    "one-pixel": ([nn.Conv2d(6, 8, 4), nn.LeakyReLU()], (3, 6, 4, 4)),
}


@pytest.mark.parametrize("cl", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_no_view(name: str, cl: bool) -> None:
    modules, shape = RESULTS[name]
    x = x2d(*shape)
    for model in both(*modules):
        if cl and len(shape) == 4:
            model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        y = model(x)
        assert not y._is_view()
        assert y.detach_() is y and not y.requires_grad
        with torch.no_grad():
            y = model(x)
        factor = torch.ones((), requires_grad=True)
        y.mul_(factor).sum().backward()
        assert factor.grad is not None


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "eps", "train"),
    [(nn.BatchNorm2d, 0.0, True), (nn.BatchNorm2d, -0.1, True), (nn.BatchNorm2d, -0.1, False),
     (nn.SyncBatchNorm, -0.1, False)],
)  # fmt: skip
def test_eps(norm: type[nn.Module], eps: float, train: bool) -> None:
    messages = []
    for model in both(nn.ConvTranspose2d(6, 8, 4, 2, 1), norm(8, eps=eps), nn.ReLU()):
        with pytest.raises(ValueError, match="eps must be") as error, torch.no_grad():
            model.train(train)(x2d())
        messages.append((str(error.value), [int(b) for b in model.buffers() if not b.is_floating_point()]))
    assert messages[0] == messages[1]


def test_parameters_are_swapped_after_invalidate() -> None:
    """PyTorch swaps no Parameter to which there is a weak reference."""
    plain, ours = both(nn.ConvTranspose2d(16, 40, 4, 2, 1), nn.ReLU())
    x = x2d(4, 16, 16, 16)
    with torch.no_grad():
        ours(x), ours(x)  # packs the weight
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.raises(RuntimeError, match="Couldn't swap"):
            ours.double()
        assert cnnfast.invalidate(ours) == 1
        close(ours.double()(x.double()), plain.double()(x.double()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
