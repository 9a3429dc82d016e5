"""Training a GAN: losses and penalties by hand, exact resumption, interruption, divergence, the command line."""

from __future__ import annotations

import gzip
import io
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cnnfast import fetch
from cnnfast.__main__ import main
from cnnfast.fetch import WeightsError
from cnnfast.generators import DCGANConfig
from cnnfast.messages import UsageError
from cnnfast.tasks import data, job, losses, train
from cnnfast.tasks.checkpoint import CheckpointError, load_checkpoint, load_generator, save_checkpoint
from cnnfast.tasks.data import SETS, DataError, load_images, sample_order
from cnnfast.tasks.discriminator import DCGANDiscriminator
from cnnfast.tasks.gan import CURVES, Options, Trainer, least_memory
from cnnfast.tasks.interrupt import Interrupt
from cnnfast.tasks.losses import LOSSES, critic_terms, interpolation_penalty, r1_penalty

image_module = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

CPU = torch.device("cpu")
TINY = Options(width=2, nz=4, image_size=16, batch_size=4, epochs=2)


def images(count: int = 10, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten 20x17 pictures."""
    path = tmp_path / "pictures"
    path.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 17, 20, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        image_module.fromarray(picture).save(path / f"{i}.png")
    return path


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    tiny = "train gan --width 2 --nz 4 --image-size 16 --batch-size 4 --device cpu".split()
    return [*tiny, "--data", str(folder), "--output", str(output), *more]


# --- losses -----------------------------------------------------------------------------------------------------------

REAL, FAKE = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([-3.0, -0.5, 1.0])


def gradients(value: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(value, of)


def test_bce_is_cross_entropy_of_logits() -> None:
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    value = losses.bce(real, fake)
    p, q = real.sigmoid(), fake.sigmoid()
    torch.testing.assert_close(value, -(p.log().mean() + (1 - q).log().mean()))
    d_real, d_fake = gradients(value, real, fake)
    torch.testing.assert_close(d_real, -(1 - p.detach()) / 3)
    torch.testing.assert_close(d_fake, q.detach() / 3)
    value = losses.bce_generator(fake)
    torch.testing.assert_close(value, -q.log().mean())
    torch.testing.assert_close(gradients(value, fake)[0], -(1 - q.detach()) / 3)
    assert torch.isfinite(losses.bce(torch.tensor([-1e4]), torch.tensor([1e4])))


def test_hinge_and_wasserstein() -> None:
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    value = losses.hinge(real, fake)
    assert value.item() == pytest.approx((3 + 0.5 + 0) / 3 + (0 + 0.5 + 2) / 3)
    d_real, d_fake = gradients(value, real, fake)
    torch.testing.assert_close(d_real, torch.tensor([-1.0, -1.0, 0.0]) / 3)
    torch.testing.assert_close(d_fake, torch.tensor([0.0, 1.0, 1.0]) / 3)
    value = losses.wasserstein(real, fake)
    assert value.item() == pytest.approx(-2.5 / 3 - 1.5 / 3)
    d_real, d_fake = gradients(value, real, fake)
    torch.testing.assert_close((d_real, d_fake), (torch.full((3,), -1 / 3), torch.full((3,), 1 / 3)))
    torch.testing.assert_close(gradients(losses.score_generator(fake), fake)[0], torch.full((3,), -1 / 3))


def test_penalties_of_a_linear_critic_by_hand() -> None:
    w = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    real, fake = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64)

    def critic(x: torch.Tensor) -> torch.Tensor:
        return (w * x).flatten(1).sum(1)

    norm = w.detach().norm()
    value = interpolation_penalty(critic, real, fake, torch.rand(4, dtype=torch.float64))
    torch.testing.assert_close(value.detach(), (norm - 1) ** 2)
    torch.testing.assert_close(gradients(value, w)[0], 2 * (norm - 1) * w.detach() / norm)
    real.requires_grad_()
    value = r1_penalty(critic(real), real)
    torch.testing.assert_close(value.detach(), norm**2 / 2)
    torch.testing.assert_close(gradients(value, w)[0], w.detach())


def test_the_penalty_is_taken_between_the_images() -> None:
    seen = []

    def critic(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach().clone())
        return x.square().flatten(1).sum(1) / 2  # its gradient is x

    real, fake = torch.zeros(2, 1, 1, 2), torch.full((2, 1, 1, 2), 4.0)
    value = interpolation_penalty(critic, real, fake, torch.tensor([0.25, 0.5]))
    assert seen[0].flatten(1).tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert value.item() == pytest.approx(((2**0.5 - 1) ** 2 + (8**0.5 - 1) ** 2) / 2)


@pytest.mark.parametrize("name", ["wgan-gp", "hinge-r1"])
def test_the_critics_gradient_by_differences(name: str) -> None:
    """First derivatives in the parameters of what is minimised: second derivatives of the network."""
    torch.manual_seed(0)
    model = DCGANDiscriminator(DCGANConfig(ngf=2, nc=1, image_size=16), norm=LOSSES[name].norm).double()
    for p in model.parameters():  # far from the kinks of LeakyReLU and of the hinge
        p.data.mul_(3)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    real, fake = torch.randn(2, 2, 1, 16, 16, dtype=torch.float64)
    mix = torch.rand(2, dtype=torch.float64)

    def objective(*values: torch.Tensor) -> torch.Tensor:
        weights = dict(zip(names, values, strict=True))
        return critic_terms(
            LOSSES[name], lambda x: torch.func.functional_call(model, weights, (x,)), real, fake, mix
        ).total

    values = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
    assert torch.autograd.gradcheck(objective, values, eps=1e-7, atol=1e-5, fast_mode=True)


def test_no_gradient_reaches_the_generator_in_the_critics_step() -> None:
    fake = torch.randn(2, 1, 4, 4, requires_grad=True)
    w = torch.randn(1, 1, 4, 4, requires_grad=True)
    real = torch.randn(2, 1, 4, 4)
    for loss in LOSSES.values():
        terms = critic_terms(loss, lambda x: (w * x).flatten(1).sum(1), real, fake, torch.rand(2))
        terms.total.backward()
        assert fake.grad is None and w.grad is not None and not real.requires_grad
        torch.testing.assert_close(terms.total, terms.loss + terms.penalty)
        assert (terms.penalty.item() > 0) == bool(loss.interpolation or loss.r1)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_the_discriminator_mirrors_the_generator(size: int, norm: str) -> None:
    config = DCGANConfig(ngf=2, nc=3, image_size=size)
    model = DCGANDiscriminator(config, norm=norm)
    assert model(torch.randn(2, 3, size, size)).shape == (2,)
    widths = [m.out_channels for m in model.main if isinstance(m, nn.Conv2d)]
    assert widths == [*reversed(config.widths), 1]
    norms = sum(isinstance(m, (nn.BatchNorm2d, nn.InstanceNorm2d)) for m in model.main)
    assert norms == (0 if norm == "none" else len(widths) - 2)


def test_an_unknown_norm() -> None:
    with pytest.raises(ValueError, match="norm='layer': expected one of batch, instance, none"):
        DCGANDiscriminator(DCGANConfig(), norm="layer")


@pytest.mark.parametrize("name", ["wgan-gp", "hinge-r1"])
def test_a_penalised_critic_does_not_mix_images(name: str) -> None:
    model = DCGANDiscriminator(DCGANConfig(ngf=4, nc=1, image_size=16), norm=LOSSES[name].norm)
    x = torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


# --- the trainer ------------------------------------------------------------------------------------------------------


def trained(options: Options, steps: int, pixels: torch.Tensor | None = None) -> Trainer:
    trainer = Trainer(options, images() if pixels is None else pixels, CPU)
    for _ in range(steps):
        trainer.step()
    return trainer


def assert_same_bits(a: object, b: object, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple)) and len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(left, right, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("loss", LOSSES)
def test_a_resumed_training_equals_an_uninterrupted_one(loss: str, tmp_path: Path) -> None:
    options = replace(TINY, loss=loss)
    whole = trained(options, 5).state()
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, trained(options, 2).state())
    torch.manual_seed(99)  # nothing may depend on it
    resumed = Trainer(options, images(), CPU)
    resumed.restore(load_checkpoint(path))
    for _ in range(3):
        resumed.step()
    assert resumed.steps == 5
    assert_same_bits(resumed.state(), whole)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_part_learns_and_the_seed_decides(loss: str) -> None:
    options = replace(TINY, loss=loss)
    before = torch.get_rng_state()
    start, after, again = trained(options, 0), trained(options, 2), trained(options, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(again.state(), after.state())
    for module in ("generator", "discriminator"):
        moved = [
            not torch.equal(p, q)
            for p, q in zip(getattr(start, module).parameters(), getattr(after, module).parameters(), strict=True)
        ]
        assert all(moved), module
    assert after.history().shape == (2, len(CURVES)) and after.finite()
    other = trained(replace(options, seed=1), 2)
    assert not torch.equal(other.history(), after.history())


def test_the_critics_weights_stay_in_the_generators_step() -> None:
    """One step by hand, as pytorch/examples does it."""
    trainer, byhand = trained(replace(TINY, instance_noise=0.0), 0), trained(replace(TINY, instance_noise=0.0), 0)
    trainer.step()
    options, g, d = byhand.options, byhand.generator, byhand.discriminator
    z = torch.randn(4, 4, 1, 1, generator=data.generator_of(options.seed, "noise", 0))
    real = byhand.images[sample_order(options.seed, 0, 4, 10)].float() / 127.5 - 1
    fake = g(z)
    criterion = nn.BCEWithLogitsLoss()
    error = criterion(d(real), torch.ones(4)) + criterion(d(fake.detach()), torch.zeros(4))
    error.backward()
    byhand.optimisers["discriminator"].step()
    criterion(d(fake), torch.ones(4)).backward()
    byhand.optimisers["generator"].step()
    for module in ("generator", "discriminator"):
        ours, theirs = getattr(trainer, module).state_dict(), getattr(byhand, module).state_dict()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss", LOSSES)
def test_cnnfast_layers_train_as_torchs(loss: str) -> None:
    """Three steps: not farther from nn.Sequential than twice its own change with the memory format."""
    options = replace(TINY, loss=loss, width=4)
    ours = trained(options, 3)
    theirs = trained(replace(options, layers="torch"), 3)
    assert type(theirs.generator.main) is nn.Sequential and type(ours.generator.main) is not nn.Sequential
    yardstick = Trainer(replace(options, layers="torch"), images(), CPU)
    for module in (yardstick.generator, yardstick.discriminator):
        module.to(memory_format=torch.contiguous_format)
    for _ in range(3):
        yardstick.step()

    def distance(a: Trainer, b: Trainer) -> float:
        return (a.history() - b.history()).abs().max().item()

    floor = 8 * torch.finfo(torch.float32).eps * theirs.history().abs().max().item()
    assert distance(ours, theirs) <= 2 * distance(yardstick, theirs) + floor


def test_bf16_autocast() -> None:
    for loss in LOSSES:
        low, full = trained(replace(TINY, loss=loss, amp="bf16"), 2), trained(replace(TINY, loss=loss), 2)
        assert low.finite() and not torch.equal(low.history(), full.history())
        assert {p.dtype for p in low.generator.parameters()} == {torch.float32}
        torch.testing.assert_close(low.history()[0], full.history()[0], rtol=0.1, atol=0.1)


def test_the_moving_average() -> None:
    trainer = trained(TINY, 1)
    name, before = next((n, t.clone()) for n, t in trainer.average.state_dict().items())
    trainer.step()
    weight = 1 - 0.5 ** (4 / (0.05 * 8))  # four images a step, eight seen
    expected = torch.lerp(before, trainer.generator.state_dict()[name], weight)
    assert torch.equal(trainer.average.state_dict()[name], expected)
    tracked = "main.1.num_batches_tracked"
    assert trainer.average.state_dict()[tracked] == trainer.generator.state_dict()[tracked] == 2
    mean = "main.1.running_mean"
    assert not torch.equal(trainer.average.state_dict()[mean], trainer.generator.state_dict()[mean])


def test_the_moving_average_begins_with_the_start() -> None:
    """Not with a copy of the first step's weights, which is what `AveragedModel` does with its first model."""
    before = {name: value.clone() for name, value in trained(TINY, 0).average.state_dict().items()}
    trainer = trained(TINY, 1)
    weight = 1 - 0.5 ** (4 / (0.05 * 4))
    for name, value in trainer.average.state_dict().items():
        source = trainer.generator.state_dict()[name]
        assert torch.equal(value, torch.lerp(before[name], source, weight) if value.is_floating_point() else source)
    assert trainer.state()["average"].keys() == trainer.generator.state_dict().keys()


def test_the_memory_that_is_asked_for_ahead_is_no_more_than_is_needed() -> None:
    trainer = trained(replace(TINY, width=4), 0)
    generator, discriminator = (
        sum(p.numel() for p in m.parameters()) for m in (trainer.generator, trainer.discriminator)
    )
    weights = 4 * (5 * generator + 4 * discriminator)
    assert 0.9 * weights < least_memory(trainer.config, 0) <= weights
    first, second = least_memory(trainer.config, 1), least_memory(trainer.config, 2)
    assert second - first == first - least_memory(trainer.config, 0) == 4 * 2 * (8 * 16 + 4 * 64 + 1 * 256)


def test_other_images_are_refused() -> None:
    state = trained(TINY, 1).state()
    with pytest.raises(ValueError, match="--data digits: these are not the images of the checkpoint"):
        Trainer(TINY, images(11), CPU).restore(state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "mse"}, "--loss mse: expected one of bce, wgan-gp, hinge-r1"),
        ({"amp": "fp16"}, "--amp fp16: expected one of bf16"),
        ({"layers": "jax"}, "--layers jax: expected one of cnnfast, torch"),
        ({"batch_size": 0}, "--batch-size 0: expected at least 1"),
        ({"epochs": 0}, "--epochs 0: expected at least 1"),
        ({"seed": -1}, "--seed -1: expected at least 0"),
        ({"seed": 2**63}, "--seed 9223372036854775808: expected less than"),
        ({"lr": 0.0}, "--lr 0.0: expected a positive number"),
        ({"lr": 1e39}, r"--lr 1e\+39: expected a positive number"),
        ({"instance_noise": float("inf")}, "--instance-noise inf: expected at least 0"),
        ({"lr": float("nan")}, "--lr nan: expected a positive number"),
        ({"instance_noise": -0.1}, "--instance-noise -0.1: expected at least 0"),
        ({"image_size": 48}, "image_size=48 must be a power of two"),
    ],
)
def test_options_are_checked(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**wrong)  # type: ignore[arg-type]


