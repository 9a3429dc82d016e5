"""What training programs do with a model beside forward and backward: everything equals nn.Sequential.

A scenario trains a small generator, and perhaps a critic, in some way, and gives what came of it. It runs on
cnnfast.Sequential, on nn.Sequential in both memory formats (the yardstick is the one further from float64) and on
nn.Sequential in float64.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import cnnfast
from cnnfast.nn import chain

from ..tolerance import assert_close

CL = torch.channels_last


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch of every fused step that ran."""
    ran: list[int] = []
    real = chain.run_step

    def spy(step: Any, operands: Any, **kwargs: Any) -> Tensor:
        ran.append(operands.x.shape[0])
        return real(step, operands, **kwargs)

    monkeypatch.setattr(chain, "run_step", spy)
    return ran


# --- models and their comparison --------------------------------------------------------------------------------------


class Models(NamedTuple):
    """Makes the same models and inputs, of one class, dtype, memory format and device. No bias precedes a norm that
    takes it away: its gradient would be rounding alone."""

    cls: type[nn.Sequential] = nn.Sequential
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    def build(self, seed: int, *modules: nn.Module) -> nn.Sequential:
        g = torch.Generator().manual_seed(seed)
        model = self.cls(*modules)
        with torch.no_grad():
            for p in model.parameters():
                fan = max(1, p[0].numel()) if p.dim() > 1 else 25
                p.copy_(torch.randn(p.shape, generator=g) * fan**-0.5 + (p.dim() == 1))
        return model.to(self.device, self.dtype).to(memory_format=self.memory_format)

    def generator(self) -> nn.Sequential:
        return self.build(
            1,
            nn.ConvTranspose2d(8, 12, 4, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(12, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8, momentum=None),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.GroupNorm(2, 6),
            nn.SiLU(),
            nn.Conv2d(6, 3, 3, padding=1),
            nn.Tanh(),
        )

    def critic(self) -> nn.Sequential:
        return self.build(
            2,
            nn.Conv2d(3, 8, 4, 2, 1),
            nn.ELU(),
            nn.Conv2d(8, 12, 4, 2, 1, bias=False),
            nn.InstanceNorm2d(12, affine=True),
            nn.SiLU(),
            nn.Conv2d(12, 1, 4),
        )

    def noise(self, *shape: int, seed: int = 3) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)

    def z(self, n: int = 3, seed: int = 3) -> Tensor:
        return self.noise(n, 8, 1, 1, seed=seed)

    def images(self, n: int = 3, seed: int = 4) -> Tensor:
        return self.noise(n, 3, 16, 16, seed=seed).tanh()

    def loss(self, y: Tensor) -> Tensor:
        """That no norm makes constant."""
        return (y.to(self.dtype) * self.noise(*y.shape, seed=5)).mean()


Outcome = dict[str, Tensor]


