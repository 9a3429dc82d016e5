"""What every family of generators is asked: names and shapes, results and gradients, and what is fused."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import cnnfast

from ..tolerance import assert_close

__all__ = ["check", "disturbed", "fused", "same_as_published", "shapes", "unfused"]

# The state (parameters and buffers by name), the input, whether in training mode -> the output.
Reference = Callable[[Mapping[str, Tensor], Tensor, bool], Tensor]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def disturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with vectors and running statistics unlike the initial ones, so that each of them is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if not t.is_floating_point() or t.dim() > 1:
                continue
            noise = torch.rand(t.shape, generator=generator, dtype=t.dtype)
            t.copy_(noise + 0.5 if name.endswith(("weight", "running_var")) else noise - 0.5)
    return model


def containers(model: nn.Module) -> Iterator[nn.Sequential]:
    """The model's `cnnfast.Sequential`s, those in tuples too."""

    def inside(value: Any) -> Iterator[nn.Sequential]:
        if isinstance(value, tuple):
            for item in value:
                yield from inside(item)
        elif isinstance(value, cnnfast.Sequential):
            yield value

    for module in model.modules():
        yield from inside(module)
        for name, value in vars(module).items():
            if name != "_modules":
                yield from inside(value)


def _lines(model: nn.Module) -> list[str]:
    return [line for container in containers(model) for line in container.explain().splitlines()]


def fused(model: nn.Module) -> dict[str, int]:
    """How many steps of which modules run fused."""
    return dict(Counter(line.split(": ", 1)[1][: -len(" fused")] for line in _lines(model) if line.endswith(" fused")))


def unfused(model: nn.Module) -> dict[str, int]:
    """How many modules of which kind run as they stand in a container of the library."""
    return dict(Counter(line.split(": ", 1)[1].split()[0] for line in _lines(model) if not line.endswith(" fused")))


def _gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.detach().clone().requires_grad_()
    result = model(x)
    result.square().mean().backward()
    assert x.grad is not None
    return result.detach(), {"the input": x.grad, **{n: p.grad for n, p in model.named_parameters()}}


def _close(actual: Tensor, exact: Tensor, yardstick: Tensor, what: str, before: float = 0.0) -> None:
    """Within 1e-5 of the largest value, or (where that is nothing but rounding) by the tolerance rule, which is one of
    single layers: in what few channels get of a deep network errors go together."""
    if (actual.double() - exact).abs().max() > 1e-5 * exact.abs().max():
        assert_close(actual, exact, yardstick, what, before)


def check(
    make: Callable[[type[nn.Sequential]], nn.Module], reference: Reference, x: Tensor, training: bool = True
) -> nn.Module:
    """The family's results and gradients in eval mode (and in ``training`` mode, with the buffers that move) against
    ``reference`` in float64 (`_close`, with the same network of ``nn.Sequential`` as the yardstick). Returns the model,
    in eval mode."""
    torch.manual_seed(0)
    ours = disturbed(make(cnnfast.Sequential))
    plain = make(nn.Sequential)
    assert not list(containers(plain)) and list(containers(ours))
    plain.load_state_dict(ours.state_dict(), strict=True)
    for mode in (False, True) if training else (False,):
        a, b = copy.deepcopy(ours).train(mode), copy.deepcopy(plain).train(mode)
        names = dict(a.named_parameters())
        state = {n: t.detach().double().requires_grad_(n in names) for n, t in a.state_dict(keep_vars=True).items()}
        x64 = x.double().requires_grad_()
        exact = reference(state, x64, mode)
        exact.square().mean().backward()
        if not mode:
            with torch.inference_mode():
                for _ in range(3):  # weights are packed when they are met for the second time
                    _close(a(x), exact.detach(), b(x), "in inference")
        result, grads = _gradients(a, x)
        yardstick, plain_grads = _gradients(b, x)
        _close(result, exact.detach(), yardstick, f"training={mode}")
        assert result.stride() == yardstick.stride()
        exact_grads = {"the input": x64.grad, **{name: state[name].grad for name in names}}
        largest = max(grad.abs().max().item() for grad in exact_grads.values())  # on the way to the others
        for name, grad in exact_grads.items():
            _close(grads[name], grad, plain_grads[name], f"the gradient of {name}, training={mode}", largest)
        for (name, t), expected in zip(a.named_buffers(), b.buffers(), strict=True):
            if name in state and t.is_floating_point():
                _close(t, state[name].detach(), expected, f"{name}, training={mode}")
            else:
                assert torch.equal(t, expected), name
    return ours.eval()


def same_as_published(
    ours: nn.Module, theirs: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> None:
    """Names in order, shapes, loading both ways, results and gradients within 1e-5 in float32, in eval mode."""
    assert list(shapes(ours).items()) == list(shapes(theirs).items())
    disturbed(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    found = []
    for model, call in ((ours.eval(), ours), (theirs.eval(), lambda x: run(theirs, x))):
        model.zero_grad()
        mine = x.clone().requires_grad_()
        result = call(mine)
        result.square().mean().backward()
        found.append([result.detach(), mine.grad, *(p.grad for p in model.parameters())])
    names = ("the result", "the input", *(name for name, _ in theirs.named_parameters()))
    for name, actual, expected in zip(names, *found, strict=True):
        error = (actual - expected).abs().max()
        assert error <= 1e-5 * max(1.0, expected.abs().max()), (name, error)
