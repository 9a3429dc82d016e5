"""The CPU's training path: every way to run a convolution, every norm, gradients of both orders, against float64.

Runs on whatever instruction set oneDNN is allowed (ONEDNN_MAX_CPU_ISA): the ways are forced, the rule that chooses
between them is tested for each instruction set by name.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import cnnfast
from cnnfast import norms, reference
from cnnfast.activations import Activation
from cnnfast.cpu import columns, conv_autograd, inference, methods, onednn, training
from cnnfast.cpu import norm as cpu_norm
from cnnfast.cpu.conv_autograd import Ways, contiguous_ways, ways
from cnnfast.cpu.isa import InstructionSet
from cnnfast.norms import Norm
from cnnfast.reference import run_reference
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step, Upsample, norm_step, plain_step, upsample_step

from ..norm_cases import of_every_kind
from ..tolerance import assert_close

CL = torch.channels_last
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
BATCH = 8  # enough values for a maximum of errors to say something
packed = pytest.mark.skipif(onednn.why_missing() is not None, reason=str(onednn.why_missing()))


@pytest.fixture(autouse=True, params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(0)
    yield request.param
    torch.set_num_threads(before)


def gradients(
    f: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor, dtype: torch.dtype, second: bool = False
) -> list[Tensor]:
    """The result and the gradients of the tensors (of a function of the gradients where ``second``) in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    y = f(*leaves)
    grad = grad.to(dtype).requires_grad_(second)
    first = torch.autograd.grad(y, leaves, grad, create_graph=second)
    if not second:
        return [y.detach(), *first]
    penalty = sum(g.square().sum() for g in first)
    return list(torch.autograd.grad(penalty, [*leaves, grad], allow_unused=True, materialize_grads=True))


def compare(
    ours: Callable[..., Tensor], torchs: Callable[..., Tensor], tensors: Sequence[Tensor], dtype: torch.dtype, what: str
) -> None:
    """Result and gradients under the tolerance rule, for tensors whose values are already ``dtype``'s."""
    with torch.no_grad():
        shape = torchs(*(t.float() for t in tensors)).shape
    grad = torch.randn(shape).to(dtype)
    exact = gradients(torchs, tensors, grad, torch.float64)
    yardstick = gradients(torchs, tensors, grad, torch.float32)
    for i, (a, e, y) in enumerate(zip(gradients(ours, tensors, grad, dtype), exact, yardstick, strict=True)):
        assert_close(a, e, y.to(dtype), f"{what}, tensor {i}")


# --- convolutions -----------------------------------------------------------------------------------------------------

# (geometry, size of the input, forward, backward)
METHODS = {
    "product": ((20, 24, 4), (1, 1), "product", "product"),
    "product_rectangle": ((20, 24, (3, 2), (2, 1)), (1, 1), "product", "product"),
    "phases": ((24, 16, 4, 2, 1), (3, 4), "phases", "patches"),
    "phases_k3s2p1op1": ((24, 16, 3, 2, 1, 1), (4, 3), "phases", "patches"),
    "phases_k5s3p2": ((16, 12, 5, 3, 2), (3, 4), "phases", "patches"),
    "patches_weight_order": ((128, 6, 4, 2, 1), (2, 3), "aten", "patches"),
    "phases_one_row": ((16, 12, (1, 4), (1, 2), (0, 1)), (1, 7), "phases", "patches"),
    "phases_k4s2p3": ((16, 12, 4, 2, 3), (5, 4), "phases", "patches"),
    "dilated": ((16, 12, 3, 2, 2, 1, 1, 2), (4, 5), "aten", "patches"),
    "merged": ((32, 3, 4, 2, 1), (6, 5), "merged", "patches"),
    "merged_aten": ((32, 3, 4, 2, 1), (6, 5), "merged", "aten"),
    "aten": ((16, 12, 4, 2, 1), (4, 5), "aten", "aten"),
    "columns": ((24, 16, 4, 2, 1), (3, 4), "columns", "columns"),
    "columns_k3s2p1op1": ((24, 16, 3, 2, 1, 1), (4, 3), "columns", "columns"),
    "columns_dilated": ((16, 12, 3, 2, 2, 1, 1, 2), (4, 5), "aten", "columns"),
    "columns_plain": ((24, 16, 4, 2, 1), (6, 9), "columns", "columns"),
    "columns_plain_dilated": ((16, 12, (3, 2), (2, 1), (2, 0), 0, 1, 2), (8, 7), "columns", "columns"),
}


def geometry_of(name: str) -> ConvSpec:
    return ConvSpec.make(*METHODS[name][0], transposed="plain" not in name)


def convolved(x: Tensor, w: Tensor, b: Tensor | None, spec: ConvSpec) -> Tensor:
    """By the way that is forced."""
    how = conv_autograd.ways(spec, tuple(x.shape), x.dtype)
    if not how.contiguous:
        return conv_autograd.convolution(x, w, b, spec)
    return conv_autograd.contiguous_convolution(x, w.contiguous(), b, spec, how)


