"""The DCGAN generator: pytorch/examples' state_dict, the same pictures as plain PyTorch, and lookup by name."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.generators import DCGANConfig, DCGANGenerator, create_model, list_models, weights
from cnnfast.generators.weights import PRETRAINED, WeightsError
from cnnfast.trained import SHIPPED

from ..tolerance import assert_close

# The generator of pytorch/examples with its default arguments.
SHAPES = {
    "main.0.weight": (100, 512, 4, 4),
    "main.3.weight": (512, 256, 4, 4),
    "main.6.weight": (256, 128, 4, 4),
    "main.9.weight": (128, 64, 4, 4),
    "main.12.weight": (64, 3, 4, 4),
    **{
        f"main.{i}.{name}": () if name == "num_batches_tracked" else (width,)
        for i, width in ((1, 512), (4, 256), (7, 128), (10, 64))
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
}

# What takes a published checkpoint, of which this package has none.
WITHOUT_WEIGHTS = [
    *("dcgan", "pix2pix", "cyclegan", "pix2pixhd", "pix2pixhd_local", "fast_style"),
    *("vae_decoder", "taesd_decoder", "hifigan", "segresnet", "stylegan2"),
]


def pair(config: DCGANConfig, seed: int = 0) -> tuple[DCGANGenerator, DCGANGenerator]:
    """The same network in cnnfast.Sequential and nn.Sequential, with running statistics unlike the initial ones."""
    torch.manual_seed(seed)
    ours = DCGANGenerator(config)
    with torch.no_grad():
        for module in ours.main:
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 2.0)
    plain = DCGANGenerator(config, sequential=nn.Sequential)
    plain.load_state_dict(ours.state_dict())
    return ours.eval(), plain.eval()


def test_state_dict_is_that_of_pytorch_examples() -> None:
    state = DCGANGenerator().state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == SHAPES


def test_containers() -> None:
    assert type(DCGANGenerator().main) is cnnfast.Sequential
    assert type(DCGANGenerator(sequential=nn.Sequential).main) is nn.Sequential


def test_initialisation_is_the_papers() -> None:
    model = DCGANGenerator()
    weight, norm = model.main[3].weight, model.main[1]
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and abs(weight.mean().item()) < 1e-3
    assert norm.weight.mean().item() == pytest.approx(1.0, abs=0.01) and not norm.bias.any()


@pytest.mark.parametrize("image_size, layers", [(8, 2), (16, 3), (64, 5), (128, 6)])
def test_image_sizes(image_size: int, layers: int) -> None:
    ours, plain = pair(DCGANConfig(nz=6, ngf=4, nc=1, image_size=image_size))
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in ours.main) == layers
    z = torch.randn(3, 6, 1, 1)
    with torch.inference_mode():
        images, expected = ours(z), plain(z)
        assert images.shape == (3, 1, image_size, image_size) and images.abs().max() <= 1
        assert_close(images, plain.double()(z.double()), expected)


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_default_network_agrees_with_plain_pytorch(batch: int, channels_last: bool) -> None:
    ours, plain = pair(DCGANConfig())
    if channels_last:
        ours.to(memory_format=torch.channels_last)
        plain.to(memory_format=torch.channels_last)
    z = torch.randn(batch, 100, 1, 1)
    with torch.inference_mode():
        expected = plain(z)
        images = ours(z)
        assert_close(images, plain.double()(z.double()), expected)
    assert images.stride() == expected.stride()


def test_training_mode_is_plain_pytorch() -> None:
    ours, plain = pair(DCGANConfig(nz=8, ngf=8, image_size=16))
    exact = copy.deepcopy(plain).double()
    z = torch.randn(5, 8, 1, 1)
    for model in (ours, plain, exact):
        model.train()
        model(z.to(model.main[0].weight.dtype)).square().sum().backward()
    for (name, a), b, e in zip(ours.named_parameters(), plain.parameters(), exact.parameters(), strict=True):
        assert_close(a.grad, e.grad, b.grad, name)
    for (name, a), b, e in zip(ours.named_buffers(), plain.buffers(), exact.buffers(), strict=True):
        assert_close(a, e, b, name) if a.is_floating_point() else torch.equal(a, b)


@pytest.mark.parametrize("size", [0, 4, 12, 63, 65])
def test_impossible_image_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size={size} must be a power of two, at least 8"):
        DCGANConfig(image_size=size)


def test_impossible_widths() -> None:
    with pytest.raises(ValueError, match="ngf=0 must be positive"):
        DCGANConfig(ngf=0)


def test_a_conditional_generator() -> None:
    config = DCGANConfig(nz=5, ngf=4, image_size=16, classes=3, dropout=0.5)
    ours, plain = pair(config)
    assert isinstance(ours.main[3], nn.Dropout) and ours.main[0].in_channels == 8
    noise = torch.randn(4, 5, 1, 1)
    z = ours.latent(noise, torch.tensor([0, 2, 1, 1]))
    assert torch.equal(z[:, :5], noise) and z[:, 5:, 0, 0].tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0]]
    between = torch.tensor([[0.5, 0.5, 0.0]]).expand(4, 3)
    assert torch.equal(ours.latent(noise, between)[:, 5:, 0, 0], between)
    with torch.inference_mode():
        made, expected = ours(z), plain(z)
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert ours.example_input(4).shape == (4, 8, 1, 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DCGANConfig(classes=-1), "classes=-1 must not be negative"),
        (lambda: DCGANConfig(dropout=1.0), "dropout=1.0 must be at least 0 and less than 1"),
        (
            lambda: DCGANGenerator(DCGANConfig(ngf=4)).latent(torch.zeros(1, 100, 1, 1), torch.zeros(1).long()),
            "this generator has no classes",
        ),
        (
            lambda: DCGANGenerator(DCGANConfig(ngf=4, classes=2)).latent(torch.zeros(3, 100, 1, 1), torch.zeros(3, 1)),
            r"labels must be \(3,\) or \(3, 2\), got shape \(3, 1\)",
        ),
    ],
    ids=["classes", "dropout", "none", "shape"],
)
def test_impossible_conditions(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- by name ----------------------------------------------------------------------------------------------------------


def test_list_models() -> None:
    assert list_models()[:2] == ["dcgan", "dcgan_faces"] and {"dcgan_eyes", "span_x2", "text_image"} <= {*list_models()}
    assert list_models(pretrained=False) == WITHOUT_WEIGHTS
    assert {*PRETRAINED, *SHIPPED} == set(list_models(pretrained=True)) == set(list_models()) - {*WITHOUT_WEIGHTS}


def test_create_model_passes_the_configuration_on() -> None:
    model = create_model("dcgan", ngf=4, image_size=8)
    assert isinstance(model, DCGANGenerator) and model.config == DCGANConfig(ngf=4, image_size=8) and model.training


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: create_model("dcgn"), "unknown model 'dcgn': expected one of dcgan, dcgan_faces"),
        (lambda: create_model("dcgan", nfg=4), "unknown option nfg for model 'dcgan': expected .*ngf"),
        (
            lambda: create_model("dcgan", pretrained=True),
            "'dcgan' has no trained weights; those that have: dcgan_faces",
        ),
        (lambda: create_model("dcgan_faces", pretrained=True, ngf=4), "fix its configuration: drop ngf"),
    ],
    ids=["name", "option", "untrained", "fixed"],
)
def test_bad_requests(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def fake_weights(monkeypatch: pytest.MonkeyPatch, path: Path, state: dict[str, torch.Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save({"netG_state_dict": state}, buffer)
    contents = buffer.getvalue()
    path.write_bytes(contents)
    real = PRETRAINED["dcgan_faces"]
    file = replace(real.file, sha256=hashlib.sha256(contents).hexdigest(), size=len(contents))
    monkeypatch.setattr(weights, "PRETRAINED", {"dcgan_faces": replace(real, file=file)})


def test_weights_from_a_local_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = DCGANGenerator().state_dict()
    fake_weights(monkeypatch, tmp_path / "weights.tar", state)
    model = create_model("dcgan_faces", weights_file=tmp_path / "weights.tar")
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = DCGANGenerator().state_dict()
    del state["main.0.weight"]
    fake_weights(monkeypatch, tmp_path / "weights.tar", state)
    with pytest.raises(RuntimeError, match="main.0.weight"):
        create_model("dcgan_faces", weights_file=tmp_path / "weights.tar")


def test_trained_faces_agree_with_plain_pytorch() -> None:
    """With the real weights, out of the cache or the registry."""
    try:
        ours = create_model("dcgan_faces", pretrained=True)
    except WeightsError as error:
        pytest.skip(f"no trained weights: {error}")
    plain = create_model("dcgan_faces", pretrained=True, sequential=nn.Sequential)
    z = torch.randn(16, 100, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = plain(z)
        assert expected.std() > 0.3  # pictures, not grey
        assert_close(ours(z), plain.double()(z.double()), expected)


def test_example_input() -> None:
    model = DCGANGenerator(DCGANConfig(nz=7, ngf=4, image_size=8)).double()
    z = model.example_input(3)
    assert z.shape == (3, 7, 1, 1) and z.dtype == torch.float64
    assert model.eval()(z).shape == (3, 3, 8, 8)
