"""Checkpoints that are damaged or of something else are named in one line; what is read runs no code."""

from __future__ import annotations

import copy
import os
import traceback
from pathlib import Path

import pytest
import torch

from cnnfast.__main__ import main
from cnnfast.tasks import train
from cnnfast.tasks.checkpoint import CheckpointError, load_checkpoint, load_generator, save_checkpoint

from .test_train_gan import TINY, images, trained

DAMAGE = {
    "no steps": lambda s: s.pop("steps"),
    "steps of another kind": lambda s: s.update(steps=torch.ones(1)),
    "no average": lambda s: s.pop("average"),
    "no options": lambda s: s.pop("options"),
    "options of another kind": lambda s: s.update(options=[1]),
    "an option of another kind": lambda s: s["options"].update(batch_size="4"),
    "an unknown option": lambda s: s["options"].update(colour="red"),
    "an option that cannot be": lambda s: s["options"].update(width=-1),
    "a missing weight": lambda s: s["generator"].pop("main.0.weight"),
    "an unknown weight": lambda s: s["generator"].update(more=torch.ones(1)),
    "a weight of another shape": lambda s: s["discriminator"].update({"main.0.weight": torch.ones(3)}),
    "a weight that is none": lambda s: s["average"].update({"main.0.weight": 3}),
    "a state_dict that is none": lambda s: s.update(generator=3),
    "no optimiser": lambda s: s["optimisers"].pop("generator"),
    "an optimiser that is none": lambda s: s.update(optimisers=3),
    "moments of another shape": lambda s: s["optimisers"]["generator"]["state"][0].update(exp_avg=torch.ones(3)),
    "no moments": lambda s: s["optimisers"]["generator"].update(state={}),
    "other groups": lambda s: s["optimisers"]["discriminator"]["param_groups"].pop(),
    "fewer curves": lambda s: s.update(curves=s["curves"][1:]),
    "curves that are none": lambda s: s.update(curves="none"),
}


@pytest.fixture(scope="module")
def state() -> dict[str, object]:
    return trained(TINY, 2, images(4)).state()


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_not_gone_on_from(
    name: str, state: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_images", lambda data, size: images(4))
    bad = copy.deepcopy(state)
    DAMAGE[name](bad)
    save_checkpoint(tmp_path / "checkpoint.pt", bad)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/checkpoint.pt is damaged: [^\n]+$"):
        train.run(resume=True, output=tmp_path, epochs=9, device="cpu")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


NO_GENERATOR = {
    "no config": lambda s: s.pop("config"),
    "a config of another kind": lambda s: s.update(config=3),
    "an unknown option": lambda s: s["config"].update(colour="red"),
    "a size that cannot be": lambda s: s["config"].update(image_size=17),
    "a text for a size": lambda s: s["config"].update(ngf="2"),
    "a terabyte": lambda s: s["config"].update(ngf=10**7),
    "more than can be counted": lambda s: s["config"].update(image_size=2**70),
    "no average": lambda s: s.pop("average"),
    "another shape": lambda s: s["average"].update({"main.0.weight": torch.ones(4, 4, 4, 5)}),
    "another dtype": lambda s: s["average"].update({"main.0.weight": s["average"]["main.0.weight"].half()}),
    "a missing weight": lambda s: s["average"].pop("main.1.running_var"),
}


@pytest.mark.parametrize("name", NO_GENERATOR)
def test_a_checkpoint_without_a_usable_generator(name: str, state: dict[str, object], tmp_path: Path) -> None:
    bad = copy.deepcopy(state)
    NO_GENERATOR[name](bad)
    save_checkpoint(tmp_path / "checkpoint.pt", bad)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/checkpoint.pt holds no generator[^\n]+$"):
        load_generator(tmp_path / "checkpoint.pt")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code in the checkpoint ran",))


def test_a_pickle_is_refused_without_advice_to_run_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"format": "cnnfast gan 1", "config": Evil()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="it asks for print: tensors, numbers and strings are read") as caught:
        load_checkpoint(tmp_path / "c.pt")
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    assert main(["sample", str(tmp_path / "c.pt"), "--debug"]) == 1
    assert capfd.readouterr().err.count("weights_only") == 0


@pytest.mark.parametrize(
    "kind",
    [
        str,
        Path,
        os.fspath,
        type("P", (), {"__init__": lambda s, p: setattr(s, "p", p), "__fspath__": lambda s: str(s.p)}),
    ],
    ids=["str", "Path", "fspath", "PathLike"],
)
def test_paths_of_every_kind(kind: type, state: dict[str, object], tmp_path: Path) -> None:
    path = kind(tmp_path / "c.pt")
    save_checkpoint(path, dict(state))
    assert load_checkpoint(path)["steps"] == 2 and load_generator(path)(torch.randn(1, 4, 1, 1)).shape == (1, 1, 16, 16)


@pytest.mark.parametrize("count", [1, 64, 65, 130])
def test_samples_are_drawn_in_parts(
    count: int, state: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "c.pt", dict(state))
    grids: list[torch.Tensor] = []
    monkeypatch.setattr(train, "save_grid", lambda path, pictures: grids.append(pictures))
    assert train.sample(tmp_path / "c.pt", tmp_path / "s.png", count, 3) == 0
    z = torch.randn(count, 4, 1, 1, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        torch.testing.assert_close(grids[0], load_generator(tmp_path / "c.pt")(z))