def force(monkeypatch: pytest.MonkeyPatch, how: Ways) -> list[str]:
    """Make every convolution run this way; returns what has run."""
    ran: list[str] = []
    monkeypatch.setattr(conv_autograd, "ways", lambda *arguments: how)
    monkeypatch.setattr(conv_autograd, "_LEAST", 0)
    for table, name, kind in (
        (conv_autograd._FORWARD, how.forward, "forward"),
        (conv_autograd._BACKWARD, how.backward, "backward"),
    ):

        def spy(*args, real=table[name], text=f"{kind} {name}"):  # type: ignore[no-untyped-def]
            ran.append(text)
            return real(*args)

        monkeypatch.setitem(table, name, spy)
    return ran


def operands(spec: ConvSpec, size: tuple[int, int], dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    fan = math.prod(spec.weight_shape) // spec.out_channels // math.prod(spec.stride) + 1
    x, b = torch.randn(BATCH, spec.in_channels, *size), torch.randn(spec.out_channels)
    w = torch.randn(spec.weight_shape) / math.sqrt(fan)
    if channels_last:
        x, w = x.contiguous(memory_format=CL), w.contiguous(memory_format=CL)
    return [t.to(dtype).float() for t in (x, w, b)]


@packed
@dtypes
@pytest.mark.parametrize("channels_last", [True, False], ids=["CL", "NCHW"])
@pytest.mark.parametrize("name", METHODS)
def test_every_way_equals_torch(
    name: str, channels_last: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, size, forward, backward = METHODS[name]
    spec = geometry_of(name)
    compute = ways(spec, (BATCH, spec.in_channels, *size), dtype).dtype
    # "aten" twice in the dtype itself is no special way: products in float32 make it one.
    compute = torch.float32 if name == "aten" else compute
    if "columns" in name and compute != torch.float32:
        forward = "aten"
        if "plain" in name:
            pytest.skip("columns would be rounded ahead of their sums")
    assert name != "patches_weight_order" or 2 * BATCH * math.prod(size) <= spec.in_channels
    ran = force(monkeypatch, Ways(forward, backward, compute))
    tensors = operands(spec, size, dtype, channels_last)
    compare(
        lambda x, w, b: convolved(x, w, b, spec),
        lambda x, w, b: reference.conv(x, w, b, spec),
        tensors,
        dtype,
        name,
    )
    assert ran == [f"forward {forward}", f"backward {backward}"]


@packed
@pytest.mark.parametrize("name", METHODS)
def test_second_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, size, forward, backward = METHODS[name]
    spec = geometry_of(name)
    force(monkeypatch, Ways(forward, backward, torch.float32))
    tensors = operands(spec, size, torch.float32, True)
    grad = torch.randn(BATCH, spec.out_channels, *spec.output_size(size))

    def by_torch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return reference.conv(x, w, b, spec)

    exact = gradients(by_torch, tensors, grad, torch.float64, second=True)
    yardstick = gradients(by_torch, tensors, grad, torch.float32, second=True)
    ours = gradients(lambda x, w, b: convolved(x, w, b, spec), tensors, grad, torch.float32, second=True)
    for a, e, y in zip(ours, exact, yardstick, strict=True):
        assert_close(a, e, y, name)


@pytest.mark.parametrize("name", ["product", "phases", "merged", "columns", "columns_plain"])
def test_only_the_gradients_that_are_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, size, _, backward = METHODS[name]
    spec = geometry_of(name)
    force(monkeypatch, Ways("aten", backward, torch.float32))
    tensors = operands(spec, size, torch.float32, True)
    full = [t.requires_grad_() for t in operands(spec, size, torch.float32, True)]
    for t, other in zip(full, tensors, strict=True):
        t.data.copy_(other)
    y = convolved(*full, spec)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, full, grad)
    for mask in range(1, 8):
        leaves = [t.detach().clone().requires_grad_(bool(mask >> i & 1)) for i, t in enumerate(tensors)]
        convolved(*leaves, spec).backward(grad)
        for t, e in zip(leaves, expected, strict=True):
            assert (t.grad is None) != t.requires_grad
            assert t.grad is None or torch.equal(t.grad, e)


@pytest.mark.parametrize("channels_last", [True, False], ids=["CL", "NCHW"])
@pytest.mark.parametrize("name", ["product", "phases", "merged_aten", "columns", "columns_plain"])
def test_the_weight_gradient_has_the_strides_of_the_weight(
    name: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, size, _, backward = METHODS[name]
    spec = geometry_of(name)
    if channels_last and backward == "columns":
        pytest.skip("contiguous weights alone")
    # In bfloat16 by way of float32: a way of its own, whatever the rest of the name says.
    force(monkeypatch, Ways("aten", backward, torch.float32))
    x, w, _ = operands(spec, size, torch.float32, channels_last)
    w = w.bfloat16().requires_grad_()
    y = convolved(x.bfloat16(), w, None, spec)
    (dw,) = torch.autograd.grad(y.sum(), w)
    assert dw.stride() == w.stride() and dw.dtype == w.dtype


def test_a_result_may_be_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """No view, and no backward needs it."""
    spec = ConvSpec.make(*METHODS["phases"][0])
    force(monkeypatch, Ways("aten", "patches", torch.float32))
    x, w, b = (t.requires_grad_() for t in operands(spec, (3, 4), torch.float32, True))
    y = convolved(x, w, b, spec)
    expected = torch.autograd.grad(torch.relu(y).sum(), (x, w, b), retain_graph=True)
    found = torch.autograd.grad(torch.relu_(y).sum(), (x, w, b))
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["product", "phases", "merged", "columns", "columns_plain"])
def test_repeats_are_bit_identical(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, size, forward, backward = METHODS[name]
    if onednn.why_missing() is not None and forward == "merged":
        pytest.skip(str(onednn.why_missing()))
    spec = ConvSpec.make(*geometry)
    force(monkeypatch, Ways(forward, backward, torch.float32))
    tensors = operands(spec, size, torch.float32, True)
    grad = torch.randn(BATCH, spec.out_channels, *spec.output_size(size))
    runs = [gradients(lambda *t: convolved(*t, spec), tensors, grad, torch.float32) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@packed
@pytest.mark.parametrize("name", METHODS)
def test_a_nan_stays_a_nan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, size, forward, backward = METHODS[name]
    spec = geometry_of(name)
    force(monkeypatch, Ways(forward, backward, torch.float32))
    tensors = operands(spec, size, torch.float32, True)
    # Inside: at a border, whether a product with a padding's zero counts is a matter of taste.
    tensors[0][0, 0, size[0] // 2, size[1] // 2] = math.nan
    grad = torch.randn(BATCH, spec.out_channels, *spec.output_size(size))
    grad[1, 0, grad.shape[2] // 4 * 2, grad.shape[3] // 4 * 2] = math.nan  # (dilated: odd outputs have no taps)
    expected = gradients(lambda *t: reference.conv(*t, spec), tensors, grad, torch.float64)
    found = gradients(lambda *t: convolved(*t, spec), tensors, grad, torch.float32)
    for a, e in zip(found, expected, strict=True):
        assert e.isnan().any() and a.isnan()[e.isnan()].all()


BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16

# What was measured (docs/facts.md): geometry, x, dtype, instruction set -> the way.
RULES = [
    ((100, 512, 4), (16, 100, 1, 1), FP32, "AMX", ("product", "product", FP32)),
    ((100, 512, 4), (16, 100, 1, 1), BF16, "AVX2", ("product", "product", FP32)),
    ((512, 256, 4, 2, 1), (16, 512, 4, 4), FP32, "AMX", ("phases", "patches", FP32)),
    ((512, 256, 4, 2, 1), (64, 512, 4, 4), FP32, "AMX", ("phases", "patches", FP32)),
    ((512, 256, 4, 2, 1), (64, 512, 4, 4), BF16, "AMX", ("phases", "patches", BF16)),
    ((512, 256, 4, 2, 1), (64, 512, 4, 4), BF16, "AVX512", ("aten", "aten", FP32)),
    ((512, 256, 4, 2, 1), (32, 512, 4, 4), FP32, "AVX512_BF16", ("aten", "patches", FP32)),
    ((512, 256, 4, 2, 1), (64, 512, 4, 4), FP32, "AVX2", ("aten", "patches", FP32)),
    ((1024, 512, 4, 2, 1), (16, 1024, 4, 4), FP32, "AVX512_BF16", ("phases", "patches", FP32)),
    ((256, 128, 4, 2, 1), (16, 256, 8, 8), FP32, "AMX", ("aten", "aten", FP32)),
    ((256, 128, 4, 2, 1), (16, 256, 8, 8), BF16, "AMX", ("aten", "patches", BF16)),
    ((256, 128, 4, 2, 1), (64, 256, 8, 8), BF16, "AMX", ("aten", "patches", BF16)),
    ((256, 128, 4, 2, 1), (2, 256, 8, 8), FP32, "AMX", ("aten", "patches", FP32)),
    ((128, 64, 4, 2, 1), (16, 128, 16, 16), BF16, "AMX", ("aten", "aten", BF16)),
    ((64, 3, 4, 2, 1), (16, 64, 32, 32), FP32, "AMX", ("merged", "aten", FP32)),
    ((64, 3, 4, 2, 1), (16, 64, 32, 32), FP16, "AMX", ("merged", "aten", FP32)),
    ((64, 64, 4, 2, 1, 0, 2), (2, 64, 4, 4), FP32, "AMX", ("aten", "aten", FP32)),
    ((64, 64, 4, 2, 1), (2, 64, 4, 4), FP32, "AMX", ("aten", "patches", FP32)),
    ((64, 64, 4, 2, 1), (1, 64, 4, 4), FP32, "AMX", ("aten", "aten", FP32)),
    ((64, 3, 4, 2, 1), (2, 64, 32, 32), FP32, "AMX", ("aten", "aten", FP32)),
    ((8, 8, 4), (2, 8, 1, 1), FP32, "AMX", ("product", "product", FP32)),
]


@packed
@pytest.mark.parametrize(("geometry", "shape", "dtype", "isa", "expected"), RULES)
def test_the_rule(
    geometry: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    isa: str,
    expected: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conv_autograd, "instruction_set", lambda: InstructionSet[isa])
    monkeypatch.setattr(methods, "cache_bytes", lambda: 2**21)
    assert ways.__wrapped__(ConvSpec.make(*geometry), shape, dtype) == expected


@packed
def test_no_phases_from_a_weight_in_the_default_format_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ConvSpec.make(1024, 512, 4, 2, 1), (16, 1024, 4, 4), FP32, False, True
    for isa, forward in (("AVX512_BF16", "aten"), ("AMX", "phases")):
        monkeypatch.setattr(conv_autograd, "instruction_set", lambda isa=isa: InstructionSet[isa])
        assert ways.__wrapped__(*asked).forward == forward


# geometry, whether it is transposed, x, dtype -> the way of contiguous maps (docs/facts.md)
CONTIGUOUS_RULES = [
    ((1024, 512, 4, 2, 1), True, (1, 1024, 8, 8), FP32, ("columns", "columns", FP32)),
    ((1024, 512, 4, 2, 1), True, (16, 1024, 4, 4), FP32, ("aten", "columns", FP32)),
    ((1024, 512, 4, 2, 1), True, (16, 1024, 8, 8), FP32, None),
    ((1024, 512, 4, 2, 1), True, (1, 1024, 8, 8), BF16, ("aten", "columns", BF16)),
    ((512, 512, 4, 2, 1), False, (1, 512, 16, 16), BF16, None),
    ((1024, 256, 4, 2, 1), True, (1, 1024, 16, 16), FP32, None),
    ((512, 512, 4, 2, 1), False, (1, 512, 16, 16), FP32, ("columns", "columns", FP32)),
    ((512, 512, 4, 2, 1), False, (4, 512, 16, 16), FP32, None),
    ((512, 512, 3, 1, 1), False, (1, 512, 8, 8), FP32, None),
    ((512, 512, 4, 2, 1), False, (1, 512, 16, 16), torch.float64, None),
    ((2048, 2048, 4, 2, 1, 0, 4), False, (1, 2048, 4, 4), FP32, None),
]


@pytest.mark.parametrize(("geometry", "transposed", "shape", "dtype", "expected"), CONTIGUOUS_RULES)
def test_the_rule_of_contiguous_maps(
    geometry: tuple[int, ...],
    transposed: bool,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    expected: tuple[object, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conv_autograd, "instruction_set", lambda: InstructionSet.AVX512_BF16)
    spec = ConvSpec.make(*geometry, transposed=transposed)
    assert contiguous_ways.__wrapped__(spec, shape, dtype) == expected
    assert contiguous_ways.__wrapped__(spec, shape, dtype, True) == (None if dtype == FP32 else expected)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d, None], ids=["batch", "instance", "none"])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
def test_a_weight_that_outweighs_its_maps_meets_columns(
    transposed: bool, norm: Callable[[int], nn.Module] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the middle of a pix2pix U-Net: everything as eager mode has it, in its memory formats."""
    monkeypatch.setattr(columns, "_WEIGHT", 2**10)
    contiguous_ways.cache_clear()
    ran: list[str] = []
    for table, what in ((conv_autograd._FORWARD, "forward"), (conv_autograd._BACKWARD, "backward")):
        real = table["columns"]
        spy = lambda *args, real=real, what=what: ran.append(what) or real(*args)  # type: ignore[func-returns-value]  # noqa: E731
        monkeypatch.setitem(table, "columns", spy)
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    layers = [make(24, 16, 4, 2, 1), *([] if norm is None else [norm(16)]), nn.LeakyReLU(0.2)]
    plain = nn.Sequential(*layers)
    ours = cnnfast.Sequential(*copy.deepcopy(layers))
    kept = torch.randn(1, 24, 4, 4)
    results = []
    for model in (plain, ours, copy.deepcopy(plain).double()):
        dtype = next(model.parameters()).dtype
        x = kept.to(dtype).requires_grad_()
        y = model(x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        found = [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], grad)]
        assert all(t.is_contiguous() for t in found)
        results.append(found)
    assert ran == ["forward", "backward"]
    for yardstick, found, exact in zip(*results, strict=True):
        if exact.abs().max() > 1e-9:  # a bias ahead of a norm
            assert_close(found, exact, yardstick, "")
    with torch.no_grad():
        assert torch.allclose(ours.eval()(kept), plain.eval()(kept), rtol=1e-5, atol=1e-5)
    assert ran == ["forward", "backward"], "without gradients, packed operators"
    contiguous_ways.cache_clear()


@pytest.mark.parametrize(("output_padding", "apart"), [(0, True), (1, False)])
def test_a_bias_that_onednn_adds_element_by_element_is_a_pass(
    output_padding: int, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
        given.append(bias is None)
        return by_torch(x, weight, bias, spec)

    by_torch = reference.conv
    spec = ConvSpec.make(32, 24, 3, 2, 1, output_padding)
    tensors = torch.randn(2, 32, 32, 32), torch.randn(32, 24, 3, 3) / 16, torch.randn(24)
    grad = torch.randn(2, 24, 63 + output_padding, 63 + output_padding)
    want = gradients(lambda x, w, b: reference.conv(x, w, b, spec), tensors, grad, torch.float64)
    yard = gradients(lambda x, w, b: reference.conv(x, w, b, spec), tensors, grad, torch.float32)
    monkeypatch.setattr(reference, "conv", conv)
    got = gradients(lambda x, w, b: conv_autograd.convolution(x, w, b, spec), tensors, grad, torch.float32)
    assert given == [apart]
    for a, e, y in zip(got, want, yard, strict=True):
        assert_close(a, e, y)


def test_float64_is_left_to_aten() -> None:
    spec = ConvSpec.make(100, 512, 4)
    assert ways(spec, (16, 100, 1, 1), torch.float64) == ("aten", "aten", torch.float64)


# --- upsampling + convolution -----------------------------------------------------------------------------------------


def collapsed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    seen: list[bool] = []
    real = training.summed_weight

    def spy(*args):  # type: ignore[no-untyped-def]
        seen.append(True)
        return real(*args)

    monkeypatch.setattr(training, "summed_weight", spy)
    return seen


UPSAMPLES = {
    "x2_3x3": (16, 12, (3, 3), Upsample((2, 2), (1, 1)), 1, (16, 9)),
    "x2_reflect": (16, 12, (3, 3), Upsample((2, 2), (1, 1), "reflect"), 1, (16, 9)),
    "x2_replicate": (16, 12, (3, 3), Upsample((2, 2), (1, 1), "replicate"), 1, (16, 9)),
    "x3x2_5x3_groups": (16, 12, (5, 3), Upsample((3, 2), (2, 1)), 2, (16, 9)),
    "few": (16, 12, (3, 3), Upsample((2, 2), (1, 1)), 1, (3, 4)),
}


@dtypes
@pytest.mark.parametrize("name", UPSAMPLES)
def test_upsampling_and_convolution(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    c_in, c_out, kernel, upsample, groups, size = UPSAMPLES[name]
    step = upsample_step(c_in, c_out, kernel, upsample, groups)
    monkeypatch.setattr(training, "instruction_set", lambda: InstructionSet.AVX2)
    training.collapses.cache_clear()
    seen = collapsed(monkeypatch)
    x, b = torch.randn(2, c_in, *size), torch.randn(c_out)
    w = torch.randn(c_out, c_in // groups, *kernel) / math.sqrt(c_in * math.prod(kernel))
    tensors = [t.to(dtype).float() for t in (x, w, b)]

    def rounded(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        """With the summed weight rounded to the dtype, as the tolerance rule has it."""
        summed = reference.collapse_weight(w, upsample.scale, groups)
        summed = summed + (summed.to(dtype).to(summed.dtype) - summed).detach()
        return reference.conv(step.pad_input(x), summed, b, step.spec)

    def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        x, w = (t.contiguous(memory_format=CL) for t in (x, w))
        return run_reference(step, Operands(x, w, b))

    few = name == "few"
    low = dtype != torch.float32
    compare(
        lambda x, w, b: training.run(step, Operands(x, w, b), True),
        eager if few or not low else rounded,
        tensors,
        dtype,
        name,
    )
    assert bool(seen) != few
    training.collapses.cache_clear()


# --- norms ------------------------------------------------------------------------------------------------------------

NORMS = of_every_kind(Norm("batch", eps=1e-3), Norm("instance"), Norm("group", 3), Norm("affine"))


def normalised(norm: Norm) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """By PyTorch, in NCHW."""

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        if norm.kind == "affine":
            return x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
        if norm.kind == "group":
            return F.group_norm(x, norm.groups, weight, bias, norm.eps)
        function = F.batch_norm if norm.kind == "batch" else F.instance_norm
        return function(x, None, None, weight, bias, True, eps=norm.eps)

    return f


def channels_last(norm: Norm) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """By PyTorch, in channels_last: an image's InstanceNorm is its BatchNorm."""

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous(memory_format=CL)
        if norm.kind == "group":
            return F.group_norm(x, norm.groups, weight, bias, norm.eps)
        if norm.kind == "affine":
            return x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
        parts = x.split(1 if norm.kind == "instance" else len(x))
        return torch.cat([F.batch_norm(part, None, None, weight, bias, True, eps=norm.eps) for part in parts])

    return f


def finish(norm: Norm | None, activation: Activation = Activation(), residual: Tensor | None = None):  # noqa: B008
    def f(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        y = x.contiguous(memory_format=CL).clone(memory_format=CL)
        o = Operands(y, scale=weight, shift=bias, residual=residual)
        return training._finished(norm_step(norm, residual is not None, activation), o)

    return f


def test_a_norm_that_is_not_known_here_is_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "KINDS", (*norms.KINDS, "new"))
    monkeypatch.setattr(norms, "MEASURED", (*norms.MEASURED, "new"))
    o = Operands(torch.randn(1, 12, 32, 32).contiguous(memory_format=CL))
    assert cpu_norm.normalised(Norm("instance"), o) is not None and cpu_norm.normalised(Norm("new"), o) is None


@pytest.mark.parametrize("shape", [(3, 12, 7, 5), (1, 12, 9, 8), (3, 12, 32, 32)], ids=str)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1000.0, 0.1)], ids=["standard", "far"])
def test_norms(name: str, shape: tuple[int, ...], mean: float, deviation: float) -> None:
    x, weight, bias = torch.randn(shape) * deviation + mean, torch.rand(12) + 0.5, torch.randn(12)
    grad = torch.randn(shape).contiguous(memory_format=CL)
    tensors, by_torch = (x, weight, bias), normalised(NORMS[name])
    exact = gradients(by_torch, tensors, grad.contiguous(), torch.float64)
    found = gradients(finish(NORMS[name]), tensors, grad, torch.float32)
    # ATen sums gradients differently in the two formats: eager mode may be off by what either is.
    nchw = gradients(by_torch, tensors, grad.contiguous(), torch.float32)
    last = gradients(channels_last(NORMS[name]), tensors, grad, torch.float32)
    for i, (a, e, *eager) in enumerate(zip(found, exact, nchw, last, strict=True)):
        # Far from zero, only the sums of the gradient itself are right in channels-last.
        yardsticks = eager if not mean or i == 3 else eager[:1]
        worst = max(yardsticks, key=lambda y, e=e: (y.double() - e).norm().item())  # type: ignore[misc]
        assert_close(a, e, worst, f"{name}, tensor {i}")


def test_the_one_pass_formula_would_fail() -> None:
    """What the second attempt of `_group_norm` is for."""
    x = (torch.randn(3, 12, 16, 16) * 0.1 + 1000).contiguous(memory_format=CL)
    expected = F.group_norm(x.double(), 3)
    assert (F.group_norm(x, 3).double() - expected).abs().max() > 1
    assert (finish(Norm("group", 3))(x).double() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("name", ["batch", "instance"])
def test_running_statistics(name: str, mean: float) -> None:
    n = 4 if name == "batch" else 1
    x = torch.randn(n, 6, 32, 32) * 0.1 + mean
    start = torch.randn(6), torch.rand(6)
    expected = tuple(t.double() for t in start)
    found, yardstick = (tuple(t.clone() for t in start) for _ in range(2))
    for _ in range(3):
        for stats in (expected, yardstick):
            F.batch_norm(x.to(stats[0].dtype), *stats, training=True, momentum=0.3)
        o = Operands(x.contiguous(memory_format=CL), mean=found[0], var=found[1], momentum=0.3)
        training._finished(norm_step(Norm(name)), o)
    for a, e, y in zip(found, expected, yardstick, strict=True):
        assert_close(a, e, y)


def test_two_forwards_then_a_backward() -> None:
    """As a discriminator on real and on generated images; the second one has a mean that is far from zero."""
    running = torch.zeros(6), torch.ones(6)
    weight = torch.ones(6, requires_grad=True)
    total = torch.zeros(())
    for mean in (0.0, 1000.0, 0.0):
        x = (torch.randn(4, 6, 8, 8) + mean).contiguous(memory_format=CL)
        o = Operands(x, mean=running[0], var=running[1], scale=weight)
        step = norm_step(Norm("batch"), False, Activation("relu"))
        total = total + training._finished(step, o).square().sum()
    total.backward()
    assert weight.grad is not None and bool(weight.grad.isfinite().all())


@pytest.mark.parametrize("n", [1, 3])
def test_running_statistics_in_use(n: int) -> None:
    x, weight, bias = torch.randn(n, 6, 5, 4), torch.rand(6) + 0.5, torch.randn(6)
    mean, var = torch.randn(6), torch.rand(6) + 0.5
    grad = torch.randn(x.shape).contiguous(memory_format=CL)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        stats = mean.to(x.dtype), var.to(x.dtype)
        o = Operands(x.contiguous(memory_format=CL), None, None, *stats, weight, bias)  # type: ignore[arg-type]
        return training._finished(norm_step(Norm("running")), o)

    def by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x.contiguous(), mean.to(x.dtype), var.to(x.dtype), weight, bias)

    tensors = (x, weight, bias)
    exact = gradients(by_torch, tensors, grad.contiguous(), torch.float64)
    yardstick = gradients(by_torch, tensors, grad.contiguous(), torch.float32)
    for a, e, y in zip(gradients(ours, tensors, grad, torch.float32), exact, yardstick, strict=True):
        assert_close(a, e, y)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(Norm("batch"), (1, 6, 1, 1)), (Norm("instance"), (2, 6, 1, 1)), (Norm("group", 6), (1, 6, 1, 1))],
    ids=lambda v: v.kind if isinstance(v, Norm) else "",
)
def test_too_few_values_raise_as_in_torch(norm: Norm, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Expected more than 1"):
        finish(norm)(torch.randn(shape), torch.ones(6), torch.zeros(6))


def test_a_low_precision_input_with_float32_vectors() -> None:
    x = torch.randn(2, 12, 6, 5).bfloat16()
    for norm in NORMS.values():
        y = finish(norm)(x, torch.rand(12) + 0.5, torch.randn(12))
        assert y.dtype == torch.bfloat16 and bool(y.isfinite().all())


# --- whole steps ------------------------------------------------------------------------------------------------------

ACTS = [
    Activation(),
    Activation("relu"),
    Activation("leaky_relu", (0.2,)),
    Activation("leaky_relu", (-0.2,)),
    Activation("elu", (-1.0,)),
    Activation("silu"),
    Activation("tanh"),
    Activation("hardtanh"),
    Activation("prelu"),
]


def whole(step: Step, norm: Norm | None, channels_last: bool):
    def f(x: Tensor, w: Tensor, b: Tensor, scale: Tensor, shift: Tensor, slope: Tensor, residual: Tensor) -> Tensor:
        s, vectors = slope if step.activation.name == "prelu" else None, (scale, shift) if norm is not None else ()
        o = Operands(x, w, b, None, None, *(vectors or (None, None)), residual, s)
        return training.run(replace(step, norm=norm, residual=True), o, channels_last)

    return f


STEPS = {
    "transposed": plain_step(ConvSpec.make(4, 6, 3, 2, 1, 1)),
    "plain_reflect": plain_step(ConvSpec.make(4, 6, 3, 1, 1, transposed=False), "reflect"),
    "upsample": upsample_step(4, 6, (3, 3), Upsample((2, 2), (1, 1), "replicate")),
}


@pytest.mark.parametrize("act", ACTS, ids=lambda a: "_".join(map(str, (a.name, *a.params))))
@pytest.mark.parametrize("norm", [None, *NORMS.values()], ids=lambda n: "none" if n is None else n.kind)
@pytest.mark.parametrize("threads", [1], indirect=True)
def test_gradcheck(norm: Norm | None, act: Activation) -> None:
    for name, base in STEPS.items():
        step = Step(base.spec, act, base.upsample, base.pad, base.pad_mode)
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        shape = (6, 4, 3, 3) if name != "transposed" else (4, 6, 3, 3)
        w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        vectors = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(4)]
        out = step.output_size((3, 3))
        residual = torch.randn(2, 6, *out, dtype=torch.float64, requires_grad=True)
        f = whole(step, norm, False)
        assert gradcheck(f, (x, w, *vectors, residual), fast_mode=True)
        assert gradgradcheck(f, (x, w, *vectors, residual), fast_mode=True, atol=1e-4)


