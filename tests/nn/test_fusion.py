"""Which modules become one step, and why others don't."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnfast
from cnnfast.activations import Activation
from cnnfast.nn.fusion import FusedStep, Unfused, plan_modules
from cnnfast.nn.fusion_conv import MAX_SCALE
from cnnfast.nn.fusion_norm import NormRule
from cnnfast.nn.modules import read
from cnnfast.norms import Norm

from .test_sequential import check, randomized


def plan(*modules: nn.Module, train: bool = False) -> list[FusedStep | Unfused]:
    for m in modules:
        m.train(train)
    return list(plan_modules(modules))


def ct(c_in: int = 4, c_out: int = 6, k: int = 4, **kwargs: object) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(c_in, c_out, k, **{"stride": 2, "padding": 1, **kwargs})  # type: ignore[arg-type]


def up(**kwargs: object) -> nn.Upsample:
    return nn.Upsample(**(kwargs or {"scale_factor": 2}))  # type: ignore[arg-type]


# name -> (modules, the slots of the one step that is expected, its activation)
FUSED: dict[str, tuple[list[nn.Module], int, Activation]] = {
    "convolution": ([ct()], 1, Activation()),
    "convolution-norm": ([ct(), nn.BatchNorm2d(6)], 2, Activation()),
    "convolution-activation": ([ct(), nn.Tanh()], 2, Activation("tanh")),
    "relu": ([ct(), nn.BatchNorm2d(6), nn.ReLU(True)], 3, Activation("relu")),
    "relu6": ([ct(), nn.ReLU6()], 2, Activation("hardtanh", (0.0, 6.0))),
    "leaky-relu": ([ct(), nn.LeakyReLU(0.2)], 2, Activation("leaky_relu", (0.2,))),
    "elu": ([ct(), nn.ELU(2)], 2, Activation("elu", (2.0,))),
    "silu": ([ct(), nn.SiLU()], 2, Activation("silu")),
    "mish": ([ct(), nn.BatchNorm2d(6), nn.Mish()], 3, Activation("mish")),
    "gelu": ([ct(), nn.GELU()], 2, Activation("gelu")),
    "gelu-tanh": ([ct(), nn.GELU("tanh")], 2, Activation("gelu_tanh")),
    "sigmoid": ([ct(), nn.Sigmoid()], 2, Activation("sigmoid")),
    "hardtanh": ([ct(), nn.Hardtanh(-2, 3)], 2, Activation("hardtanh", (-2.0, 3.0))),
    "prelu": ([ct(), nn.PReLU()], 2, Activation("prelu")),
    "prelu-per-channel": ([ct(), nn.PReLU(6)], 2, Activation("prelu")),
    "norm-without-affine": ([ct(), nn.BatchNorm2d(6, affine=False), nn.ReLU()], 3, Activation("relu")),
    "norm-without-stats": ([ct(), nn.BatchNorm2d(6, track_running_stats=False)], 2, Activation()),
    "instance-norm": ([ct(), nn.InstanceNorm2d(6), nn.ReLU()], 3, Activation("relu")),
    "instance-norm-1d": ([nn.Conv1d(4, 6, 3), nn.InstanceNorm1d(6, affine=True)], 2, Activation()),
    "group-norm": ([nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU()], 3, Activation("silu")),
    "group-norm-1d": ([nn.Conv1d(4, 6, 3), nn.GroupNorm(3, 6, affine=False)], 2, Activation()),
    "sync-norm": ([ct(), nn.SyncBatchNorm(6), nn.ReLU()], 3, Activation("relu")),
    "identities": (
        [ct(), nn.Identity(), nn.Dropout2d(), nn.BatchNorm2d(6), nn.Dropout(), nn.ReLU()],
        6,
        Activation("relu"),
    ),
    "trailing-dropout": ([ct(), nn.ReLU(), nn.Dropout()], 3, Activation("relu")),
    "groups-dilation": ([ct(4, 6, 3, groups=2, dilation=2, output_padding=1), nn.ReLU()], 2, Activation("relu")),
    "one-dimension": ([nn.ConvTranspose1d(4, 6, 4), nn.Dropout1d(), nn.BatchNorm1d(6), nn.ELU()], 4, Activation("elu")),
    "upsample": ([up(), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()], 4, Activation("relu")),
    "upsample-exact": ([up(scale_factor=3, mode="nearest-exact"), nn.Conv2d(4, 6, 5)], 2, Activation()),
    "upsample-unequal": ([up(scale_factor=(1, 2)), nn.Identity(), nn.Conv2d(4, 6, (1, 3))], 3, Activation()),
    "upsample-by-one": ([up(scale_factor=1), nn.Conv2d(4, 6, 3, padding=1)], 2, Activation()),
    "upsample-groups": ([up(scale_factor=(3, 2)), nn.Conv2d(4, 6, (5, 3), padding=(2, 0), groups=2)], 2, Activation()),
    "upsample-recompute": ([up(scale_factor=2, recompute_scale_factor=True), nn.Conv2d(4, 6, 3)], 2, Activation()),
    "upsampling-nearest": ([nn.UpsamplingNearest2d(scale_factor=2), nn.Conv2d(4, 6, 3)], 2, Activation()),
    "same": ([up(), nn.Conv2d(4, 6, (3, 5), padding="same")], 2, Activation()),
    "valid": ([up(), nn.Conv2d(4, 6, 3, padding="valid")], 2, Activation()),
    "replicate": ([up(), nn.Conv2d(4, 6, 5, padding=2, padding_mode="replicate")], 2, Activation()),
    "reflect": ([up(), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")], 2, Activation()),
    "plain": ([nn.Conv2d(4, 6, 3, padding=1)], 1, Activation()),
    "plain-norm-prelu": ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6)], 3, Activation("prelu")),
    "plain-1d": ([nn.Conv1d(4, 6, 5, padding=2), nn.BatchNorm1d(6), nn.ReLU()], 3, Activation("relu")),
    "plain-1x1": ([nn.Conv2d(4, 6, 1, bias=False), nn.SiLU()], 2, Activation("silu")),
    "plain-dilated-groups": ([nn.Conv2d(4, 6, (3, 1), padding=(2, 0), dilation=2, groups=2)], 1, Activation()),
    "plain-depthwise": ([nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU()], 2, Activation("relu")),
    "plain-strided": ([nn.Conv2d(4, 6, 3, (2, 3), 1), nn.BatchNorm2d(6), nn.ReLU()], 3, Activation("relu")),
    "plain-strided-1d": ([nn.Conv1d(4, 6, 4, 2), nn.LeakyReLU(0.1)], 2, Activation("leaky_relu", (0.1,))),
    "plain-same": ([nn.Conv2d(4, 6, (2, 5), padding="same", dilation=2)], 1, Activation()),
    "plain-same-1d": ([nn.Conv1d(4, 6, 5, padding="same", dilation=3)], 1, Activation()),
    "plain-valid": ([nn.Conv2d(4, 6, 3, padding="valid"), nn.ReLU()], 2, Activation("relu")),
    "plain-wide-padding": ([nn.Conv2d(4, 6, 1, padding=2), nn.Sigmoid()], 2, Activation("sigmoid")),
    "plain-replicate": ([nn.Conv2d(4, 6, 3, padding=(1, 4), padding_mode="replicate")], 1, Activation()),
    "plain-reflect": ([nn.Conv2d(4, 6, 5, padding=2, padding_mode="reflect"), nn.Tanh()], 2, Activation("tanh")),
    "plain-reflect-same": ([nn.Conv2d(4, 6, 5, padding="same", padding_mode="reflect")], 1, Activation()),
    "plain-reflect-nothing": ([nn.Conv2d(4, 6, 3, padding_mode="reflect")], 1, Activation()),
    "plain-replicate-1d": ([nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate")], 1, Activation()),
    "plain-reflect-1d": ([nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), nn.ReLU()], 2, Activation("relu")),
    "pad-reflect": ([nn.ReflectionPad2d(1), nn.Conv2d(4, 6, 3), nn.ReLU()], 3, Activation("relu")),
    "pad-replicate": ([nn.ReplicationPad2d((3, 3, 1, 1)), nn.Identity(), nn.Conv2d(4, 6, 3, 2)], 3, Activation()),
    "pad-zeros": ([nn.ZeroPad2d((2, 2, 0, 0)), nn.Conv2d(4, 6, 3, padding=(2, 1))], 2, Activation()),
    "pad-nothing": ([nn.ReflectionPad2d(0), nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate")], 2, Activation()),
    "pad-1d": ([nn.ReflectionPad1d(2), nn.Conv1d(4, 6, 5), nn.ReLU()], 3, Activation("relu")),
    "upsample-pad": ([up(), nn.ReflectionPad2d(1), nn.Conv2d(4, 6, 3), nn.ReLU()], 4, Activation("relu")),
    "upsample-pad-replicate": ([up(), nn.ReplicationPad2d((2, 2, 1, 1)), nn.Conv2d(4, 6, 5)], 3, Activation()),
    "same-reflect": ([up(), nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect")], 2, Activation()),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str) -> None:
    modules, slots, activation = FUSED[name]
    (step,) = plan(*modules)
    assert isinstance(step, FusedStep), step
    assert step.slots == tuple(range(slots)) and step.step.activation == activation
    assert isinstance(modules[step.conv], (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Conv1d, nn.Conv2d))
    norms = [k for k, m in enumerate(modules) if isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm))]
    assert step.norm == (norms[0] if norms else None)


@pytest.mark.parametrize("name", FUSED)
def test_results_of_what_is_fused(name: str) -> None:
    seq = randomized(cnnfast.Sequential(*FUSED[name][0])).eval()
    one_dimension = isinstance(seq[0], (nn.ConvTranspose1d, nn.Conv1d, nn.ReflectionPad1d))
    x = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    check(seq, x if one_dimension else torch.stack([x, x * 0.5 + 1, x.flip(2), x.roll(1, 2), x * x], 2), inputs=4)


def hooked(module: nn.Module, register: str) -> nn.Module:
    getattr(module, register)(lambda *args: None)
    return module


def having(module: nn.Module, **attributes: object) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def without(module: nn.Module, name: str) -> nn.Module:
    delattr(module, name)
    return module


class Other(nn.ConvTranspose2d):
    pass


# name -> (modules, the slot that is not fused, a part of the reason)
UNFUSED: dict[str, tuple[list[nn.Module], int, str]] = {
    "linear": ([nn.Linear(4, 4)], 0, "Linear is no part of a fused step"),
    "circular": ([nn.Conv2d(4, 6, 3, padding_mode="circular")], 0, "padding_mode='circular' must be one of"),
    "circular-1d": ([nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")], 0, "padding_mode='circular'"),
    "pad-uneven": ([nn.ReflectionPad2d((0, 1, 0, 1)), nn.Conv2d(4, 6, 3)], 0, "only the same on both sides"),
    "pad-negative": ([nn.ZeroPad2d(-1), nn.Conv2d(4, 6, 3)], 0, "only the same on both sides"),
    "pad-twice": ([nn.ReflectionPad2d(1), nn.Conv2d(4, 6, 3, padding=1)], 0, "pads, too"),
    "pad-zeros-twice": ([nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")], 0, "pads, too"),
    "pad-alone": ([nn.ReflectionPad2d(1), nn.ReLU()], 0, "no Conv2d follows"),
    "pad-transposed": ([nn.ReflectionPad2d(1), ct()], 0, "no Conv2d follows"),
    "pad-dimensions": ([nn.ReflectionPad1d(1), nn.Conv2d(4, 6, 3)], 0, "no Conv1d follows"),
    "pad-constant": ([nn.ConstantPad2d(1, 2.0), nn.Conv2d(4, 6, 3)], 0, "no part"),
    "upsample-far-pad": ([up(), nn.ReflectionPad2d(2), nn.Conv2d(4, 6, 5)], 0, "reflect padding"),
    "uneven-same": ([nn.Conv2d(4, 6, (3, 4), padding="same")], 0, r"padding='same' .*\(3, 4\) pads unevenly"),
    "uneven-same-1d": ([nn.Conv1d(4, 6, 2, padding="same")], 0, "unevenly"),
    "uneven-reflect": ([nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect")], 0, "unevenly"),
    "same-strided": ([having(nn.Conv2d(4, 6, 3, padding="same"), stride=(2, 2))], 0, "'same' with stride"),
    "plain-negative-padding": ([having(nn.Conv2d(4, 6, 3), padding=(-1, 0))], 0, "negative padding"),
    "plain-groups": ([having(nn.Conv2d(4, 6, 3), groups=4)], 0, "groups=4 does not divide"),
    "plain-padding-list": ([having(nn.Conv2d(4, 6, 3), padding=[1, 1])], 0, "is not a tuple"),
    "plain-bias": ([having(nn.Conv1d(4, 6, 3), bias=nn.Parameter(torch.zeros(5)))], 0, r"shape \(5,\)"),
    "plain-subclass": ([nn.LazyConv2d(6, 3)], 0, "subclass of Conv2d"),
    "strided-elsewhere": ([nn.Conv2d(4, 6, 3, 2, device="meta")], 0, "meta"),
    "pixel-shuffle": ([nn.Conv2d(4, 8, 3), nn.PixelShuffle(2)], 1, "does not shuffle pixels yet"),
    "activation-after-shuffle": ([nn.Conv2d(4, 8, 3), nn.PixelShuffle(2), nn.PReLU()], 2, "no convolution ahead"),
    "upsample-1d": ([up(), nn.Conv1d(4, 6, 3)], 0, "no Conv2d follows"),
    "activation-alone": ([nn.ReLU()], 0, "no convolution ahead"),
    "second-activation": ([ct(), nn.ReLU(), nn.Tanh()], 2, "no convolution ahead"),
    "norm-after-activation": ([ct(), nn.ReLU(), nn.BatchNorm2d(6)], 2, "no convolution ahead"),
    "unknown-activation": ([ct(), nn.Softplus()], 1, "Softplus is no part"),
    "subclass": ([Other(4, 6, 3)], 0, "subclass of ConvTranspose2d"),
    "lazy": ([nn.LazyConvTranspose2d(6, 3)], 0, "subclass of ConvTranspose2d"),
    **{
        register: ([hooked(ct(), register)], 0, "hooks")
        for register in (
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
            "register_full_backward_pre_hook",
        )
    },
    "own-forward": ([having(ct(), forward=torch.relu)], 0, "forward has been replaced"),
    "shadowed-method": ([having(nn.BatchNorm2d(6), _check_input_dim=print)], 0, "_check_input_dim"),
    "no-weight": ([without(ct(), "weight")], 0, "no 'weight'"),
    "weight-is-none": ([having(ct(), weight=None)], 0, "NoneType"),
    "float64": ([ct().double()], 0, "torch.float64"),
    "meta": ([ct(device="meta")], 0, "meta"),
    "bias-dtype": ([having(ct(), bias=nn.Parameter(torch.zeros(6).half()))], 0, "torch.float16 vector"),
    "bias-shape": ([having(ct(), bias=nn.Parameter(torch.zeros(5)))], 0, r"shape \(5,\)"),
    "stride-list": ([having(ct(), stride=[2, 2])], 0, r"stride=\[2, 2\] is not a tuple"),
    "negative-padding": ([having(ct(), padding=(-1, 0))], 0, "negative padding"),
    "output-padding": ([having(ct(), output_padding=(2, 2))], 0, "output padding must be smaller"),
    "transposed-padding-mode": ([having(ct(), padding_mode="reflect")], 0, "zeros only"),
    "norm-channels": ([ct(), nn.BatchNorm2d(4)], 1, r"shape \(4,\) does not fit 6 channels"),
    "norm-dimensions": ([ct(), nn.BatchNorm1d(6)], 1, "BatchNorm1d after a 2-D convolution"),
    "norm-with-one-stat": ([ct(), having(nn.BatchNorm2d(6), running_mean=None)], 1, "one of running_mean and running"),
    "norm-dtype": ([ct(), nn.BatchNorm2d(6).half()], 1, "torch.float16 norm after a torch.float32"),
    "norm-momentum": ([ct(), having(nn.BatchNorm2d(6), momentum=torch.ones(()))], 1, "momentum=tensor"),
    "norm-eps": ([ct(), having(nn.GroupNorm(2, 6), eps=None)], 1, "eps=None"),
    "norm-mixed": (
        [ct().half(), having(nn.BatchNorm2d(6), running_mean=torch.zeros(6).half())],
        1,
        "torch.float32 vector",
    ),
    "instance-norm-channels": ([ct(), nn.InstanceNorm2d(4)], 1, "num_features=4 is not the 6 channels"),
    "instance-norm-dimensions": ([ct(), nn.InstanceNorm1d(6)], 1, "InstanceNorm1d after a 2-D convolution"),
    "instance-norm-without-stats": (
        [ct(), having(nn.InstanceNorm2d(6), track_running_stats=True)],
        1,
        "no running statistics to normalise by",
    ),
    "group-norm-channels": ([ct(), nn.GroupNorm(2, 4)], 1, r"shape \(4,\) does not fit 6 channels"),
    "group-norm-groups": ([ct(), nn.GroupNorm(4, 8, affine=False)], 1, "num_groups=4 does not divide 6 channels"),
    "layer-norm": ([ct(), nn.LayerNorm(6)], 1, "LayerNorm is no part"),
    "in-place-negative-slope": ([ct(), nn.LeakyReLU(-0.5, inplace=True)], 1, "has no gradient"),
    "prelu-channels": ([ct(), nn.PReLU(3)], 1, r"shape \(3,\)"),
    "parameter-no-number": ([ct(), having(nn.LeakyReLU(), negative_slope=torch.ones(()))], 1, "not numbers"),
    "gelu-unknown": ([ct(), having(nn.GELU(), approximate="erf")], 1, "approximate='erf'"),
    "bilinear": ([up(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 6, 3)], 0, "bilinear"),
    "fixed-size": ([up(size=(8, 8)), nn.Conv2d(4, 6, 3)], 0, "fixed size"),
    "fractional-scale": ([up(scale_factor=1.5), nn.Conv2d(4, 6, 3)], 0, "scale_factor=1.5"),
    "large-scale": ([up(scale_factor=MAX_SCALE + 1), nn.Conv2d(4, 6, 3)], 0, "not one or two integers"),
    "upsample-alone": ([up()], 0, "no Conv2d follows"),
    "upsample-activation": ([up(), nn.ReLU(), nn.Conv2d(4, 6, 3)], 0, "no Conv2d follows"),
    "upsample-2d-3d-conv": ([nn.UpsamplingNearest2d(scale_factor=2), nn.Conv3d(4, 6, 3)], 0, "no Conv2d follows"),
    "upsample-3d-two-factors": ([up(scale_factor=(2, 2)), nn.Conv3d(4, 6, 3)], 0, "is not one or three integers"),
    "upsample-3d-strided": ([up(), nn.Conv3d(4, 6, 3, (1, 1, 2))], 0, "the Conv3d that follows has stride"),
    "upsample-strided": ([up(), nn.Conv2d(4, 6, 3, stride=2)], 0, "stride=\\(2, 2\\)"),
    "upsample-dilated": ([up(), nn.Conv2d(4, 6, 3, dilation=2)], 0, "dilation=\\(2, 2\\)"),
    "upsample-even": ([up(), nn.Conv2d(4, 6, 4)], 0, "odd ones"),
    "upsample-circular-nothing": (
        [up(), nn.ReflectionPad2d(1), nn.Conv2d(4, 6, 1, padding="same", padding_mode="circular")],
        0,
        "circular",
    ),
    "upsample-circular": ([up(), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")], 0, "circular"),
    "upsample-far-reflect": ([up(), nn.Conv2d(4, 6, 5, padding=2, padding_mode="reflect")], 0, "reflect padding"),
    "upsample-wide-padding": ([up(), nn.Conv2d(4, 6, 1, padding=1)], 0, "padding=\\(1, 1\\)"),
    "upsample-odd-list": (
        [up(), having(nn.Conv2d(4, 6, 3, padding_mode="reflect"), _reversed_padding_repeated_twice=[1, 0, 0, 0])],
        0,
        "unevenly",
    ),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_unfused_with_the_reason(name: str) -> None:
    modules, slot, reason = UNFUSED[name]
    items = plan(*modules)
    covered = [k for item in items for k in (item.slots if isinstance(item, FusedStep) else [item.slot])]
    assert covered == list(range(len(modules)))
    (item,) = [i for i in items if isinstance(i, Unfused) and i.slot == slot]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(item.why_not)


@pytest.mark.parametrize("slot", range(4))
def test_training_mode(slot: int) -> None:
    """Of a convolution and an activation it means nothing; a norm measures its input; a dropout stands alone."""
    modules = [ct(), nn.Dropout(), nn.BatchNorm2d(6), nn.ReLU()]
    for m in modules:
        m.eval()
    modules[slot].train()
    items = plan_modules(modules)
    if slot == 1:
        assert [getattr(i, "slots", None) for i in items] == [(0,), None, None, None]
        assert items[1].why_not == "it is in training mode"  # type: ignore[union-attr]
        return
    (step,) = items
    assert isinstance(step, FusedStep) and step.slots == (0, 1, 2, 3) and step.step.measured == (slot == 2)


BATCH, INSTANCE = Norm("batch"), Norm("instance")
# name -> (a norm of 6 channels, what it is in training mode, what in eval mode; None: by running statistics)
RULES: dict[str, tuple[nn.Module, NormRule | None, NormRule | None]] = {
    "batch": (nn.BatchNorm2d(6), NormRule(BATCH, "batch", torch.float32, False, True, True, 0.1), None),
    "batch-average": (
        nn.BatchNorm2d(6, momentum=None),
        NormRule(BATCH, "batch", torch.float32, False, True, True),
        None,
    ),
    "batch-untracked": (
        nn.BatchNorm2d(6, track_running_stats=False),
        NormRule(BATCH, "batch", torch.float32, momentum=0.1),
        NormRule(BATCH, "batch", torch.float32, momentum=0.1),
    ),
    "batch-untracked-since": (  # switched off after construction: statistics are kept, used in eval mode, not moved
        having(nn.BatchNorm2d(6), track_running_stats=False),
        NormRule(BATCH, "batch", torch.float32, momentum=0.1),
        None,
    ),
    "sync": (nn.SyncBatchNorm(6), NormRule(BATCH, "sync", torch.float32, False, True, True, 0.1, True), None),
    "instance": (
        nn.InstanceNorm2d(6),
        NormRule(INSTANCE, "instance", None, True, momentum=0.1),
        NormRule(INSTANCE, "instance", None, True, momentum=0.1),
    ),
    "instance-tracked": (
        nn.InstanceNorm2d(6, track_running_stats=True),
        NormRule(INSTANCE, "instance", torch.float32, True, True, momentum=0.1),
        None,
    ),
    "instance-tracked-before": (  # torch moves them in both modes
        having(nn.InstanceNorm2d(6, track_running_stats=True), track_running_stats=False),
        NormRule(INSTANCE, "instance", torch.float32, True, True, momentum=0.1),
        NormRule(INSTANCE, "instance", torch.float32, True, True, momentum=0.1),
    ),
    "group": (
        nn.GroupNorm(2, 6, eps=0.5),
        NormRule(Norm("group", 2, 0.5), "group", torch.float32),
        NormRule(Norm("group", 2, 0.5), "group", torch.float32),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_what_a_norm_does_in_each_mode(name: str) -> None:
    norm, *expected = RULES[name]
    kind = expected[0].kind
    for train, rule in zip((True, False), expected, strict=True):
        (step,) = plan(ct(), norm, train=train)
        assert isinstance(step, FusedStep) and step.slots == (0, 1) and step.step.measured == (rule is not None)
        running = NormRule(Norm("running", eps=norm.eps), kind, torch.float32, kind == "instance")
        assert step.rule == (rule or running) and step.step.norm == step.rule.norm


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([up(), nn.ReflectionPad2d(2), nn.Conv2d(4, 6, 5), nn.ReLU()], [None, (1, 2, 3)]),
        ([nn.ReflectionPad2d(1), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()], [None, (1, 2)]),
        ([nn.ReflectionPad2d((1, 2, 1, 2)), nn.Conv2d(4, 6, 3)], [None, (1,)]),
        ([ct(4, 4), nn.ReflectionPad2d(3), nn.Conv2d(4, 3, 7), nn.Tanh()], [(0,), (1, 2, 3)]),
    ],
    ids=["far-reflection", "both-pad", "uneven", "head"],
)
def test_what_a_refused_pad_leaves(modules: list[nn.Module], expected: list[object]) -> None:
    assert [getattr(i, "slots", None) for i in plan(*modules)] == expected
    seq = randomized(cnnfast.Sequential(*modules)).eval()
    check(seq, torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)), inputs=4)


def test_the_steps_of_a_generator_follow_one_another() -> None:
    modules = [nn.Flatten(), nn.Unflatten(1, (4, 1, 1))]
    modules += [ct(4, 6, 4, stride=1, padding=0), nn.BatchNorm2d(6), nn.ReLU(), ct(6, 3), nn.Tanh()]
    items = plan(*modules)
    assert [getattr(i, "slots", None) for i in items] == [None, None, (2, 3, 4), (5, 6)]


def test_the_weight_says_the_geometry_as_it_does_for_torch() -> None:
    conv = ct(8, 6, groups=2)
    conv.weight = nn.Parameter(torch.zeros(4, 5, 3, 2))
    conv.bias = None
    (step,) = plan(conv)
    spec = step.step.spec  # type: ignore[union-attr]
    assert (spec.in_channels, spec.out_channels, spec.kernel_size, spec.groups) == (4, 10, (3, 2), 2)


def test_opaque_are_modules_that_are_not_pytorchs_own() -> None:
    items = plan(nn.Linear(2, 2), Other(4, 6, 3), hooked(nn.ReLU(), "register_forward_hook"), nn.Softplus())
    assert [i.opaque for i in items if isinstance(i, Unfused)] == [False, True, True, False]


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest_upsampling_repeats_pixels_up_to_the_largest_factor(mode: str) -> None:
    for r in range(1, MAX_SCALE + 1):
        for n in (1, 2, 3, 7, 64, 513):
            x = torch.arange(float(n)).view(1, 1, 1, n)
            y = F.interpolate(x, scale_factor=(1.0, float(r)), mode=mode)
            assert torch.equal(y, x.repeat_interleave(r, 3)), (r, n)


def _parameter(m: nn.Module) -> None:
    m.weight = nn.Parameter(m.weight.detach()[:, :3].clone())  # type: ignore[index]


# What a reading must notice; each is a change to one of (ConvTranspose2d, BatchNorm2d, LeakyReLU).
NOTICED: dict[str, tuple[int, Callable[[nn.Module], object]]] = {
    "training": (1, lambda m: m.eval()),
    "stride": (0, lambda m: setattr(m, "stride", (1, 1))),
    "groups": (0, lambda m: setattr(m, "groups", 2)),
    "eps": (1, lambda m: setattr(m, "eps", 0.1)),
    "momentum": (1, lambda m: setattr(m, "momentum", None)),
    "track-running-stats": (1, lambda m: setattr(m, "track_running_stats", False)),
    "slope": (2, lambda m: setattr(m, "negative_slope", 0.3)),
    "inplace": (2, lambda m: setattr(m, "inplace", True)),
    "forward": (2, lambda m: setattr(m, "forward", torch.relu)),
    "method": (1, lambda m: setattr(m, "_check_input_dim", lambda x: None)),
    "hook": (1, lambda m: m.register_forward_hook(lambda *a: None)),
    "pre-hook": (0, lambda m: m.register_forward_pre_hook(lambda *a: None)),
    "backward-hook": (2, lambda m: m.register_full_backward_hook(lambda *a: None)),
    "weight-shape": (0, _parameter),
    "weight-layout": (0, lambda m: m.to(memory_format=torch.channels_last)),
    "weight-dtype": (0, lambda m: m.half()),
    "norm-dtype": (1, lambda m: m.half()),
    "no-bias": (0, lambda m: setattr(m, "bias", None)),
    "no-statistics": (1, lambda m: setattr(m, "running_mean", None)),
    "no-affine": (1, lambda m: setattr(m, "weight", None)),
    "device": (0, lambda m: m.to("meta")),
    "class": (2, lambda m: setattr(m, "__class__", nn.ReLU)),
    "missing": (1, lambda m: delattr(m, "eps")),
}


@pytest.mark.parametrize("name", NOTICED)
def test_reading_notices(name: str) -> None:
    slot, change = NOTICED[name]
    modules = [ct(), nn.BatchNorm2d(6), nn.LeakyReLU()]
    before = read(modules).facts
    assert before == read(modules).facts
    change(modules[slot])
    assert before != read(modules).facts


def test_reading_looks_at_values_not_at_identities() -> None:
    def fresh() -> list[nn.Module]:
        return [ct(), nn.BatchNorm2d(6), nn.LeakyReLU(), nn.Linear(2, 2)]

    assert read(fresh()).facts == read(fresh()).facts


def test_reading_goes_into_containers_that_only_run_their_children() -> None:
    inner = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh()))
    assert read([inner, ct()]).modules[0] is inner
    names = [type(m).__name__ for m in read([inner, ct()], (nn.Sequential.forward,)).modules]
    assert names == ["ReLU", "Tanh", "ConvTranspose2d"]
    inner.register_forward_hook(lambda *args: None)
    assert read([inner], (nn.Sequential.forward,)).modules == [inner]


def test_an_instance_attribute_named_like_a_parameter_is_seen() -> None:
    conv = ct()
    object.__setattr__(conv, "weight", torch.zeros(4, 6, 4, 4))
    (item,) = plan(conv)
    assert isinstance(item, Unfused) and "holds weight" in item.why_not
