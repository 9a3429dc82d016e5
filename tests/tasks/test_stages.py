"""stages.py: a style by parts is the style of the whole, in the memory there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cnnfast.generators.style import StyleConfig, StyleTransfer
from cnnfast.messages import CnnfastError
from cnnfast.tasks import stages

SIZES = [(70, 45), (33, 64), (96, 96), (1, 60), (50, 3)]


def network(predicted: bool = False) -> tuple[StyleTransfer, torch.Tensor]:
    """With weights as large as trained ones have; the results fill the range."""
    torch.manual_seed(1)
    made = StyleTransfer(StyleConfig(5, (4, 8, 8), 2, (4, 4), predicted=predicted)).eval().requires_grad_(False)
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            module.weight.normal_(0.5, 0.5)
    return made, torch.rand(5)


def noise(h: int, w: int, dtype: type = np.float32) -> np.ndarray:
    """Uneven, so that parts have other means than the whole."""
    values = np.random.default_rng(0).random((h, w, 3))
    values[: h // 2] *= 0.2
    return values.astype(dtype)


@pytest.mark.parametrize("predicted", [False, True], ids=["learnt", "predicted"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_tiles_are_the_whole(size: tuple[int, int], predicted: bool) -> None:
    """To the rounding of what is kept, in double precision; in single as far as that carries through so many norms."""
    made, style = network(predicted)
    pixels = noise(*size, np.float64)
    for dtype, most in ((torch.float64, 1e-7), (torch.float32, 1e-4)):
        made, style = made.to(dtype), style.to(dtype)
        whole = stages.run(made, style, pixels)
        assert whole.shape == (*size, 3) and whole.dtype == np.float64
        assert min(size) < 8 or whole.std() > 0.05
        for side in (16, 40):
            assert np.abs(stages.run(made, style, pixels, side=side) - whole).max() <= most


@pytest.mark.parametrize("predicted", [False, True], ids=["learnt", "predicted"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (32, 48)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_pictures_of_one_colour(size: tuple[int, int], predicted: bool) -> None:
    """What all pictures come to that differ from one colour by less and less, while that can be computed."""
    made, style = network(predicted)
    flat = np.full((*size, 3), 0.3) + (0.1, 0.3, 0.5)
    found = stages.run(made, style, flat)
    assert found.shape == flat.shape and (found == found[:1, :1]).all()
    eight = stages.run(made, style, (flat * 255).round().astype(np.uint8))
    assert np.abs(eight / 255.0 - found).max() <= 0.5 / 255 + 1e-6
    norms = [layer.norm for layer in made.layers if layer.norm is not None]
    with torch.no_grad():
        for norm in norms[:-1]:  # with no factor nothing is enlarged
            norm.gamma.weight.zero_()
            if predicted:
                norm.gamma.bias.zero_()
        near = flat + 1e-3 * np.random.default_rng(0).random(flat.shape)
        norms[-1].gamma.weight *= 0
        if predicted:
            norms[-1].gamma.bias.zero_()
    np.testing.assert_allclose(found, stages.run(made, style, near), atol=1e-5)


def test_statistics_of_each_tile_would_not_do() -> None:
    """The test above can fail."""
    made, style = network()
    pixels = noise(64, 64)
    parts = [stages.run(made, style, pixels[top : top + 32]) for top in (0, 32)]
    assert np.abs(np.concatenate(parts) - stages.run(made, style, pixels)).max() > 0.05


def test_the_whole_is_the_network() -> None:
    made, style = network()
    pixels = noise(48, 32)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = made(x, style)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(stages.run(made, style, pixels), expected, atol=1e-5)
    with torch.no_grad():
        styled = made.styled(style)
    np.testing.assert_allclose(stages.run(made, style, pixels, styled=styled), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_integers(dtype: type) -> None:
    made, style = network()
    largest = np.iinfo(dtype).max
    pixels = (noise(40, 44) * largest).round().astype(dtype)
    for side in (None, 16):
        found = stages.run(made, style, pixels, side=side)
        exact = stages.run(made, style, pixels.astype(np.float64) / largest)
        assert found.dtype == dtype
        assert np.abs(found / largest - exact).max() <= 0.5 / largest + 1e-4


def test_memory_bounds_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than the whole takes: it goes by parts, whose maps are smaller; far less: said, and nothing is done."""
    made, style = network()
    pixels = noise(256, 256)
    seen: list[int] = []
    forward = nn.Conv2d._conv_forward

    def watched(self: nn.Conv2d, x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(x.numel())
        return forward(self, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", watched)
    plain = StyleTransfer(made.config, sequential=nn.Sequential).eval().requires_grad_(False)
    plain.load_state_dict(made.state_dict())
    whole = stages.run(plain, style, pixels)
    largest = max(seen)
    seen.clear()
    parts: list[float] = []
    found = stages.run(plain, style, pixels, memory=2e6, on_progress=parts.append)
    assert max(seen) * 4 < 2e6 and max(seen) < largest / 2
    assert np.abs(found - whole).max() <= 1e-4
    assert parts == sorted(parts) and parts[-1] == pytest.approx(1) and len(parts) > 20
    with pytest.raises(CnnfastError, match="out of memory: style of 256x256 pixels needs .*--size"):
        stages.run(plain, style, pixels, memory=2e5)


def test_what_does_not_fit_goes_by_parts() -> None:
    """A device that is out of memory on the whole, and once more on the way."""
    made, style = network()
    pixels = noise(96, 64)
    whole = stages.run(made, style, pixels)
    failed: list[int] = []

    class Full(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    found = stages.run(made, style, pixels, styled=Full())
    assert failed and np.abs(found - whole).max() <= 1e-4


def test_what_is_not_finite_is_refused() -> None:
    made, style = network()
    made.layers[-1].norm.beta.weight[0] = float("nan")
    for side in (None, 16):
        with pytest.raises(CnnfastError, match="style in float32 gave values that are not finite"):
            stages.run(made, style, noise(32, 32), side=side)
