"""Channel shuffles that are written out: found, and nothing else; the same numbers and strides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import cnnfast
from cnnfast.nn import accelerate_worth, rewrite_layout
from cnnfast.nn.accelerate_call import record_of
from cnnfast.nn.rewrite_shuffle import as_shuffles


def by_views(x: Tensor, groups: int = 4) -> Tensor:
    n, c, *size = x.shape
    return x.view(n, groups, c // groups, *size).transpose(1, 2).contiguous().view(n, c, *size)


def by_permute(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], 8, 2, *x.shape[2:]).permute(0, 2, 1, *range(3, x.dim() + 1)).reshape(x.shape)


def kept_on(x: Tensor) -> Tensor:
    """What is copied is read once more."""
    copied = x.view(x.shape[0], 4, 4, *x.shape[2:]).transpose(1, 2).contiguous()
    return copied.view(x.shape) + copied.mean()


def of_positions(x: Tensor) -> Tensor:
    """Rows change places, not channels."""
    n, c, h, w = x.shape
    return x.view(n, c, 2, h // 2, w).transpose(2, 3).reshape(x.shape)


def overwritten(x: Tensor) -> Tensor:
    """Between view and copy: the copy has what is written."""
    y = x * 2
    groups = y.view(y.shape[0], 4, 4, *y.shape[2:]).transpose(1, 2)
    y.mul_(3)
    return groups.reshape(y.shape)


SHUFFLES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "view": (by_views, 1),
    "permute": (by_permute, 1),
    "flatten": (lambda x: x.unflatten(1, (2, 8)).swapaxes(1, 2).flatten(1, 2), 1),
    "twice": (lambda x: by_permute(by_views(x)), 2),
    "of twice as many": (lambda x: by_views(torch.cat([x, x.sin()], 1), 2)[:, ::2], 1),
    "a copy with two readers": (kept_on, 0),
    "of positions": (of_positions, 0),
    "there and back": (lambda x: x.view(x.shape[0], 4, 4, -1).transpose(1, 2).transpose(1, 2).reshape(x.shape), 0),
    "one group": (lambda x: by_views(x, 1), 0),
    "overwritten": (overwritten, 1),
}


class Between(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor], dims: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.first, self.second, self.f = conv(16, 16, 3, padding=1), conv(16, 16, 3, padding=1), f

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.f(F.relu(self.first(x)))))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many operators each graph has that is rewritten."""
    counts: list[int] = []

    def counted(graph: fx.Graph) -> None:
        as_shuffles(graph)
        graph.lint()
        counts.append(sum(node.target is F.channel_shuffle for node in graph.nodes))

    monkeypatch.setattr(rewrite_layout, "as_shuffles", counted)
    return counts


@pytest.mark.filterwarnings("error::cnnfast.messages.CnnfastWarning")
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last], ids=["", "channels_last"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", SHUFFLES)
def test_written_out(name: str, gradients: bool, given: torch.memory_format, found: list[int]) -> None:
    f, count = SHUFFLES[name]
    torch.manual_seed(0)
    model = Between(f, 2).eval()
    ours = cnnfast.accelerate(Between(f, 2).eval())
    ours.load_state_dict(model.state_dict())
    with torch.set_grad_enabled(gradients), accelerate_worth.never_standing():
        for size in (8, 8, 8, 12, 12):
            x = torch.randn(2, 16, size, size).contiguous(memory_format=given)
            try:
                want = model(x)
            except RuntimeError:  # a view that a channels-last map has not
                with pytest.raises(RuntimeError):
                    ours(x)
                return
            got = ours(x)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert got.stride() == want.stride()
    if gradients:
        assert not found
    elif given is torch.channels_last:  # the copy is contiguous in eager mode, and so is what a second one is given
        assert found[0] == (name == "twice")
    else:
        assert found[0] == count
        record = record_of(ours)
        assert record is not None
        if count and name != "overwritten":
            assert [site.channels_last for site in record.graphs[0].sites] == [True, False], "one stretch"


@pytest.mark.filterwarnings("error::cnnfast.messages.CnnfastWarning")
def test_volumes(found: list[int]) -> None:
    torch.manual_seed(0)
    model = Between(by_views, 3).eval()
    ours = cnnfast.accelerate(Between(by_views, 3).eval())
    ours.load_state_dict(model.state_dict())
    with torch.no_grad(), accelerate_worth.never_standing():
        for _ in range(3):
            x = torch.randn(2, 16, 4, 6, 5)
            torch.testing.assert_close(ours(x), model(x), rtol=1e-5, atol=1e-5)
            assert ours(x).stride() == model(x).stride()
    assert found[0] == 1
