"""Strides that `rewrite_strides` tells are those that ATen gives."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cnnfast.nn.rewrite_strides import iterated, lies, rearranges

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
        shape = [r.choice([1, 2, 3, 4]) for _ in range(r.choice([2, 3, 4, 5]))]
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


def test_powers_of_numbers_are_not_known() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(2, 3)
    power = graph.call_function(operator.pow, (2.0, x))
    power.meta["example_value"] = torch.empty(2, 3)
    assert not rearranges(power)


def test_an_iterator_keeps_the_order_of_its_first_operand() -> None:
    last, contiguous = ((2, 3, 4, 5), (60, 1, 15, 3)), ((2, 3, 4, 5), (60, 20, 5, 1))
    assert iterated((2, 3, 4, 5), [last, contiguous], alone=True) == (60, 1, 15, 3)
    assert iterated((2, 3, 4, 5), [contiguous, last], alone=True) == (60, 20, 5, 1)
