"""The kernels of norm + residual + activation, forward and backward, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from cnnfast.activations import ACTIVATIONS, Activation
from cnnfast.norms import Norm

from ..norm_cases import NormCase, check, of_every_kind

pytest.importorskip("triton", reason="triton is not installed")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NORMS: dict[str, Norm | None] = {
    **of_every_kind(Norm("batch"), Norm("instance", eps=1e-3), Norm("group", 4), Norm("affine")), "none": None,
}  # fmt: skip
TABLE = [Activation(name) for name in ACTIVATIONS] + [Activation("leaky_relu", (-0.3,)), Activation("elu", (-0.5,))]
OFTEN = ("relu", "silu", "prelu")


def table() -> list[object]:
    """Every norm with every activation; those with the usual activations, and the whole table after a batch norm in one
    dtype, in every run of the tests."""
    out = []
    for (kind, norm), activation, dtype in itertools.product(NORMS.items(), TABLE, DTYPES):
        name = activation.name + ("-" if activation.params and activation.params[0] < 0 else "")
        slopes = (20 if kind != "group" else 1) if activation.name == "prelu" else 0
        case = NormCase(f"{kind}-{name}", norm, activation, residual=kind == "none", slopes=slopes)
        often = dtype != "fp16" and activation.name in OFTEN or kind == "batch" and dtype == "fp32"
        marks = [] if often else [pytest.mark.slow]
        out.append(pytest.param(case, DTYPES[dtype], id=f"{case.id}-{dtype}", marks=marks))
    return out


@pytest.mark.parametrize(("case", "dtype"), table())
def test_every_norm_with_every_activation(
    case: NormCase, dtype: torch.dtype, device: torch.device, launches: list[str], poison: None
) -> None:
    check(case, dtype, device, launches)


BATCH, INSTANCE, GROUP = Norm("batch"), Norm("instance"), Norm("group", 2)
RELU, TANH, GELU, PRELU = Activation("relu"), Activation("tanh"), Activation("gelu"), Activation("prelu")
CASES = [
    # residuals: the derivative is taken of the result (relu, tanh) or computed again with the residual (gelu)
    NormCase("residual-relu", BATCH, RELU, residual=True),
    NormCase("residual-tanh", GROUP, TANH, residual=True),
    NormCase("residual-gelu", INSTANCE, GELU, residual=True),
    NormCase("residual-prelu", BATCH, PRELU, residual=True, slopes=1),
    NormCase("residual-identity", GROUP, residual=True),
    NormCase("affine-residual", Norm("affine"), RELU, residual=True),
    # running statistics: constants, but weight and bias have gradients
    NormCase("eval-batch", BATCH, RELU, measured=False),
    NormCase("eval-instance", INSTANCE, GELU, measured=False, residual=True),
    NormCase("eval-plain", BATCH, TANH, measured=False, affine=False),
    NormCase("no-affine", GROUP, GELU, affine=False),
    # layouts
    NormCase("nchw-nchw", BATCH, RELU, x_last=False, y_last=False, residual=True),
    NormCase("nchw-nhwc", GROUP, RELU, x_last=False),
    NormCase("nhwc-nchw", INSTANCE, TANH, y_last=False, residual=True),
    NormCase("nchw-aligned", BATCH, RELU, (2, 24, 4, 8), x_last=False, y_last=False),
    # sizes: one channel, one image, one position, several tiles and parts, groups of one and of many channels
    NormCase("one-channel", BATCH, RELU, (4, 1, 3, 3), affine=False),  # (a single number tells nothing of errors)
    NormCase("one-image", BATCH, RELU, (1, 65, 3, 3)),
    NormCase("one-position", BATCH, RELU, (7, 33, 1, 1)),
    NormCase("one-group", Norm("group", 1), RELU, (2, 40, 3, 3)),
    NormCase("groups-of-one", Norm("group", 6), RELU, (2, 6, 3, 3)),
    NormCase("group-one-position", Norm("group", 2), RELU, (3, 6, 1, 1)),
    NormCase("wide-channels", BATCH, RELU, (2, 300, 2, 2)),
    NormCase("many-rows", BATCH, RELU, (5, 16, 33, 31)),
    NormCase("many-images", INSTANCE, RELU, (37, 3, 4, 4)),
    NormCase("many-rows-nchw", GROUP, RELU, (2, 6, 40, 41), x_last=False, y_last=False),
    # vectors of other dtypes
    NormCase("half-vectors", BATCH, PRELU, slopes=20, vectors=torch.float16),
    NormCase("bfloat16-vectors", GROUP, RELU, vectors=torch.bfloat16),
]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_cases(case: NormCase, dtype: torch.dtype, device: torch.device, launches: list[str], poison: None) -> None:
    check(case, dtype, device, launches)