# --- images -----------------------------------------------------------------------------------------------------------


def test_the_order_of_samples() -> None:
    first = sample_order(3, 0, 10, 10)
    assert sorted(first.tolist()) == list(range(10))
    stream = sample_order(3, 0, 35, 10)
    assert torch.equal(stream[:10], first) and sorted(stream[20:30].tolist()) == list(range(10))
    assert torch.equal(sample_order(3, 17, 9, 10), stream[17:26])
    assert not torch.equal(stream[:10], stream[10:20]) and not torch.equal(sample_order(4, 0, 10, 10), first)
    assert not torch.equal(sample_order(3, 0, 50, 50), sample_order(3 + 2**32, 0, 50, 50))


def test_a_folder_of_pictures(folder: Path) -> None:
    pixels = load_images(str(folder), 16)
    assert pixels.shape == (10, 3, 16, 16) and pixels.dtype == torch.uint8
    for name in (str(folder / "nothing"), str(folder / "1.png"), "", "x" * 300):
        with pytest.raises(UsageError, match=f"{name}: expected one of digits, faces, tissue, or a folder"):
            load_images(name, 16)
    (folder / "._1.png").write_bytes(b"what a Mac leaves beside every file")
    assert len(load_images(str(folder), 16)) == 10
    (folder / "5.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="5.png cannot be read"):
        load_images(str(folder), 16)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="0 images .*expected at least 2"):
        load_images(str(folder), 16)