def grads(*models: nn.Module) -> Outcome:
    out = {}
    for i, model in enumerate(models):
        out |= {f"{i}.{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out


def everything(*models: nn.Module) -> Outcome:
    """Parameters, buffers and gradients."""
    states = {f"{i}.{k}": t.clone() for i, m in enumerate(models) for k, t in m.state_dict().items()}
    return {**states, **grads(*models)}


def compare(got: Outcome, exact: Outcome, *eager: Outcome, what: str = "") -> None:
    """Each tensor under the tolerance rule, whose yardstick is the one of ``eager`` that is further off; integers
    exactly. Single numbers together, each as a part of its value: the one yardstick of a sum may be right by luck."""
    assert got.keys() == exact.keys() and all(e.keys() == got.keys() for e in eager)
    floating = [name for name, t in got.items() if t.is_floating_point()]
    for name in got.keys() - set(floating):
        assert torch.equal(got[name], exact[name]), f"{what}: {name}"
    single = [name for name in floating if got[name].numel() == 1]
    for name in floating:
        if len(single) < 2 or name not in single:
            held(got[name], exact[name], *(e[name] for e in eager), what=f"{what}: {name}")
    if len(single) > 1:
        sizes = torch.cat([exact[name].reshape(1).abs().clamp_min(1e-300) for name in single])
        columns = (torch.cat([o[name].reshape(1).double() for name in single]) / sizes for o in (got, exact, *eager))
        ours, ref, *yardsticks = columns
        held(ours.float(), ref, *(y.float() for y in yardsticks), what=f"{what}: {', '.join(single)}")


def held(ours: Tensor, ref: Tensor, *yardsticks: Tensor, what: str) -> None:
    yardstick = max(yardsticks, key=lambda t: (t.double() - ref).square().sum().item())
    assert_close(ours, ref, yardstick, what)


def check(scenario: Callable[[Models], Outcome], steps: list[int] | None = None) -> None:
    """The scenario on cnnfast.Sequential is that on nn.Sequential; steps were fused where ``steps`` is given."""
    got = scenario(Models(cnnfast.Sequential))
    if steps is not None:
        assert steps, "nothing was fused"
    eager = [scenario(Models(memory_format=f)) for f in (torch.contiguous_format, CL)]
    compare(got, scenario(Models(dtype=torch.float64)), *eager, what=scenario.__name__)


# --- scenarios --------------------------------------------------------------------------------------------------------


def baseline(m: Models) -> Outcome:
    model = m.generator()
    m.loss(model(m.z())).backward()
    return everything(model)


def checkpoint_reentrant(m: Models) -> Outcome:
    model, z = m.generator(), m.z().requires_grad_()
    m.loss(checkpoint(model, z, use_reentrant=True)).backward()
    return {**everything(model), "z": z.grad}


def checkpoint_not_reentrant(m: Models) -> Outcome:
    model, z = m.generator(), m.z()
    m.loss(checkpoint(model, z, use_reentrant=False)).backward()
    return everything(model)


def checkpoint_of_the_second_half(m: Models) -> Outcome:
    model = m.generator()
    m.loss(checkpoint(model[6:], model[:6](m.z()), use_reentrant=False)).backward()
    return everything(model)


def checkpoint_by_segments(m: Models) -> Outcome:
    model, z = m.generator(), m.z().requires_grad_()
    m.loss(checkpoint_sequential(model, 2, z, use_reentrant=False)).backward()
    return everything(model)


def accumulation(m: Models) -> Outcome:
    model = m.generator()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(2):
        optimizer.zero_grad(set_to_none=step == 0)
        for k in range(3):
            (m.loss(model(m.z(2, seed=10 * step + k))) / 3).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return everything(model)


def set_to_none(m: Models) -> Outcome:
    model = m.generator()
    m.loss(model(m.z())).backward()
    model.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())
    m.loss(model(m.z(seed=6))).backward()
    model.zero_grad(set_to_none=False)
    kept = [p.grad for p in model.parameters()]
    m.loss(model(m.z(seed=7))).backward()
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True)), "gradients are added in place"
    return everything(model)


def functional_call(m: Models) -> Outcome:
    model = m.generator()
    other = {k: (p * 1.5).detach().requires_grad_() for k, p in model.named_parameters()}
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    m.loss(torch.func.functional_call(model, {**other, **buffers}, m.z())).backward()
    assert all(p.grad is None for p in model.parameters()) and not model[1].num_batches_tracked
    return {**{k: t.grad for k, t in other.items()}, **buffers}


def gradients_by_functorch(m: Models) -> Outcome:
    model = m.generator()
    params = {k: p.detach() for k, p in model.named_parameters()}

    def loss(params: Outcome, buffers: Outcome) -> Tensor:
        return m.loss(torch.func.functional_call(model, {**params, **buffers}, m.z()))

    return torch.func.grad(loss)(params, {k: b.clone() for k, b in model.named_buffers()})


def wgan_gp(m: Models) -> Outcome:
    """A step of the critic with the gradient penalty, then one of the generator."""
    generator, critic = m.generator(), m.critic()
    optimizers = [torch.optim.SGD(model.parameters(), 0.01) for model in (critic, generator)]
    fake, real = generator(m.z()).detach(), m.images()
    mixed = (real + m.noise(3, 1, 1, 1, seed=8).sigmoid() * (fake - real)).requires_grad_()
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    (critic(fake).mean() - critic(real).mean() + 10 * penalty).backward()
    optimizers[0].step()
    found = grads(critic)
    critic.zero_grad()
    (-critic(generator(m.z(seed=9))).mean()).backward()
    optimizers[1].step()
    return {**{f"critic {k}": g for k, g in found.items()}, **everything(generator, critic)}


