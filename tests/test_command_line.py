"""Wrong command lines: no traceback, no false success, the right exit status, one line on standard error.

Most run in this process; of each class of failure one runs as people start it.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnnfast import generators
from cnnfast.__main__ import main
from cnnfast.fetch import cached_path
from cnnfast.generators import weights
from cnnfast.generators.weights import PRETRAINED
from cnnfast.messages import LOGGER, CnnfastError, UsageError, one_line
from cnnfast.tasks import demo, env, train
from cnnfast.tasks.checkpoint import save_checkpoint
from cnnfast.tasks.gan import Options, Trainer
from cnnfast.tasks.interrupt import Terminated

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

posix = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and users as POSIX has them")


WHEEL = PRETRAINED["dcgan_faces"].file.wheel


# --- a place to work in -----------------------------------------------------------------------------------------------


def digits_of(folder: Path, count: int = 4) -> None:
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (count, 16, 16), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def checkpoint_state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Of three epochs of one step."""
    options = Options(data="pictures", width=2, nz=4, image_size=16, batch_size=4, epochs=3)
    folder = tmp_path_factory.mktemp("state") / "pictures"
    digits_of(folder)
    trainer = Trainer(options, train.load_images(str(folder), 16), torch.device("cpu"))
    for _ in range(3):
        trainer.step()
    return trainer.state()


