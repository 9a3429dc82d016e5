"""PyTorch's own samples and error inputs of batch_norm, instance_norm and group_norm, forward and backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cnnfast
from cnnfast.norms import Norm
from cnnfast.reference import composition
from cnnfast.step import Operands

from ..tolerance import assert_close

pytest.importorskip("expecttest", reason="expecttest, which PyTorch's test suite imports, is not installed")
_frozen = torch.backends.flags_frozen()
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

# PyTorch's test suite forbids setting torch.backends' switches outside a context manager, for the whole process.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = not _frozen

NAMES = ("batch_norm", "instance_norm", "group_norm")
# batch_norm is listed twice, the other time without cuDNN.
OPS = {op.name.rpartition(".")[2]: op for op in reversed(op_db) if op.name in [f"nn.functional.{n}" for n in NAMES]}
LEAST = {"batch_norm": 8, "instance_norm": 8, "group_norm": 15}  # samples


def clone(value: Any, dtype: torch.dtype | None = None, device: Any = None) -> Any:
    """Tensors (in tuples and dictionaries) as leaves of another dtype and device; running statistics as their own."""
    if isinstance(value, Tensor):
        copy = value.detach().to(device or value.device)
        copy = copy.type(dtype) if dtype is not None else copy.clone()
        return copy.clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {k: clone(v, dtype, device) for k, v in value.items()}
    return tuple(clone(v, dtype, device) for v in value) if isinstance(value, tuple | list) else value


def noise(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).type(dtype)


def outcome(
    function: Callable[..., Tensor], call: Any, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """(result, gradients by name, tensors that do not take part in autograd: running statistics) of a call. The
    result's gradient is noise that ``dtype`` holds."""
    x, args, kwargs = call
    y = function(x, *args, **kwargs)
    named = {"input": x, **{str(i): v for i, v in enumerate(args)}, **kwargs}
    tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    leaves = {k: v for k, v in tensors.items() if v.requires_grad}
    grad = noise(y.shape, dtype).type(y.dtype).to(y.device)
    grads = torch.autograd.grad(y, list(leaves.values()), grad, allow_unused=True) if leaves and y.requires_grad else ()
    found = {k: torch.zeros_like(v) if d is None else d for (k, v), d in zip(leaves.items(), grads, strict=False)}
    return y, found, [v for v in tensors.values() if not v.requires_grad]


def bound(name: str, call: Any) -> dict[str, Any]:
    """The arguments of a call by torch's names, defaults too."""
    given = inspect.signature(getattr(torch.nn.functional, name)).bind(call[0], *call[1], **call[2])
    given.apply_defaults()
    return given.arguments


def norm_of(name: str, a: dict[str, Any]) -> Norm:
    measured = a.get("training", a.get("use_input_stats", True))
    return Norm(name.removesuffix("_norm") if measured else "running", a.get("num_groups", 1), a["eps"])


def elementary(name: str) -> Callable[..., Tensor]:
    """The same function in the input's dtype alone: torch's own accumulates float32 in float64 on a CPU, which is no
    yardstick of float32 arithmetic where everything cancels (two values of one channel)."""

    def function(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        a = bound(name, (x, args, kwargs))
        running = a.get("running_mean"), a.get("running_var")
        o = Operands(x, None, None, *running, a["weight"], a["bias"])  # type: ignore[arg-type]
        return composition(norm_of(name, a), o)

    return function


def samples(name: str, dtype: torch.dtype) -> Iterator[Any]:
    for sample in OPS[name].sample_inputs("cpu", dtype, requires_grad=True):
        yield sample.input, sample.args, sample.kwargs


def test_pytorch_has_the_samples() -> None:
    assert sorted(OPS) == sorted(NAMES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    """Result, gradients and running statistics are torch's, strides and dtypes included."""
    count = 0
    for call in samples(name, dtype):
        ours = outcome(getattr(cnnfast.ops, name), clone(call), dtype)
        theirs = outcome(OPS[name], clone(call), dtype)
        for got, want in zip(
            (ours[0], *ours[1].values(), *ours[2]), (theirs[0], *theirs[1].values(), *theirs[2]), strict=True
        ):
            torch.testing.assert_close(got, want)
            assert got.stride() == want.stride()
        assert ours[1].keys() == theirs[1].keys()
        count += 1
    assert count >= LEAST[name]


def test_error_inputs() -> None:
    count = 0
    for name in NAMES:
        if OPS[name].error_inputs_func is None:
            continue
        for error in OPS[name].error_inputs("cpu"):
            sample = error.sample_input
            with pytest.raises(error.error_type, match=error.error_regex):
                getattr(cnnfast.ops, name)(sample.input, *sample.args, **sample.kwargs)
            count += 1
    assert count >= 2


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_samples_on_the_device(
    name: str, dtype: torch.dtype, device: torch.device, launches: list[str], state: Callable[[str], None]
) -> None:
    """Every sample that is not empty runs on the kernels, forward and backward, with as few channels as it has."""
    count = 0
    for call in samples(name, dtype):
        launches.clear()
        if call[0].dim() < 2 or call[2].get("eps", 1) <= 0:
            with pytest.raises(RuntimeError, match="cannot run this"):
                getattr(cnnfast.ops, name)(
                    call[0].to(device), *call[1], **clone(call[2], device=device), backend="triton"
                )
            continue
        y, grads, running = outcome(
            lambda *a, **k: getattr(cnnfast.ops, name)(*a, **k, backend="triton"), clone(call, device=device), dtype
        )
        if call[0].numel():
            assert {"norm-apply", "norm-grad-apply"} <= set(launches)
            count += 1
        exact = outcome(OPS[name], clone(call, torch.float64), dtype)
        yardstick = outcome(elementary(name), clone(call, torch.float32), dtype)
        theirs = outcome(OPS[name], clone(call, torch.float32), dtype)
        what = f"{name} {tuple(call[0].shape)} {call[2]}"
        assert_close(y, exact[0], yardstick[0].type(dtype), what)
        assert grads.keys() == exact[1].keys()
        for key, grad in grads.items():
            assert_close(grad, exact[1][key], yardstick[1][key].type(grad.dtype), f"{what}: {key}")
        for mine, want, yard in zip(running, exact[2], theirs[2], strict=True):
            assert_close(mine, want, yard.type(mine.dtype), f"{what}: running statistics")
    assert count >= LEAST[name] - 4
    state(f"OpInfo on the device: {name}, {str(dtype).removeprefix('torch.')}: {count} samples forward and backward")