def r1(m: Models) -> Outcome:
    critic, real = m.critic(), m.images().requires_grad_()
    scores = critic(real)
    (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    (nn.functional.softplus(-scores).mean() + 5 * slope.square().sum((1, 2, 3)).mean()).backward()
    return {"slope": slope.detach(), **everything(critic)}


def r1_through_the_generator(m: Models) -> Outcome:
    """A penalty on the critic's slope at generated images, with the generator's gradients (and those of its BatchNorms'
    statistics)."""
    generator, critic = m.generator(), m.critic()
    fake = generator(m.z())
    (slope,) = torch.autograd.grad(critic(fake).sum(), fake, create_graph=True)
    slope.square().sum().backward()
    return everything(generator, critic)


def path_length(m: Models) -> Outcome:
    generator, z = m.generator(), m.z().requires_grad_()
    images = generator(z)
    (slope,) = torch.autograd.grad((images * m.noise(*images.shape, seed=8)).sum(), z, create_graph=True)
    lengths = slope.square().sum((1, 2, 3)).sqrt()
    (lengths - lengths.mean().detach() * 0.9).square().mean().backward()
    return {"slope": slope.detach(), **everything(generator)}


def no_grad_in_train_mode(m: Models) -> Outcome:
    model = m.generator()
    with torch.no_grad():
        y = model(m.z())
    with torch.inference_mode():
        again = model(m.z(seed=6)) * 1
    assert not y.requires_grad and again.is_inference()
    return {"y": y, "again": again.clone(), **everything(model)}


def set_grad_enabled(m: Models) -> Outcome:
    model = m.generator()
    with torch.set_grad_enabled(False):
        assert model(m.z()).grad_fn is None
        with torch.enable_grad():
            y = model(m.z())
    m.loss(y).backward()
    return everything(model)


def frozen_convolutions(m: Models) -> Outcome:
    model = m.generator()
    for module in model:
        if isinstance(module, nn.modules.conv._ConvNd):
            module.requires_grad_(False)
    m.loss(model(m.z())).backward()
    assert model[0].weight.grad is None and model[1].weight.grad is not None
    return everything(model)


def frozen_norms(m: Models) -> Outcome:
    """Batch norms in eval mode with constant vectors, in a model that is trained (fine-tuning)."""
    model = m.generator()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    z = m.z().requires_grad_()
    m.loss(model(z)).backward()
    return {**everything(model), "z": z.grad}


def all_frozen(m: Models) -> Outcome:
    """Only the input has a gradient, as when a latent is fitted."""
    model, z = m.generator().requires_grad_(False), m.z().requires_grad_()
    optimizer = torch.optim.SGD([z], 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        m.loss(model(z)).backward()
        optimizer.step()
    return {**everything(model), "z": z.detach()}


def eval_mode_with_gradients(m: Models) -> Outcome:
    model = m.generator()
    m.loss(model(m.z())).backward()
    model.eval()
    m.loss(model(m.z(seed=6))).backward()
    return everything(model)


def shared_modules(m: Models) -> Outcome:
    """One convolution and one norm twice in the model."""
    conv, norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
    model = m.build(6, conv, norm, nn.Tanh(), nn.ConvTranspose2d(8, 8, 4, 2, 1, bias=False), norm, conv, nn.SiLU())
    m.loss(model(m.noise(3, 8, 5, 4))).backward()
    assert int(norm.num_batches_tracked) == 2
    return everything(model)


def shared_weights(m: Models) -> Outcome:
    """A model within a model, and a parameter of two modules."""
    model, other = m.generator(), m.generator()
    other[3].weight = model[3].weight
    m.loss(model(m.z()) + other(m.z(seed=6))).backward()
    assert other[3].weight.grad is model[3].weight.grad
    return everything(model, other)


def backward_twice(m: Models) -> Outcome:
    model = m.generator()
    loss = m.loss(model(m.z()))
    loss.backward(retain_graph=True)
    once = grads(model)
    loss.backward()
    for name, twice in grads(model).items():
        torch.testing.assert_close(twice, 2 * once[name])
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    return everything(model)


def hooks_on_tensors(m: Models) -> Outcome:
    model, z, seen = m.generator(), m.z().requires_grad_(), []
    model[0].weight.register_hook(lambda grad: grad * 3)
    model[4].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    y = model(z)
    y.register_hook(lambda grad: grad + 0.01)
    y.retain_grad()
    m.loss(y).backward()
    assert len(seen) == 1
    return {**everything(model), "y": y.grad, "z": z.grad, "seen": seen[0]}


def hooks_on_modules(m: Models) -> Outcome:
    model, seen = m.generator(), []
    model[4].register_full_backward_hook(lambda module, into, out: seen.append(out[0].clone()))
    model.register_full_backward_pre_hook(lambda module, out: (out[0] * 2,))
    model.register_forward_hook(lambda module, inputs, y: y * 0.5)
    m.loss(model(m.z())).backward()
    assert len(seen) == 1
    return {**everything(model), "seen": seen[0]}


def saved_tensor_hooks(m: Models) -> Outcome:
    model, packed, unpacked = m.generator(), [], []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.shape)
        return t.clone()

    def unpack(t: Tensor) -> Tensor:
        unpacked.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = model(m.z())
    m.loss(y).backward()
    assert len(packed) >= 8 and len(unpacked) >= 8
    return everything(model)


def save_on_cpu(m: Models) -> Outcome:
    model = m.generator()
    with torch.autograd.graph.save_on_cpu():
        m.loss(model(m.z())).backward()
    return everything(model)


def anomaly_mode(m: Models) -> Outcome:
    model = m.generator()
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        m.loss(model(m.z())).backward()
    return everything(model)


def inputs_that_are_no_leaves(m: Models) -> Outcome:
    """A linear map of a latent, as a view; a transposed and an expanded input."""
    model, front = m.generator(), m.noise(8, 4, seed=8).requires_grad_()
    z = m.noise(3, 4)
    first = model((z @ front.T).view(3, 8, 1, 1))
    second = model((front @ z.T).T[..., None, None])
    third = model(front[:, 0].view(1, 8, 1, 1).expand(3, 8, 1, 1))
    m.loss(first + second * third).backward()
    return {**everything(model), "front": front.grad}


def gradients_of_some_inputs(m: Models) -> Outcome:
    model, z = m.generator(), m.z().requires_grad_()
    y = model(z)
    (dz,) = torch.autograd.grad(m.loss(y), z, retain_graph=True)
    dw, db = torch.autograd.grad(m.loss(y), (model[3].weight, model[8].bias))
    assert all(p.grad is None for p in model.parameters())
    return {"dz": dz, "dw": dw, "db": db, **everything(model)}


def ema(m: Models) -> Outcome:
    """Averaged copies of model and buffers, and their images in eval mode."""
    swa = torch.optim.swa_utils
    model = m.generator()
    average = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.7), use_buffers=True)
    by_hand = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for k in range(3):
        optimizer.zero_grad()
        m.loss(model(m.z(seed=k))).backward()
        optimizer.step()
        average.update_parameters(model)
        for p, q in zip(by_hand.parameters(), model.parameters(), strict=True):
            p.data.lerp_(q.data, 0.3)
    with torch.no_grad():
        images = average.module.eval()(m.z()), by_hand.eval()(m.z())
    return {**everything(average, by_hand), "average": images[0], "by hand": images[1]}


