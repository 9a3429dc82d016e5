"""`cnnfast.Sequential` and the public operators under `torch.compile`, `torch.export` and functional transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from cnnfast.cpu import packing

from ..tolerance import assert_close

EAGER, AOT, INDUCTOR = "eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def dcgan() -> list[nn.Module]:
    return [
        nn.ConvTranspose2d(20, 32, 4, 1, 0, bias=False), nn.BatchNorm2d(32), nn.ReLU(True),
        nn.Sequential(nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.1)),
        nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh(),
    ]  # fmt: skip


def vocoder() -> list[nn.Module]:
    return [
        nn.Conv1d(8, 16, 7, 1, 3), nn.LeakyReLU(0.1), nn.ConvTranspose1d(16, 8, 8, 4, 2), nn.LeakyReLU(0.1),
        nn.ConvTranspose1d(8, 4, 4, 2, 1), nn.Tanh(),
    ]  # fmt: skip


def decoder() -> list[nn.Module]:
    return [
        nn.Conv2d(8, 16, 3, 1, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(16, 8, 3, 1, 1), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.PReLU(),
    ]  # fmt: skip


MODELS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...], int]] = {
    "dcgan": (dcgan, (2, 20, 1, 1), 3),  # modules, input, operators on a CPU
    "vocoder": (vocoder, (2, 8, 10), 2),
    "decoder": (decoder, (2, 8, 5, 6), 2),
}


# Whether Dynamo compiles anew when a Parameter no longer requires a gradient.
RECOMPILES = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


def model(name: str) -> tuple[cnnfast.Sequential, nn.Sequential, Tensor]:
    """Ours, PyTorch's with the same modules copied, and an input; statistics and affine vectors are no defaults."""
    torch.manual_seed(0)
    make, shape, _ = MODELS[name]
    ours = cnnfast.Sequential(*make())
    for m in ours.modules():
        for tensor_name in ("weight", "bias", "running_mean"):
            t = getattr(m, tensor_name, None)
            if t is not None and t.dim() == 1:
                t.data.uniform_(0.5, 1.5)
    return ours, nn.Sequential(*deepcopy(list(ours))), torch.randn(shape)


class Graphs:
    """A backend that records how many graphs there were, and the operators in each."""

    def __init__(self, backend: str = "eager") -> None:
        self.backend, self.operators = torch._dynamo.lookup_backend(backend), list[list[str]]()

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.operators.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return self.backend(graph, inputs)

    def fused(self) -> int:
        """Our operators in the last graph."""
        return sum("cnnfast." in name for name in self.operators[-1])


def same(got: Tensor, plain: nn.Module, x: Tensor) -> None:
    """``got`` is as close to float64 as eager PyTorch, and laid out as its result."""
    yardstick = plain(x)
    assert got.stride() == yardstick.stride() and got.dtype == yardstick.dtype
    assert_close(got, deepcopy(plain).double()(x.double()), yardstick)


# --- inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [EAGER, AOT, INDUCTOR])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", MODELS)
def test_inference(name: str, channels_last: bool, backend: str) -> None:
    ours, plain, x = model(name)
    ours.eval(), plain.eval()
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        ours.to(memory_format=torch.channels_last), plain.to(memory_format=torch.channels_last)
    graphs = Graphs(backend)
    with torch.no_grad():
        same(torch.compile(ours, backend=graphs, fullgraph=True)(x), plain, x)
    assert len(graphs.operators) == 1 and graphs.fused() == MODELS[name][2]


def test_packed_weights_are_kept() -> None:
    """A compiled model packs each weight once, those of one dimension too: Parameters reach the operator as they
    are."""
    for name in ("dcgan", "vocoder"):
        ours, _, x = model(name)
        run = torch.compile(ours.eval(), backend="aot_eager")
        before = len(packing.PACKS)
        with torch.no_grad():
            run(x)  # meets the weights
            run(x)
            held = len(packing.PACKS)
            run(x)
        assert len(packing.PACKS) == held
        if name == "dcgan":
            assert held > before


@pytest.mark.parametrize("dynamic", [True, None])
def test_dynamic_sizes_compile_once(dynamic: bool | None) -> None:
    ours, plain, _ = model("decoder")
    ours.eval(), plain.eval()
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for k, shape in enumerate([(2, 8, 5, 6), (3, 8, 7, 4), (5, 8, 4, 9), (7, 8, 12, 5)]):
            x = torch.randn(shape)
            if dynamic is None and k == 0:
                for d in (0, 2, 3):
                    torch._dynamo.mark_dynamic(x, d)
            same(compiled(x), plain, x)
    assert len(graphs.operators) == 1 and graphs.fused() == 2


