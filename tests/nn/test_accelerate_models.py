"""Generators as their repositories have them, accelerated: results, gradients, strides, and what is fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from benchmarks import published
from benchmarks.workload import NotAvailable
from cnnfast.nn.accelerate_call import record_of
from cnnfast.nn.accelerate_report import leaves
from cnnfast.nn.accelerate_verify import differs, without_onednn

# model, input, convolutions, those that are found at least, why others are not
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, tuple[str, ...]]] = {
    "pix2pix": (partial(published.pix2pix, 16, 5), (2, 3, 64, 64), 10, 10, ()),
    "cyclegan": (partial(published.cyclegan, 16, 3), (1, 3, 48, 48), 12, 12, ()),
    "style": (partial(published.Style, 16, 1), (1, 3, 48, 48), 8, 8, ()),
    "stack": (partial(published.stack, 32), (1, 32, 8, 8), 3, 3, ()),
    "AutoencoderKL": (partial(published.vae_decoder, 32, 1, 8, 2), (1, 4, 16, 16), 16, 16, ()),
    "AutoencoderTiny": (published.tiny_decoder, (1, 4, 16, 16), 35, 35, ()),
    "ESRGAN": (partial(published.esrgan, 16, 1), (1, 3, 24, 24), 21, 21, ()),
    "Compact": (partial(published.compact, 16, 3), (1, 3, 24, 24), 5, 5, ()),
    "smp.Unet": (partial(published.smp_unet, "resnet18"), (1, 3, 64, 64), 31, 31, ()),
    "SegResNet": (partial(published.segresnet, 8, (1, 2), (1,)), (1, 1, 16, 16, 16), 12, 12, ()),
    "HiFi-GAN": (partial(published.hifigan, 64), (1, 12, 80), 78, 78, ()),
}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    given = x.clone().requires_grad_()
    torch.manual_seed(1)
    sum(y.square().sum() for y in leaves(model(given))).backward()  # type: ignore[union-attr]
    found = {"x": given.grad, **{name: p.grad for name, p in model.named_parameters()}}
    model.zero_grad()
    return {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_published_models(name: str, state: Callable[[str], None]) -> None:
    make, shape, convolutions, found, reasons = CASES[name]
    torch.manual_seed(0)
    try:
        plain = make().eval()
    except NotAvailable as missing:
        pytest.skip(str(missing))
    ours = cnnfast.accelerate(copy.deepcopy(plain))
    assert list(ours.state_dict()) == list(plain.state_dict()) and type(ours) is type(plain)
    # (At seed 0 a value of smp's Unet, at 1 one of the style network, is so near a kink that PyTorch's own gradient in
    # channels-last jumps there, too.)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for _ in range(2):
            for a, b in zip(leaves(ours(x)), leaves(plain(x)), strict=True):
                assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item()) and a.stride() == b.stride()
        said = cnnfast.explain(ours, x)
    state(f"{name}: {said.fused} of {said.convolutions} fused, {said.found} found, {said.reasons}")
    assert said.convolutions == convolutions and said.found >= found and said.graphs == 1, str(said)
    assert set(said.reasons) >= set(reasons)
    got, expected = gradients(ours, x), gradients(plain, x)
    with without_onednn():
        other = gradients(plain, x)
    problem = differs(got, gradients(plain.double(), x.double()), [expected, other])
    assert problem is None, f"{name}: {problem}"
    record = record_of(ours)
    assert record is not None and record.failed is None