def weights_loaded_between_steps(m: Models) -> Outcome:
    model, other = m.generator(), m.generator()
    m.loss(model(m.z())).backward()
    other.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    model.load_state_dict(other.state_dict())
    m.loss(model(m.z())).backward()
    return everything(model)


def parametrized(m: Models) -> Outcome:
    """Spectral and weight normalisation of two convolutions."""
    torch.manual_seed(0)
    model = m.critic()
    nn.utils.parametrizations.spectral_norm(model[2], n_power_iterations=5)
    nn.utils.parametrizations.weight_norm(model[5])
    with torch.no_grad():  # the same vectors in every dtype
        for name in ("_u", "_v"):
            v = getattr(model[2].parametrizations.weight[0], name)
            v.copy_(nn.functional.normalize(m.noise(*v.shape, seed=8), dim=0))
    m.loss(model(m.images())).backward()
    return everything(model)


FUSED = (
    baseline, checkpoint_reentrant, checkpoint_not_reentrant, checkpoint_of_the_second_half, accumulation, set_to_none,
    wgan_gp, r1, r1_through_the_generator, path_length, no_grad_in_train_mode, set_grad_enabled, frozen_convolutions,
    frozen_norms, all_frozen, eval_mode_with_gradients, shared_modules, shared_weights, backward_twice,
    hooks_on_tensors, saved_tensor_hooks, save_on_cpu, anomaly_mode, inputs_that_are_no_leaves,
    gradients_of_some_inputs, ema, weights_loaded_between_steps,
)  # fmt: skip
OTHERS = (functional_call, gradients_by_functorch, hooks_on_modules, parametrized, checkpoint_by_segments)