def _eps(m: Any) -> None:
    m[1].eps = 0.3


def _slope(m: Any) -> None:
    m[3][2].negative_slope = 0.7


def _mode(m: Any) -> None:
    m[3][1].train()


def _replaced(m: Any) -> None:
    torch.manual_seed(1)
    m[4] = nn.ConvTranspose2d(16, 3, 3, 2, 1)


def _appended(m: Any) -> None:
    m[3].append(nn.Sigmoid())


def _patched(m: Any) -> None:
    m[5].forward = torch.sigmoid


def _stride(m: Any) -> None:
    m[4].stride = (1, 1)


def _bias(m: Any) -> None:
    m[0].bias = nn.Parameter(torch.ones(32))


def _statistics(m: Any) -> None:
    m[1].running_mean = m[1].running_var = None


CHANGES = [_eps, _slope, _mode, _replaced, _appended, _patched, _stride, _bias, _statistics]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
def test_changes_compile_anew(change: Callable[[Any], None]) -> None:
    ours, plain, x = model("dcgan")
    x = x.expand(2, 20, 2, 2).contiguous()
    ours.eval(), plain.eval()
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    with torch.no_grad():
        before = compiled(x)
        change(ours), change(plain)
        # A norm in training mode moves running statistics at each call: ours once, the yardstick's once.
        got, want = compiled(x), plain(x)
    assert len(graphs.operators) == 2
    assert got.shape != before.shape or not torch.equal(got, before)
    torch.testing.assert_close(got, want)


def test_values_written_in_place_are_seen_without_compiling() -> None:
    ours, plain, x = model("dcgan")
    ours.eval(), plain.eval()
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        for m in (ours, plain):
            m[0].weight.mul_(2)
            m[1].running_mean.add_(1)
            m[3][0].weight.data.neg_()
        same(compiled(x), plain, x)
    assert len(graphs.operators) == 1


