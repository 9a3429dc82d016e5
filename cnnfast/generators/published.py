"""What the layouts of several published generators share: their norms by name, and what checkpoints hold beside."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["check_positive", "drop_encoder", "drop_statistics", "norm2d"]


def norm2d(kind: str, channels: int) -> nn.Module:
    """``"batch"``: with factors, summands and running statistics; ``"instance"``: with none of them.

    ValueError for another kind.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels)
    raise ValueError(f"norm={kind!r} must be 'batch' or 'instance'")


def drop_statistics(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Take out of ``state_dict`` the running statistics of ``module``'s instance norms that keep none: PyTorch before
    0.4 saved them, and they were used nowhere."""
    for name, norm in module.named_modules():
        if isinstance(norm, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)) and not norm.track_running_stats:
            for statistic in ("running_mean", "running_var", "num_batches_tracked"):
                state_dict.pop(f"{prefix}{name}.{statistic}", None)


def drop_encoder(state_dict: dict[str, Any], prefix: str) -> None:
    """Take out of ``state_dict`` what an autoencoder's has ahead of the latents."""
    for name in list(state_dict):
        if name.startswith((f"{prefix}encoder.", f"{prefix}quant_conv.")):
            del state_dict[name]


def check_positive(config: Any, *names: str) -> None:
    """ValueError where one of these fields, or a number of a tuple there, is not positive."""
    for name in names:
        value = getattr(config, name)
        if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
            raise ValueError(f"{name}={value} must be positive")
