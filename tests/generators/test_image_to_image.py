"""pix2pix's U-Net, CycleGAN's and pix2pixHD's ResNet, and fast neural style: published names, and the same pictures and
gradients as the networks written down once more in plain functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnnfast.generators import create_model
from cnnfast.generators.fast_neural_style import FastStyle, FastStyleConfig
from cnnfast.generators.pix2pix import Pix2PixConfig, Pix2PixUNet
from cnnfast.generators.pix2pixhd import LocalEnhancer, LocalEnhancerConfig
from cnnfast.generators.resnet import ResNetConfig, ResNetGenerator

from .family import check, disturbed, fused, same_as_published, shapes, unfused

SMALL_UNET = {"num_downs": 6, "ngf": 4}
SMALL_RESNET = {"ngf": 4, "n_blocks": 2}


def normed(state: Mapping[str, Tensor], name: str, x: Tensor, training: bool) -> Tensor:
    """A BatchNorm where the state has statistics under the name, else an instance norm."""
    if f"{name}.running_mean" not in state:
        return F.instance_norm(x, weight=state.get(f"{name}.weight"), bias=state.get(f"{name}.bias"))
    if training:
        state[f"{name}.num_batches_tracked"].data += 1
    vectors = [state[f"{name}.{what}"] for what in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *vectors, training=training)


def conv(state: Mapping[str, Tensor], name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride, padding)


# --- pix2pix ----------------------------------------------------------------------------------------------------------


def unet(config: Pix2PixConfig, state: Mapping[str, Tensor], x: Tensor, training: bool) -> Tensor:
    """Level by level, each inside the one before, as published: on the way back its input beside its result."""
    last = config.num_downs - 1

    def level(i: int, prefix: str, x: Tensor) -> Tensor:
        at = 0 if i == 0 else 1
        y = conv(state, f"{prefix}.{at}", x if i == 0 else F.leaky_relu(x, 0.2), 2, 1)
        if i == last:
            at = 2
        else:
            y = y if i == 0 else normed(state, f"{prefix}.2", y, training)
            inside = 1 if i == 0 else 3
            y = level(i + 1, f"{prefix}.{inside}.model", y)
            at = inside + 1
        weight, bias = state[f"{prefix}.{at + 1}.weight"], state.get(f"{prefix}.{at + 1}.bias")
        y = F.conv_transpose2d(F.relu(y), weight, bias, 2, 1)
        if i == 0:
            return torch.tanh(y)
        return torch.cat([x, normed(state, f"{prefix}.{at + 2}", y, training)], 1)

    return level(0, "model.model", x)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_unet(norm: str) -> None:
    config = Pix2PixConfig(**SMALL_UNET, norm=norm, use_dropout=False, input_nc=2, output_nc=1)
    size = 64 if norm == "batch" else 128  # an instance norm needs more than one pixel
    x = torch.randn(3, 2, size, size, generator=torch.Generator().manual_seed(1))
    model = check(lambda s: Pix2PixUNet(config, sequential=s), partial(unet, config), x)
    name = {"batch": "BatchNorm2d", "instance": "InstanceNorm2d"}[norm]
    assert fused(model) == {
        "Conv2d + LeakyReLU": 1,
        f"Conv2d + {name} + LeakyReLU": 4,
        "Conv2d + ReLU": 1,
        f"ConvTranspose2d + {name} + ReLU": 5,
        "ConvTranspose2d + Tanh": 1,
    }
    assert unfused(model) == {}


def test_unet_names_are_pix2pix_s() -> None:
    """``unet_256`` with 512 channels in the four inner levels, written out."""
    expected: dict[str, tuple[int, ...]] = {}
    widths, prefix = (64, 128, 256, 512, 512, 512, 512, 512), "model.model"

    def norm(at: int, channels: int) -> dict[str, tuple[int, ...]]:
        vectors = {f"{prefix}.{at}.{v}": (channels,) for v in ("weight", "bias", "running_mean", "running_var")}
        return {**vectors, f"{prefix}.{at}.num_batches_tracked": ()}

    expected["model.model.0.weight"] = (64, 3, 4, 4)
    prefixes = []
    for i in range(1, 8):
        prefix += f".{1 if i == 1 else 3}.model"
        prefixes.append(prefix)
        expected[f"{prefix}.1.weight"] = (widths[i], widths[i - 1], 4, 4)
        if i < 7:
            expected |= norm(2, widths[i])
    for i in range(7, 0, -1):
        prefix = prefixes[i - 1]
        expected[f"{prefix}.{3 if i == 7 else 5}.weight"] = (widths[i] * (1 if i == 7 else 2), widths[i - 1], 4, 4)
        expected |= norm(4 if i == 7 else 6, widths[i - 1])
    expected["model.model.3.weight"], expected["model.model.3.bias"] = (128, 3, 4, 4), (3,)
    with torch.device("meta"):
        assert list(shapes(create_model("pix2pix")).items()) == list(expected.items())


def test_unet_s_dropouts() -> None:
    """In training the same ones as plain PyTorch's, from the same random numbers; in eval mode fused away."""
    config = Pix2PixConfig(num_downs=7, ngf=4)
    ours, plain = Pix2PixUNet(config), Pix2PixUNet(config, sequential=nn.Sequential)
    plain.load_state_dict(ours.state_dict())
    results = []
    for model in (ours, plain):
        torch.manual_seed(5)
        results.append(model(ours.example_input(2).mul_(0).add_(0.3)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert unfused(ours) == {"Dropout": 2, "ReLU": 2} and unfused(ours.eval()) == {}
    assert fused(ours)["ConvTranspose2d + BatchNorm2d + Dropout + ReLU"] == 2
    prefix = "model.model.1" + ".model.3" * 3
    assert [n for n, m in ours.named_modules() if isinstance(m, nn.Dropout)] == [
        f"{prefix}.model.3.model.7",
        f"{prefix}.model.7",
    ]


def test_unet_of_the_published_repository() -> None:
    networks = pytest.importorskip("deepliif.models.networks", exc_type=ImportError)
    for norm, layer in (("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d)):
        for dropout in (False, True):
            ours = Pix2PixUNet(Pix2PixConfig(**SMALL_UNET, norm=norm, use_dropout=dropout))
            theirs = networks.UnetGenerator(3, 3, 6, 4, layer, dropout)
            same_as_published(ours, theirs, lambda m, x: m(x), torch.randn(2, 3, 128, 128))


# --- CycleGAN and pix2pixHD -------------------------------------------------------------------------------------------


def resnet(config: ResNetConfig, state: Mapping[str, Tensor], x: Tensor, training: bool) -> Tensor:
    def pad(x: Tensor, p: int, mode: str = "reflect") -> Tensor:
        return F.pad(x, (p,) * 4, **({} if mode == "zero" else {"mode": mode}))  # type: ignore[arg-type]

    def behind(at: int, x: Tensor) -> Tensor:
        return F.relu(normed(state, f"model.{at}", x, training))

    x = behind(2, conv(state, "model.1", pad(x, 3)))
    at = 4
    for _ in range(config.n_downsampling):
        x = behind(at + 1, conv(state, f"model.{at}", x, 2, 1))
        at += 3
    first = int(config.padding_type != "zero")  # the padding has a number, too
    for _ in range(config.n_blocks):
        y, k = x, first
        for last in (False, True):
            y = conv(state, f"model.{at}.conv_block.{k}", pad(y, 1, config.padding_type))
            y = normed(state, f"model.{at}.conv_block.{k + 1}", y, training)
            y, k = (y if last else F.relu(y)), k + 3 + first + config.use_dropout
        x, at = x + y, at + 1
    for _ in range(config.n_downsampling):
        x = F.conv_transpose2d(x, state[f"model.{at}.weight"], state.get(f"model.{at}.bias"), 2, 1, 1)
        x = behind(at + 1, x)
        at += 3
    return torch.tanh(conv(state, f"model.{at + 1}", pad(x, 3)))


RESNETS = {
    "cyclegan": ResNetConfig(**SMALL_RESNET),
    "batch": ResNetConfig(**SMALL_RESNET, norm="batch", input_nc=1, output_nc=2, padding_type="zero"),
    "replicate": ResNetConfig(**SMALL_RESNET, padding_type="replicate"),
    "pix2pixhd": ResNetConfig(**SMALL_RESNET, norm="batch", n_downsampling=3, use_bias=True),
}


@pytest.mark.parametrize("config", RESNETS.values(), ids=RESNETS)
def test_resnet(config: ResNetConfig) -> None:
    x = torch.randn(2, config.input_nc, 24, 16, generator=torch.Generator().manual_seed(1))
    model = check(lambda s: ResNetGenerator(config, sequential=s), partial(resnet, config), x)
    norm = {"batch": "BatchNorm2d", "instance": "InstanceNorm2d"}[config.norm]
    pad = {"reflect": "ReflectionPad2d + ", "replicate": "ReplicationPad2d + ", "zero": ""}[config.padding_type]
    expected = {
        f"ReflectionPad2d + Conv2d + {norm} + ReLU": 1,
        f"{pad}Conv2d + {norm}": 2,
        f"ConvTranspose2d + {norm} + ReLU": config.n_downsampling,
        "ReflectionPad2d + Conv2d + Tanh": 1,
    }
    for names, count in ((f"Conv2d + {norm} + ReLU", config.n_downsampling), (f"{pad}Conv2d + {norm} + ReLU", 2)):
        expected[names] = expected.get(names, 0) + count
    assert fused(model) == expected and unfused(model) == {"_Block": 2}


def test_resnet_names_are_cyclegan_s() -> None:
    """``resnet_9blocks`` of 64 channels with instance norms, written out."""
    layers = {"1": (64, 3, 7, 7), "4": (128, 64, 3, 3), "7": (256, 128, 3, 3)}
    for block in range(10, 19):
        layers |= {f"{block}.conv_block.1": (256, 256, 3, 3), f"{block}.conv_block.5": (256, 256, 3, 3)}
    layers |= {"19": (256, 128, 3, 3), "22": (128, 64, 3, 3), "26": (3, 64, 7, 7)}
    expected = {}
    for name, shape in layers.items():
        expected[f"model.{name}.weight"] = shape
        expected[f"model.{name}.bias"] = (shape[1 if name in ("19", "22") else 0],)
    with torch.device("meta"):
        assert list(shapes(create_model("cyclegan")).items()) == list(expected.items())


def test_resnet_names_are_pix2pixhd_s() -> None:
    """``netG global``: four halvings, 1024 channels in the blocks."""
    with torch.device("meta"):
        found = shapes(create_model("pix2pixhd"))
    layers = ["1", "4", "7", "10", "13"]
    layers += [f"{block}.conv_block.{k}" for block in range(16, 25) for k in (1, 5)]
    layers += ["25", "28", "31", "34", "38"]
    assert list(found) == [f"model.{layer}.{what}" for layer in layers for what in ("weight", "bias")]
    assert found["model.13.weight"] == (1024, 512, 3, 3) and found["model.25.weight"] == (1024, 512, 3, 3)
    assert found["model.16.conv_block.1.weight"] == (1024, 1024, 3, 3) and found["model.38.weight"] == (3, 64, 7, 7)


def local_enhancer(config: LocalEnhancerConfig, state: Mapping[str, Tensor], x: Tensor, training: bool) -> Tensor:
    """Of one halving inside and one block outside, of instance norms."""

    def padded(name: str, x: Tensor, p: int) -> Tensor:
        return conv(state, name, F.pad(x, (p,) * 4, mode="reflect"))

    def behind(x: Tensor) -> Tensor:
        return F.relu(F.instance_norm(x))

    def down(name: str, x: Tensor) -> Tensor:
        x = behind(padded(f"{name}.1", x, 3))
        return behind(conv(state, f"{name}.4", x, 2, 1))

    def block_and_up(name: str, at: int, x: Tensor) -> Tensor:
        y = behind(padded(f"{name}.{at}.conv_block.1", x, 1))
        x = x + F.instance_norm(padded(f"{name}.{at}.conv_block.5", y, 1))
        up = f"{name}.{at + 1}"
        return behind(F.conv_transpose2d(x, state[f"{up}.weight"], state[f"{up}.bias"], 2, 1, 1))

    ones = torch.ones_like(x)  # a mean of what is there: 3x3 pixels, but at two borders fewer
    half = F.avg_pool2d(x, 3, 2, 1) / F.avg_pool2d(ones, 3, 2, 1)
    inner = block_and_up("model", 7, down("model", half))
    return torch.tanh(padded("model1_2.5", block_and_up("model1_2", 0, down("model1_1", x) + inner), 3))


def test_local_enhancer() -> None:
    config = LocalEnhancerConfig(input_nc=2, ngf=4, n_downsampling=1, n_blocks=1, n_blocks_local=1)
    x = torch.randn(2, 2, 24, 16, generator=torch.Generator().manual_seed(1))
    model = check(lambda s: LocalEnhancer(config, sequential=s), partial(local_enhancer, config), x)
    pad, norm = "ReflectionPad2d + ", "InstanceNorm2d"
    assert fused(model) == {
        f"{pad}Conv2d + {norm} + ReLU": 2 + 2,
        f"{pad}Conv2d + {norm}": 2,
        f"Conv2d + {norm} + ReLU": 2,
        f"ConvTranspose2d + {norm} + ReLU": 2,
        f"{pad}Conv2d + Tanh": 1,
    }
    assert unfused(model) == {"_Block": 2}


def test_local_enhancer_names_are_pix2pixhd_s() -> None:
    """``netG local`` of 1024p: the inner network is ``netG global`` without what makes its picture."""
    with torch.device("meta"):
        found, inner = shapes(create_model("pix2pixhd_local")), shapes(create_model("pix2pixhd", input_nc=36))
    layers = {"model1_1.1": (32, 36, 7, 7), "model1_1.4": (64, 32, 3, 3)}
    layers |= {f"model1_2.{block}.conv_block.{k}": (64, 64, 3, 3) for block in range(3) for k in (1, 5)}
    layers |= {"model1_2.3": (64, 32, 3, 3), "model1_2.7": (3, 32, 7, 7)}
    expected = {name: shape for name, shape in inner.items() if not name.startswith("model.38.")}
    for name, shape in layers.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": (shape[1 if name == "model1_2.3" else 0],)}
    assert list(found.items()) == list(expected.items())


def test_statistics_of_old_checkpoints_are_left_out() -> None:
    """Those of instance norms, which PyTorch before 0.4 saved; a BatchNorm's are needed."""
    for make in (
        lambda norm: ResNetGenerator(ResNetConfig(**SMALL_RESNET, norm=norm)),
        lambda norm: Pix2PixUNet(Pix2PixConfig(**SMALL_UNET, norm=norm)),
    ):
        old, new = make("instance"), make("instance")
        state = old.state_dict()
        del state._metadata  # which such files lack
        norms = [name for name, m in old.named_modules() if isinstance(m, nn.InstanceNorm2d)]
        state |= {f"{name}.running_mean": torch.zeros(4) for name in norms}
        state |= {f"{name}.running_var": torch.ones(4) for name in norms}
        before = dict(state)
        new.load_state_dict(state)
        assert state == before and norms
        assert all(torch.equal(t, old.state_dict()[name]) for name, t in new.state_dict().items())
        with pytest.raises(RuntimeError, match="Unexpected key.*nothing.running_mean"):
            new.load_state_dict({**state, "nothing.running_mean": torch.zeros(1)})
        state = make("batch").state_dict()
        del state[next(name for name in state if name.endswith("running_mean"))]
        with pytest.raises(RuntimeError, match="Missing key.*running_mean"):
            make("batch").load_state_dict(state)


def test_resnets_of_the_published_repositories() -> None:
    junyanz = pytest.importorskip("deepliif.models.networks", exc_type=ImportError)
    for norm, layer in (("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d)):
        for dropout, padding in ((False, "reflect"), (True, "reflect")):
            config = ResNetConfig(**SMALL_RESNET, norm=norm, use_dropout=dropout, padding_type=padding)
            theirs = junyanz.ResnetGenerator(3, 3, 4, layer, dropout, 2, padding)
            same_as_published(ResNetGenerator(config), theirs, lambda m, x: m(x), torch.randn(2, 3, 32, 24))


def test_global_generator_of_the_published_repository() -> None:
    networks = pytest.importorskip("pix2pixhd.models.networks", exc_type=ImportError)
    for norm, layer in (("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d)):
        config = ResNetConfig(**SMALL_RESNET, norm=norm, n_downsampling=3, use_bias=True)
        theirs = networks.GlobalGenerator(3, 3, 4, 3, 2, layer)
        same_as_published(ResNetGenerator(config), theirs, lambda m, x: m(x), torch.randn(2, 3, 32, 48))


def test_local_enhancer_of_the_published_repository() -> None:
    networks = pytest.importorskip("pix2pixhd.models.networks", exc_type=ImportError)
    for norm, layer in (("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d)):
        config = LocalEnhancerConfig(3, 3, 4, 2, 2, norm=norm, n_blocks_local=1)
        theirs = networks.LocalEnhancer(3, 3, 4, 2, 2, 1, 1, layer)
        same_as_published(LocalEnhancer(config), theirs, lambda m, x: m(x), torch.randn(2, 3, 32, 48))


# --- fast neural style ------------------------------------------------------------------------------------------------


def fast_style(config: FastStyleConfig, state: Mapping[str, Tensor], x: Tensor, training: bool) -> Tensor:
    def layer(name: str, norm: str | None, x: Tensor, stride: int = 1, up: int = 1) -> Tensor:
        x = x.repeat_interleave(up, 2).repeat_interleave(up, 3)
        p = state[f"{name}.conv2d.weight"].shape[-1] // 2
        x = conv(state, f"{name}.conv2d", F.pad(x, (p,) * 4, mode="reflect"), stride)
        return x if norm is None else normed(state, norm, x, training)

    x = F.relu(layer("conv1", "in1", x))
    x = F.relu(layer("conv2", "in2", x, stride=2))
    x = F.relu(layer("conv3", "in3", x, stride=2))
    for i in range(1, config.blocks + 1):
        y = F.relu(layer(f"res{i}.conv1", f"res{i}.in1", x))
        x = layer(f"res{i}.conv2", f"res{i}.in2", y) + x
    x = F.relu(layer("deconv1", "in4", x, up=2))
    x = F.relu(layer("deconv2", "in5", x, up=2))
    return layer("deconv3", None, x)


def test_fast_style() -> None:
    config = FastStyleConfig(width=4, blocks=2)
    x = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(1)) * 255
    model = check(lambda s: FastStyle(config, sequential=s), partial(fast_style, config), x)
    assert fused(model) == {
        "ReflectionPad2d + Conv2d + InstanceNorm2d + ReLU": 5,
        "ReflectionPad2d + Conv2d + InstanceNorm2d": 2,
        "Upsample + ReflectionPad2d + Conv2d + InstanceNorm2d + ReLU": 2,
        "ReflectionPad2d + Conv2d": 1,
    }
    assert unfused(model) == {}


def test_fast_style_names_are_pytorch_examples() -> None:
    """``TransformerNet``, whose checkpoints of PyTorch 0.3 have statistics of the norms besides."""
    convs = {"conv1": (32, 3, 9, 9), "conv2": (64, 32, 3, 3), "conv3": (128, 64, 3, 3)}
    ups = {"deconv1": (64, 128, 3, 3), "deconv2": (32, 64, 3, 3), "deconv3": (3, 32, 9, 9)}
    expected: dict[str, tuple[int, ...]] = {}

    def add(conv: str, norm: str | None, shape: tuple[int, ...]) -> None:
        names = [f"{conv}.conv2d"] + ([norm] if norm else [])
        for name in names:
            expected[f"{name}.weight"] = shape if name != norm else shape[:1]
            expected[f"{name}.bias"] = shape[:1]

    for i, (name, shape) in enumerate(convs.items()):
        add(name, f"in{i + 1}", shape)
    for i in range(1, 6):
        for k in (1, 2):
            add(f"res{i}.conv{k}", f"res{i}.in{k}", (128, 128, 3, 3))
    for i, (name, shape) in enumerate(ups.items()):
        add(name, f"in{i + 4}" if i < 2 else None, shape)
    model = create_model("fast_style")
    assert list(shapes(model).items()) == list(expected.items())
    state = dict(disturbed(create_model("fast_style"), 3).state_dict())
    model.load_state_dict({**state, "in1.running_mean": torch.ones(32), "res5.in2.running_var": torch.ones(128)})
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Pix2PixConfig(num_downs=4), "num_downs=4 must be at least 5"),
        (lambda: Pix2PixConfig(ngf=0), "ngf=0 must be positive"),
        (lambda: Pix2PixConfig(norm="group"), "norm='group' must be 'batch' or 'instance'"),
        (lambda: ResNetConfig(n_blocks=-1), "n_blocks=-1 must not be negative"),
        (
            lambda: ResNetConfig(padding_type="circular"),
            "padding_type='circular' must be one of reflect, replicate, zero",
        ),
        (lambda: ResNetConfig(norm="layer"), "norm='layer' must be"),
        (lambda: FastStyleConfig(blocks=0), "blocks=0 must be positive"),
    ],
)
def test_impossible_configurations(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
