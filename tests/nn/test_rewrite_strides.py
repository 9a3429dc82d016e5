"""Strides that `rewrite_strides` tells are those that ATen gives."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from cnnfast.memory_format import format_of
from cnnfast.nn.rewrite_strides import is_mistold, iterated, lies, rearranges

# Dimensions that they take, where not any.
OF_MAPS: dict[str, list[int]] = {
    **dict.fromkeys(("pad by reflection", "pad by edges", "pad around", "channel_shuffle"), [3, 4, 5]),
    **dict.fromkeys(("einsum of two", "einsum by channels"), [4]),
}


def positions(a: fx.Node) -> int:
    """How many dimensions a map has beside its images and channels."""
    return a.meta["example_value"].dim() - 2


ONE: dict[str, Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]] = {
    **{
        name: lambda g, a, b, f=f: g.call_function(f, (a,))
        for name, f in {
            "relu": F.relu,
            "gelu": F.gelu,
            "silu": F.silu,
            "mish": F.mish,
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
            "elu": F.elu,
            "leaky_relu": F.leaky_relu,
            "hardswish": F.hardswish,
            "hardsigmoid": F.hardsigmoid,
            "softplus": F.softplus,
            "celu": F.celu,
            "selu": F.selu,
            "tanhshrink": F.tanhshrink,
            "neg": operator.neg,
            "abs": torch.abs,
            "square": torch.square,
            "sqrt": torch.sqrt,
            "rsqrt": torch.rsqrt,
            "exp": torch.exp,
            "log": torch.log,
            "sin": torch.sin,
            "cos": torch.cos,
            "erf": torch.erf,
            "reciprocal": torch.reciprocal,
            "clone": torch.clone,
            "detach": torch.detach,
            "normalize": F.normalize,
            "mean": torch.mean,
        }.items()
    },
    "pow": lambda g, a, b: g.call_function(operator.pow, (a, 2)),
    "relu in place": lambda g, a, b: g.call_function(F.relu, (a,), {"inplace": True}),
    "tanh in place": lambda g, a, b: g.call_method("tanh_", (a,)),
    "pow of two": lambda g, a, b: g.call_function(operator.pow, (a, b)),
    "threshold": lambda g, a, b: g.call_function(F.threshold, (a, 0.1, 2.0)),
    "clamp": lambda g, a, b: g.call_method("clamp", (a, 0, 1)),
    "clamp by tensors": lambda g, a, b: g.call_method("clamp", (a, b)),
    "scaled": lambda g, a, b: g.call_function(operator.mul, (a, 0.5)),
    "scaled from the left": lambda g, a, b: g.call_function(operator.mul, (0.5, a)),
    "shifted": lambda g, a, b: g.call_function(operator.add, (a, 1)),
    "divided": lambda g, a, b: g.call_function(operator.truediv, (a, 2.0)),
    "taken from": lambda g, a, b: g.call_function(torch.rsub, (a, 1)),
    "added": lambda g, a, b: g.call_function(operator.add, (a, b)),
    "added twice": lambda g, a, b: g.call_function(torch.add, (a, b), {"alpha": 2}),
    "subtracted": lambda g, a, b: g.call_function(operator.sub, (b, a)),
    "multiplied": lambda g, a, b: g.call_method("mul", (a, b)),
    "maximum": lambda g, a, b: g.call_function(torch.maximum, (a, b)),
    "lerp": lambda g, a, b: g.call_function(torch.lerp, (a, b, 0.3)),
    "addcmul": lambda g, a, b: g.call_function(torch.addcmul, (a, a, b)),
    "cat": lambda g, a, b: g.call_function(torch.cat, ([a, a],), {"dim": 1}),
    "contiguous": lambda g, a, b: g.call_method("contiguous", (a,)),
    "flatten": lambda g, a, b: g.call_function(torch.flatten, (a, 1)),
    "transpose": lambda g, a, b: g.call_method("transpose", (a, 0, 1)),
    "reshape": lambda g, a, b: g.call_method("reshape", (a, -1)),
    "unsqueeze": lambda g, a, b: g.call_method("unsqueeze", (a, 1)),
    "slice": lambda g, a, b: g.call_function(operator.getitem, (a, (slice(None), slice(1, None), None))),
    "layer_norm": lambda g, a, b: g.call_function(F.layer_norm, (a, a.meta["example_value"].shape[-1:])),
    "linear": lambda g, a, b: g.call_function(F.linear, (a, g.placeholder("weight"))),
    "matmul": lambda g, a, b: g.call_function(torch.matmul, (a, g.call_method("transpose", (a, -1, -2)))),
    "softmax": lambda g, a, b: g.call_method("softmax", (a, -1)),
    "mean of rows": lambda g, a, b: g.call_method("mean", (a, -1)),
    "variance": lambda g, a, b: g.call_function(torch.var, (a,), {"dim": 1, "keepdim": True}),
    "a sum": lambda g, a, b: g.call_function(torch.sum, (a, 1, True)),
    "roll": lambda g, a, b: g.call_function(torch.roll, (a, 1, -1)),
    "roll of two": lambda g, a, b: g.call_method("roll", (a, (0, -2), (0, 1))),
    "roll of all": lambda g, a, b: g.call_function(torch.roll, (a,), {"shifts": 2}),
    "pad": lambda g, a, b: g.call_function(F.pad, (a, (1, 2))),
    "pad by reflection": lambda g, a, b: g.call_function(F.pad, (a, (0, 0) * positions(a)), {"mode": "reflect"}),
    "pad by edges": lambda g, a, b: g.call_function(F.pad, (a, (1, 1) * positions(a), "replicate")),
    "pad around": lambda g, a, b: g.call_function(F.pad, (a, (1, 1) * positions(a), "circular")),
    "pad by a number": lambda g, a, b: g.call_function(torch._C._nn.pad, (a, (1, 0, 0, 1), "constant", 3.0)),
    "cut": lambda g, a, b: g.call_function(F.pad, (a, (0, 0, 0, -1))),
    "channel_shuffle": lambda g, a, b: g.call_function(F.channel_shuffle, (a, 1)),
    "power of a number": lambda g, a, b: g.call_function(operator.pow, (2, a)),
    "logsigmoid": lambda g, a, b: g.call_function(F.logsigmoid, (a,)),
    "einsum": lambda g, a, b: g.call_function(torch.einsum, ("i...j->...ji", a)),
    "einsum of two": lambda g, a, b: g.call_function(torch.einsum, ("bchw, bdhw -> bdc", a, a)),
    "einsum by channels": lambda g, a, b: g.call_function(torch.einsum, ("bchw,bcij->bhwij", a, a)),
    "a norm of rows": lambda g, a, b: g.call_function(F.normalize, (a,), {"dim": -1}),
}


def some_strides(shape: Sequence[int], r: random.Random) -> list[int]:
    """In any order, with gaps, and any of dimensions of one."""
    order = list(range(len(shape)))
    r.shuffle(order)
    strides, step = [0] * len(shape), 1
    for k in order:
        strides[k] = step
        step *= shape[k] * (2 if r.random() < 0.15 else 1)
        if shape[k] == 1 and r.random() < 0.6:
            strides[k] = r.choice([1, 2, shape[-1], step, 128])
    return strides


def run(graph: fx.Graph, node: fx.Node, tensors: dict[str, Tensor]) -> dict[fx.Node, Any]:
    """What each node gives, in eager mode."""
    graph.output(node)
    found: dict[fx.Node, Any] = {}

    class Interpreter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    inputs = [tensors[n.target] for n in graph.nodes if n.op == "placeholder"]
    Interpreter(fx.GraphModule({}, graph)).run(*inputs)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ONE)
@pytest.mark.filterwarnings("ignore:var\\(\\)")
def test_strides_are_atens(name: str, dtype: torch.dtype) -> None:
    """Of tensors in any order of dimensions, with gaps between them, and sizes of one with any stride."""
    r = random.Random(name)
    known = 0
    for _ in range(150):
        shape = [r.choice([1, 2, 3, 4]) for _ in range(r.choice(OF_MAPS.get(name, [2, 3, 4, 5])))]
        other = [1 if r.random() < 0.2 else n for n in shape]
        mine = some_strides(shape, r)
        a = torch.empty_strided(shape, mine, dtype=dtype).fill_(0.5)
        b = torch.empty_strided(other, mine if other == shape and r.random() < 0.4 else some_strides(other, r)).to(
            dtype
        )
        graph = fx.Graph()
        nodes = graph.placeholder("a"), graph.placeholder("b")
        for node, t in zip(nodes, (a, b), strict=True):
            node.meta["example_value"] = t
        node = ONE[name](graph, *nodes)
        found = run(graph, node, {"a": a, "b": b, "weight": torch.ones(3, shape[-1], dtype=dtype)})
        for n, y in found.items():
            n.meta["example_value"] = y
        assert rearranges(node)
        told = lies(node, lambda n: n.meta["example_value"].stride())
        if told is None:
            continue
        known += 1
        y = found[node]
        assert told.strides == y.stride(), (shape, a.stride(), b.stride())
        memory = {n.meta["example_value"].untyped_storage().data_ptr() for n in node.all_input_nodes}
        assert told.is_view == (y.untyped_storage().data_ptr() in memory)
    assert known >= 100


def test_views_that_strides_do_not_allow_are_not_known() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(2, 3, 4)
    view = graph.call_method("view", (x, 2, 12))
    view.meta["example_value"] = torch.empty(2, 12)
    assert lies(view, lambda n: (12, 4, 1)) is not None
    assert lies(view, lambda n: (12, 1, 3)) is None


def test_powers_of_numbers_are_contiguous() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(2, 3)
    power = graph.call_function(operator.pow, (2.0, x))
    power.meta["example_value"] = torch.empty(2, 3)
    assert rearranges(power) and is_mistold(power)
    found = lies(power, lambda n: (1, 2))
    assert found is not None and found.strides == (3, 1) and not found.is_view


def test_an_iterator_keeps_the_order_of_its_first_operand() -> None:
    last, contiguous = ((2, 3, 4, 5), (60, 1, 15, 3)), ((2, 3, 4, 5), (60, 20, 5, 1))
    assert iterated((2, 3, 4, 5), [last, contiguous], alone=True) == (60, 1, 15, 3)
    assert iterated((2, 3, 4, 5), [contiguous, last], alone=True) == (60, 20, 5, 1)


def resized(x: Tensor, how: str) -> Tensor:
    """By a factor of two."""
    mode = how if x.dim() == 4 or "linear" not in how else "trilinear"
    return F.interpolate(x, scale_factor=2.0, mode=mode)


@pytest.mark.parametrize(
    ("target", "more"),
    [
        (torch.roll, (1, 2)),
        ("roll", (1, 2)),
        (torch.fft.fftshift, ()),
        (torch.fft.ifftshift, ()),
        (F.channel_shuffle, (2,)),
        (F.max_unpool2d, (torch.zeros(1), 2)),
        (F.pad, ((1, 1, 1, 1), "reflect")),
        (F.logsigmoid, ()),
        (F.rrelu, ()),
        (torch.einsum, ()),
    ],
)
def test_what_the_fake_mode_says_is_not_taken(target: Any, more: tuple[Any, ...]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(2, 4, 4, 4)
    node = (graph.call_method if isinstance(target, str) else graph.call_function)(target, (x, *more))
    node.meta["example_value"] = torch.empty(2, 4, 4, 4)
    assert is_mistold(node)


KNOWN = {"logsigmoid", "pad reflect", "pad replicate", "roll", "fftshift", "channel_shuffle", "power of a number"}
if torch.__version__ < "2.12":
    KNOWN.add("ifft")  # of volumes

# Calls that a model may make of a map, with those that are `KNOWN` to be `is_mistold`. (Nor is a group norm's strides
# what all releases say: `rewrite_eager._untrue`.)
OF_A_MAP: dict[str, Callable[[Tensor], Any]] = {
    **{name: getattr(torch, name) for name in "sigmoid exp abs sqrt sin erf floor sign isnan round log1p".split()},
    **{name: getattr(F, name) for name in "relu6 hardtanh softsign silu gelu mish elu logsigmoid softplus".split()},
    **{name: lambda x, n=name: getattr(x, n)(1) for name in "softmax cumsum sort argsort mean amax argmax".split()},
    **{f"resized {how}": lambda x, how=how: resized(x, how) for how in ("nearest", "bilinear", "area")},
    **{
        f"pad {mode}": lambda x, mode=mode: F.pad(x, (1, 1) * (x.dim() - 2), mode=mode)
        for mode in ("constant", "reflect", "replicate", "circular")
    },
    **{
        name: lambda x, name=name: getattr(F, f"{name}{x.dim() - 2}d")(x, 2)
        for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
    },
    "roll": lambda x: torch.roll(x, (1, 2), (1, -1)),
    "fftshift": lambda x: torch.fft.fftshift(x, (2, 3)),
    "flip": lambda x: x.flip(-1),
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2) if x.dim() == 4 else x * 1,
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2) if x.dim() == 4 else x * 1,
    "grid_sample": lambda x: F.grid_sample(x, torch.zeros(2, *x.shape[2:], x.dim() - 2), align_corners=False),
    "unfold": lambda x: x.unfold(2, 2, 2).contiguous(),
    "prelu": lambda x: F.prelu(x, torch.ones(x.shape[1])),
    "glu": lambda x: F.glu(x, 1),
    "power of a number": lambda x: 2**x,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(torch.ones(x.shape[2:]) > 0, 0),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.5),
    "bias": lambda x: x + torch.ones(x.shape[1], *[1] * (x.dim() - 2)),
    "beside a contiguous one": lambda x: torch.ones(x.shape) + x,
    "cat": lambda x: torch.cat([x, x], 1),
    "cat with a contiguous one": lambda x: torch.cat([torch.ones(x.shape), x], 1),
    "stack": lambda x: torch.stack([x, x], 1),
    "repeat": lambda x: x.repeat(1, 2, *[1] * (x.dim() - 2)),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=2),
    "index": lambda x: x[:, torch.tensor([0, 1])],
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 1])),
    "gather": lambda x: x.gather(1, torch.zeros(x.shape, dtype=torch.long)),
    "expand": lambda x: x[:, :1].expand_as(x) * 2,
    "slice": lambda x: x[..., ::2] + 0,
    "clone": lambda x: x.clone(),
    "to": lambda x: x.to(torch.float64),
    "var": lambda x: x.var((2, 3), keepdim=True),
    "norm": lambda x: x.norm(dim=1, keepdim=True),
    "normalize": lambda x: F.normalize(x),
    "layer_norm": lambda x: F.layer_norm(x.movedim(1, -1), (x.shape[1],)),
    "linear": lambda x: F.linear(x.movedim(1, -1), torch.ones(5, x.shape[1])),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "einsum": lambda x: torch.einsum("bc...,cd->bd...", x, torch.ones(x.shape[1], 5)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention of tokens": lambda x: F.scaled_dot_product_attention(*[x.flatten(2).mT.unflatten(2, (2, 2)).mT] * 3),
    "instance_norm": lambda x: F.instance_norm(x),
    "local_response_norm": lambda x: F.local_response_norm(x, 2),
    "fft": lambda x: torch.fft.fft2(x).abs(),
    "ifft": lambda x: torch.fft.irfft2(torch.fft.rfft2(x)),
}


@pytest.mark.parametrize("name", OF_A_MAP)
def test_the_fake_mode_says_the_truth_of_all_others(name: str) -> None:
    """Of dimensions of more than one."""
    for dims, kind in itertools.product((4, 5), ("contiguous", "last", "part", "part of last")):
        shape = (2, 8 if "part" in kind else 4, *(4, 6, 2)[: dims - 2])
        x = torch.rand(shape).contiguous(memory_format=format_of(dims, "last" in kind))[:, :4]
        real = OF_A_MAP[name](x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = OF_A_MAP[name](mode.from_tensor(x))
        for a, b in zip(tree_leaves(real), tree_leaves(fake), strict=True):
            same = all(s == t or n == 1 for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))
            assert same or name in KNOWN, (kind, a.stride(), b.stride())
