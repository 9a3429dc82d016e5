"""Text to image: the network, its texts, exact resumption, what it learns, the job."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cnnfast
from cnnfast import trained
from cnnfast.__main__ import main
from cnnfast.fetch import WeightsError
from cnnfast.generators import TextImageConfig, TextImageGenerator, create_model
from cnnfast.tasks import evaluation, text_image, train_text
from cnnfast.tasks.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from cnnfast.tasks.drawing import Drawer
from cnnfast.tasks.emoji import Emoji
from cnnfast.tasks.text_image import Options, Texts, Trainer, image_loss
from cnnfast.tasks.text_weights import load_weights, save_weights
from cnnfast.tasks.words import Vocabulary

from ..text_data import shapes
from ..tolerance import assert_close

pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

CPU = torch.device("cpu")
TINY = Options(width=4, image_size=16, batch_size=6, epochs=2, amp="none")
SMALL = TextImageConfig(words=20, letters=39, word_width=8, letter_width=4, width=12, channels=(6, 10, 8))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_image, "STEPS_PER_EPOCH", 3)


def example(batch: int = 3, words: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 21, (batch, words), generator=draw)
    letters = torch.randint(1, 39, (batch, words, 5), generator=draw)
    rows[-1, 2:] = 0  # a shorter text
    letters[-1, 2:] = 0
    return rows, letters


# --- the network ------------------------------------------------------------------------------------------------------


def pair(config: TextImageConfig = SMALL) -> tuple[TextImageGenerator, TextImageGenerator]:
    """The same network in cnnfast.Sequential and nn.Sequential, with running statistics unlike the initial ones."""
    torch.manual_seed(0)
    ours = TextImageGenerator(config)
    with torch.no_grad():
        for module in ours.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 2.0)
                module.bias.normal_()
    plain = TextImageGenerator(config, sequential=nn.Sequential)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("batch", [1, 3])
def test_it_agrees_with_plain_pytorch(batch: int) -> None:
    ours, plain = pair()
    rows, letters = example(batch)
    with torch.inference_mode():
        for _ in range(2):  # unpacked, then packed
            images = ours.eval()(rows, letters)
            assert images.shape == (batch, 3, 32, 32) and images.abs().max() <= 1
            assert_close(images, plain.eval().double()(rows, letters), plain.float()(rows, letters))


def test_it_trains_as_plain_pytorch() -> None:
    ours, plain = pair()
    exact = pair()[1].double()
    rows, letters = example(seed=5)  # no pre-activation so near 0 that its sign is a matter of rounding
    for model in (ours, plain, exact):
        model.train()(rows, letters).square().sum().backward()

    def error(model: nn.Module) -> float:
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        return max(((p.grad - q.grad).abs().max() / q.grad.abs().max()).item() for p, q in pairs)

    assert error(ours) <= 2 * error(plain) + 1e-5


def test_every_block_is_fused() -> None:
    lines = TextImageGenerator(SMALL).explain().splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "Upsample + Conv2d + BatchNorm2d + ReLU fused",
        "Upsample + Conv2d + BatchNorm2d + ReLU fused",
        "Upsample + Conv2d + Tanh fused",
    ]
    assert TextImageGenerator(SMALL, sequential=nn.Sequential).explain() == ""


def test_the_condition_by_hand() -> None:
    """Words are row + letters; what stands behind a text's end says nothing, and order does."""
    torch.manual_seed(1)
    text = TextImageGenerator(SMALL).text.double()
    rows, letters = (t[:1] for t in example(2, 3))
    with torch.no_grad():
        found = text(rows, letters)
        maps = [torch.relu(text.spelling[0](text.letter(letters[0, i]).T[None]))[0].amax(1) for i in range(3)]
        words = torch.stack([text.row(rows[0, i]) + text.spelled(maps[i]) for i in range(3)])
        order = torch.relu(text.order[0](words.T[None]))[0].sum(1) / math.sqrt(3)
        bag = text.bag(words.sum(0))
        torch.testing.assert_close(found[0], text.mix(torch.cat([bag, order])) + bag)
        longer = nn.functional.pad(rows, (0, 2)), nn.functional.pad(letters, (0, 0, 0, 2))
        torch.testing.assert_close(text(*longer), found)
        assert (text(rows.flip(1), letters.flip(1)) - found).abs().max() > 1e-3
        assert (text(torch.zeros_like(rows), letters) - found).abs().max() > 1e-3
        empty = text(torch.zeros_like(rows), torch.zeros_like(letters))
        assert torch.isfinite(empty).all()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"words": 0}, "words=0 must be positive"),
        ({"channels": ()}, r"channels=\(\) must be one or more"),
        ({"channels": (4, 0)}, "must be one or more positive numbers"),
        ({"head_kernel": 4}, "head_kernel=4 must be odd"),
    ],
)
def test_impossible_configurations(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextImageConfig(**wrong)


def test_by_name() -> None:
    model = create_model("text_image", words=5, channels=[4, 4])
    assert isinstance(model, TextImageGenerator) and model.config.image_size == 16
    rows, letters = model.example_input(2)
    assert model.eval()(rows, letters).shape == (2, 3, 16, 16)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_text_belongs_to_one_image() -> None:
    data = shapes()
    changed = list(data.emoji)
    # Three would be "red square": the first by its English name, another by an alias, another in German.
    changed[2] = replace(changed[2], aliases=("red square",))
    changed[3] = replace(changed[3], german="red square", aliases=("yellow thing", "thing"))
    changed[4] = replace(changed[4], aliases=("thing",))
    data = replace(data, emoji=tuple(changed))
    vocabulary = Vocabulary.of([n for e in data.emoji for n in (e.english, *e.aliases)], [e.german for e in data.emoji])
    texts = Texts.of(data, vocabulary)
    said = []
    for first, count in zip(texts.first.tolist(), texts.count.tolist(), strict=True):
        own = [
            tuple(vocabulary.words[r - 1] for r in row if r) for row in texts.rows[first : first + sum(count)].tolist()
        ]
        said.append((own, count))
    assert said[0] == ([("red", "square"), ("rotes", "square")], [1, 0, 1])
    assert said[1] == ([("red", "post"), ("rotes", "post")], [1, 0, 1]), "the alias is another's English name"
    assert said[2] == ([("red", "corner"), ("yellow", "thing")], [1, 1, 0]), "'thing' is of two"


def test_batches_follow_the_weights_and_keep_what_order_says() -> None:
    data = shapes()
    changed = list(data.emoji)
    changed[0] = replace(changed[0], english="red square red bar", german="red square red bar")
    trainer = Trainer(replace(TINY, batch_size=600), replace(data, emoji=tuple(changed)), CPU)
    chosen, rows = trainer._batch(torch.Generator().manual_seed(0))
    assert rows.shape == (600, 16)
    assert set(chosen.tolist()) == set(range(len(data.train)))
    of_first = {tuple(row) for row in rows[chosen == 0].tolist()}
    assert len(of_first) == 1, "with a word twice it is never shuffled"
    others = rows[chosen != 0]
    turned = sum(trainer.vocabulary.words[row[0] - 1] in ("square", "bar", "post", "corner", "frame") for row in others)
    assert 0.05 < turned / len(others) < 0.2  # half of a fifth


def test_rows_start_as_the_regression_of_the_pictures() -> None:
    data = shapes()
    trainer = Trainer(replace(TINY, width=8), data, CPU)
    rows = trainer._first_rows().double()
    images = data.images[list(data.train)].flatten(1).double() / 127.5 - 1
    images -= images.mean(0)
    sums = torch.stack([rows[trainer.texts.rows[i]].sum(0) for i in trainer.texts.first])
    # Of linear functions of the sums of two words, how much of the pictures they explain.
    fit = sums @ torch.linalg.lstsq(sums, images, driver="gelsd").solution
    assert (images - fit).square().sum() < 0.25 * images.square().sum()
    assert not rows[0].any() and rows.shape == (len(trainer.vocabulary.words) + 1, 16)


# --- the trainer ------------------------------------------------------------------------------------------------------


def run_steps(options: Options, steps: int) -> Trainer:
    trainer = Trainer(options, shapes(), CPU)
    for _ in range(steps):
        trainer.step()
    return trainer


def assert_same_bits(a: object, b: object, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple)) and len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(left, right, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_resumed_training_equals_an_uninterrupted_one(amp: str, tmp_path: Path) -> None:
    options = replace(TINY, amp=amp)
    whole = run_steps(options, 5).state()
    save_checkpoint(tmp_path / "c.pt", run_steps(options, 2).state(), "text")
    torch.manual_seed(99)  # nothing may depend on it
    before = torch.get_rng_state()
    resumed = Trainer(options, shapes(), CPU)
    resumed.restore(load_checkpoint(tmp_path / "c.pt", "text"))
    for _ in range(3):
        resumed.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(resumed.state(), whole)
    other = run_steps(replace(options, seed=1), 5)
    assert not torch.equal(other.history(), whole["curves"])


def test_every_parameter_learns() -> None:
    start, after = run_steps(TINY, 0), run_steps(TINY, 3)
    for (name, p), q in zip(start.generator.named_parameters(), after.generator.parameters(), strict=True):
        assert not torch.equal(p, q), name
    assert not after.generator.text.row.weight[0].any(), "row 0 is no word"
    assert after.history().shape == (3, 2) and after.finite()


def test_the_loss_by_hand() -> None:
    made, right = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    d = made - right
    slopes = d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean()
    torch.testing.assert_close(image_loss(made, right), d.abs().mean() + d.square().mean() + slopes / 2)


def test_the_learning_rate_rises_and_falls() -> None:
    trainer = Trainer(replace(TINY, epochs=100), shapes(), CPU)
    rates = []
    for step in range(0, 301, 25):
        trainer.steps = step
        rates.append(trainer._schedule())
    assert rates[0] == pytest.approx(0.01, rel=0.1) and rates[0] < rates[1] < rates[2] < rates[3]
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] == 0 < rates[-2]


