"""Decoders of latent diffusion: diffusers' names, and the same pictures and gradients as in plain functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cnnfast.generators import create_model
from cnnfast.generators.taesd import TinyDecoder, TinyDecoderConfig
from cnnfast.generators.vae import VAEDecoder, VAEDecoderConfig

from .family import check, disturbed, fused, same_as_published, shapes, unfused

SMALL = VAEDecoderConfig(block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=2)
TINY = TinyDecoderConfig(width=8, blocks=(2, 1, 1))


def conv(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


# --- latent diffusion -------------------------------------------------------------------------------------------------


def vae(config: VAEDecoderConfig, state: Mapping[str, Tensor], z: Tensor, training: bool) -> Tensor:
    def norm(name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, config.norm_num_groups, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def block(name: str, x: Tensor) -> Tensor:
        y = conv(state, f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        y = conv(state, f"{name}.conv2", F.silu(norm(f"{name}.norm2", y)))
        return (conv(state, f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in state else x) + y

    def attention(name: str, x: Tensor) -> Tensor:
        rows = norm(f"{name}.group_norm", x).flatten(2).mT
        q, k, v = (F.linear(rows, state[f"{name}.to_{i}.weight"], state[f"{name}.to_{i}.bias"]) for i in "qkv")
        found = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        found = F.linear(found, state[f"{name}.to_out.0.weight"], state[f"{name}.to_out.0.bias"])
        return x + found.mT.reshape(x.shape)

    x = conv(state, "post_quant_conv", z) if config.use_post_quant_conv else z
    x = block("decoder.mid_block.resnets.0", conv(state, "decoder.conv_in", x))
    if config.mid_block_add_attention:
        x = attention("decoder.mid_block.attentions.0", x)
    x = block("decoder.mid_block.resnets.1", x)
    levels = len(config.block_out_channels)
    for i in range(levels):
        for j in range(config.layers_per_block + 1):
            x = block(f"decoder.up_blocks.{i}.resnets.{j}", x)
        if i < levels - 1:
            x = conv(state, f"decoder.up_blocks.{i}.upsamplers.0.conv", doubled(x))
    return conv(state, "decoder.conv_out", F.silu(norm("decoder.conv_norm_out", x)))


@pytest.mark.parametrize("bare", [False, True], ids=["whole", "bare"])
def test_vae(bare: bool) -> None:
    """``bare``: without the attention and the convolution of the latents, as some have it."""
    config = SMALL
    if bare:
        config = VAEDecoderConfig(2, 1, (6,), 2, 3, mid_block_add_attention=False, use_post_quant_conv=False)
    z = torch.randn(2, config.latent_channels, 6, 5, generator=torch.Generator().manual_seed(1))
    model = check(lambda s: VAEDecoder(config, sequential=s), partial(vae, config), z)
    with torch.inference_mode():
        assert model(z).shape == (2, config.out_channels, 6 * config.scale, 5 * config.scale)
    blocks = 2 + len(config.block_out_channels) * (config.layers_per_block + 1)
    expected = {"Conv2d + GroupNorm + SiLU": blocks, "Conv2d": blocks + (2 if bare else 4)}
    if not bare:
        expected["Upsample + Conv2d"] = 2
    assert fused(model) == expected
    # A block starts with a norm. A shortcut that changes no channels is none.
    shortcuts = blocks - sum(name.endswith("conv_shortcut.weight") for name in model.state_dict())
    assert unfused(model) == {"GroupNorm": blocks + 1, "SiLU": blocks + 1, "Identity": shortcuts + bare}


def test_vae_names_are_diffusers() -> None:
    """Stable Diffusion's, written out."""
    found = {}

    def add(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    def block(name: str, before: int, after: int) -> None:
        add(f"{name}.norm1", before)
        add(f"{name}.conv1", after, before, 3, 3)
        add(f"{name}.norm2", after)
        add(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            add(f"{name}.conv_shortcut", after, before, 1, 1)

    add("decoder.conv_in", 512, 4, 3, 3)
    for i, (before, after) in enumerate([(512, 512), (512, 512), (512, 256), (256, 128)]):
        for j in range(3):
            block(f"decoder.up_blocks.{i}.resnets.{j}", before if j == 0 else after, after)
        if i < 3:
            add(f"decoder.up_blocks.{i}.upsamplers.0.conv", after, after, 3, 3)
    add("decoder.mid_block.attentions.0.group_norm", 512)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        add(f"decoder.mid_block.attentions.0.{name}", 512, 512)
    block("decoder.mid_block.resnets.0", 512, 512)
    block("decoder.mid_block.resnets.1", 512, 512)
    add("decoder.conv_norm_out", 128)
    add("decoder.conv_out", 3, 128, 3, 3)
    add("post_quant_conv", 4, 4, 1, 1)
    with torch.device("meta"):
        assert list(shapes(create_model("vae_decoder")).items()) == list(found.items())


def test_checkpoints_of_whole_autoencoders() -> None:
    """The encoder's part is left out, the attention's former names are known; anything else is an error."""
    old = disturbed(VAEDecoder(SMALL), 1)
    state = {f"first.{name}": value for name, value in old.state_dict().items()}
    for now, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        for what in ("weight", "bias"):
            name = "first.decoder.mid_block.attentions.0."
            state[f"{name}{before}.{what}"] = state.pop(f"{name}{now}.{what}")
    state |= {"first.encoder.conv_in.weight": torch.zeros(1), "first.quant_conv.bias": torch.zeros(1)}
    model = torch.nn.ModuleDict({"first": VAEDecoder(SMALL)})
    given = list(state)
    model.load_state_dict(state)
    assert list(state) == given
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in model["first"].state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected key.*first.discriminator"):
        model.load_state_dict({**state, "first.discriminator.weight": torch.zeros(1)})

    tiny = TinyDecoder(TINY)
    tiny.load_state_dict({**tiny.state_dict(), "encoder.layers.0.weight": torch.zeros(1)})


def test_vae_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    for config in (SMALL, VAEDecoderConfig(3, 2, (4, 6), 2, 2, use_post_quant_conv=False)):
        whole = diffusers.AutoencoderKL(
            3,
            config.out_channels,
            down_block_types=("DownEncoderBlock2D",) * len(config.block_out_channels),
            up_block_types=("UpDecoderBlock2D",) * len(config.block_out_channels),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            use_post_quant_conv=config.use_post_quant_conv,
        )
        VAEDecoder(config).load_state_dict(whole.state_dict(), strict=True)
        ours, theirs = VAEDecoder(config), torch.nn.Module()
        theirs.decoder = whole.decoder
        if config.use_post_quant_conv:
            theirs.post_quant_conv = whole.post_quant_conv
        z = torch.randn(2, config.latent_channels, 8, 6)
        same_as_published(ours, theirs, lambda m, z, whole=whole: whole.decode(z).sample, z)


# --- the tiny one -----------------------------------------------------------------------------------------------------


def tiny(config: TinyDecoderConfig, state: Mapping[str, Tensor], z: Tensor, training: bool) -> Tensor:
    x = F.relu(conv(state, "decoder.layers.0", 3 * torch.tanh(z / 3)))
    at = 2
    for i, count in enumerate(config.blocks):
        if i:
            x, at = conv(state, f"decoder.layers.{at + 1}", doubled(x)), at + 2
        for _ in range(count):
            y = x
            for k in (0, 2, 4):
                y = conv(state, f"decoder.layers.{at}.conv.{k}", F.relu(y) if k else y)
            x, at = F.relu(x + y), at + 1
    return 2 * conv(state, f"decoder.layers.{at}", x) - 1


def test_tiny() -> None:
    z = 4 * torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    model = check(lambda s: TinyDecoder(TINY, sequential=s), partial(tiny, TINY), z)
    with torch.inference_mode():
        assert model(z).shape == (2, 3, 24, 20)
    assert fused(model) == {"Conv2d + ReLU": 1 + 2 * 4, "Conv2d": 4 + 1, "Upsample + Conv2d": 2}
    assert unfused(model) == {"_Block": 4}


def test_tiny_names_are_diffusers() -> None:
    """``taesd``'s, written out."""
    found = {"decoder.layers.0.weight": (64, 4, 3, 3), "decoder.layers.0.bias": (64,)}
    at = 2
    for blocks in (3, 3, 3, 1):
        for n in range(at, at + blocks):
            for k in (0, 2, 4):
                found[f"decoder.layers.{n}.conv.{k}.weight"] = (64, 64, 3, 3)
                found[f"decoder.layers.{n}.conv.{k}.bias"] = (64,)
        at += blocks + 1
        if blocks == 3:
            found[f"decoder.layers.{at}.weight"] = (64, 64, 3, 3)
            at += 1
    found["decoder.layers.18.weight"], found["decoder.layers.18.bias"] = (3, 64, 3, 3), (3,)
    assert list(shapes(create_model("taesd_decoder")).items()) == list(found.items())


def test_tiny_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    n = len(TINY.blocks)
    whole = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(TINY.width,) * n,
        decoder_block_out_channels=(TINY.width,) * n,
        num_encoder_blocks=(1,) * n,
        num_decoder_blocks=TINY.blocks,
    )
    TinyDecoder(TINY).load_state_dict(whole.state_dict(), strict=True)
    theirs = torch.nn.Module()
    theirs.decoder = whole.decoder
    z = torch.randn(2, 4, 8, 6)
    same_as_published(TinyDecoder(TINY), theirs, lambda m, z: whole.decode(z).sample, z)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: VAEDecoderConfig(norm_num_groups=3), "norm_num_groups=3 does not divide 128 channels"),
        (lambda: VAEDecoderConfig(block_out_channels=()), r"block_out_channels=\(\) must be positive"),
        (lambda: VAEDecoderConfig(latent_channels=0), "latent_channels=0 must be positive"),
        (lambda: TinyDecoderConfig(blocks=(1, 0)), r"blocks=\(1, 0\) must be positive"),
    ],
)
def test_impossible_configurations(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