@pytest.mark.parametrize("scenario", FUSED, ids=lambda s: s.__name__)
def test_fused(scenario: Callable[[Models], Outcome], steps: list[int]) -> None:
    check(scenario, steps)


@pytest.mark.parametrize("scenario", OTHERS, ids=lambda s: s.__name__)
def test_others(scenario: Callable[[Models], Outcome]) -> None:
    check(scenario)


def test_the_comparison_can_fail() -> None:
    exact, eager = baseline(Models(dtype=torch.float64)), baseline(Models())
    compare(eager, exact, eager)
    for name, t in eager.items():
        if t.is_floating_point():
            with pytest.raises(AssertionError, match="max error"):
                compare({**eager, name: t * (1 + 2e-5)}, exact, eager)
    with pytest.raises(AssertionError, match="num_batches_tracked"):
        compare({**eager, "0.1.num_batches_tracked": torch.tensor(2)}, exact, eager)


# --- autocast and scaled losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grad_scaler(dtype: torch.dtype, steps: list[int]) -> None:
    """Three steps, the second of which overflows and is skipped."""

    def scenario(m: Models) -> Outcome:
        model = m.generator()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, backoff_factor=0.25)
        on = m.dtype != torch.float64  # the exact result knows no autocast
        scales = []
        for k in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=on):
                y = model(m.z(8, seed=k))
                assert y.dtype == (dtype if on else torch.float64)
                loss = m.loss(y.to(m.dtype))
            scaler.scale(loss * (float("inf") if k == 1 else 1)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            if k == 1:
                assert any(not p.grad.isfinite().all() for p in model.parameters())
        assert scales == [256, 64, 64]
        return everything(model)

    check(scenario, steps)


# --- copies in the middle of training ---------------------------------------------------------------------------------


def by_pickle(state: Any) -> Any:
    return pickle.loads(pickle.dumps(state))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_a_copy_goes_on_as_the_model_does(copied: Callable[[Any], Any], steps: list[int]) -> None:
    m = Models(cnnfast.Sequential)
    model = m.generator()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for k in seeds:
            optimizer.zero_grad()
            m.loss(model(m.z(seed=k))).backward()
            optimizer.step()

    train(model, optimizer, range(2))
    # At the same place in memory, relative to what wide loads see: sums round alike.
    again = copied((model, optimizer))
    assert type(again[0]) is cnnfast.Sequential
    for each in ((model, optimizer), again):
        steps.clear()
        train(*each, range(2, 4))
        assert steps
    for (name, a), b in zip(everything(model).items(), everything(again[0]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
        assert a.data_ptr() != b.data_ptr()


def test_state_of_a_training_run_goes_through_a_file(tmp_path: Any) -> None:
    """Into a model of nn.Sequential, and back."""
    for here, there in ((cnnfast.Sequential, nn.Sequential), (nn.Sequential, cnnfast.Sequential)):
        m = Models(here)
        model = m.generator()
        m.loss(model(m.z())).backward()
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = Models(there).generator()
        with torch.no_grad():
            other[0].weight.zero_()
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )


# --- what autograd refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.Sequential, cnnfast.Sequential])
@pytest.mark.parametrize("k", [0, 3, 7], ids=["latent", "transposed", "after-upsampling"])
def test_a_weight_changed_before_the_backward_is_noticed(cls: type[nn.Sequential], k: int) -> None:
    m = Models(cls)
    model, z = m.generator(), m.z().requires_grad_()
    y = model(z)
    with torch.no_grad():
        model[k].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        m.loss(y).backward()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CL], ids=str)
def test_a_result_changed_before_the_backward_is_noticed_or_harmless(memory_format: torch.memory_format) -> None:
    """Of tanh, whose derivative is that of its result: eager mode raises. A result that is a copy in another memory
    format may be changed, and then the gradient is right."""
    m = Models(cnnfast.Sequential, memory_format=memory_format)
    model, other = m.generator(), m.generator()
    y = model(m.z())
    y.mul_(2)
    try:
        m.loss(y).backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert not y.is_contiguous(memory_format=CL)
        m.loss(other(m.z()) * 2).backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("cls", [nn.Sequential, cnnfast.Sequential])
def test_a_nan_is_found_by_anomaly_mode(cls: type[nn.Sequential]) -> None:
    m = Models(cls)
    y = m.generator()(m.z())
    with (
        pytest.warns(UserWarning, match="Anomaly Detection"),
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        (m.loss(y) * float("nan")).backward()
