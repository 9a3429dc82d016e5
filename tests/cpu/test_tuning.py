"""Tuning on a CPU: what is seen, timed and kept, what a call then takes, and that no record can break it. Times are
stubbed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast import store
from cnnfast.__main__ import main
from cnnfast.cpu import inference, methods, onednn, tuned, tuning
from cnnfast.cpu.isa import instruction_set, products_dtype
from cnnfast.cpu.onednn import why_missing
from cnnfast.timing import Timing

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path))
    store.forget()
    with torch.inference_mode():
        yield tmp_path
    store.forget()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that run, in order."""
    names: list[str] = []
    for kind in methods.METHODS.values():

        def bound(self: Any, *rest: Any, real: Any = kind.bound) -> Callable[[torch.Tensor], torch.Tensor]:
            call = real(self, *rest)
            return lambda x: (names.append(type(self).__name__), call(x))[1]

        monkeypatch.setattr(kind, "bound", bound)
    return names


def network() -> cnnfast.Sequential:
    """The rules take a deconvolution for its first step and PyTorch's modules for the second."""
    torch.manual_seed(0)
    layers = (nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.ReLU())
    return cnnfast.Sequential(*layers).eval()


def image(batch: int = 2, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 64, size, size, generator=torch.Generator().manual_seed(0))