@dtypes
@pytest.mark.parametrize("channels_last", [True, False], ids=["CL", "NCHW"])
@pytest.mark.parametrize("x_last", [True, False], ids=["xCL", "xNCHW"])
def test_formats_and_dtypes(channels_last: bool, x_last: bool, dtype: torch.dtype) -> None:
    step = Step(ConvSpec.make(16, 12, 4, 2, 1), Activation("relu"))
    x = torch.randn(2, 16, 5, 6).to(dtype, memory_format=CL if x_last else torch.contiguous_format).requires_grad_()
    w = nn.Parameter((torch.randn(16, 12, 4, 4) / 8).to(dtype))
    for norm in (None, Norm("batch")):
        o = Operands(x, w) if norm is None else Operands(x, w, scale=torch.ones(12), shift=torch.zeros(12))
        y = training.run(replace(step, norm=norm), o, channels_last)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=CL if channels_last else torch.contiguous_format)
        x.grad = w.grad = None
        y.square().sum().backward()
        assert x.grad.dtype == w.grad.dtype == dtype and w.grad.stride() == w.stride()


def test_a_large_result_in_nchw() -> None:
    """Beyond the size at which the conversion is done in blocks."""
    step = Step(ConvSpec.make(8, 64, 2, 2), Activation())
    x, w = torch.randn(1, 8, 64, 64), torch.randn(8, 64, 2, 2)
    ours = functools.partial(training.run, step, channels_last=False)
    assert ours(Operands(x, w)).is_contiguous()
    compare(
        lambda x, w: ours(Operands(x, w)),
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
        (x, w),
        torch.float32,
        "64 channels of 128x128",
    )


