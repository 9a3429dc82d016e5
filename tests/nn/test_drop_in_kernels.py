"""What `test_drop_in` asks of a CPU, of the Triton kernels: unusual programs get eager mode's gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

import cnnfast

from ..conftest import conv_precision
from .test_drop_in import close
from .test_sequential_training import loss_of, randomized, x2d

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "group": lambda c: nn.GroupNorm(4, c),
}


def generator(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """No bias ahead of a norm: its gradient would be rounding alone."""
    modules = [nn.ConvTranspose2d(16, 32, 4, bias=False), norm(32), nn.ReLU(), nn.Upsample(scale_factor=2)]
    modules += [nn.Conv2d(32, 16, 3, padding=1, bias=False), norm(16), nn.SiLU()]
    return randomized(nn.Sequential(*modules, nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.LeakyReLU(0.2)))  # type: ignore[return-value]


def a_batch_of_gradients(model: nn.Sequential, x: Tensor) -> object:
    y = model(x)
    v = torch.randn((2, *y.shape), generator=torch.Generator().manual_seed(4)).to(y.device)
    return torch.autograd.grad(y, [x, *model.parameters()], v, is_grads_batched=True)


def gradients_of_norms_alone(model: nn.Sequential, x: Tensor) -> object:
    return torch.autograd.grad(model(x).sin().sum(), [*model[1].parameters(), *model[5].parameters()])


def a_permuted_gradient_of_one_image(model: nn.Sequential, x: Tensor) -> object:
    y = model(x[:1]).movedim(1, -1).contiguous()
    return torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])


def saved_tensors_in_another_format(model: nn.Sequential, x: Tensor) -> object:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
        y = model(x)
    return torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])


def on_another_default_device(model: nn.Sequential, x: Tensor) -> object:
    with torch.device("meta"):
        y = model(x)
    return torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])


TAKE = (
    a_batch_of_gradients,
    gradients_of_norms_alone,
    a_permuted_gradient_of_one_image,
    saved_tensors_in_another_format,
    on_another_default_device,
)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("take", TAKE)
def test_gradients(
    take: Callable[[nn.Sequential, Tensor], object], norm: str, device: torch.device, launches: list[str]
) -> None:
    torch.manual_seed(0)
    plain = generator(NORMS[norm])
    if norm == "instance" and take is a_permuted_gradient_of_one_image:
        for i in (1, 5):  # of one image, which PyTorch's InstanceNorm gives wrong gradients here
            plain[i] = nn.GroupNorm(plain[i].num_features, plain[i].num_features)
    ours = cnnfast.Sequential(*copy.deepcopy(plain)).to(device)
    x = x2d(2, 16, 1, 1)
    want = take(plain, x.clone().requires_grad_())
    with cnnfast.backend("triton"), conv_precision("ieee"):
        got = take(ours, x.to(device).requires_grad_())
    close(torch.utils._pytree.tree_map(Tensor.cpu, got), want, 2e-4)
    assert any("norm-apply" in name for name in launches)


def test_forward_mode_is_refused(device: torch.device) -> None:
    """By the kernels: tangents would be lost. (Without an explicit backend, PyTorch's operators run.)"""
    x, w = x2d(2, 16, 4, 4).to(device), torch.randn(16, 16, 4, 4).to(device)
    with cnnfast.backend("triton"), forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        cnnfast.ops.conv_transpose2d(forward_ad.make_dual(x, x.cos()), w, None, 2, 1)


def test_a_result_is_no_view(device: torch.device, launches: list[str]) -> None:
    modules = nn.ConvTranspose1d(16, 16, 4, 2, 1), nn.BatchNorm1d(16), nn.ReLU()
    model = cnnfast.Sequential(*modules).to(device)
    with cnnfast.backend("triton"):
        y = model(x2d(2, 16, 9).to(device))
        loss_of(y.cpu()).backward()
        assert launches and model[0].weight.grad is not None
        assert y.detach_() is y and not y.requires_grad


def test_an_overwritten_result_of_one_dimension_is_noticed(device: torch.device, launches: list[str]) -> None:
    """By the backward that has saved it."""
    model = cnnfast.Sequential(nn.ConvTranspose1d(16, 16, 4, 2, 1), nn.Tanh()).to(device)
    w = model[0].weight
    x = x2d(2, 16, 9).to(device)
    with cnnfast.backend("triton"):
        for y in (model(x), cnnfast.ops.conv_transpose1d(x, w, None, 2, 1, activation="tanh")):
            assert launches and not y._is_view()
            y.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


LAST = {
    "leaky": nn.LeakyReLU(0.2),
    "leaky-in-place": nn.LeakyReLU(0.2, inplace=True),
    "elu-in-place": nn.ELU(inplace=True),
    "hardtanh": nn.Hardtanh(),
    "relu6-in-place": nn.ReLU6(inplace=True),
    "relu": nn.ReLU(),
}


@pytest.mark.parametrize("name", LAST)
def test_the_result_may_be_overwritten_where_eagers_may(name: str, device: torch.device, launches: list[str]) -> None:
    modules = randomized(nn.Sequential(nn.ConvTranspose2d(16, 16, 3), copy.deepcopy(LAST[name])))
    ours = cnnfast.Sequential(*copy.deepcopy(modules)).to(device)

    def gradient(model: nn.Module, x: Tensor, spoil: bool) -> Tensor | None:
        y = model(x)
        if spoil:
            y += 1
        try:
            (y * y).sum().backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            return None
        return model[0].weight.grad

    want = gradient(modules, x2d(2, 16, 3, 3), True)
    with cnnfast.backend("triton"), conv_precision("ieee"):
        got = gradient(ours, x2d(2, 16, 3, 3).to(device), True)
    assert launches and (got is None) == (want is None)
    if got is not None:
        close(got.cpu(), want, 2e-4)