def test_a_model_around_it() -> None:
    class Generator(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body, self.scale = body, nn.Parameter(torch.tensor(0.5))

        def forward(self, z: Tensor) -> Tensor:
            return self.body(z[:, :, None, None]) * self.scale

    ours, plain, x = model("dcgan")
    graphs = Graphs()
    with torch.no_grad():
        got = torch.compile(Generator(ours).eval(), backend=graphs, fullgraph=True)(x[:, :, 0, 0])
        torch.testing.assert_close(got, plain.eval()(x) * 0.5)
    assert graphs.fused() == 3


@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
def test_functions(transposed: bool) -> None:
    """On a CPU, a plain convolution is left to Inductor, and a transposed one is the operator."""
    x, w = torch.randn(2, 8, 7, 6), torch.randn(8, 8, 3, 3)

    def f(x: Tensor) -> Tensor:
        function = cnnfast.ops.conv_transpose2d if transposed else cnnfast.ops.conv2d
        return function(x, w, None, 2, 1, activation="relu")

    def plain(x: Tensor) -> Tensor:
        function = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
        return function(x, w.to(x.dtype), None, 2, 1).relu()

    graphs = Graphs()
    with torch.no_grad():
        got = torch.compile(f, backend=graphs, fullgraph=True)(x)
    assert graphs.fused() == transposed
    assert_close(got, plain(x.double()), plain(x))


def test_errors_are_pytorchs() -> None:
    ours, plain, _ = model("dcgan")
    ours.eval(), plain.eval()
    with torch.no_grad():
        for bad in (torch.randn(2, 19, 1, 1), torch.randn(20, 20)):
            with pytest.raises(Exception) as ours_says:
                torch.compile(ours, backend="eager")(bad)
            with pytest.raises(RuntimeError) as plain_says:
                plain(bad)
            assert str(plain_says.value).split("\n")[0][:60] in str(ours_says.value)


# --- training on a CPU: PyTorch's own operators, for Inductor to fuse -------------------------------------------------


@pytest.mark.parametrize("backend", [EAGER, AOT, INDUCTOR])
@pytest.mark.parametrize("name", MODELS)
def test_training(name: str, backend: str) -> None:
    ours, plain, x = model(name)
    x = x.expand(x.shape[0], *x.shape[1:]).clone().requires_grad_()
    graphs = Graphs(backend)
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    optimisers = [torch.optim.SGD(m.parameters(), 0.01) for m in (ours, plain)]
    for _ in range(2):
        for m, optimiser in zip((compiled, plain), optimisers, strict=True):
            optimiser.zero_grad()
            x.grad = None
            m(x).square().mean().backward()
            optimiser.step()
        for (key, ours_has), plain_has in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(ours_has, plain_has, rtol=1e-4, atol=1e-5, msg=key)
    assert len(graphs.operators) == 1 and graphs.fused() == 0
    counts = [int(m.num_batches_tracked) for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(counts) <= {2}


def test_gradient_or_none_compile_apart() -> None:
    """One compiled model serves inference (fused) and gradients in eval mode (not), in any order."""
    ours, plain, x = model("dcgan")
    ours.eval(), plain.eval()
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    with torch.no_grad():
        compiled(x)
    assert graphs.fused() == 3
    y = compiled(x)
    assert graphs.fused() == 0
    got = torch.autograd.grad(y.square().sum(), list(ours.parameters()))
    want = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    for p in ours.parameters():
        p.requires_grad_(False)
    torch.testing.assert_close(compiled(x), y.detach())
    if RECOMPILES:
        assert graphs.fused() == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype: torch.dtype) -> None:
    ours, plain, x = model("dcgan")
    ours.eval(), plain.eval()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        got, want = compiled(x), plain(x)
    assert got.dtype == want.dtype == dtype
    torch.testing.assert_close(got, want)


# --- export, tracing, functional transforms ---------------------------------------------------------------------------


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        ops = cnnfast.ops
        y = ops.conv_transpose2d(x, self.weight, None, 2, 1, activation="relu")
        return ops.upsample_conv2d(y, self.weight[:, :, :3, :3], activation="tanh")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_export(strict: bool, training: bool) -> None:
    """Exported programs hold PyTorch's operators alone: they load and run without cnnfast."""
    ours, plain, x = model("decoder")
    ours.train(training), plain.train(training)
    batch = torch.export.Dim("batch", min=2, max=64)
    for module, reference, given in ((ours, plain, x), (Functions(), None, x)):
        reference = deepcopy(module) if reference is None else reference
        program = torch.export.export(module, (given,), dynamic_shapes=({0: batch},), strict=strict)
        names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert names and not any("cnnfast" in name for name in names)
        more = torch.cat([given, given * 2])
        want = deepcopy(reference).double()(more.double())
        assert_close(program.module()(more), want, reference(more))


def test_jit() -> None:
    ours, plain, x = model("dcgan")
    ours.eval(), plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(ours)(x), plain(x))
        torch.testing.assert_close(torch.jit.trace(ours, (x,))(x), plain(x))


def test_functional_call_compiled() -> None:
    """The tensors given, not the module's own."""
    ours, plain, x = model("dcgan")
    ours.eval(), plain.eval()
    state = {k: v * 1.5 for k, v in ours.state_dict().items()}

    def call(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(ours, state, (x,))

    with torch.no_grad():
        want = torch.func.functional_call(plain, state, (x,))
        torch.testing.assert_close(call(state, x), want)
        torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(state, x), want)


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_transforms(inside: bool) -> None:
    """vmap, grad and jvp, around a compiled model and inside compiled code."""
    ours, plain, x = model("dcgan")
    ours.eval().requires_grad_(False), plain.eval().requires_grad_(False)

    def compiled(f: Callable[..., Any]) -> Any:
        return torch.compile(f, backend="eager")

    f = ours if inside else compiled(ours)
    wrap = compiled if inside else lambda g: g
    xs = torch.stack([x, x * 2])
    torch.testing.assert_close(wrap(lambda v: torch.vmap(f)(v))(xs), torch.stack([plain(v) for v in xs]))
    got = wrap(lambda v: torch.func.grad(lambda u: f(u).square().sum())(v))(x)
    torch.testing.assert_close(got, torch.func.grad(lambda u: plain(u).square().sum())(x))
    if not inside:  # Dynamo cannot trace a batch norm under jvp, PyTorch's own neither
        torch.testing.assert_close(torch.func.jvp(f, (x,), (x + 1,))[1], torch.func.jvp(plain, (x,), (x + 1,))[1])
