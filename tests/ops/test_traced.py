"""The operator of a step without gradients: schema, fake, and the public functions compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import cnnfast
from cnnfast.activations import Activation
from cnnfast.dispatch import watched
from cnnfast.ops import traced
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step, Upsample, plain_step, upsample_step

from ..cases import fitted
from ..tolerance import assert_close

CASES = {
    "k4s2": (Step(ConvSpec.make(16, 8, 4, 2, 1), Activation("relu")), (2, 16, 5, 6)),
    "op": (Step(ConvSpec.make(4, 6, 3, 2, 1, 1, 2, 1), Activation("leaky_relu", (0.2,))), (1, 4, 3, 4)),
    "reflect": (
        plain_step(ConvSpec.make(4, 8, 3, 2, 1, transposed=False), "reflect", Activation("relu")),
        (2, 4, 5, 6),
    ),
    "plain": (Step(ConvSpec.make(4, 8, 3, 1, 1, transposed=False), Activation("tanh")), (2, 4, 5, 5)),
    "upsample": (upsample_step(8, 8, (3, 3), Upsample((2, 2), (1, 1), "reflect")), (2, 8, 4, 5)),
    "prelu": (Step(ConvSpec.make(4, 8, 2, 2), Activation("prelu")), (2, 4, 5, 5)),
}


def operands(step: Step, shape: tuple[int, ...], requires_grad: bool = False) -> Operands:
    g = torch.Generator().manual_seed(0)
    s = step.spec
    weight_shape = s.weight_shape
    if step.upsample is not None:
        weight_shape = (s.out_channels, s.in_channels // s.groups, 3, 3)

    def rand(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g).requires_grad_(requires_grad)

    c = s.out_channels
    return Operands(
        rand(*shape),
        rand(*weight_shape),
        rand(c),
        mean=torch.randn(c, generator=g),
        var=torch.rand(c, generator=g) + 0.5,
        scale=rand(c),
        shift=rand(c),
        slope=torch.rand(c, generator=g) if step.activation.name == "prelu" else None,
    )


def arguments(step: Step, o: Operands, channels_last: bool) -> tuple[object, ...]:
    step = fitted(step, o)
    recorded: list[tuple[object, ...]] = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(traced, "conv_block_op", lambda *args: recorded.append(args))
        traced.conv_block(step, o, channels_last, "auto")
    return recorded[0]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str, channels_last: bool) -> None:
    step, shape = CASES[case]
    args = arguments(step, operands(step, shape), channels_last)
    torch.library.opcheck(torch.ops.cnnfast.conv_block.default, args)


def test_weight_of_one_dimension() -> None:
    x, w = torch.randn(2, 16, 1, 5), torch.randn(16, 8, 4)
    step = Step(ConvSpec.make(16, 8, 4, 2, 1, ndim=1).as_2d())
    args = arguments(step, Operands(x, w), True)
    torch.library.opcheck(torch.ops.cnnfast.conv_block.default, args)
    want = F.conv_transpose1d(x.squeeze(2), w, None, 2, 1)
    torch.testing.assert_close(torch.ops.cnnfast.conv_block(*args).squeeze(2), want)


def test_derivative_raises() -> None:
    """It has none, and does not hand out a result that is silently detached."""
    step, shape = CASES["k4s2"]
    y = torch.ops.cnnfast.conv_block(*arguments(step, operands(step, shape, requires_grad=True), False))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        y.sum().backward()


def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return cnnfast.ops.conv_transpose2d(x, w, None, 2, 1, activation="relu")


def test_compile_has_no_graph_break() -> None:
    x, w = torch.randn(2, 16, 5, 6), torch.randn(16, 8, 4, 4)
    with torch.no_grad():
        got = torch.compile(function, backend="eager", fullgraph=True)(x, w)
        assert_close(got, F.relu(F.conv_transpose2d(x.double(), w.double(), None, 2, 1)), function(x, w))


def test_compiled_gradient_is_not_lost() -> None:
    x, w = torch.randn(2, 16, 5, 6), torch.randn(16, 8, 4, 4, requires_grad=True)
    y = torch.compile(function, backend="aot_eager", fullgraph=True)(x, w)
    (got,) = torch.autograd.grad(y.sum(), w)
    (want,) = torch.autograd.grad(F.relu(F.conv_transpose2d(x, w, None, 2, 1)).sum(), w)
    torch.testing.assert_close(got, want)


def test_vmap_and_fake_tensors_take_torch_operators() -> None:
    x, w = torch.randn(3, 2, 16, 5, 6), torch.randn(16, 8, 4, 4)
    with torch.no_grad():
        got = torch.vmap(function, (0, None))(x, w)
        want = torch.stack([F.relu(F.conv_transpose2d(v, w, None, 2, 1)) for v in x])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with torch._subclasses.FakeTensorMode():
        fake = function(torch.empty(2, 16, 5, 6), torch.empty(16, 8, 4, 4))
    assert fake.shape == (2, 8, 10, 12)
    assert watched(fake)
