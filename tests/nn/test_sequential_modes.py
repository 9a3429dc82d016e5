"""cnnfast.Sequential in training: bookkeeping, modes, frozen parameters, what users overwrite, copies, wrappers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cnnfast
from cnnfast.nn import chain

from .test_sequential_training import NORMS, generator, loss_of, randomized, x2d

CT = nn.ConvTranspose2d


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activations of the fused steps that ran, in order."""
    ran: list[str] = []
    real = chain.run_step

    def spy(step, operands, **kwargs):  # type: ignore[no-untyped-def]
        ran.append(step.activation.name)
        return real(step, operands, **kwargs)

    monkeypatch.setattr(chain, "run_step", spy)
    monkeypatch.setattr("cnnfast.cpu.backend._ready", lambda *how: None)  # all by `run_step`
    return ran


def both(plain: nn.Sequential) -> tuple[nn.Sequential, cnnfast.Sequential]:
    return plain, cnnfast.Sequential(*copy.deepcopy(plain))


def assert_same_state(plain: nn.Module, ours: nn.Module, versions: bool = True) -> None:
    """Buffers within rounding, counters and their versions exactly."""
    for (name, a), (_, b) in zip(plain.named_buffers(), ours.named_buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        if not a.is_floating_point():
            assert torch.equal(a, b) and (a._version == b._version or not versions)


# --- bookkeeping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("norm", NORMS)
def test_statistics_over_several_batches_and_modes(norm: str, grad: bool, steps: list[str]) -> None:
    plain, ours = both(generator(NORMS[norm][0]))
    with torch.set_grad_enabled(grad):
        for k, train in enumerate((True, True, False, True, False)):
            for model in (plain, ours):
                model.train(train)
            torch.testing.assert_close(ours(x2d(seed=k)), plain(x2d(seed=k)), rtol=1e-4, atol=1e-4)
            assert_same_state(plain, ours)
    assert len(steps) >= 15


def test_attributes_changed_between_steps() -> None:
    plain, ours = both(generator(NORMS["batch"][0]))
    changes: list[Callable[[Any], object]] = [
        lambda m: setattr(m, "momentum", 0.7),
        lambda m: setattr(m, "momentum", None),
        lambda m: m.reset_running_stats(),
        lambda m: setattr(m, "eps", 0.3),
        lambda m: setattr(m, "track_running_stats", False),
        lambda m: setattr(m, "num_batches_tracked", None),
        lambda m: setattr(m, "track_running_stats", True),
        lambda m: setattr(m, "momentum", 0.2),
        lambda m: (setattr(m, "running_mean", None), setattr(m, "running_var", None)),
        lambda m: (setattr(m, "weight", None), setattr(m, "bias", None)),
    ]
    for change in changes:
        for model in (plain, ours):
            change(model[1])
        torch.testing.assert_close(ours(x2d()), plain(x2d()), rtol=1e-4, atol=1e-4)
        assert_same_state(plain, ours)


@pytest.mark.parametrize(
    ("modules", "shape"),
    [
        ([nn.ConvTranspose2d(6, 8, 1), nn.BatchNorm2d(8)], (1, 6, 1, 1)),
        ([nn.Conv2d(6, 8, 3), nn.SyncBatchNorm(8), nn.ReLU()], (1, 6, 3, 3)),
        ([nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8, momentum=None)], (1, 6, 3)),
        ([nn.Conv2d(6, 8, 3), nn.InstanceNorm2d(8)], (4, 6, 3, 3)),
        ([nn.Conv1d(6, 8, 3), nn.InstanceNorm1d(8)], (4, 6, 3)),
        ([nn.Conv2d(6, 8, 3), nn.GroupNorm(8, 8)], (1, 6, 3, 3)),
        ([nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)], (2, 5, 3, 3)),
        ([nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)], (2, 6, 2, 3)),
        ([nn.Conv2d(6, 8, 3), nn.GroupNorm(3, 9)], (2, 6, 4, 3)),
        ([nn.Conv2d(6, 8, 3), nn.BatchNorm1d(8)], (2, 6, 4, 3)),
    ],
    ids=lambda v: "-".join(type(m).__name__ for m in v) if isinstance(v, list) else "x".join(map(str, v)),
)
def test_errors_and_counters_are_torchs(modules: list[nn.Module], shape: tuple[int, ...]) -> None:
    plain, ours = both(nn.Sequential(*modules))
    x = x2d(*shape)
    with pytest.raises((RuntimeError, ValueError)) as want:
        plain(x)
    with pytest.raises(type(want.value)) as got:
        ours(x)
    assert str(got.value) == str(want.value)
    assert_same_state(plain, ours)


