"""batch.py: which results a command makes, failures on the way, stops, and the parts of several processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tqdm", reason="tqdm is not installed")

from cnnfast.messages import CnnfastError, UsageError
from cnnfast.tasks import batch
from cnnfast.tasks.batch import Item


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("in/b.png", "in/a.JPG", "in/c.gif", "in/notes.txt", "in/.hidden.png", "in/deep/d.webp", "e.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    return tmp_path


def planned(*inputs: str, output: str = "out", recursive: bool = False) -> list[tuple[str, str]]:
    items = batch.plan([Path(i) for i in inputs], Path(output), recursive)
    return [(str(item.source), str(item.target)) for item in items]


def test_which_results(folder: Path) -> None:
    assert planned("e.png", output="x/y.jpg") == [("e.png", "x/y.jpg")]
    assert planned("e.png", output="in") == [("e.png", "in/e.png")]
    inside = [("in/a.JPG", "out/a.JPG"), ("in/b.png", "out/b.png"), ("in/c.gif", "out/c.png")]
    assert planned("in") == inside
    assert planned("in", recursive=True) == [*inside, ("in/deep/d.webp", "out/deep/d.webp")]
    assert planned("e.png", "in") == [("e.png", "out/e.png"), *inside]


def test_results_that_are_no_jpegs(folder: Path) -> None:
    items = batch.plan([Path("in")], Path("out"), written=(".png", ".webp"))
    assert [item.target.name for item in items] == ["a.png", "b.png", "c.png"]
    with pytest.raises(UsageError, match="x.jpg: JPEG has no transparency: write a .png or .webp"):
        batch.plan([Path("e.png")], Path("x.jpg"), written=(".png", ".webp"))
    with pytest.raises(UsageError, match="--output x: expected a name that ends in .png, .webp, or a folder"):
        batch.plan([Path("e.png")], Path("x"), written=(".png", ".webp"))


def test_results_within_the_folder_are_not_read_again(folder: Path) -> None:
    before = planned("in", output="in/big", recursive=True)
    (folder / "in/big").mkdir()
    (folder / "in/big/a.JPG").write_bytes(b"x")
    assert planned("in", output="in/big", recursive=True) == before


@pytest.mark.parametrize(
    ("inputs", "output", "said"),
    [
        (["none.png"], "x.png", "none.png does not exist"),
        (["e.png"], "x", "--output x: expected a name that ends in .jpeg, .jpg, .png, .webp, or a folder"),
        (["e.png"], "x.gif", "x.gif: pictures are written as .jpeg"),
        (["e.png"], "e.png", "e.png is a picture that is to be read"),
        (["e.png"], ".", "e.png is a picture that is to be read"),
        (["in"], "in", "is a picture that is to be read"),
        (["in"], "e.png", "--output e.png is a file: several pictures need a folder"),
        (["in"], "x.png", "--output x.png: several pictures need a folder"),
        (["e.png", "in", "in"], "out", "in/a.JPG and in/a.JPG would both become out/a.JPG"),
        (["empty"], "out", "empty has no pictures .*; folders within it: --recursive"),
    ],
)
def test_what_cannot_be(folder: Path, inputs: list[str], output: str, said: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UsageError, match=said):
        planned(*inputs, output=output)


def test_a_kind_that_is_not_written_can_meet_another(folder: Path) -> None:
    (folder / "in/c.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="in/c.gif and in/c.png would both become out/c.png"):
        planned("in")


def copy(source: Path, target: Path, told: Callable[[float], object]) -> None:
    told(0.5)
    if source.stem == "b":
        raise CnnfastError(f"{source} is damaged")
    target.write_bytes(source.read_bytes())


def items(*names: str) -> list[Item]:
    return [Item(Path(f"{name}.png"), Path(f"out/{name}.png")) for name in names]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in "abcd":
        Path(f"{name}.png").write_bytes(name.encode())
    return tmp_path


def test_a_failure_does_not_stop_the_others(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch.process(items("a", "b", "c"), copy) == 1
    said = capsys.readouterr()
    assert said.out == "2 written, 1 failed\n"
    assert "error: b.png is damaged" in said.err
    assert sorted(p.name for p in Path("out").iterdir()) == ["a.png", "c.png"]


def test_of_one_picture_the_failure_is_raised(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CnnfastError, match="b.png is damaged"):
        batch.process(items("b"), copy)
    assert batch.process(items("a"), copy) == 0
    assert capsys.readouterr().out == "wrote out/a.png\n"


def test_results_that_are_there(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/a.png").write_bytes(b"before")
    assert batch.process(items("a", "c"), copy, skip_existing=True) == 0
    assert capsys.readouterr().out == "1 written, 1 there already\n"
    assert Path("out/a.png").read_bytes() == b"before"
    assert batch.process(items("a", "c"), copy) == 0
    assert Path("out/a.png").read_bytes() == b"a"
    assert batch.process(items("a"), copy, skip_existing=True) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 written, 1 there already"


def test_ctrl_c_and_going_on(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(source: Path, target: Path, told: Callable[[float], object]) -> None:
        if source.stem == "c":
            raise KeyboardInterrupt
        copy(source, target, told)

    assert batch.process(items("a", "c", "d"), stopped) == 130
    assert "stopped: 1 of 3 written; the same command with --skip-existing goes on" in capsys.readouterr().err
    assert batch.process(items("a", "c", "d"), copy, skip_existing=True) == 0
    assert capsys.readouterr().out == "2 written, 1 there already\n"
    assert [Path(f"out/{n}.png").read_bytes() for n in "acd"] == [b"a", b"c", b"d"]


def test_the_parts_of_several_processes(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert batch.process(items("a", "b", "c", "d"), copy) == 1
    said = capsys.readouterr()
    assert said.out == "rank 1 of 2: 1 written, 1 failed\n" and "rank 1 of 2: error: b.png is damaged" in said.err
    assert [p.name for p in Path("out").iterdir()] == ["d.png"]
    monkeypatch.setenv("RANK", "0")
    assert batch.process(items("a", "b", "c", "d"), copy, skip_existing=True) == 0
    assert capsys.readouterr().out == "rank 0 of 2: 2 written\n"
    assert sorted(p.name for p in Path("out").iterdir()) == ["a.png", "c.png", "d.png"]


def test_options() -> None:
    parser = argparse.ArgumentParser()
    batch.add_batch_options(parser)
    batch.add_machine_options(parser)
    given = parser.parse_args(["a.png", "--output", "b.png", "--memory", "1.5G", "--dtype", "bfloat16"])
    assert given.memory == 1.5 * 2**30 and given.png_level == 1 and given.dtype == "bfloat16"
    for wrong in (["--memory", "much"], ["--memory", "100"], ["--png-level", "10"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit):
            parser.parse_args(["a.png", "--output", "b.png", *wrong])
