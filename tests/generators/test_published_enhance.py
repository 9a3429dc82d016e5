"""Checkpoints of networks that enlarge pictures, as they are published, and the same networks of other packages."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnnfast.generators.rrdb import RRDB, RRDBConfig
from cnnfast.generators.span import SPAN, SPANConfig
from cnnfast.generators.srvgg import SRVGG, SRVGGConfig
from cnnfast.generators.waifu2x import UpConv7, UpConv7Config

from .family import check, disturbed, fused, same_as_published, shapes, unfused

# Real-ESRGAN's names, those of ESRGAN's second release and of its first.
RELEASES = {
    "conv_first": ("conv_first", "model.0"),
    "body.{0}.rdb{1}.conv{2}": ("RRDB_trunk.{0}.RDB{1}.conv{2}", "model.1.sub.{0}.RDB{1}.conv{2}.0"),
    "conv_body": ("trunk_conv", "model.1.sub.2"),
    "conv_up1": ("upconv1", "model.3"),
    "conv_up2": ("upconv2", "model.6"),
    "conv_hr": ("HRconv", "model.8"),
    "conv_last": ("conv_last", "model.10"),
}


def as_released(state: dict[str, Tensor], release: int) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        layer, what = name.rsplit(".", 1)
        numbers = re.findall(r"\d+", layer) if layer.startswith("body") else []
        key = "body.{0}.rdb{1}.conv{2}" if numbers else layer
        found[f"{RELEASES[key][release].format(*numbers)}.{what}"] = value
    return found


@pytest.mark.parametrize("release", [0, 1], ids=["second", "first"])
def test_esrgan_s_former_names(release: int) -> None:
    config = RRDBConfig(blocks=2, features=4, growth=3)
    source = disturbed(RRDB(config), 1).state_dict()
    state = as_released(source, release)
    assert len(state) == len(source) and not set(state) & {n for n in source if n.startswith("body")}
    given = list(state)
    model = RRDB(config)
    model.load_state_dict(state)
    assert list(state) == given
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())
    within = nn.ModuleDict({"model": RRDB(config)})  # whose own name is one of the former ones
    within.load_state_dict({f"model.{name}": value for name, value in state.items()})
    assert all(torch.equal(value, source[name]) for name, value in within["model"].state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected key.*model.7.weight"):
        model.load_state_dict({**state, "model.7.weight": torch.zeros(1)})


def rrdb(state: dict[str, Tensor], x: Tensor, training: bool) -> Tensor:
    """Of two blocks, for pictures of which 2x2 pixels are taken for one."""

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def dense(name: str, x: Tensor) -> Tensor:
        maps = [x]
        for k in range(1, 5):
            maps.append(F.leaky_relu(conv(f"{name}.conv{k}", torch.cat(maps, 1)), 0.2))
        return x + 0.2 * conv(f"{name}.conv5", torch.cat(maps, 1))

    # Channel c, row i and column j of a 2x2 pixel is channel 4*c + 2*i + j.
    x = torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 2).flatten(1, 2)
    y = first = conv("conv_first", x)
    for b in range(2):
        z = y
        for r in (1, 2, 3):
            z = dense(f"body.{b}.rdb{r}", z)
        y = y + 0.2 * z
    y = first + conv("conv_body", y)
    for name in ("conv_up1", "conv_up2"):
        y = F.leaky_relu(conv(name, y.repeat_interleave(2, 2).repeat_interleave(2, 3)), 0.2)
    return conv("conv_last", F.leaky_relu(conv("conv_hr", y), 0.2))


def test_real_esrgan_s_x2() -> None:
    config = RRDBConfig(blocks=2, features=4, growth=3, unshuffle=2)
    x = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    model = check(lambda s: RRDB(config, sequential=s), rrdb, x)
    assert config.scale == 2 and model(x).shape == (2, 3, 16, 24)
    assert shapes(model)["conv_first.weight"] == (4, 12, 3, 3)
    assert fused(model) == {
        "Conv2d + LeakyReLU": 2 * 3 * 4 + 1,
        "Conv2d": 2 + 2 * 3 + 1,
        "Upsample + Conv2d + LeakyReLU": 2,
    }
    assert unfused(model) == {}
    with pytest.raises(ValueError, match="unshuffle=3 must be 1, 2 or 4"):
        RRDBConfig(unshuffle=3)


def test_upconv_7_names_are_nunif_s() -> None:
    """``waifu2x.upconv_7``'s, written out."""
    widths = (3, 16, 32, 64, 128, 128, 256)
    found: dict[str, tuple[int, ...]] = {}
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        found |= {f"net.{2 * i}.weight": (b, a, 3, 3), f"net.{2 * i}.bias": (b,)}
    found |= {"net.12.weight": (256, 3, 4, 4), "net.12.bias": (3,)}
    assert list(shapes(UpConv7()).items()) == list(found.items())


def test_upconv_7() -> None:
    def reference(state: dict[str, Tensor], x: Tensor, training: bool) -> Tensor:
        for i in range(0, 12, 2):
            x = F.leaky_relu(F.conv2d(x, state[f"net.{i}.weight"], state[f"net.{i}.bias"]), 0.1)
        return F.conv_transpose2d(x, state["net.12.weight"], state["net.12.bias"], 2, 3)

    x = torch.rand(2, 3, 20, 18, generator=torch.Generator().manual_seed(1))
    model = check(lambda s: UpConv7(UpConv7Config(4), sequential=s), reference, x)
    assert fused(model) == {"Conv2d + LeakyReLU": 6, "ConvTranspose2d": 1} and unfused(model) == {}


def test_of_spandrel() -> None:
    """What its loader makes of our checkpoints: the networks of Real-ESRGAN's releases, with and without its
    wrapping."""
    spandrel = pytest.importorskip("spandrel")
    x = torch.rand(2, 3, 16, 12)
    for ours, wrapped in (
        (RRDB(RRDBConfig(blocks=2, features=8)), "params_ema"),
        (RRDB(RRDBConfig(blocks=2, features=8, unshuffle=2)), None),
        (SRVGG(SRVGGConfig(scale=2, features=8, convs=3)), "params"),
    ):
        state = ours.eval().state_dict()
        theirs = spandrel.ModelLoader().load_from_state_dict({wrapped: dict(state)} if wrapped else dict(state))
        with torch.inference_mode():
            torch.testing.assert_close(ours(x), theirs.model(x), rtol=1e-5, atol=1e-5)
        again = type(ours)(ours.config)
        again.load_state_dict(theirs.model.state_dict(), strict=True)  # of RRDB, the first release's names
        assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    srvgg = SRVGG(SRVGGConfig(scale=2, features=8, convs=3))
    arch = pytest.importorskip("spandrel.architectures.Compact")
    theirs = arch.Compact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=3, upscale=2)
    same_as_published(srvgg, theirs, lambda m, x: m(x), x)


def test_span_of_spandrel() -> None:
    """Of its names ours are those that exist when it is deployed."""
    arch = pytest.importorskip("spandrel.architectures.SPAN")
    theirs = arch.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2).eval()
    x = torch.rand(2, 3, 12, 16)
    with torch.inference_mode():
        expected = theirs(x)  # which makes the deployed weights
        ours = SPAN(SPANConfig(scale=2, features=8)).eval()
        names = ours.state_dict()
        ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if name in names})
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