def test_sets_are_parsed() -> None:
    rows = np.zeros((3, 65))
    rows[1, :64], rows[:, 64] = 16, 7
    text = "\n".join(",".join(f"{int(v)}" for v in row) for row in rows).encode()
    digits = SETS["digits"].parse(gzip.compress(text), 16)
    assert digits.shape == (3, 1, 16, 16) and [int(d.unique()) for d in digits] == [0, 255, 0]
    buffer = io.BytesIO()
    np.save(buffer, np.linspace(0, 1, 200 * 25 * 25).reshape(200, 25, 25))
    faces = SETS["faces"].parse(buffer.getvalue(), 32)
    assert faces.shape == (200, 1, 32, 32) and faces.max() < 129  # the second half is left out
    assert torch.equal(faces[:100], faces[100:].flip(-1))
    buffer = io.BytesIO()
    image_module.fromarray(np.zeros((100, 120, 3), np.uint8)).save(buffer, format="PNG")
    assert SETS["tissue"].parse(buffer.getvalue(), 64).shape == (2 * 3 * 4, 3, 64, 64)


def fake_set(monkeypatch: pytest.MonkeyPatch, contents: bytes) -> None:
    file = replace(
        SETS["digits"].file,
        package="fake-images",
        member="fakeimages_cnnfast/data/x.bin",
        sha256=fetch._sha256(contents),
        size=len(contents),
    )
    entry = replace(SETS["digits"], file=file, parse=lambda data, size: torch.tensor(list(data)))
    monkeypatch.setattr(data, "SETS", {"fake": entry})


