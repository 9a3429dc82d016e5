"""The pack cache: it serves what it was given, never an old weight, and builds nothing for a single use."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import cnnfast
import cnnfast.cpu.packing
import cnnfast.nn.layers
from cnnfast.cpu import content, packing, watch
from cnnfast.cpu.packing import PackCache, invalidate, why_not_cacheable


class Counted:
    """A cache whose value is a copy of the weight and of the vectors; counts how often it was built."""

    def __init__(self, limit: int = 4) -> None:
        self.cache, self.builds = PackCache(limit), 0

    def get(self, weight: torch.Tensor, vectors: Sequence[torch.Tensor | None] = (), key: object = "k") -> torch.Tensor:
        def build() -> torch.Tensor:
            self.builds += 1
            kept = [weight.detach().reshape(-1), *(v.detach().reshape(-1) for v in vectors if v is not None)]
            return torch.cat(kept)

        value = None
        for _ in range(3):  # the weight is met, then the vectors, then there is a value
            if value is None:
                value = self.cache.get(weight, lambda: key, vectors, build)
        assert value is not None
        return value


def fresh(weight: torch.Tensor, vectors: Sequence[torch.Tensor | None] = ()) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in (weight, *vectors) if t is not None])


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(64, 32, 4, 4))


def test_an_unchanged_weight_is_packed_once(counted: Counted, weight: nn.Parameter) -> None:
    bias = torch.randn(32)
    first = counted.get(weight, (bias, None))
    assert counted.get(weight, (bias, None)) is first
    assert counted.get(weight, (bias.clone(), None)) is first, "equal content is enough for the vectors"
    assert counted.builds == 1


# --- changes of the weight --------------------------------------------------------------------------------------------


def _optimizer_step(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.1).step()


def _load_state_dict(p: nn.Parameter) -> None:
    holder = nn.Module()
    holder.weight = p
    holder.load_state_dict({"weight": torch.randn(p.shape)})


def _swap_storage(p: nn.Parameter) -> None:
    p.data = torch.randn(p.shape)


def _ema(p: nn.Parameter) -> None:
    version = p._version
    p.data.mul_(0.999).add_(torch.randn(p.shape), alpha=0.001)
    assert p._version == version, "this is the write that no version shows"


def _data_copy(p: nn.Parameter) -> None:
    p.data.copy_(torch.randn(p.shape))


def _numpy_write(p: nn.Parameter) -> None:
    p.detach().numpy()[...] += 1


CHANGES: dict[str, Callable[[nn.Parameter], None]] = {
    "optimizer": _optimizer_step,
    "load_state_dict": _load_state_dict,
    "new_storage": _swap_storage,
    "ema_through_data": _ema,
    "copy_through_data": _data_copy,
    "numpy": _numpy_write,
    "no_grad_in_place": lambda p: torch.nn.init.normal_(p),
    "channels_last": lambda p: setattr(p, "data", p.data.contiguous(memory_format=torch.channels_last)),
    "transposed_view": lambda p: setattr(p, "data", p.data.transpose(0, 1).contiguous().transpose(0, 1)),
    "dtype": lambda p: setattr(p, "data", p.data.double()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_a_changed_weight_is_packed_again(
    counted: Counted, weight: nn.Parameter, change: str, memory_format: torch.memory_format
) -> None:
    weight.data = weight.data.contiguous(memory_format=memory_format)
    for _ in range(3):
        counted.get(weight)
        CHANGES[change](weight)
        assert torch.equal(counted.get(weight), fresh(weight))
    assert len(counted.cache) == 1, "the stale entry is dropped"


def test_a_weight_with_gaps_in_memory_is_compared_whole(counted: Counted) -> None:
    weight = nn.Parameter(torch.randn(64, 64)[:, :16])
    counted.get(weight)
    weight.data[37, 11] += 1
    assert torch.equal(counted.get(weight), fresh(weight))


def test_many_models_in_a_row_never_share(counted: Counted) -> None:
    """Allocators hand out the same address, and every fresh Parameter has the same version."""
    addresses = set()
    for seed in range(50):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.ConvTranspose2d(32, 16, 4), nn.BatchNorm2d(16))
        p = model[0].weight
        addresses.add(p.data_ptr())
        assert torch.equal(counted.get(p, (model[1].running_mean,)), fresh(p, (model[1].running_mean,)))
        del p, model
    assert counted.builds == 50
    assert len(addresses) < 50, "the trap was not set: no address was used twice"


def test_reload_at_the_same_address(counted: Counted, weight: nn.Parameter) -> None:
    """A new Parameter over the very storage of the old one: same pointer, same version."""
    counted.get(weight)
    memory = weight.data
    old = (weight.data_ptr(), weight._version)
    del weight
    memory.copy_(torch.randn(memory.shape))
    again = nn.Parameter(torch.from_numpy(memory.numpy()))
    assert (again.data_ptr(), again._version) == old
    assert torch.equal(counted.get(again), fresh(again))
    assert counted.builds == 2


# --- changes of the vectors -------------------------------------------------------------------------------------------


def test_running_statistics_changed_without_a_version(counted: Counted, weight: nn.Parameter) -> None:
    norm = nn.BatchNorm2d(32).eval()
    vectors = (norm.running_mean, norm.running_var)
    counted.get(weight, vectors)
    norm.train()(torch.randn(2, 32, 4, 4) + 3)
    norm.eval()
    assert torch.equal(counted.get(weight, vectors), fresh(weight, vectors))


@pytest.mark.parametrize("at", [0, 17, 31])
def test_one_element_of_a_vector_is_seen(counted: Counted, weight: nn.Parameter, at: int) -> None:
    bias = nn.Parameter(torch.randn(32))
    counted.get(weight, (bias,))
    bias.data[at] += 1e-3
    assert torch.equal(counted.get(weight, (bias,)), fresh(weight, (bias,)))


def test_a_vector_that_comes_goes_or_changes_dtype(counted: Counted, weight: nn.Parameter) -> None:
    bias = torch.ones(32)
    sizes = [counted.get(weight, (v,)).numel() for v in (None, bias, None, bias)]
    assert sizes == [weight.numel(), weight.numel() + 32] * 2
    builds = counted.builds
    counted.get(weight, (bias.double(),))
    assert counted.builds == builds + 1


def test_bits_are_compared_not_numbers(counted: Counted, weight: nn.Parameter) -> None:
    weight.data.fill_(float("nan"))
    counted.get(weight)
    counted.get(weight)
    assert counted.builds == 1
    weight.data.fill_(0.0)
    counted.get(weight)
    weight.data[3, 2, 1, 0] = -0.0
    assert counted.get(weight).signbit().sum() == 1


# --- changes that samples, sums and versions do not show --------------------------------------------------------------


def _swap(p: torch.Tensor) -> None:
    flat = p.view(-1)
    flat[[0, 4096]] = flat[[4096, 0]]


EDITS: dict[str, Callable[[torch.Tensor], object]] = {
    "one_element": lambda w: w.view(-1)[12345].add_(1e-6),
    "lowest_bit": lambda w: w.view(torch.int32).view(-1)[777].bitwise_xor_(1),
    "two_signs": lambda w: w.view(-1)[8:24:8].neg_(),
    "all_signs": lambda w: w.neg_(),
    "swapped_elements": _swap,
    "swapped_channels": lambda w: w.copy_(w[[1, 0, *range(2, 64)]]),
    "swapped_outputs": lambda w: w.copy_(w.flip(1)),
    "flipped_kernel": lambda w: w.copy_(w.flip(2, 3)),
    "rolled": lambda w: w.view(-1).copy_(w.view(-1).roll(1)),
    "transposed_taps": lambda w: w.copy_(w.transpose(2, 3).clone()),
    "rectangle": lambda w: w[:2, :2, 0, 0].add_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])),
    "one_filter": lambda w: w[9].zero_(),
    "one_output": lambda w: w[:, 31].zero_(),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_edit_through_data_is_seen(counted: Counted, edit: str, dtype: torch.dtype) -> None:
    if edit == "lowest_bit" and dtype != torch.float32:
        pytest.skip("an edit of 32 bits")
    weight = nn.Parameter(torch.randn(64, 32, 4, 4, dtype=dtype).round(decimals=2))
    before = counted.get(weight).clone()
    version = weight._version
    EDITS[edit](weight.data)
    assert weight._version == version
    assert torch.equal(counted.get(weight), fresh(weight))
    assert edit == "one_element" and dtype == torch.bfloat16 or not torch.equal(counted.get(weight), before)


@pytest.mark.parametrize("where", range(16))
def test_every_filter_is_seen(counted: Counted, where: int) -> None:
    """In sensitivity scans one filter at a time is zeroed and restored."""
    weight = nn.Parameter(torch.randn(16, 16, 4, 4))
    for index in ((where,), (slice(None), where)):
        counted.get(weight)
        keep = weight.data[index].clone()
        weight.data[index] = 0
        assert torch.equal(counted.get(weight), fresh(weight))
        weight.data[index] = keep
        assert torch.equal(counted.get(weight), fresh(weight))


def _through_numpy(p: nn.Parameter) -> None:
    p.detach().numpy()[5, 5, 3, 3] += 1


def _through_dlpack(p: nn.Parameter) -> None:
    torch.from_dlpack(p.detach())[5, 5, 3, 3] += 1


def _through_a_tied_parameter(p: nn.Parameter) -> None:
    with torch.no_grad():
        nn.Parameter(p.data)[5, 5, 3, 3] += 1  # has a version of its own


def _through_the_storage(p: nn.Parameter) -> None:
    flat = torch.empty(0, dtype=p.dtype).set_(p.untyped_storage())
    flat[p.storage_offset() + 100] += 1


@pytest.mark.parametrize(
    "write",
    [_through_numpy, _through_dlpack, _through_a_tied_parameter, _through_the_storage],
    ids=lambda f: f.__name__,
)
def test_writes_past_the_parameter_are_seen(counted: Counted, write: Callable[[nn.Parameter], None]) -> None:
    flat = torch.randn(3 * 64 * 32 * 16)  # as an optimiser's flat buffer
    weight = nn.Parameter(flat[64 * 32 * 16 :][: 64 * 32 * 16].view(64, 32, 4, 4))
    counted.get(weight)
    version = weight._version
    write(weight)
    assert weight._version == version and torch.equal(counted.get(weight), fresh(weight))


# --- what is used once ------------------------------------------------------------------------------------------------


def test_a_weight_that_always_changes_is_never_packed(weight: nn.Parameter) -> None:
    cache, asked = PackCache(), []
    for _ in range(5):
        _optimizer_step(weight)
        assert cache.get(weight, lambda: asked.append(1), (), lambda: pytest.fail("built")) is None
    assert not asked, "the key costs a packing"
    assert cache.get(weight, lambda: "k", (), lambda: "built") == "built", "the second call with the same content"
    _optimizer_step(weight)
    assert cache.get(weight, lambda: "k", (), lambda: pytest.fail("built")) is None and len(cache) == 0


def test_vectors_that_always_change_are_folded_once_at_most(weight: nn.Parameter) -> None:
    cache, builds = PackCache(), []
    for i in range(6):
        vectors = (torch.full((32,), float(i)),)
        cache.get(weight, lambda: "k", vectors, lambda i=i: builds.append(i) or i)
    assert builds == [1]
    assert [cache.get(weight, lambda: "k", vectors, lambda: "v") for _ in range(2)] == ["v", "v"]


def test_a_write_while_it_is_packed_is_not_kept(weight: nn.Parameter) -> None:
    cache = PackCache()
    cache.get(weight, lambda: "k", (), lambda: "first")
    assert cache.get(weight, lambda: "k", (), lambda: weight.data.add_(1) is None or "torn") == "torn"
    assert len(cache) == 0
    for expected in (None, "whole", "whole"):
        assert cache.get(weight, lambda: "k", (), lambda: "whole") == expected


# --- frozen weights ---------------------------------------------------------------------------------------------------


@pytest.fixture
def layer(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> cnnfast.Sequential:
    monkeypatch.setattr(cnnfast.cpu.packing, "PACKS", counted.cache)
    monkeypatch.setattr(cnnfast.nn.layers, "PACKS", counted.cache)
    return cnnfast.Sequential(nn.ConvTranspose2d(8, 8, 4), nn.BatchNorm2d(8)).eval()


def test_a_frozen_weight_is_packed_at_once_and_not_read_again(layer: cnnfast.Sequential, counted: Counted) -> None:
    weight, vectors = layer[0].weight, (layer[0].bias, layer[1].running_mean)
    cnnfast.freeze(layer)
    assert counted.cache.get(weight, lambda: "k", vectors, lambda: "old") == "old"
    weight.data.add_(1)
    layer[1].running_mean.data.add_(1)
    assert counted.cache.get(weight, lambda: "k", vectors, lambda: "new") == "old", "this is what freezing means"
    assert counted.cache.get(weight, lambda: "other", vectors, lambda: "new") == "new"
    cnnfast.unfreeze(layer)
    weight.data.add_(1)
    assert counted.cache.get(weight, lambda: "k", vectors, lambda: "newer") is None
    assert counted.cache.get(weight, lambda: "k", vectors, lambda: "newer") == "newer"


def test_a_weight_that_was_packed_before_it_was_frozen(layer: cnnfast.Sequential, counted: Counted) -> None:
    weight = layer[0].weight
    counted.get(weight)
    cnnfast.freeze(layer)
    weight.data.add_(1)
    assert torch.equal(counted.get(weight), fresh(weight)), "what was written before the first call is seen"
    old = counted.get(weight).clone()
    weight.data.add_(1)
    assert torch.equal(counted.get(weight), old)


ENDS: dict[str, Callable[[nn.Module], object]] = {
    "train": lambda m: m.train().eval(),
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "to": lambda m: m.to(torch.float32),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "invalidate": cnnfast.invalidate,
    "unfreeze": cnnfast.unfreeze,
    "in_place": lambda m: nn.init.normal_(m[0].weight),
    "of_a_vector": lambda m: nn.init.normal_(m[0].bias),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "in a model"])
def test_what_ends_it(layer: cnnfast.Sequential, counted: Counted, end: str, inside: bool) -> None:
    model = nn.Module()
    model.layer = layer
    cnnfast.freeze(model.eval() if inside else layer)
    weight, vectors = layer[0].weight, (layer[0].bias,)
    counted.get(weight, vectors)
    ENDS[end](model if inside and end not in ("in_place", "of_a_vector") else layer)
    assert torch.equal(counted.get(weight, vectors), fresh(weight, vectors))
    weight.data.add_(1)
    assert torch.equal(counted.get(weight, vectors), fresh(weight, vectors)), "and it is not frozen any more"


def test_frozen_anew_after_a_step(layer: cnnfast.Sequential, counted: Counted) -> None:
    weight = layer[0].weight
    for _ in range(3):
        cnnfast.freeze(layer)
        counted.get(weight)
        nn.init.normal_(weight)
        cnnfast.freeze(layer)
        assert torch.equal(counted.get(weight), fresh(weight))
        old = counted.get(weight).clone()
        weight.data.add_(1)
        assert torch.equal(counted.get(weight), old)


def test_freeze_as_a_context(layer: cnnfast.Sequential, counted: Counted) -> None:
    weight = layer[0].weight
    with cnnfast.freeze(layer):
        old = counted.get(weight).clone()
        weight.data.add_(1)
        assert torch.equal(counted.get(weight), old)
        with cnnfast.freeze(layer):
            pass
        assert torch.equal(counted.get(weight), old), "the outer one holds"
    assert torch.equal(counted.get(weight), fresh(weight))


def test_what_cannot_be_frozen(layer: cnnfast.Sequential) -> None:
    with pytest.raises(ValueError, match=r"in training mode: call its eval\(\) first"):
        cnnfast.freeze(layer.train())
    for function in (cnnfast.freeze, cnnfast.unfreeze):
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\) takes an nn.Module, got Tensor"):
            function(torch.ones(1))  # type: ignore[arg-type]


def test_copies_of_a_frozen_module_are_not_frozen(layer: cnnfast.Sequential, counted: Counted) -> None:
    cnnfast.freeze(layer)
    counted.get(layer[0].weight)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    counted.get(twin[0].weight)
    twin[0].weight.data.add_(1)
    assert torch.equal(counted.get(twin[0].weight), fresh(twin[0].weight))


# --- what is not cached -----------------------------------------------------------------------------------------------


def test_temporaries_are_not_cached(weight: nn.Parameter, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not an nn.Parameter" in str(why_not_cacheable(weight.detach() * 2))
    assert why_not_cacheable(weight) is None and why_not_cacheable(weight[:1].unsqueeze(2)) is None
    monkeypatch.setattr(cnnfast.cpu.content, "xxh3_128_digest", None)
    assert "xxhash is not installed" in str(why_not_cacheable(weight))


def test_parameters_made_in_inference_mode(counted: Counted) -> None:
    """They have no version, which nothing depends on."""
    with torch.inference_mode():
        weight = nn.Parameter(torch.randn(8, 8, 4, 4), requires_grad=False)
        for _ in range(2):
            weight.add_(1)
            assert torch.equal(counted.get(weight), fresh(weight))
            assert counted.get(weight) is counted.get(weight)


# --- life time --------------------------------------------------------------------------------------------------------


def test_entries_die_with_their_parameter(counted: Counted) -> None:
    model = nn.ConvTranspose2d(8, 8, 4)
    model.loop = model  # a cycle: only the garbage collector frees it
    counted.get(model.weight)
    counted.get(model.bias)
    assert len(counted.cache) == 2
    del model
    gc.collect()
    assert len(counted.cache) == 0 and not counted.cache._slots


def test_at_most_limit_values_for_each_parameter() -> None:
    counted = Counted(limit=3)
    weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    for w in weights:
        for key in (0, 1, 2, 0, 3):  # 0 was used again, so 1 is the oldest
            counted.get(w, key=key)
    assert len(counted.cache) == 6
    builds = counted.builds
    for key in (0, 2, 3):
        counted.get(weights[0], key=key)
    assert counted.builds == builds
    counted.get(weights[0], key=1)
    assert counted.builds == builds + 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_models_with_packed_weights_copy_and_pickle(counted: Counted, duplicate: Callable[..., nn.Module]) -> None:
    model = nn.ConvTranspose2d(8, 8, 4)
    counted.get(model.weight)
    twin = duplicate(model)
    twin.weight.data.mul_(2)
    assert torch.equal(counted.get(twin.weight), fresh(model.weight) * 2)
    assert torch.equal(counted.get(model.weight), fresh(model.weight))
    torch.save(model.state_dict(), io.BytesIO())


def test_invalidate_a_module_or_a_parameter(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cnnfast.cpu.packing, "PACKS", counted.cache)
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 4), nn.Sequential(nn.ConvTranspose2d(8, 8, 4)))
    weights = [model[0].weight, model[1][0].weight]
    for w in weights:
        counted.get(w)
    assert invalidate(weights[0]) == 1 and invalidate(weights[0]) == 0
    assert torch.equal(counted.get(weights[0]), fresh(weights[0]))
    assert invalidate(model) == 2 and len(counted.cache) == 0
    with pytest.raises(TypeError, match="takes an nn.Module or a Tensor, got str"):
        invalidate("model")  # type: ignore[arg-type]


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads(counted: Counted) -> None:
    """Readers of shared weights, a thread that makes and drops Parameters, and garbage collections, at once."""
    shared = [nn.Parameter(torch.full((32, 8, 4, 4), float(i))) for i in range(6)]
    errors: list[BaseException] = []
    start = threading.Barrier(5)

    def guarded(work: Callable[[], None]) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:
            errors.append(error)

    def read() -> None:
        for i in range(300):
            w = shared[i % len(shared)]
            assert torch.equal(counted.get(w, key=i % 5), fresh(w))

    def churn() -> None:
        for i in range(300):
            w = nn.Parameter(torch.full((8, 8), float(i)))
            assert torch.equal(counted.get(w), fresh(w))
            if i % 50 == 0:
                gc.collect()

    threads = [threading.Thread(target=guarded, args=(f,)) for f in (read, read, read, churn, churn)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors
    assert len(counted.cache) <= 4 * len(shared)


def test_a_view_of_a_parameter_shares_its_life(counted: Counted) -> None:
    cache, p = counted.cache, nn.Parameter(torch.randn(16, 8, 4))
    with torch.no_grad():
        first = counted.get(p.unsqueeze(2))
        assert counted.get(p.unsqueeze(2)) is first
        p.data.mul_(2.0)
        second = counted.get(p.unsqueeze(2))
        assert torch.equal(second, fresh(p))
        parts = [counted.get(p[:8]), counted.get(p[8:])]
        assert torch.equal(torch.cat(parts), second)
        assert counted.get(p.unsqueeze(2)) is second and counted.get(p[:8]) is parts[0]
    assert len(cache) == 3
    del p
    gc.collect()
    assert len(cache) == 0


def test_what_nobody_else_has_is_met_already_and_not_read(counted: Counted, weight: nn.Parameter) -> None:
    """Its vectors are."""
    counted.cache.own(weight)
    vector = torch.randn(32)

    def get() -> torch.Tensor | None:
        return counted.cache.get(weight, lambda: "k", (vector,), lambda: fresh(weight, (vector,)))

    first = get()
    assert first is not None and get() is first
    weight.data.mul_(2)  # which nobody can
    assert get() is first
    vector.data.mul_(2)
    assert get() is None
    second = get()
    assert second is not None and torch.equal(second, fresh(weight, (vector,))) and get() is second
    gc.collect()
    assert len(counted.cache) == 1


# --- who asks again and again -----------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cache's own lookups."""
    monkeypatch.setattr(content, "_STEADY", 0.0)  # what holds the same for three looks is relied on
    seen: list[str] = []
    real = packing.PACKS.get
    monkeypatch.setattr(packing.PACKS, "get", lambda *args: seen.append("get") or real(*args))
    return seen


