"""Random transposed convolutions through the public functions, against torch in float64.

CNNFAST_SEED chooses other ones; case i of seed s is always the same.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

import cnnfast
from cnnfast.activations import ACTIVATIONS, Activation
from cnnfast.gpu.why_not import why_not
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step

from ..cases import PRECISIONS, fitted, reference
from ..conftest import conv_precision
from ..tolerance import assert_close

SEED = int(os.environ.get("CNNFAST_SEED", "20"))
COUNT, QUICK = 200, 120  # the others are `slow`: a case takes half a second under the interpreter
POSITIONS = 80  # of an output image, at most


@dataclass
class Tally:
    ran: int = 0
    triton: int = 0


@pytest.fixture(scope="module")
def tally(state: Callable[[str], None]) -> Iterator[Tally]:
    """Counts, and their statement when the module is done."""
    count = Tally()
    yield count
    if count.ran:
        share = 100 * count.triton / count.ran
        state(f"random specs: seed {SEED}, {count.ran} ran, {count.triton} of them ({share:.0f} %) on Triton")


def random_spec(rng: random.Random) -> tuple[ConvSpec, tuple[int, ...]]:
    """A spec and an input size with an output of at least one and at most POSITIONS positions."""
    while True:
        ndim = rng.choice((1, 2, 2))
        groups = rng.choice((1, 1, 1, 2, 3))
        # Mostly enough channels for Triton; some too few, which must fall back.
        c_in, c_out = (groups * rng.choice((16, 16, 17, 24, 32, 48)) for _ in range(2))
        if rng.random() < 0.15:
            c_out = groups * rng.randint(1, 8)
        if rng.random() < 0.05:
            c_in = groups * rng.randint(1, 15)

        def each(low: int, high: int, ndim: int = ndim) -> list[int]:
            return [rng.randint(low, high) for _ in range(ndim)]

        kernel, stride, dilation = each(1, 5), each(1, 4), [rng.choice((1, 1, 2, 3)) for _ in range(ndim)]
        padding = each(0, 3)
        output_padding = [rng.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True)]
        size = [1] * ndim if rng.random() < 0.1 else each(1, 5)
        spec = ConvSpec.make(c_in, c_out, kernel, stride, padding, output_padding, groups, dilation, ndim=ndim)
        try:
            out = spec.output_size(size)
        except ValueError:
            continue
        if out[0] * (out[1] if ndim == 2 else 1) <= POSITIONS:
            return spec, tuple(size)


@pytest.mark.parametrize(
    "index", [*range(QUICK), *(pytest.param(k, marks=pytest.mark.slow) for k in range(QUICK, COUNT))]
)
def test_random_spec(index: int, device: torch.device, launches: list[str], tally: Tally) -> None:
    rng = random.Random(f"{SEED}/{index}")
    g = torch.Generator().manual_seed(SEED * 1000 + index)
    spec, size = random_spec(rng)
    precision = rng.choice(tuple(PRECISIONS))
    dtype, switch = PRECISIONS[precision]
    name = rng.choice(tuple(ACTIVATIONS))
    batch, c = rng.randint(1, 3), spec.out_channels
    out = spec.output_size(size)
    flip = [rng.random() < 0.5 for _ in range(6)]

    def rand(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=g).type(to)

    gain = (spec.in_channels / spec.groups) ** -0.5
    x, weight = rand(batch, spec.in_channels, *size), rand(*spec.weight_shape, to=torch.float32).mul(gain).type(dtype)
    bias = rand(c) if flip[0] else None
    scale = rand(c, to=torch.float32) if flip[1] else None
    shift = rand(c, to=torch.float32) if flip[2] else None
    residual = rand(batch, c, *out) if flip[3] else None
    slope = torch.rand(c, generator=g) if name == "prelu" else None
    if spec.ndim == 2:
        x = x.contiguous(memory_format=torch.channels_last) if flip[4] else x
        weight = weight.contiguous(memory_format=torch.channels_last) if flip[5] else weight
    tensors = [t if t is None else t.to(device) for t in (x, weight, bias, scale, shift, residual, slope)]
    x, weight, bias, scale, shift, residual, slope = tensors  # type: ignore[assignment]

    def lift(t: torch.Tensor | None) -> torch.Tensor | None:
        return t if t is None or spec.ndim == 2 else t.unsqueeze(-2)

    step = Step(spec.as_2d(), Activation(name))
    o = Operands(lift(x), lift(weight), bias, scale=scale, shift=shift, residual=lift(residual), slope=slope)
    step = fitted(step, o)
    reason = why_not(step, o)
    few = min(spec.in_channels, spec.out_channels if spec.groups > 1 else 16) // spec.groups < 16
    assert (reason is not None) == (spec.in_channels // spec.groups < 16 or few), reason
    function = cnnfast.ops.conv_transpose1d if spec.ndim == 1 else cnnfast.ops.conv_transpose2d
    with conv_precision(switch):
        y = function(
            x, weight, bias, spec.stride, spec.padding, spec.output_padding, spec.groups, spec.dilation,
            scale=scale, shift=shift, residual=residual, activation=name, activation_param=slope,
            backend="triton" if reason is None else "auto",
        )  # fmt: skip
    assert len(launches) == (reason is None)
    exact, yardstick, before = reference(step, o, tf32=precision == "tf32")
    shape = (batch, c, *out)
    what = f"seed {SEED}, case {index}: {spec}, {precision}, {name}"
    assert_close(y, exact.reshape(shape), yardstick.reshape(shape), what, before.reshape(shape))
    tally.ran += 1
    tally.triton += reason is None


def test_most_specs_fit_triton() -> None:
    """The generator must not drift to cases that fall back."""
    fit = 0
    for index in range(COUNT):
        spec, size = random_spec(random.Random(f"{SEED}/{index}"))
        x = torch.empty(1, spec.in_channels, *(1,) * (2 - spec.ndim), *size)
        fit += why_not(Step(spec.as_2d()), Operands(x, x)) is None
    assert fit >= 0.75 * COUNT
