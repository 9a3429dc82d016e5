"""A write to memory that is watched is seen, whoever makes it; who could write unseen is not trusted."""

from __future__ import annotations

import ctypes
import gc
import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.cpu import content
from cnnfast.cpu import watch as module
from cnnfast.cpu.content import content_of
from cnnfast.cpu.watch import Watch, address, unwritten, watch
from cnnfast.memory_format import in_rows

pytestmark = [
    pytest.mark.skipif(content.why_no_hash() is not None, reason=str(content.why_no_hash())),
    pytest.mark.skipif(not module._POSSIBLE, reason="this PyTorch has no such storages: memory is read"),
]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds the same for three looks is relied on."""
    monkeypatch.setattr(content, "_STEADY", 0.0)


def settled(t: torch.Tensor) -> bytes | None:
    """Its content, looked at until it is known."""
    return [content_of(t) for _ in range(3)][-1]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (96, 96), generator=torch.Generator().manual_seed(0)))


def is_known(t: torch.Tensor) -> bool:
    """Whether the content of ``t`` is told without reading it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content, "_hash", lambda t: b"read")
        patch.setattr(content, "watch", lambda t: None)
        return content_of(t) != b"read"


def step(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Parameter], None]:
    def take(p: nn.Parameter) -> None:
        p.grad = torch.ones_like(p)
        kind([p], **options).step()
        p.grad = None

    return take


def scripted(p: nn.Parameter) -> None:
    torch.jit.CompilationUnit("""
def double(x: Tensor) -> Tensor:
    return x.mul_(2)
""").double(p.detach())


def embedding(p: nn.Parameter) -> None:
    layer = nn.Embedding(96, 96, max_norm=0.5)
    layer.weight = p
    layer(torch.arange(7))


def within_inference_mode(p: nn.Parameter) -> None:
    with torch.inference_mode():
        p.add_(1)


def in_another_thread(p: nn.Parameter) -> None:
    thread = threading.Thread(target=lambda: p.data.add_(1))
    thread.start()
    thread.join()


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "no_grad": lambda p: nn.init.normal_(p),
    "data": lambda p: p.data.mul_(2),
    "one element": lambda p: p.data.__setitem__((5, 7), 2.0),
    "a view": lambda p: p.detach().view(-1)[3:5].fill_(0),
    "a transposed view": lambda p: p.data.t().copy_(torch.randn(96, 96)),
    "another Parameter": lambda p: nn.Parameter(p.detach()).data.add_(1),
    "out": lambda p: torch.add(torch.ones(96, 96), 1, out=p.data),
    "a product": lambda p: torch.mm(torch.ones(96, 96), torch.ones(96, 96), out=p.data),
    "a sort": lambda p: torch.sort(torch.randn(96, 96), out=(p.data, torch.zeros(96, 96, dtype=torch.int64))),
    "linalg": lambda p: torch.linalg.inv(torch.eye(96) * 2, out=p.data),
    "random numbers": lambda p: p.data.uniform_(),
    "indices": lambda p: p.data.index_add_(0, torch.tensor([3]), torch.ones(1, 96)),
    "foreach": lambda p: torch._foreach_add_([p.data], 1.0),
    "SGD": step(torch.optim.SGD, lr=0.1, foreach=True),
    "fused SGD": step(torch.optim.SGD, lr=0.1, fused=True),
    "fused Adam": step(torch.optim.Adam, fused=True),
    "fused Adagrad": step(torch.optim.Adagrad, fused=True),
    "load_state_dict": lambda p: nn.ParameterList([p]).load_state_dict({"0": torch.randn(96, 96)}),
    "a vector of all": lambda p: nn.utils.vector_to_parameters(torch.randn(96 * 96), [p]),
    "embedding": embedding,
    "script": scripted,
    "inference mode": within_inference_mode,
    "a thread": in_another_thread,
    "a storage's element": lambda p: p.untyped_storage().__setitem__(5, 77),
    "a storage": lambda p: p.untyped_storage().fill_(0),
    "a copied storage": lambda p: p.untyped_storage().copy_(torch.randn(96, 96).untyped_storage()),
    "a tensor over the storage": lambda p: torch.empty(0).set_(p.untyped_storage()).add_(1),
    "new data": lambda p: setattr(p, "data", torch.randn(96, 96)),
    "NumPy": lambda p: p.detach().numpy().__setitem__((3, 4), 7.0),
    "DLPack": lambda p: torch.from_dlpack(p.detach()).add_(1),
    "an address": lambda p: ctypes.memset(p.data_ptr() + 400, 1, 40),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen(write: str) -> None:
    p = parameter()
    assert settled(p) == content_of(p.detach().clone())
    assert is_known(p)
    for _ in range(3):
        WRITES[write](p)
        assert content_of(p) == content_of(p.detach().clone())
        assert settled(p) == content_of(p.detach().clone()), "again, as it is known now, or read"


