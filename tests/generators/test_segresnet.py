"""SegResNet: MONAI's names, and the same volumes and gradients as in plain functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnnfast.generators import create_model
from cnnfast.generators.segresnet import SegResNet, SegResNetConfig

from .family import check, fused, same_as_published, shapes, unfused

SMALL = {"init_filters": 4, "in_channels": 2, "out_channels": 3, "num_groups": 2}
CONFIGS = {
    "linear": SegResNetConfig(**SMALL, blocks_down=(1, 2, 1), blocks_up=(1, 2)),
    "deconv": SegResNetConfig(**SMALL, blocks_down=(1, 1), blocks_up=(1,), upsample_mode="deconv"),
    "2d": SegResNetConfig(**SMALL, spatial_dims=2, blocks_down=(1, 1), blocks_up=(1,)),
}


def segresnet(config: SegResNetConfig, state: Mapping[str, Tensor], x: Tensor, training: bool) -> Tensor:
    convolve, transposed = (
        (F.conv2d, F.conv_transpose2d) if config.spatial_dims == 2 else (F.conv3d, F.conv_transpose3d)
    )

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        return convolve(x, weight, state.get(f"{name}.conv.bias"), stride, weight.shape[-1] // 2)

    def behind(name: str, x: Tensor) -> Tensor:
        return F.relu(F.group_norm(x, config.num_groups, state[f"{name}.weight"], state[f"{name}.bias"]))

    def block(name: str, x: Tensor) -> Tensor:
        y = conv(f"{name}.conv1", behind(f"{name}.norm1", x))
        return x + conv(f"{name}.conv2", behind(f"{name}.norm2", y))

    x, passed = conv("convInit", x), []
    for i, count in enumerate(config.blocks_down):
        x = conv(f"down_layers.{i}.0", x, 2) if i else x
        for j in range(count):
            x = block(f"down_layers.{i}.{j + 1}", x)
        passed.append(x)
    for i, count in enumerate(config.blocks_up):
        x = conv(f"up_samples.{i}.0", x)
        if config.upsample_mode == "deconv":
            name = f"up_samples.{i}.1.deconv"
            x = transposed(x, state[f"{name}.weight"], state[f"{name}.bias"], 2)
        else:
            mode = {2: "bilinear", 3: "trilinear"}[config.spatial_dims]
            x = F.interpolate(x, scale_factor=2.0, mode=mode, align_corners=False)
        x = x + passed[-2 - i]
        for j in range(count):
            x = block(f"up_layers.{i}.{j}", x)
    return conv("conv_final.2", behind("conv_final.0", x))


@pytest.mark.parametrize("name", CONFIGS)
def test_segresnet(name: str) -> None:
    config = CONFIGS[name]
    size = (8, 4, 12)[: config.spatial_dims]
    x = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(1))
    model = check(lambda s: SegResNet(config, sequential=s), partial(segresnet, config), x)
    kind = "Conv2d" if name == "2d" else "Conv3d"
    blocks = sum(config.blocks_down) + sum(config.blocks_up)
    ups = len(config.blocks_up)
    # The first one, the strided ones, the second one of each block, one for each upsampling, the last one.
    expected = {f"{kind} + GroupNorm + ReLU": blocks, kind: 1 + ups + blocks + ups + 1}
    rest = {"GroupNorm": blocks + 1, "ReLU": blocks + 1, "Identity": 1}
    if config.upsample_mode == "deconv":
        expected["ConvTranspose3d"] = ups
    else:
        rest["Upsample"] = ups
    assert fused(model) == expected and unfused(model) == rest


def test_dropout_is_of_training_only() -> None:
    config = SegResNetConfig(**SMALL, blocks_down=(1, 1), blocks_up=(1,), dropout_prob=0.5)
    ours, plain = SegResNet(config), SegResNet(config, sequential=nn.Sequential)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 2, 4, 4, 4)
    results = []
    for model in (ours, plain):
        torch.manual_seed(3)
        results.append(model(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.eval()(x), ours(x)) and not torch.allclose(ours(x), results[0])


def test_names_are_monai_s() -> None:
    """Of the bundle brats_mri_segmentation, written out."""
    found: dict[str, tuple[int, ...]] = {"convInit.conv.weight": (16, 4, 3, 3, 3)}

    def block(name: str, channels: int) -> None:
        for norm in ("norm1", "norm2"):
            found[f"{name}.{norm}.weight"] = found[f"{name}.{norm}.bias"] = (channels,)
        for conv in ("conv1", "conv2"):
            found[f"{name}.{conv}.conv.weight"] = (channels, channels, 3, 3, 3)

    for i, count in enumerate((1, 2, 2, 4)):
        if i:
            found[f"down_layers.{i}.0.conv.weight"] = (16 << i, 8 << i, 3, 3, 3)
        for j in range(count):
            block(f"down_layers.{i}.{j + 1}", 16 << i)
    for i in range(3):
        block(f"up_layers.{i}.0", 64 >> i)
    for i in range(3):
        found[f"up_samples.{i}.0.conv.weight"] = (64 >> i, 128 >> i, 1, 1, 1)
    found |= {"conv_final.0.weight": (16,), "conv_final.0.bias": (16,)}
    found |= {"conv_final.2.conv.weight": (3, 16, 1, 1, 1), "conv_final.2.conv.bias": (3,)}
    assert list(shapes(create_model("segresnet")).items()) == list(found.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_of_monai(name: str) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    c = CONFIGS[name]
    theirs = nets.SegResNet(
        spatial_dims=c.spatial_dims,
        init_filters=c.init_filters,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        norm=("GROUP", {"num_groups": c.num_groups}),
        blocks_down=c.blocks_down,
        blocks_up=c.blocks_up,
        upsample_mode=c.upsample_mode,
    )
    same_as_published(SegResNet(c), theirs, lambda m, x: m(x), torch.randn(2, 2, *(8, 4, 12)[: c.spatial_dims]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SegResNetConfig(spatial_dims=1), "spatial_dims=1 must be 2 or 3"),
        (lambda: SegResNetConfig(blocks_up=(1, 1)), r"blocks_up=\(1, 1\) must be one fewer than blocks_down=\(1, 2, 2"),
        (lambda: SegResNetConfig(num_groups=3), "num_groups=3 does not divide init_filters=8"),
        (lambda: SegResNetConfig(dropout_prob=1.0), "dropout_prob=1.0 must be at least 0 and less than 1"),
        (lambda: SegResNetConfig(upsample_mode="pixelshuffle"), "upsample_mode='pixelshuffle' must be 'nontrainable'"),
    ],
)
def test_impossible_configurations(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
