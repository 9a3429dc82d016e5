"""The blocks: constructor, children, containers' behaviour, and what `explain` says."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast import ConvTranspose2dNormActivation, Sequential
from cnnfast.cpu import onednn
from cnnfast.nn.chain import Chain
from cnnfast.nn.layers import Program
from cnnfast.nn.modules import read


def test_block_children_and_defaults() -> None:
    block = ConvTranspose2dNormActivation(8, 6)
    assert [type(m) for m in block] == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU]
    conv = block[0]
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((4, 4), (2, 2), (1, 1), None)
    assert list(block.state_dict()) == [
        "0.weight",
        *(f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    ]
    assert block.eval()(torch.randn(2, 8, 5, 7)).shape == (2, 6, 10, 14)


def test_block_arguments_reach_the_layers() -> None:
    block = ConvTranspose2dNormActivation(
        8,
        6,
        kernel_size=3,
        stride=(2, 1),
        padding=2,
        output_padding=(1, 0),
        groups=2,
        norm_layer=lambda c: nn.GroupNorm(3, c),
        activation_layer=nn.LeakyReLU,
        dilation=2,
        inplace=True,
        bias=True,
    )
    conv, norm, act = block
    assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (2, 1), (2, 2))
    assert (conv.output_padding, conv.dilation, conv.groups) == ((1, 0), (2, 2), 2)
    assert conv.bias is not None and norm.num_channels == 6 and act.inplace


def test_block_without_norm_or_activation() -> None:
    block = ConvTranspose2dNormActivation(8, 3, norm_layer=None, activation_layer=nn.Tanh)
    assert [type(m) for m in block] == [nn.ConvTranspose2d, nn.Tanh] and block[0].bias is not None
    bare = ConvTranspose2dNormActivation(8, 3, norm_layer=None, activation_layer=None, bias=False)
    assert len(bare) == 1 and bare[0].bias is None


def test_a_slice_of_a_block_is_a_sequential() -> None:
    block = ConvTranspose2dNormActivation(8, 6)
    assert type(block[:2]) is Sequential and list(block[:2]) == list(block)[:2]
    assert block[-1] is block[2]
    assert type(block.pop(slice(1, 3))) is Sequential and len(block) == 1


def test_constructors_are_those_of_nn_sequential() -> None:
    named = OrderedDict(up=nn.Upsample(scale_factor=2), conv=nn.Conv2d(3, 4, 3))
    assert list(Sequential(named).state_dict()) == ["conv.weight", "conv.bias"]
    assert repr(Sequential(nn.ReLU())) == repr(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match="is not a Module subclass"):
        Sequential(3)


def test_containers_stay_of_their_class() -> None:
    seq = Sequential(nn.ReLU(), nn.Tanh(), nn.SiLU())
    assert isinstance(seq, nn.Sequential) and cnnfast.Sequential is Sequential
    for other in (seq[1:], seq + nn.Sequential(nn.ELU()), seq * 2, 2 * seq):
        assert type(other) is Sequential
    assert (seq + seq)[4] is seq[1] and len(seq * 3) == 9
    seq.append(nn.ELU()).insert(0, nn.GELU()).extend([nn.Tanh()])
    seq += nn.Sequential(nn.ReLU())
    assert type(seq) is Sequential and len(seq) == 7 and isinstance(seq[0], nn.GELU)
    del seq[0]
    seq[0] = nn.Sigmoid()
    assert torch.equal(seq[:1](torch.zeros(1)), torch.full((1,), 0.5))
    with pytest.raises(ValueError, match="add operator supports only objects"):
        seq + [nn.ReLU()]


def test_one_chain_runs_to_the_next_module_that_stands_alone() -> None:
    seq = Sequential(
        nn.ConvTranspose2d(4, 4, 2),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 4, 3),
        nn.Softplus(),
        nn.ConvTranspose2d(4, 4, 2),
        nn.ConvTranspose2d(4, 4, 2, dtype=torch.bfloat16),
    ).eval()
    items = Program.make(read(seq)).items
    assert [len(i.steps) if isinstance(i, Chain) else i.slot for i in items] == [2, 4, 1, 1]


def test_intermediates_are_channels_last_and_the_last_store_is_eagers(monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnfast.nn import chain

    asked = []
    real = chain.run_step
    monkeypatch.setattr(chain, "run_step", lambda *a, **k: asked.append(k["channels_last"]) or real(*a, **k))
    seq = Sequential(*(nn.ConvTranspose2d(4, 4, 3) for _ in range(3))).eval()
    with torch.no_grad():
        seq(torch.randn(1, 4, 5, 5))
        seq(torch.randn(1, 4, 5, 5).to(memory_format=torch.channels_last))
    assert asked == [True, True, False, True, True, True]


def conv(c_in: int = 64, c_out: int = 64, k: int = 3) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, k, padding=k // 2)


# name -> (modules, input, whether each result is channels-last and whether modules run as they stand; or a reason)
RUNS: dict[str, tuple[list[nn.Module], tuple[int, ...], list[tuple[bool, bool]] | str]] = {
    "chain": ([conv(), nn.SiLU(), conv(), nn.SiLU()], (64, 128, 128), [(True, False), (False, False)]),
    "nothing-to-fuse": ([conv(24, 24), conv(24, 24)], (24, 64, 64), [(True, True), (False, True)]),
    "single": ([conv(), nn.SiLU()], (64, 64, 64), "the conversions to channels-last and back"),
    "tiny": ([conv(8, 8), nn.SiLU()], (8, 5, 5), "too few"),
    "1x1": ([conv(k=1), nn.SiLU(), conv(k=1), nn.SiLU()], (64, 60, 60), "the conversions"),
    "1x1-and-3x3": ([conv(), nn.SiLU(), conv(k=1), nn.SiLU()], (64, 128, 128), [(True, False), (False, False)]),
    "transposed": ([conv(k=1), nn.ConvTranspose2d(64, 64, 2, 2)], (64, 60, 60), [(True, True), (False, False)]),
    "one-dimension": ([nn.Conv1d(64, 64, 7), nn.ConvTranspose1d(64, 64, 7)], (64, 640), "are as fast"),
    "large-weight-in-one-dimension": (
        [nn.Conv1d(64, 64, 7), nn.ConvTranspose1d(64, 1024, 9)],
        (64, 640),
        [(True, False), (False, False)],
    ),
    "plain-in-one-dimension": ([nn.Conv1d(64, 64, 7), nn.Conv1d(64, 64, 7)], (64, 640), "are as fast"),
}


@pytest.mark.skipif(onednn.why_missing() is not None, reason=str(onednn.why_missing()))
@pytest.mark.parametrize("name", RUNS)
def test_how_a_chain_of_nchw_runs(name: str) -> None:
    """Conversions are made where they save some, and a step that gains nothing runs as its modules."""
    modules, shape, expected = RUNS[name]
    seq = Sequential(*modules).eval()
    reading = read(seq)
    (chain,) = Program.make(reading).items
    x = torch.randn(1, *shape)
    with torch.no_grad():
        bound = chain.bind(x, reading)
        if isinstance(expected, str):
            assert isinstance(bound, str) and expected in bound
            assert f"could be fused, but: {bound}" in seq.explain(x)
        else:
            assert [(r.channels_last, r.as_modules is not None) for r in bound.runs] == expected
            assert [line.endswith("fused") for line in seq.explain(x).splitlines()] == [not e[1] for e in expected]
        torch.testing.assert_close(seq(x), nn.Sequential(*seq)(x))
        assert seq(x).stride() == nn.Sequential(*seq)(x).stride()
        with cnnfast.backend("triton"):  # as on a GPU: a launch for every step
            runs = chain.bind(x, reading).runs
            assert [r.as_modules for r in runs] == [None] * len(chain.steps)
            assert [r.channels_last for r in runs] == [True] * (len(chain.steps) - 1) + [False]


@pytest.mark.skipif(onednn.why_missing() is not None, reason=str(onednn.why_missing()))
@pytest.mark.parametrize(
    ("batch", "dtype", "fused"), [(1, "float32", False), (2, "float32", True), (1, "bfloat16", True)]
)
def test_plain_convolutions_of_one_dimension(batch: int, dtype: str, fused: bool) -> None:
    of = {"dtype": getattr(torch, dtype)}
    seq = Sequential(nn.Conv1d(64, 64, 7, **of), nn.LeakyReLU(), nn.Conv1d(64, 64, 7, **of)).eval()
    with torch.no_grad():
        text = seq.explain(torch.randn(batch, 64, 640, **of))
    assert ("one sample are as fast" in text) is not fused and text.endswith("fused") is fused, text


def test_explain() -> None:
    seq = Sequential(
        nn.ConvTranspose2d(4, 4, 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 8, 3), nn.PixelShuffle(2)),
    ).eval()
    assert seq.explain().splitlines() == [
        "0-2: ConvTranspose2d + BatchNorm2d + ReLU fused",
        "3: Upsample as it stands: mode='bilinear' is not nearest",
        "4: Conv2d as it stands: padding_mode='circular' must be one of ('zeros', 'replicate', 'reflect')",
        "5-5: Conv2d fused",
        "6: PixelShuffle as it stands: a convolution's store does not shuffle pixels yet: PixelShuffle runs after it",
    ]
    x = torch.randn(1, 4, 3, 3)
    assert seq.explain(x) == seq.explain()
    with torch.no_grad():
        assert seq.explain(x) == seq.explain()
        assert "torch.float64" in seq.explain(x.double())
        assert "3 channels meet a convolution of 4" in seq.explain(x[:, :3])
        with torch.autocast("cpu"):
            assert seq.explain(x) == seq.explain()
            assert "0-2: ConvTranspose2d + BatchNorm2d + ReLU could be fused, but: torch.float16" in seq.half().explain(
                x
            )
    training = Sequential(
        nn.Conv2d(4, 4, 3), nn.Dropout(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)
    )
    assert training.explain().splitlines() == [
        "0-0: Conv2d fused",
        "1: Dropout as it stands: it is in training mode",
        "2: BatchNorm2d as it stands: no convolution ahead of it that takes it in",
        "3: ReLU as it stands: no convolution ahead of it that takes it in",
        "4-5: Conv2d + GroupNorm fused",
    ]
    assert training.explain(x).startswith("0-0: Conv2d could be fused, but: in training, PyTorch's modules")
    with torch.autograd.forward_ad.dual_level():
        assert seq.explain(x).startswith("nothing is fused now: forward-mode differentiation is active")
