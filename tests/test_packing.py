"""The pack cache: it serves what it was given, and never an old weight."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import cnnfast.packing
from cnnfast.packing import PackCache, invalidate, why_not_cacheable


class Counted:
    """A cache whose value is a copy of the weight and of the vectors; counts how often it was built."""

    def __init__(self, limit: int = 4) -> None:
        self.cache, self.builds = PackCache(limit), 0

    def get(self, weight: torch.Tensor, vectors: Sequence[torch.Tensor | None] = (), key: object = "k") -> torch.Tensor:
        def build() -> torch.Tensor:
            self.builds += 1
            kept = [weight.detach().reshape(-1), *(v.detach().reshape(-1) for v in vectors if v is not None)]
            return torch.cat(kept)

        return self.cache.get(weight, key, vectors, build)


def fresh(weight: torch.Tensor, vectors: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in (weight, *vectors)])


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


def test_a_nan_is_never_equal_to_itself(counted: Counted, weight: nn.Parameter) -> None:
    weight.data.fill_(float("nan"))
    counted.get(weight)
    counted.get(weight)
    assert counted.builds == 2, "packed again: slow, never wrong"


# --- what is not cached -----------------------------------------------------------------------------------------------


def test_temporaries_are_not_cached(counted: Counted, weight: nn.Parameter) -> None:
    temporary = weight.detach() * 2
    counted.get(temporary)
    counted.get(temporary)
    assert counted.builds == 2 and len(counted.cache) == 0
    assert "not an nn.Parameter" in str(why_not_cacheable(temporary))
    assert why_not_cacheable(weight) is None


def test_parameters_made_in_inference_mode_are_not_cached(counted: Counted) -> None:
    with torch.inference_mode():
        weight = nn.Parameter(torch.randn(8, 8, 4, 4), requires_grad=False)
        first = counted.get(weight)
        weight.add_(1)
        assert torch.equal(counted.get(weight), fresh(weight)) and not torch.equal(first, counted.get(weight))
    assert "inference_mode" in str(why_not_cacheable(weight))
    assert len(counted.cache) == 0


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
    monkeypatch.setattr(cnnfast.packing, "PACKS", counted.cache)
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 4), nn.Sequential(nn.ConvTranspose2d(8, 8, 4)))
    weights = [model[0].weight, model[1][0].weight]
    for w in weights:
        counted.get(w)
    weights[0].data[0, 0, 0, 1] += 1  # one element: the one write that is not seen
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


def test_a_view_of_a_parameter_shares_its_life() -> None:
    cache, p = PackCache(), nn.Parameter(torch.randn(16, 8, 4))
    with torch.no_grad():
        assert cache.get(p.unsqueeze(2), "k", (), lambda: "first") == "first"
        assert cache.get(p.unsqueeze(2), "k", (), lambda: "second") == "first"
        p.data.mul_(2.0)
        assert cache.get(p.unsqueeze(2), "k", (), lambda: "third") == "third"
        assert cache.get(p[:8], "k", (), lambda: "another view") == "another view"
        assert cache.get(p.unsqueeze(2), "k", (), lambda: "fourth") == "fourth"
    assert len(cache) == 1
    del p
    gc.collect()
    assert len(cache) == 0
