"""tiles.py: tiles give what the whole picture gives, whatever the network needs around them, in the memory there is."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cnnfast.generators.rrdb import RRDB, RRDBConfig
from cnnfast.generators.span import SPAN, SPANConfig
from cnnfast.generators.srvgg import SRVGG, SRVGGConfig
from cnnfast.generators.waifu2x import CUNet, CUNetConfig, UpConv7, UpConv7Config
from cnnfast.messages import CnnfastError
from cnnfast.tasks import tiles
from cnnfast.tasks.tiles import ImageJob, Means
from cnnfast.tasks.user_models import reach


class Lively(nn.Module):
    """A network with weights as large as trained ones have, its results between 0 and 1 (nothing is clipped)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval()
        with torch.no_grad():
            for name, layer in network.named_modules():
                if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                    nn.init.kaiming_normal_(layer.weight)
                    layer.weight *= 10 if "seblock" in name else 0.01 if name == "conv_1.eval_conv" else 1

    def forward(self, *args: object) -> Tensor:
        return torch.sigmoid(self.network(*args))


def job(name: str) -> ImageJob:
    torch.manual_seed(1)
    if name == "span":
        return ImageJob(name, Lively(SPAN(SPANConfig(2, 8))), halo=21, scale=2)
    if name == "srvgg":
        return ImageJob(name, Lively(SRVGG(SRVGGConfig(3, 8, 4))), halo=6, scale=3)
    if name == "rrdb":
        return ImageJob(name, Lively(RRDB(RRDBConfig(1, 8, 4))), halo=20, scale=4)
    if name == "upconv7":
        return ImageJob(name, Lively(UpConv7(UpConv7Config(4))), halo=7, scale=2, pads=False)
    if name == "cunet":
        network = CUNet(CUNetConfig(16))
        means = Means(network.strides, network.mean_map)
        return ImageJob(name, Lively(network), halo=28, pads=False, multiple=4, means=means)
    # Stride 4 inside, and it pads: tiles must begin at multiples, the picture's end is padded to one.
    strided = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 4))
    return ImageJob(name, Lively(strided), halo=5, multiple=4)


JOBS = ["span", "srvgg", "rrdb", "upconv7", "cunet", "strided"]
SIZES = [(70, 45), (33, 64), (1, 1), (1, 50), (50, 3)]


def noise(h: int, w: int, c: int = 3) -> np.ndarray:
    return np.random.default_rng(0).random((h, w, c), dtype=np.float32)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_tiles_are_the_whole(name: str, size: tuple[int, int]) -> None:
    one, pixels = job(name), noise(*size)
    whole = tiles.run(one, pixels, side=1000)
    assert whole.shape == (size[0] * one.scale, size[1] * one.scale, 3) and whole.dtype == np.float32
    assert 0.01 < ((whole > 0) & (whole < 1)).mean()  # something is to be seen
    for side in (16, 24):
        assert np.abs(tiles.run(one, pixels, side=side) - whole).max() <= 1e-5


@pytest.mark.parametrize("name", ["srvgg", "cunet"])
def test_with_less_around_them_they_are_not(name: str) -> None:
    """The test above can fail: half the halo, or means of each tile's own."""
    one = job(name)
    pixels = noise(70, 45)
    pixels[40:] *= 0.1
    whole = tiles.run(one, pixels, side=1000)
    less = {"srvgg": {"halo": 2}, "cunet": {"means": None}}[name]
    network = one.network
    wrong = ImageJob(**{**vars(one), **less, "network": network if name == "srvgg" else lambda x: network(x)})
    assert np.abs(tiles.run(wrong, pixels, side=16) - whole).max() > 1e-4


def test_the_whole_is_the_network() -> None:
    pixels = noise(40, 30)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for name, around in (("span", 0), ("upconv7", 7)):
        one = job(name)
        with torch.inference_mode():
            expected = one.network(nn.functional.pad(x, (around,) * 4, mode="replicate")).clamp(0, 1)
        result = torch.from_numpy(tiles.run(one, pixels)).permute(2, 0, 1)[None]
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_values_and_channels(dtype: type, channels: int) -> None:
    """Nearest neighbours by a network: to the bit what NumPy gives. Grey goes through as three equal channels."""
    double = ImageJob("double", nn.Upsample(scale_factor=2), halo=1, scale=2)
    pixels = noise(9, 13, channels)
    if np.dtype(dtype).kind == "u":
        pixels = (pixels * np.iinfo(dtype).max).round().astype(dtype)
        pixels[0, 0], pixels[0, 1] = 0, np.iinfo(dtype).max
    result = tiles.run(double, pixels, side=16)
    assert result.dtype == dtype
    np.testing.assert_allclose(result, pixels.repeat(2, 0).repeat(2, 1), rtol=1e-6 if dtype is np.float32 else 0)


