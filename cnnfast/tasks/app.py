"""``python -m cnnfast app``: the image tasks as a page in the browser, on this machine alone. Needs gradio.

What it looks like stands in `tasks/page.py`, what it does in `pipelines`. Nothing leaves the machine: the page is
served to 127.0.0.1, gradio's reports of use are off, the browser is told to load nothing from elsewhere, and pictures
lie in a folder of this user, which is removed at the end.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import tempfile
import threading
from types import MappingProxyType
from typing import Any

from ..messages import CnnfastError, UsageError
from . import batch
from .arguments import positive
from .interrupt import exit_status
from .machine import choose_device, choose_dtype, require
from .pipelines import Pipelines

__all__ = ["HOST", "add_command"]

PACKAGES = MappingProxyType({"gradio": "gradio", "pillow": "PIL", "scikit-image": "skimage", "tqdm": "tqdm"})
HOST = "127.0.0.1"
_PORT = 7860


def add_command(commands: Any, name: str, **options: Any) -> None:
    """The task's subcommand ``name``; ``options`` are those of ``add_parser``."""
    command = commands.add_parser(name, **options)
    command.add_argument("--port", type=positive, default=_PORT, help=f"of {HOST}, at which the page is (%(default)s)")
    command.add_argument("--open", action="store_true", help="open the page in the browser")
    batch.add_machine_options(command)
    command.set_defaults(work=_work)


def _work(arguments: argparse.Namespace) -> int:
    require("app", PACKAGES)
    _check_port(arguments.port)
    choose_dtype(arguments.dtype, choose_device(arguments.device))  # refused now, not at the first picture
    with tempfile.TemporaryDirectory(prefix="cnnfast-app-") as folder:
        # Read by gradio when it is imported.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder, HF_HUB_DISABLE_TELEMETRY="1")
        os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), HOST]))  # it asks the page itself
        page = importlib.import_module(".page", __package__)  # gradio takes seconds to load
        pipelines = Pipelines(
            device=arguments.device, dtype=arguments.dtype, backend=arguments.backend, memory=arguments.memory
        )
        blocks = page.build(pipelines, folder)
        try:
            url = page.serve(blocks, HOST, arguments.port, open_browser=arguments.open)
            print(f"{url} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt as error:
            return exit_status(error)
        finally:
            blocks.close(verbose=False)
    return 0


def _check_port(port: int) -> None:
    """UsageError for no port, CnnfastError for one that is taken."""
    if port > 65535:
        raise UsageError(f"--port {port}: expected 1 to 65535")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError as error:
            raise CnnfastError(
                f"port {port} of {HOST} cannot be had ({error.strerror}): choose another --port"
            ) from error
