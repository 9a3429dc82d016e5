"""StyleGAN2's generator: rosinality's names, and the same pictures and gradients for fixed noise as by weights of each
picture's own and filters over inserted zeros, in plain functions."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cnnfast
from cnnfast.generators import create_model
from cnnfast.generators import stylegan2 as stylegan2_module
from cnnfast.generators.stylegan2 import StyleGAN2, StyleGAN2Config

from .family import check, disturbed, same_as_published, shapes

SMALL = StyleGAN2Config(size=16, style_dim=6, n_mlp=2, channel_base=64, channel_max=8)


class Fixed(nn.Module):
    """The generator with the noise of its state."""

    def __init__(self, config: StyleGAN2Config, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        self.generator = StyleGAN2(config, sequential=sequential)
        self.marker = sequential()  # by which `check` tells the two apart

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z, self.generator.fixed_noise)


def stylegan2(config: StyleGAN2Config, state: Mapping[str, Tensor], z: Tensor, training: bool) -> Tensor:
    def of(name: str) -> Tensor:
        return state[f"generator.{name}"]

    def linear(name: str, x: Tensor, lr: float = 1.0) -> Tensor:
        weight = of(f"{name}.weight") * lr / math.sqrt(x.shape[1])
        return x @ weight.mT + of(f"{name}.bias") * lr

    def activated(x: Tensor) -> Tensor:
        return math.sqrt(2) * torch.where(x < 0, 0.2 * x, x)

    def filtered(x: Tensor, kernel: Tensor, before: int, after: int) -> Tensor:
        """A true convolution: the kernel is turned round."""
        planes = F.pad(x.flatten(0, 1)[:, None], (before, after, before, after))
        y = F.conv2d(planes, kernel.flip(0, 1)[None, None])
        return y.unflatten(0, x.shape[:2]).squeeze(2)

    def spread(x: Tensor) -> Tensor:
        """Zeros between the elements and behind the last."""
        y = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        y[:, :, ::2, ::2] = x
        return y

    def modulated(name: str, x: Tensor, w: Tensor, up: bool = False, demodulate: bool = True) -> Tensor:
        weight = of(f"{name}.weight")
        _, _, c_in, k, _ = weight.shape
        weight = weight / math.sqrt(c_in * k * k) * linear(f"{name}.modulation", w)[:, None, :, None, None]
        if demodulate:
            weight = weight / (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
        if not up:
            return torch.cat([F.conv2d(a[None], own, padding=k // 2) for a, own in zip(x, weight, strict=True)])
        # A transposed convolution is one over inserted zeros by the weight turned round.
        x, turned = F.pad(spread(x)[:, :, :-1, :-1], (k - 1,) * 4), weight.flip(3, 4)
        y = torch.cat([F.conv2d(a[None], own) for a, own in zip(x, turned, strict=True)])
        return filtered(y, of(f"{name}.blur.kernel"), 1, 1)

    def styled(name: str, i: int, x: Tensor, w: Tensor) -> Tensor:
        y = modulated(f"{name}.conv", x, w, up=i % 2 == 1)
        y = y + of(f"{name}.noise.weight") * of(f"noises.noise_{i}")
        return activated(y + of(f"{name}.activate.bias")[:, None, None])

    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for i in range(config.n_mlp):
        w = activated(linear(f"style.{i + 1}", w, config.lr_mlp))
    x = styled("conv1", 0, of("input.input").repeat(len(z), 1, 1, 1), w)
    picture = modulated("to_rgb1.conv", x, w, demodulate=False) + of("to_rgb1.bias")
    for i in range(2 * (int(math.log2(config.size)) - 2)):
        x = styled(f"convs.{i}", i + 1, x, w)
        if i % 2:
            name = f"to_rgbs.{i // 2}"
            rgb = modulated(f"{name}.conv", x, w, demodulate=False) + of(f"{name}.bias")
            picture = rgb + filtered(spread(picture), of(f"{name}.upsample.kernel"), 2, 1)
    return picture


def test_pictures_for_fixed_noise() -> None:
    z = torch.randn(3, SMALL.style_dim, generator=torch.Generator().manual_seed(1))
    model = check(lambda s: Fixed(SMALL, s), partial(stylegan2, SMALL), z)
    with torch.inference_mode():
        assert model(z).shape == (3, 3, 16, 16)
        assert model(z[:1]).shape == (1, 3, 16, 16)


def test_convolutions_are_the_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one weight for all pictures, a view of the Parameter, which can be packed once."""
    met: list[tuple[str, Tensor]] = []

    def watched(name: str) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, *rest: object, **named: object) -> Tensor:
            met.append((name, weight._base))
            return getattr(cnnfast.ops, name)(x, weight, *rest, **named)

        return run

    names = ("conv2d", "conv_transpose2d")
    monkeypatch.setattr(stylegan2_module, "ops", SimpleNamespace(**{name: watched(name) for name in names}))
    for container, expected in ((cnnfast.Sequential, [6, 2]), (nn.Sequential, [0, 0])):
        model = StyleGAN2(SMALL, sequential=container)
        met.clear()
        with torch.inference_mode():
            model(model.example_input(2))
        # Two of 4x4 and, for each of two doublings, a transposed one and two others.
        assert [sum(name == of for of, _ in met) for name in names] == expected
        assert all(any(weight is p for p in model.parameters()) for _, weight in met)


def test_filters_are_not_taken_for_symmetric() -> None:
    model, z = disturbed(Fixed(SMALL, cnnfast.Sequential)).double(), torch.randn(2, SMALL.style_dim).double()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("kernel"):
                buffer.uniform_()
        expected = stylegan2(SMALL, model.state_dict(), z, False)
        torch.testing.assert_close(model(z), expected, rtol=1e-10, atol=1e-10)