LEASED: dict[str, Callable[[nn.Parameter, list[torch.Tensor]], object]] = {
    "the weight": lambda p, v: p.data.view(-1)[77].add_(1),
    "a vector": lambda p, v: v[2].data[3].add_(1),
    "through NumPy": lambda p, v: v[1].detach().numpy().__setitem__(3, 7),
    "other data": lambda p, v: setattr(p, "data", torch.randn(p.shape)),
    "other data of a vector": lambda p, v: setattr(v[0], "data", torch.randn(32)),
    "the same memory in another order": lambda p, v: setattr(p, "data", p.data.transpose(2, 3)),
    "no vector": lambda p, v: v.__setitem__(1, torch.randn(32) if v[1] is None else None),
    "another vector": lambda p, v: v.__setitem__(1, torch.randn(32)),
    "vectors in each other's place": lambda p, v: v.reverse(),
    "a training step": lambda p, v: nn.functional.batch_norm(torch.randn(4, 32, 3, 3), v[0], v[1], training=True),
}


@pytest.mark.skipif(not watch._POSSIBLE, reason="this PyTorch has no such storages")
@pytest.mark.parametrize("change", LEASED)
def test_who_asks_again_gets_the_same_until_somebody_writes(change: str, asked: list[str]) -> None:
    weight = nn.Parameter(torch.randn(64, 32, 4, 4))
    vectors: list[Any] = [torch.randn(32) for _ in range(4)]
    leased = packing.Leased()

    def get() -> torch.Tensor | None:
        found = leased.held(weight, *vectors)
        return leased.get(weight, lambda: "k", vectors, lambda: fresh(weight, vectors)) if found is None else found

    for _ in range(1 if change == "through NumPy" else 3):  # whose memory is read from then on
        found = [get() for _ in range(6)][-1]
        asked.clear()
        assert get() is found and not asked
        LEASED[change](weight, vectors)
        again = get()
        assert asked and (again is None or torch.equal(again, fresh(weight, tuple(vectors))))
        assert torch.equal([get() for _ in range(3)][-1], fresh(weight, tuple(vectors)))