def test_a_shorter_training_is_a_longer_one_that_cools_down_earlier() -> None:
    """Of four and six epochs, the last two of which cool down."""
    for steps, same in ((7, True), (8, False)):
        short, long = (run_steps(replace(TINY, epochs=epochs), steps).generator.state_dict() for epochs in (4, 6))
        assert all(torch.equal(short[name], long[name]) for name in short) == same


def test_damaged_checkpoints_are_refused() -> None:
    good = run_steps(TINY, 2).state()
    trainer = Trainer(TINY, shapes(), CPU)
    for key, value, message in (
        ("steps", -1, "steps is -1"),
        ("curves", torch.zeros(1, 2), "there are no curves of 2 steps"),
        ("generator", {}, "generator: .* is missing"),
        ("optimiser", {}, "the optimiser is not of"),
        ("optimiser", None, "the optimiser is not of"),
    ):
        with pytest.raises(CheckpointError, match=message):
            trainer.restore({**good, key: value})
    for key in ("data", "words"):
        with pytest.raises(ValueError, match="--font: these are not the emoji of the checkpoint"):
            trainer.restore({**good, key: None})


def test_it_learns_and_combines() -> None:
    """150 steps on seventeen pictures: all of them are retrieved, and combinations that were not seen."""
    data = shapes()
    trainer = Trainer(Options(width=8, image_size=16, batch_size=16, epochs=50, lr=5e-3, amp="none", seed=3), data, CPU)
    rows = [evaluation.evaluate(data, trainer.vocabulary, trainer.sample)]
    for _ in range(150):
        trainer.step()
    rows.append(evaluation.evaluate(data, trainer.vocabulary, trainer.sample))
    before, after = ({row.texts: row for row in part} for part in rows)
    for title in ("seen in training", "seen, words reversed"):
        assert after[title].top1 == 1 and after[title].psnr > before[title].psnr + 5, title
        assert after[title].plain_top1 is None
    unseen = [row for title, row in after.items() if "unseen" in title]
    assert len(unseen) == 6 and sum(row.top1 for row in unseen) >= 5
    assert all(row.plain_top1 == 0 for row in unseen), "what was not seen is no training picture"
    assert after["skin tones, unseen"].cells()[0] == "skin tones, unseen"


