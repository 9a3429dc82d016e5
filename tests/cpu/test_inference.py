"""The packed CPU path against float64: every method, geometry, activation and format, and the weights it may not keep.

Runs on whatever instruction set oneDNN is allowed (ONEDNN_MAX_CPU_ISA): the dtypes are the same on all of them.
"""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cnnfast.activations import ACTIVATIONS, Activation
from cnnfast.cpu import inference, isa, methods, onednn
from cnnfast.cpu.isa import InstructionSet, Process, instruction_set
from cnnfast.cpu.methods import applicable, by_rule
from cnnfast.cpu.packed import Packed
from cnnfast.cpu.packing import PACKS
from cnnfast.cpu.winograd import Winograd
from cnnfast.norms import Norm
from cnnfast.reference import run_reference
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step

from ..cases import CHANNELS_LAST, CONTIGUOUS, Case, cast, conv, fitted, reference, upsample
from ..tolerance import assert_close

pytestmark = pytest.mark.skipif(onednn.why_missing() is not None, reason=str(onednn.why_missing()))

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# float16 takes float32's way or bfloat16's: where that is all there is to it, two dtypes do.
two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

# The second field is the method that must run, on every instruction set; "" where the rule depends on it.
GEOMETRY = [
    conv("latent", "Projection", 100, 64, 4, size=(1, 1), batch=3),
    conv("latent_padded", "Projection", 32, 16, 5, 2, 2, size=(1, 1)),
    conv("latent_dilated", "Deconvolution", 32, 32, 3, dilation=2, size=(1, 1)),
    conv("latent_rectangle", "Projection", 32, 16, (4, 3), size=(1, 1), batch=1),
    conv("k4s2p1", "Deconvolution", 64, 32, 4, 2, 1, size=(8, 8)),
    conv("k4s2p1_odd", "Deconvolution", 64, 32, 4, 2, 1, size=(5, 7), batch=3),
    conv("k4s2p1_batch1", "Deconvolution", 64, 32, 4, 2, 1, size=(5, 7), batch=1),
    conv("k4s2p3", "Deconvolution", 32, 24, 4, 2, 3, size=(6, 5)),
    conv("k3s2p1op1", "Deconvolution", 48, 24, 3, 2, 1, 1, size=(6, 5)),
    conv("k3s2p1", "Deconvolution", 48, 24, 3, 2, 1, size=(6, 5)),
    conv("k2s3", "Deconvolution", 32, 24, 2, 3, size=(6, 5)),
    conv("k2s2", "Deconvolution", 32, 16, 2, 2, size=(5, 3)),
    conv("k3s1p1", "Deconvolution", 32, 16, 3, 1, 1, size=(7, 6)),
    conv("k5s3p2", "Deconvolution", 32, 16, 5, 3, 2, size=(4, 5)),
    conv("k7s4p1op3", "Deconvolution", 32, 16, 7, 4, 1, 3, size=(4, 3)),
    conv("k5s5", "Deconvolution", 16, 16, 5, 5, size=(3, 4)),
    conv("k1s3", "Deconvolution", 16, 16, 1, 3, size=(3, 4)),
    conv("asymmetric", "Deconvolution", 32, 16, (3, 5), (2, 3), (1, 0), (1, 2), size=(4, 6)),
    conv("row", "Deconvolution", 32, 16, (1, 16), (1, 8), (0, 4), size=(1, 19)),
    conv("dilated_s1", "Deconvolution", 32, 16, 3, 1, 2, dilation=2, size=(6, 5)),
    conv("dilated_s2", "Deconvolution", 32, 16, 3, 2, 1, dilation=2, size=(6, 5)),
    conv("dilated_s3", "Deconvolution", 32, 16, 3, 3, 1, 2, dilation=2, size=(4, 5)),
    conv("groups", "Deconvolution", 32, 48, 4, 2, 1, groups=4, size=(5, 6)),
    conv("depthwise", "Deconvolution", 16, 16, 4, 2, 1, groups=16, size=(5, 6)),
    conv("one_input_channel", "Deconvolution", 1, 32, 4, 2, 1, size=(5, 6)),
    conv("rgb", "Merged", 64, 3, 4, 2, 1, size=(8, 8)),
    conv("rgb_odd", "Merged", 64, 3, 4, 2, 1, size=(5, 7), batch=1),
    conv("rgb_k3s2p1op1", "Merged", 64, 3, 3, 2, 1, 1, size=(6, 5)),
    conv("rgb_k3s2p1", "Merged", 64, 3, 3, 2, 1, size=(6, 5)),
    conv("rgb_k4s2p3", "Merged", 32, 3, 4, 2, 3, size=(6, 5)),
    conv("rgb_k2s2", "Merged", 32, 3, 2, 2, size=(5, 6)),
    conv("rgb_s1", "Deconvolution", 32, 3, 3, 1, 1, size=(5, 6)),
    conv("grey_k5s3p2", "Merged", 32, 1, 5, 3, 2, size=(4, 5), batch=4),
    conv("grey_k5s3p4op2", "Merged", 32, 1, 5, 3, 4, 2, size=(4, 5), batch=4),
    conv("grey_k7s4p1op3", "Merged", 32, 1, 7, 4, 1, 3, size=(4, 3), batch=4),
    conv("grey_dilated", "Deconvolution", 32, 1, 3, 2, 1, dilation=2, size=(6, 5), batch=4),
    conv("grey_dilated_s3", "Merged", 32, 1, 4, 3, 2, dilation=2, size=(6, 5), batch=4),
    conv("wave", "Merged", 32, 1, (1, 16), (1, 8), (0, 4), size=(1, 19)),
    conv("small_map", "", 512, 256, 4, 2, 1, size=(4, 4), batch=8),
    conv("plain", "Convolution", 32, 24, 3, 1, 1, size=(7, 6), transposed=False),
    conv("plain_s2", "Convolution", 32, 24, 3, 2, 1, size=(7, 6), transposed=False),
    conv("plain_dilated", "Convolution", 32, 24, 3, 1, 2, dilation=2, size=(7, 6), transposed=False),
    conv("plain_groups", "Convolution", 32, 24, 3, 1, 1, groups=4, size=(7, 6), transposed=False),
    conv("plain_depthwise", "Convolution", 32, 32, 3, 2, 1, groups=32, size=(7, 6), transposed=False),
    conv("plain_1x1", "Convolution", 32, 24, 1, size=(7, 6), transposed=False),
    conv("plain_rgb", "Convolution", 3, 48, 3, size=(7, 6), batch=1, transposed=False),
    conv("plain_to_rgb", "Convolution", 64, 3, 9, 1, 4, size=(7, 10), transposed=False),
    conv("plain_row", "Convolution", 32, 16, (1, 7), (1, 3), (0, 2), dilation=(1, 2), size=(1, 21), transposed=False),
    conv("plain_k4s2p1", "Convolution", 32, 48, 4, 2, 1, size=(8, 7), transposed=False),
    conv("plain_wide_padding", "Convolution", 16, 24, (1, 3), (1, 2), (2, 4), size=(5, 6), transposed=False),
]