def test_a_shared_norm_counts_each_use() -> None:
    conv, norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=None)
    plain, ours = both(nn.Sequential(conv, norm, nn.ReLU(), conv, norm))
    loss_of(plain(x2d())).backward()
    loss_of(ours(x2d())).backward()
    assert_same_state(plain, ours)
    assert ours[1] is ours[4] and ours[1].num_batches_tracked == 2
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)


# --- modes and flags --------------------------------------------------------------------------------------------------


def test_frozen_parameters(steps: list[str]) -> None:
    plain, ours = both(generator(NORMS["batch"][0]))
    for model in (plain, ours):
        model.requires_grad_(False)
        assert not model(x2d()).requires_grad
        model[4].weight.requires_grad_()
        model[5].bias.requires_grad_()
        loss_of(model(x2d())).backward()
    assert len(steps) == 4 + 4
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is not None) == (q.grad is not None) == (name in ("4.weight", "5.bias"))
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_input_alone(steps: list[str]) -> None:
    plain, ours = both(generator(NORMS["instance"][0]).requires_grad_(False))
    grads = []
    for model in (plain, ours):
        x = x2d().requires_grad_()
        grads.append(torch.autograd.grad(loss_of(model(x)), x)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
    assert len(steps) == 4


@pytest.mark.parametrize("train", [True, False])
def test_inference_mode(train: bool, steps: list[str]) -> None:
    plain, ours = both(generator(NORMS["batch"][0], train))
    with torch.inference_mode():
        got, want = ours(x2d()), plain(x2d())
    assert got.is_inference() and want.is_inference()
    torch.testing.assert_close(got.clone(), want.clone(), rtol=1e-4, atol=1e-5)
    assert_same_state(plain, ours)
    assert steps


def test_dropout_in_training_mode_stands_alone(steps: list[str]) -> None:
    modules = (CT(6, 8, 3), nn.Dropout2d(), nn.BatchNorm2d(8), nn.ReLU(), CT(8, 4, 2), nn.Dropout())
    plain, ours = both(nn.Sequential(*modules))
    results = []
    for model in (plain, ours):
        torch.manual_seed(3)
        results.append(model(x2d()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert steps == ["identity", "identity"]


# --- what users overwrite ---------------------------------------------------------------------------------------------

LAST: dict[str, list[nn.Module]] = {
    "convolution": [],
    "norm": [nn.BatchNorm2d(4)],
    "group": [nn.GroupNorm(2, 4)],
    "relu": [nn.ReLU()],
    "relu-in-place": [nn.ReLU(inplace=True)],
    "leaky": [nn.LeakyReLU(0.2)],
    "leaky-in-place": [nn.LeakyReLU(0.2, inplace=True)],
    "leaky-negative-in-place": [nn.LeakyReLU(-0.2, inplace=True)],
    "elu": [nn.ELU()],
    "elu-in-place": [nn.ELU(inplace=True)],
    "hardtanh": [nn.Hardtanh()],
    "relu6-in-place": [nn.ReLU6(inplace=True)],
    "silu": [nn.SiLU(inplace=True)],
    "mish": [nn.Mish()],
    "mish-in-place": [nn.Mish(inplace=True)],
    "gelu": [nn.GELU()],
    "prelu": [nn.PReLU()],
    "tanh": [nn.Tanh()],
    "sigmoid": [nn.Sigmoid()],
    "norm-leaky": [nn.BatchNorm2d(4), nn.LeakyReLU(0.2)],
    "norm-elu": [nn.InstanceNorm2d(4), nn.ELU()],
    "norm-relu": [nn.BatchNorm2d(4), nn.ReLU()],
    "norm-silu": [nn.GroupNorm(2, 4), nn.SiLU()],
    "norm-leaky-in-place": [nn.BatchNorm2d(4), nn.LeakyReLU(0.2, inplace=True)],
}


@pytest.mark.parametrize("name", LAST)
def test_the_result_may_be_overwritten_where_eagers_may(name: str) -> None:
    """Autograd complains about a tensor it needs only where it complains with nn.Sequential, and is right otherwise."""
    modules = nn.Sequential(nn.ConvTranspose2d(6, 4, 3), *LAST[name])
    kept, plain, ours = (m(*copy.deepcopy(modules)) for m in (nn.Sequential, nn.Sequential, cnnfast.Sequential))
    if name != "leaky-negative-in-place":  # whose gradient PyTorch refuses in any case
        y = kept(x2d()) + 1
        loss_of(y * y).backward()
    failed = []
    for model in (plain, ours):
        y = model(x2d())
        y += 1
        try:
            loss_of(y * y).backward()
        except RuntimeError as error:
            failed.append(model)
            assert "modified by an inplace operation" in str(error) or "in-place" in str(error)
    assert ours not in failed or plain in failed
    if ours not in failed:
        for p, q in zip(kept.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)


def test_overwriting_in_the_next_module(steps: list[str]) -> None:
    plain, ours = both(nn.Sequential(CT(6, 8, 3), nn.LeakyReLU(0.2), nn.Threshold(0.1, 0.5, inplace=True)))
    grads = []
    for model in (plain, ours):
        loss_of(model(x2d())).backward()
        grads.append(model[0].weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
    assert len(steps) == 1


# --- copies and wrappers ----------------------------------------------------------------------------------------------


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss_of(model(x)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_after_a_step(how: str) -> None:
    model = cnnfast.Sequential(*generator(NORMS["batch"][0]))
    step(model, x2d())
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert "_plan" not in vars(other)
    for a, b in zip(step(other, x2d(seed=2)), step(model, x2d(seed=2)), strict=True):
        assert torch.equal(a, b)


def test_functional_call_uses_what_it_is_given() -> None:
    plain, ours = both(generator(NORMS["batch"][0]))
    randomized(ours, 5)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    given = {k: v.detach().clone().requires_grad_(v.is_floating_point() and "running" not in k)
             for k, v in plain.state_dict().items()}  # fmt: skip
    y = torch.func.functional_call(ours, given, (x2d(),))
    loss_of(y).backward()
    loss_of(plain(x2d())).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(given[name].grad, p.grad, rtol=1e-4, atol=1e-4)
    for name, b in plain.named_buffers():
        torch.testing.assert_close(given[name], b)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_moves_statistics_as_often_as_eagers(reentrant: bool, steps: list[str]) -> None:
    plain, ours = both(generator(NORMS["batch-average"][0]))
    for model in (plain, ours):
        x = x2d().requires_grad_()
        loss_of(checkpoint(model, x, use_reentrant=reentrant)).backward()
    assert_same_state(plain, ours)
    assert ours[1].num_batches_tracked == 2 and len(steps) == 8
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)


def test_saved_tensors_may_live_elsewhere() -> None:
    plain, ours = both(generator(NORMS["group"][0]))
    with torch.autograd.graph.save_on_cpu():
        loss_of(ours(x2d())).backward()
    loss_of(plain(x2d())).backward()
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)


def test_hooks_of_tensors_and_parameters() -> None:
    model = cnnfast.Sequential(*generator(NORMS["batch"][0]))
    seen: list[str] = []
    x = x2d().requires_grad_()
    x.register_hook(lambda g: seen.append("x"))
    model[0].weight.register_hook(lambda g: seen.append("weight"))
    model[3 + 1].weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    y = model(x)
    y.register_hook(lambda g: seen.append("y"))
    loss_of(y).backward()
    assert seen[0] == "y" and sorted(seen) == ["accumulated", "weight", "x", "y"]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel(steps: list[str]) -> None:
    plain, ours = both(generator(NORMS["batch"][0]))
    wrapped = nn.parallel.DistributedDataParallel(ours)
    for _ in range(2):
        want, got = step(plain, x2d()), step(wrapped, x2d())
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    assert_same_state(plain, ours, versions=False)  # it broadcasts them
    assert len(steps) == 8


@pytest.mark.usefixtures("one_process")
def test_synchronised_batch_norm_of_one_process() -> None:
    plain, ours = both(generator(NORMS["batch"][0]))
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(ours) is cnnfast.Sequential and type(ours[1]) is nn.SyncBatchNorm
    for a, b in zip(step(plain, x2d()), step(ours, x2d()), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    assert_same_state(plain, ours)
