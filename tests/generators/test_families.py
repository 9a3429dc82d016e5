"""What holds for every family that takes published checkpoints: dtypes, memory formats, copies, and `example_input`."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from cnnfast.generators import create_model, list_models

from .family import containers, disturbed

SMALL: dict[str, dict[str, Any]] = {
    "dcgan": {"nz": 4, "ngf": 4, "image_size": 16},
    "pix2pix": {"num_downs": 5, "ngf": 4},
    "cyclegan": {"ngf": 4, "n_blocks": 1},
    "pix2pixhd": {"ngf": 4, "n_blocks": 1, "n_downsampling": 2},
    "pix2pixhd_local": {"input_nc": 3, "ngf": 4, "n_blocks": 1, "n_downsampling": 2, "n_blocks_local": 1},
    "fast_style": {"width": 4, "blocks": 1},
    "vae_decoder": {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2},
    "taesd_decoder": {"width": 8, "blocks": (1, 1)},
    "hifigan": {
        "num_mels": 4,
        "upsample_rates": (2, 2),
        "upsample_kernel_sizes": (4, 4),
        "upsample_initial_channel": 16,
        "resblock_kernel_sizes": (3,),
        "resblock_dilation_sizes": ((1, 2),),
    },
    "segresnet": {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)},
    "stylegan2": {"size": 16, "style_dim": 8, "n_mlp": 2, "channel_base": 64, "channel_max": 8},
}


def made(name: str, container: type[nn.Sequential] | None = None) -> nn.Module:
    model = create_model(name, **SMALL[name], **({} if container is None else {"sequential": container}))
    return disturbed(model).eval()


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    ours, plain = made(name), made(name, nn.Sequential)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def small_input(model: nn.Module) -> Tensor:
    """Of `example_input`, as much as is quick."""
    x = model.example_input(2)  # type: ignore[operator]
    return x[(slice(None), slice(None), *(slice(8 if x.dim() == 5 else 32) for _ in x.shape[2:]))]


def run(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)  # of StyleGAN2's noise
    return model(x)


def test_every_family_is_here() -> None:
    assert list(SMALL) == list_models(pretrained=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("name", SMALL)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """As plain PyTorch: in bfloat16 as far from float64 as it, twice at most."""
    ours, plain = (model.to(dtype) for model in pair(name))
    x = small_input(ours)
    assert x.dtype == dtype and small_input(plain).device == x.device
    with torch.inference_mode():
        expected, results = run(plain, x), [run(ours, x) for _ in range(3)]
        if dtype == torch.float64:
            for result in results:
                torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
            return
        assert all(result.dtype == dtype for result in results)
        if name == "stylegan2":  # whose noise is not the same in another dtype
            x = (x, ours.fixed_noise)
            expected, results = plain(*x), [ours(*x)]
            exact = copy.deepcopy(plain).double()(x[0].double(), [noise.double() for noise in x[1]])
        else:
            exact = copy.deepcopy(plain).double()(x.double())
    scale = (expected.double() - exact).square().mean().sqrt()
    for result in results:
        assert (result.double() - exact).square().mean().sqrt() <= 2 * scale + 1e-3 * exact.abs().max()


@pytest.mark.parametrize("name", SMALL)
def test_memory_formats(name: str) -> None:
    ours, plain = pair(name)
    x = small_input(ours)
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    for model in (ours, plain):
        assert cnnfast.channels_last(model) is model
    for given in (x, x.contiguous(memory_format=form)):
        with torch.inference_mode():
            expected, result = run(plain, given), run(ours, given)
        assert result.stride() == expected.stride()
        assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", SMALL)
def test_copies(name: str) -> None:
    """A deep copy and one through a file are of one piece: a changed weight is seen by the steps in tuples, too."""
    ours, _ = pair(name)
    x = small_input(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)

    def packed(module: nn.Module) -> Tensor:
        """Weights are packed when they are met again, after which sums are in another order."""
        return [run(module, x) for _ in range(3)][-1]

    with torch.inference_mode():
        expected = packed(ours)
        for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
            torch.testing.assert_close(packed(other), expected, rtol=1e-5, atol=1e-6)
            mine = {id(p) for p in other.parameters()} | {id(b) for b in other.buffers()}
            seen = [t for c in containers(other) for t in (*c.parameters(), *c.buffers())]
            assert all(id(t) in mine for t in seen) and not mine & {id(p) for p in ours.parameters()}
            for p in other.parameters():
                p.zero_()
            assert not torch.allclose(run(other, x), expected)
            torch.testing.assert_close(packed(ours), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_no_pictures(name: str) -> None:
    ours, plain = pair(name)
    x = small_input(ours)[:0]
    with torch.inference_mode():
        try:
            expected = plain(x)
        except (RuntimeError, ValueError, IndexError) as error:
            with pytest.raises(type(error)):
                ours(x)
        else:
            assert ours(x).shape == expected.shape
