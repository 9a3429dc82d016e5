"""onnx.py: models that the onnx package writes are read as it reads them; damaged ones are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cnnfast.generators import onnx as ours
from cnnfast.generators.ncnn import by_order

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

KINDS = ["float32", "float64", "float16", "int8", "uint8", "int16", "uint16", "int32", "int64", "bool"]


def values(kind: str, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind.startswith("float"):
        return rng.standard_normal(shape).astype(kind)
    if kind == "bool":
        return rng.random(shape) > 0.5
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max, shape, dtype=kind, endpoint=True)


def saved(nodes: list[object], tensors: list[object], inputs: list[object] | None = None) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", inputs or [x], [y], tensors)
    return helper.make_model(graph, producer_name="tests").SerializeToString()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", [True, False], ids=["bytes", "values"])
@pytest.mark.parametrize("shape", [(3, 2), (0, 4), ()], ids=str)
def test_tensors_of_every_kind(kind: str, raw: bool, shape: tuple[int, ...]) -> None:
    a = values(kind, *shape)
    if raw:
        tensor = numpy_helper.from_array(a, "a")
    else:
        tensor = helper.make_tensor("a", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape, a.flatten().tolist())
    graph = ours.read_graph(saved([helper.make_node("Identity", ["a"], ["y"])], [tensor]))
    found = graph.constants["a"]
    assert found.dtype == a.dtype and found.shape == a.shape
    np.testing.assert_array_equal(found, numpy_helper.to_array(tensor))
    assert set(ours.weights(graph)) == ({"a"} if kind.startswith("float") else set())


def test_nodes_and_constants() -> None:
    value = numpy_helper.from_array(values("float32", 4), "")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=value),
        helper.make_node("Softmax", ["x"], ["s"], name="first", axis=-3),
        helper.make_node("Conv", ["s", "w", ""], ["y"], name="second", group=2, pads=[1, 1, 1, 1], auto_pad="NOTSET"),
    ]
    graph = ours.read_graph(saved(nodes, [numpy_helper.from_array(values("float32", 4, 1, 3, 3), "w")]))
    assert [(n.kind, n.name) for n in graph.nodes] == [("Constant", ""), ("Softmax", "first"), ("Conv", "second")]
    assert graph.nodes[2].inputs == ("s", "w", "") and graph.nodes[2].outputs == ("y",)
    assert graph.nodes[1].options == {"axis": -3} and graph.nodes[2].options == {"group": 2}
    np.testing.assert_array_equal(graph.constants["c"], numpy_helper.to_array(value))


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("zero", ["int8", "uint8", "int32", None])
def test_quantised_weights_are_onnx_s(axis: int | None, zero: str | None) -> None:
    from onnx.reference import ReferenceEvaluator

    x = values(zero or "int8", 3, 4, 5) // 2
    count = 1 if axis is None else x.shape[axis]
    scale = np.linspace(0.01, 0.3, count, dtype=np.float32)
    points = np.arange(count).astype(x.dtype) * (zero != "int32")
    if axis is None:
        scale, points = scale[0], points[0]
    tensors = [numpy_helper.from_array(np.asarray(a), name) for a, name in ((x, "x"), (scale, "s"), (points, "z"))]
    inputs = ["x", "s", "z"] if zero else ["x", "s"]
    options = {} if axis is None else {"axis": axis}
    nodes = [helper.make_node("DequantizeLinear", inputs, ["y"], **options)]
    data = saved(nodes, tensors[: len(inputs)], inputs=[])
    expected = ReferenceEvaluator(onnx.load_from_string(data)).run(None, {})[0]
    found = ours.weights(ours.read_graph(data))["y"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def convolutions() -> list[np.ndarray]:
    return [values("float32", *shape) for shape in ((4, 2, 3, 3), (4,), (4, 3, 2, 2))]


def network_of(arrays: list[np.ndarray]) -> bytes:
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["h"], name="first"),
        helper.make_node("ConvTranspose", ["h", "w1"], ["y"], name="second", strides=[2, 2]),
    ]
    tensors = [numpy_helper.from_array(a, name) for a, name in zip(arrays, ("w0", "b0", "w1"), strict=True)]
    return saved(nodes, tensors)


def test_weights_in_the_order_of_the_graph() -> None:
    arrays = convolutions()
    found = ours.numbered(ours.read_graph(network_of(arrays)))
    assert list(found) == ["0.weight", "0.bias", "1.weight"]
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, 2, bias=False))
    network.load_state_dict(by_order(network, found))
    torch.testing.assert_close(network[2].weight.detach(), torch.from_numpy(arrays[2]))


def test_what_is_not_read() -> None:
    arrays = convolutions()
    conv = [helper.make_node("Conv", ["x", "x"], ["y"], name="strange")]
    with pytest.raises(ValueError, match="the weight of Conv strange is no constant"):
        ours.numbered(ours.read_graph(saved(conv, [])))
    for kind, number in ((TensorProto.STRING, 8), (TensorProto.BFLOAT16, 16)):
        content = [b"text"] if kind == TensorProto.STRING else [1.0]
        with pytest.raises(ValueError, match=f"the tensor a is of the kind {number}"):
            ours.read_graph(saved([], [helper.make_tensor("a", kind, [1], content)]))
    tensor = numpy_helper.from_array(arrays[0], "far")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    with pytest.raises(ValueError, match="the tensor far lies in a file of its own"):
        ours.read_graph(saved([], [tensor]))
    tensor = numpy_helper.from_array(arrays[0], "short")
    tensor.raw_data = tensor.raw_data[:-4]
    with pytest.raises(ValueError, match=r"the tensor short has 71 values, its shape is \(4, 2, 3, 3\)"):
        ours.read_graph(saved([], [tensor]))
    tensor.raw_data = tensor.raw_data[:-1]
    with pytest.raises(ValueError, match="the tensor short has 283 bytes, in numbers of 4"):
        ours.read_graph(saved([], [tensor]))
    with pytest.raises(ValueError, match="it has 0 graphs: no ONNX model"):
        ours.read_graph(b"")
    scale, x = (numpy_helper.from_array(a, name) for a, name in ((values("float32", 7), "s"), (values("int8", 3), "q")))
    nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["y"], name="odd", axis=0)]
    with pytest.raises(ValueError, match="DequantizeLinear odd"):
        ours.weights(ours.read_graph(saved(nodes, [x, scale])))


def test_a_damaged_file_is_a_value_error() -> None:
    """Cut off anywhere, or with any byte changed: read, or refused, and nothing else."""
    data = network_of(convolutions())
    refused = 0
    for end in range(len(data)):
        try:
            ours.numbered(ours.read_graph(data[:end]))
        except ValueError:
            refused += 1
    assert refused > len(data) // 2
    rng = np.random.default_rng(0)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] = rng.integers(256)
        try:
            ours.numbered(ours.read_graph(bytes(changed)))
        except ValueError:
            refused += 1
