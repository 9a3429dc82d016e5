"""The networks that enhance pictures: the same as plain PyTorch, published names, trained weights, receptive fields."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from cnnfast import fetch
from cnnfast.fetch import WeightsError
from cnnfast.generators import create_model
from cnnfast.generators.rrdb import RRDB, RRDBConfig
from cnnfast.generators.span import SPAN, SPANConfig, _gated
from cnnfast.generators.srvgg import SRVGG, SRVGGConfig
from cnnfast.generators.waifu2x import CUNet, CUNetConfig, UpConv7, UpConv7Config
from cnnfast.generators.weights import PRETRAINED
from cnnfast.tasks.enhancement import _FACTS
from cnnfast.tasks.user_models import reach
from tests import ncnn_reference

SMALL = {
    "span": (SPAN, SPANConfig(scale=2, features=8)),
    "srvgg": (SRVGG, SRVGGConfig(scale=3, features=8, convs=3)),
    "rrdb": (RRDB, RRDBConfig(blocks=1, features=8, growth=4)),
    "cunet": (CUNet, CUNetConfig(width=16)),
    "upconv7": (UpConv7, UpConv7Config(width=4)),
}
TRAINED = ["span_x2", "span_x4", "cunet_noise0", "cunet_noise3", "upconv7_x2", "srvgg_x4", "rrdb_anime_x4"]


@pytest.fixture(params=SMALL)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    module, config = SMALL[request.param]
    torch.manual_seed(0)
    ours, plain = module(config), module(config, sequential=nn.Sequential)
    plain.load_state_dict(ours.state_dict())
    return ours.eval(), plain.eval()


def test_the_same_as_plain_pytorch(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, plain = pair
    x = ours.example_input(2)[..., :44, :40]
    if hasattr(ours, "margin"):
        x = nn.functional.pad(x, (ours.margin,) * 4, mode="replicate")
    with torch.inference_mode():
        expected = plain(x)
        for _ in range(3):  # weights are packed when they are met for the second time
            torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape[-2:] == (44 * ours.config.scale, 40 * ours.config.scale)


def test_fused_steps_are_no_children(pair: tuple[nn.Module, nn.Module]) -> None:
    """Of the names in the state_dict none is there twice, and everything follows ``to`` and a deep copy."""
    ours, plain = pair
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert len({t.data_ptr() for t in ours.state_dict().values()}) == len(ours.state_dict())
    double = ours.double()
    with torch.inference_mode():
        assert double(double.example_input()).dtype == torch.float64
    found = [m for m in ours.modules() if isinstance(m, cnnfast.Sequential)]
    found += [m for o in ours.modules() for m in getattr(o, "_steps", ()) if isinstance(m, cnnfast.Sequential)]
    assert found and not any(isinstance(m, cnnfast.Sequential) for m in plain.modules())


def test_published_names() -> None:
    """Those of Real-ESRGAN's checkpoints."""
    assert list(SRVGG(SRVGGConfig(convs=1, features=4)).state_dict()) == [
        f"body.{i}.{name}" for i in range(5) for name in (("weight",) if i % 2 else ("weight", "bias"))
    ]
    names = list(RRDB(RRDBConfig(blocks=2, features=4, growth=4)).state_dict())
    layers = ["conv_first"]
    layers += [f"body.{b}.rdb{r}.conv{c}" for b in range(2) for r in (1, 2, 3) for c in (1, 2, 3, 4, 5)]
    layers += ["conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    assert names == [f"{layer}.{what}" for layer in layers for what in ("weight", "bias")]
    names = list(SPAN(SPANConfig(features=4)).state_dict())
    assert names[:4] == [
        "conv_1.eval_conv.weight",
        "conv_1.eval_conv.bias",
        "block_1.c1_r.eval_conv.weight",
        "block_1.c1_r.eval_conv.bias",
    ]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SPANConfig(scale=0), "scale=0 must be positive"),
        (lambda: SRVGGConfig(convs=0), "convs=0 must be positive"),
        (lambda: RRDBConfig(growth=-1), "growth=-1 must be positive"),
        (lambda: UpConv7Config(width=0), "width=0 must be positive"),
        (lambda: CUNetConfig(width=12), "width=12 must be a multiple of 8"),
    ],
)
def test_impossible_configurations(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]


