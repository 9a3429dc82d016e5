"""HiFi-GAN's generator: jik876's names with and without weight norm, and the same waveforms and gradients as in plain
functions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cnnfast.generators import create_model
from cnnfast.generators.hifigan import HiFiGAN, HiFiGANConfig

from .family import check, disturbed, fused, same_as_published, shapes, unfused

SMALL = {
    "num_mels": 5,
    "upsample_rates": (4, 2),
    "upsample_kernel_sizes": (8, 4),
    "upsample_initial_channel": 16,
    "resblock_kernel_sizes": (3, 5),
    "resblock_dilation_sizes": ((1, 3), (1, 2)),
}


def hifigan(config: HiFiGANConfig, state: Mapping[str, Tensor], x: Tensor, training: bool) -> Tensor:
    def weight(name: str) -> Tensor:
        if f"{name}.weight" in state:
            return state[f"{name}.weight"]
        length, direction = (state[f"{name}.parametrizations.weight.original{i}"] for i in (0, 1))
        return direction * (length / direction.square().sum((1, 2), keepdim=True).sqrt())

    def conv(name: str, x: Tensor, dilation: int = 1) -> Tensor:
        w = weight(name)
        return F.conv1d(x, w, state[f"{name}.bias"], padding=dilation * (w.shape[-1] // 2), dilation=dilation)

    def block(name: str, dilations: tuple[int, ...], x: Tensor) -> Tensor:
        for i, dilation in enumerate(dilations):
            if config.resblock == "1":
                y = conv(f"{name}.convs1.{i}", F.leaky_relu(x, 0.1), dilation)
                x = x + conv(f"{name}.convs2.{i}", F.leaky_relu(y, 0.1))
            else:
                x = x + conv(f"{name}.convs.{i}", F.leaky_relu(x, 0.1), dilation)
        return x

    x = conv("conv_pre", x)
    kinds = len(config.resblock_dilation_sizes)
    for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)):
        x = F.leaky_relu(x, 0.1)
        x = F.conv_transpose1d(x, weight(f"ups.{i}"), state[f"ups.{i}.bias"], rate, (kernel - rate) // 2)
        blocks = [block(f"resblocks.{kinds * i + k}", d, x) for k, d in enumerate(config.resblock_dilation_sizes)]
        x = torch.stack(blocks).mean(0)
    return torch.tanh(conv("conv_post", F.leaky_relu(x, 0.01)))


def spectrograms(columns: int = 9) -> Tensor:
    return torch.randn(2, SMALL["num_mels"], columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["1", "2"])
def test_plain_weights(kind: str) -> None:
    config = HiFiGANConfig(**SMALL, resblock=kind)
    model = check(lambda s: HiFiGAN(config, sequential=s), partial(hifigan, config), spectrograms())
    with torch.inference_mode():
        assert model(spectrograms()).shape == (2, 1, 9 * 8) and config.hop == 8
    pairs = 2 * 2 * 2  # upsamplings, kinds of blocks, dilations
    expected = {"Conv1d": pairs, "ConvTranspose1d": 2, "Conv1d + Tanh": 1, "Conv1d + LeakyReLU": 1}
    expected["Conv1d + LeakyReLU"] += pairs if kind == "1" else 0
    assert fused(model) == expected and unfused(model) == {"LeakyReLU": pairs + 1 + 1}


@pytest.mark.parametrize("kind", ["1", "2"])
def test_weight_norm(kind: str) -> None:
    """The network of training, and what `remove_weight_norm` makes of it."""
    config = HiFiGANConfig(**SMALL, resblock=kind, weight_norm=True)
    torch.manual_seed(0)
    model = disturbed(HiFiGAN(config))
    x, reference = spectrograms(), copy.deepcopy(model).double()
    exact = hifigan(config, dict(reference.named_parameters()), x.double(), False)
    exact.square().mean().backward()
    result = model(x)
    result.square().mean().backward()
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        error = (p.grad - q.grad).abs().max()
        assert error <= 1e-5 * q.grad.abs().max(), name
    plain = HiFiGAN(HiFiGANConfig(**SMALL, resblock=kind))
    of = " of a computed weight"
    assert {name.replace(of, ""): n for name, n in fused(model).items()} == fused(plain)
    assert all(of in name for name in fused(model))
    model.remove_weight_norm()
    model.remove_weight_norm()  # again, and nothing happens
    assert shapes(model) == shapes(plain) and fused(model) == fused(plain) != {}
    torch.testing.assert_close(model.eval()(x).double(), exact, rtol=1e-5, atol=1e-6)


def test_either_form_loads_either_layout() -> None:
    x = spectrograms()
    normed, plain = (HiFiGAN(HiFiGANConfig(**SMALL, weight_norm=w)).eval() for w in (True, False))
    with torch.inference_mode():
        expected = normed(x)
        state = normed.state_dict()
        given = dict(state)
        plain.load_state_dict(state, strict=True)
        assert state == given and "conv_pre.weight_g" in state
        torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)
        again = HiFiGAN(HiFiGANConfig(**SMALL, weight_norm=True)).eval()
        for source in (plain.state_dict(), state):
            again.load_state_dict(source, strict=True)
            torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-6)
    del state["conv_post.weight_v"]
    with pytest.raises(RuntimeError, match="conv_post.weight"):
        plain.load_state_dict(state)


def test_copies_keep_the_names() -> None:
    for weight_norm in (False, True):
        model = HiFiGAN(HiFiGANConfig(**SMALL, weight_norm=weight_norm))
        assert list(copy.deepcopy(model).state_dict()) == list(model.state_dict())
        within = torch.nn.ModuleDict({"generator": model}).state_dict()
        assert list(within) == [f"generator.{name}" for name in model.state_dict()]


def test_names_are_jik876_s() -> None:
    """``config_v1``'s, written out: weight norm's three entries for each convolution."""
    convs = {"conv_pre": (512, 80, 7)}
    convs |= {f"ups.{i}": (512 >> i, 256 >> i, k) for i, k in enumerate((16, 16, 4, 4))}
    for i in range(12):
        shape = (256 >> i // 3,) * 2 + ((3, 7, 11)[i % 3],)
        convs |= {f"resblocks.{i}.convs{c}.{d}": shape for c in (1, 2) for d in range(3)}
    convs["conv_post"] = (1, 32, 7)
    normed, plain = {}, {}
    for name, shape in convs.items():
        bias = shape[1:2] if name.startswith("ups") else shape[:1]
        normed |= {f"{name}.bias": bias, f"{name}.weight_g": (shape[0], 1, 1), f"{name}.weight_v": shape}
        plain |= {f"{name}.weight": shape, f"{name}.bias": bias}
    with torch.device("meta"):
        assert list(shapes(create_model("hifigan", weight_norm=True)).items()) == list(normed.items())
        assert list(shapes(create_model("hifigan")).items()) == list(plain.items())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PyTorch's former weight_norm
@pytest.mark.parametrize("kind", ["1", "2"])
def test_of_a_package(kind: str) -> None:
    models = pytest.importorskip("hifigan_vocoder.models", exc_type=ImportError)
    names = {**SMALL, "num_mels": 80}
    if kind == "1":
        names["resblock_dilation_sizes"] = ((1, 3, 5), (1, 2, 3))
    ours = HiFiGAN(HiFiGANConfig(**names, resblock=kind, weight_norm=True))
    theirs = models.Generator(SimpleNamespace(**names, resblock=kind))
    x = torch.randn(2, 80, 9)
    same_as_published(ours, theirs, lambda m, x: m(x), x)
    plain = HiFiGAN(HiFiGANConfig(**names, resblock=kind)).eval()
    plain.load_state_dict(theirs.state_dict(), strict=True)
    expected = theirs(x)
    theirs.remove_weight_norm()
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: HiFiGANConfig(resblock="3"), "resblock='3' must be '1' or '2'"),
        (lambda: HiFiGANConfig(upsample_rates=(8, 8)), "upsample_rates=.* and upsample_kernel_sizes=.* same length"),
        (lambda: HiFiGANConfig(upsample_rates=(8, 8, 3, 2)), "4 must exceed its rate 3 by an even number"),
        (lambda: HiFiGANConfig(resblock_kernel_sizes=(3, 4, 5)), r"resblock_kernel_sizes=\(3, 4, 5\) must be odd"),
        (lambda: HiFiGANConfig(upsample_initial_channel=24), "=24 must be a multiple of 16: each of 4 upsamplings"),
        (lambda: HiFiGANConfig(num_mels=0), "num_mels=0 must be positive"),
    ],
)
def test_impossible_configurations(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