def test_results_are_clipped_and_rounded() -> None:
    job = ImageJob("add", lambda x: x + 0.5, halo=0)
    result = tiles.run(job, np.array([[[0], [10], [200]]], np.uint8))
    np.testing.assert_array_equal(result[..., 0], [[128, 138, 255]])  # 127.5 to even
    assert tiles.run(ImageJob("half", lambda x: x * 2 - 1, halo=0), np.zeros((2, 2, 3), np.uint16)).max() == 0


class Counting(nn.Module):
    """Doubles; remembers the sizes of tiles, and has no room for those above ``room`` pixels."""

    def __init__(self, room: int = 10**9, error: str = "DefaultCPUAllocator: can't allocate memory") -> None:
        super().__init__()
        self.room, self.error, self.seen = room, error, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[-2] * x.shape[-1])
        if self.seen[-1] > self.room:
            raise RuntimeError(self.error)
        return x


def test_memory_bounds_the_tiles() -> None:
    pixels = np.zeros((300, 200, 3), np.uint8)
    for memory in (2e5, 1e6, 1e7):
        network = Counting()
        tiles.run(ImageJob("count", network, halo=4, floats=10), pixels, memory=memory)
        assert max(network.seen) * 10 * 4 <= memory
        assert sum(network.seen) >= 300 * 200
    assert max(network.seen) == 300 * 200


def test_a_tile_that_does_not_fit_is_cut() -> None:
    pixels = (noise(130, 70) * 255).astype(np.uint8)
    network = Counting(room=40 * 40)
    parts: list[float] = []
    result = tiles.run(ImageJob("count", network, halo=2), pixels, side=120, on_progress=parts.append)
    np.testing.assert_array_equal(result, pixels)
    assert network.seen[0] > 40 * 40 and sum(s > 40 * 40 for s in network.seen) <= 3  # those after it are small at once
    assert parts == sorted(parts) and parts[-1] == pytest.approx(1)


def test_means_are_right_when_a_tile_was_cut_on_the_way() -> None:
    one = job("cunet")
    pixels = noise(90, 60)
    whole = tiles.run(one, pixels, side=1000)
    failed: list[int] = []

    def map_of(x: Tensor, means: object) -> Tensor:
        if len(means) == 1 and not failed and x.shape[-1] > 80:  # type: ignore[arg-type]
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return one.means.map(x, means)  # type: ignore[union-attr, arg-type]

    assert one.means is not None
    cut = ImageJob(**{**vars(one), "means": Means(one.means.strides, map_of)})
    assert np.abs(tiles.run(cut, pixels, side=48) - whole).max() <= 1e-5
    assert failed


def test_where_nothing_fits() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(CnnfastError, match="out of memory: count does not fit on cpu even by tiles of 16x16 pixels"):
        tiles.run(ImageJob("count", Counting(room=0), halo=2), pixels)
    with pytest.raises(CnnfastError, match="out of memory: count takes whole pictures only"):
        tiles.run(ImageJob("count", Counting(room=0), halo=2, tiled=False), pixels, side=16)
    with pytest.raises(RuntimeError, match="something else"):
        tiles.run(ImageJob("count", Counting(room=0, error="something else"), halo=2), pixels)


def test_what_is_not_finite_is_refused() -> None:
    broken = ImageJob("broken", lambda x: x / 0, halo=0)
    with pytest.raises(CnnfastError, match="broken in float32 gave values that are not finite"):
        tiles.run(broken, np.zeros((4, 4, 3), np.uint8))


def test_jobs_and_pictures_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="halo must not be negative"):
        ImageJob("a", Counting(), halo=-1)
    with pytest.raises(ValueError, match="twice halo=3 does not divide by multiple=4"):
        ImageJob("a", Counting(), halo=3, multiple=4, pads=False)
    for shape in ((4, 4), (4, 4, 2), (0, 4, 3)):
        with pytest.raises(ValueError, match=re.escape(f"expected pixels (H, W, 1 or 3), got {shape}")):
            tiles.run(ImageJob("a", Counting(), halo=0), np.zeros(shape, np.uint8))


def test_reach() -> None:
    assert reach(nn.Conv2d(3, 3, 7, padding=3), share=0) == 3
    assert reach(nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))), share=0) == 5
    assert reach(nn.Conv2d(1, 1, 1), channels=1) == 0
    assert reach(nn.Conv2d(3, 3, 151, padding=75)) == 64  # further than is looked
    with torch.no_grad():
        faint = nn.Conv2d(3, 3, 7, padding=3)
        faint.weight[..., 0, :] *= 1e-9
        faint.weight[..., -1, :] *= 1e-9
        faint.weight[..., :, 0] *= 1e-9
        faint.weight[..., :, -1] *= 1e-9
    assert (reach(faint, share=0), reach(faint, share=1e-6)) == (3, 2)
