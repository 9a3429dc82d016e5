"""The networks of ``compose``: the same as plain PyTorch; the trained ones against other people's runtimes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cnnfast import fetch
from cnnfast.fetch import WeightsError
from cnnfast.generators import create_model
from cnnfast.generators.selfie import Selfie, SelfieConfig
from cnnfast.generators.style import StyleConfig, StylePredictor, StylePredictorConfig, StyleTransfer
from cnnfast.generators.weights import PRETRAINED

SMALL: dict[str, tuple[Callable[..., nn.Module], object, int]] = {
    "selfie": (Selfie, SelfieConfig(4), 64),
    "learnt": (StyleTransfer, StyleConfig(3, (4, 8, 8), 2, (4, 4)), 40),
    "predicted": (StyleTransfer, StyleConfig(5, (4, 8, 8), 2, (4, 4), predicted=True), 40),
    "predictor": (StylePredictor, StylePredictorConfig(7, 8), 64),
}


@pytest.fixture(params=SMALL)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, int]:
    module, config, size = SMALL[request.param]
    torch.manual_seed(0)
    ours, plain = module(config), module(config, sequential=nn.Sequential)
    plain.load_state_dict(ours.state_dict())
    return ours.eval(), plain.eval(), size


def test_the_same_as_plain_pytorch(pair: tuple[nn.Module, nn.Module, int]) -> None:
    ours, plain, size = pair
    x = ours.example_input(2)[..., :size, :size]
    with torch.inference_mode():
        expected = plain(x)
        for _ in range(3):  # weights are packed when they are met for the second time
            torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    double = ours.double()
    with torch.inference_mode():
        assert double(x.double()).dtype == torch.float64


def test_names_are_there_once(pair: tuple[nn.Module, nn.Module, int]) -> None:
    ours, plain, _ = pair
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert len({t.data_ptr() for t in ours.state_dict().values()}) == len(ours.state_dict())


@pytest.mark.parametrize("name", ["learnt", "predicted"])
def test_gradients_reach_everything(name: str) -> None:
    """Styles too; forward under gradients gives what it gives without."""
    module, config, size = SMALL[name]
    torch.manual_seed(0)
    network = module(config).eval()
    x = torch.rand(1, 3, size, size)
    style = torch.rand(config.numbers).requires_grad_()  # type: ignore[attr-defined]
    y = network(x, style)
    with torch.no_grad():
        torch.testing.assert_close(y.detach(), network(x, style), rtol=1e-4, atol=1e-5)
    (y * torch.rand_like(y)).sum().backward()
    assert style.grad is not None and style.grad.abs().min() > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_a_blend_lies_between_its_styles() -> None:
    """A norm's vectors are linear in the weights."""
    network = StyleTransfer(StyleConfig(3, (4, 4, 4), 1, (4, 4)))
    with torch.no_grad():
        for p in network.parameters():
            p.normal_()
    norm = network.layers[0].norm
    one, two = (norm.vectors(v) for v in torch.eye(3)[:2])
    both = norm.vectors(torch.tensor([0.25, 0.75, 0.0]))
    for a, b, c in zip(one, two, both, strict=True):
        torch.testing.assert_close(c, 0.25 * a + 0.75 * b)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SelfieConfig(3), "width=3 must be a positive multiple of 2"),
        (lambda: StyleConfig(blocks=0), "blocks=0 must be positive"),
        (lambda: StyleConfig(contract=(32, 32)), r"contract=\(32, 32\) and expand=\(8, 4\): expected three"),
        (lambda: StyleConfig(expand=(8, 0)), r"expand=\(8, 0\) must be positive"),
        (lambda: StylePredictorConfig(width=6), "width=6 must be a positive multiple of 4"),
    ],
)
def test_impossible_configurations(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# --- trained ----------------------------------------------------------------------------------------------------------


def trained(name: str) -> tuple[nn.Module, bytes]:
    """(our network, the published file)."""
    try:
        return create_model(name, pretrained=True), fetch.fetch(PRETRAINED[name].file)
    except WeightsError as error:
        pytest.skip(str(error).splitlines()[0])


def scene(size: int) -> Tensor:
    """Soft shapes before a shaded ground, as photographs have them: (1, 3, size, size)."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    rings = (torch.sin(12 * ((x - 0.4) ** 2 + (y - 0.6) ** 2)) + 1) / 2
    head = torch.sigmoid(60 * (0.15 - ((x - 0.5) ** 2 + (y - 0.35) ** 2).sqrt()))
    body = torch.sigmoid(40 * (y - 0.55 - 1.2 * (x - 0.5) ** 2))
    person = torch.maximum(head, body)
    ground = torch.stack([0.4 * rings + 0.3 * y, 0.5 * x + 0.2, 0.8 - 0.4 * y])
    return (ground * (1 - person) + torch.stack([0.8 * person, 0.6 * person, 0.5 * person]))[None]


def photographs() -> list[Tensor]:
    from cnnfast.tasks.data import photograph

    try:
        images = [photograph(name).resize((256, 256)) for name in ("astronaut", "coffee")]
    except WeightsError as error:
        pytest.skip(str(error).splitlines()[0])
    return [torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None] for image in images]


def test_selfie_against_litert() -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is not installed")
    network, data = trained("selfie")
    other = interpreter.Interpreter(model_content=data, num_threads=1)
    other.allocate_tensors()
    for x in [scene(256), *photographs()]:
        other.set_tensor(other.get_input_details()[0]["index"], x.permute(0, 2, 3, 1).contiguous().numpy())
        other.invoke()
        expected = torch.from_numpy(other.get_tensor(other.get_output_details()[0]["index"]).copy())[..., 0]
        assert expected.std() > 0.03
        with torch.inference_mode():
            for _ in range(3):
                assert (network(x)[:, 0] - expected).abs().max() < 3e-4


def session(data: bytes):  # type: ignore[no-untyped-def]
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def in_floats(data: bytes) -> bytes:
    """The model without the roundings of what is computed; those of the weights stay."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    model = onnx.load_from_string(data)
    constants = {tensor.name for tensor in model.graph.initializer}
    origin: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and node.input[0] not in constants):
            origin[node.output[0]] = origin.get(node.input[0], node.input[0])
            continue
        node.input[:] = [origin.get(name, name) for name in node.input]
        kept.append(node)
    assert origin
    for output in model.graph.output:
        if output.name in origin:
            kept.append(onnx.helper.make_node("Identity", [origin[output.name]], [output.name]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model.SerializeToString()


@pytest.mark.parametrize("styles", [{0: 1.0}, {15: 1.0}, {3: 0.5, 19: 0.5}], ids=str)
def test_learnt_styles_against_onnxruntime(styles: dict[int, float]) -> None:
    network, data = trained("style_26")
    other = session(data)
    weights = torch.zeros(26)
    for number, weight in styles.items():
        weights[number] = weight
    x = nn.functional.interpolate(scene(256), (104, 160), mode="bilinear")
    expected = torch.from_numpy(other.run(None, {"image": x.numpy(), "style_weights": weights.numpy()})[0])
    assert expected.std() > 0.1
    with torch.inference_mode():
        for _ in range(3):
            assert (network(x, weights) - expected).abs().max() < 1e-3


def channels_last(x: Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def test_predicted_styles_against_onnxruntime() -> None:
    network, data = trained("style_predictor")
    as_published, exact = session(data), session(in_floats(data))
    for x in [scene(256), *photographs()]:
        with torch.inference_mode():
            found = network(x)[0]
        for other, most in ((exact, 1e-3), (as_published, 0.3)):  # the published one rounds to 8 bits on its way
            expected = torch.from_numpy(other.run(None, {other.get_inputs()[0].name: channels_last(x)})[0]).flatten()
            assert expected.std() > 0.1
            assert (found - expected).abs().max() < most * expected.abs().max()


def test_any_style_against_onnxruntime() -> None:
    network, data = trained("style_any")
    predictor, _ = trained("style_predictor")
    x, picture = (nn.functional.interpolate(p, (384, 384), mode="bilinear") for p in photographs())
    with torch.inference_mode():
        style = predictor(nn.functional.interpolate(picture, (256, 256), mode="bilinear"))[0]
        found = network(x, style)
    for other, exact in ((session(in_floats(data)), True), (session(data), False)):
        names = [given.name for given in other.get_inputs()]
        fed = {names[0]: channels_last(x), names[1]: style.view(1, 1, 1, -1).numpy()}
        expected = torch.from_numpy(other.run(None, fed)[0]).permute(0, 3, 1, 2)
        assert expected.std() > 0.1
        error = found - expected
        if exact:
            assert error.abs().max() < 1e-3
        else:  # roundings to 8 bits
            assert 10 * torch.log10(1 / error.square().mean()) > 28