READS: dict[str, Callable[[nn.Parameter], object]] = {
    "a convolution": lambda p: nn.functional.conv2d(torch.ones(1, 96, 3, 3), p.detach().view(96, 96, 1, 1)),
    "with gradients": lambda p: (p @ p).sum().backward(),
    "data": lambda p: p.data,
    "a clone": lambda p: p.clone(),
    "a cast": lambda p: p.double(),
    "equality": lambda p: torch.equal(p, p),
    "a list": lambda p: p.tolist(),
    "its representation": lambda p: repr(p),
}


@pytest.mark.parametrize("read", READS)
def test_reading_ends_no_watch(read: str) -> None:
    p = parameter()
    where = p.data_ptr()
    settled(p)
    READS[read](p)
    gc.collect()
    assert is_known(p) and address(p) == where, "the memory stays where it is"


def test_memory_is_not_copied() -> None:
    p = parameter(512, 512)
    where = p.data_ptr()
    for _ in range(3):
        settled(p)
        assert is_known(p) and address(p) == where
        p.data.add_(1)
        assert not is_known(p) and p.data_ptr() == where


def test_what_models_do_with_parameters_goes_on() -> None:
    layer = nn.Linear(96, 96)
    settled(layer.weight)
    kept = io.BytesIO()
    torch.save(layer.state_dict(), kept)
    other = nn.Linear(96, 96)
    other.load_state_dict(torch.load(io.BytesIO(kept.getvalue())))
    assert torch.equal(other.weight, layer.weight)
    settled(layer.weight)
    layer.half().float()
    settled(layer.weight)
    layer.share_memory()
    assert layer.weight.is_shared() and watch(layer.weight) is None


def by_restoring(layer: nn.Module) -> None:
    cnnfast.restore(cnnfast.accelerate(layer))


@pytest.mark.parametrize(
    "end", [by_restoring, cnnfast.invalidate, lambda layer: cnnfast.invalidate(layer.weight)], ids=["a", "b", "c"]
)
def test_an_ended_watch_leaves_an_ordinary_storage(end: Callable[[nn.Module], object]) -> None:
    """PyTorch 2.13 cannot write to memory that it resized while it was watched (an assertion of its own)."""
    layer = nn.Linear(96, 96)
    p = layer.weight
    settled(p)
    assert is_known(p)
    end(layer)
    assert not is_known(p)
    storage = p.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    p.data.fill_(3)
    assert content_of(p) == content_of(torch.full((96, 96), 3.0))


# --- who is not trusted -----------------------------------------------------------------------------------------------


def test_memory_that_numpy_has_is_read() -> None:
    p = parameter()
    array = p.detach().numpy()
    settled(p)
    assert watch(p) is None and not is_known(p)
    array[3, 3] += 1
    assert content_of(p) == content_of(p.detach().clone())
    buffer = torch.zeros(96, 96)
    array = buffer.numpy()  # has the tensor itself
    assert watch(buffer) is None


def test_memory_that_another_library_has_is_read() -> None:
    p = parameter()
    array = numpy.from_dlpack(p.detach())
    settled(p)
    assert watch(p) is None and not is_known(p)
    del array
    settled(p)
    assert is_known(p)


def test_memory_that_is_not_of_pytorchs_allocation_is_read(tmp_path: Any) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(4 * 96 * 96))
    mapped = torch.from_file(str(file), shared=True, size=96 * 96)
    for t in (torch.from_numpy(numpy.zeros((96, 96), numpy.float32)), mapped, torch.zeros(96, 96).share_memory_()):
        assert watch(t) is None
        before = settled(t)
        t.add_(1)
        assert content_of(t) != before