@packed
@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_weights_are_packed_where_no_gradient_is_needed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(ConvSpec.make(64, 32, 4, 2, 1), Activation("relu"))
    x, w = torch.randn(2, 64, 8, 8), nn.Parameter(torch.randn(64, 32, 4, 4) / 16)
    ran: list[torch.Tensor | None] = []
    real = inference.run
    monkeypatch.setattr(inference, "run", lambda step, o, last: ran.append(real(step, o, last)) or ran[-1])
    step = replace(step, norm=Norm(kind))
    expected = training.run(step, Operands(x, w), True)
    assert not ran and expected.requires_grad
    with torch.no_grad():
        for met in range(2):
            y = training.run(step, Operands(x, w), True)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            assert [done is not None for done in ran] == ([False, True][: met + 1] if kind == "instance" else [])


def test_autocast_does_not_round_products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ConvSpec.make(*METHODS["phases"][0])
    force(monkeypatch, Ways("aten", "patches", torch.float32))
    seen: list[torch.dtype] = []
    monkeypatch.setitem(
        conv_autograd._FORWARD, "aten", lambda x, w, b, s: seen.append(reference.conv(x, w, b, s).dtype) or x
    )
    o = Operands(*(t.bfloat16() for t in operands(spec, (3, 4), torch.float32, True)))
    with torch.autocast("cpu", torch.bfloat16):
        training.run(plain_step(spec), o, True)
    assert seen == [torch.float32]


