"""What is timed: its shapes, its arithmetic and its least bytes, counted and by hand; its translation to ONNX."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import cases, peers
from cnnfast.spec import ConvSpec

LAYER = cases.MINI[1]
KINDS = {c.name: c for c in cases.MINI}


@pytest.mark.parametrize("case", [*cases.CASES, *cases.MINI, *cases.GEOMETRIES], ids=lambda c: c.name)
def test_case_counts_and_names_what_its_modules_do(case):
    with torch.device("meta"):
        modules, x = case.make(), torch.empty(2, *case.input_shape)
        y = modules(x)
    blocks = list(case.blocks())
    assert tuple(y.shape[1:]) == blocks[-1].output_shape
    assert [b.output_shape for b in blocks[:-1]] == [b.input_shape for b in blocks[1:]]
    assert case.title.split(":")[0].split(",")[0].endswith("x".join(map(str, y.shape[1:])))
    assert case.macs(2) == 2 * case.macs(1) > 0
    # At least the input, the result and every parameter; an image more costs no parameter more.
    parameters = sum(p.numel() for p in modules.parameters())
    assert case.least_bytes(1, 4) >= 4 * (x[0].numel() + y[0].numel() + parameters)
    one, two, three = (case.least_bytes(n, 2) for n in (1, 2, 3))
    assert three - two == two - one < two and case.least_bytes(1, 4) == 2 * one


def taps_by_hand(spec, size, upsampled_by=1):
    """Products of one output channel and one input channel: every (output, tap) that meets an input or the border."""
    count = 1
    for k, s, p, d, n, o in zip(
        spec.kernel_size, spec.stride, spec.padding, spec.dilation, size, spec.output_size(size), strict=True
    ):
        if spec.transposed:  # o + p = s i + d t
            count *= sum((i + p - d * t) % s == 0 for i in range(o) for t in range(k))
        elif upsampled_by == 1:
            count *= o * k
        else:  # distinct pixels of the small map under the kernel
            count *= sum(len({(i + t - p) // upsampled_by for t in range(k)}) for i in range(o * upsampled_by))
        assert n > 0
    return count


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("mini_dcgan.2", 32 * 16 * taps_by_hand(ConvSpec.make(1, 1, 4, 2, 1), (4, 4))),
        ("mini_1d", 32 * 16 * taps_by_hand(ConvSpec.make(1, 1, 16, 8, 4, ndim=1), (9,))),
        ("mini_conv", 16 * 32 * taps_by_hand(ConvSpec.make(1, 1, 3, padding=1, transposed=False), (6, 5))),
        ("mini_shuffle", 16 * 12 * taps_by_hand(ConvSpec.make(1, 1, 3, padding=1, transposed=False), (4, 5))),
        ("mini_norm", 16 * 8 * taps_by_hand(ConvSpec.make(1, 1, 3, padding=1, transposed=False), (5, 4), 2)),
        ("mini_upsample", 16 * 16 * taps_by_hand(ConvSpec.make(1, 1, 3, padding=1, transposed=False), (4, 4), 2)),
    ],
)
def test_multiply_adds_by_brute_force(name, products):
    assert KINDS[name].macs(3) == 3 * products


@pytest.mark.parametrize(
    ("name", "elements", "parameters"),
    [
        ("mini_dcgan.2", 32 * 16 + 16 * 64, 32 * 16 * 16 + 4 * 16),  # BatchNorm: four vectors
        ("mini_1d", 32 * 9 + 16 * 72, 32 * 16 * 16 + 16),
        ("mini_conv", 16 * 30 + 32 * 30, 16 * 32 * 9 + 32 + 32),  # bias and slope
        ("mini_shuffle", 16 * 20 + 3 * 80, 16 * 12 * 9 + 12),
        ("mini_norm", 16 * 20 + 3 * 8 * 80, 16 * 8 * 9 + 8 + 2 * 8),  # the output three times; the upsampled map never
        ("mini_upsample", 16 * 16 + 16 * 64, 16 * 16 * 9 + 16),
    ],
)
def test_least_bytes_by_hand(name, elements, parameters):
    assert KINDS[name].least_bytes(5, 2) == 2 * (5 * elements + parameters)


def test_a_generator_writes_and_reads_what_is_between_its_blocks():
    layers, (generator,) = cases.find(["dcgan128.?"]), cases.find(["dcgan128"])
    assert generator.least_bytes(4, 2) == sum(c.least_bytes(4, 2) for c in layers)


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("dcgan64.1", 100 * 512 * 16),  # one tap per output
        ("dcgan64.2", 8 * 8 * 4 * 512 * 256),  # k4 s2: four taps
        ("dcgan64.5", 64 * 64 * 4 * 64 * 3),
        ("upsample256", 128 * 128 * 4 * 256 * 256),  # collapsed: four taps, not nine
    ],
)
def test_multiply_adds_by_hand(name, macs):
    assert cases.find([name])[0].macs(1) == macs


def test_generator_is_its_layers():
    layers, (generator,) = cases.find(["dcgan64.*"]), cases.find(["dcgan64"])
    assert [c.name for c in layers] == [f"dcgan64.{i}" for i in range(1, 6)]
    assert generator.macs(16) == sum(c.macs(16) for c in layers)
    assert generator.least_bytes(16, 2) == sum(c.least_bytes(16, 2) for c in layers)


def test_build_is_reproducible_and_normalises():
    a, b = LAYER.build(), LAYER.build()
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    norm = a[1]
    assert not a.training and norm.momentum == 0.1
    before_relu = a[:2](torch.randn(64, *LAYER.input_shape))
    assert before_relu.mean().abs() < 0.3 and 0.5 < before_relu.std() < 1.5  # running statistics are realistic
    assert torch.equal(LAYER.input(1), LAYER.input(2)[:1])


@pytest.mark.parametrize("name", ["vocoder", "waifu2x", "srvgg", "style"])
def test_what_passes_through_keeps_its_scale(name):
    """Else an error in an early layer would be hidden behind later biases."""
    (case,) = cases.find([name])
    shape = (case.input_shape[0], *(min(n, 40) for n in case.input_shape[1:]))
    modules, x = case.build(), torch.randn(2, *shape)
    with torch.no_grad():
        y, other = modules[:-1](x), modules[:-1](-x)
    assert 0.1 < y.std() < 10 and (y - other).std() > 0.3 * y.std()


def test_batches_depend_on_the_device():
    (whole,), (large,) = cases.find(["vocoder"]), cases.find(["vae.up3"])
    assert whole.batches_on("cuda") == (1, 16, 64) and whole.batches_on("cpu") == (1, 16)
    assert large.batches_on("cpu") == () and large.batches_on("cuda") == large.batches


def test_find_takes_names_suites_and_patterns():
    assert [c.name for c in cases.find(["style*"])] == ["style.up1", "style.up2", "style.head", "style"]
    assert {c.suite for c in cases.find(["generator"])} == {"generator"} and len(cases.find(["generator"])) == 7
    assert len({c.name for c in cases.CASES}) == len(cases.CASES)
    assert {c.suite for c in cases.CASES} == set(cases.SUITES) == set(peers.SUITE_IMPLEMENTATIONS)
    known = {i.name for i in peers.IMPLEMENTATIONS}
    assert all(set(names) <= known for names in peers.SUITE_IMPLEMENTATIONS.values())


def test_unknown_case_names_the_known():
    with pytest.raises(ValueError, match="unknown case vae: expected some of .*dcgan64"):
        cases.find(["vae"])


# --- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*cases.MINI, *cases.GEOMETRIES], ids=lambda c: c.name)
def test_onnx_model_computes_the_same(case):
    pytest.importorskip("onnx")
    import onnx
    from onnx.reference import ReferenceEvaluator

    from benchmarks.onnx_graph import to_onnx

    modules, x = case.build(), case.input(2)
    model = onnx.load_from_string(to_onnx(modules, tuple(x.shape)))
    with torch.no_grad():
        expected = modules(x)
    if any(m.groups > 1 for m in modules if isinstance(m, nn.ConvTranspose2d)):
        pytest.importorskip("onnxruntime")  # onnx's own evaluator has no groups here
        import onnxruntime

        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        y = session.run(None, {"x": x.numpy()})[0]
    else:
        y = ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(y), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.ELU(), "ELU.* has no translation to ONNX"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "mode 'circular' has no translation"),
        (nn.BatchNorm2d(4, affine=False), "BatchNorm2d without scale"),
    ],
    ids=["module", "padding", "norm"],
)
def test_onnx_refuses_what_it_cannot_say(module, message):
    pytest.importorskip("onnx")
    from benchmarks.onnx_graph import to_onnx

    with pytest.raises(ValueError, match=message):
        to_onnx(nn.Sequential(module), (1, 4, 5, 5))