def test_memory_that_another_process_writes_to_is_read(tmp_path: Any) -> None:
    """A mapped file, written to past this process."""
    code = """
import sys, torch
t = torch.from_file(sys.argv[1], shared=True, size=9216)
t.fill_(5)
"""
    file = tmp_path / "weights"
    file.write_bytes(bytes(4 * 96 * 96))
    p = nn.Parameter(torch.from_file(str(file), shared=True, size=96 * 96))
    before = settled(p)
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, capture_output=True)
    assert p[0] == 5 and content_of(p) != before


def test_without_such_storages_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    p = parameter()
    monkeypatch.setattr(module, "_POSSIBLE", False)
    assert watch(p) is None and address(p[3:]) == p[3:].data_ptr()
    before = content_of(p)
    p.data.add_(1)
    assert content_of(p) != before


@pytest.mark.parametrize("name", ["_lazy_clone", "_is_flagged", "_start", "_users"])
def test_a_pytorch_whose_storages_are_otherwise_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._works()
    monkeypatch.setattr(module, name, None)
    assert not module._works()
    monkeypatch.setattr(module, name, lambda *_: 0)
    assert not module._works()


# --- whose watch it is ------------------------------------------------------------------------------------------------


def test_a_watch_of_the_same_memory_by_another_ends_the_first() -> None:
    p = parameter()
    tied = nn.Parameter(p.detach())
    first = watch(p)
    assert first is None, "two tensors have it"
    del tied
    first = watch(p)
    assert first is not None and unwritten(p, first)
    p.data.add_(1)
    second = watch(p)
    assert second is not None and unwritten(p, second) and not unwritten(p, first), "written to since the first began"


def test_a_watch_ends_with_its_memory() -> None:
    """Allocators hand out the same address."""
    where: dict[int, Watch] = {}
    met = 0
    for seed in range(30):
        p = nn.Parameter(torch.full((96, 96), float(seed)))
        before = where.get(address(p))
        if before is not None:
            met += 1
            assert not unwritten(p, before)
        assert settled(p) == content_of(p.detach().clone())
        found = watch(p)
        assert found is not None
        where[address(p)] = found
        del p
    assert met, "the trap was not set: no address was used twice"


def test_another_tensor_in_the_middle_of_what_was_watched() -> None:
    """The memory of two small ones as a larger one's."""
    flat = torch.randn(4 * 96 * 96)
    old = [nn.Parameter(flat[k * 9216 :][:9216].view(96, 96)) for k in range(4)]
    del flat
    before = [settled(p) for p in old]
    old[2].data.add_(1)
    after = [content_of(p) for p in old]
    assert [a != b for a, b in zip(after, before, strict=True)] == [False, False, True, False]
    assert after == [content_of(p.detach().clone()) for p in old]


def test_a_view_of_height_one() -> None:
    p = parameter(96, 8, 16)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            row = in_rows(p)
            before = settled(row)
            assert is_known(row)
            p.data.add_(1)
            assert content_of(row) != before


def test_a_write_that_had_begun_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thread that has its pointer already, and writes after the first look."""
    monkeypatch.setattr(content, "_STEADY", 0.2)
    p = parameter()
    where = p.data_ptr()
    for value in (1, 2, 3):
        for _ in range(3):
            content_of(p)
        ctypes.memset(where + 400, value, 40)
        assert content_of(p) == content_of(p.detach().clone())
        assert watch_of(p) is None, "it has not held the same for a while"
    time.sleep(0.2)
    content_of(p)
    assert watch_of(p) is not None and not is_known(p)
    ctypes.memset(where + 400, 4, 40)
    assert content_of(p) == content_of(p.detach().clone())
    for _ in range(2):
        time.sleep(0.2)
        content_of(p)
    assert is_known(p)


def watch_of(t: torch.Tensor) -> Watch | None:
    return content._known[content.memory_of(t)].watch


def test_threads_that_write_and_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_STEADY", 0.5)
    weights, wrong, ended = [parameter() for _ in range(4)], [], []

    def work(k: int) -> None:
        for n in range(200):
            for p in weights:
                content_of(p)
            weights[k].data.fill_(n)
            if content_of(weights[k]) != content_of(torch.full((96, 96), float(n))):
                wrong.append((k, n))
        ended.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and sorted(ended) == [0, 1, 2, 3]
    assert [content_of(p) for p in weights] == [content_of(p.detach().clone()) for p in weights]


def test_a_watch_under_fake_tensors_is_of_the_real_one() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    p = parameter()
    with FakeTensorMode():
        settled(p)
    assert is_known(p)
    p.data.add_(1)
    assert content_of(p) == content_of(p.detach().clone())