def test_fresh_noise_and_styles_of_layers() -> None:
    model = disturbed(StyleGAN2(SMALL)).eval()
    z = model.example_input(2)
    with torch.inference_mode():
        assert not torch.allclose(model(z), model(z))
        noise = model.fixed_noise
        assert [tuple(n.shape[2:]) for n in noise] == [(4, 4), (8, 8), (8, 8), (16, 16), (16, 16)]
        w = model.style(z)
        each = w[:, None].repeat(1, 6, 1)
        expected = model(z, noise)
        torch.testing.assert_close(model.synthesis(each, noise), expected)
        each[:, 5] = 0  # which only the last picture sees: it adds to what is below
        assert not torch.allclose(model.synthesis(each, noise), expected)
        torch.manual_seed(2)
        first = model(z)
        torch.manual_seed(2)
        torch.testing.assert_close(model(z, [None] * 5), first)
        with pytest.raises(ValueError, match=r"w must be \(N, 6\) or \(N, 6, 6\), got shape \(2, 5, 6\)"):
            model.synthesis(each[:, :5], noise)
        with pytest.raises(ValueError, match="noise must be 5 maps, got 4"):
            model(z, noise[:4])


def test_second_derivatives() -> None:
    """As path-length regularisation takes them, of the library's convolutions as of PyTorch's."""
    grads = []
    ours = disturbed(StyleGAN2(SMALL))
    plain = StyleGAN2(SMALL, sequential=nn.Sequential)
    plain.load_state_dict(ours.state_dict())
    w = torch.randn(2, SMALL.style_dim)
    for model in (ours, plain):
        mine = w.clone().requires_grad_()
        (path,) = torch.autograd.grad(model.synthesis(mine, model.fixed_noise).square().sum(), mine, create_graph=True)
        path.square().sum().sqrt().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(b.abs().max(), 1e-3)


def test_names_are_rosinality_s() -> None:
    """Of 256x256 with ``channel_multiplier=2``, written out."""
    found: dict[str, tuple[int, ...]] = {}
    for i in range(1, 9):
        found |= {f"style.{i}.weight": (512, 512), f"style.{i}.bias": (512,)}
    found["input.input"] = (1, 512, 4, 4)

    def modulated(name: str, before: int, after: int, k: int, up: bool = False) -> None:
        found[f"{name}.weight"] = (1, after, before, k, k)
        if up:
            found[f"{name}.blur.kernel"] = (4, 4)
        found[f"{name}.modulation.weight"], found[f"{name}.modulation.bias"] = (before, 512), (before,)

    def styled(name: str, before: int, after: int, up: bool = False) -> None:
        modulated(f"{name}.conv", before, after, 3, up)
        found[f"{name}.noise.weight"], found[f"{name}.activate.bias"] = (1,), (after,)

    def rgb(name: str, before: int, up: bool = True) -> None:
        found[f"{name}.bias"] = (1, 3, 1, 1)
        if up:
            found[f"{name}.upsample.kernel"] = (4, 4)
        modulated(f"{name}.conv", before, 3, 1)

    styled("conv1", 512, 512)
    rgb("to_rgb1", 512, up=False)
    widths = (512, 512, 512, 512, 512, 256, 128)
    for i in range(6):
        styled(f"convs.{2 * i}", widths[i], widths[i + 1], up=True)
        styled(f"convs.{2 * i + 1}", widths[i + 1], widths[i + 1])
    for i in range(6):
        rgb(f"to_rgbs.{i}", widths[i + 1])
    for i in range(13):
        size = 4 << (i + 1) // 2
        found[f"noises.noise_{i}"] = (1, 1, size, size)
    model = create_model("stylegan2")
    assert list(shapes(model).items()) == list(found.items())
    line = torch.tensor([1.0, 3, 3, 1]) / 8
    torch.testing.assert_close(model.state_dict()["convs.0.conv.blur.kernel"], 4 * torch.outer(line, line))


def published() -> ModuleType:
    """The module of an installed package by its file: to import the package itself asks for its whole application."""
    spec = importlib.util.find_spec("modelscope")
    if spec is None or spec.origin is None:
        pytest.skip("modelscope is not installed")
    folder = Path(spec.origin).parent / "models" / "cv" / "face_generation"
    if not (folder / "stylegan2.py").is_file():
        pytest.skip("this modelscope has no stylegan2")
    outer = ModuleType("published_stylegan2")
    outer.__path__ = [str(folder)]
    sys.modules[outer.__name__] = outer
    try:
        return importlib.import_module(f"{outer.__name__}.stylegan2")
    finally:
        for name in [name for name in sys.modules if name.startswith(outer.__name__)]:
            del sys.modules[name]


def test_of_a_package() -> None:
    config = StyleGAN2Config(size=16, style_dim=8, n_mlp=2)
    theirs = published().Generator(16, 8, 2)

    class Ours(StyleGAN2):
        def forward(self, z: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(z, self.fixed_noise)

    def run(model: nn.Module, z: Tensor) -> Tensor:
        return model([z], randomize_noise=False)[0]

    same_as_published(Ours(config), theirs, run, torch.randn(2, 8))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: StyleGAN2Config(size=48), "size=48 must be a power of two, at least 8"),
        (lambda: StyleGAN2Config(n_mlp=0), "n_mlp=0 must be positive"),
        (lambda: StyleGAN2Config(lr_mlp=0.0), "lr_mlp=0.0 must be positive"),
        (lambda: StyleGAN2Config(channel_base=128), "channel_base=128 leaves no channels at size=256"),
    ],
)
def test_impossible_configurations(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