def test_without_gradients_there_is_no_graph() -> None:
    step = Step(ConvSpec.make(100, 64, 4), Activation("relu"))
    with torch.no_grad():
        y = training.run(step, Operands(torch.randn(2, 100, 1, 1), torch.randn(100, 64, 4, 4)), True)
    assert not y.requires_grad


def test_operands_are_not_written_to() -> None:
    step = Step(ConvSpec.make(16, 6, 1), Activation("relu"))
    tensors = [torch.randn(2, 16, 4, 4), torch.randn(16, 6, 1, 1), torch.randn(6), torch.randn(2, 6, 4, 4)]
    before = [t.clone() for t in tensors]
    x, w, b, residual = tensors
    for norm in (None, *NORMS.values()):
        training.run(replace(step, norm=norm, residual=True), Operands(x, w, b, residual=residual), True)
    assert all(torch.equal(a, e) for a, e in zip(tensors, before, strict=True))


@pytest.mark.parametrize("name", ["batch", "group", "instance"])
def test_norms_of_maps_that_are_flat_for_the_most_part(name: str, one_thread: None) -> None:
    """Of which sums of one value after the other are all rounded alike: ATen's statistics are off by 1e-3."""
    values = torch.rand(4, 1, 64, 64) < 0.1
    x = torch.where(values, torch.randn(4, 8, 64, 64), torch.rand(1, 8, 1, 1) * 2 - 1)
    x = (x / x.std() + 0.5).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(8) + 0.5, torch.randn(8)
    found = []
    for dtype in (torch.float32, torch.float64):
        y, scale, shift = (t.detach().to(dtype).requires_grad_() for t in (x, weight, bias))
        running = (torch.zeros(8, dtype=dtype), torch.ones(8, dtype=dtype)) if name == "batch" else (None, None)
        if dtype == torch.float32:
            o = Operands(y, *(None,) * 2, *running, scale, shift, momentum=0.1)
            z = training._finished(norm_step(Norm(name, 2 if name == "group" else 1)), o)
        elif name == "group":
            z = F.group_norm(y, 2, scale, shift)
        elif name == "batch":
            z = F.batch_norm(y, *running, scale, shift, True)
        else:
            z = F.instance_norm(y, None, None, scale, shift)
        z.sin().mean().backward()
        found.append((z.detach(), *(t for t in running if t is not None), y.grad, scale.grad, shift.grad))
    for k, (ours, exact) in enumerate(zip(*found, strict=True)):
        # The sums of a gradient are ATen's.
        assert (ours - exact).abs().max() <= (2e-5 if k < len(found[0]) - 3 else 2e-4) * exact.abs().max(), k


