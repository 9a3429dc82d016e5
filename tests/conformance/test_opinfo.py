"""PyTorch's own samples and error inputs of the transposed convolutions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import cnnfast
from cnnfast.gpu.devices import conv_tf32
from cnnfast.gpu.why_not import why_not
from cnnfast.reference import run_reference
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step

from ..cases import cast, reference
from ..tolerance import assert_close

pytest.importorskip("expecttest", reason="expecttest, which PyTorch's test suite imports, is not installed")
_frozen = torch.backends.flags_frozen()
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

# PyTorch's test suite forbids setting torch.backends' switches outside a context manager, for the whole process.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = not _frozen

NAMES = ("conv_transpose1d", "conv_transpose2d")
OPS = {op.name.rpartition(".")[2]: op for op in op_db if op.name in [f"nn.functional.{n}" for n in NAMES]}
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16", marks=pytest.mark.slow),
]
CHANNELS = 16  # of a group: what a sample is widened to

# The positional parameters after input, weight and bias, with their defaults.
GEOMETRY: dict[str, Any] = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}


def test_pytorch_has_the_samples() -> None:
    assert sorted(OPS) == sorted(NAMES)


def arguments(sample: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """(input, weight, bias, geometry by name) of an OpInfo sample."""
    weight, bias, *rest = (*sample.args, None)[: max(2, len(sample.args))]
    geometry = {**GEOMETRY, **dict(zip(GEOMETRY, rest, strict=False))}
    kwargs = dict(sample.kwargs)
    bias = kwargs.pop("bias", bias)
    return sample.input, weight, bias, {**geometry, **kwargs}


def step_of(ndim: int, weight: torch.Tensor, geometry: dict[str, Any]) -> Step:
    g = geometry["groups"]
    spec = ConvSpec.make(weight.shape[0], weight.shape[1] * g, weight.shape[2:], **geometry, ndim=ndim)
    return Step(spec.as_2d())


def operands(ndim: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Operands:
    x = x if x.dim() == ndim + 2 else x.unsqueeze(0)
    return Operands(x, weight, bias) if ndim == 2 else Operands(x.unsqueeze(-2), weight.unsqueeze(-2), bias)


def widen(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A sample's shapes with at least CHANNELS input and output channels a group, new numbers in them."""
    g = torch.Generator().manual_seed(0)
    c_in, c_out = (max(CHANNELS, n) for n in (weight.shape[0] // groups, weight.shape[1]))

    def rand(like: torch.Tensor, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).type(like.dtype).to(like.device)

    batch, size = ((x.shape[0],), x.shape[2:]) if x.dim() == weight.dim() else ((), x.shape[1:])
    return (
        rand(x, *batch, groups * c_in, *size),
        rand(weight, groups * c_in, c_out, *weight.shape[2:]),
        None if bias is None else rand(bias, groups * c_out),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    """The public functions are torch's, for every dtype that it has samples of."""
    ours, op = getattr(cnnfast.ops, name), OPS[name]
    count = 0
    for sample in op.sample_inputs("cpu", dtype):
        x, weight, bias, geometry = arguments(sample)
        y = ours(sample.input, *sample.args, **sample.kwargs, backend="aten")
        expected = op(sample.input, *sample.args, **sample.kwargs)
        assert y.dtype == expected.dtype and y.shape == expected.shape and y.stride() == expected.stride()
        if dtype.is_complex or dtype == torch.float64:
            torch.testing.assert_close(y, expected)
        else:
            ndim = weight.dim() - 2
            exact = run_reference(step_of(ndim, weight, geometry), cast(operands(ndim, x, weight, bias), torch.float64))
            assert_close(y, exact.reshape(y.shape), expected, f"{name}: {sample}")
        count += 1
    assert count >= 5


@pytest.mark.parametrize("backend", ["aten", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_error_inputs(name: str, backend: str) -> None:
    """PyTorch lists bad calls for its plain convolutions only: the same calls of the transposed ones raise as its own
    do."""
    plain = next(op for op in op_db if op.name == f"nn.functional.{name.replace('_transpose', '')}")
    count = 0
    for error in plain.error_inputs("cpu"):
        sample = error.sample_input
        try:
            OPS[name](sample.input, *sample.args, **sample.kwargs)
        except Exception as e:
            expected = e
        else:
            continue  # no error of a transposed convolution
        with pytest.raises(type(expected)) as got:
            getattr(cnnfast.ops, name)(sample.input, *sample.args, **sample.kwargs, backend=backend)
        # "(position 5)" is said of arguments that were not given by name.
        texts = [re.sub(r" \(position \d+\)", "", str(e)) for e in (got.value, expected)]
        assert texts[0] == texts[1]
        count += 1
    assert count >= 3


@pytest.fixture(scope="module")
def tally(state: Callable[[str], None]) -> Iterator[dict[str, int]]:
    count = {"samples": 0, "triton": 0, "widened": 0}
    yield count
    if count["samples"]:
        state(
            f"OpInfo on the device: {count['samples']} samples as they are, {count['triton']} of them on Triton, "
            f"and {count['widened']} widened to {CHANNELS} channels a group, all on Triton"
        )


def run(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: dict[str, Any]) -> bool:
    """Through Triton where it can (else "auto"), against float64; whether it could."""
    ndim = weight.dim() - 2
    step, o = step_of(ndim, weight, geometry), operands(ndim, x, weight, bias)
    fits = why_not(step, o) is None
    y = getattr(cnnfast.ops, name)(x, weight, bias, **geometry, backend="triton" if fits else "auto")
    tf32 = x.dtype == torch.float32 and conv_tf32()
    exact, yardstick, _ = reference(step, o, tf32=tf32)
    if not fits:  # PyTorch's own operator, which may round the convolution and its bias apart
        given = (t if t is None else t.cpu() for t in (x, weight, bias))
        yardstick = OPS[name](*given, **geometry)
    assert_close(y, exact.reshape(y.shape), yardstick.reshape(y.shape), f"{name}: {step.spec}")
    assert y.dim() == x.dim()
    return fits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_samples_on_the_device(
    name: str, dtype: torch.dtype, device: torch.device, launches: list[str], tally: dict[str, int]
) -> None:
    for sample in OPS[name].sample_inputs(str(device), dtype):
        x, weight, bias, geometry = arguments(sample)
        launches.clear()
        fits = run(name, x, weight, bias, geometry)
        assert len(launches) == (fits and x.shape[0] > 0)
        tally["samples"] += 1
        tally["triton"] += fits
        launches.clear()
        assert run(name, *widen(x, weight, bias, geometry["groups"]), geometry)
        assert len(launches) == (x.shape[0] > 0), launches
        tally["widened"] += 1
