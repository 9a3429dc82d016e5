"""`python -m cnnfast explain`: of a model by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cnnfast.__main__ import main
from cnnfast.messages import UsageError
from cnnfast.tasks.explaining import made, sizes

MODEL = """
from torch import nn
def generator():
    return nn.Sequential(nn.ConvTranspose2d(8, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 3, 1))
class Broken:
    def __init__(self):
        raise ValueError("no weights here")
five = lambda: 5
"""


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_generator.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("there")
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "my_generator:generator", "--input", "2,8,16,16", "--times"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Sequential: ") and "of 2 convolutions fused; graphs: 1" in out
    assert "conv_transpose2d + batch_norm + relu" in out
    assert all(f"{name}: " in out for name in ("cnnfast", "plain", "channels-last"))


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("my_generator", "is no MODULE:FACTORY"),
        ("my_generator:nothing", "gives no model: AttributeError"),
        ("nowhere_at_all:nothing", "gives no model: ModuleNotFoundError"),
        ("my_generator:Broken", "gives no model: ValueError: no weights here"),
        ("my_generator:five", "gives a int, not an nn.Module"),
    ],
)
def test_names_that_make_no_model(name: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=error):
        made(name)
    assert main(["explain", name]) == 2
    assert error in capsys.readouterr().err


def test_a_class_will_do() -> None:
    assert isinstance(made("torch.nn:ReLU"), nn.ReLU)


def test_sizes() -> None:
    assert sizes("2, 3,4").shape == torch.Size([2, 3, 4])
    with pytest.raises(UsageError, match="--input 2,x: sizes are whole numbers"):
        sizes("2,x")
