"""What a Sequential does not do again on every call on a CPU, and that it is seen where it matters."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from cnnfast.cpu import inference, onednn
from cnnfast.cpu.packing import PACKS
from cnnfast.nn import chain, layers


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


# --- modules that run as they stand -----------------------------------------------------------------------------------


def tiny() -> cnnfast.Sequential:
    return cnnfast.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).eval()


def unread(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which no module is read."""
    patch = monkeypatch.context()

    class Unread:
        def __enter__(self) -> None:
            patch.__enter__().setattr(layers, "read", None)

        def __exit__(self, *error: Any) -> None:
            patch.__exit__(*error)

    return Unread()


def test_modules_that_run_as_they_stand_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = tiny(), torch.randn(2, 4, 8, 8)
    expected = nn.Sequential.forward(ours, x)
    ours(x)
    with unread(monkeypatch):
        assert torch.equal(ours(x), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda ours, x: (ours, x[:1]),
        lambda ours, x: (ours, x.contiguous(memory_format=torch.channels_last)),
        lambda ours, x: (ours.double(), x.double()),
        lambda ours, x: (ours.to(memory_format=torch.channels_last), x),
        lambda ours, x: (ours.train(), x),
        lambda ours, x: (ours.append(nn.Tanh()), x),
        lambda ours, x: (ours.__setitem__(1, nn.Tanh()) or ours, x),
        lambda ours, x: (ours, x.clone().requires_grad_()),
        lambda ours, x: (copy.deepcopy(ours), x),
    ],
    ids=["shape", "format", "dtype", "weights", "train", "append", "set", "gradient", "copy"],
)
def test_of_another_kind_they_are_read_again(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = tiny(), torch.randn(2, 4, 8, 8)
    ours(x)
    changed, y = change(ours, x)
    with unread(monkeypatch), pytest.raises(TypeError, match="NoneType"):
        changed(y)
    torch.testing.assert_close(changed(y), nn.Sequential.forward(changed, y))


def test_a_change_inside_a_module_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that nobody looks at: the modules themselves run."""
    ours, x = tiny(), torch.randn(2, 4, 8, 8)
    ours(x)
    ours[0].stride = (2, 2)
    ours[1].register_forward_hook(lambda module, args, y: y + 1)
    ours[0].weight.data.mul_(2)
    with unread(monkeypatch):
        assert torch.equal(ours(x), nn.Sequential.forward(ours, x))


# --- packed operators -------------------------------------------------------------------------------------------------

packed = pytest.mark.skipif(onednn.why_missing() is not None, reason=str(onednn.why_missing()))


def block() -> tuple[cnnfast.Sequential, Tensor]:
    ours = cnnfast.Sequential(nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.ReLU()).eval()
    return ours, torch.randn(2, 64, 16, 16)


@packed
def test_packed_steps_of_a_chain_ask_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = block()
    expected = nn.Sequential.forward(ours, x)
    gc.collect()  # what models of other tests left
    before = len(PACKS)
    ours(x)
    assert len(PACKS) == before, "a weight that is met once is not packed"
    ours(x)
    assert len(PACKS) == before + 1
    monkeypatch.setattr(chain, "run_step", None)
    torch.testing.assert_close(ours(x), expected)
    ours[0].weight.data.mul_(2)
    torch.testing.assert_close(ours(x), nn.Sequential.forward(ours, x))
    torch.testing.assert_close(ours(x), nn.Sequential.forward(ours, x))


@packed
@pytest.mark.parametrize("switch", ["oneDNN", "precision"])
def test_a_switch_of_pytorchs_is_seen(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = block()
    for _ in range(3):
        ours(x)
    expected = nn.Sequential.forward(ours, x)
    ran: list[inference.Ready] = []
    run = inference.Ready.run
    monkeypatch.setattr(inference.Ready, "run", lambda self, o: ran.append(self) or run(self, o))
    ours(x)
    (known,) = ran
    if switch == "oneDNN":
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(ours(x), expected)
        assert ran == [known]
    else:
        lowered = inference.process()._replace(lowered=True)
        monkeypatch.setattr(inference, "process", lambda: lowered)
        torch.testing.assert_close(ours(x), expected)
    assert ran.count(known) == 1
