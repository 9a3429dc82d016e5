"""Random modules out of everything that is awkward for who rewrites models: accelerated, they are what they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import cnnfast
from cnnfast.nn.accelerate_call import record_of
from cnnfast.nn.accelerate_verify import differs, without_onednn

from .test_sequential_training import loss_of, randomized, real_strides
from .test_training_features import Outcome

CL = torch.channels_last


pytestmark = pytest.mark.usefixtures("one_thread")


# --- parts ------------------------------------------------------------------------------------------------------------

Part = Callable[[random.Random, int, int], nn.Module]  # of channels in and out; they keep the size


def conv(r: random.Random, c_in: int, c_out: int, bias: bool = True) -> nn.Module:
    mode = r.choice(["zeros", "reflect", "replicate", "circular"])
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias, padding_mode=mode)


def norm(r: random.Random, c: int) -> nn.Module:
    return r.choice([nn.BatchNorm2d(c), nn.InstanceNorm2d(c, affine=True), nn.GroupNorm(2, c)])


class Functional(nn.Module):
    """Calls and methods, positional and by name, in place and not, as people write them."""

    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.norm, self.how = conv(r, c_in, c_out, False), norm(r, c_out), r.randrange(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        acts: list[Callable[[Tensor], Tensor]] = [
            lambda y: F.leaky_relu(y, 0.1, True), lambda y: y.relu_(), torch.tanh, lambda y: y.sigmoid(),
            lambda y: F.hardtanh(y, max_val=0.5), lambda y: F.gelu(y, approximate="tanh"),
            lambda y: F.silu(input=y), lambda y: y.clamp(min=0),
        ]  # fmt: skip
        return acts[self.how](y)


class Residual(nn.Module):
    """Sums in either order, in place and not, before or after the activation, and of a broadcast operand."""

    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        self.first, self.second = conv(r, c_in, c_out), conv(r, c_out, c_out, False)
        self.norm, self.how = norm(r, c_out), r.randrange(6)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.norm(self.second(F.relu(a)))
        if self.how == 0:
            b += a
            return F.relu(b, inplace=True)
        if self.how == 1:
            return F.relu(a + b)
        if self.how == 2:
            return torch.add(b, a, alpha=2).relu()
        if self.how == 3:
            return F.relu(b) + a
        if self.how == 4:
            return F.leaky_relu(b + a.mean((2, 3), keepdim=True), 0.2)
        return F.relu(b.add(other=a))


class Upsampled(nn.Module):
    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(c_in, c_out, 3, padding=1), r.randrange(5)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        if self.how == 0:
            y = F.interpolate(x, size=(2 * h, 2 * w))
        elif self.how == 1:
            y = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
        elif self.how == 2:
            y = F.interpolate(x, scale_factor=1.5)
        elif self.how == 3:
            y = F.interpolate(x, scale_factor=[2.0, 2.0], recompute_scale_factor=True)
        else:
            y = F.interpolate(x, (h + 3, w + 1), mode="bilinear", align_corners=False)
        return F.adaptive_avg_pool2d(F.elu(self.conv(y)), (h, w))


class Transposed(nn.Module):
    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False), norm(r, c_out), nn.LeakyReLU(0.2, inplace=True)
        )
        self.down = nn.Conv2d(c_out, c_out, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.down(self.up(x)))


class TwoConsumers(nn.Module):
    """Of a convolution, and of one whose result is overwritten for both."""

    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.how = conv(r, c_in, c_out), r.randrange(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == 0:
            return torch.relu(y) - 0.5 * y
        if self.how == 1:
            view = y.unsqueeze(0)  # in any memory format
            view.mul_(0.5)
            return torch.relu(y)
        z = y * 2
        y.add_(1)
        return torch.sigmoid(y) * z


class Overwritten(nn.Module):
    """The input of a convolution is written to before what follows it has run."""

    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.norm = conv(r, c_in, c_out, False).requires_grad_(False), norm(r, c_out)

    def forward(self, x: Tensor) -> Tensor:
        kept = x.detach().clone()
        y = self.conv(kept)
        kept.mul_(3)
        return F.relu(self.norm(y)) + x.mean() + kept.mean()


class Shared(nn.Module):
    """One convolution and one activation, used twice."""

    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        self.first, self.conv, self.act = conv(r, c_in, c_out), conv(r, c_out, c_out), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.act(self.conv(self.act(self.conv(x))))


class Computed(nn.Module):
    """A weight that is computed from others."""

    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        made: nn.Module = nn.Conv2d(c_in, c_out, 3, padding=1)
        how = r.randrange(3)
        if how == 0:
            made = weight_norm(made)
        else:
            made = (parametrizations.weight_norm if how == 1 else parametrizations.spectral_norm)(made)
        self.conv = made

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x), 0.2)


class Shuffled(nn.Module):
    """PixelShuffle after a convolution, of the module, of the function, or behind an activation, or ahead of PReLU and
    a convolution."""

    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        made: nn.Module = nn.Conv2d(c_in, 4 * c_out, 3, padding=1)
        self.conv = weight_norm(made) if r.random() < 0.5 else made
        self.shuffle, self.how = nn.PixelShuffle(2), r.randrange(4)
        self.slopes, self.after = nn.PReLU(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == 0:
            y = F.silu(self.shuffle(y))
        elif self.how == 1:
            y = F.pixel_shuffle(torch.tanh(y), 2)
        elif self.how == 2:
            y = self.after(self.slopes(self.shuffle(y)))
        else:
            y = self.shuffle(y).relu_()
        return F.avg_pool2d(y, 2)


class Restored(nn.Module):
    """A block of networks that repair pictures: a norm over the channels, written out or in one call, halves of the
    channels that gate each other, and means of channels and of positions that scale the map."""

    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        self.first, self.wide = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, 2 * c_out, 1)
        self.deep = nn.Conv2d(2 * c_out, 2 * c_out, 3, padding=1, groups=2 * c_out)
        self.squeeze, self.last = nn.Conv2d(c_out, c_out, 1), nn.Conv2d(c_out, c_out, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, c_out).view(1, c_out, 1, 1))
        self.hows = [r.randrange(n) for n in (4, 6, 5)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        norm, gate, squeeze = self.hows
        y = x - x.mean(1, keepdim=True)
        if norm == 0:
            y = y / (y.pow(2).mean(dim=1, keepdim=True) + 1e-4).sqrt()
        elif norm == 1:
            y = y * torch.rsqrt(x.var(1, keepdim=True, unbiased=False) + 1e-4)
        elif norm == 2:
            y = F.normalize(x, dim=1, eps=1e-3) * 2 + y.abs().amax(1, keepdim=True)
        y = self.deep(self.wide(y * self.scale))
        if gate < 2:
            a, b = y.chunk(2, dim=1) if gate else torch.split(y, y.shape[1] // 2, dim=1)
            y = a * F.softplus(b)
        elif gate == 2:
            a, b = y[:, ::2], y[:, 1::2]
            y = torch.cat([a, b.relu()], 1)[:, : a.shape[1]] + b
        elif gate == 3:
            a, b = y.split([y.shape[1] // 2] * 2, 1)
            y = b.clamp(-1, 1) - a.flatten(2).mean(2)[:, :, None, None]
        elif gate == 4:
            half = y.shape[1] // 2
            y = y[:, :half].mul_(y[:, half:].detach()) if not torch.is_grad_enabled() else y[:, :half] * 2
        else:
            half = y.shape[1] // 2
            z = y * 0.5
            z[:, :half] = y[:, half:] + F.relu(z[:, :half])
            y = z[:, 1 : half + 1]
        if squeeze == 0:
            y = self.squeeze(F.adaptive_avg_pool2d(y, 1)) * y
        elif squeeze == 1:
            y = y * self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()
        elif squeeze == 2:
            y = torch.cat([y.mean(1, True), y.max(1, keepdim=True)[0]], 1).amax(1, True).sigmoid() * y
        elif squeeze == 3:
            y = y + F.interpolate(F.adaptive_max_pool2d(y, 4), size=y.shape[2:]) / (1 + y.std((2, 3), keepdim=True))
        return x + self.last(y)


class Vocoder(nn.Module):
    """A block of one dimension with computed weights, along the rows: activations ahead of the convolutions."""

    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        how: Any = r.choice([weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
        self.up = how(nn.ConvTranspose1d(c_in, c_out, 4, 2, 1))
        self.first = how(nn.Conv1d(c_out, c_out, 3, dilation=3, padding=3))
        self.second = how(nn.Conv1d(c_out, c_out, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = self.up(F.leaky_relu(x.flatten(2), 0.1))
        y = self.first(F.leaky_relu(y, 0.1)) + y
        return torch.tanh(self.second(F.leaky_relu(y))).view(n, -1, h, w)


class Tokens(nn.Module):
    """Attention as image models write it: a map as tokens, windows of them, or its channels as such, and back, with
    norms, sums and products of them, convolutions between, and writes in place to either."""

    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1, groups=2)
        self.wide, self.last = nn.Conv2d(c_out, 3 * c_out, 1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.norm, self.qkv, self.out = nn.LayerNorm(c_out), nn.Linear(c_out, 3 * c_out), nn.Linear(c_out, c_out)
        self.bias = nn.Parameter(torch.linspace(-1, 1, 16 * 16).view(16, 16))
        self.hows = [r.randrange(n) for n in (5, 6, 7, 5, 4)]

    def mixed(self, t: Tensor, how: int) -> Tensor:
        """Of tokens (N, L, C), with two heads."""
        n, length, c = t.shape
        if how == 0:
            q, k, v = self.qkv(t).reshape(n, length, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
        elif how == 1:
            q, k, v = self.qkv(t).reshape(n, length, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
            scores = (q * 0.5) @ k.transpose(-2, -1)
            if length == 16:
                scores = scores + self.bias.unsqueeze(0)
            y = scores.softmax(dim=-1) @ v
        elif how == 2:
            q, k, v = (p.view(n, length, 2, -1).transpose(1, 2) for p in self.qkv(t).chunk(3, dim=-1))
            y = torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)
        elif how == 3:  # of the channels
            q, k, v = self.qkv(t).transpose(1, 2).chunk(3, dim=1)
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            return self.out((torch.bmm(q, k.transpose(1, 2)).softmax(-1) @ v).transpose(1, 2))
        else:
            return self.out(F.relu6(t) + F.silu(self.qkv(t)[..., :c]))
        return self.out(y.transpose(1, 2).reshape(n, length, c))

    def forward(self, x: Tensor) -> Tensor:
        ahead, seen, within, back, behind = self.hows
        x = self.first(x)
        n, c, h, w = x.shape
        if ahead == 1:
            x = x + self.deep(F.gelu(x))
        elif ahead == 2 and not torch.is_grad_enabled():
            x += self.deep(x)
        elif ahead == 3:
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif ahead == 4:
            x = torch.roll(x, (1, -1), dims=(2, 3))
        if seen == 0:
            t = x.flatten(2).transpose(1, 2)
        elif seen == 1:
            t = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
        elif seen == 2:  # windows
            t = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).contiguous().view(-1, 16, c)
        elif seen == 3:
            t = torch.roll(x.permute(0, 2, 3, 1), shifts=(-2, -2), dims=(1, 2))
            t = t.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        elif seen == 4:
            t = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 4, 0, 4))[:, :h, :w].flatten(1, 2)
        else:  # each row
            t = x.permute(0, 2, 3, 1).flatten(0, 1)
        t = t + self.mixed(self.norm(t), within % 5)
        if within == 5:
            a, b = t.chunk(2, dim=-1)
            t = torch.cat([a * b.sigmoid(), b], -1)
        elif within == 6:
            first, others = t.split([1, t.shape[1] - 1], dim=1)
            t = torch.cat([others.sin(), first], 1)
        if within == 1 and not torch.is_grad_enabled():
            t += 1
        if seen in (2, 3):
            t = t.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h * w, c)
        elif seen == 5:
            t = t.reshape(n, h * w, c)
        if back == 0:
            y = t.transpose(1, 2).view(n, c, h, w)
        elif back == 1:
            y = t.permute(0, 2, 1).contiguous().view(n, c, h, w)
        elif back == 2:
            y = t.view(n, h, w, c).permute(0, 3, 1, 2).contiguous()
        elif back == 3:
            y = torch.einsum("nlc->ncl", t).reshape(n, c, h, w)
        else:
            y = t.unflatten(1, (h, w)).movedim(-1, 1)
        if behind == 0:
            y = x + self.deep(y)
        elif behind == 1:
            q, k, v = self.wide(y).chunk(3, dim=1)
            y = q * k.sigmoid() + v
        elif behind == 2:
            y = torch.cat([y, x], 1)[:, c // 2 : c // 2 + c]
        return self.last(y)


class Random(nn.Module):
    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        drop = r.choice([nn.Dropout(0.4), nn.Dropout2d(0.4), nn.Dropout(0.4, inplace=True)])
        self.body = nn.Sequential(conv(r, c_in, c_out), nn.ELU(), drop, nn.ConvTranspose2d(c_out, c_out, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + 0.1 * torch.randn_like(x[:, :1])


class Controlled(nn.Module):
    """Branches: on sizes, on the mode, and on values (which interrupts the tracing)."""

    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.other, self.on_value = conv(r, c_in, c_out), conv(r, c_in, c_out), r.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) if x.shape[0] % 2 else self.other(x)
        if self.on_value and y.sum() > 0:
            y = y * 0.5
        return F.relu(y) if self.training else torch.relu(y)


class Counting(nn.Module):
    """A buffer that forward writes to."""

    def __init__(self, r: random.Random, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = conv(r, c_in, c_out)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        self.seen += 1
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean((0, 2, 3))
        return y + self.mean[:, None, None]


PARTS: list[Part] = [
    Functional, Residual, Upsampled, Transposed, TwoConsumers, Overwritten, Shared, Computed, Random, Controlled,
    Counting, Shuffled, Restored, Vocoder, Tokens,
]  # fmt: skip


@dataclass
class Result:
    picture: Tensor
    features: Tensor


class Model(nn.Module):
    """A few parts, of which one is first; a tuple, a dict, a dataclass or a tensor comes out."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        r = random.Random(seed)
        kinds = [PARTS[seed % len(PARTS)], *r.choices(PARTS, k=r.randint(0, 2))]
        self.parts = nn.ModuleList(kind(r, 4 if i == 0 else 8, 8) for i, kind in enumerate(kinds))
        self.head, self.how = nn.Conv2d(8, 3, 3, padding=1), r.randrange(4)

    def forward(self, x: Tensor) -> Any:
        for part in self.parts:
            x = part(x)
        y = torch.tanh(self.head(x))
        return [y, (y, x), {"y": y, "x": x}, Result(y, x)][self.how]