@pytest.mark.skipif(not watch._POSSIBLE, reason="this PyTorch has no such storages")
def test_who_asks_again_keeps_nothing_alive(asked: list[str]) -> None:
    weight, leased, value = nn.Parameter(torch.randn(64, 32, 4, 4)), packing.Leased(), []

    def build() -> object:
        made = Counted()
        value.append(weakref.ref(made))
        return made

    for _ in range(6):
        leased.get(weight, lambda: "k", (), build)
    asked.clear()
    assert leased.held(weight) is value[0]() and leased.held(weight) is not None and not asked
    packing.PACKS.invalidate(weight)
    gc.collect()
    assert value[0]() is None
    for _ in range(4):
        leased.get(weight, lambda: "k", (), build)
    del weight
    gc.collect()
    assert value[-1]() is None


@pytest.mark.parametrize("end", ENDS)
def test_who_asks_again_for_a_frozen_weight(
    layer: cnnfast.Sequential, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not looked at from the third time on, until its version is another or it is frozen no more."""
    monkeypatch.setattr(packing, "PACKS", packing.PackCache())
    monkeypatch.setattr(cnnfast.nn.layers, "PACKS", packing.PACKS)
    weight, vectors, leased = layer[0].weight, (layer[0].bias, layer[1].running_mean), packing.Leased()
    cnnfast.freeze(layer)
    for _ in range(2):
        assert leased.get(weight, lambda: "k", vectors, lambda: "old") == "old"
    assert leased.held(weight, *vectors) == "old"
    weight.data.add_(1)
    layer[1].running_mean.data.add_(1)
    assert leased.held(weight, *vectors) == "old", "this is what freezing means"
    assert leased.held(weight, vectors[0], vectors[1].clone()) is None
    ENDS[end](layer)
    assert leased.held(layer[0].weight, layer[0].bias, layer[1].running_mean) is None


@pytest.mark.skipif(not watch._POSSIBLE, reason="this PyTorch has no such storages")
def test_many_threads_ask_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_STEADY", 0.0)
    weights, wrong, ended = [nn.Parameter(torch.randn(8, 8, 4, 4)) for _ in range(3)], [], []
    leased = [packing.Leased() for _ in weights]

    def ask(n: int) -> None:
        for _ in range(60):
            for w, own in zip(weights, leased, strict=True):
                found = own.held(w, None)
                if found is None:
                    found = own.get(w, lambda: "k", (None,), lambda w=w: fresh(w))
                if found is not None and not torch.equal(found, fresh(w)):
                    wrong.append(n)
        ended.append(n)

    for _ in range(3):
        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(own.held(w, None) is not None for w, own in zip(weights, leased, strict=True))
        for w in weights:
            w.data.add_(1)
    assert not wrong and len(ended) == 12
