"""The probes of the GPU run, on numbers and functions that stand for a device."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import report as gpu_report

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import timers  # noqa: E402
from benchmarks.gpu import probes, products  # noqa: E402
from benchmarks.gpu import rows as gpu_rows  # noqa: E402
from cnnfast.gpu import conv, fence  # noqa: E402
from cnnfast.tolerance import round_tf32  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "truncates", "expected"),
    [
        (None, False, {"truncates": False, "bits": 3}),  # exact, rounded once
        (0, True, {"truncates": True, "bits": 0}),
        (1, True, {"truncates": True, "bits": 1}),
        (2, True, {"truncates": True, "bits": 2}),
    ],
)
def test_rounding_is_told_from_a_few_sums(bits, truncates, expected, dtype, monkeypatch):
    """A tensor core that cuts its addends ``bits`` below float32's last place of the largest, and the sum to it."""

    class Kernel:
        def __getitem__(self, grid):
            return self.run

        def run(self, a, b, y, block, k, num_warps):
            terms = (a[0].double() * b[:, 0].double()).tolist()
            assert a.dtype == b.dtype == dtype and sum(t != 0 for t in terms) > 1
            place = 2.0**-23
            if bits is not None:
                terms = [t // (place / 2**bits) * (place / 2**bits) for t in terms]
            total = sum(terms)
            y[0, 0] = total // place * place if truncates else total

    monkeypatch.setattr(probes, "product_kernel", Kernel())
    assert probes.rounding(dtype, "cpu") == expected


def test_the_product_that_is_probed(device):
    a, b = torch.randint(-8, 8, (64, 16)).half().to(device), torch.randint(-8, 8, (16, 64)).half().to(device)
    y = torch.full((64, 64), float("nan"), device=device)
    probes.product_kernel[(1,)](a, b, y, 64, 16, num_warps=4)
    assert torch.equal(y.cpu(), a.cpu().float() @ b.cpu().float())


@pytest.mark.parametrize(
    ("copy", "expected"),
    [
        (lambda x: x, "keeps every bit"),
        (lambda x: (x.view(torch.int32) & ~0x1FFF).view(torch.float32), "cuts"),
        (round_tf32, "rounds to nearest, ties away from zero"),
        (lambda x: (x * 2.0**10).round() * 2.0**-10, "rounds to nearest, ties to even"),
        (lambda x: (x * 2.0**10).floor() * 2.0**-10, "something else"),  # down, not towards zero
        (lambda x: round_tf32(x).abs(), "something else"),
    ],
)
def test_what_a_descriptor_makes_of_tf32(copy, expected):
    assert probes.descriptor_rounding(copy, "cpu") == {"descriptor": expected}


def test_the_box_that_is_probed(device):
    """Any target but one with tensor maps: there the descriptor's own type is not asked for."""
    x = torch.randn(8, 32, device=device)
    y = torch.full((8, 32), float("nan"), device=device)
    probes.box_kernel[(1,)](probes.TensorDescriptor.from_tensor(x, [8, 32]), y, 8, 32, num_warps=4)
    assert torch.equal(y, x)


def test_a_descriptor_of_tf32_is_asked_for(monkeypatch):
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return self.run

        def run(self, x_desc, y, rows, columns, num_warps):
            seen.append((list(x_desc.block_shape), probes.nvidia.TMA_DTYPE_DEVICE_TO_HOST[probes.FLOAT32]))
            y.copy_(x_desc.base)

    monkeypatch.setattr(probes, "box_kernel", Kernel())
    assert probes.descriptor_rounding(device="cpu") == {"descriptor": "keeps every bit"}
    assert seen == [([8, 32], probes.TFLOAT32)]
    assert probes.nvidia.TMA_DTYPE_DEVICE_TO_HOST[probes.FLOAT32] == probes.FLOAT32


def test_three_products_of_tf32_are_as_exact_as_float32(device):
    found = products.three_products(timers.stubbed, device.type, (64, 256), 64)
    assert 0 < found["three"] < 1 and 0 < found["cores"] < 1 and found["faster"] > 0
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    a[0, 3], a[1, 5], a[2, 7], a[3], a[4] = float("inf"), float("-inf"), float("nan"), 0.0, 1e-30
    y, expected = products.product(a.to(device), b.to(device), True).cpu(), a @ b
    assert torch.equal(y[:4].nan_to_num(7.0, 8.0, 9.0), expected[:4].nan_to_num(7.0, 8.0, 9.0))
    assert ((y - expected)[4:].abs().amax(1) <= 1e-6 * expected[4:].abs().amax(1)).all()


def test_launches_that_differ_are_counted():
    calls = iter(range(100))

    def call():
        y = torch.zeros(4, dtype=torch.float16)
        if next(calls) in (3, 7):
            y[2] = -0.0  # equal as a number, not to the bit
        return y

    assert probes.differing(call, 10) == 2
    nan = torch.full((3,), float("nan"))
    assert probes.differing(lambda: nan, 5) == 0


def test_stress_without_the_fence_changes_nothing_afterwards(monkeypatch):
    seen = []
    monkeypatch.setattr(fence, "needed", lambda arch: True)
    monkeypatch.setattr(probes, "fused", lambda w: lambda x: seen.append(fence.needed(90)) or torch.zeros(2))
    w = probes.Workload(probes.cases.MINI[1], 2, torch.float32)
    for fenced in (True, False):
        assert probes.stress(w, 2, fenced) == {"launches": 2, "differing": 0}
    assert seen == [True] * 3 + [False] * 3 and fence.needed(90) and conv.prepare.cache_info().currsize == 0
    monkeypatch.setattr(probes, "differing", lambda call, launches: 1)
    assert probes.stress(w, 2, True)["failures"] == 1
    assert "failures" not in probes.stress(w, 2, False)  # that is what it is there to show


def test_compute_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probes.sanitized("memcheck", 10) == {"note": "compute-sanitizer is not installed"}
    tool = tmp_path / "compute-sanitizer"
    for status, line in ((0, "ERROR SUMMARY: 0 errors"), (9, "ERROR SUMMARY: 2 errors")):
        tool.write_text(f'#!/bin/sh\necho "========= {line}"\nexit {status}\n')
        tool.chmod(0o755)
        row = probes.sanitized("memcheck", 10)
        assert row["note"] == line and row.get("failures", 0) == (status != 0)


def test_the_page():
    rows = [
        {"key": "rounding, tf32", "truncates": True, "bits": 1},
        {"key": "rounding, a descriptor of TF32", "descriptor": "cuts"},
        {"key": "L2", "bytes": 7e12, "per_clock": 29.0, "assumed": 64},
        {"key": "stress", "launches": 2000, "differing": 3},
        {"key": "float32 by three TF32 products", "three": 0.4, "cores": 1.5, "faster": 2.06},
        {"key": "sanitizer", "note": "not installed"},
    ]
    data = {"stage": "probes", "rows": rows, "crashes": [], "left_out": [], "ended": True}
    text = gpu_report.page(data)
    assert "| rounding, tf32 | truncates, 1 bits below float32's last place kept |" in text
    assert "| rounding, a descriptor of TF32 | cuts |" in text
    assert "7000 GB/s, 29 bytes a clock and multiprocessor, 64 assumed" in text
    said = "0.40 of the allowed error where the CUDA cores' one chain has 1.50; 2.06x as fast as the CUDA cores"
    assert f"| float32 by three TF32 products | {said} |" in text
    assert "3 of 2000 launches differ from the first" in text and "| sanitizer | not installed |" in text


@pytest.mark.parametrize("stubbed", [False, True])
def test_what_was_probed_stands_in_the_summary(stubbed, tmp_path):
    """With the machine's other facts: what the device does. Of a dry run no rates."""
    rows = gpu_rows.Rows(tmp_path, "probes", {"code": "a"}, stubbed=stubbed)
    for name, bits in (("float16", 2), ("tf32", 1)):
        rows.add({"key": f"rounding, {name}", "truncates": bits == 1, "bits": bits})
    rows.add({"key": "rounding, a descriptor of TF32", "descriptor": "cuts"})
    rows.add({"key": "L2 cache, copies inside it", "bytes": 7e12, "per_clock": 29.4, "assumed": 37})
    rows.add({"key": "float32 by three", "three": 0.4, "cores": 1.5, "faster": 2.06})
    rows.add({"key": "stress, a layer", "launches": 2000, "differing": 0})
    rows.end()
    data, text = gpu_report.summary({"gpu": "a GPU"}, [], stubbed, tmp_path)
    expected = {
        "gpu": "a GPU",
        "rounding, float16": "rounds, 2 bits below float32's last place kept",
        "rounding, tf32": "truncates, 1 bits below float32's last place kept",
        "rounding, a descriptor of TF32": "cuts",
        "L2 cache, copies inside it": "stub",
        "float32 by three": "0.40 of the allowed error where the CUDA cores' one chain has 1.50; stub",
    }
    if not stubbed:
        expected["float32 by three"] = expected["float32 by three"].replace("stub", "2.06x as fast as the CUDA cores")
        expected["L2 cache, copies inside it"] = "7000 GB/s, 29 bytes a clock and multiprocessor, 37 assumed"
    assert data["environment"] == expected
    assert all(f"- {name}: {value}\n" in text for name, value in expected.items())
    assert gpu_report.summary({}, [], False, tmp_path / "none")[0]["environment"] == {}