class StubbedTimer:
    """Methods take a second, but for those whose time is given."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.asked: list[list[str]] = []

    def __call__(self, calls: Mapping[str, Callable[[], object]]) -> Mapping[str, Timing]:
        self.asked.append(list(calls))
        return {name: Timing((self.seconds.get(name, 1.0),) * 5, 1) for name in calls}


def seen(model: Callable[..., Any], *inputs: Any) -> list[tuned.Seen]:
    with tuned.recorded() as found, torch.no_grad():
        model(*inputs)
    return list(found.values())


def tune(model: Callable[..., Any], x: torch.Tensor, **seconds: float) -> list[tuning.Result]:
    return tuning.tune_steps(seen(model, x), StubbedTimer(**seconds), tell=lambda line: None)


def record_files(cache: Path) -> list[Path]:
    return sorted((cache / "methods").glob("*.json"))


# --- what is found and used -------------------------------------------------------------------------------------------


def test_what_is_seen() -> None:
    model = network()
    model(image())  # what was decided before is no obstacle
    first, second = seen(model, image())
    assert first.size == ((2, 64, 8, 8), torch.float32, True, True)
    assert (second.size.shape, second.size.after) == ((2, 64, 16, 16), False)
    assert first.step.norm is not None and first.step.activation.name == "relu" and second.step.norm is None
    assert seen(lambda x: x, image()) == []


def test_every_method_that_applies_is_timed_and_the_fastest_is_used(ran: list[str], cache: Path) -> None:
    model, x = network(), image()
    want = [model(x) for _ in range(2)][1]
    assert ran == ["Deconvolution"]
    timer = StubbedTimer(Gathered=0.5)
    said: list[str] = []
    first, second = tuning.tune_steps(seen(model, x), timer, tell=said.append)
    assert timer.asked == [["modules", "Winograd", "Deconvolution", "Merged", "Gathered"], ["modules", "Convolution"]]
    assert (first.rule, first.best, first.gain, first.kept) == ("Deconvolution", "Gathered", 2.0, True)
    assert (second.rule, second.best, second.gain) == ("modules", "modules", 1.0)
    title = "conv_transpose 64 -> 64, kernel 4x4, float32, input 2x64x8x8"
    assert said[0] == f"{title}: 500000.0 us by Gathered, 2.00x the rule's (5 methods timed)"
    assert len(record_files(cache)) == 2
    for fresh in (False, True):
        if fresh:  # as a new process starts
            store.forget()
            inference._way.cache_clear()
        ran.clear()
        torch.testing.assert_close(model(x), want)
        assert ran == ["Gathered"]
        lines = model.explain(x).splitlines()
        assert lines[0] == "0-2: ConvTranspose2d + BatchNorm2d + ReLU fused (tuned: Gathered)"
        assert lines[1] == f"3-4: Conv2d + ReLU could be fused, but: {tuned.FASTER}"


def test_a_choice_is_of_its_size_and_dtype(ran: list[str]) -> None:
    model, x = network(), image()
    tune(model, x, Gathered=0.5)
    for other in (image(4), image(2, 9), x.bfloat16()):
        model.to(other.dtype)
        ran.clear()
        [model(other) for _ in range(2)]
        assert ran[-1] == "Deconvolution" and "Gathered" not in ran
    model.float()
    [model(x) for _ in range(2)]
    assert ran[-1] == "Gathered"


def test_packed_operators_where_the_rules_take_modules(ran: list[str]) -> None:
    model, x = network(), image()
    want = model(x)
    tune(model, x, Convolution=0.5)
    ran.clear()
    for _ in range(2):
        torch.testing.assert_close(model(x), want)
    assert ran[-2:] == ["Deconvolution", "Convolution"]
    assert model.explain(x).splitlines()[1] == "3-4: Conv2d + ReLU fused (tuned: Convolution)"


def test_modules_where_the_rules_take_packed_operators(ran: list[str]) -> None:
    model, x = network(), image()
    want = model(x)
    tune(model, x, modules=0.5)
    ran.clear()
    for _ in range(3):
        torch.testing.assert_close(model(x), want)
    assert ran == []


def test_an_operator_called_by_itself(ran: list[str]) -> None:
    weight, x = nn.Parameter(torch.randn(64, 64, 4, 4) / 32), image().contiguous(memory_format=torch.channels_last)

    def call(x: torch.Tensor) -> torch.Tensor:
        return cnnfast.ops.conv_transpose2d(x, weight, stride=2, padding=1)

    want = [call(x) for _ in range(2)][1]
    tune(call, x, Gathered=0.5)
    ran.clear()
    torch.testing.assert_close(call(x), want)
    assert ran == ["Gathered"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.BatchNorm2d(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.up(x)))


def test_an_accelerated_model(ran: list[str]) -> None:
    torch.manual_seed(0)
    x, model = image(), Model().eval()
    want = model(x)
    cnnfast.accelerate(model)
    try:
        [model(x) for _ in range(3)]
        assert ran[-1] == "Deconvolution"
        tune(model, x, Gathered=0.5)
        ran.clear()
        for _ in range(3):
            torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
        assert ran == ["Gathered"] * 3
        assert "fused (tuned: Gathered)" in str(cnnfast.explain(model, x))
        assert cnnfast.explain(model, x).rows[0].tuned == "Gathered"
    finally:
        cnnfast.restore(model)


STEPS: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "upsample": (lambda: [nn.Upsample(scale_factor=2), nn.Conv2d(16, 8, 3, padding=1), nn.PReLU(8)], 4),
    "padded": (lambda: [nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), nn.LeakyReLU(0.2)], 2),
    "one-dimension": (lambda: [nn.ConvTranspose1d(16, 16, 4, 2, 1), nn.PReLU()], 4),
    "projection": (lambda: [nn.ConvTranspose2d(16, 16, 4), nn.BatchNorm2d(16), nn.Tanh()], 5),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_step(name: str, dtype: torch.dtype) -> None:
    """Nothing that applies is refused."""
    torch.manual_seed(0)
    modules, count = STEPS[name]
    model = cnnfast.Sequential(*modules()).eval().to(dtype)
    size = {"one-dimension": (6,), "projection": (1, 1)}.get(name, (6, 5))
    # Winograd's, but for a single tile.
    count += products_dtype(dtype, instruction_set()) == torch.float32 and name != "projection"
    (result,) = tune(model, torch.randn(2, 16, *size).to(dtype))
    assert not result.refused and len(result.seconds) == count and result.best == result.rule


# --- what is not chosen -----------------------------------------------------------------------------------------------


def test_a_small_gain_is_noise() -> None:
    (first, _) = tune(network(), image(), Gathered=0.98)
    assert first.best == first.rule == "Deconvolution"


@pytest.mark.parametrize(
    ("turns", "clear"), [((1.0,) * 8, True), ((1.0,) * 7 + (1.1,), True), ((1.0,) * 5 + (1.1,) * 3, False)]
)
def test_most_turns_must_say_so(turns: tuple[float, ...], clear: bool) -> None:
    assert tuning.clearly(Timing((1.05,) * 8, 1), Timing(turns, 1)) is clear


def test_a_wrong_method_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = onednn.Gathered.run
    monkeypatch.setattr(onednn.Gathered, "run", lambda self, *rest: real(self, *rest) * 1.001)
    timer = StubbedTimer(Gathered=0.1)
    first = tuning.tune_steps(seen(network(), image()), timer, tell=lambda line: None)[0]
    assert "Gathered" not in timer.asked[0] and first.best == "Deconvolution"
    assert "max error" in first.refused["Gathered"] and str(first).endswith("(4 methods timed, 1 refused)")


def test_out_of_time() -> None:
    said: list[str] = []
    assert tuning.tune_steps(seen(network(), image()), StubbedTimer(), seconds=0, tell=said.append) == []
    assert said == ["out of time: 2 of 2 steps keep the methods they have"]


# --- records ----------------------------------------------------------------------------------------------------------


def used(model: nn.Module, ran: list[str]) -> str:
    store.forget()
    ran.clear()
    for _ in range(2):
        model(image())
    return ran[-1]


@pytest.mark.parametrize("what", tuned.environment())
def test_a_choice_is_of_its_processor_and_versions(what: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    tune(model, image(), Gathered=0.5)
    here = tuned.environment()
    monkeypatch.setattr(tuned, "environment", lambda: {**here, what: "another"})
    assert used(model, ran) == "Deconvolution"
    monkeypatch.setattr(tuned, "environment", lambda: here)
    assert used(model, ran) == "Gathered"


def test_a_choice_is_of_its_number_of_threads(ran: list[str]) -> None:
    model, threads = network(), torch.get_num_threads()
    tune(model, image(), Gathered=0.5)
    try:
        torch.set_num_threads(threads + 1)
        assert used(model, ran) == "Deconvolution"
    finally:
        torch.set_num_threads(threads)
    model(image())
    assert ran[-1] == "Gathered"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'{"schema": 99}'])
def test_a_damaged_file_is_ignored_and_replaced(
    content: bytes, ran: list[str], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    tune(model, image(), Gathered=0.5)
    for file in record_files(cache):
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "cnnfast"):
        assert used(model, ran) == "Deconvolution"
    if content in (b"", b"{", b"\xff\xfe"):
        assert len(caplog.messages) == 2 and all("is damaged and not used" in line for line in caplog.messages)
    tune(model, image(), Gathered=0.5)
    assert used(model, ran) == "Gathered"


@pytest.mark.parametrize("method", ["Strassen", 3, None])
def test_a_method_that_is_none(method: object, ran: list[str], cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    tune(model, image(), Gathered=0.5)
    for file in record_files(cache):
        content = json.loads(file.read_text())
        content["record"]["method"] = method
        file.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "cnnfast"):
        assert used(model, ran) == "Deconvolution"
    assert "names no method of this version and is not used" in caplog.text


def test_a_method_that_does_not_apply(ran: list[str], cache: Path) -> None:
    model = network()
    tune(model, image())
    for file in record_files(cache):
        file.write_text(file.read_text().replace('"method": "Deconvolution"', '"method": "Projection"'))
    assert used(model, ran) == "Deconvolution"


def test_back_to_the_rules(ran: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    tune(model, image(), Gathered=0.5)
    monkeypatch.setenv("CNNFAST_TUNED", "0")
    assert used(model, ran) == "Deconvolution"
    monkeypatch.delenv("CNNFAST_TUNED")
    assert used(model, ran) == "Gathered"
    for file in record_files(cache):
        file.unlink()
    assert used(model, ran) == "Deconvolution"


# --- cnnfast.tune and the command -------------------------------------------------------------------------------------


def test_tune(monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    real, timer = tuning.tune_steps, StubbedTimer(Gathered=0.5)
    monkeypatch.setattr(tuning, "tune_steps", lambda tasks, **k: real(tasks, timer, **k))
    model = network()
    results = cnnfast.tune(model, image(), batch_sizes=(1, 2), tell=lambda line: None)
    assert [r.size.shape[0] for r in results] == [2, 2, 1, 1]  # type: ignore[union-attr]
    for batch in (1, 2):
        [model(image(batch)) for _ in range(2)]
        assert ran[-1] == "Gathered"
    with pytest.raises(RuntimeError, match="nothing to tune: .* on a CPU ran no step that could be fused"):
        cnnfast.tune(nn.Linear(2, 2).eval(), torch.ones(1, 2))


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = tuning.tune_steps
    monkeypatch.setattr(tuning, "tune_steps", lambda tasks, **k: real(tasks, StubbedTimer(), **k))
    assert main(["tune", "dcgan", "--device", "cpu", "--batch", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "dcgan, float32, batch 1" and len(out) == 7
    assert out[-1] == f"5 steps tuned, median gain 1.00x; kept in {store.folder('methods')}"


def test_the_timer() -> None:
    (first, _) = tuning.tune_steps(seen(network(), image()), tell=lambda line: None)
    assert set(first.seconds) == {"modules", "Winograd", "Deconvolution", "Merged", "Gathered"}
    assert all(0 < s < 60 for s in first.seconds.values())