def no_network(arguments: list[str]) -> tuple[int, str]:
    return 1, "Name or service not known"


def test_an_installed_package_is_used_if_it_has_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path / "cache"))
    fake_set(monkeypatch, b"abc")
    file = tmp_path / "fakeimages_cnnfast" / "data" / "x.bin"
    file.parent.mkdir(parents=True)
    (tmp_path / "fakeimages_cnnfast" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    file.write_bytes(b"abc")
    assert load_images("fake", 8, no_network).tolist() == list(b"abc")
    file.write_bytes(b"abd")  # another release's
    with pytest.raises(WeightsError, match="could not download fake-images"):
        load_images("fake", 8, no_network)


def test_offline_says_what_can_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path))
    fake_set(monkeypatch, b"abc")
    with pytest.raises(WeightsError) as caught:
        load_images("fake", 8, no_network)
    said = str(caught.value)
    assert "Name or service not known" in said and str(tmp_path) in said and "weights_file" not in said
    assert "or install fake-images, or train on your own images: --data FOLDER" in said


# --- the job ----------------------------------------------------------------------------------------------------------


def test_the_job_end_to_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(arguments(folder, output, "--epochs", "2")) == 0
    said = capsys.readouterr().out
    assert "10 images of" in said and "epoch 1/2: critic" in said and "epoch 2/2" in said and "images/s" in said
    names = sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file())
    assert names == ["checkpoint.pt", "loss.png", "real.png", "samples/epoch_0001.png", "samples/epoch_0002.png"]
    with image_module.open(output / "samples" / "epoch_0002.png") as picture:
        assert picture.format == "PNG" and picture.size == (8 * 18 + 2, 8 * 18 + 2)
    with image_module.open(output / "loss.png") as picture:
        assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 5
    steps = load_checkpoint(output / "checkpoint.pt")["steps"]
    assert steps == 2 * 3

    # A second training does not destroy the first; --resume goes on, with the options of before.
    assert main(arguments(folder, output)) == 2
    assert "checkpoint.pt exists: go on from it with --resume" in capsys.readouterr().err
    assert main(["train", "gan", "--resume", "--output", str(output), "--epochs", "3", "--device", "cpu"]) == 0
    assert "from step 6 to epoch 3" in capsys.readouterr().out
    assert load_checkpoint(output / "checkpoint.pt")["steps"] == 9
    assert main(arguments(folder, output, "--resume", "--batch-size", "8")) == 2
    assert "--batch-size 8: " in capsys.readouterr().err
    other = arguments(folder, tmp_path / "uninterrupted", "--epochs", "3")
    assert main(other) == 0
    resumed, whole = (load_checkpoint(o / "checkpoint.pt") for o in (output, tmp_path / "uninterrupted"))
    assert_same_bits(resumed, whole)

    # The trained generator is usable.
    model = load_generator(output / "checkpoint.pt")
    z = torch.randn(3, 4, 1, 1)
    assert not model.training and model(z).shape == (3, 3, 16, 16)
    assert main(["sample", str(output / "checkpoint.pt"), "--output", str(tmp_path / "s.png"), "--count", "3"]) == 0
    with image_module.open(tmp_path / "s.png") as picture:
        assert picture.size == (8 * 18 + 2, 18 + 2)
    assert load_generator(str(output / "checkpoint.pt")).config == model.config


