"""Published checkpoints: what `torch.save` wrote and safetensors, where the ``state_dict`` is in them, and bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cnnfast.generators import create_model
from cnnfast.generators.checkpoint import read_checkpoint
from cnnfast.generators.weights import WeightsError

STATE = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7),
    "d": torch.empty(0, 3, dtype=torch.float16),
    "e": torch.tensor([True, False, True]),
    "f": torch.tensor([0.1], dtype=torch.float64),
}
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bool: "BOOL",
    torch.float64: "F64",
}


def safetensors(state: dict[str, Tensor], **changes: Any) -> bytes:
    """The file's bytes; ``changes`` to the entry of "a"."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, t in state.items():
        held = bytes(t.contiguous().reshape(-1).view(torch.uint8).tolist())
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape)}
        header[name]["data_offsets"] = [len(data), len(data) + len(held)]
        data += held
    header["a"] |= changes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name


@pytest.mark.parametrize("key", [None, "params_ema", "params", "g_ema", "generator", "state_dict", "model_state_dict"])
def test_where_the_state_is(key: str | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(STATE if key is None else {"epoch": 3, key: STATE, "latent_avg": torch.zeros(2)}, path)
    assert_same(read_checkpoint(path), STATE)


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    torch.save({"params": {"a": torch.zeros(1)}, "params_ema": {"a": torch.ones(1)}}, tmp_path / "weights.pth")
    assert_same(read_checkpoint(str(tmp_path / "weights.pth")), {"a": torch.ones(1)})


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors(STATE))
    found = read_checkpoint(path)
    assert_same(found, STATE)
    found["a"].add_(1)  # it may be written to


def test_of_safetensors_itself(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.torch")
    package.save_file(STATE, tmp_path / "weights.safetensors")
    found = read_checkpoint(tmp_path / "weights.safetensors")
    assert_same({name: found[name] for name in STATE}, STATE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "F8_E4M3"}, "a is of F8_E4M3: expected one of F64, F32"),
        ({"shape": [2, 4]}, r"a of shape \(2, 4\) is 32 bytes, at 0 to 24 of"),
        ({"shape": [-2, -3]}, r"a of shape \(-2, -3\)"),
        ({"data_offsets": [-24, 0]}, "at -24 to 0 of"),
        ({"data_offsets": [4096, 4120]}, "at 4096 to 4120 of"),
        ({"data_offsets": None}, "damaged or something else"),
        ({"shape": None}, "damaged or something else"),
    ],
)
def test_damaged_entries(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors(STATE, **changes))
    with pytest.raises(WeightsError, match=f"weights.safetensors is no checkpoint that can be read: .*{said}"):
        read_checkpoint(path)


def test_cut_off_anywhere(tmp_path: Path) -> None:
    path, whole = tmp_path / "weights.safetensors", safetensors(STATE)
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            read_checkpoint(path)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code in the checkpoint ran",))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"epoch": 3, "weights": STATE}, "alone or under one of params_ema, .*; it holds epoch, weights"),
        ({}, "it holds nothing"),
        ([1, 2], "it holds a list"),
        (Evil(), "it asks for .*print: .* no code is run"),
    ],
    ids=["key", "empty", "list", "code"],
)
def test_others(value: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pth"
    torch.save(value, path)
    with pytest.raises(WeightsError, match=f"no checkpoint that can be read: .*{said}"):
        read_checkpoint(path)
    assert "ran" not in capsys.readouterr().out


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nothing.pth cannot be read: .*No such file"):
        read_checkpoint(tmp_path / "nothing.pth")


def test_into_a_generator(tmp_path: Path) -> None:
    options = {"num_mels": 4, "upsample_rates": (2,), "upsample_kernel_sizes": (4,), "upsample_initial_channel": 4}
    source = create_model("hifigan", **options, weight_norm=True)
    path = tmp_path / "generator.pth"
    torch.save({"generator": source.state_dict()}, path)
    model = create_model("hifigan", weights_file=path, **options)
    assert not model.training and model.config.num_mels == 4
    x = torch.randn(1, 4, 5)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), source(x), rtol=1e-5, atol=1e-6)
    assert create_model("hifigan", pretrained=True, weights_file=path, **options).conv_pre.in_channels == 4
    with pytest.raises(RuntimeError, match="size mismatch for conv_pre.weight"):
        create_model("hifigan", weights_file=path, **{**options, "num_mels": 5})
    with pytest.raises(ValueError, match="'hifigan' has no trained weights; .*weights_file="):
        create_model("hifigan", pretrained=True)