@pytest.mark.parametrize("name", ["batch", "group", "instance"])
def test_norms_of_many_values_are_differentiated_twice_and_in_batches(name: str, one_thread: None) -> None:
    x, weight, bias = torch.randn(2, 8, 48, 48) + 0.5, torch.rand(8) + 0.5, torch.randn(8)
    found = []
    for dtype in (torch.float32, torch.float64):
        of = x.contiguous(memory_format=torch.channels_last) if dtype == torch.float32 else x
        y, scale, shift = given = [t.detach().to(dtype).requires_grad_() for t in (of, weight, bias)]
        if dtype == torch.float32:
            o = Operands(y, scale=scale, shift=shift, momentum=0.1)
            z = training._finished(norm_step(Norm(name, 2 if name == "group" else 1)), o)
        elif name == "group":
            z = F.group_norm(y, 2, scale, shift)
        else:
            z = (F.instance_norm if name == "instance" else F.batch_norm)(y, None, None, scale, shift, True)
        each = torch.autograd.grad(z, given, torch.stack([z.cos(), z.sin()]), is_grads_batched=True, retain_graph=True)
        first = torch.autograd.grad(100 * z.sin().square().mean(), given, create_graph=True)
        found.append((*each, *first, *torch.autograd.grad(sum((g * g.cos()).sum() for g in first), given)))
    for k, (ours, exact) in enumerate(zip(*found, strict=True)):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max(), k