@pytest.fixture(scope="module")
def template(checkpoint_state: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pictures/, done/checkpoint.pt (three epochs), and files of every kind that is wrong."""
    folder = tmp_path_factory.mktemp("template")
    digits_of(folder / "pictures")
    digits_of(folder / "others", 5)
    digits_of(folder / "one", 1)
    digits_of(folder / "cut")
    (folder / "cut" / "2.png").write_bytes((folder / "cut" / "2.png").read_bytes()[:60])
    (folder / "empty").mkdir()
    (folder / "file").write_text("no folder")
    save_checkpoint(folder / "done" / "checkpoint.pt", checkpoint_state)
    whole = (folder / "done" / "checkpoint.pt").read_bytes()
    states: dict[str, Callable[[dict[str, Any]], object]] = {
        "keys.pt": lambda s: s.pop("average"),
        "shapes.pt": lambda s: s["average"].update({"main.0.weight": torch.ones(3)}),
        "config.pt": lambda s: s["config"].update(ngf=10**8),
    }
    for name, spoil in states.items():
        bad = copy.deepcopy(checkpoint_state)
        spoil(bad)
        save_checkpoint(folder / name, bad)
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("text")
    torch.save({"format": "another"}, folder / "another.pt")
    torch.save(torch.nn.Linear(1, 1), folder / "pickle.pt")
    for name in ("keys", "half", "text", "pickle"):
        (folder / f"resume-{name}").mkdir()
        (folder / f"resume-{name}" / "checkpoint.pt").write_bytes((folder / f"{name}.pt").read_bytes())
    (folder / WHEEL).write_bytes(b"PK\3\4 damaged")
    (folder / "weights.tar").write_bytes(b"other weights")
    (folder / "blocked").mkdir()
    (folder / "blocked" / "samples").write_text("no folder")
    (folder / "link").symlink_to("nowhere")
    return folder


@pytest.fixture
def place(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `template` as the current folder, an empty cache, and a pip that finds no network."""
    shutil.copytree(template, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(generators, "load_weights", lambda name, file: weights.load_weights(name, file, no_network))
    monkeypatch.setattr(train, "load_images", lambda data, size: real_load_images(data, size, no_network))
    return tmp_path


real_load_images = train.load_images


def no_network(arguments: list[str]) -> tuple[int, str]:
    return 1, "WARNING: Retrying\nERROR: No matching distribution found"


def status_of(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as error:  # argparse's
        assert isinstance(error.code, int)
        return error.code


def everything_in(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*") if "cache" not in p.parts}


# --- the wrong lines --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    """``line`` split at blanks; ``said`` a pattern of the last line on standard error."""

    line: str
    status: int
    said: str
    makes: tuple[str, ...] = ()  # folders for output that are made before it fails


TRAIN = "train gan --device cpu --width 2 --nz 4 --image-size 16 --batch-size 4 --data pictures --output new "
RESUME = "train gan --device cpu --resume --output "
DEMO = "demo --device cpu --output new "
NEW = ("new",)

WRONG = [
    # argparse's
    Wrong("", 2, "the following arguments are required: COMMAND"),
    Wrong("fly", 2, "invalid choice: 'fly'"),
    Wrong("--fly", 2, "required: COMMAND"),
    Wrong("env --fly", 2, "unrecognized arguments: --fly"),
    Wrong("env more", 2, "unrecognized arguments: more"),
    Wrong("train", 2, "required: MODEL"),
    Wrong("train vae", 2, "invalid choice: 'vae'"),
    Wrong("sample", 2, "required: checkpoint"),
    Wrong("demo --repeats", 2, "--repeats: expected one argument"),
    Wrong("demo --repeats 0", 2, "--repeats: expected a positive whole number, got '0'"),
    Wrong("demo --repeats -3", 2, "--repeats: expected a positive whole number, got '-3'"),
    Wrong("demo --repeats many", 2, "--repeats: expected a positive whole number, got 'many'"),
    Wrong("demo --repeats 1.5", 2, "--repeats: expected a positive whole number, got '1.5'"),
    Wrong("demo --repeats 99999999999", 2, r"expected a positive whole number below 2\*\*31, got '99999999999'"),
    Wrong(f"demo --repeats {'9' * 5000}", 2, r"expected a positive whole number, got '9{3,20}\.\.\.9+'"),
    Wrong("demo --seed x", 2, r"--seed: expected a whole number from 0 to 2\*\*63 - 1, got 'x'"),
    Wrong(
        f"demo --seed {2**64}", 2, r"--seed: expected a whole number from 0 to 2\*\*63 - 1, got '18446744073709551616'"
    ),
    Wrong("demo --seed -1", 2, "--seed: expected a whole number from 0"),
    Wrong(f"sample done/checkpoint.pt --seed {2**63}", 2, "--seed: expected a whole number from 0"),
    Wrong(f"train gan --seed {10**30}", 2, "--seed: expected a whole number from 0"),
    Wrong("sample done/checkpoint.pt --count 0", 2, "--count: expected a positive whole number"),
    Wrong("sample done/checkpoint.pt --count ''", 2, "--count: expected a positive whole number"),
    Wrong("tune --batch 0", 2, "--batch: expected a positive whole number"),
    Wrong("tune --batch", 2, "--batch: expected at least one argument"),
    Wrong("tune --seconds -1", 2, "--seconds: expected a positive whole number"),
    Wrong("tune --dtype int8", 2, "--dtype: invalid choice: 'int8'"),
    Wrong(TRAIN + "--epochs 0", 2, "--epochs: expected a positive whole number"),
    Wrong(TRAIN + "--loss mse", 2, "--loss: invalid choice: 'mse'"),
    Wrong(TRAIN + "--amp fp16", 2, "--amp: invalid choice: 'fp16'"),
    Wrong(TRAIN + "--lr fast", 2, "--lr: invalid float value: 'fast'"),
    # values that cannot be
    Wrong(TRAIN + "--lr 0", 2, "--lr 0.0: expected a positive number"),
    Wrong(TRAIN + "--lr nan", 2, "--lr nan: expected a positive number"),
    Wrong(TRAIN + "--lr inf", 2, "--lr inf: expected a positive number"),
    Wrong(TRAIN + "--instance-noise -1", 2, "--instance-noise -1.0: expected at least 0"),
    Wrong(TRAIN + "--image-size 48", 2, "image_size=48 must be a power of two, at least 8"),
    Wrong(TRAIN + "--image-size 4", 2, "image_size=4 must be a power of two, at least 8"),
    Wrong(TRAIN + "--data nothing", 2, "--data nothing: expected one of digits, faces, tissue, or a folder", NEW),
    Wrong(TRAIN + "--data file", 2, "--data file: expected one of", NEW),
    Wrong(TRAIN + "--data ''", 2, "--data : expected one of", NEW),
    Wrong("tune stylegan9", 2, "unknown model stylegan9: expected some of dcgan, dcgan_faces"),
    # devices
    Wrong("demo --device meta", 2, "--device meta: "),
    Wrong("demo --device gpu", 2, "--device gpu: Expected one of cpu"),
    Wrong("demo --device ''", 2, "--device : Device string must not be empty"),
    Wrong("demo --device cuda:-1", 2, "--device cuda:-1: "),
    Wrong("demo --device cuda:77", 2, "--device cuda:77: "),
    Wrong("demo --device vulkan", 2, "--device vulkan: "),
    Wrong("demo --device hpu", 2, "--device hpu: "),
    Wrong(TRAIN + "--device meta", 2, "--device meta: "),
    Wrong(TRAIN + "--device xla", 2, "--device xla: "),
    Wrong(TRAIN + "--device mkldnn", 2, "--device mkldnn: "),
    Wrong("tune --device meta", 2, "--device meta: what can be tuned is a CUDA device or the CPU"),
    Wrong("tune --device ''", 2, "--device : Device string must not be empty"),
    Wrong("tune --device cuda:77", 1, "nothing can be tuned here: "),
    # absurd sizes
    Wrong(TRAIN + "--width 2000000000", 1, "out of memory: --width 2000000000, .* needs at least [0-9,]+ GiB, this"),
    Wrong(TRAIN + "--nz 2000000000", 1, "out of memory: "),
    Wrong(TRAIN + "--image-size 1073741824", 1, "out of memory: .*--image-size 1073741824"),
    Wrong(TRAIN + "--batch-size 2000000000", 1, "out of memory: .*--batch-size 2000000000 needs"),
    Wrong("sample done/checkpoint.pt --count 2000000000", 1, "out of memory: --count 2000000000 needs at least"),
    # files that are not there, or not what they should be
    Wrong(
        "sample nothing.pt", 2, "nothing.pt is not a file: expected a checkpoint.pt of `python -m cnnfast train gan`"
    ),
    Wrong("sample empty", 2, "empty is not a file"),
    Wrong("sample link", 2, "link is not a file"),
    Wrong("sample ''", 2, ". is not a file"),
    Wrong("sample file/below", 2, "file/below is not a file"),
    Wrong(f"sample {'x' * 300}", 2, "x+ is not a file"),
    Wrong("sample text.pt", 1, "text.pt cannot be read as a checkpoint: it is damaged or something else"),
    Wrong("sample half.pt", 1, "half.pt cannot be read as a checkpoint: "),
    Wrong("sample another.pt", 1, "another.pt is no checkpoint of `python -m cnnfast train gan` of this version"),
    Wrong(
        "sample pickle.pt", 1, "pickle.pt cannot be read as a checkpoint: it asks for torch.nn.modules.linear.Linear"
    ),
    Wrong("sample keys.pt", 1, "keys.pt holds no generator: KeyError: 'average'"),
    Wrong("sample shapes.pt", 1, r"shapes.pt holds no generator of its sizes: main.0.weight has the shape \(3,\)"),
    Wrong("sample config.pt", 1, "config.pt holds no generator"),
    Wrong("sample done/checkpoint.pt --output empty", 2, "--output empty is a folder: expected the name of a PNG"),
    Wrong("sample done/checkpoint.pt --output ''", 2, "--output . is a folder"),
    Wrong("sample done/checkpoint.pt --output file/a.png", 1, "file: (File exists|Not a directory)"),
    Wrong(f"sample done/checkpoint.pt --output {'x' * 300}", 1, "x+: File name too long"),
    Wrong(DEMO + "--weights-file nothing.whl", 2, "--weights-file: nothing.whl is not a file"),
    Wrong(DEMO + "--weights-file empty", 2, "--weights-file: empty is not a file"),
    Wrong(DEMO + "--weights-file weights.tar", 1, "weights.tar is not gan_face_generate/weights.tar of gan-face", NEW),
    Wrong(
        DEMO + f"--weights-file {WHEEL}", 1, f"{WHEEL} cannot be read .BadZipFile: .* delete it, and get it with", NEW
    ),
    Wrong(DEMO, 1, "pip could not download gan-face-generate.* It said: .*No matching distribution found", NEW),
    Wrong(TRAIN + "--data digits", 1, "pip could not download scikit-learn.* or train on your own images", NEW),
    Wrong("demo --device cpu --output file", 1, "file: File exists"),
    Wrong("demo --device cpu --output file/below", 1, "file/below: Not a directory"),
    Wrong("demo --device cpu --output link", 1, "link: File exists"),
    Wrong(f"demo --device cpu --output {'x' * 300}", 1, "x+: File name too long"),
    # a training
    Wrong(TRAIN + "--data empty", 1, "--data empty: 0 images .* expected at least 2", NEW),
    Wrong(TRAIN + "--data one", 1, "--data one: 1 images .* expected at least 2", NEW),
    Wrong(TRAIN + "--data cut", 1, "--data cut: 2.png cannot be read: ", NEW),
    Wrong(TRAIN + "--output file", 1, "file: File exists"),
    Wrong(TRAIN + "--output blocked", 1, "blocked/samples: File exists"),
    Wrong(TRAIN + "--output done", 2, "done/checkpoint.pt exists: go on from it with --resume"),
    Wrong(
        RESUME + "empty", 2, "empty/checkpoint.pt is not a file: there is no checkpoint to go on from; train without"
    ),
    Wrong(RESUME + "nothing", 2, "nothing/checkpoint.pt is not a file: there is no checkpoint to go on from"),
    Wrong(RESUME + "resume-half", 1, "resume-half/checkpoint.pt cannot be read as a checkpoint"),
    Wrong(RESUME + "resume-text", 1, "resume-text/checkpoint.pt cannot be read as a checkpoint"),
    Wrong(RESUME + "resume-pickle", 1, "it asks for torch.nn.modules.linear.Linear"),
    Wrong(RESUME + "resume-keys --epochs 9", 1, "resume-keys/checkpoint.pt is damaged: average: expected a state_dict"),
    Wrong(RESUME + "done --epochs 1", 2, "--epochs 1: done/checkpoint.pt is past that, at epoch 3"),
    Wrong(RESUME + "done --batch-size 8", 2, "--batch-size 8: done/checkpoint.pt was trained with 4"),
    Wrong(RESUME + "done --data others", 2, "--data others: done/checkpoint.pt was trained with pictures"),
    Wrong(RESUME + "done --seed 7 --epochs 9", 2, "--seed 7: done/checkpoint.pt was trained with 0"),
]


def words(line: str) -> list[str]:
    return ["" if word == "''" else word for word in line.split()]


def name_of(line: str) -> str:
    """Of a test: what is wrong in the line."""
    return re.sub(r"(.)\1{9,}", r"\1..", line.replace(TRAIN, "train ").replace(RESUME, "resume ")) or "nothing"


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: name_of(w.line))
def test_wrong_command_lines(wrong: Wrong, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = everything_in(place)
    with warnings.catch_warnings(record=True) as caught:  # each would be two lines more
        warnings.simplefilter("always")
        assert status_of(words(wrong.line)) == wrong.status
    captured = capfd.readouterr()
    assert [str(w.message) for w in caught] == []
    told = [line for line in captured.err.splitlines() if not line.startswith("cnnfast: downloading")]
    assert re.search(wrong.said, told[-1]), captured.err
    assert "error: " in told[-1] and "Traceback" not in captured.err and "wrote" not in captured.out
    assert len(told) == 1 or (wrong.status == 2 and told[0].startswith("usage: ")), captured.err
    made = {place / name for name in wrong.makes}
    assert {p: data for p, data in everything_in(place).items() if p not in made} == before


def test_there_are_as_many_as_it_takes() -> None:
    assert len(WRONG) >= 60 and len({w.line for w in WRONG}) == len(WRONG)


def test_other_images_than_those_before(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "pictures" / "0.png").unlink()
    assert status_of(words(RESUME + "done --epochs 9")) == 2
    assert capfd.readouterr().err == "error: --data pictures: these are not the images of the checkpoint\n"


def test_right_lines_say_nothing_on_standard_error(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for line in ("env", "models", "sample done/checkpoint.pt --count 3", TRAIN + "--epochs 1", RESUME + "done"):
        assert status_of(words(line)) == 0
        assert capfd.readouterr().err == "", line


# --- the handler ------------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> str:
        raise error

    monkeypatch.setattr(env, "report", fail)


@pytest.mark.parametrize(
    "error, status, said",
    [
        (UsageError("--x 3: expected 4"), 2, "error: --x 3: expected 4"),
        (CnnfastError("one\n   two\n\nthree"), 1, "error: one two three"),
        (FileNotFoundError(2, "No such file or directory", "a\nb"), 1, r"error: a\nb: No such file or directory"),
        (OSError("as it is"), 1, "error: as it is"),
        (MemoryError(), 1, "error: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "error: out of memory: CUDA out of memory. Tried"),
        (RuntimeError("first\nsecond"), 1, "error: RuntimeError: first (--debug shows where)"),
        (
            RuntimeError("Error(s) in x:\n\tMissing"),
            1,
            "error: RuntimeError: Error(s) in x: Missing (--debug shows where)",
        ),
        (ValueError(), 1, "error: ValueError (--debug shows where)"),
        (KeyError("x"), 1, "error: KeyError: 'x' (--debug shows where)"),
        (AssertionError("\x1b[31mred"), 1, r"error: AssertionError: \x1b[31mred (--debug shows where)"),
        (RecursionError("x" * 1000), 1, f"error: RecursionError: {'x' * 300} ... (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "terminated"),
        (UnicodeEncodeError("ascii", "\xe9", 0, 1, "no"), 1, "error: UnicodeEncodeError: "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_failure_is_one_line(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, error)
    assert main(["env"]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith(said) and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("argv", [["--debug", "env"], ["env", "--debug"]], ids=["before", "after"])
def test_debug_shows_the_traceback(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, RuntimeError("a fault"))
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("error: RuntimeError: a fault (--debug shows where)\n")


@pytest.mark.parametrize("line", ["--debug train gan", "train --debug gan", "train gan --debug"])
def test_debug_stands_anywhere(line: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(f"{line} --device meta --data pictures")) == 2
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_pipe_that_breaks_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, BrokenPipeError(32, "Broken pipe"))
    assert main(["env"]) == 141
    assert capsys.readouterr() == ("", "")


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = (warnings.showwarning, LOGGER.level, list(LOGGER.handlers))
    failing(monkeypatch, RuntimeError("a fault"))
    assert main(["env"]) == 1
    assert (warnings.showwarning, LOGGER.level, list(LOGGER.handlers)) == before


def test_one_line_of_torch_s_own() -> None:
    """Texts of several lines, with the addresses of a stack."""
    module = torch.nn.Linear(2, 2)
    for fault in (
        lambda: module.load_state_dict({}),
        lambda: torch.empty(2**50),
        lambda: torch.empty(2**40, 2**40),
        lambda: torch.empty(10**30),
        lambda: torch.ones(2, device="vulkan"),
    ):
        with pytest.raises((RuntimeError, TypeError, NotImplementedError)) as caught:
            fault()
        assert "\n" not in one_line(caught.value) and len(one_line(caught.value)) < 400
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert one_line(caught.value).startswith("out of memory: ")


# --- what must not fail -----------------------------------------------------------------------------------------------


def test_a_cache_that_is_damaged_in_every_way(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = cached_path(PRETRAINED["dcgan_faces"].file)
    for make in (lambda: path.mkdir(parents=True), lambda: path.symlink_to("nowhere"), lambda: path.write_bytes(b"x")):
        if path.is_dir():
            path.rmdir()
        elif path.is_symlink():
            path.unlink()
        make()
        assert status_of(words(DEMO)) == 1
        told = capfd.readouterr().err.splitlines()
        assert [line for line in told if line.startswith("error: ")] == told[-1:] and "Traceback" not in told
        assert all(line.startswith("cnnfast: ") for line in told[:-1])


def test_a_wheel_laid_by_hand_that_is_damaged(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "cache").mkdir()
    (place / WHEEL).rename(place / "cache" / WHEEL)
    assert status_of(words(DEMO)) == 1
    said = capfd.readouterr().err
    assert said.startswith(f"error: {place}/cache/{WHEEL} cannot be read (BadZipFile: ") and said.count("\n") == 1


def test_one_repeat_is_said_to_show_no_spread(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = generators.DCGANConfig(ngf=2)
    small = lambda name, sequential, **options: generators.DCGANGenerator(config, sequential=sequential).eval()  # noqa: E731
    monkeypatch.setattr(demo, "create_model", small)
    monkeypatch.setattr(demo, "FLOAT32_TOLERANCE", float("inf"))  # of random weights, each network has its own
    assert status_of(words(DEMO + "--repeats 1")) == 0
    assert "NOTE: too few repeats (1) to know the spread" in capfd.readouterr().out


# --- as people start it -----------------------------------------------------------------------------------------------


def run(*argv: str, script: bool = False, **options: object) -> subprocess.CompletedProcess[str]:
    start = [str(Path(sys.executable).with_name("cnnfast"))] if script else [sys.executable, "-m", "cnnfast"]
    settings: dict[str, object] = {"capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run([*start, *argv], **settings)  # type: ignore[call-overload,no-any-return]


def test_a_wrong_argument(place: Path) -> None:
    done = run("sample", "done/checkpoint.pt", "--count", "x")
    assert done.returncode == 2 and done.stdout == ""
    usage, error = done.stderr.splitlines()[0], done.stderr.splitlines()[-1]
    assert usage.startswith("usage: python -m cnnfast sample ")
    assert error == "python -m cnnfast sample: error: argument --count: expected a positive whole number, got 'x'"


def test_what_cannot_be_asked_for(place: Path) -> None:
    done = run("sample", "nothing.pt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nothing.pt is not a file") and done.stderr.count("\n") == 1


def test_a_failure(place: Path) -> None:
    done = run("sample", "text.pt")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: text.pt cannot be read as a checkpoint: it is damaged or something else\n"


@pytest.mark.slow
def test_a_failure_with_debug(place: Path) -> None:
    done = run("sample", "text.pt", "--debug")
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "error: text.pt" in done.stderr


@pytest.mark.slow
def test_the_console_script(place: Path) -> None:
    if not Path(sys.executable).with_name("cnnfast").exists():
        pytest.skip("not installed: run from a checkout")
    assert run("models", script=True).stdout == run("models").stdout
    done = run("sample", "nothing.pt", script=True)
    assert done.returncode == 2 and done.stderr.startswith("error: nothing.pt is not a file")
    assert run("fly", script=True).stderr.startswith("usage: cnnfast ")


@posix
@pytest.mark.parametrize("argv", [["models"], ["--help"]], ids=lambda argv: argv[0])
def test_nobody_reads_the_output(argv: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*argv, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.stderr == "" and done.returncode in ((141,) if argv != ["--help"] else (0, 141))


@posix
def test_a_full_disk_under_the_output() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = run("models", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr == "error: No space left on device\n"


@pytest.mark.slow
@posix
def test_closed_streams() -> None:
    for redirection in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f"exec '{sys.executable}' -m cnnfast models {redirection}"], capture_output=True
        )
        assert done.returncode == 0 and b"Traceback" not in done.stderr, redirection


@posix
def test_ctrl_c(place: Path) -> None:
    """In the middle of an import, at the earliest moment that a person could."""
    code = "import sys, signal, cnnfast.tasks.env as env, cnnfast.__main__ as m\n"
    code += "env.report = lambda: signal.raise_signal(signal.SIGINT)\nsys.exit(m.main(['env']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.slow
@posix
def test_ctrl_c_while_it_starts(place: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cnnfast", *words(TRAIN), "--epochs", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = 200
        while not (place / "new").exists() and deadline:
            deadline -= 1
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and "Traceback" not in err and err.strip()


@pytest.fixture
def homeless(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container under a user id that no password file knows."""
    pwd = pytest.importorskip("pwd")

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "CNNFAST_CACHE"):
        monkeypatch.delenv(name, raising=False)


def test_no_home(homeless: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert status_of(["env"]) == 0
    assert "kept in no folder for the cache (the home folder is not known): set CNNFAST_CACHE" in capfd.readouterr().out
    assert status_of(words("sample done/checkpoint.pt --count 1")) == status_of(words(TRAIN + "--epochs 1")) == 0
    assert capfd.readouterr().err == ""
    for line in (DEMO, TRAIN + "--output more --data digits"):
        assert status_of(words(line)) == 1
        expected = (
            "no folder for the cache (the home folder is not known): set CNNFAST_CACHE to one that can be written"
        )
        assert capfd.readouterr().err == f"error: {expected}\n"


@pytest.mark.slow
@posix
def test_names_that_cannot_be_printed(place: Path) -> None:
    name = b"caf\xe9\n\x1b.png"
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "cnnfast", "sample", "done/checkpoint.pt", "--count", "1", "--output"]
    done = subprocess.run([*command, name], capture_output=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith(b"wrote caf") and done.stderr == b""
    assert (os.fsencode(place) + b"/" + name) in [os.fsencode(place) + b"/" + n for n in os.listdir(os.fsencode(place))]
    done = subprocess.run([*command, b"file/" + name], capture_output=True, env=environment)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"\x1b" not in done.stderr


@pytest.mark.slow
@posix
def test_nothing_is_sold_as_memory_that_is_not_there(place: Path) -> None:
    """Weights that a machine could hold, and a process of 4 GiB cannot."""
    resource = pytest.importorskip("resource")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))

    done = run(*words(TRAIN + "--width 4000"), preexec_fn=limit)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: out of memory: ") and "--debug" not in done.stderr
