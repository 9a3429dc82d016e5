"""Geometry, activations and their errors."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast.activations import ACTIVATIONS, Activation, ActivationRow
from cnnfast.nn.computed import HOOKS
from cnnfast.nn.modules import KINDS
from cnnfast.spec import ConvSpec, Precision, collapse_upsample, phases_1d

# --- phases -----------------------------------------------------------------------------------------------------------


def contributions(k: int, s: int, p: int, d: int, n: int, out: int) -> set[tuple[int, int, int]]:
    """(output, tap, input) of a transposed convolution, by its definition ``o + p = s*i + d*t``."""
    every = itertools.product(range(n), range(k))
    return {(s * i + d * t - p, t, i) for i, t in every if 0 <= s * i + d * t - p < out}


@pytest.mark.parametrize("dilation", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6])
def test_phases_are_the_definition(stride: int, dilation: int) -> None:
    """Every product of the definition belongs to exactly one phase, and no phase has another one."""
    for k, p, n in itertools.product((1, 2, 3, 4, 5, 8), (0, 1, 2, 5), (1, 2, 5)):
        out = (n - 1) * stride - 2 * p + dilation * (k - 1) + 1 + max(stride, dilation) - 1
        if out < 1:
            continue
        got = []
        for phase in phases_1d(k, stride, p, dilation, True):
            for q in range(phase.size(out, stride)):
                for tap, off in phase.pairs():
                    assert 0 <= tap < k
                    if 0 <= q + off < n:
                        got.append((stride * q + phase.residue, tap, q + off))
        assert len(got) == len(set(got))
        assert set(got) == contributions(k, stride, p, dilation, n, out), (k, stride, p, dilation, n)


def test_phases_cover_the_output_once() -> None:
    for s, out in itertools.product(range(1, 6), range(1, 12)):
        positions = [s * q + ph.residue for ph in phases_1d(3, s, 1, 1, True) for q in range(ph.size(out, s))]
        assert sorted(positions) == list(range(out))


def test_phases_of_known_layers() -> None:
    """The table of taps per phase: DCGAN, CycleGAN, kernel = stride, waifu2x, a vocoder."""

    def taps(k: int, s: int, p: int, d: int = 1) -> list[int]:
        return [ph.taps for ph in phases_1d(k, s, p, d, True)]

    assert taps(4, 2, 1) == [2, 2]
    assert taps(3, 2, 1) == [1, 2]
    assert taps(2, 2, 0) == [1, 1]
    assert taps(4, 2, 3) == [2, 2]
    assert sorted(taps(5, 3, 2)) == [1, 2, 2]
    assert taps(16, 8, 4) == [2] * 8
    assert taps(3, 2, 1, 2) == [0, 3]  # stride and dilation share a factor: one phase is the bias alone
    assert taps(2, 3, 0) == [1, 1, 0]  # a kernel shorter than the stride leaves gaps


def test_max_phase_taps_and_macs() -> None:
    dcgan = ConvSpec.make(512, 256, 4, 2, 1)
    assert dcgan.max_phase_taps == 4
    assert dcgan.macs(2, (4, 4)) == 2 * 8 * 8 * 4 * 512 * 256
    cyclegan = ConvSpec.make(8, 4, 3, 2, 1, 1)
    assert cyclegan.max_phase_taps == 4
    assert cyclegan.macs(1, (5, 5)) == 25 * (1 + 2 + 2 + 4) * 8 * 4
    assert ConvSpec.make(8, 4, 3, 1, 1, groups=2, transposed=False).macs(3, (5, 6)) == 3 * 30 * 9 * 8 * 4 // 2


# --- sizes ------------------------------------------------------------------------------------------------------------


def random_specs(count: int, transposed: bool) -> list[tuple[ConvSpec, tuple[int, ...]]]:
    rng, found = random.Random(3), []
    while len(found) < count:
        ndim, groups = rng.choice((1, 2)), rng.choice((1, 2, 3))
        per_dim = [[rng.randint(low, high) for _ in range(ndim)] for low, high in ((1, 5), (1, 4), (0, 3), (1, 3))]
        kernel, stride, padding, dilation = per_dim
        op = [rng.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True)] if transposed else 0
        c_in, c_out = groups * rng.randint(1, 3), groups * rng.randint(1, 3)
        spec = ConvSpec.make(
            c_in, c_out, kernel, stride, padding, op, groups, dilation, transposed=transposed, ndim=ndim
        )
        size = tuple(rng.randint(1, 7) for _ in range(ndim))
        try:
            spec.output_size(size)
        except ValueError:
            continue
        found.append((spec, size))
    return found


def torch_conv(spec: ConvSpec, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    s = spec
    if s.transposed:
        function = F.conv_transpose1d if s.ndim == 1 else F.conv_transpose2d
        return function(x, weight, None, s.stride, s.padding, s.output_padding, s.groups, s.dilation)
    plain = F.conv1d if s.ndim == 1 else F.conv2d
    return plain(x, weight, None, s.stride, s.padding, s.dilation, s.groups)


@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
def test_shapes_are_torch_s(transposed: bool) -> None:
    for spec, size in random_specs(60, transposed):
        y = torch_conv(spec, torch.zeros(1, spec.in_channels, *size), torch.zeros(spec.weight_shape))
        assert tuple(y.shape) == (1, spec.out_channels, *spec.output_size(size)), spec


@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
def test_adjoint(transposed: bool) -> None:
    """The gradient of <conv(x), u> with respect to x is the adjoint spec with the same weight, applied to u."""
    g = torch.Generator().manual_seed(0)
    for spec, size in random_specs(60, transposed):
        x = torch.randn(2, spec.in_channels, *size, generator=g, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(spec.weight_shape, generator=g, dtype=torch.float64)
        y = torch_conv(spec, x, weight)
        u = torch.randn(y.shape, generator=g, dtype=torch.float64)
        (expected,) = torch.autograd.grad(y, x, u)
        adjoint = spec.adjoint(size)
        assert adjoint.weight_shape == spec.weight_shape and adjoint.transposed is not spec.transposed
        got = torch_conv(adjoint, u, weight)[(..., *(slice(n) for n in size))]
        torch.testing.assert_close(got, expected, msg=lambda m, s=spec: f"{s}: {m}")


def test_adjoint_of_a_strided_convolution_needs_the_input_size() -> None:
    spec = ConvSpec.make(2, 2, 3, 2, 1, transposed=False)
    with pytest.raises(ValueError, match="needs input_size"):
        spec.adjoint()
    assert spec.adjoint((8, 7)).output_padding == (1, 0)
    assert ConvSpec.make(2, 3, 3, 1, 1, transposed=False).adjoint() == ConvSpec.make(3, 2, 3, 1, 1)


def test_as_2d() -> None:
    spec = ConvSpec.make(4, 6, 5, 3, 2, 1, 2, 2, ndim=1)
    assert spec.as_2d() == ConvSpec.make(4, 6, (1, 5), (1, 3), (0, 2), (0, 1), 2, (1, 2))
    assert spec.as_2d().output_size((1, 7)) == (1, *spec.output_size((7,)))
    square = ConvSpec.make(4, 6, 5)
    assert square.as_2d() is square


def test_ints_and_sequences_are_one_spec() -> None:
    assert ConvSpec.make(4, 4, 3, 2, 1) == ConvSpec.make(4, 4, [3, 3], (2,), (1, 1), [0], 1, (1, 1))
    assert hash(ConvSpec.make(4, 4, 3)) == hash(ConvSpec.make(4, 4, (3, 3)))


BAD_SPECS = {
    "kernel": (dict(kernel_size=0), "kernel_size must be positive, got (0, 0)"),
    "kernel-length": (dict(kernel_size=(3, 3, 3)), "kernel_size must be an int or 2 ints, got (3, 3, 3)"),
    "stride": (dict(stride=(1, 0)), "non-positive stride is not supported, got (1, 0)"),
    "dilation": (dict(dilation=0), "dilation should be greater than zero, got (0, 0)"),
    "padding": (dict(padding=-1), "negative padding is not supported, got (-1, -1)"),
    "output-padding-negative": (dict(output_padding=-1), "negative output_padding is not supported, got (-1, -1)"),
    "output-padding": (
        dict(stride=2, output_padding=2),
        "output padding must be smaller than either stride or dilation, "
        "got output_padding=(2, 2), stride=(2, 2), dilation=(1, 1)",
    ),
    "groups": (dict(groups=0), "groups must be a positive integer, got 0"),
    "groups-in": (dict(groups=3), "groups=3 does not divide in_channels=4"),
    "groups-out": (dict(groups=2, out_channels=3), "groups=2 does not divide out_channels=3"),
    "plain-output-padding": (
        dict(transposed=False, stride=2, output_padding=1),
        "output_padding belongs to transposed convolutions, got (1, 1)",
    ),
}


@pytest.mark.parametrize("name", BAD_SPECS)
def test_bad_spec(name: str) -> None:
    change, message = BAD_SPECS[name]
    with pytest.raises(ValueError) as error:
        ConvSpec.make(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **change})
    assert str(error.value) == message


def test_output_too_small() -> None:
    with pytest.raises(ValueError) as error:
        ConvSpec.make(4, 4, (3, 4), 1, (2, 1)).output_size((1, 3))
    assert str(error.value) == "given input size per channel (1, 3), calculated output size (-1, 4) is too small"


# --- upsampling -------------------------------------------------------------------------------------------------------


def test_collapse_of_the_common_block() -> None:
    """Nearest x2 and 3x3 is k4 s2 p1: 4 products an output instead of 9."""
    spec = collapse_upsample(8, 4, (3, 3), (2, 2), (1, 1))
    assert spec == ConvSpec.make(8, 4, 4, 2, 1)
    assert spec.output_size((5, 6)) == (10, 12) and spec.max_phase_taps == 4


def test_collapse_needs_padding_below_the_kernel() -> None:
    with pytest.raises(ValueError, match=r"padding=\(1, 3\) must be smaller than kernel_size=\(3, 3\)"):
        collapse_upsample(8, 4, (3, 3), (2, 2), (1, 3))


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_collapsed_taps(factor: int) -> None:
    """A kernel of k taps meets at most ceil((k - 1) / r) + 1 inputs."""
    for k in (1, 3, 5, 7):
        for p in range(k):
            spec = collapse_upsample(2, 2, (k, k), (factor, factor), (p, p))
            assert spec.max_phase_taps == (math.ceil((k - 1) / factor) + 1) ** 2
            if factor * 4 + 2 * p >= k:
                assert spec.output_size((4, 4)) == (factor * 4 + 2 * p - k + 1,) * 2


# --- activations and precision ----------------------------------------------------------------------------------------


def test_activation_defaults_are_torch_s() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    slope = torch.tensor([0.3], dtype=torch.float64)
    modules = {
        "identity": torch.nn.Identity(), "relu": torch.nn.ReLU(), "leaky_relu": torch.nn.LeakyReLU(),
        "elu": torch.nn.ELU(), "silu": torch.nn.SiLU(), "mish": torch.nn.Mish(), "gelu": torch.nn.GELU(),
        "gelu_tanh": torch.nn.GELU(approximate="tanh"), "tanh": torch.nn.Tanh(), "sigmoid": torch.nn.Sigmoid(),
        "hardtanh": torch.nn.Hardtanh(), "prelu": lambda v: F.prelu(v, slope),
    }  # fmt: skip
    assert list(modules) == list(ACTIVATIONS)
    for name, module in modules.items():
        assert torch.equal(Activation(name)(x, slope), module(x)), name


@pytest.mark.parametrize("name", [n for n, row in ACTIVATIONS.items() if row.saves == "y" and n != "prelu"])
def test_rows_that_save_the_output_can(name: str) -> None:
    """Where the table says "y", the derivative is a function of the output: equal outputs, equal derivatives."""
    x = torch.linspace(-4, 4, 801, dtype=torch.float64, requires_grad=True)
    y = Activation(name)(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    order = y.argsort()
    same = y[order].diff() == 0
    assert (slope[order].diff().abs()[same] < 1e-9).all()


ROWS = [row for row in ACTIVATIONS.values() if not row.slope]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_row_says_what_the_backward_of_torch_reads(row: ActivationRow) -> None:
    """``in_place``, ``copies_input``, ``reads_input``: whether overwriting the result changes a later gradient."""
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)

    def gradient(function: Callable[..., Tensor], spoil: bool) -> Tensor:
        leaf = x.clone().requires_grad_()
        y = function(leaf * 1, *row.defaults)
        if spoil:
            y.data.add_(1)  # unseen by autograd
        return torch.autograd.grad(y.sum(), leaf)[0]

    right = gradient(row.forward, False)
    if row.saves == "y":
        assert torch.equal(gradient(row.forward, True), right) == row.reads_input
    if row.in_place is not None:
        assert row.saves == "y" and torch.equal(row.in_place(x.clone(), *row.defaults), row.forward(x, *row.defaults))
        torch.testing.assert_close(gradient(row.in_place, False), right)
        kept = torch.equal(gradient(row.in_place, True), right)
        assert kept == row.copies_input


@pytest.mark.parametrize("row", ACTIVATIONS.values(), ids=lambda row: row.name)
def test_the_row_says_whether_the_memory_format_stays(row: ActivationRow) -> None:
    """Of a tensor that is contiguous in both formats; identity returns its very input."""
    x = torch.zeros(8).as_strided((2, 4, 1, 1), (4, 1, 4, 4))
    assert x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    y = row.forward(x, torch.ones(4)) if row.slope else row.forward(x, *row.defaults)
    assert (y.stride() == x.stride()) == (row.keeps_format or row.name == "identity")


@pytest.mark.parametrize("cls", [cls for row in ACTIVATIONS.values() for cls in row.modules], ids=lambda c: c.__name__)
def test_the_row_says_how_a_module_is_read(cls: type[torch.nn.Module]) -> None:
    """With its defaults, and with other values of the attributes that its row names."""
    module, x = cls(), torch.linspace(-8, 8, 65, dtype=torch.float64)
    rows = [row for row in ACTIVATIONS.values() if cls in row.modules]
    kind = KINDS[cls]
    for row in rows:
        if row.variant is not None:
            setattr(module, *row.variant)
        for shift in (0.0, 0.25):
            for name in row.attributes:
                if name != "inplace":
                    setattr(module, name, getattr(module, name) + shift)
            assert kind.activation is not None
            activation = kind.activation(*kind.look(module.__dict__)[len(HOOKS) + 1 :])
            slope = module.weight.double() if row.slope else None
            assert activation.name == row.name
            assert torch.equal(activation(x, slope), module.double()(x))


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="unknown activation 'swish': expected one of identity, relu, leaky_relu"):
        Activation("swish")


def test_activation_parameters() -> None:
    assert Activation("leaky_relu").params == (0.01,)
    assert Activation("hardtanh", (0, 6)).params == (0.0, 6.0)
    assert Activation("relu") == Activation("relu", ()) and hash(Activation("elu")) == hash(Activation("elu", (1,)))
    with pytest.raises(ValueError, match=r"activation 'hardtanh' takes 2 parameter\(s\), got \(1.0,\)"):
        Activation("hardtanh", (1.0,))
    with pytest.raises(ValueError, match=r"activation 'relu' takes 0 parameter\(s\)"):
        Activation("relu", (1.0,))


def test_precision_is_a_value() -> None:
    assert Precision(torch.float16).itemsize == 2 and Precision(torch.float32, True).itemsize == 4
    assert Precision(torch.float32) != Precision(torch.float32, True)