UPSAMPLING = [
    upsample("zeros", "", 32, 16, (3, 3), (2, 2), (1, 1), size=(6, 5)),
    upsample("no_padding", "", 32, 16, (3, 3), (2, 2), (0, 0), size=(6, 5)),
    upsample("replicate", "", 32, 16, (3, 3), (2, 2), (1, 1), "replicate", size=(6, 5)),
    upsample("replicate_k5", "", 32, 16, (5, 5), (2, 2), (2, 2), "replicate", size=(6, 5)),
    upsample("reflect", "", 32, 16, (3, 3), (2, 2), (1, 1), "reflect", size=(6, 5)),
    upsample("x3_by_2", "", 32, 16, (5, 3), (3, 2), (2, 1), size=(4, 5)),
    upsample("x4", "", 32, 16, (3, 3), (4, 4), (1, 1), size=(4, 5), batch=1),
    upsample("groups", "", 32, 16, (3, 3), (2, 2), (1, 1), groups=2, size=(6, 5)),
    upsample("rgb", "Merged", 32, 3, (3, 3), (2, 2), (1, 1), "reflect", size=(6, 5)),
]


def operands(case: Case, dtype: torch.dtype, **changes: Any) -> Operands:
    o = replace(case, **changes).operands(dtype, "cpu")
    return o._replace(weight=nn.Parameter(o.weight))


def compare(case: Case, o: Operands, y: torch.Tensor) -> None:
    exact, yardstick, before = reference(fitted(case.step, o), o, tf32=False)
    what = f"{case.id} {o.x.dtype} {inference.method_name(case.step, o.x.shape, o.x.dtype)}"
    assert_close(y, exact, yardstick, what, before)


def packed(step: Step, o: Operands, channels_last: bool = True) -> torch.Tensor:
    """`cpu.run` of tensors that have been met before."""
    found = (inference.run(step, o, channels_last) for _ in range(3))
    return next(y for y in found if y is not None)


def run(case: Case, o: Operands, channels_last: bool = True) -> torch.Tensor:
    """`cpu.run`, which also takes what `cpu.why_not` rejects for its speed alone."""
    with torch.no_grad():
        y = packed(fitted(case.step, o), o, channels_last)
    assert y.dtype == o.x.dtype
    assert y.is_contiguous(memory_format=CHANNELS_LAST if channels_last else CONTIGUOUS)
    return y


def with_id(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[c.id for c in cases])


@with_id(GEOMETRY)
@dtypes
@pytest.mark.parametrize("norm", [False, True], ids=["bias", "norm"])
def test_geometry(case: Case, dtype: torch.dtype, norm: bool) -> None:
    o = operands(case, dtype, norm=norm)
    compare(case, o, run(case, o))
    if case.regime:
        assert inference.method_name(case.step, o.x.shape, dtype).split()[0] == case.regime


@with_id(UPSAMPLING)
@dtypes
@pytest.mark.parametrize("norm", [False, True], ids=["bias", "norm"])
def test_upsampling(case: Case, dtype: torch.dtype, norm: bool) -> None:
    o = operands(case, dtype, norm=norm)
    compare(case, o, run(case, o))


EPILOGUES = [case for case in GEOMETRY if case.id in ("latent", "k4s2p1_odd", "k3s2p1", "rgb_odd", "plain")]
# Wide enough bounds that the values of a test are not all clamped.
ACTS = [Activation("hardtanh", (-2.0, 3.0)) if n == "hardtanh" else Activation(n) for n in ACTIVATIONS]
ACTS += [Activation("leaky_relu", (0.2,)), Activation("elu", (0.5,)), Activation("hardtanh", (0.0, 6.0))]


@with_id(EPILOGUES)
@two_dtypes
@pytest.mark.parametrize("act", ACTS, ids=lambda a: "_".join(map(str, (a.name, *a.params))))
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_activations(case: Case, dtype: torch.dtype, act: Activation, residual: bool) -> None:
    case = replace(case, step=replace(case.step, activation=act), residual=residual, batch=4)
    o = operands(case, dtype, slopes=case.step.spec.out_channels if act.name == "prelu" else 0)
    compare(case, o, run(case, o))


