"""pixels.py: pictures made to fit others."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import ImageCms

from cnnfast.tasks import pixels
from cnnfast.tasks.pictures import Picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_other_sizes(dtype: type) -> None:
    top = 1 if dtype is np.float32 else np.iinfo(dtype).max
    flat = np.full((9, 12, 2), top, dtype)
    flat[..., 1] = top // 5
    for size in ((3, 4), (20, 30), (1, 1)):
        found = pixels.resized(flat, size)
        assert found.shape == (*size, 2) and found.dtype == dtype
        np.testing.assert_allclose(found, np.broadcast_to(flat[:1, :1], found.shape), rtol=1e-6)


def swapped(profile: bytes) -> bytes:
    """What is red in this one is green."""
    return profile.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)


def test_other_profiles() -> None:
    given = np.full((2, 3, 4), 100, np.uint8)
    given[..., :3] = (200, 50, 50)
    picture = Picture(given, {"icc_profile": swapped(SRGB), "dpi": (72, 72)})
    for target in (None, SRGB):
        found = pixels.in_profile(picture, target)
        assert np.abs(found.pixels[0, 0].astype(int) - (50, 200, 50, 100)).max() <= 3
        assert found.info == {"icc_profile": target, "dpi": (72, 72)}
    assert pixels.in_profile(picture, swapped(SRGB)) is picture
    back = pixels.in_profile(pixels.in_profile(picture, None), swapped(SRGB))
    assert np.abs(back.pixels.astype(int) - given).max() <= 4
    assert pixels.in_profile(picture, b"no profile") is picture
    deep = Picture(given.astype(np.uint16), picture.info)
    assert pixels.in_profile(deep, None) is deep


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (7, 90), (1, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_what_covers(size: tuple[int, int], dtype: type) -> None:
    """The middle, in its proportions: a picture that is its own coordinates shows which part."""
    y, x = np.mgrid[:60, :80]
    given = np.stack([y * 3, x * 3, 0 * x], 2).astype(np.uint8)
    found = pixels.covering(Picture(given), np.empty((*size, 4), dtype))
    assert found.shape == (*size, 3) and found.dtype == dtype
    rows, columns = (found[..., i] / (1 if dtype is np.float64 else np.iinfo(dtype).max) * 255 / 3 for i in (0, 1))
    scale = max(size[0] / 60, size[1] / 80)
    for values, n, m in ((rows[:, 0], size[0], 60), (columns[0], size[1], 80)):
        expected = (np.arange(n) + 0.5 - n / 2) / scale + m / 2 - 0.5
        assert np.abs(values - expected).max() <= 1.5


def test_what_is_hidden_does_not_come_in() -> None:
    """A white disc with alpha, black beyond it: enlarged, its rim stays white."""
    y, x = np.mgrid[:20, :20]
    alpha = np.where((x - 9.5) ** 2 + (y - 9.5) ** 2 < 60, 255, 0).astype(np.uint8)
    given = np.dstack([alpha, alpha, alpha, alpha])
    found = pixels.covering(Picture(given), np.empty((50, 50, 3), np.uint8))
    assert found.shape == (50, 50, 4) and (found[..., :3] == 255).all() and 0 < (found[..., 3] > 0).mean() < 0.8


def test_dtypes() -> None:
    values = np.array([[[0, 1, 128, 255]]], np.uint8)
    deep = pixels.as_dtype(values, np.dtype(np.uint16))
    np.testing.assert_array_equal(deep, values.astype(int) * 257)
    np.testing.assert_array_equal(pixels.as_dtype(deep, np.dtype(np.uint8)), values)
    floats = pixels.as_dtype(values, np.dtype(np.float32))
    np.testing.assert_allclose(floats, values / 255, rtol=1e-6)
    for given in (values, deep, floats):
        np.testing.assert_array_equal(pixels.in_8_bits(given), values)


def test_transparency_on_white() -> None:
    picture = Picture(np.array([[[100, 0], [100, 255], [100, 102]]], np.uint8))
    np.testing.assert_array_equal(pixels.on_white(picture).pixels[..., 0], [[255, 100, 193]])
    assert pixels.on_white(Picture(picture.pixels[..., :1])).pixels.shape == (1, 3, 1)