def tensors(y: Any) -> list[Tensor]:
    if isinstance(y, Result):
        return [y.picture, y.features]
    return [y] if isinstance(y, Tensor) else list(y.values() if isinstance(y, dict) else y)


# --- what is done with it ---------------------------------------------------------------------------------------------


def program(model: nn.Module, seed: int, dtype: torch.dtype) -> tuple[Outcome, list[object]]:
    """Inference, training, an update, a reload: values, and what must be the same exactly."""
    values: Outcome = {}
    exactly: list[object] = []

    def note(what: str, *found: Tensor) -> None:
        for k, t in enumerate(found):
            values[f"{what}.{k}"] = t.detach().clone()
            exactly.append((what, k, t.dtype, t.shape, real_strides(t), t.requires_grad))

    def x(k: int, *size: int) -> Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(seed + k)).to(dtype)

    torch.manual_seed(seed)
    model.eval()
    with torch.no_grad():
        for k in range(2):  # weights are packed when they are met again
            note(f"eval {k}", *tensors(model(x(0, 2, 4, 16, 12))))
        # (With gradients, channels-last, PyTorch 2.13 itself crashes in some.)
        note("channels-last", *tensors(model(x(1, 2, 4, 16, 12).contiguous(memory_format=CL))))
    model.train()
    for k in range(2):
        given = x(k, 1 + 2 * k, 4, 12, 16).requires_grad_()
        results = tensors(model(given))
        note(f"train {k}", *results)
        sum(loss_of(y) for y in results).backward()  # type: ignore[union-attr]
        note(f"train {k} x", given.grad)  # type: ignore[arg-type]
        for name, p in model.named_parameters():
            if p.grad is not None:
                note(f"train {k} {name}", p.grad)
                with torch.no_grad():
                    p -= 0.01 * p.grad / p.grad.abs().max().clamp_min(1)
                p.grad = None
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        for k in range(3):  # sizes come again
            note(f"updated {k}", *tensors(model(x(3, 1, 4, 16, 16))))
    model.load_state_dict({k: t * 0.9 if t.is_floating_point() else t for k, t in state.items()}, assign=bool(seed % 2))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm):
            module.eps = 0.01
    handles = [m.register_forward_hook(lambda m, i, y: y * 1.5) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        note("hooked", *tensors(model(x(4, 2, 4, 12, 12))))
        for handle in handles:
            handle.remove()
        for k in range(3):
            note(f"unhooked {k}", *tensors(model(x(5, 2, 4, 20, 8))))
    values |= {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
    exactly += [(name, int(b)) for name, b in model.named_buffers() if not b.is_floating_point()]
    return values, exactly


def made(seed: int) -> nn.Module:
    """(Anew each time: the older weight_norm cannot be copied after a forward.)"""
    torch.manual_seed(seed)
    return randomized(Model(seed))


def check(seed: int) -> int:
    """How many convolutions of the model's graphs were found."""
    plain = made(seed)
    ours = cnnfast.accelerate(made(seed))
    assert list(ours.state_dict()) == list(plain.state_dict())
    record = record_of(ours)
    got, same = program(ours, seed, torch.float32)
    expected, exactly = program(made(seed), seed, torch.float32)
    assert same == exactly, [pair for pair in zip(same, exactly, strict=True) if pair[0] != pair[1]]
    with without_onednn():  # (channels-last, PyTorch 2.13 itself crashes in some backwards)
        other, _ = program(made(seed), seed, torch.float32)
    exact, _ = program(made(seed).double(), seed, torch.float64)
    assert record is not None and record.failed is None
    assert got.keys() == exact.keys()
    problem = differs(got, exact, [expected, other])
    assert problem is None, f"model {seed}: {plain}: {problem}"
    return sum(len(graph.sites) for graph in record.graphs)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Where a graph breaks, Dynamo counts the graphs of a class's code, over all models of the process."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("seed", range(len(PARTS)), ids=[p.__name__ for p in PARTS])  # type: ignore[attr-defined]
def test_random_models(seed: int) -> None:
    assert check(seed) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(PARTS), 8 * len(PARTS)))
def test_more_random_models(seed: int) -> None:
    assert check(seed) > 0