@with_id(EPILOGUES)
@two_dtypes
@pytest.mark.parametrize("slope", [None, 0.0, -0.5, 2.0, math.inf, math.nan])
def test_one_slope_for_all_channels(case: Case, dtype: torch.dtype, slope: float | None) -> None:
    """It runs on the accumulator as leaky_relu, unless its number makes that something else."""
    case = replace(case, step=replace(case.step, activation=Activation("prelu")), slopes=1)
    o = operands(case, dtype)
    if slope is None or math.isfinite(slope):
        o = o if slope is None else o._replace(slope=torch.full((1,), slope))
        compare(case, o, run(case, o))
        return
    o = o._replace(slope=torch.full((1,), slope, dtype=dtype))
    before = run(replace(case, step=replace(case.step, activation=Activation())), o)
    y, surely = run(case, o), before.abs() > 1e-3  # of zero times infinity, the rounding decides
    expected = torch.nn.functional.prelu(before, o.slope)
    torch.testing.assert_close(y[surely], expected[surely], rtol=0.02, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels", [3, 16, 24, 32, 48])
@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=["even", "odd"])
@dtypes
def test_slopes_of_channels(channels: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Channel counts that are no multiple of a vector take several pixels at once, where these divide."""
    case = conv("slopes", "", 32, channels, 3, 1, 1, size=size, transposed=False, activation="prelu", slopes=channels)
    o = operands(case, dtype)
    compare(case, o, run(case, o))
    compare(case, o, run(case, o, False))


@with_id(EPILOGUES)
@two_dtypes
def test_parts_of_the_epilogue(case: Case, dtype: torch.dtype) -> None:
    """No bias; a norm without affine; scale or shift alone; norm after a bias, with a residual."""
    full = operands(case, dtype, norm=True, residual=True)
    none = {"bias": None, "mean": None, "var": None, "scale": None, "shift": None, "residual": None}
    for keep in (
        (),
        ("mean", "var"),
        ("scale",),
        ("bias", "shift"),
        ("bias", "scale", "shift", "residual"),
        ("bias", "mean", "var", "scale", "shift", "residual"),
    ):
        o = full._replace(**{k: v for k, v in none.items() if k not in keep})
        compare(case, o, run(case, o))


SUMS = [
    (replace(case, residual=True), bias)
    for case in GEOMETRY
    for bias in (True, False)
    if not case.step.spec.transposed and (bias or case.id == "plain")
]
_SUM_ACTS = [Activation(name) for name in ("identity", "relu", "silu", "prelu")]


@pytest.mark.parametrize(("case", "bias"), [pytest.param(c, b, id=f"{c.id}{'' if b else '-no_bias'}") for c, b in SUMS])
@two_dtypes
@pytest.mark.parametrize("act", _SUM_ACTS, ids=lambda a: a.name)
@pytest.mark.parametrize("channels_last", [True, False], ids=["to_nhwc", "to_nchw"])
def test_a_residual_is_added_on_the_accumulator(
    case: Case, bias: bool, dtype: torch.dtype, act: Activation, channels_last: bool, sums: list[bool]
) -> None:
    """Not in 16 bits where products are of float32: then it is of another dtype."""
    case = replace(case, step=replace(case.step, activation=act), bias=bias)
    o = operands(case, dtype, slopes=case.step.spec.out_channels if act.name == "prelu" else 0)
    o = o._replace(residual=o.residual.contiguous(memory_format=CHANNELS_LAST))
    given = o.residual.clone()
    compare(case, o, run(case, o, channels_last))
    assert sums == [inference.products_dtype(dtype, instruction_set()) == dtype] * len(sums) and sums
    assert torch.equal(o.residual, given)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each convolution that was asked to add a residual, whether it did."""
    found: list[bool] = []
    plain = onednn.Convolution.run_adding

    def run_adding(*arguments: Any) -> torch.Tensor | None:
        y = plain(*arguments)
        found.append(y is not None)
        return y

    monkeypatch.setattr(onednn.Convolution, "run_adding", run_adding)
    return found


def test_residuals_that_the_operator_does_not_take(sums: list[bool]) -> None:
    """Another memory format, an expanded or a sliced tensor; the input itself it takes."""
    case = conv("sum", "Convolution", 24, 24, 3, 1, 1, size=(7, 6), transposed=False, residual=True)
    o = operands(case, torch.float32)
    wide = torch.randn(2, 48, 7, 6).contiguous(memory_format=CHANNELS_LAST)
    others = (o.residual, o.residual[:, :, :1, :1].expand_as(o.residual), wide[:, :24], wide[:, ::2])
    for residual in others:
        o = o._replace(residual=residual)
        compare(case, o, run(case, o))
    assert sums and not any(sums)
    sums.clear()
    o = o._replace(residual=o.x)
    compare(case, o, run(case, o))
    assert sums and all(sums)


def test_a_residual_in_three_dimensions(sums: list[bool]) -> None:
    spec = ConvSpec.make(16, 24, 3, 2, 1, transposed=False, ndim=3)
    step, last = Step(spec, Activation("relu"), residual=True), torch.channels_last_3d
    x, residual = torch.randn(2, 16, 5, 6, 7), torch.randn(2, 24, 3, 3, 4).contiguous(memory_format=last)
    o = Operands(x, nn.Parameter(torch.randn(spec.weight_shape) / 20), torch.randn(24), residual=residual)
    with torch.no_grad():
        y = packed(step, o)
        exact, yardstick, before = reference(step, o, tf32=False)
    assert y.is_contiguous(memory_format=last)
    assert_close(y, exact, yardstick, "three dimensions", before)
    assert sums and all(sums)


@pytest.mark.parametrize("shift", ["norm", "bias"])
def test_a_shift_is_not_rounded_for_a_residual(shift: str, sums: list[bool]) -> None:
    """In 16 bits the operator takes a bias of 16 bits: one that the norm was folded into is float32."""
    case = conv("sum", "Convolution", 24, 24, 3, 1, 1, size=(7, 6), transposed=False, residual=True)
    o = operands(case, torch.bfloat16, norm=shift == "norm")
    o = o._replace(residual=o.residual.contiguous(memory_format=CHANNELS_LAST))
    compare(case, o, run(case, o))
    native = inference.products_dtype(torch.bfloat16, instruction_set()) == torch.bfloat16
    assert sums == [native and shift == "bias"] * len(sums) and sums


@with_id(
    [case for case in GEOMETRY if case.id in ("latent", "k4s2p1_odd", "k1s3", "rgb_odd", "wave", "small_map", "plain")]
)
@two_dtypes
@pytest.mark.parametrize("channels_last", [True, False], ids=["to_nhwc", "to_nchw"])
def test_memory_formats(case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    o = operands(case, dtype)
    big = torch.randn(o.x.shape[0], o.x.shape[1] + 3, o.x.shape[2] + 1, o.x.shape[3] * 2, dtype=dtype)
    sliced = big[:, 2:-1, 1:, ::2]
    expanded = o.x[:1].expand_as(o.x)
    for x in (o.x, o.x.contiguous(memory_format=CONTIGUOUS), sliced, expanded, o.x.transpose(2, 3).contiguous().mT):
        o = o._replace(x=x)
        compare(case, o, run(case, o, channels_last))
    o = o._replace(weight=nn.Parameter(o.weight.detach().contiguous(memory_format=CHANNELS_LAST)))
    compare(case, o, run(case, o, channels_last))


@dtypes
def test_large_images_to_nchw(dtype: torch.dtype) -> None:
    """They take a copy of their own."""
    case = conv("large", "", 32, 40, 4, 2, 1, size=(88, 80), batch=2)
    o = operands(case, dtype)
    assert torch.equal(run(case, o, False), run(case, o, True))


# --- each method by itself, wherever it applies -----------------------------------------------------------------------


def methods_for(case: Case) -> list[type[onednn.Method]]:
    spec = case.step.spec
    if not spec.transposed:
        found: list[type[onednn.Method]] = [onednn.Convolution]
    else:
        found = [onednn.Deconvolution, *(m for m in (onednn.Gathered, onednn.Merged) if m.applies(spec))]
    size = [n + 2 * p for n, p in zip(case.size, case.step.pad, strict=True)]
    return [*found, Winograd] if Winograd.applies(spec, (4, spec.in_channels, *size)) else found


@pytest.mark.parametrize(
    ("case", "method"),
    [pytest.param(c, m, id=f"{c.id}-{m.__name__}") for c in GEOMETRY if c.size != (1, 1) for m in methods_for(c)],
)
def test_every_method_that_applies(case: Case, method: type[onednn.Method], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule that chooses is about speed: any method that applies must be right, for any shape."""
    monkeypatch.setattr(inference, "by_rule", lambda *_: method)
    inference._way.cache_clear()
    try:
        for dtype in (torch.float32, torch.bfloat16)[: 1 if method is Winograd else 2]:
            o = operands(case, dtype, batch=4)
            compare(case, o, run(case, o))
            assert inference.method_name(case.step, o.x.shape, dtype).split()[0] == method.__name__
    finally:
        inference._way.cache_clear()


def test_the_rule_of_small_maps() -> None:
    """Matrix products where a weight larger than the cache meets a small map and enough rows."""
    spec = ConvSpec.make(512, 4 * 256, 4, 2, 1)

    def rule(spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype, isa: InstructionSet) -> Any:
        right = [name for name in applicable(spec, shape, dtype, True) if name != "Winograd"]
        return by_rule(spec, shape, dtype, isa, Process(False, 1, False), right)

    assert rule(spec, (16, 512, 4, 4), torch.bfloat16, InstructionSet.AMX) is onednn.Gathered
    assert rule(spec, (1, 512, 4, 4), torch.bfloat16, InstructionSet.AMX) is onednn.Deconvolution
    assert rule(spec, (16, 512, 16, 16), torch.bfloat16, InstructionSet.AMX) is onednn.Deconvolution
    assert rule(spec, (16, 512, 4, 4), torch.float32, InstructionSet.AVX2) is onednn.Deconvolution
    assert rule(spec, (16, 512, 4, 4), torch.float32, InstructionSet.AVX512) is onednn.Gathered
    of_8_mib = ConvSpec.make(512, 256, 4, 2, 1)
    assert rule(of_8_mib, (64, 512, 4, 4), torch.float32, InstructionSet.AVX512_BF16) is onednn.Deconvolution
    assert rule(of_8_mib, (64, 512, 4, 4), torch.float32, InstructionSet.AMX) is onednn.Gathered
    small = ConvSpec.make(64, 32, 4, 2, 1)
    assert rule(small, (16, 64, 4, 4), torch.bfloat16, InstructionSet.AMX) is onednn.Deconvolution


@pytest.mark.parametrize(
    ("isa", "bf16", "fp16"),
    [
        ("AVX2", torch.float32, torch.float32),
        ("AVX512", torch.float32, torch.float32),
        ("AVX512_BF16", torch.bfloat16, torch.float32),
        ("AMX", torch.bfloat16, torch.float32),
        ("AMX_FP16", torch.bfloat16, torch.float16),
    ],
)
def test_dtype_of_the_products(isa: str, bf16: torch.dtype, fp16: torch.dtype) -> None:
    level = InstructionSet[isa]
    assert inference.products_dtype(torch.float32, level) == torch.float32
    assert inference.products_dtype(torch.bfloat16, level) == bf16
    assert inference.products_dtype(torch.float16, level) == fp16


@pytest.mark.parametrize("name", ["AVX2", "avx512_core", "AVX512_CORE_BF16", "ALL", "DEFAULT", "nonsense"])
def test_the_limit_of_the_instruction_set_is_honoured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"AVX2": "AVX2", "avx512_core": "AVX512", "AVX512_CORE_BF16": "AVX512_BF16"}
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    detect = instruction_set.__wrapped__
    processor = detect()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", name)
    assert detect() == min(processor, InstructionSet[expected.get(name, "AMX_FP16")])


@pytest.mark.parametrize(
    ("limit", "tiles", "found", "full"),
    [
        pytest.param("AVX512", False, ("GenuineIntel", "6", "106"), True, id="Ice Lake, server"),
        pytest.param("AMX", True, ("GenuineIntel", "6", "143"), True, id="Sapphire Rapids"),
        pytest.param("AVX2", True, ("GenuineIntel", "6", "143"), False, id="limited"),
        pytest.param("AVX512", False, ("GenuineIntel", "6", "140"), False, id="Tiger Lake"),
        pytest.param("AVX512", True, ("GenuineIntel", "6", "167"), True, id="a model of another name"),
        pytest.param("AVX512_BF16", False, ("AuthenticAMD", "25", "17"), False, id="Zen 4"),
        pytest.param("AVX512_BF16", False, ("AuthenticAMD", "26", "2"), True, id="Zen 5"),
        pytest.param("AVX512", False, (), True, id="nothing told"),
    ],
)
def test_full_width(
    limit: str, tiles: bool, found: tuple[str, ...], full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isa, "instruction_set", lambda: InstructionSet[limit])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(isa, "_cpuinfo", lambda _: found)
    assert isa.full_width.__wrapped__() is full


# --- reasons ----------------------------------------------------------------------------------------------------------

PLAIN = next(case for case in GEOMETRY if case.id == "k4s2p1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda o: o._replace(weight=o.weight.data.clone()), "not an nn.Parameter", id="temporary"),
        pytest.param(lambda o: o._replace(x=o.x[:0]), "is empty", id="empty_batch"),
        pytest.param(lambda o: o._replace(x=o.x[:, :, :0]), "is empty", id="empty_rows"),
        pytest.param(lambda o: o._replace(x=o.x[:, :5]), "does not fit", id="channels"),
        pytest.param(
            lambda o: o._replace(weight=nn.Parameter(o.weight.half())), "the weight torch.float16", id="mixed_dtypes"
        ),
        pytest.param(
            lambda o: o._replace(x=o.x.double(), weight=nn.Parameter(o.weight.double())), "no packed", id="float64"
        ),
        pytest.param(lambda o: o._replace(x=o.x.to_sparse()), "not a dense tensor", id="layout"),
    ],
)
def test_why_not(change: Any, reason: str) -> None:
    assert reason in str(inference.why_not(PLAIN.step, change(operands(PLAIN, torch.float32))))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (conv("groups", "", 64, 64, 4, 2, 1, groups=4, size=(32, 32)), "grouped"),
        (conv("dilated", "", 64, 64, 3, 2, 1, dilation=2, size=(32, 32)), None),
        (conv("dilated_s3", "", 64, 64, 4, 3, 2, dilation=2, size=(32, 32)), None),
        (conv("gaps", "", 64, 64, 2, 3, size=(32, 32)), None),
        (conv("odd", "", 64, 64, 3, 2, size=(32, 32)), None),
        (conv("even", "", 64, 64, 3, 2, 1, 1, size=(32, 32)), None),
        (conv("padded", "", 64, 64, 3, 1, 1, 1, dilation=2, size=(32, 32)), "output padding reaches the stride"),
        (conv("tiny", "", 16, 16, 4, 2, 1, size=(4, 4)), "too few"),
        (conv("small_for_aten", "", 128, 64, 3, 2, 1, 1, size=(8, 8), batch=1), "too few"),
        (conv("batch2", "", 128, 64, 3, 2, 1, 1, size=(8, 8), batch=2), None),
        (conv("dcgan", "", 512, 256, 4, 2, 1, size=(4, 4), batch=1), None),
        (conv("head", "", 64, 3, 4, 2, 1, size=(32, 32), batch=1), None),
        (upsample("upsample", "", 16, 16, (3, 3), (2, 2), (1, 1), groups=2, size=(4, 4)), None),
    ],
    ids=lambda v: v.id if isinstance(v, Case) else "",
)
def test_aten_where_it_is_as_fast(case: Case, reason: str | None) -> None:
    found = inference.why_not(case.step, operands(case, torch.float32))
    assert found is None if reason is None else reason in str(found)


ODD = conv("odd", "", 64, 64, 3, 2, 1, size=(32, 32))


@pytest.mark.parametrize(
    ("case", "apart"),
    [
        (ODD, True),
        (conv("gaps", "", 64, 64, 2, 3, size=(8, 8)), True),
        (conv("dilated", "", 64, 64, 3, 2, 2, 1, dilation=2, size=(8, 8)), True),
        (conv("groups", "", 64, 64, 4, 2, 1, groups=4, size=(8, 8)), True),
        (conv("even", "", 64, 64, 3, 2, 1, 1, size=(8, 8)), False),
        (conv("dilated_s1", "", 64, 64, 3, 1, 2, dilation=2, size=(8, 8)), False),
    ],
    ids=lambda v: v.id if isinstance(v, Case) else "",
)
def test_nothing_is_added_element_by_element(case: Case, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By oneDNN's deconvolution, which takes several times as long for that as for its products."""
    case = replace(case, step=replace(case.step, activation=Activation("relu")))
    method = onednn.Deconvolution(case.step.spec, (2, 64, *case.size), torch.float32)
    given: list[tuple[Any, ...]] = []

    def op(*args: Any) -> torch.Tensor:
        given.append(args)
        return operator(*args)

    operator = method.op
    monkeypatch.setattr(method, "op", op)
    o = operands(case, torch.float32)
    x = o.x.contiguous(memory_format=CHANNELS_LAST)
    y = method.run(x, method.pack(o.weight, o.bias), onednn.post_op(case.step.activation), True)
    (_, _, shift, *_, attr, _, _), *_ = given
    assert (shift is None, attr) == ((True, "none") if apart else (False, "relu"))
    assert method.takes_post is not apart
    torch.testing.assert_close(y.relu(), run_reference(case.step, o), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_without_a_bias_atens_deconvolution_is_as_fast(bias: bool) -> None:
    """But for a weight that it would bring into oneDNN's layout on every call."""
    o = operands(ODD, torch.float32)
    o = o if bias else o._replace(bias=None)
    assert (inference.why_not(ODD.step, o) is None) is bias
    assert (inference.why_slower_transposed(ODD.step, tuple(o.x.shape), torch.float32, bias=bias) is None) is bias
    small = conv("small", "", 512, 256, 3, 2, 1, size=(4, 4))
    o = operands(small, torch.float32)
    assert inference.why_not(small.step, o if bias else o._replace(bias=None)) is None


def plain(id: str, c_in: int, c_out: int, k: int, *args: int, size: tuple[int, int], **rest: Any) -> Case:
    return conv(id, "", c_in, c_out, k, *args, size=size, transposed=False, **{"batch": 1, **rest})


# (case, dtype, instruction set, in NCHW, a part of the reason or None): what was measured, see docs/facts.md.
PLAIN_RULES: list[tuple[Case, torch.dtype, str, bool, str | None]] = [
    (plain("leaky", 64, 64, 3, 1, 1, size=(128, 128), activation="leaky_relu"), torch.float32, "AMX", False, None),
    (plain("leaky", 64, 64, 3, 1, 1, size=(127, 128), activation="leaky_relu"), torch.float32, "AMX", False, "a pass"),
    (plain("leaky", 24, 24, 3, 1, 1, size=(64, 64), activation="leaky_relu"), torch.bfloat16, "AMX", False, None),
    (plain("leaky", 16, 16, 3, 1, 1, size=(64, 64), activation="leaky_relu"), torch.bfloat16, "AMX", False, "a pass"),
    (plain("nothing", 24, 24, 3, 1, 1, size=(64, 64), activation="identity"), torch.bfloat16, "AMX", False, None),
    (
        plain("slopes", 64, 64, 3, 1, 1, size=(96, 96), activation="prelu", slopes=64),
        torch.bfloat16,
        "AMX",
        False,
        "a pass",
    ),
    (plain("tanh", 64, 3, 7, 1, 3, size=(600, 600), activation="tanh"), torch.float32, "AVX2", False, None),
    (plain("tanh_little", 64, 3, 7, 1, 3, size=(64, 64), activation="tanh"), torch.float32, "AMX", False, "a pass"),
    (plain("strided", 64, 128, 4, 2, 1, size=(96, 96), activation="silu"), torch.bfloat16, "AMX", False, None),
    (plain("norm", 64, 64, 3, 1, 1, size=(91, 91), norm=True), torch.float32, "AMX", False, None),
    (plain("relu", 64, 64, 3, 1, 1, size=(64, 64)), torch.float32, "AMX", False, "a pass"),
    (plain("relu_wider", 3, 64, 3, 1, 1, size=(132, 132)), torch.float32, "AMX", False, None),
    (plain("relu_16_bits", 64, 64, 3, 1, 1, size=(90, 120)), torch.bfloat16, "AMX", False, None),
    (plain("nothing", 64, 64, 3, 1, 1, size=(64, 64), activation="identity"), torch.float32, "AMX", False, "a pass"),
    (plain("weight", 512, 512, 3, 1, 1, size=(16, 16), activation="identity"), torch.float32, "AMX", True, None),
    (plain("weight_small", 96, 96, 3, 1, 1, size=(16, 16), activation="silu"), torch.float32, "AMX", False, "a pass"),
    (
        plain("slopes", 64, 64, 3, 1, 1, size=(64, 64), activation="prelu", slopes=64),
        torch.float32,
        "AMX",
        False,
        "a pass",
    ),
    (plain("slope", 64, 64, 3, 1, 1, size=(128, 128), activation="prelu", slopes=1), torch.float32, "AMX", False, None),
    (plain("nchw", 64, 64, 3, 1, 1, size=(90, 120), norm=True), torch.float32, "AMX", True, "conversions to channels"),
    (plain("nchw_bf16", 64, 64, 3, 1, 1, size=(180, 320), norm=True), torch.bfloat16, "AMX", True, None),
    (
        plain("nchw_bf16", 64, 64, 3, 1, 1, size=(180, 320), norm=True),
        torch.bfloat16,
        "AVX512_BF16",
        True,
        "conversions",
    ),
    (plain("nchw_rgb", 64, 3, 9, 1, 4, size=(256, 256), activation="tanh"), torch.bfloat16, "AMX", True, "conversions"),
    (plain("nchw_from_rgb", 3, 64, 3, 1, 1, size=(180, 320)), torch.bfloat16, "AMX", True, None),
    (plain("nchw_rgb_avx2", 64, 3, 9, 1, 4, size=(64, 64), activation="identity"), torch.float32, "AVX2", True, None),
    (plain("nchw_rgb", 64, 3, 9, 1, 4, size=(64, 64), activation="tanh"), torch.float32, "AVX512", True, "conversions"),
    (plain("nchw_1x1", 64, 64, 1, size=(256, 256), activation="silu"), torch.bfloat16, "AMX", True, "conversions"),
    (plain("wide", 64, 64, 3, 1, 1, size=(64, 64), activation="identity"), torch.bfloat16, "AVX512", True, None),
    (plain("half", 64, 64, 3, 1, 1, size=(64, 64), activation="identity"), torch.float16, "AMX", True, None),
    (plain("half_1x1", 64, 64, 1, size=(64, 64), activation="silu"), torch.float16, "AMX", False, "to float32"),
    (plain("tiny", 16, 16, 3, 1, 1, size=(8, 8), activation="silu", batch=4), torch.bfloat16, "AMX", False, "too few"),
    (plain("small", 64, 64, 3, 1, 1, size=(16, 16), activation="silu"), torch.float32, "AMX", False, "too few"),
    (plain("batch", 64, 64, 3, 1, 1, size=(16, 16), activation="silu", batch=64), torch.float32, "AMX", False, None),
]


@pytest.mark.parametrize(
    ("case", "dtype", "isa", "nchw", "reason"),
    [pytest.param(*row, id=f"{row[0].id}-{row[2]}-{DTYPE_NAMES[row[1]]}") for row in PLAIN_RULES],
)
def test_the_rule_of_plain_convolutions(
    case: Case, dtype: torch.dtype, isa: str, nchw: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "instruction_set", lambda: InstructionSet[isa])
    monkeypatch.setattr(methods, "winograd_gain", lambda *_: 1.0)  # a rule of its own: test_winograd
    clear = (inference._why_slower_plain.cache_clear, inference._way.cache_clear)
    for cleared in clear:
        cleared()
    shape = torch.Size((case.batch, case.step.spec.in_channels, *case.size))
    try:
        found = inference.why_slower_plain(case.step, shape, dtype, norm=case.norm, slopes=case.slopes, nchw=nchw)
    finally:
        for cleared in clear:
            cleared()
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("channels", "threads", "full_width", "weight_last", "nchw", "gains"),
    [
        (64, 2, False, False, False, True),
        (64, 2, True, False, False, False),
        (128, 2, True, False, False, True),
        (64, 1, False, False, False, False),
        (64, 2, False, True, False, False),
        (64, 2, False, False, True, False),
        (32, 2, False, False, False, False),
    ],
)
def test_several_threads_pack_a_contiguous_weight(
    channels: int,
    threads: int,
    full_width: bool,
    weight_last: bool,
    nchw: bool,
    gains: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ATen brings it into channels-last and that into oneDNN's layout, on one thread, while the others wait."""
    monkeypatch.setattr(methods, "winograd_gain", lambda *_: 1.0)
    now = Process(False, threads, full_width)
    monkeypatch.setattr(inference, "process", lambda: now)
    clear = (inference._why_slower_plain.cache_clear, inference._way.cache_clear)
    step = Step(ConvSpec(False, channels, channels, (3, 3), (1, 1), (1, 1), (0, 0), (1, 1)), Activation("prelu"))
    for cleared in clear:
        cleared()
    try:
        shape = (1, channels, 96, 96)
        given = {"norm": False, "slopes": channels, "nchw": nchw, "weight_last": weight_last}
        found = inference.why_slower_plain(step, shape, torch.float32, **given)  # type: ignore[arg-type]
    finally:
        for cleared in clear:
            cleared()
    assert (found is None) is gains, found


def test_why_not_asks_the_rule_of_plain_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "winograd_gain", lambda *_: 1.0)
    inference._way.cache_clear()
    inference._why_slower_plain.cache_clear()
    case = plain("facts", 64, 64, 3, 1, 1, size=(128, 128), activation="prelu")
    step, o = case.step, operands(replace(case, slopes=1), torch.float32)
    assert inference.why_not(step, o) is None
    assert "a pass" in str(inference.why_not(step, o._replace(slope=torch.rand(64))))
    o = o._replace(x=o.x.contiguous())
    assert inference.why_not(step, o) is None and "conversions" in str(inference.why_not(step, o, channels_last=False))
    normed = operands(replace(case, slopes=64, norm=True), torch.float32)
    assert inference.why_not(fitted(step, normed), normed) is None
    bare = normed._replace(mean=None, var=None, scale=None, shift=None)
    assert "a pass" in str(inference.why_not(step, bare))


def test_why_not_without_onednn() -> None:
    o = operands(PLAIN, torch.float32)
    with torch.backends.mkldnn.flags(enabled=False):
        assert "switched off" in str(inference.why_not(PLAIN.step, o))


def test_an_output_that_is_too_small_has_a_reason() -> None:
    case = conv("small", "", 8, 8, 2, 1, 1, size=(1, 1))
    o = operands(replace(case, residual=False), torch.float32)
    assert "too small" in str(inference.why_not(case.step, o))
    with pytest.raises(ValueError, match="too small"):
        inference.run(case.step, o, True)


# --- what must not be lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, row in ACTIVATIONS.items() if row.onednn is not None])
def test_the_row_says_what_onednn_makes_of_nan(name: str) -> None:
    activation = Activation(name)
    spec = ConvSpec.make(16, 16, 3, padding=1, transposed=False)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    method = onednn.Convolution(spec, tuple(x.shape), torch.float32)
    packed_weight = method.pack(torch.full(spec.weight_shape, math.nan), None)
    assert (
        not method.run(x, packed_weight, onednn.post_op(activation), True).isnan().any()
    ) == activation.row.loses_nan


@dtypes
@with_id(EPILOGUES)
@pytest.mark.parametrize("where", ["weight", "bias", "x"])
@pytest.mark.parametrize(
    "act",
    [Activation("relu"), Activation("hardtanh"), Activation("leaky_relu", (0.0,)), Activation("leaky_relu", (0.1,))],
    ids=lambda a: "_".join(map(str, (a.name, *a.params))),
)
def test_a_nan_stays_a_nan(case: Case, dtype: torch.dtype, where: str, act: Activation) -> None:
    """oneDNN's own relu and clip would turn it into a number."""
    o = operands(case, dtype)
    tensor = getattr(o, where)
    # The middle tap of a plain convolution meets no padding (0 * NaN is a matter of taste).
    middle = where == "weight" and not case.step.spec.transposed
    tensor.data[(0, 0, 1, 1) if middle else (0,) * tensor.dim()] = math.nan
    step = replace(case.step, activation=act)
    with torch.no_grad():
        y = packed(step, o)
        expected = run_reference(step, cast(o, torch.float64)).isnan()
    assert expected.any() and y.isnan()[expected].all()


def test_operands_are_not_written_to() -> None:
    for case in EPILOGUES:
        o = operands(case, torch.float32, norm=True, residual=True)
        before = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in o]
        run(case, o)
        for a, b in zip(o, before, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        identity = Step(replace(case.step.spec), Activation())
        x = o.x.clone()
        y = packed(identity, o._replace(x=x))
        y.add_(1)
        assert torch.equal(x, o.x), "the result is no view of the input"


# --- weights that change ----------------------------------------------------------------------------------------------


@two_dtypes
@with_id(EPILOGUES)
def test_every_change_of_the_operands_is_seen(case: Case, dtype: torch.dtype) -> None:
    o = operands(case, dtype, norm=True)
    compare(case, o, run(case, o))
    for name in ("weight", "bias", "mean", "var", "scale", "shift"):
        tensor = getattr(o, name)
        version = tensor._version
        tensor.data.mul_(1.5)
        assert tensor._version == version
        compare(case, o, run(case, o))
    step = replace(case.step, norm=Norm("running", eps=1.0))
    with torch.no_grad():
        exact, yardstick, before = reference(step, o, tf32=False)
        assert_close(packed(step, o), exact, yardstick, case.id, before)


def test_batch_sizes_share_a_pack_and_a_second_call_packs_nothing() -> None:
    case = replace(PLAIN, norm=True)
    o = operands(case, torch.float32)
    gc.collect()  # what models of other tests left
    packs = len(PACKS)
    for batch in (1, 2, 4, 2, 1):
        run(case, o._replace(x=torch.randn(batch, *o.x.shape[1:])))
    assert len(PACKS) - packs <= 2, "the layout of a weight may differ for batch 1, not for every batch"


def test_a_parameter_of_inference_mode() -> None:
    with torch.inference_mode():
        o = operands(PLAIN, torch.float32)
        o = o._replace(weight=nn.Parameter(o.weight.clone(), requires_grad=False))
        assert o.weight.is_inference() and inference.why_not(PLAIN.step, o) is None
        compare(PLAIN, o, run(PLAIN, o))
        o.weight.mul_(2)
        compare(PLAIN, o, run(PLAIN, o))


def test_inference_mode_and_no_grad_share_a_pack() -> None:
    o = operands(PLAIN, torch.float32)
    with torch.inference_mode():
        first = packed(PLAIN.step, o)
    gc.collect()  # what models of other tests left
    packs = len(PACKS)
    with torch.no_grad():
        second = packed(PLAIN.step, o)
    assert torch.equal(first, second) and len(PACKS) == packs
    assert not second.requires_grad


def test_a_pack_that_is_dropped_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the next collection of garbage: packs are as large as weights. The calls that it keeps stay few."""
    kept: list[Packed] = []
    keep = Packed.keep
    monkeypatch.setattr(Packed, "keep", lambda self, *rest: kept.append(self) or keep(self, *rest))
    step = Step(ConvSpec.make(16, 16, 3, 1, 1, transposed=False))
    weight = nn.Parameter(torch.randn(16, 16, 3, 3))
    with torch.no_grad():
        for height in range(9, 45):
            x = torch.randn(1, 16, height, 9).contiguous(memory_format=torch.channels_last)
            for _ in range(2):
                inference.run(step, Operands(x, weight), True)
    assert len(kept) == 36 and max(len(pack.calls) for pack in kept) <= 16
    gone = [weakref.ref(pack.weight[0]) for pack in kept]  # type: ignore[index]
    gc.collect()
    gc.disable()
    try:
        kept.clear()
        PACKS.invalidate(weight)
        assert not any(ref() is not None for ref in gone)
    finally:
        gc.enable()
