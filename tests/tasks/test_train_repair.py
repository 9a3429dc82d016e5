"""Training the network of repair: damage, losses by hand, what a step sees, exact resumption, the command line."""

from __future__ import annotations

import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")

from cnnfast.__main__ import main
from cnnfast.fetch import WeightsError
from cnnfast.tasks import data, repair_training, repairing, train_repair
from cnnfast.tasks.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from cnnfast.tasks.damage import KINDS, draw_mask
from cnnfast.tasks.filling import biharmonic
from cnnfast.tasks.repair_training import CURVES, Options, Pictures, Trainer, losses
from cnnfast.tasks.repair_weights import load_network

CPU = torch.device("cpu")
TINY = Options(width=6, batch_size=3, size=32, epochs=2)


def tiny_pictures(seed: int = 0) -> Pictures:
    rng = np.random.default_rng(seed)
    smooth = [np.kron(rng.integers(0, 256, (6, 7, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(2)]
    return Pictures(tuple(smooth), (0.5, 0.5))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Epochs of three steps on tiny pictures, and no figures at the end."""
    for module in (repair_training, train_repair):
        monkeypatch.setattr(module, "STEPS_PER_EPOCH", 3)
    monkeypatch.setattr(Pictures, "load", staticmethod(tiny_pictures))
    row = repairing.Row("text", "coffee", 25.0, 25.5)
    monkeypatch.setattr(repairing, "evaluate", lambda **options: [row, replace(row, repaired=24.9)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(*more: str) -> list[str]:
    return ["train", "repair", "--width", "6", "--batch-size", "3", "--size", "32", "--device", "cpu", *more]


def test_a_photograph_that_is_a_pickle_runs_no_code() -> None:
    rows = np.arange(512 * 512).reshape(512, 512) % 251
    picture = data._ascent(pickle.dumps(rows.tolist(), protocol=2))
    np.testing.assert_array_equal(np.array(picture), rows[..., None].repeat(3, 2))
    with pytest.raises(pickle.UnpicklingError, match="is no number"):
        data._ascent(pickle.dumps(os.getcwd))


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_damage(kind: str) -> None:
    masks = [draw_mask(np.random.default_rng(i), (64, 80), kind) for i in range(40)]
    assert all(mask.shape == (64, 80) and mask.dtype == bool and mask.any() and not mask.all() for mask in masks)
    assert 0.01 < np.mean(masks) < 0.2
    np.testing.assert_array_equal(masks[3], draw_mask(np.random.default_rng(3), (64, 80), kind))


def test_losses_by_hand() -> None:
    """Two patches of two pixels, of which the first has both in a hole, the second one."""
    truth = torch.tensor([[[[0.5, 0.5]]], [[[0.2, 0.9]]]])
    filled = torch.tensor([[[[0.6, 0.3]]], [[[0.3, 0.9]]]])
    made = torch.tensor([[[[0.5, 0.4]]], [[[0.3, 0.0]]]])  # the last outside: it does not count
    mask = torch.tensor([[[[1.0, 1.0]]], [[[1.0, 0.0]]]])
    loss, before, after = losses(made, filled, truth, mask)
    first = 0.05 / (0.15 + 0.05) + 0.005 / (0.025 + 0.008)
    second = 0.1 / (0.1 + 0.05) + 0.01 / (0.01 + 0.008)
    assert loss.item() == pytest.approx((first + second) / 4, rel=1e-5)
    assert before.item() == pytest.approx(0.06 / 3, rel=1e-5) and after.item() == pytest.approx(0.02 / 3, rel=1e-5)


def test_what_a_step_sees() -> None:
    trainer = Trainer(TINY, tiny_pictures(), CPU)
    truth, x = trainer.batch(5)
    assert truth.shape == (3, 3, 32, 32) and x.shape == (3, 4, 32, 32) and truth.dtype == x.dtype == torch.float32
    mask = x[:, 3:] > 0
    outside = ~mask.expand(-1, 3, -1, -1)
    torch.testing.assert_close(x[:, :3][outside], truth[outside], rtol=0, atol=0)
    first = truth[0].permute(1, 2, 0).numpy()
    expected = biharmonic(first, mask[0, 0].numpy())
    np.testing.assert_allclose(x[0, :3].permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-5)
    for a, b in zip(trainer.batch(5), (truth, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(trainer.batch(6)[0], truth)
    torch.testing.assert_close(trainer.repaired(x), x[:, :3].clamp(0, 1), rtol=0, atol=1e-6)  # a new one does nothing


def test_the_learning_rate_rises_stays_and_falls() -> None:
    trainer = Trainer(replace(TINY, lr=0.5, epochs=10), tiny_pictures(), CPU)  # 2500 steps
    rates = []
    for trainer.steps in (0, 24, 49, 1500, 1750, 2000, 2499):
        trainer.step()
        rates.append(trainer.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.25, 0.5, 0.5, 0.375, 0.25, 0.0005])


def test_it_learns() -> None:
    """Stripes, which no smooth surface is."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, ::4] = picture[:, 1::4] = 200
    trainer = Trainer(Options(width=6, batch_size=4, size=32, lr=3e-3, amp="none"), Pictures((picture,), (1.0,)), CPU)
    for _ in range(80):
        trainer.step()
    gain = trainer.history()[:, CURVES.index("gain")]
    assert gain[-20:].mean() > 2 > gain[:5].abs().mean()


def test_a_stop_changes_no_bit(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        state = torch.random.get_rng_state()
        straight, stopped = (Trainer(TINY, tiny_pictures(), CPU) for _ in range(2))
        assert torch.equal(torch.random.get_rng_state(), state)
        for _ in range(4):
            straight.step()
        assert torch.equal(torch.random.get_rng_state(), state)
    stopped.step()
    stopped.step()
    save_checkpoint(tmp_path / "c.pt", stopped.state(), "repair")
    torch.rand(3)
    resumed = Trainer(TINY, tiny_pictures(), CPU)
    resumed.restore(load_checkpoint(tmp_path / "c.pt", "repair"))
    resumed.step()
    resumed.step()
    for name, tensor in straight.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], tensor, rtol=0, atol=0)
    torch.testing.assert_close(resumed.history(), straight.history(), rtol=0, atol=0)


def test_checkpoints_of_something_else() -> None:
    trainer = Trainer(TINY, tiny_pictures(), CPU)
    trainer.step()
    state = trainer.state()
    with pytest.raises(ValueError, match="not the photographs of the checkpoint"):
        Trainer(TINY, tiny_pictures(1), CPU).restore(state)
    fresh = Trainer(TINY, tiny_pictures(), CPU)
    for change, said in (
        ({"steps": -1}, "steps is -1"),
        ({"steps": 5}, "no curves of 5 steps"),
        ({"network": nn.Linear(2, 2).state_dict()}, "network: weight is unknown"),
        ({"optimiser": {}}, "the optimiser is not of the network's parameters"),
    ):
        with pytest.raises(CheckpointError, match=said):
            fresh.restore({**state, **change})
    fresh.restore(state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 60}, "--size 60: expected a multiple of 8, at most 192"),
        ({"size": 200}, "--size 200: expected a multiple of 8, at most 192"),
        ({"width": 2}, "--width 2: expected at least 3"),
        ({"batch_size": 0}, "--batch-size 0: expected at least 1"),
        ({"amp": "fp8"}, "--amp fp8: expected one of auto, bf16, none"),
        ({"lr": 0.0}, "--lr 0.0: expected a positive number"),
        ({"seed": 2**63}, "--seed"),
    ],
)
def test_options(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Options(**change)  # type: ignore[arg-type]


def test_the_command(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("--epochs", "2")) == 0
    said = capsys.readouterr().out
    assert "wrote out/repair/checkpoint.pt, repair.npz, samples/ and loss.png" in said
    assert "mean gain +0.20 dB, better in 1 of 2 cases" in said
    made = {p.relative_to("out/repair").as_posix() for p in Path("out/repair").rglob("*") if p.is_file()}
    assert made == {
        "checkpoint.pt",
        "loss.png",
        "repair.npz",
        "samples/epoch_0000.png",
        "samples/epoch_0001.png",
        "samples/epoch_0002.png",
    }
    state = load_checkpoint("out/repair/checkpoint.pt", "repair")
    for name, tensor in load_network("out/repair/repair.npz").state_dict().items():
        torch.testing.assert_close(tensor, state["network"][name].half().float(), rtol=0, atol=0)
    first = Path("out/repair/repair.npz").read_bytes()
    assert main(arguments("--epochs", "2", "--output", "again")) == 0
    assert Path("again/repair.npz").read_bytes() == first
    assert main(arguments("--resume")) == 0
    assert "nothing to do: out/repair/checkpoint.pt is at epoch 2" in capsys.readouterr().out
    assert main(arguments("--resume", "--epochs", "5")) == 2
    assert "--epochs 5: out/repair/checkpoint.pt was trained with 2" in capsys.readouterr().err


def test_an_interrupted_training_goes_on(
    short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step

    def interrupted(self: Trainer) -> torch.Tensor:
        values = step(self)
        if self.steps == 4:
            signal.raise_signal(signal.SIGTERM)
        return values

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert main(arguments("--epochs", "3")) == 143
    assert "Stopped after step 4 of 9" in capsys.readouterr().out
    monkeypatch.setattr(Trainer, "step", step)
    assert main(["train", "repair", "--resume", "--device", "cpu"]) == 0
    assert main(arguments("--epochs", "3", "--output", "straight")) == 0
    assert Path("straight/repair.npz").read_bytes() == Path("out/repair/repair.npz").read_bytes()


@pytest.mark.slow
def test_a_short_training_on_the_photographs() -> None:
    """A minute: already better than the filling it refines, pooled over what it has not seen yet."""
    try:
        pictures = Pictures.load()
    except WeightsError as error:
        pytest.skip(f"the photographs cannot be had: {error}")
    options = Options(width=24, epochs=1, lr=2e-3)
    trainer = Trainer(options, pictures, CPU)
    for _ in range(repair_training.STEPS_PER_EPOCH):
        trainer.step()
    assert trainer.history()[-100:, CURVES.index("gain")].mean() > 0.1
