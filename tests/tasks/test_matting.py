"""matting.py: a coarse mask becomes the picture's own edges, soft ones without what was behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cnnfast.tasks import matting
from cnnfast.tasks.matting import Matte, composed, matte_of


def scene(h: int = 240, w: int = 320) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(picture (h, w, 3), alpha (h, w, 1), colours of what is in front): an orange disc with a soft edge on green,
    both with some structure."""
    y, x = np.mgrid[:h, :w].astype(np.float32)
    alpha = (0.5 + (h / 3 - np.hypot(y - h / 2, x - w / 2)) / 6).clip(0, 1)[..., None]
    waves = np.stack([np.sin(x / 5), np.sin(y / 7), np.sin((x + y) / 9)], 2) * 0.05
    front, behind = np.array([0.9, 0.5, 0.1]) + waves, np.array([0.1, 0.6, 0.4]) - waves
    return (alpha * front + (1 - alpha) * behind).astype(np.float32), alpha, front.astype(np.float32)


def coarse(alpha: np.ndarray, cell: int = 8) -> torch.Tensor:
    """As a network of few pixels sees it: large cells, two pixels out of place."""
    small = nn.functional.avg_pool2d(torch.from_numpy(alpha[..., 0])[None, None], cell)
    return nn.functional.interpolate(small, alpha.shape[:2], mode="bilinear")[0, 0].roll(2, 1)


def matte(picture: np.ndarray, mask: torch.Tensor, shrink: int = 1) -> Matte:
    small = nn.functional.avg_pool2d(torch.from_numpy(picture).permute(2, 0, 1)[None], shrink)[0]
    mask = nn.functional.avg_pool2d(mask[None, None], shrink)[0, 0]
    return matte_of(small, mask, picture.shape[:2])


@pytest.mark.parametrize("shrink", [1, 2, 4])
def test_edges_follow_the_picture(shrink: int) -> None:
    picture, alpha, _ = scene()
    mask = coarse(alpha)
    found = matte(picture, mask, shrink).alpha(picture)[..., None]
    before = np.abs(mask.numpy()[..., None] - alpha).mean()
    after = np.abs(found - alpha).mean()
    assert after < before / 2
    assert found[0, 0] == 0 and found[120, 160] == 1


def test_colours_at_the_edge_are_those_in_front() -> None:
    """In the picture they are mixed with the green behind it."""
    picture, alpha, front = scene()
    made = matte(picture, torch.from_numpy(alpha[..., 0].copy()))
    found, share = made.rows(picture, 0)
    edge = ((share > 0.1) & (share < 0.9))[..., 0]
    assert edge.sum() > 500
    assert np.abs(found - front)[edge].mean() < np.abs(picture - front)[edge].mean() / 2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_inside_and_outside_nothing_changes(dtype: type) -> None:
    picture, alpha, _ = scene(60, 80)
    rng = np.random.default_rng(0)
    pixels, behind = picture, rng.random(picture.shape)
    if np.dtype(dtype).kind == "u":
        pixels, behind = (a * np.iinfo(dtype).max for a in (pixels, behind))
    pixels, behind = pixels.astype(dtype), behind.astype(dtype)
    made = matte(picture, torch.from_numpy(alpha[..., 0].copy()))
    found = made.alpha(pixels)
    done = composed(pixels, made, behind)
    assert done.dtype == dtype and done.shape == pixels.shape
    if np.dtype(dtype).kind == "u":
        np.testing.assert_array_equal(done[found == 1], pixels[found == 1])
        np.testing.assert_array_equal(done[found == 0], behind[found == 0])
    else:
        np.testing.assert_allclose(done[found == 1], pixels[found == 1], rtol=1e-6)
        np.testing.assert_allclose(done[found == 0], behind[found == 0], rtol=1e-6)
    assert 0.1 < (found == 1).mean() < 0.9 and (found == 0).any()
    transparent = composed(pixels, made)
    assert transparent.shape == (60, 80, 4)
    np.testing.assert_array_equal(transparent[found == 1][:, :3], pixels[found == 1])
    assert (transparent[..., 3][found == 0] == 0).all() and (transparent[..., 3][found > 0.01] > 0).all()


def test_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    picture, alpha, _ = scene(61, 83)
    made = matte(picture[:60, :80].copy(), coarse(alpha[:60, :80]), 4)
    made = Matte(made.maps, (61, 83))
    pixels = (picture * 255).astype(np.uint8)
    whole = composed(pixels, made)
    for count in (1, 83 * 7, 83 * 60):
        monkeypatch.setattr(matting, "_PIXELS", count)
        np.testing.assert_array_equal(composed(pixels, made), whole)


@pytest.mark.parametrize("c", [1, 2, 3, 4])
@pytest.mark.parametrize("b", [None, 1, 2, 3, 4])
def test_channels(c: int, b: int | None) -> None:
    """Alpha of what is in front, of what is behind, grey and colours: every pixel by the rule of Porter and Duff."""
    rng = np.random.default_rng(0)
    pixels = rng.random((24, 20, c))
    behind = None if b is None else rng.random((24, 20, b))
    made = Matte(torch.zeros(10, 6, 5), (24, 20))
    made.maps[3] = torch.linspace(0.3, 0.7, 5)  # alpha from 0.1 to 0.9, whatever the colours
    made.maps[4:7], made.maps[7:] = 0.8, 0.1
    found = composed(pixels, made, behind)
    rgb = np.broadcast_to(pixels[..., : c - (c in (2, 4))], (24, 20, 3))
    colours, alpha = made.rows(rgb, 0)
    alpha = alpha * (pixels[..., -1:] if c in (2, 4) else 1)
    below = 0.0 if behind is None else behind[..., -1:] if b in (2, 4) else np.ones((24, 20, 1))
    total = alpha + (1 - alpha) * below
    if behind is not None:
        under = np.broadcast_to(behind[..., : b - (b in (2, 4))], (24, 20, 3))  # type: ignore[operator]
        colours = (alpha * colours + (1 - alpha) * below * under) / total
    grey = c <= 2 and (b is None or b <= 2)
    has_alpha = b is None or b in (2, 4)
    assert found.shape == (24, 20, (1 if grey else 3) + has_alpha)
    expected = colours.mean(2, keepdims=True) if grey else colours
    np.testing.assert_allclose(found[..., : expected.shape[2]], expected, atol=1e-6)
    if has_alpha:
        np.testing.assert_allclose(found[..., -1:], total, atol=1e-6)


def test_other_colours_in_front() -> None:
    picture, alpha, _ = scene(60, 80)
    made = matte(picture, torch.from_numpy(alpha[..., 0].copy()))
    found = composed(picture, made, behind=picture, front=1 - picture)
    share = made.alpha(picture)[..., None]
    np.testing.assert_allclose(found, share * (1 - picture) + (1 - share) * picture, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)], ids=str)
def test_odd_sizes(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).random((*size, 3), np.float32)
    made = matte(picture, torch.full(size, 0.9))
    assert made.alpha(picture).shape == size
    np.testing.assert_array_equal(made.alpha(picture), 1)
    assert composed(picture, made).shape == (*size, 4)