# --- trained ----------------------------------------------------------------------------------------------------------


def picture(size: int) -> Tensor:
    """Soft shapes, as photographs have them: on noise SPAN leaves its range, and rounding grows with it."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    rings = (torch.sin(12 * ((x - 0.4) ** 2 + (y - 0.6) ** 2)) + 1) / 2
    return torch.stack([rings, torch.sigmoid(12 * (x - y)), (x + y) / 2])[None]


@pytest.mark.parametrize("name", TRAINED)
def test_trained_weights_against_the_interpreter(name: str) -> None:
    entry = PRETRAINED[name]
    try:
        model = create_model(name, pretrained=True)
        data, param = (fetch.fetch(file) for file in (entry.file, *entry.also))
    except WeightsError as error:
        pytest.skip(str(error).splitlines()[0])
    x = picture(32)
    if hasattr(model, "margin"):
        x = nn.functional.pad(x, (model.margin,) * 4, mode="replicate")
    with torch.inference_mode():
        expected = ncnn_reference.run(param.decode(), data, x)
        assert 0 < expected.mean() < 1 and expected.std() > 0.1
        for _ in range(3):
            assert (model(x) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["span_x2", "srvgg_x4"])
def test_halos_are_receptive_fields(name: str) -> None:
    model = create_model(name, sequential=nn.Sequential)
    assert reach(model, share=0, largest=32) == _FACTS[name].halo


def test_the_halo_of_a_deep_network_is_its_depth() -> None:
    """RRDB's 94: of one block it is 1 + 15 + 1 and what the three convolutions behind the upsampling see."""
    model = RRDB(RRDBConfig(blocks=1, features=8, growth=4), sequential=nn.Sequential)
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()
    tail = reach(model, share=0, largest=40) - (1 + 15 + 1)
    assert 1 <= tail <= 2 and 1 + 6 * 15 + 1 + tail <= _FACTS["rrdb_anime_x4"].halo


def test_networks_without_padding_see_their_margin() -> None:
    for model, facts in ((UpConv7(UpConv7Config(4)), _FACTS["upconv7_x2"]), (CUNet(CUNetConfig(16)), _FACTS["cunet"])):
        assert facts.halo == model.margin and not facts.pads
        x = model.example_input()
        assert model(x).shape[-1] == (x.shape[-1] - 2 * facts.halo) * model.config.scale


def test_a_local_file_needs_its_layers_beside_it(tmp_path: Path) -> None:
    entry = PRETRAINED["upconv7_x2"]
    try:
        data, param = (fetch.fetch(file) for file in (entry.file, *entry.also))
    except WeightsError as error:
        pytest.skip(str(error).splitlines()[0])
    path = tmp_path / "mine.bin"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="mine.param is not a file"):
        create_model("upconv7_x2", weights_file=path)
    path.with_suffix(".param").write_bytes(param)
    create_model("upconv7_x2", weights_file=path)


def test_span_s_gate_is_the_same_without_gradients() -> None:
    """Which works in the memory of what it is given; with gradients they are those of the formula."""
    x, y = torch.randn(2, 1, 4, 5, 6, dtype=torch.float64).unbind()
    expected = (y + x) * (torch.sigmoid(y) - 0.5)
    with torch.no_grad():
        torch.testing.assert_close(_gated(x, y.clone()), expected)
    torch.testing.assert_close(_gated(x, y), expected)
    assert torch.autograd.gradcheck(_gated, (x.requires_grad_(), y.requires_grad_()))