# --- retrieval --------------------------------------------------------------------------------------------------------


def test_retrieval() -> None:
    pool = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 2, 2).contiguous()
    made = torch.tensor([0.1, 2.9, 5.6, 7.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    assert evaluation.retrieve(made, [0, 3, 5, 1], pool).tolist() == [0, 0, 1, 5]
    pool[4] = pool[3]  # either is right
    assert evaluation.retrieve(made[1:2], [4], pool).tolist() == [0]


def test_the_nearest_description() -> None:
    known = torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
    texts = torch.tensor([[1.0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert evaluation.nearest_description(texts, known).tolist() == [0, 1, 2, 0]


def test_psnr() -> None:
    assert evaluation.psnr(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)) == pytest.approx(20.0, rel=1e-5)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_come_back_in_half_precision(tmp_path: Path) -> None:
    trainer = run_steps(TINY, 2)
    path = tmp_path / "text.npz"
    save_weights(path, trainer.generator, trainer.vocabulary, {"seed": 0})
    first = path.read_bytes()
    save_weights(path, trainer.generator, trainer.vocabulary, {"seed": 0})
    assert path.read_bytes() == first, "equal contents, equal bytes"
    model, vocabulary, about = load_weights(path)
    assert vocabulary == trainer.vocabulary and about == {"seed": 0} and model.config == trainer.config
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    for name, value in trainer.generator.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(model.state_dict()[name], expected), name
    assert type(load_weights(path, sequential=nn.Sequential)[0].blocks[0].layers) is nn.Sequential
    drawn = Drawer(path, device="cpu").images(["red square", "Red  squares!"])
    torch.testing.assert_close(drawn[0], drawn[1])
    assert drawn.shape == (2, 3, 16, 16)


def test_weights_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "text.npz"
    with pytest.raises(WeightsError, match="cannot be read: .*text.npz: No such file"):
        load_weights(path)
    for rubbish in (b"", b"rubbish", b"PK\x03\x04" + b"x" * 100):
        path.write_bytes(rubbish)
        with pytest.raises(WeightsError, match="holds no weights of 'text_image'"):
            load_weights(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(WeightsError, match="holds no weights of 'text_image': KeyError"):
        load_weights(path)
    np.savez(path, config=np.array(["a"], dtype=object))
    with pytest.raises(WeightsError, match="holds no weights"):
        load_weights(path)
    trainer = run_steps(TINY, 0)
    save_weights(path, trainer.generator, trainer.vocabulary, {})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="holds no weights"):
        load_weights(path)
    arrays = {}
    path.write_bytes(whole)
    arrays.update(trained.load("text_image", path))
    arrays["config"] = np.array(json.dumps({**json.loads(str(arrays["config"])), "width": 9}))
    np.savez(path, **arrays)
    with pytest.raises(WeightsError, match="of its sizes: .* has the shape"):
        load_weights(path)


# --- the job ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_font(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job on shapes."""
    monkeypatch.setattr(train_text, "load_emoji", lambda size, font: shapes(size))


def arguments(output: Path, *more: str) -> list[str]:
    tiny = "train text --width 4 --image-size 16 --batch-size 6 --device cpu --amp none --epochs 2".split()
    return [*tiny, "--output", str(output), *more]


def test_the_job_end_to_end(no_font: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(arguments(output)) == 0
    said = capsys.readouterr().out
    assert "17 emoji and 35 texts of 14 words; kept back: 1 skin tones, 1 tone pairs, 1 gender x role" in said
    assert "epoch 1/2: loss" in said and "epoch 2/2" in said and "gender x role, unseen, German" in said
    names = sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file())
    expected = ["checkpoint.pt", "loss.png", "real.png", "samples/epoch_0001.png", "samples/epoch_0002.png", "text.npz"]
    assert names == expected
    state = load_checkpoint(output / "checkpoint.pt", "text")
    assert state["steps"] == 6
    about = load_weights(output / "text.npz")[2]
    assert about["steps"] == 6 and about["options"]["seed"] == 0 and about["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(about), "where it was made is nobody's business"
    picture = tmp_path / "drawing.png"
    command = ["draw", "green", "post", "--weights-file", str(output / "text.npz"), "--output", str(picture)]
    assert main([*command, "--device", "cpu"]) == 0 and picture.is_file()

    capsys.readouterr()
    assert main(arguments(output)) == 2
    assert "checkpoint.pt exists: go on from it with --resume" in capsys.readouterr().err
    assert main(arguments(output, "--resume")) == 0
    assert capsys.readouterr().out == f"nothing to do: {output}/checkpoint.pt is at epoch 2\n"
    assert main([*arguments(output, "--resume"), "--epochs", "3"]) == 2
    assert "--epochs 3: " in (said := capsys.readouterr().err) and "was trained with 2; drop --epochs" in said


def test_an_interrupted_job_goes_on_to_the_same_bits(
    no_font: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import signal

    step = Trainer.step

    def interrupted(self: Trainer) -> torch.Tensor:
        if self.steps == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    assert main(arguments(tmp_path / "whole")) == 0
    monkeypatch.setattr(Trainer, "step", interrupted)
    assert main(arguments(tmp_path / "out")) == 130
    said = capsys.readouterr().out
    assert "Stopped after step 4 of 6" in said and "train text --resume --output" in said
    monkeypatch.setattr(Trainer, "step", step)
    assert main(["train", "text", "--resume", "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pt", "text") for name in ("out", "whole"))
    assert_same_bits(a, b)
    assert (tmp_path / "out" / "text.npz").read_bytes() == (tmp_path / "whole" / "text.npz").read_bytes()


def test_what_cannot_be_asked_for(no_font: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, message in (
        (["--image-size", "48"], "--image-size 48: expected one of 16, 32, 64"),
        (["--lr", "nan"], "--lr nan: expected a positive number"),
        (["--batch-size", "1"], "--batch-size 1: expected at least 2"),
        (["--width", "1"], "--width 1: expected at least 2"),
    ):
        assert main([*arguments(tmp_path / "out"), *wrong]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "gan").mkdir()
    save_checkpoint(tmp_path / "gan" / "checkpoint.pt", {"steps": 1})
    assert main(arguments(tmp_path / "gan", "--resume")) == 1
    assert "is no checkpoint of `python -m cnnfast train text`" in capsys.readouterr().err


def test_without_the_font(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from cnnfast.tasks import emoji

    monkeypatch.setattr(emoji, "_FONTS", ())
    assert main(arguments(tmp_path / "out")) == 2
    assert "Noto Color Emoji is not installed: install fonts-noto-color-emoji" in capsys.readouterr().err
    assert main([*arguments(tmp_path / "out"), "--font", str(tmp_path / "no.ttf")]) == 2
    assert "no.ttf is not a file: install fonts-noto-color-emoji" in capsys.readouterr().err


def test_the_public_names() -> None:
    assert {"draw", "generate", "Drawer", "Sampler"} <= set(dir(cnnfast.tasks))
    assert cnnfast.tasks.draw.__module__ == "cnnfast.tasks.drawing"
    with pytest.raises(AttributeError, match="has no attribute 'paint'"):
        _ = cnnfast.tasks.paint
    assert isinstance(Emoji("a", "a", 0, "b", (), "c").names, tuple)