def test_resuming_from_nothing_and_from_rubbish(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path / "out", "--resume")) == 2
    assert "checkpoint.pt is not a file: there is no checkpoint to go on from" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "checkpoint.pt"
    path.write_bytes(b"rubbish")
    assert main(arguments(folder, tmp_path / "out", "--resume")) == 1
    assert "cannot be read as a checkpoint" in capsys.readouterr().err
    torch.save({"format": "other"}, path)
    with pytest.raises(CheckpointError, match="is no checkpoint of"):
        load_checkpoint(path)
    save_checkpoint(path, {"steps": 1})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"steps": 1})

    def fails(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"steps": 2})
    assert load_checkpoint(path)["steps"] == 1 and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_ends_with_a_message(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path / "out", "--epochs", "1")) == 0

    def full(path: Path, state: dict[str, object], name: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(job, "save_checkpoint", full)
    assert main(arguments(folder, tmp_path / "out", "--resume", "--epochs", "2")) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: No space left on device. ") and "is as it was after step 3. Go on with: " in said
    assert said.count("\n") == 1


def test_running_out_of_memory_in_a_step_ends_with_a_message(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step

    def hungry(self: Trainer) -> torch.Tensor:
        if self.steps == 4:
            torch.empty(2**50)
        return step(self)

    monkeypatch.setattr(Trainer, "step", hungry)
    assert main(arguments(folder, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: ") and "is as it was after step 3. Go on with: " in said
    assert said.count("\n") == 1


def test_a_training_that_is_done_says_so_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(arguments(folder, output, "--epochs", "2")) == 0
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    resume = ["train", "gan", "--resume", "--output", str(output), "--device", "cpu"]
    for arguments_ in (resume, [*resume, "--epochs", "2"]):
        assert main(arguments_) == 0
        said = capsys.readouterr()
        assert said.out == f"nothing to do: {output}/checkpoint.pt is at epoch 2; more with --epochs 3 or above\n"
    assert main([*resume, "--epochs", "1"]) == 2
    said = capsys.readouterr()
    assert said.err == f"error: --epochs 1: {output}/checkpoint.pt is past that, at epoch 2\n" and said.out == ""
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before


def test_a_training_past_the_epochs_in_the_middle_of_one(tmp_path: Path, folder: Path) -> None:
    options = replace(TINY, data=str(folder), output=tmp_path, epochs=3)
    save_checkpoint(tmp_path / "checkpoint.pt", trained(options, 4, load_images(str(folder), 16)).state())
    with pytest.raises(UsageError, match="--epochs 1: .* is past that, at epoch 1 and step 1 of the next"):
        train.run(resume=True, output=tmp_path, epochs=1, device="cpu")


def test_layers_are_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(arguments(folder, tmp_path / "out", "--epochs", "1", "--layers", "torch")) == 0
    seen = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: seen.append(type(self.generator.main)) or step(self))
    resume = ["train", "gan", "--resume", "--output", str(tmp_path / "out"), "--device", "cpu", "--epochs", "2"]
    assert main(resume) == 0 and main([*resume[:-1], "3", "--layers", "cnnfast"]) == 0
    assert [t.__module__.split(".")[0] for t in seen] == ["torch"] * 3 + ["cnnfast"] * 3


@pytest.mark.parametrize("where", ["loss", "last update"])
def test_divergence_keeps_the_last_good_checkpoint(
    where: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight becomes NaN: before step 5 of 6 (seen in its loss), or in step 6 (seen in no loss)."""
    step = Trainer.step

    def poisoned(self: Trainer) -> torch.Tensor:
        if where == "loss" and self.steps == 4:
            self.generator.main[0].weight.data[0] = float("nan")
        values = step(self)
        if where == "last update" and self.steps == 6:
            self.generator.main[0].weight.data[0] = float("nan")
        return values

    monkeypatch.setattr(Trainer, "step", poisoned)
    assert main(arguments(folder, tmp_path / "out", "--epochs", "4")) == 1
    said = capsys.readouterr().err
    assert ("step 5: generator is nan" if where == "loss" else "step 6: a weight is not finite") in said.replace(
        "critic", "generator"
    )
    assert "is as it was after step 3" in said and "a smaller --lr may help" in said and "--resume" in said
    state = load_checkpoint(tmp_path / "out" / "checkpoint.pt")
    assert state["steps"] == 3 and all(torch.isfinite(t).all() for t in state["generator"].values())


def test_options_of_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--loss", "mse"], ["--epochs", "0"], ["--amp", "fp16"], ["--layers", "jax"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments(folder, tmp_path / "out", *wrong))
    for wrong, message in (
        (["--image-size", "48"], "image_size=48 must be a power of two"),
        (["--lr", "-1"], "--lr -1.0: expected a positive number"),
        (["--device", "cuda:xyz"], "--device cuda:xyz: "),
    ):
        assert main([*arguments(folder, tmp_path / "out"), *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", "gan", "--data", str(tmp_path / "absent"), "--output", str(tmp_path / "out")]) == 2
    assert "expected one of digits, faces, tissue" in capsys.readouterr().err


def test_missing_packages_are_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "REQUIRES", {"tqdm": "no_such_module"})
    assert main(arguments(folder, tmp_path / "out")) == 1
    assert capsys.readouterr().err == "error: train needs tqdm: pip install tqdm\n"


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_that_goes_on(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-u", "-m", "cnnfast", *arguments(folder, output, "--epochs", "100000")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # the same sums as here
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number, err
    assert f"{number.name}: stopping after this step" in err and "Traceback" not in err
    assert "Go on with: python -m cnnfast train gan --resume --output" in out
    assert not [p for p in output.iterdir() if p.name.startswith(".")]
    state = load_checkpoint(output / "checkpoint.pt")
    assert state["steps"] >= 3 and f"Stopped after step {state['steps']} of" in out

    # What was left equals a training that was never interrupted, and it goes on.
    options = Options(**{**state["options"], "epochs": state["epochs"], "layers": state["layers"]})
    whole = trained(options, state["steps"], load_images(str(folder), 16))
    assert_same_bits(state, {"format": state["format"], **whole.state()})
    epochs = state["steps"] // whole.steps_per_epoch + 1
    assert main(["train", "gan", "--resume", "--output", str(output), "--epochs", str(epochs), "--device", "cpu"]) == 0
    assert load_checkpoint(output / "checkpoint.pt")["steps"] == epochs * whole.steps_per_epoch


def test_a_signal_before_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save_and_signal(path: Path, pictures: torch.Tensor, columns: int = 8) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "save_grid", save_and_signal)
    assert main(arguments(folder, tmp_path / "out")) == 130
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pt")["steps"] == 0
    monkeypatch.undo()
    resume = ["train", "gan", "--resume", "--output", str(tmp_path / "out"), "--epochs", "1", "--device", "cpu"]
    assert main(resume) == 0


def test_the_second_signal_stops_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step

    def interrupted(self: Trainer) -> torch.Tensor:
        if self.steps == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert main(arguments(folder, tmp_path / "out")) == 130
    assert "stopped at once" in (said := capsys.readouterr().err) and "is as it was after step 3" in said
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pt")["steps"] == 3
    assert signal.getsignal(signal.SIGINT) is handler


def test_handlers_are_restored_and_threads_do_without() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt("stopping") as interrupt:
        assert interrupt.signal is None
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    seen = []

    def work() -> None:
        with Interrupt("stopping") as inner:
            seen.append(inner.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
